"""Nodes of quotients, roots and affine functions, of which normalizations and gates are made.

Quotients are `integer_gdn`: x / norm and x / sqrt(norm) with an exact rounding, for a norm of up to 40 bits.
"""

from typing import Any

import torch
from torch import Tensor

from licq.quant.config import QuantConfig
from licq.quant.fixedpoint import quantize_multiplier, round_ste
from licq.quant.functions import QuantFunction
from licq.quant.primitives import absolute, add, clamp, constant, gdn, product, rescale, square
from licq.quant.qtensor import QTensor
from licq.quant.symbols import Symbol
from licq.quant.torch_functions import SQUARE_BITS

_ONE = 2**14
"""The numerator of a root."""

_SMALLEST = 2.0**-40
"""A gain of zero has no multiplier. This one rounds every number of an int32 accumulator to zero."""

_LARGEST = 2**24 - 1
"""What float32 holds exactly."""


def divided(
    a: QTensor, norm: Tensor, unit: Tensor, out: Any, root: bool = False, inverse: bool = False
) -> QTensor:
    """a / norm, or a / sqrt(norm), or a * sqrt(norm) (`inverse`), on the grid `out`.

    Args:
        a: integers below 2^15. norm: integers from 1 on, below 2^40, which broadcast to a; unit: their scale.
    """
    scale, qmin, qmax = out.parameters_of_grid()
    factor = torch.sqrt(unit) if root else unit
    slope = a.unit * factor / scale if inverse else a.unit / (factor * scale)
    with torch.no_grad():
        mantissa, shift = quantize_multiplier(slope)
    algorithm = "gdn" if root else "gdn1"
    return a.like(gdn(a.q, norm, mantissa, shift, inverse, algorithm, qmin, qmax, slope), scale)


