"""What the numbers in a file must be, so that the program and the entropy coder can run on them.

Each check returns what is wrong, in a few words for the user, or None.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, isfinite

from licq.models.layers import wrong_rows
from licq.quant.boundaries import QuantEntropyBottleneck, QuantGaussianConditional
from licq.quant.config import FLOAT_BITS
from licq.quant.density import FACTORIZED_BITS, INVERSE_BITS, LARGEST, LEVELS, NORMAL_BITS, REACH, STEP_BITS
from licq.quant.fixedpoint import EXACT_FLOAT64
from licq.quant.grid import Grid
from licq.quant.mac import QuantMAC
from licq.quant.modules import QuantModule
from licq.quant.norms import QuantGDN, QuantLayerNorm
from licq.support.errors import InputError


def wrong_numbers(node: QuantModule) -> str | None:
    """What is wrong with the stored numbers of a node that runs, in a few words; None: nothing."""
    for part in (*node.quantizers(), node):
        for kind, problem_of in _CHECKS.items():
            if isinstance(part, kind) and (problem := problem_of(part)) is not None:
                return problem
    return None


def check_certificates(nodes: Mapping[str, QuantModule], path: str | Path) -> None:
    """Check the bound that the file states of every layer's accumulator against the layer's weights (design,
    section 4).

    Raises:
        InputError: a sum can exceed its bound, or what float64 holds exactly.
    """
    for name, node in nodes.items():
        if isinstance(node, QuantMAC) and node.weight_int is not None and node.bound is not None:
            largest = float(node.accumulator_bound(node.weight_int, node.bias_int))
            if not largest <= float(node.bound) or largest >= EXACT_FLOAT64:
                raise InputError(
                    f"{path}: sums in {name} can reach {largest:.0f}, and the file certifies "
                    f"{float(node.bound):.0f}; quantize the codec again"
                )


def _grid(grid: Grid) -> str | None:
    if grid.fixed is not None or grid.bits == FLOAT_BITS or not grid.frozen:
        return None
    if (
        not _positive(grid.scale)
        or grid.scale.ndim > 1
        or not (grid.scale.shape == grid.qmin.shape == grid.qmax.shape)
    ):
        return "its scales are not positive numbers, or not as many as its limits"
    if not bool(((grid.qmin <= grid.qmax) & isfinite(grid.qmin) & isfinite(grid.qmax)).all()):
        return "its limits are no ranges"
    return None


def _layer(node: QuantMAC) -> str | None:
    if node.weight_int is None:
        return None
    if node.weight_int.shape != node.float_weight().shape:
        return f"its integer weights have the shape {tuple(node.weight_int.shape)}"
    if node.out_scale is None or node.out_scale.shape != (node.outputs,) or not _positive(node.out_scale):
        return "the scales of its sums are not one positive number for each output"
    if node.bias_int is not None and (
        node.bias_int.shape != (node.outputs,) or not bool(isfinite(node.bias_int).all())
    ):
        return "its bias is not one number for each output"
    if node.bound is None or node.bound.numel() != 1:
        return "it certifies no bound of its sums"
    inputs = node.weight_int.shape[1] * node.groups
    return (
        None
        if _of_channels(node.input_grid.scale, inputs)
        else f"it has {node.input_grid.scale.numel()} input scales for {inputs} channels"
    )


def _gdn(node: QuantGDN) -> str | None:
    if node.weight_int is None:
        return None
    parts = (node.x_grid.scale, node.out_grid.scale, node.mantissa, node.shift)
    return (
        None
        if all(part is not None and _of_channels(part, node.outputs) for part in parts)
        else "its scales are not one for each channel"
    )


def _layer_norm(node: QuantLayerNorm) -> str | None:
    if node.offset is None:
        return None
    parts = (node.grid_out.scale, node.gain_mantissa, node.gain_shift, node.offset)
    channels = node.module.normalized_shape[0]
    return (
        None
        if all(part is not None and _of_channels(part, channels) for part in parts)
        else "its gains are not one for each channel"
    )


def _gaussian(node: QuantGaussianConditional) -> str | None:
    if node.normal is None:
        return None
    sizes = [None if part is None else tuple(part.shape) for part in node.density]
    if sizes != [(LEVELS - 1,), (LEVELS,), (REACH * 2**STEP_BITS + 1,)]:
        return "the tables of its densities have other sizes"
    inside = _inside(node.inverses, int(2**INVERSE_BITS / LARGEST), 2 ** (INVERSE_BITS + 5)) and _inside(
        node.normal, 2 ** (NORMAL_BITS - 1), 2**NORMAL_BITS
    )
    return (
        None
        if inside and _rises(node.thresholds) and _rises(node.normal)
        else "the tables of its densities do not rise, or leave their range"
    )


def _bottleneck(node: QuantEntropyBottleneck) -> str | None:
    cumulative, inner = getattr(node, "cumulative", None), node.module
    channels = inner._get_medians().numel()
    if cumulative is not None:
        usable = cumulative.ndim == 2 and len(cumulative) == channels and cumulative.shape[1] % 2 == 1
        return (
            None
            if usable and _rises(cumulative) and _inside(cumulative, 0, 2**FACTORIZED_BITS)
            else "its distribution functions do not rise"
        )
    return None if node.tables is None else wrong_rows(*node.tables, channels)


_CHECKS = {
    Grid: _grid,
    QuantMAC: _layer,
    QuantGDN: _gdn,
    QuantLayerNorm: _layer_norm,
    QuantGaussianConditional: _gaussian,
    QuantEntropyBottleneck: _bottleneck,
}


def _positive(numbers: Tensor) -> bool:
    return bool(((numbers > 0) & isfinite(numbers)).all())


def _inside(numbers: Tensor, low: int, high: int) -> bool:
    return bool(((numbers >= low) & (numbers <= high)).all())


def _rises(numbers: Tensor) -> bool:
    return bool((numbers.diff() >= 0).all())


def _of_channels(numbers: Tensor, channels: int) -> bool:
    return numbers.numel() in (1, channels)
