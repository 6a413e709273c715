"""Fixed-point arithmetic: the one implementation used by the simulator, the kernels and the tests.

An integer tensor is held in a *float* tensor whose values are integers (float32 when |q| < 2^24, float64
below 2^53), so that PyTorch's ordinary operators and autograd work on it; its scale stands beside it. Every
function here is pure and gives the same bits on every machine: it uses only operations whose float64 result
is exact, or int64. Integers never come out as -0.0 from `requantize`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from licq.quant import fused

MANTISSA_BITS = 22
"""Bits of a multiplier's mantissa: times an int32 accumulator (31 bits and sign) that is 53, exact in
float64."""

INT32 = 2**31 - 1
"""The largest int32: what an accumulator of the kernels holds."""

EXACT_FLOAT32 = 2**24
"""Integers below this are exact in float32, and so are their sums in any order as long as these stay
below."""

EXACT_FLOAT64 = 2**53
"""Integers below this are exact in float64."""

_MAX_SHIFT = 62
_CPU_CHUNK = 1 << 16
_DEVICE_CHUNK = 1 << 25


def int_range(bits: int, signed: bool = True) -> tuple[int, int]:
    """(qmin, qmax) of eq. 1: symmetric -(2^(b-1)-1) .. 2^(b-1)-1, or 0 .. 2^b-1 when unsigned.

    Raises ValueError for `bits` outside 2..16.
    """
    if int(bits) != bits or not 2 <= bits <= 16:
        raise ValueError(f"bits must be an integer from 2 to 16, not {bits}")
    bits = int(bits)
    if signed:
        return -(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


# --------------------------------------------------------------------------------------------------- rounding


def round_half_away(x: Tensor) -> Tensor:
    """Nearest integer, halves away from zero, of a float tensor of any shape; same dtype, NaN and inf
    stay.

    The largest float below one half is added, not one half: x + 0.5 would itself round up to 1 for the
    largest x below 0.5, and to the next even number for odd x above 2^52.
    """
    return _round_half_away_(x.clone())


def _round_half_away_(x: Tensor) -> Tensor:
    # On magnitudes, because PyTorch's floor is many times faster on a CPU than its trunc and copysign.
    sign = x.sign()
    # + 0.0 turns -0.0 into 0.0, so that equal numbers have equal bytes.
    return x.abs_().add_(below_half(x.dtype)).floor_().mul_(sign).add_(0.0)


def below_half(dtype: torch.dtype) -> float:
    """The largest number below one half; for x >= 0, floor(x + this) rounds half away from zero."""
    return 0.5 - torch.finfo(dtype).eps / 4


class _RoundSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return round_half_away(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, exact, smooth):
        ctx.smooth_dtype = smooth.dtype
        return exact.view_as(exact)

    @staticmethod
    def backward(ctx, grad):
        return None, grad.to(ctx.smooth_dtype)


def round_ste(x: Tensor) -> Tensor:
    """`round_half_away` forward, identity backward."""
    return _RoundSTE.apply(x)


def straight_through(exact: Tensor, smooth: Tensor) -> Tensor:
    """The values of `exact`, bit for bit, with the gradient of `smooth`; both of one shape.

    Not `smooth + (exact - smooth).detach()`, whose two additions round. Raises ValueError on unequal shapes.
    """
    if exact.shape != smooth.shape:
        raise ValueError(f"shapes differ: exact {tuple(exact.shape)}, smooth {tuple(smooth.shape)}")
    return _StraightThrough.apply(exact.detach(), smooth)


# ----------------------------------------------------------------------------------------------------- scales


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as float64, exact, for integer exponents; clamped to the normal range -1022..1023.

    Made from the bits of the float, because pow and ldexp may be a unit off in the last place on some device.
    """
    biased = exponent.to(torch.int64).clamp(-1022, 1023) + 1023
    return (biased << 52).view(torch.float64)


