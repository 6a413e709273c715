"""How many values an evaluation clips: those outside of the static range of the quantizer that takes them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor


class CountedNode(Protocol):
    """What counting needs of a node; `quant.modules.QuantModule` is one."""

    def quantizers(self) -> list: ...


class ClipCounter:
    """Values that quantizers clip, and all values that they take; quantizers add to it.

    Args:
        names: of the node that each quantizer belongs to, by the quantizer's id.
    """

    def __init__(self, names: Mapping[int, str]):
        self.names = names
        self._clipped: dict[str, Tensor] = {}
        self._values: dict[str, int] = {}

    def add(self, quantizer: object, numbers: Tensor, low: Tensor, high: Tensor) -> None:
        """Count numbers before clipping, in the steps of their limits."""
        name = self.names.get(id(quantizer))
        if name is None:
            return
        outside = ((numbers < low) | (numbers > high)).sum()
        self._clipped[name] = self._clipped.get(name, torch.zeros_like(outside)) + outside
        self._values[name] = self._values.get(name, 0) + numbers.numel()

    def shares(self) -> dict[str, float]:
        """Clipped values of each node as a share of all that it took; only nodes that clip, largest first."""
        shares = {name: int(count) / self._values[name] for name, count in self._clipped.items()}
        return dict(sorted(((n, s) for n, s in shares.items() if s), key=lambda item: -item[1]))


@contextmanager
def counting(nodes: Mapping[str, CountedNode]) -> Iterator[ClipCounter]:
    """Count what the quantizers of these nodes clip in every forward within the context."""
    quantizers = {id(part): (name, part) for name, node in nodes.items() for part in node.quantizers()}
    counter = ClipCounter({key: name for key, (name, _) in quantizers.items()})
    for _, part in quantizers.values():
        part.clip_counter = counter
    try:
        yield counter
    finally:
        for _, part in quantizers.values():
            part.clip_counter = None
