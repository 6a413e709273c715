"""Sums of products that may pass 2^24, exact without products in float64.

A layer's bound (`QuantMAC.accumulator_bound`) takes every input at its largest. For the inputs at hand,
|w| |x| of the weights and inputs of one output is mostly far less, and no sum of a part of the products
exceeds it (Cauchy-Schwarz). Where it is below 2^24, one product in float32 is exact. Where it is not, the
input channels are taken in groups whose products are, and their sums are added in float64: that is as many
multiplications. Split channels (`quant.channel_split`) are taken by their two digits, of which the others
have the high one only.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from licq.quant import fused_layers
from licq.quant.fixedpoint import EXACT_FLOAT32

_FEW_GROUPS = 3  # more than two digits cost more than as many groups
_MOST_GROUPS = 16
_MARGIN = 1 + 2.0**-10  # for the float32 in which norms are computed

Part = tuple[Tensor, Tensor, float]
"""(numbers of some input channels, their weights, the unit of the numbers)."""


@torch.no_grad()
def sums_reach(node: Any, x: Tensor, weight: Tensor) -> float:
    """What no sum of a part of the products of one output exceeds: |w| |x|.

    Args:
        node: a `QuantMAC` whose `window` is known.
        x: the inputs, integers to their power. weight: the integer weights, canonical.
    """
    sides, steps = node.window()
    energy = fused_layers.energy_of_channels(x, node.channel_dim)
    for axis, (side, step) in enumerate(zip(sides, steps)):
        energy = _sums_along(energy, axis - len(sides), side, step)
    squares = node.largest_sum(weight.float().square())
    return math.sqrt(float(energy.max()) * float(squares.max())) * _MARGIN


def _sums_along(x: Tensor, axis: int, side: int, step: int) -> Tensor:
    """Sums of `side` elements `step` apart along an axis, also where a part of them lies outside of x."""
    if side == 1:
        return x
    length, reach = x.shape[axis], (side - 1) * step
    wide = x.new_zeros(*x.shape[:axis], length + 2 * reach, *x.shape[x.ndim + axis + 1 :])
    wide.narrow(axis, reach, length).copy_(x)
    total = wide.narrow(axis, 0, length + reach).clone()
    for tap in range(1, side):
        total += wide.narrow(axis, tap * step, length + reach)
    return total


def exact_sums(node: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The sums with their bias: float32 where they are below 2^24, else float64. None: in float64 only.

    Args:
        node: a `QuantMAC`.
        x, weight: integers in float tensors. bias: integers, or None.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu" or node.window() is None or x.numel() == 0:
        return None
    weight = weight.float()
    largest_bias = 0.0 if bias is None else float(bias.detach().abs().max())
    if sums_reach(node, x, weight) + largest_bias < EXACT_FLOAT32:
        sums = node.product(x, weight) if bias is None else node.product_with_bias(x, weight, bias.float())
        return sums
    parts = _parts(node, x.detach(), weight.detach()) if node.groups == 1 else None
    if parts is None:
        return None
    sums = _GroupedProduct.apply(x, weight, node, parts)
    if bias is None:
        return sums
    shape = [1] * sums.ndim
    shape[node.channel_dim % sums.ndim] = -1
    return sums + bias.double().reshape(shape)


@torch.no_grad()
def _parts(node: Any, x: Tensor, weight: Tensor) -> list[Part] | None:
    """Parts of the inputs whose sums of products are exact in float32; None: there would be too many."""
    unit = node.input_grid.refinement**node.input_power
    channels = torch.arange(x.shape[node.channel_dim])
    if unit == 1:
        return _pieces(node, x, weight, 1.0)
    # channels that are not split hold multiples of the unit, so they have no low digit
    split = channels[node.input_grid.split_steps > 1]
    high = (x * (1 / unit)).floor_()
    low = _of(split, x, node.channel_dim) - unit * _of(split, high, node.channel_dim)
    parts = []
    for numbers, group, step in ((high, channels, unit), (low, split, 1.0)):
        pieces = _pieces(node, numbers, _of(group, weight, 1), step)
        if pieces is None:
            return None
        parts += pieces
    return parts


def _pieces(node: Any, x: Tensor, weight: Tensor, unit: float, digits: bool = True) -> list[Part] | None:
    """Some of the channels each; two digits of all numbers where that makes fewer parts."""
    count = 1
    while True:
        pieces = list(
            zip(
                x.chunk(count, node.channel_dim),
                (part.contiguous() for part in weight.chunk(count, 1)),
            )
        )
        reaches = [sums_reach(node, *piece) for piece in pieces]
        if max(reaches) < EXACT_FLOAT32:
            return [(numbers, w, unit) for numbers, w in pieces]
        count = max(count + 1, min(2 * count, math.ceil(sum(reaches) / EXACT_FLOAT32)))
        if digits and count > _FEW_GROUPS:
            base = 2.0 ** -(-int(x.abs().max()).bit_length() // 2)
            high = (x * (1 / base)).floor_()
            two = ((high, base), (x - base * high, 1.0))
            parts = [_pieces(node, n, weight, unit * step, digits=False) for n, step in two]
            return None if None in parts else [part for some in parts for part in some or ()]
        if count > min(_MOST_GROUPS, weight.shape[1]):
            return None


def _of(group: Tensor, x: Tensor, dim: int) -> Tensor:
    return x if len(group) == x.shape[dim] else x.index_select(dim, group)


class _GroupedProduct(torch.autograd.Function):
    """Products of groups of channels in float32, added in float64; the gradient of one product in float32."""

    @staticmethod
    def forward(ctx, x, weight, node, parts: Sequence[Part]):
        ctx.node = node
        ctx.save_for_backward(x, weight)
        total = None
        for numbers, part, unit in parts:
            sums = node.product(numbers.contiguous(), part).double()
            sums = sums.mul_(unit) if unit != 1 else sums
            total = sums if total is None else total.add_(sums)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return *ctx.node.product_gradient(grad.float(), x, weight, ctx.needs_input_grad[:2]), None, None
