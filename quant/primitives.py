"""The arithmetic of quantized networks: about twenty functions, each with its rule for ranges.

Each function serves the simulation and the integer program. Called on tensors of integers it computes, with
straight-through gradients. Called on symbols (`quant.symbols`) it appends an operation to the program, with
the proven range of its result. So a node's `integer` is written once, and the program computes what it
simulates.

Integers are held in float tensors, float32 where their magnitude stays below 2^24 and float64 below 2^53. A
multiplier and a limit are tensors that broadcast against the integers.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from licq.quant import fused_layers, fused_rows
from licq.quant import operations as ops
from licq.quant.fixedpoint import (
    EXACT_FLOAT32,
    Limits,
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
    integer_gdn,
    integer_layer_norm,
    layer_norm_constants,
    softmax_pieces,
    table_lookup,
)
from licq.quant.operations import Boundary, Ends, Range
from licq.quant.symbols import Recorder, Symbol


def _int64(numbers: Tensor | float) -> Tensor:
    return torch.as_tensor(numbers).detach().to(torch.int64)


def _float64(number: float, like: Tensor) -> Tensor:
    device = None if isinstance(like, Symbol) else like.device
    return torch.as_tensor(number, dtype=torch.float64, device=device)


# -------------------------------------------------------------------------------------------------- constants


def constant(numbers: Tensor, recorder: Recorder | None) -> Tensor:
    """Integers that the network holds.

    Args:
        recorder: of the program that is written down; None: the numbers are computed.
    """
    if recorder is None:
        return numbers
    value = _int64(numbers)
    return recorder.emit(ops.Constant(value=value), tuple(value.shape), Range.of(value))


# ------------------------------------------------------------------------------------------------ elementwise


def rescale(
    x: Tensor,
    multiplier: Tensor | float,
    low: Tensor | None = None,
    high: Tensor | None = None,
    refinement: Tensor | None = None,
) -> Tensor:
    """round_half_away(x * multiplier), clipped to low .. high, times `refinement`: from one scale to another
    (eqs. 3, 4, 19).

    Clipping gives float32. The gradients are those of x * multiplier, and zero outside of the limits.

    Range: the ends times the multiplier that moves them furthest, clipped. A share of 2^-20 is added for the
    rounding of the multiplier.
    """
    multiplier = multiplier if isinstance(multiplier, Tensor) else _float64(multiplier, x)
    if not isinstance(x, Symbol):
        limits = None if low is None or high is None else Limits(low, high)
        return requantize_ste(x, multiplier, limits, refinement)
    mantissa, shift = quantize_multiplier(multiplier)
    reach = _rescaled(x.range, multiplier)
    factor = torch.ones((), dtype=torch.int64) if refinement is None else _int64(refinement)
    limits = None
    if low is not None and high is not None:
        limits = _int64(low), _int64(high)
        lows, highs = (end.clamp(reach.low, reach.high) * factor for end in limits)
        reach = Range(int(lows.min()), int(highs.max()))
    low, high = limits or (None, None)
    operation = ops.Rescale(
        (x.number,), mantissa=mantissa, shift=shift, low=low, high=high, refinement=factor
    )
    return x.recorder.emit(operation, x.shape, reach)


def _rescaled(numbers: Range, multiplier: Tensor) -> Range:
    smallest = float(multiplier.min()) * (1 - 2.0**-20)
    largest = float(multiplier.max()) * (1 + 2.0**-20)

    def highest(end: int) -> int:
        return round(end * largest + 0.5) if end > 0 else -max(0, round(-end * smallest - 0.5))

    return Range(-highest(-numbers.low), highest(numbers.high))


def add(a: Tensor, b: Tensor, low: int | None = None, high: int | None = None) -> Tensor:
    """a + b of one scale, clipped to low .. high. Range: the sum of both ranges, clipped."""
    if not isinstance(a, Symbol):
        out = a + b
        return out if low is None and high is None else out.clamp(low, high)
    assert isinstance(b, Symbol)
    numbers = a.range + b.range
    if low is not None or high is not None:
        numbers = numbers.clamped(low, high)
    shape = torch.broadcast_shapes(a.shape, b.shape)
    return a.recorder.emit(ops.Add((a.number, b.number), low=low, high=high), shape, numbers)


def subtract(a: Tensor, b: Tensor) -> Tensor:
    """a - b of one scale. Range: a's less b's."""
    return a - b if not isinstance(a, Symbol) else add(a, negative(b))


def negative(x: Tensor) -> Tensor:
    """-x. Range: the ends change places."""
    return x.recorder.emit(ops.Neg((x.number,)), x.shape, -x.range) if isinstance(x, Symbol) else -x


def absolute(x: Tensor) -> Tensor:
    """|x|. Range: 0 to the largest magnitude."""
    if not isinstance(x, Symbol):
        return x.abs()
    return x.recorder.emit(ops.Abs((x.number,)), x.shape, Range(0, x.range.largest))


def square(x: Tensor) -> Tensor:
    """x^2. Range: 0 to the square of the largest magnitude."""
    if not isinstance(x, Symbol):
        return x.square()
    return x.recorder.emit(ops.Square((x.number,)), x.shape, Range(0, x.range.largest**2))


def product(a: Tensor, b: Tensor, wide: bool = False) -> Tensor:
    """a * b, number by number; the scales multiply. Range: the extremes of the products of the ends.

    wide: compute in float64, for products of more than 24 bits.
    """
    if not isinstance(a, Symbol):
        return a.double() * b.double() if wide else a * b
    assert isinstance(b, Symbol)
    shape = torch.broadcast_shapes(a.shape, b.shape)
    return a.recorder.emit(ops.Product((a.number, b.number)), shape, a.range * b.range)


def mask(x: Tensor, ones: Tensor) -> Tensor:
    """x where `ones`, of 0 and 1, holds 1, else 0. Range: x's, with 0."""
    if not isinstance(x, Symbol):
        return x * ones
    return x.recorder.emit(ops.Mask((x.number,), mask=_int64(ones)), x.shape, x.range.with_zero)


