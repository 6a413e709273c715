"""Bits for each layer: measured losses of J, and the allocation with the least of them under a budget, by
integer programming.

The rise of J is measured with one layer alone quantized, its weights or its inputs, at every candidate number
of bits, and taken as additive over layers and sides (HAWQ-V3, Yao et al. 2021, arXiv 2011.10680, whose losses
are predicted from the Hessian; fractional changes of the R-D loss of single layers also guide Hossain et al.
2025, arXiv 2506.01221). With that the choice is a multiple-choice knapsack problem, which a MILP solver
answers exactly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_array
from torch import Tensor, nn

from licq.quant.bits import Bits
from licq.quant.model import QuantModel
from licq.quant.modules import QuantMAC
from licq.quant.norms import SQUARED_BITS
from licq.reconstruction.analysis import Probe, Remember
from licq.reconstruction.api import Start, prepare
from licq.reconstruction.config import PtqConfig
from licq.reconstruction.objective import Objective
from licq.reconstruction.sensitivity import operations
from licq.support.errors import InputError
from licq.support.progress import progress as progress_bar

GAP = 1e-9  # relative, of the solver
_BELIEF = 0.1
_SMALLEST = 1e-9  # bits per pixel


@dataclass(frozen=True)
class Layer:
    """What the search knows of a layer.

    weights:  how many. macs: multiply-accumulate operations for a pixel of the image.
    w_loss:   rise of J in bits per pixel by each candidate number of bits of the weights. a_loss: of the
    inputs.
    a_width:  bits of the multiplied inputs for each candidate: a square in a GDN has twice as many, a latent
    14 of its own.
    width_8:  the same for 8 bits.
    """

    name: str
    weights: int
    macs: float
    w_loss: Mapping[int, float]
    a_loss: Mapping[int, float]
    a_width: Mapping[int, int]
    width_8: int

    def bit_operations(self, w_bits: int, a_bits: int) -> float:
        """macs * bits of a weight * bits of an input."""
        return self.macs * w_bits * self.a_width[a_bits]

    def loss(self, w_bits: int, a_bits: int) -> float:
        return self.w_loss[w_bits] + self.a_loss[a_bits]


@dataclass(frozen=True)
class Budget:
    """Upper bounds, each or None.

    mean_bits: of a weight. megabytes: of all weights, 10^6 bytes, packed and not yet compressed.
    relative_bops: bit operations over
    those of 8 bits everywhere. bops: bit operations for a pixel. loss: rise of J in bits per pixel.
    """

    mean_bits: float | None = None
    megabytes: float | None = None
    relative_bops: float | None = None
    bops: float | None = None
    loss: float | None = None


@dataclass(frozen=True)
class Totals:
    """Of an allocation: the measures of `Budget`, with `loss` as predicted: the sum of the layers' own."""

    mean_bits: float
    megabytes: float
    relative_bops: float
    bops: float
    loss: float


def totals(layers: Sequence[Layer], bits: Bits) -> Totals:
    """What an allocation of all layers costs."""
    chosen = [(layer, bits[layer.name]["w_bits"], bits[layer.name]["a_bits"]) for layer in layers]
    size = sum(layer.weights * w for layer, w, _ in chosen)
    bops = sum(layer.bit_operations(w, a) for layer, w, a in chosen)
    return Totals(
        mean_bits=size / sum(layer.weights for layer in layers),
        megabytes=size / 8e6,
        relative_bops=bops / bops_of_8_bits(layers),
        bops=bops,
        loss=sum(layer.loss(w, a) for layer, w, a in chosen),
    )


def bops_of_8_bits(layers: Sequence[Layer]) -> float:
    """Bit operations for a pixel with 8 bits everywhere; inputs that have bits of their own keep them."""
    return sum(layer.macs * 8 * layer.width_8 for layer in layers)


