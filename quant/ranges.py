"""Static range estimators: the dynamic range r of a tensor from its samples, per channel or whole.

The scale follows as s = r / qmax (eq. 3), qmax = 2^(b-1)-1 signed or 2^b-1 unsigned. All estimators work on
the magnitude that quantization sees, |x| signed or max(x, 0) unsigned, and share one signature:

    (x, axis, bits, signed, ...) -> r   float64, positive; shape () for axis None, else (x.shape[axis],)

They raise ValueError for an empty tensor and for NaN or infinite values. A channel of zeros gets 2^-8 of the
tensor's largest r (2^-8 if the whole tensor is zero): any range represents it exactly, and one that is
smaller still would make its bias overflow in the accumulator's units. Beyond 2^20 values in all (and 4096 per
channel) the searches and the percentile look at a fixed sample of them; the maximum and the moments are
always exact.
"""

import dataclasses
import math
import re
from collections.abc import Callable

import torch
from torch import Tensor

from licq.quant.fixedpoint import int_range
from licq.support.errors import InputError

_SAMPLES = 1 << 20
_SAMPLES_PER_CHANNEL = 4096
_ZERO_CHANNEL = 2.0**-8


def max_range(x: Tensor, axis: int | None, bits: int = 8, signed: bool = True) -> Tensor:
    """max |x|: eqs. 15 to 17 with N = 1."""
    return _finish(_magnitude(_rows(x, axis), signed).amax(1).double(), axis)


def lp_range(x: Tensor, axis: int | None, bits: int = 8, signed: bool = True, p: float = 2.0) -> Tensor:
    """The r <= max |x| that minimizes sum |x - x_hat|^p, searched over fractions of the maximum.

    Twenty fractions 1, 0.95 .. 0.05, then twenty more around each channel's best, 0.005 apart. Of equal
    errors the larger range is taken.
    """
    qmax = int_range(bits, signed)[1]
    rows = _rows(x, axis)
    largest = _magnitude(rows, signed).amax(1)
    values = _magnitude(_sample(rows), signed)
    work = torch.empty_like(values)
    best = torch.ones_like(largest)
    min_error = torch.full_like(largest, torch.inf)
    for offsets in (range(0, 191, 10), range(-10, 11)):
        centre = best.clone()
        for offset in offsets:
            fraction = (centre - offset * 0.005).clamp(0.005, 1.0)
            error = _clipped_error(values, largest * fraction / qmax, qmax, p, work)
            better = error < min_error
            best = torch.where(better, fraction, best)
            min_error = torch.where(better, error, min_error)
    return _finish((largest * best).double(), axis)


def mse_range(x: Tensor, axis: int | None, bits: int = 8, signed: bool = True) -> Tensor:
    """The r that minimizes the squared quantization error, eq. 5; see `lp_range`."""
    return lp_range(x, axis, bits, signed, p=2.0)


def percentile_range(
    x: Tensor, axis: int | None, bits: int = 8, signed: bool = True, percent: float = 99.99
) -> Tensor:
    """The smallest sampled magnitude that `percent` of the values do not exceed; the maximum where that is
    0."""
    rows = _rows(x, axis)
    largest = _magnitude(rows, signed).amax(1)
    values = _magnitude(_sample(rows), signed)
    count = values.shape[1]
    # The small term keeps an integer percent * count from being rounded up by its own float error.
    rank = min(max(math.ceil(percent * count / 100 - 1e-6), 1), count)
    chosen = values.kthvalue(rank, dim=1).values
    return _finish(torch.where(chosen > 0, chosen, largest).double(), axis)


def sigma_range(x: Tensor, axis: int | None, bits: int = 8, signed: bool = True, k: float = 3.0) -> Tensor:
    """min(|mean| + k * std, max |x|): the Gaussian range of Hong et al. (2020)."""
    rows = _rows(x, axis)
    variance, mean = torch.var_mean(rows, dim=1, correction=0)
    spread = mean.abs().double() + k * variance.double().sqrt()
    return _finish(torch.minimum(spread, _magnitude(rows, signed).amax(1).double()), axis)


@dataclasses.dataclass(frozen=True)
class _Method:
    estimate: Callable[..., Tensor]
    keyword: str | None = None
    lowest: float = 0.0
    highest: float = 0.0