def clamp(x: Tensor, low: Ends, high: Ends) -> Tensor:
    """x clipped to low .. high, integers in x's unit; None: no limit. Range: clipped likewise."""
    if not isinstance(x, Symbol):
        if low is not None:
            x = torch.maximum(x, low.to(x.dtype)) if isinstance(low, Tensor) else x.clamp(min=low)
        if high is not None:
            x = torch.minimum(x, high.to(x.dtype)) if isinstance(high, Tensor) else x.clamp(max=high)
        return x
    numbers = x.range.clamped(low, high)
    lows, highs = (None if end is None else _int64(end) for end in (low, high))
    return x.recorder.emit(ops.Clamp((x.number,), low=lows, high=highs), x.shape, numbers)


def leaky(x: Tensor, slope: float) -> Tensor:
    """x, or round_half_away(x * slope) where x is negative; slope >= 0. Range: negative numbers shrink by the
    slope."""
    if slope == 0:
        return clamp(x, 0, None)
    if not isinstance(x, Symbol):
        return torch.where(x < 0, requantize_ste(x, _float64(slope, x)), x)
    numbers = x.range
    mantissa, shift = quantize_multiplier(_float64(slope, x))
    low = min(0, round(numbers.low * slope * (1 + 2.0**-20) - 0.5)) if numbers.low < 0 else numbers.low
    operation = ops.Leaky((x.number,), mantissa=mantissa, shift=shift)
    return x.recorder.emit(operation, x.shape, Range(low, max(numbers.high, 0)))


class _TableSTE(torch.autograd.Function):
    """entries[x - first], with the gradient slopes[x - first]."""

    @staticmethod
    def forward(ctx, x, entries, first, slopes):
        ctx.save_for_backward(x, slopes)
        ctx.first = first
        return table_lookup(x, entries, first).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, slopes = ctx.saved_tensors
        return table_lookup(x, slopes, ctx.first).mul_(grad), None, None, None


def table(
    x: Tensor,
    entries: Tensor,
    first: int,
    smooth: Callable[[Tensor], Tensor] | None = None,
    slopes: Callable[[], Tensor] | None = None,
) -> Tensor:
    """entries[x - first]: any function of one number. Range: the extremes of the entries.

    Args:
        smooth: the function on real numbers, of which the gradient is taken.
        slopes: gives the derivative at each entry, which is taken instead. Both None: there is no gradient.
    """
    if isinstance(x, Symbol):
        entries = _int64(entries)
        operation = ops.Table((x.number,), table=entries, first=first)
        return x.recorder.emit(operation, x.shape, Range.of(entries))
    if slopes is not None and torch.is_grad_enabled() and x.requires_grad:
        return _TableSTE.apply(x, entries, first, slopes())
    with torch.no_grad():
        exact = table_lookup(x, entries, first).to(x.dtype)
    if smooth is not None and torch.is_grad_enabled() and x.requires_grad:
        exact = straight_through(exact, smooth(x))
    return exact