def allocate(layers: Sequence[Layer], budget: Budget, least: str = "loss") -> Bits:
    """Of all allocations inside the budget the one with the least "loss", "mean_bits" or "bops"; exact.

    Raises:
        InputError: no allocation of the candidates is inside the budget; the message says what the least is.
    """
    for name, bound in _bounds(layers, budget).items():
        smallest = sum(min(_measure(name, layer, w, a) for w, a in _pairs(layer)) for layer in layers)
        if smallest > bound * (1 + GAP):
            raise InputError(_too_small(name, layers, budget, smallest))
    pairs = [(number, w, a) for number, layer in enumerate(layers) for w, a in _pairs(layer)]

    def row(name: str) -> np.ndarray:
        return np.array([_measure(name, layers[number], w, a) for number, w, a in pairs])

    one_each = lil_array((len(layers), len(pairs)))
    for column, (number, _, _) in enumerate(pairs):
        one_each[number, column] = 1
    constraints = [LinearConstraint(one_each.tocsr(), 1, 1)]
    for name, bound in _bounds(layers, budget).items():
        scale = bound or 1.0  # the solver's tolerances are absolute
        constraints.append(LinearConstraint(row(name)[None] / scale, -np.inf, bound / scale))
    aim = row({"loss": "loss", "mean_bits": "size", "bops": "bops"}[least])
    # the solver is content with 1e-6 of absolute gap: small losses must be more than that
    solved = milp(
        aim * (1e6 / (aim.max() or 1.0)),
        integrality=np.ones(len(pairs)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": GAP},
    )
    if solved.x is None:
        raise InputError(
            f"no allocation of bits is inside the budget ({solved.message.strip()}); give more, or other --bits_choices"
        )
    return {
        layers[number].name: {"w_bits": w, "a_bits": a}
        for (number, w, a), taken in zip(pairs, solved.x)
        if taken > 0.5
    }


def _pairs(layer: Layer) -> list[tuple[int, int]]:
    return [(w, a) for w in layer.w_loss for a in layer.a_loss]


def _measure(name: str, layer: Layer, w: int, a: int) -> float:
    return {"size": layer.weights * w, "bops": layer.bit_operations(w, a), "loss": layer.loss(w, a)}[name]


def _bounds(layers: Sequence[Layer], budget: Budget) -> dict[str, float]:
    """The budget as bounds of sums over layers: bits of all weights, bit operations for a pixel, loss."""
    weights = sum(layer.weights for layer in layers)
    sizes = [budget.mean_bits and budget.mean_bits * weights, budget.megabytes and budget.megabytes * 8e6]
    bops = [budget.relative_bops and budget.relative_bops * bops_of_8_bits(layers), budget.bops]
    every = {"size": sizes, "bops": bops, "loss": [budget.loss]}
    return {
        name: min(given)
        for name, bounds in every.items()
        if (given := [bound for bound in bounds if bound is not None])
    }


def _too_small(name: str, layers: Sequence[Layer], budget: Budget, smallest: float) -> str:
    if name == "size":
        mean = smallest / sum(layer.weights for layer in layers)
        return f"--budget_size is too small: the least of these --bits_choices is {mean:.4g} bits a weight, {smallest / 8e6:.4g} MB"
    if name == "bops":
        return (
            f"--budget_bops is too small: the least of these --bits_choices is {smallest / bops_of_8_bits(layers):.4g} of the "
            f"operations of 8 bits, {smallest / 1e3:.4g}k for a pixel"
        )
    return f"no allocation of these --bits_choices has a predicted loss of {budget.loss:.4g} bpp or less; the least is {smallest:.4g}"


# -------------------------------------------------------------------------------------------------- measuring


def measure_layers(
    model: nn.Module,
    images: Tensor,
    config: PtqConfig,
    objective: Objective,
    w_choices: Sequence[int],
    a_choices: Sequence[int],
    remember: Remember,
    device: Any = None,
    progress: bool = True,
) -> list[Layer]:
    """The losses of every layer at every candidate.

    The codec is prepared as for learning (`reconstruction.api.prepare`: ranges, splitting, balance, GPTQ)
    with one number of bits of the weights in all layers, and the most of the inputs; each layer's weights
    alone are then whole numbers, and J is measured with all else in float. Inputs likewise. `falling` says
    what is made of them.
    """
    top = max(w_choices), max(a_choices)
    latest: dict[tuple[int, int], Probe] = {}

    def probe(w_bits: int, a_bits: int) -> Probe:
        if (w_bits, a_bits) not in latest:
            latest.clear()
            latest[w_bits, a_bits] = _probe(
                prepare(
                    model,
                    images,
                    with_bits(config, w_bits, a_bits),
                    objective,
                    device=device,
                    progress=progress,
                ),
                objective,
            )
        return latest[w_bits, a_bits]

    facts = remember("layers", lambda: _facts(probe(*top), a_choices))
    states = [
        (side, *pair)
        for side, choices in (("weights", w_choices), ("inputs", a_choices))
        for pair in [(b, top[1]) if side == "weights" else (top[0], b) for b in choices]
    ]
    states.sort(key=lambda state: (state[1:] != top, state))  # what is shared comes first
    found: dict[str, dict[str, dict[int, float]]] = {name: {"weights": {}, "inputs": {}} for name in facts}
    jobs = [
        (side, w, a, name)
        for side, w, a in states
        for name in facts
        if side == "weights" or a in _own(facts[name])
    ]
    for side, w, a, name in progress_bar(
        jobs, desc="measuring bits of layers", unit="layer", enabled=progress
    ):

        def rise() -> float:
            at = probe(w, a)
            return at.change(at.layer(name), side).j

        found[name][side][w if side == "weights" else a] = remember(
            f"{side} {w if side == 'weights' else a} {name}", rise
        )
    return [
        Layer(
            name,
            own["weights"],
            own["macs"],
            falling(found[name]["weights"]),
            falling(found[name]["inputs"]),
            _own(own),
            own["width_8"],
        )
        for name, own in facts.items()
    ]


def _own(facts: dict) -> dict[int, int]:
    """Candidates of the inputs and their widths; JSON makes text of keys."""
    return {int(bits): width for bits, width in facts["a_width"].items()}


def with_bits(config: PtqConfig, w_bits: int, a_bits: int) -> PtqConfig:
    return replace(config, quant=replace(config.quant, w_bits=w_bits, a_bits=a_bits))


def _probe(start: Start, objective: Objective) -> Probe:
    return Probe(start.qmodel, start.batches[: start.measured], objective)


def _facts(probe: Probe, a_choices: Sequence[int]) -> dict:
    """{layer: {"weights", "macs", "a_width", "width_8"}}; where the candidates make no difference the most
    stands for all."""
    macs, facts = macs_of_a_pixel(probe.qmodel, probe.batches[0]), {}
    for name, each in macs.items():
        node = probe.qmodel.nodes[name]
        widths = {bits: input_width(node, bits) for bits in a_choices}
        if len(set(widths.values())) == 1:
            widths = {max(widths): widths[max(widths)]}
        facts[name] = {
            "weights": node.float_weight().numel(),
            "macs": each,
            "a_width": widths,
            "width_8": input_width(node, 8),
        }
    return facts


@torch.no_grad()
def macs_of_a_pixel(qmodel: QuantModel, batch: Tensor) -> dict[str, float]:
    """Multiply-accumulate operations of each layer for a pixel of the image."""
    calls = [
        (name, call)
        for name, node in qmodel.nodes.items()
        if isinstance(node, QuantMAC)
        for call in range(node.calls)
    ]
    with qmodel.runtime.recording(calls) as record:
        qmodel(batch)
    macs: dict[str, float] = {}
    for (name, _), output in record.items():
        macs[name] = macs.get(name, 0.0) + operations(qmodel.nodes[name], output.q) / (
            batch.shape[-1] * batch.shape[-2]
        )
    return macs


def describe(qmodel: QuantModel, batch: Tensor) -> dict:
    """{"layers": `Bits` of every layer, "mean_bits", "megabytes", "relative_bops", "bops"} of a quantized
    codec."""
    macs = macs_of_a_pixel(qmodel, batch)
    nodes = {name: qmodel.nodes[name] for name in macs}
    bits = {
        name: {"w_bits": node.config.w_bits, "a_bits": node.config.a_bits} for name, node in nodes.items()
    }
    layers = [
        Layer(
            name,
            node.float_weight().numel(),
            macs[name],
            {node.config.w_bits: 0.0},
            {node.config.a_bits: 0.0},
            {node.config.a_bits: input_width(node, node.config.a_bits)},
            input_width(node, 8),
        )
        for name, node in nodes.items()
    ]
    facts = asdict(totals(layers, bits))
    del facts["loss"]
    return {"layers": bits} | facts


def input_width(node: QuantMAC, a_bits: int) -> int:
    """Bits of what the weights of an observed layer multiply when its inputs have a_bits."""
    bits = max(a_bits, node.config.latent_bits) if node.input_grid.latent else a_bits
    return 2 * min(bits, SQUARED_BITS) if node.input_power == 2 else bits


def falling(losses: Mapping[int, float]) -> dict[int, float]:
    """Measured losses by number of bits, made to fall with the bits and to stay above zero.

    A loss is at least that of every larger number of bits; and at least a tenth (`_BELIEF`) of what the noise
    model, 4^-b, makes of
    the loss at the fewest bits: a rise of J that is lost in the noise of the measurement is small, but more
    bits still buy something.
    """
    fewest, found, least = min(losses), {}, 0.0
    for bits in sorted(losses, reverse=True):
        found[bits] = least = max(least, losses[bits])
    worst = max(found[fewest], _SMALLEST)
    return {
        bits: max(found[bits], worst * (1.0 if bits == fewest else _BELIEF * 4.0 ** (fewest - bits)))
        for bits in sorted(losses)
    }


def start_loss(
    model: nn.Module,
    images: Tensor,
    config: PtqConfig,
    objective: Objective,
    bits: Bits,
    device: Any = None,
    progress: bool = True,
) -> dict[str, float]:
    """{"bpp": of the float codec, "j": its J, "loss": rise of J of the prepared codec with these bits}, on
    the measured crops."""
    probe = _probe(
        prepare(model, images, config, objective, bits=bits, device=device, progress=progress), objective
    )
    return {"bpp": probe.real.bpp, "j": probe.real.j, "loss": probe.all_units().j}
