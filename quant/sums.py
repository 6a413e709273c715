"""The arithmetic of quantized networks along dimensions: products that are summed, softmax, layer
normalization.

As in `quant.primitives`, each function computes on tensors and writes down an operation on symbols.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from licq.quant import fused_rows
from licq.quant import operations as ops
from licq.quant.fixedpoint import (
    EXACT_FLOAT32,
    quantize_multiplier,
    requantize_ste,
    round_half_away,
    straight_through,
)
from licq.quant.integer_functions import (
    MASKED,
    SOFTMAX_STEP,
    SOFTMAX_UNIT,
    fixed_softmax,
    integer_layer_norm,
    layer_norm_constants,
    softmax_pieces,
)
from licq.quant.operations import Range
from licq.quant.symbols import Symbol, int64


def multiply_accumulate(
    x: Tensor,
    layer: ops.MultiplyAccumulate,
    multiply: Callable[[Tensor, Tensor], Tensor],
    channel_dim: int,
    numbers: Range | None = None,
    wide: bool | None = None,
    wide_bias: bool = False,
    with_bias: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    exact_sums: Callable[[Tensor, Tensor, Tensor | None], Tensor | None] | None = None,
) -> Tensor:
    """The sums of a layer's products, plus its bias: what its accumulator holds.

    Range: -bound .. bound, where no sum of a part of the products exceeds the bound (design, section 4).

    Args:
        layer: the operation, with its integer weights, bias and bound; its inputs are set here.
        multiply: (x, weight) -> the sums, by PyTorch's function of the layer.
        channel_dim: of the sums' dimensions, the one of the output channels.
        numbers: a narrower range that is known of the result.
        wide: make the sums in float64; None: where the layer's bound passes 2^24.
        wide_bias: the bias may pass 2^24 though the products do not.
        with_bias: (x, weight, bias) -> the sums with the bias, where one function does both.
        exact_sums: (x, weight, bias) -> the sums with the bias without products in float64, or None; asked
            where the bound asks for float64. See `quant.wide_products`.
    """
    if isinstance(x, Symbol):
        weight = torch.empty(layer.weight.shape, device="meta")
        shape = multiply(torch.empty(x.shape, device="meta"), weight).shape
        bias = None if layer.bias is None else int64(layer.bias)
        operation = replace(layer, inputs=(x.number,), bias=bias)
        return x.recorder.emit(operation, shape, numbers or Range(-layer.bound, layer.bound))
    weight = layer.weight
    wide = layer.bound >= EXACT_FLOAT32 if wide is None else wide
    if wide and exact_sums is not None:
        sums = exact_sums(x, weight, None if wide_bias else layer.bias)
        if sums is not None:
            if layer.bias is None or not wide_bias:
                return sums
            return _with_bias(sums.double(), layer.bias, channel_dim)
    if with_bias is not None and layer.bias is not None and not wide and not wide_bias:
        return with_bias(x, weight.float(), layer.bias.float())
    sums = multiply(x.double(), weight.double()) if wide else multiply(x, weight.float())
    if layer.bias is None:
        return sums
    return _with_bias(sums.double() if wide_bias else sums, layer.bias, channel_dim)


def _with_bias(sums: Tensor, bias: Tensor, channel_dim: int) -> Tensor:
    shape = [1] * sums.ndim
    shape[channel_dim % sums.ndim] = -1
    return sums + bias.to(sums.dtype).reshape(shape)


def matmul(a: Tensor, b: Tensor, wide: bool) -> Tensor:
    """The matrix product of two values. Range: the product of both magnitudes, as often as a sum has terms.

    wide: sums may pass 2^24, so they are made in float64.
    """
    if not isinstance(a, Symbol):
        return a.double() @ b.double() if wide else a @ b
    assert isinstance(b, Symbol)
    bound = a.range.largest * b.range.largest * a.shape[-1]
    shape = torch.matmul(torch.empty(a.shape, device="meta"), torch.empty(b.shape, device="meta")).shape
    return a.recorder.emit(ops.MatMul((a.number, b.number), bound=bound), shape, Range(-bound, bound))


class _SoftmaxSTE(torch.autograd.Function):
    """`fixed_softmax` forward, the float softmax's gradient backward."""

    @staticmethod
    def forward(ctx, q, offset, kinds, entries, dim):
        ctx.save_for_backward(q, offset, kinds)
        ctx.dim = dim
        return fixed_softmax(q, entries, offset, kinds, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, offset, kinds = ctx.saved_tensors
        grad_q, grad_offset = torch.empty_like(q), None
        for scores, part, into in softmax_pieces(q, offset, kinds, ctx.dim, grad, grad_q):
            p = F.softmax(scores * SOFTMAX_STEP, ctx.dim)
            weighted = part * p
            weighted -= p.mul_(weighted.sum(ctx.dim, keepdim=True))
            into.copy_(weighted.mul_(SOFTMAX_STEP / SOFTMAX_UNIT))
        if ctx.needs_input_grad[1]:
            if kinds is None:
                grad_offset = grad_q.sum_to_size(offset.shape)
            else:
                grad_offset = torch.zeros_like(offset).index_add_(0, kinds, grad_q.sum(0))
        return grad_q, grad_offset, None, None, None


def softmax(scores: Tensor, entries: Tensor, bias: Tensor | None, kinds: Tensor | None, dim: int) -> Tensor:
    """`fixed_softmax`: probabilities in units of `SOFTMAX_UNIT`. Range: 0 to 2^16.

    Args:
        scores: integers in units of `SOFTMAX_STEP`.
        entries: the table of exponentials, `softmax_table()`.
        bias: real numbers that are added to the scores; -inf masks a key. kinds: see `fixed_softmax`.
    """
    offset = blank = None
    if bias is not None:
        masked = torch.isinf(bias)
        steps = bias.masked_fill(masked, 0.0) / SOFTMAX_STEP
        offset = straight_through(round_half_away(steps.detach()), steps).masked_fill(masked, MASKED)
        blank = masked.all(dim, keepdim=True)
        blank = blank if bool(blank.any()) else None  # rows without a key
    if isinstance(scores, Symbol):
        operation = ops.Softmax(
            (scores.number,),
            table=entries,
            offset=None if offset is None else int64(offset),
            kinds=kinds,
            blank=blank,
            dim=dim,
        )
        return scores.recorder.emit(operation, scores.shape, Range(0, round(1 / SOFTMAX_UNIT)))
    p = fused_rows.softmax(scores, entries, offset, kinds, dim, SOFTMAX_UNIT, SOFTMAX_STEP)
    if p is None:
        p = _SoftmaxSTE.apply(scores, offset, kinds, entries, dim)
    if blank is not None:
        p = p.masked_fill(blank if kinds is None else blank.index_select(0, kinds), 0.0)
    return p


def layer_norm(
    x: Tensor,
    eps: float,
    multiplier: Tensor,
    offset: Tensor,
    low: Tensor,
    high: Tensor,
    unit: float,
) -> Tensor:
    """`integer_layer_norm` along the last dimension, times `multiplier`, plus `offset`, clipped. Range: low
    .. high.

    Args:
        eps: LayerNorm's, in units of x^2.
        multiplier: real numbers of either sign, from the unit of the normalized numbers to the result's.
        offset, low, high: integers in the result's unit.
        unit: of the normalized numbers.
    """
    if isinstance(x, Symbol):
        mantissa, shift = quantize_multiplier(multiplier.abs())
        low, high = int64(low), int64(high)
        operation = ops.LayerNorm(
            (x.number,),
            eps=eps,
            mantissa=mantissa * torch.where(multiplier < 0, -1, 1),
            shift=shift,
            offset=int64(offset),
            low=low,
            high=high,
        )
        return x.recorder.emit(operation, x.shape, Range(int(low.min()), int(high.max())))
    out = fused_rows.layer_norm(x, eps, multiplier, offset, low, high, unit, layer_norm_constants)
    if out is not None:
        return out
    with torch.no_grad():
        exact = integer_layer_norm(x, eps).float()
    if torch.is_grad_enabled() and x.requires_grad:
        exact = straight_through(exact, F.layer_norm(x, x.shape[-1:], eps=eps) / unit)
    sign = torch.where(multiplier < 0, -1.0, 1.0).float()
    out = requantize_ste(exact, multiplier.abs()) * sign + offset.float()
    return torch.minimum(torch.maximum(out, low), high)
