"""J, R and D of a codec with parts of it quantized, measured by running it.

What comes before a part is float, so its outputs are computed once for each batch (`PrefixCache`) and a
measurement runs the rest only.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from licq.quant.mac import QuantMAC
from licq.quant.model import QuantModel
from licq.quant.runtime import Call
from licq.reconstruction.cache import PrefixCache
from licq.reconstruction.objective import Objective, rate
from licq.reconstruction.targets import tensor_of
from licq.reconstruction.units import Trace, Unit, find_units
from licq.support.errors import InputError

SIDES = ("weights", "inputs", "both")

Remember = Callable[[str, Callable[[], Any]], Any]
"""(name, compute) -> what compute() gives, or gave in an earlier process.

The command line's is `runs.folder.QualityFolder.part`.
"""


@dataclass(frozen=True)
class Cost:
    """Means over crops, in bits per pixel: j = bpp + weighted_distortion, which is lambda * D."""

    j: float
    bpp: float
    weighted_distortion: float

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(
            self.j - other.j, self.bpp - other.bpp, self.weighted_distortion - other.weighted_distortion
        )


class Probe:
    """Measures J, R and D with parts of a codec quantized.

    Args:
        qmodel: observed, not frozen; its nodes are left in float.
        batches: crops, (B, 3, H, W) each.
        objective: J.
    """

    def __init__(self, qmodel: QuantModel, batches: Sequence[Tensor], objective: Objective):
        self.qmodel, self.batches, self.objective = qmodel, batches, objective
        qmodel.quantize_nodes(False)
        self.trace = Trace(qmodel, batches[0])
        self.real = self._cost()
        self._cache = PrefixCache(qmodel, self.trace, batches)
        self._start: Call | None = None

    def units(self, kind: str) -> list[Unit]:
        """The codec's units of a kind, see `units.find_units`."""
        return find_units(self.qmodel, self.trace, kind)

    def layers(self) -> list[Unit]:
        """Every multiply-accumulate layer by itself, without the functions that follow it."""
        names = dict.fromkeys(
            name for name, _ in self.trace.leaves if isinstance(self.qmodel.nodes[name], QuantMAC)
        )
        calls = {name: tuple(call for call in self.trace.leaves if call[0] == name) for name in names}
        return [Unit(name, (name,), of[0], of) for name, of in calls.items()]

    def layer(self, name: str) -> Unit:
        """One of `layers`.

        Raises:
            InputError: there is none of this name.
        """
        layers = {unit.name: unit for unit in self.layers()}
        if name not in layers:
            raise InputError(f"no layer {name!r} to analyze; the layers are {', '.join(layers)}")
        return layers[name]

    def change(self, unit: Unit, side: str) -> Cost:
        """By how much the costs rise when only this unit is quantized; `side` is one of `SIDES`."""
        self._reach(unit.start)
        with quantized_alone(self.qmodel, unit, side):
            return self._cost(self._cache) - self.real

    def change_from(self, start: Call) -> Cost:
        """By how much the costs rise through what is changed from this call on."""
        self._reach(start)
        return self._cost(self._cache) - self.real

    def all_units(self) -> Cost:
        """By how much the costs rise when everything is quantized."""
        self.qmodel.quantize_nodes(True)
        try:
            return self._cost() - self.real
        finally:
            self.qmodel.quantize_nodes(False)

    @torch.no_grad()
    def outputs(self, unit: Unit) -> list[Tensor]:
        """The unit's outputs for each batch, flat, in the state that its nodes are in."""
        self._reach(unit.start)
        outputs = []
        for index, batch in enumerate(self.batches):
            with (
                self._cache.replaying(index),
                self.qmodel.runtime.recording(unit.outputs, stop_after=unit.end) as record,
            ):
                self.qmodel(batch)
            outputs.append(torch.cat([tensor_of(record[call]).flatten() for call in unit.outputs]))
        return outputs

    def _reach(self, start: Call) -> None:
        """Bring the cache to a call; backwards it begins anew, for it has forgotten what comes inside of
        blocks."""
        begin = self.trace.begin
        if self._start is not None and begin[start] < begin[self._start]:
            self._cache = PrefixCache(self.qmodel, self.trace, self.batches)
        if start != self._start:
            self._cache.advance(start)
            self._start = start

    @torch.no_grad()
    def _cost(self, cache: PrefixCache | None = None) -> Cost:
        bits, distortions = [], []
        for index, batch in enumerate(self.batches):
            if cache is None:
                output = self.qmodel(batch)
            else:
                with cache.replaying(index):
                    output = self.qmodel(batch)
            bits.append(rate(output, batch).double())
            distortions.append(self.objective.distortion(output, batch).double())
        bpp, distortion = float(torch.cat(bits).mean()), float(torch.cat(distortions).mean())
        return Cost(bpp + distortion, bpp, distortion)


@contextmanager
def quantized_alone(qmodel: QuantModel, unit: Unit, side: str) -> Iterator[None]:
    """While it lasts only this unit's nodes are quantized.

    "weights": the weights of its layers. "inputs": all but those. "both": all.
    """
    nodes = {name: qmodel.nodes[name] for name in unit.nodes}
    macs = {name: node for name, node in nodes.items() if isinstance(node, QuantMAC)}
    qmodel.quantize_nodes(True, macs if side == "weights" else nodes)
    try:
        for node in macs.values():
            node.only = None if side == "both" else side
        yield
    finally:
        for node in macs.values():
            node.only = None
        qmodel.quantize_nodes(False, nodes)
