"""Where faster floating-point arithmetic gives exactly the integers of the reference."""

import torch
from torch import Tensor

from licq.quant import operations as ops
from licq.quant.fixedpoint import INT32, multiplier_value


def tie_free_multiplier(mantissa: Tensor, shift: Tensor, largest: int, limit: int = INT32) -> Tensor | None:
    """A multiplier, slightly larger than mantissa * 2^-shift, whose products are never ties.

    A tie is a product halfway between two integers. The multiplier is mantissa * 2^-shift (1 + 2^-51).
    Products with it, rounded to float64, exceed the exact ones by more than one part in 2^52 and less than
    three. So an exact tie comes to lie above the half, and every rounding to nearest takes it away from zero.
    A product below a half stays below, if three parts in 2^52 are less than the distance of neighbouring
    products, which is 2^-shift for odd mantissas.

    Args:
        mantissa, shift: integers of any shape.
        largest: magnitude of the integers that are multiplied.
        limit: products beyond it are clipped to it.

    Returns:
        float64; None where the distance is too small for a product up to `limit`, or where a product leaves
        the range of 32 bits.
    """
    mantissa, shift = torch.as_tensor(mantissa).to(torch.int64), torch.as_tensor(shift).to(torch.int64)
    exact = multiplier_value(mantissa, shift)
    products = exact.abs() * largest
    power_of_two = torch.where(mantissa == 0, 1, mantissa & -mantissa).double()  # the largest divisor
    distance = (power_of_two * multiplier_value(torch.ones_like(shift), shift)).clamp(max=0.5)
    in_range = bool((products < 2**31 - 2).all())
    apart = bool((products.clamp(max=limit + 1) * 3 * 2.0**-52 < distance * 0.99).all())
    return exact * (1 + 2.0**-51) if in_range and apart else None


def gdn_fits_float64(gdn: ops.Gdn, largest: int) -> bool:
    """Whether `gdn4` in gdn.c has room for numbers up to `largest`."""
    limits = int(gdn.low.abs().max()), int(gdn.high.abs().max())
    in_range = largest <= 2**15 and max(largest, *limits) <= 2**24 and int(gdn.shift.abs().max()) < 512
    return gdn.algorithm == "gdn" and in_range


def gdn_fits_float32(gdn: ops.Gdn, largest: int) -> bool:
    """Whether the proof of `gdn8` in gdn.c holds for numbers up to `largest`, and float32 neither overflows
    nor gets near its smallest numbers."""
    limits = max(int(gdn.low.abs().max()), int(gdn.high.abs().max()))
    mantissa = gdn.mantissa
    return (
        gdn_fits_float64(gdn, largest)
        and limits < 2**16
        and 2**10 <= int(mantissa.min())
        and int(mantissa.max()) <= 2**24
        and int(gdn.shift.abs().max()) <= 60
    )
