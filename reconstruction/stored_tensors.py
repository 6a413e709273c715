"""What the rounding of each tensor between layers costs alone, and how its grid suits its values.

The tensors are those that a quantizer with a range of its own rounds: inputs of multiply-accumulate layers,
operands of sums and gates, what is normalized, and what functions give. In a codec under `strict_int8`
those of 16 bits are in registers (`quant.storage`), the others are stored. Nodes that stay in float round
nothing, and have none.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from licq.quant.boundaries import QuantBoundary
from licq.quant.config import FLOAT_BITS
from licq.quant.mac import QuantMAC
from licq.quant.model import QuantModel
from licq.quant.modules import QuantModule
from licq.quant.qtensor import QTensor
from licq.quant.quantizer import Quantizer
from licq.reconstruction.probe import Probe, Remember
from licq.support.progress import progress as progress_bar

_OPERANDS = {
    "input_grid": 0,
    "x_grid": 0,
    "grid_in": 0,
    "stored": 0,
    "stored0": 0,
    "stored1": 1,
    "grid_a": 0,
    "grid_b": 1,
}
"""By the name of a node's quantizer: the operand that it rounds. Others round the node's output."""


@dataclass(frozen=True)
class BetweenLayers:
    """A tensor between layers."""

    name: str
    """NODE input, NODE operand 0, NODE output ...; every tensor has its own."""

    node: QuantModule
    """That has the quantizer."""

    grid: Quantizer

    operand: int | None
    """Of the node's inputs; None: the output."""

    @property
    def is_input(self) -> bool:
        """What a multiply-accumulate layer multiplies with its weights."""
        return isinstance(self.node, QuantMAC) and self.grid is self.node.input_grid

    def rounded(self, x: Any) -> Any:
        """x on the quantizer's grid, as real numbers."""
        given = x if isinstance(x, QTensor) else QTensor(x, None, self.node.runtime)
        return given.moved(self.grid(given).real(), None)

    @contextmanager
    def watched(self, see: Any) -> Iterator[None]:
        """While it lasts, `see` gets the tensor and gives what stands in its place; None: the same."""

        def before(_, inputs: tuple) -> tuple | None:
            new = see(inputs[self.operand])
            return None if new is None else (*inputs[: self.operand], new, *inputs[self.operand + 1 :])

        def behind(_, inputs: tuple, output: Any) -> Any:
            return see(output)

        hook = (
            self.node.register_forward_hook(behind)
            if self.operand is None
            else self.node.register_forward_pre_hook(before)
        )
        try:
            yield
        finally:
            hook.remove()


def tensors_between_layers(qmodel: QuantModel) -> list[BetweenLayers]:
    """All of them, in the order of execution."""
    tensors = []
    for name, node in qmodel.nodes.items():
        if node.stays_float or isinstance(node, QuantBoundary):  # that comes from the accumulator
            continue
        for attribute, grid in node.named_children():
            if not isinstance(grid, Quantizer) or grid.fixed is not None or grid.bits == FLOAT_BITS:
                continue
            operand = _OPERANDS.get(attribute)
            what = "output" if operand is None else "input"
            if attribute in ("stored0", "stored1", "grid_a", "grid_b"):
                what = f"operand {operand}"
            elif attribute == "x_grid":  # of a GDN, beside what it squares
                what = "numerator"
            elif attribute == "stored":  # of a LayerNorm, before the wide input
                what = "stored input"
            tensors.append(BetweenLayers(f"{name} {what}", node, grid, operand))
    return tensors


def measure_stored(probe: Probe, layers: dict, remember: Remember, progress: bool = True) -> dict:
    """What each tensor between layers costs when it alone is rounded, and facts of its grid.

    Args:
        layers: `analysis.measure_units` of layers, which knows the inputs.

    Returns:
        {tensor: {"bits", "scales": how many its grid has, "low", "high": ends of the range, "levels": how
        many steps of the grid the values of the channel in the middle span, "fewest_levels": the same of
        the poorest channel, "below_step": share of the values that are not zero and smaller than a step,
        "j", "bpp", "weighted_distortion": rises against the float codec}}.
    """
    tensors = tensors_between_layers(probe.qmodel)
    facts = remember("tensors between layers", lambda: _facts(probe, tensors))
    costs = {}
    for tensor in progress_bar(tensors, desc="rounding each tensor alone", unit="tensor", enabled=progress):
        if tensor.is_input:
            rise = layers[tensor.node.name]["inputs"]
        else:
            rise = remember(f"tensor {tensor.name}", lambda tensor=tensor: asdict(_rise(probe, tensor)))
        costs[tensor.name] = facts[tensor.name] | rise
    return costs


def _rise(probe: Probe, tensor: BetweenLayers) -> Any:
    with tensor.watched(tensor.rounded):
        return probe.change_from((tensor.node.name, 0))


@torch.no_grad()
def _facts(probe: Probe, tensors: list[BetweenLayers]) -> dict:
    """Of every tensor, from one float forward over the crops."""
    seen = {tensor.name: _Span(tensor) for tensor in tensors}
    hooks = [tensor.watched(seen[tensor.name]) for tensor in tensors]
    for hook in hooks:
        hook.__enter__()
    try:
        for batch in probe.batches:
            probe.qmodel(batch)
    finally:
        for hook in hooks:
            hook.__exit__(None, None, None)
    return {name: span.facts() for name, span in seen.items()}


class _Span:
    """The ends of each channel, and how many values are smaller than a step."""

    def __init__(self, tensor: BetweenLayers):
        self.grid, self.is_magnitude = tensor.grid, tensor.is_input and tensor.node.kind == "gdn"
        self.ends: tuple[Tensor, Tensor] | None = None
        self.below = self.count = 0

    def __call__(self, x: Any) -> None:
        values = x.real() if isinstance(x, QTensor) else x
        if not isinstance(values, Tensor) or not values.ndim:
            return
        values = values.abs() if self.is_magnitude else values
        step, *_, fine = self.grid.parameters_for(values.ndim)
        shares = values / (step / fine)
        # a grid with one scale is asked about channels all the same: they are what may suffer from it
        dim = self.grid.channel_dim
        dim = (1 if values.ndim == 4 else -1) if dim is None else dim
        rows = shares.movedim(dim, 0).flatten(1)
        low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
        if self.ends is not None and len(self.ends[0]) == len(low):
            low, high = torch.minimum(low, self.ends[0]), torch.maximum(high, self.ends[1])
        self.ends = low, high
        self.below += int(((shares != 0) & (shares.abs() < 1)).sum())
        self.count += shares.numel()

    def facts(self) -> dict[str, float]:
        scale, qmin, qmax = self.grid.parameters_of_grid()
        step = scale / self.grid.fine
        levels = torch.zeros(1)
        if self.ends is not None:
            levels = (
                torch.minimum(self.ends[1], qmax.max()) - torch.maximum(self.ends[0], qmin.min())
            ).round() + 1
        return {
            "bits": self.grid.bits,
            "scales": scale.numel(),
            "low": float((qmin * step).min()),
            "high": float((qmax * step).max()),
            "levels": int(levels.median()),
            "fewest_levels": int(levels.min()),
            "below_step": self.below / max(1, self.count),
        }
