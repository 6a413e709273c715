"""The arithmetic of quantized networks, number by number: each function with its rule for ranges. Those that
sum along dimensions are in `quant.sums`.

Each function serves the simulation and the integer program. Called on tensors of integers it computes, with
straight-through gradients. Called on symbols (`quant.symbols`) it appends an operation to the program, with
the proven range of its result. So a node's `integer` is written once, and the program computes what it
simulates.

Integers are held in float tensors, float32 where their magnitude stays below 2^24 and float64 below 2^53. A
multiplier and a limit are tensors that broadcast against the integers.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from licq.quant import fused_layers
from licq.quant import operations as ops
from licq.quant.fixedpoint import (
    Limits,
    quantize_multiplier,
    requantize_ste,
    straight_through,
)
from licq.quant.integer_functions import integer_gdn, table_lookup
from licq.quant.operations import Boundary, Ends, Range
from licq.quant.symbols import Recorder, Symbol, int64


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
    value = int64(numbers)
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
    factor = torch.ones((), dtype=torch.int64) if refinement is None else int64(refinement)
    limits = None
    if low is not None and high is not None:
        limits = int64(low), int64(high)
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
    return x.recorder.emit(ops.Mask((x.number,), mask=int64(ones)), x.shape, x.range.with_zero)


def clamp(x: Tensor, low: Ends, high: Ends) -> Tensor:
    """x clipped to low .. high, integers in x's unit; None: no limit. Range: clipped likewise."""
    if not isinstance(x, Symbol):
        if low is not None:
            x = torch.maximum(x, low.to(x.dtype)) if isinstance(low, Tensor) else x.clamp(min=low)
        if high is not None:
            x = torch.minimum(x, high.to(x.dtype)) if isinstance(high, Tensor) else x.clamp(max=high)
        return x
    numbers = x.range.clamped(low, high)
    lows, highs = (None if end is None else int64(end) for end in (low, high))
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
        entries = int64(entries)
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
        low, high = int64(low), int64(high)
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
