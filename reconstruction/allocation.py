"""The allocation of bits to layers with the lowest predicted loss under a budget, by integer programming.

The rise of J is taken as additive over layers and over their weights and inputs (HAWQ-V3, Yao et al. 2021,
arXiv 2011.10680, whose losses are predicted from the Hessian). The choice is then a multiple-choice knapsack
problem, which a MILP solver answers exactly. The preset "fmpq" allocates by a tolerance instead, see
`allocate_by_threshold`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_array

from licq.quant.bits import Bits
from licq.support.errors import InputError

GAP = 1e-9  # relative, of the solver


@dataclass(frozen=True)
class Layer:
    """What the search knows of a layer."""

    name: str

    weights: int
    """How many."""

    macs: float
    """Multiply-accumulate operations for a pixel of the image."""

    w_loss: Mapping[int, float]
    """Rise of J in bits per pixel by each candidate number of bits of the weights."""

    a_loss: Mapping[int, float]
    """The same for the inputs."""

    a_width: Mapping[int, int]
    """Bits of the multiplied inputs for each candidate: a square in a GDN has twice as many, a latent 14."""

    width_8: int
    """`a_width` of 8 bits."""

    def bit_operations(self, w_bits: int, a_bits: int) -> float:
        """macs * bits of a weight * bits of an input."""
        return self.macs * w_bits * self.a_width[a_bits]

    def loss(self, w_bits: int, a_bits: int) -> float:
        """Rise of J in bits per pixel."""
        return self.w_loss[w_bits] + self.a_loss[a_bits]


@dataclass(frozen=True)
class Budget:
    """Upper bounds, each or None."""

    mean_bits: float | None = None
    """Of a weight."""

    megabytes: float | None = None
    """Of all weights, 10^6 bytes, packed and not yet compressed."""

    relative_bops: float | None = None
    """Bit operations over those of 8 bits everywhere."""

    bops: float | None = None
    """Bit operations for a pixel."""

    loss: float | None = None
    """Predicted rise of J in bits per pixel."""


@dataclass(frozen=True)
class Totals:
    """What an allocation costs: the measures of `Budget`. `loss` is the sum over layers."""

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
    """Bit operations for a pixel with 8 bits everywhere; inputs whose bits are fixed keep them."""
    return sum(layer.macs * 8 * layer.width_8 for layer in layers)


def allocate(layers: Sequence[Layer], budget: Budget, minimize: str = "loss") -> Bits:
    """Of all allocations inside the budget the one with the smallest "loss", "mean_bits" or "bops"; exact.

    Raises:
        InputError: no allocation of the candidates is inside the budget; the message names the smallest one.
    """
    bounds = _bounds(layers, budget)
    for name, bound in bounds.items():
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
    for name, bound in bounds.items():
        scale = bound or 1.0  # the solver's tolerances are absolute
        constraints.append(LinearConstraint(row(name)[None] / scale, -np.inf, bound / scale))
    costs = row({"loss": "loss", "mean_bits": "size", "bops": "bops"}[minimize])
    # the solver is content with 1e-6 of absolute gap: small losses must be more than that
    solved = milp(
        costs * (1e6 / (costs.max() or 1.0)),
        integrality=np.ones(len(pairs)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": GAP},
    )
    if solved.x is None:
        raise InputError(
            f"no allocation of bits is inside the budget ({solved.message.strip()}); "
            "give more, or other `bits_choices`"
        )
    return {
        layers[number].name: {"w_bits": w, "a_bits": a}
        for (number, w, a), taken in zip(pairs, solved.x)
        if taken > 0.5
    }


def allocate_by_threshold(layers: Sequence[Layer], budget: Budget) -> tuple[Bits, float]:
    """The rule of FMPQ (Hossain, Duan, Zhu 2024, arXiv 2506.01221, Algorithm 1), for weights alone.

    From the most bits downwards, a layer takes the fewest bits with which its loss stays below a tolerance,
    the same for all layers; the most, where even their loss is above it. The tolerance is the smallest with
    which the codec is inside the budget. The paper's is relative to J, which here is the same number over J.

    Returns:
        (the allocation, the tolerance in bits per pixel).

    Raises:
        InputError: the budget bounds more than the size, or is too small for the candidates.
    """
    bounds = _bounds(layers, budget)
    if any(len(layer.a_loss) > 1 for layer in layers) or set(bounds) - {"size"}:
        raise InputError(
            "`allocation=threshold` chooses bits of weights within a size; give --budget_size alone"
        )
    bound = bounds.get("size", np.inf)
    smallest = sum(layer.weights * min(layer.w_loss) for layer in layers)
    if smallest > bound * (1 + GAP):
        raise InputError(_too_small("size", layers, budget, smallest))
    tolerances = sorted({0.0, *(loss for layer in layers for loss in layer.w_loss.values())})
    low, high = 0, len(tolerances) - 1  # the largest lets every layer have the fewest bits
    while low < high:
        middle = (low + high) // 2
        size = sum(layer.weights * _fewest_bits(layer, tolerances[middle]) for layer in layers)
        low, high = (low, middle) if size <= bound * (1 + GAP) else (middle + 1, high)
    bits = {
        layer.name: {"w_bits": _fewest_bits(layer, tolerances[low]), "a_bits": next(iter(layer.a_loss))}
        for layer in layers
    }
    return bits, tolerances[low]


def _fewest_bits(layer: Layer, tolerance: float) -> int:
    """The fewest bits of the weights whose loss, like that of all more bits, is at most the tolerance."""
    chosen = max(layer.w_loss)
    for bits in sorted(layer.w_loss, reverse=True):
        if layer.w_loss[bits] > tolerance:
            break
        chosen = bits
    return chosen


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
        return (
            f"`budget_size` is too small: the least of these `bits_choices` is {mean:.4g} bits a weight, "
            f"{smallest / 8e6:.4g} MB"
        )
    if name == "bops":
        share = smallest / bops_of_8_bits(layers)
        return (
            f"`budget_bops` is too small: the least of these `bits_choices` is {share:.4g} of the operations "
            f"of 8 bits, {smallest / 1e3:.4g}k for a pixel"
        )
    return (
        f"no allocation of these `bits_choices` has a predicted loss of {budget.loss:.4g} bpp or less; "
        f"the least is {smallest:.4g}"
    )