def of_one_shape(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both expanded to their common shape."""
    shape = torch.broadcast_shapes(a.shape, b.shape)
    return (a if a.shape == shape else a.expand(shape)), (b if b.shape == shape else b.expand(shape))


class QuantSquared(QuantFunction):
    """x * x, exact: x is rounded to `SQUARE_BITS`, its square is not."""

    kind = "squared"

    def __init__(self, config: QuantConfig):
        super().__init__(config)
        self.grid = self.wide_quantizer()
        self.grid.bits = SQUARE_BITS
        self.grid.symmetry, self.grid.headroom = "symmetric", config.headroom

    def real(self, x: Tensor) -> Tensor:
        return x * x

    def observe(self, inputs: tuple, output: Any) -> None:
        self.grid.observe(inputs[0].real())

    def integer(self, x: QTensor) -> QTensor:
        x = self.grid(x)
        return x.like(square(x.q), x.unit**2)


class QuantRoot(QuantFunction):
    """sqrt(v), or 1 / sqrt(v) (`inverse`), of integers that keep their relative precision."""

    kind = "root"

    def __init__(self, config: QuantConfig, inverse: bool = False):
        super().__init__(config, inverse=inverse)
        self.inverse = inverse
        self.grid = self.wide_quantizer()

    def real(self, v: Tensor) -> Tensor:
        return torch.rsqrt(v) if self.inverse else torch.sqrt(v)

    def observe(self, inputs: tuple, output: Any) -> None:
        self.grid.observe(output)

    def integer(self, v: QTensor) -> QTensor:
        one = torch.tensor(_ONE, device=v.device)
        ones = v.like(clamp(v.q, one, one), torch.tensor(1 / _ONE, dtype=torch.float64, device=v.device))
        if not isinstance(ones.q, Symbol):
            ones.q = ones.q.float()
        return divided(ones, clamp(v.q, 1, None), v.unit, self.grid, root=True, inverse=not self.inverse)


class QuantDivRoot(QuantFunction):
    """a / sqrt(v) of a wide activation and integers that keep their relative precision."""

    kind = "div_root"

    def __init__(self, config: QuantConfig):
        super().__init__(config)
        self.grid_a, self.grid_out = self.wide_quantizer(), self.wide_quantizer()

    def real(self, a: Tensor, v: Tensor) -> Tensor:
        return a / torch.sqrt(v)

    def observe(self, inputs: tuple, output: Any) -> None:
        self.grid_a.observe(inputs[0].real())
        self.grid_out.observe(output)

    def integer(self, a: QTensor, v: QTensor) -> QTensor:
        a = self.grid_a(a)
        numbers, norm = of_one_shape(a.q, clamp(v.q, 1, None))
        return divided(a.like(numbers, a.unit), norm, v.unit, self.grid_out, root=True)


class QuantDiv(QuantFunction):
    """a / b. The divisor keeps the bits that it has; 0 counts as its smallest step.

    Args:
        signed: divisors below zero were observed. Where none was, they count as the smallest step.
    """

    kind = "div"

    def __init__(self, config: QuantConfig, signed: bool = False):
        super().__init__(config, signed=signed)
        self.grid_a, self.grid_out = self.wide_quantizer(), self.wide_quantizer()

    def real(self, a: Tensor, b: Tensor) -> Tensor:
        return a / b

    def observe(self, inputs: tuple, output: Any) -> None:
        self.options["signed"] = self.options["signed"] or bool((inputs[1].real() < 0).any())
        self.grid_a.observe(inputs[0].real())
        self.grid_out.observe(output)

    def integer(self, a: QTensor, b: QTensor) -> QTensor:
        a = self.grid_a(a)
        numbers, norm = of_one_shape(a.q, b.q)
        if self.options["signed"]:
            negative = clamp(norm, -1, 0)
            sign = add(
                add(negative, negative), constant(torch.ones((), device=a.device), self.runtime.tracer)
            )
            numbers, norm = product(numbers, sign), absolute(norm)
        if not isinstance(numbers, Symbol):
            numbers = numbers.float()
        return divided(a.like(numbers, a.unit), clamp(norm, 1, None), b.full_scale(), self.grid_out)


class QuantAffine(QuantFunction):
    """x * gain + offset with constants for each channel: a batch normalization, or the end of another one.

    The result is a wide activation with a scale for each channel.

    Args:
        dim: of the channels.
    """

    kind = "affine"

    def __init__(self, config: QuantConfig, dim: int = 1):
        super().__init__(config, dim=dim)
        self.dim = dim
        self.grid = self.wide_quantizer()
        self.grid.channel_dim = self.grid.border_dim = dim

    def _shaped(self, constants: Tensor, ndim: int) -> Tensor:
        return constants.detach().double().reshape([-1 if d == self.dim % ndim else 1 for d in range(ndim)])

    def real(self, x: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
        return (x * self._shaped(gain, x.ndim) + self._shaped(offset, x.ndim)).to(x.dtype)

    def observe(self, inputs: tuple, output: Any) -> None:
        self.grid.observe(output)

    def integer(self, x: QTensor, gain: Tensor, offset: Tensor) -> QTensor:
        if not x.is_integer:
            return x.like(self.real(x.q, gain, offset), None)
        gain, offset = self._shaped(gain, x.ndim), self._shaped(offset, x.ndim)
        scale, qmin, qmax, _ = self.grid.parameters_for(x.ndim)
        limit = torch.full_like(qmax, _LARGEST)
        # the result is clipped to 16 bits, long before the limit
        q = rescale(x.q, (gain.abs() * x.full_scale() / scale).clamp(min=_SMALLEST), -limit, limit)
        if bool((gain < 0).any()):
            q = product(q, constant(torch.where(gain < 0, -1.0, 1.0).float(), self.runtime.tracer))
        steps = round_ste(offset / scale).clamp(-_LARGEST, _LARGEST).float()
        q = clamp(add(q, constant(steps, self.runtime.tracer)), qmin, qmax)
        return x.like(q, scale)