def gdn(
    x: Tensor,
    norm: Tensor,
    mantissa: Tensor,
    shift: Tensor,
    inverse: bool,
    algorithm: str,
    low: Tensor,
    high: Tensor,
    slope: Tensor,
) -> Tensor:
    """`integer_gdn` of x and its norm (a norm of 0 counts as 1), clipped to low .. high. Range: low .. high.

    slope: of the same on real numbers, slope * x * norm^p, of which the gradient is taken; float64, of
        mantissa's shape.
    """
    if isinstance(x, Symbol):
        assert isinstance(norm, Symbol)
        low, high = _int64(low), _int64(high)
        operation = ops.Gdn(
            (x.number, norm.number),
            mantissa=mantissa,
            shift=shift,
            low=low,
            high=high,
            inverse=bool(inverse),
            algorithm=algorithm,
        )
        return x.recorder.emit(operation, x.shape, Range(int(low.min()), int(high.max())))
    job = fused_layers.divisive_norm(x, norm, mantissa, shift, low, high, slope, inverse, algorithm == "gdn")
    if job is not None:
        return _FusedGdnSTE.apply(x, norm, slope, job)
    norm = norm.double().clamp(min=1)
    with torch.no_grad():
        exact = integer_gdn(x, norm, mantissa, shift, inverse, algorithm).float()
    if torch.is_grad_enabled() and (x.requires_grad or norm.requires_grad):
        root = torch.sqrt(norm) if algorithm == "gdn" else norm
        smooth = x * slope * root if inverse else x * slope / root
        exact = straight_through(exact, smooth.float())
    return torch.minimum(torch.maximum(exact, low), high)


class _FusedGdnSTE(torch.autograd.Function):
    """`gdn` by the compiled kernels."""

    @staticmethod
    def forward(ctx, x, norm, slope, job):
        x, norm = x.contiguous(), norm.contiguous()
        out = job.forward(x, norm)
        ctx.job = job
        ctx.save_for_backward(x, norm, slope, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, norm, slope, out = ctx.saved_tensors
        grad_x, grad_norm, sums = ctx.job.backward(grad, x, norm, slope, out)
        return grad_x, grad_norm, sums.reshape(slope.shape) / slope, None


# -------------------------------------------------------------------------------------- sums along dimensions


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
        bias = None if layer.bias is None else _int64(layer.bias)
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
            offset=None if offset is None else _int64(offset),
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
        low, high = _int64(low), _int64(high)
        operation = ops.LayerNorm(
            (x.number,),
            eps=eps,
            mantissa=mantissa * torch.where(multiplier < 0, -1, 1),
            shift=shift,
            offset=_int64(offset),
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


# ------------------------------------------------------------------------------------------------- boundaries


def boundary(
    kind: str,
    node: str,
    latent: Tensor,
    symbols: Tensor,
    decoded: Tensor,
    means: Tensor | None = None,
    scales: Tensor | None = None,
    weights: Tensor | None = None,
    whole: bool = False,
    step: Tensor | None = None,
) -> None:
    """Note in a program that `latent` is rounded to `symbols`, of which a decoder makes `decoded`.

    Nothing happens on tensors. The other arguments are as in `Boundary`.
    """
    if not isinstance(latent, Symbol):
        return

    def number_of(value: Tensor | None) -> int | None:
        return value.number if isinstance(value, Symbol) else None

    assert isinstance(symbols, Symbol) and isinstance(decoded, Symbol)
    latent.recorder.mark(
        Boundary(
            kind,
            node,
            latent.number,
            symbols.number,
            decoded.number,
            number_of(means),
            number_of(scales),
            number_of(weights),
            whole,
            step,
        )
    )


def likelihood(decoded: Tensor, estimate: Callable[[], Tensor]) -> Tensor:
    """The estimated likelihoods of symbols; in a program nothing depends on them, so there they are empty."""
    return torch.empty(decoded.shape, device="meta") if isinstance(decoded, Symbol) else estimate()