def fixed_point_scale(s: Tensor, frac_bits: int = 24, scale_bits: int = 32) -> Tensor:
    """Gamma of eqs. 3 and 4: `s` as a fixed-point number with `frac_bits` (n_r) fractional bits, in float64.

    Rounds s * 2^n_r to an integer and clips it to 1 .. 2^(scale_bits-1)-1. The paper clips from
    -2^(b^s-1); a scale that is zero or negative has no meaning, so one LSB is the smallest here (a deliberate
    difference). The gradient is the identity, clipped or not, so that a range that sank below one LSB can
    rise.
    """
    if not 2 <= scale_bits <= 53:
        raise ValueError(f"scale_bits must be from 2 to 53, not {scale_bits}")
    wide = s.to(torch.float64)
    with torch.no_grad():
        grid = round_half_away(wide * 2.0**frac_bits).clamp_(1, 2 ** (scale_bits - 1) - 1)
        exact = grid * 2.0**-frac_bits
    return straight_through(exact, wide)


def power_of_two_scale(s: Tensor, frac_bits: int = 24) -> Tensor:
    """The smallest power of two that is not smaller than `s`, from 2^-n_r on, in float64: requantization is a
    shift then.

    A share of 2^-20 above a power of two is taken as rounding error of whoever made `s`. The gradient is the
    identity.
    """
    wide = s.to(torch.float64)
    with torch.no_grad():
        mantissa, exponent = torch.frexp(wide.clamp(min=2.0**-frac_bits))  # mantissa in [1/2, 1)
        exact = power_of_two(exponent - (mantissa <= 0.5 * (1 + 2.0**-20)).to(exponent.dtype))
    return straight_through(exact, wide)


SCALES = {"fixed_point": fixed_point_scale, "power_of_two": power_of_two_scale}
"""By the name of `QuantConfig.w_scales` and `input_scales`."""


def quantize_multiplier(m: Tensor, mantissa_bits: int = MANTISSA_BITS) -> tuple[Tensor, Tensor]:
    """(mantissa, shift), int64 of m's shape, with m ~= mantissa * 2^-shift and 2^(bits-1) <= mantissa <
    2^bits.

    `m` is a positive finite real multiplier; the relative error is at most 2^-mantissa_bits, zero for powers
    of two. Raises ValueError where an element is zero, negative, NaN or infinite.
    """
    wide = m.detach().to(torch.float64)
    if not bool(((wide > 0) & torch.isfinite(wide)).all()):
        raise ValueError("a requantization multiplier must be positive and finite")
    fraction, exponent = torch.frexp(wide)
    mantissa = round_half_away(fraction * 2.0**mantissa_bits).to(torch.int64)
    carried = mantissa >> mantissa_bits
    return mantissa >> carried, mantissa_bits - exponent.to(torch.int64) - carried


def multiplier_value(mantissa: Tensor, shift: Tensor) -> Tensor:
    """mantissa * 2^-shift as float64: exact (shifts above 1022, which requantize everything to 0, are cut
    there)."""
    return mantissa.to(torch.float64) * power_of_two(-shift.to(torch.int64))


# --------------------------------------------------------------------------------------------- requantization


def requantize(acc: Tensor, mantissa: Tensor, shift: Tensor) -> Tensor:
    """round_half_away(acc * mantissa / 2^shift): the integer program's only way from one scale to another.

    `acc`: integers, |acc| <= 2^31, float32 or float64 (same dtype comes back) or an integer type (int64
    comes back; |acc| < 2^40 is allowed there). `mantissa` (< 2^22) and `shift` (any sign; negative shifts
    left) are integer tensors that broadcast against `acc`, one entry per channel for example. Both kinds
    give the same numbers. A float32 result is exact below 2^24, an int64 one below 2^63.
    """
    mantissa, shift = torch.as_tensor(mantissa, device=acc.device), torch.as_tensor(shift, device=acc.device)
    if acc.is_floating_point():
        return _scale_and_round(acc.detach(), multiplier_value(mantissa, shift))
    shift = shift.to(torch.int64)
    product = acc.to(torch.int64) * mantissa.to(torch.int64)
    right = shift.clamp(0, _MAX_SHIFT)
    half = (torch.ones_like(right) << right) >> 1
    magnitude = ((product.abs() + half) >> right) << (-shift).clamp(0, _MAX_SHIFT)
    # |product| < 2^62 is less than half of 2^63.
    return torch.where(shift > _MAX_SHIFT, 0, product.sign() * magnitude)