_METHODS = {
    "max": _Method(max_range),
    "mse": _Method(mse_range),
    "lp": _Method(lp_range, "p", 0.1, 20.0),
    "percentile": _Method(percentile_range, "percent", 50.0, 100.0),
    "sigma": _Method(sigma_range, "k", 0.1, 100.0),
}


@dataclasses.dataclass(frozen=True)
class RangeSpec:
    """Which estimator, with its parameter: "max", "mse", "lp2.4", "percentile99.99", "sigma3" when written.

    Raises InputError for an unknown method, and for a parameter that is missing, superfluous or out of
    bounds.
    """

    method: str
    parameter: float | None = None

    def __post_init__(self):
        method = _METHODS.get(self.method)
        if method is None:
            raise InputError(
                f"unknown range estimator {self.method!r}: use max, mse, lp2.4, percentile99.99 or sigma3"
            )
        if method.keyword is None:
            if self.parameter is not None:
                raise InputError(f"range estimator {self.method} takes no number, but got {self.parameter:g}")
        elif self.parameter is None or not method.lowest <= self.parameter <= method.highest:
            raise InputError(
                f"range estimator {self.method} needs a number from {method.lowest:g} to {method.highest:g}, "
                f"such as {self.method}{'99.99' if self.method == 'percentile' else '3'}"
            )

    @classmethod
    def parse(cls, text: str) -> "RangeSpec":
        """The spec written as `text`; str(spec) writes it again."""
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d*)?|\.\d+)?", text.strip())
        if match is None:
            return cls(text)
        name, number = match.groups()
        return cls(name, None if number is None else float(number))

    def __str__(self) -> str:
        return self.method if self.parameter is None else f"{self.method}{self.parameter:.12g}"

    def estimate(self, x: Tensor, axis: int | None, bits: int = 8, signed: bool = True) -> Tensor:
        """The range of `x`; see the module's text for shapes and errors."""
        method = _METHODS[self.method]
        options = {} if method.keyword is None else {method.keyword: self.parameter}
        return method.estimate(x, axis, bits, signed, **options)


def _rows(x: Tensor, axis: int | None) -> Tensor:
    """x as (channels, values), without a copy where the layout allows; checked."""
    x = x.detach()
    if x.numel() == 0:
        raise ValueError("no range: the tensor is empty")
    if not bool(torch.isfinite(x.sum(dtype=torch.float64))):
        raise ValueError("no range: the tensor holds NaN or infinite values")
    if not x.is_floating_point() or torch.finfo(x.dtype).bits < 32:
        x = x.float()
    return x.reshape(1, -1) if axis is None else x.movedim(axis, 0).reshape(x.shape[axis], -1)


def _magnitude(values: Tensor, signed: bool) -> Tensor:
    return values.abs() if signed else values.clamp(min=0)


def _sample(rows: Tensor) -> Tensor:
    """At most max(2^20 / channels, 4096) columns."""
    return sample(rows, max(_SAMPLES // rows.shape[0], _SAMPLES_PER_CHANNEL))


def sample(rows: Tensor, max_count: int) -> Tensor:
    """At most `max_count` columns of (channels, values): one of each equal stretch, its position by the
    golden ratio.

    A fixed stride would see only some columns of an image.
    """
    count = rows.shape[1]
    if count <= max_count:
        return rows
    position = torch.arange(max_count, dtype=torch.float64)
    moved = position + (position * 0.6180339887498949) % 1.0
    return rows[:, (moved * (count / max_count)).long().clamp(max=count - 1).to(rows.device)]


def _clipped_error(values: Tensor, scale: Tensor, qmax: int, p: float, work: Tensor) -> Tensor:
    """Mean |m - m_hat|^p of each row of magnitudes; `work` is scratch of the same shape."""
    step = scale.clamp(min=torch.finfo(values.dtype).tiny)[:, None]
    # The nearest code is one of two equally good ones at a tie, so which way halves go cannot matter here.
    torch.div(values, step, out=work)
    work.add_(0.5).floor_().clamp_(max=qmax).mul_(step).sub_(values)
    return (work.square_() if p == 2 else work.abs_().pow_(p)).mean(1)


def _finish(ranges: Tensor, axis: int | None) -> Tensor:
    largest = ranges.max()
    substitute = torch.where(largest > 0, largest * _ZERO_CHANNEL, _ZERO_CHANNEL)
    ranges = torch.where(ranges > 0, ranges, substitute)
    return ranges[0] if axis is None else ranges
