"""Multipliers whose products with integers are never halves."""

import torch
from torch import Tensor

from licq.integer.program import INT32
from licq.quant.fixedpoint import multiplier_value


def tie_free_multiplier(mantissa: Tensor, shift: Tensor, largest: int, limit: int = INT32) -> Tensor | None:
    """A multiplier, a little larger, whose products with integers up to `largest` are never halves, and
    round as the exact ones do.

    mantissa * 2^-shift (1 + 2^-51): products with it, rounded to float64, are larger than the exact ones by
    more than one part in 2^52 and less than three in 2^52. So an exact half becomes more than a half, and is
    rounded away from zero by any rounding to nearest; and what lies below a half stays there, if three parts
    in 2^52 are less than the step between products, 2^-shift for odd mantissas. None where they are more, for
    a product up to `limit` (those above it are clipped to it), or where a product leaves the range of 32
    bits.
    """
    mantissa, shift = torch.as_tensor(mantissa).to(torch.int64), torch.as_tensor(shift).to(torch.int64)
    exact = multiplier_value(mantissa, shift)
    products = exact.abs() * largest
    twos = torch.where(
        mantissa == 0, 1, mantissa & -mantissa
    ).double()  # powers of two: a step is twos * 2^-shift
    step = (twos * multiplier_value(torch.ones_like(shift), shift)).clamp(max=0.5)
    fits = bool((products < 2**31 - 2).all()) and bool(
        (products.clamp(max=limit + 1) * 3 * 2.0**-52 < step * 0.99).all()
    )
    return exact * (1 + 2.0**-51) if fits else None