_TIE_FREE = 1 + 2.0**-48
"""Factor on a multiplier after which rounding to even rounds halves away from zero; see
`_scale_and_round`."""


def _scale_and_round(
    acc: Tensor, multiplier: Tensor, limits: "Limits | None" = None, inside: Tensor | None = None
) -> Tensor:
    """round_half_away(acc * multiplier) in acc's dtype; `multiplier` is float64 with at most 22 significant
    bits.

    With `limits` the result is float32, clipped to them; `inside` (int8, acc's shape) then receives twice the
    gradient of the clipping, see `_clip_`. Done in pieces that stay in the cache, because float64 copies of a
    whole feature map cost more than the arithmetic.

    The float64 product p = acc * multiplier is exact. For a float32 `acc`, rounding to even, which is much
    faster, gives round_half_away(p) once the multiplier has grown by a factor 1 + 2^-48. Let p be an integer
    P of units 2^-u, |P| < 2^46 (24 bits times 22). With the roundings of the factor and of the product, 2^-53
    each, P grows in magnitude by more than 0 and less than half a unit. If u >= 1, halves are
    integers of units: a tie moves away from zero, and nothing else reaches or crosses a tie. If u <= 0,
    p is an integer and moves by less than 1/2 as long as
    |p| < 2^47, and float32 is exact only below 2^24 anyway.
    """
    # Not torch.broadcast_shapes: its first call imports sympy, which takes seconds.
    narrow = acc.dtype == torch.float32
    if narrow:
        multiplier = multiplier * _TIE_FREE
    acc, multiplier = torch.broadcast_tensors(acc, multiplier)
    dtype = acc.dtype if limits is None else torch.float32
    out = torch.empty(acc.shape, dtype=dtype, device=acc.device)
    low, high = (0.0, 0.0) if limits is None else limits.expand(out.shape)  # unused without limits
    operands = [acc, multiplier, out]
    for extra in (inside, low, high):
        if isinstance(extra, Tensor):
            operands.append(extra)
    for part, factor, into, *rest in pieces(*operands):
        product = part.to(torch.float64, copy=True).mul_(factor)
        into.copy_(product.round_() if narrow else _round_half_away_(product))
        part_inside = rest.pop(0) if inside is not None else None
        part_low, part_high = rest or (low, high)
        if limits is not None:
            _clip_(into, part_low, part_high, part_inside)
        into.add_(0.0)  # no -0.0
    return out


def _clip_(q: Tensor, low: Tensor | float, high: Tensor | float, inside: Tensor | None) -> None:
    """Clip float32 q in place; `inside` receives 2 where q was between the limits, 1 at a limit, 0 outside.

    That is twice the gradient that torch.minimum(torch.maximum(q, low), high) has: half of it goes to the
    limit where q equals one.
    """
    if inside is not None:
        inside.copy_((q - low).sign_().add_((high - q).sign_()))
    if isinstance(low, Tensor) and isinstance(high, Tensor):
        torch.maximum(q, low, out=q)
        torch.minimum(q, high, out=q)
    else:
        q.clamp_(float(low), float(high))


class Limits:
    """qmin and qmax of a quantizer, as float32 tensors that broadcast to the numbers.

    On a CPU they become two plain numbers where all entries are equal, which is faster.
    """

    def __init__(self, qmin: Tensor, qmax: Tensor):
        self.qmin, self.qmax = qmin, qmax

    def _plain(self) -> tuple[float, float] | None:
        if self.qmin.device.type != "cpu":  # elsewhere to ask would wait for the device
            return None
        lowest, low, high, highest = (
            float(end) for end in (self.qmin.min(), self.qmin.max(), self.qmax.min(), self.qmax.max())
        )
        return (low, high) if lowest == low and high == highest else None

    def expand(self, shape: torch.Size) -> tuple:
        """(low, high) for numbers of this shape: expanded tensors, or two numbers."""
        return self._plain() or (
            self.qmin.to(torch.float32).expand(shape),
            self.qmax.to(torch.float32).expand(shape),
        )


def piece_size(x: Tensor) -> int:
    """How many numbers a piece of x may hold."""
    return _CPU_CHUNK if x.device.type == "cpu" else _DEVICE_CHUNK


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same slices of equally shaped tensors, as views small enough that a chain of operations stays in
    cache."""
    first = tensors[0]
    limit = piece_size(first)
    if first.numel() <= limit:
        yield tensors
        return
    rows = limit * first.shape[0] // first.numel()
    if first.shape[0] == 1 or rows == 0:
        for row in zip(*tensors):
            yield from pieces(*row)
        return
    yield from zip(*(tensor.split(rows) for tensor in tensors))


class _RequantizeSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, acc, multiplier, limits):
        inside = None
        if limits is not None and any(ctx.needs_input_grad):
            inside = torch.empty(acc.shape, dtype=torch.int8, device=acc.device)
        ctx.dtype = acc.dtype
        ctx.save_for_backward(acc if ctx.needs_input_grad[1] else None, multiplier, inside)
        return _scale_and_round(acc, multiplier_value(*quantize_multiplier(multiplier)), limits, inside)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        acc, multiplier, inside = ctx.saved_tensors
        grad_acc = grad_multiplier = None
        if inside is not None:
            # not grad * inside: a product of two dtypes takes four times as long
            grad = inside.to(ctx.dtype).mul_(grad)
            multiplier_of_acc, half = multiplier * 0.5, 0.5
        else:
            multiplier_of_acc, half = multiplier, 1.0
        if ctx.needs_input_grad[1]:
            summed = (grad * acc).sum_to_size(multiplier.shape)
            grad_multiplier = summed.to(multiplier.dtype) * half
        if ctx.needs_input_grad[0]:
            factor = multiplier_of_acc.to(grad.dtype)
            # with `inside` the gradient is a copy of our own by now
            grad_acc = grad.mul_(factor) if inside is not None else grad * factor
        return grad_acc, grad_multiplier, None


class _FusedRequantizeSTE(torch.autograd.Function):
    """`_RequantizeSTE` by the compiled kernel, with the factor behind it."""

    @staticmethod
    def forward(ctx, acc, multiplier, job):
        acc = job.in_memory(acc)
        inside = None
        if job.limited and any(ctx.needs_input_grad):
            inside = torch.empty(acc.shape, dtype=torch.int8)
        out = job.forward(acc, multiplier.detach(), inside)
        ctx.job = job
        ctx.save_for_backward(acc if ctx.needs_input_grad[1] else None, multiplier, inside)
        return job.from_memory(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        acc, multiplier, inside = ctx.saved_tensors
        needs_acc, needs_multiplier, _ = ctx.needs_input_grad
        job, grad = ctx.job, ctx.job.in_memory(grad)
        grad_acc, sums = job.backward(grad, multiplier, acc if needs_multiplier else None, inside, needs_acc)
        grad_acc = None if grad_acc is None else job.from_memory(grad_acc)
        return grad_acc, None if sums is None else sums.reshape(multiplier.shape), None


def requantize_ste(
    acc: Tensor, multiplier: Tensor, limits: Limits | None = None, refinement: Tensor | None = None
) -> Tensor:
    """`requantize(acc, *quantize_multiplier(multiplier))` that can be differentiated; same values to the bit.

    `acc`: integers in float32 or float64, |acc| <= 2^31; the result has its dtype and shape.
    `multiplier`: positive real tensor that broadcasts to acc's shape. Rounding does not stop the gradient:
    d/d acc = multiplier, d/d multiplier = acc, summed to its shape. With `limits` the result is clipped to
    them, as float32; a number outside passes no gradient, one at a limit half of it (torch.minimum's and
    torch.maximum's own). The result is multiplied by `refinement`, which broadcasts likewise. Raises
    ValueError for a multiplier that is not positive and finite, or that does not broadcast to acc's shape.
    """
    try:
        multiplier.expand(acc.shape)
    except RuntimeError:
        shapes = f"{tuple(multiplier.shape)} does not broadcast to acc {tuple(acc.shape)}"
        raise ValueError(f"multiplier {shapes}") from None
    ends = (None, None) if limits is None else (limits.qmin, limits.qmax)
    job = fused.requantization(acc, multiplier, *ends, refinement)
    if job is not None:
        return _FusedRequantizeSTE.apply(acc, multiplier, job)
    out = _RequantizeSTE.apply(acc, multiplier, limits)
    return out if refinement is None else out * refinement
