"""Normalizations on integers: GDN and its relatives, LayerNorm."""

from functools import partial

import torch
import torch.nn.functional as F
from compressai.layers import GDN, GDN1
from torch import Tensor, nn

from licq.quant.config import FLOAT_BITS, QuantConfig
from licq.quant.fixedpoint import multiplier_value, quantize_multiplier, round_half_away, round_ste
from licq.quant.integer_functions import LAYER_NORM_FRAC_BITS
from licq.quant.mac import QuantMAC
from licq.quant.modules import QuantModule, replaces
from licq.quant.operations import Conv2d, Range
from licq.quant.primitives import absolute, gdn, square
from licq.quant.qtensor import QTensor
from licq.quant.quantizer import NO_INTEGERS, Quantizer
from licq.quant.storage import DEAD_SHARE, REGISTER_BITS
from licq.quant.sums import layer_norm, multiply_accumulate
from licq.quant.wide_products import exact_sums
from licq.support.errors import InputError

SQUARED_BITS = 12
"""The largest number of bits of an integer that is squared. With more, beta at the accumulator's scale would
leave few codes of int32 to gamma."""


@replaces(GDN, GDN1)
class QuantGDN(QuantMAC):
    """GDN and GDN1, and the inverse of each.

        GDN (Balle 2016):  x / sqrt(beta + gamma x^2),  inverse: x * sqrt(beta + gamma x^2)
        GDN1:              x / (beta + gamma |x|),      inverse: x * (beta + gamma |x|)

    gamma is a 1x1 multiply-accumulate layer. Its input is |x| in `QuantConfig.a_bits`, or the square of |x|
    in at most `SQUARED_BITS`. (A square of 8 bits has 16: two 8-bit products in an int8 kernel.) The root and
    the division are integer algorithms. x itself is a wide activation.
    """

    kind = "gdn"
    simulates = False  # papers quantize convolutions and attention
    module: GDN
    mantissa: Tensor | None
    shift: Tensor | None

    def __init__(self, module: nn.Module, config: QuantConfig):
        self.power = 1 if isinstance(module, GDN1) else 2
        super().__init__(module, config)
        bits, frac_bits = config.carrier_bits, config.frac_bits
        headroom = config.headroom if bits > 8 else 1.0
        symmetry = "asymmetric" if config.strict_int8 else "symmetric"
        self.x_grid = Quantizer(bits, frac_bits, 1, headroom=headroom, symmetry=symmetry)
        if config.strict_int8:
            self.x_grid.dead_share = DEAD_SHARE
            # x is stored until its norm is there; what is made of both is in registers
            bits, headroom = max(bits, REGISTER_BITS), config.headroom
        self.out_grid = Quantizer(bits, frac_bits, 1, headroom=headroom, symmetry="symmetric")
        self.register_buffer("mantissa", None)
        self.register_buffer("shift", None)

    @property
    def outputs(self) -> int:
        return self.module.beta.numel()

    @property
    def input_bits(self) -> int:
        a_bits = self.config.a_bits
        return min(a_bits, SQUARED_BITS) if self.power == 2 and a_bits != FLOAT_BITS else a_bits

    def float_weight(self) -> Tensor:
        gamma = self.module.gamma_reparam(self.module.gamma)
        return gamma.reshape(*gamma.shape, 1, 1)

    def float_bias(self) -> Tensor:
        return self.module.beta_reparam(self.module.beta) + self.bias_change

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.is_meta or x.device.type != "cpu":
            return F.conv2d(x, weight)
        return torch.matmul(weight.flatten(1), x.flatten(2)).unflatten(2, x.shape[2:])

    def real(self, x: Tensor) -> Tensor:
        return self.module(x)

    def observe(self, inputs: tuple, output: Tensor) -> None:
        x = inputs[0].real()
        self.input_grid.observe(x.abs())
        self.x_grid.observe(x)
        self.out_grid.observe(output)

    @property
    def input_power(self) -> int:
        return self.power

    def _folded(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        reference = scale.detach().max()
        weight = self.float_weight()
        spread = self.per_input((scale / reference) ** self.power, weight)
        return (weight * spread).float(), reference**self.power

    def real_with(self, x: Tensor, weight: Tensor, magnitude: Tensor | None = None) -> Tensor:
        norm = self.product((x.abs() if magnitude is None else magnitude) ** self.power, weight)
        norm = norm + self.float_bias().reshape(1, -1, 1, 1)
        norm = torch.sqrt(norm) if self.power == 2 else norm
        return x * norm if self.module.inverse else x / norm

    def one_side(self, x: QTensor) -> QTensor:
        if self.only == "weights":
            return super().one_side(x)
        magnitude = self.input_grid(x.like(x.q.abs(), x.scale)).real()
        return x.like(self.real_with(x.real(), self.float_weight(), magnitude), None)

    def integer(self, x: QTensor) -> QTensor:
        if FLOAT_BITS in (self.config.w_bits, self.config.a_bits):
            return x.like(self.real(x.real()), None)
        if self.only is not None:
            return self.one_side(x)
        if self.runtime.tracer is not None and self.weight_int is None:
            raise InputError(f"{self.name} has {NO_INTEGERS}")
        magnitude = self.input_grid(x.like(absolute(x.q), x.scale)).q
        magnitude = square(magnitude) if self.power == 2 else magnitude
        if self.weight_int is not None:
            layer, norm_scale = self.integer_layer()
            wide = True
        else:
            w_int, norm_scale = self.integer_weight()
            layer = self.operation(w_int, self.integer_bias(norm_scale), 0)
            # sums of 16-bit squares times 8-bit weights pass 2^24, where float32 would round
            wide = self.power * self.config.a_bits + self.config.w_bits > 16
        norm = multiply_accumulate(
            magnitude,
            layer,
            self.product,
            1,
            Range(0, layer.bound),
            wide=wide,
            wide_bias=True,
            exact_sums=partial(exact_sums, self),
        )
        norm_scale = norm_scale.reshape(1, -1, 1, 1)
        x = self.x_grid(x)
        out_scale, qmin, qmax = (t.reshape(1, -1, 1, 1) for t in self.out_grid.parameters_of_grid())
        if self.mantissa is not None and self.shift is not None:
            mantissa, shift = self.mantissa, self.shift
        else:
            with torch.no_grad():
                mantissa, shift = self._multiplier(x.unit, norm_scale, out_scale)

        root = torch.sqrt(norm_scale) if self.power == 2 else norm_scale
        slope = x.unit / out_scale
        slope = slope * root if self.module.inverse else slope / root
        q = gdn(x.q, norm, mantissa, shift, bool(self.module.inverse), self.algorithm, qmin, qmax, slope)
        return x.like(q, out_scale)

    def window(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (1, 1), (1, 1)

    def product_gradient(
        self, grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        flat, numbers, matrix = grad.flatten(2), x.flatten(2), weight.flatten(1)
        return (
            (matrix.T @ flat).view_as(x) if needs[0] else None,
            torch.einsum("boi,bni->on", flat, numbers).view_as(weight) if needs[1] else None,
        )

    def operation(self, weight: Tensor, bias: Tensor | None, bound: int) -> Conv2d:
        return Conv2d(
            weight=weight,
            bias=bias,
            bound=bound,
            stride=(1, 1),
            padding=(0, 0),
            dilation=(1, 1),
            groups=1,
        )

    @property
    def algorithm(self) -> str:
        return "gdn" if self.power == 2 else "gdn1"

    def _multiplier(self, x_scale: Tensor, norm_scale: Tensor, out_scale: Tensor) -> tuple[Tensor, Tensor]:
        root = torch.sqrt(norm_scale) if self.power == 2 else norm_scale
        ratio = x_scale / out_scale
        return quantize_multiplier(ratio * root if self.module.inverse else ratio / root)

    def integer_bias(self, out_scale: Tensor) -> Tensor:
        return round_ste(self.float_bias().double() / out_scale).clamp(1, 2.0**31 - 1)

    def freeze(self) -> None:
        super().freeze()
        if self.out_scale is not None:
            shape = (1, -1, 1, 1)
            x_scale, out_scale = (
                g.parameters_of_grid()[0].reshape(shape) for g in (self.x_grid, self.out_grid)
            )
            self.mantissa, self.shift = self._multiplier(x_scale, self.out_scale.reshape(shape), out_scale)

    def thaw(self) -> None:
        super().thaw()
        self.mantissa = self.shift = None

    def learnable(self) -> dict[str, list[nn.Parameter]]:
        knobs: dict[str, list[nn.Parameter]] = {}
        if FLOAT_BITS not in (self.config.w_bits, self.config.a_bits):
            knobs["range_w"] = [self.weight_quantizer.log_n]
            knobs["rounding"] = self.weight_quantizer.rounding_parameters()
            knobs["range_a"] = [self.input_grid.log_n]
            if self.config.strict_int8:
                knobs["range_a"].append(self.x_grid.log_n)
            knobs["bias"] = [self.bias_change]
        return knobs


@replaces(nn.LayerNorm)
class QuantLayerNorm(QuantModule):
    """LayerNorm over the last dimension: integer mean, variance and root; gain and offset in fixed point.

    Input and output are wide activations.

    Raises:
        ValueError: the layer normalizes over more dimensions than the last.
    """

    kind = "layer_norm"
    module: nn.LayerNorm
    gain_mantissa: Tensor | None
    gain_shift: Tensor | None
    offset: Tensor | None

    def __init__(self, module: nn.LayerNorm, config: QuantConfig):
        super().__init__(config)
        if len(module.normalized_shape) != 1:
            raise ValueError("only LayerNorm over the last dimension has an integer algorithm")
        self.module = module
        bits = config.carrier_bits
        # None in other codecs, and in files of versions that stored x with one scale
        self.stored: Quantizer | None = None
        if config.strict_int8:  # x is read from memory, where each channel has its scale
            self.stored = Quantizer(bits, config.frac_bits, -1, symmetry="asymmetric")
            self.stored.dead_share = DEAD_SHARE
            bits = max(bits, REGISTER_BITS)
        headroom = config.headroom if bits > 8 else 1.0
        self.grid_in = Quantizer(bits, config.frac_bits, headroom=headroom, symmetry="symmetric")
        self.grid_out = Quantizer(bits, config.frac_bits, -1, headroom=headroom, symmetry="symmetric")
        self.register_buffer("gain_mantissa", None)
        self.register_buffer("gain_shift", None)
        self.register_buffer("offset", None)

    def real(self, x: Tensor) -> Tensor:
        return self.module(x)

    def observe(self, inputs: tuple, output: Tensor) -> None:
        if self.stored is not None:
            self.stored.observe(inputs[0].real())
        self.grid_in.observe(inputs[0].real())
        self.grid_out.observe(output)

    def _affine(self) -> tuple[Tensor, Tensor, Tensor]:
        """(sign, multiplier, offset), (channels,): from units of 2^-12 to units of the output."""
        scale = self.grid_out.parameters_of_grid()[0]
        module = self.module
        gain = module.weight.double() if module.weight is not None else torch.ones_like(scale)
        offset = module.bias.double() if module.bias is not None else torch.zeros_like(scale)
        # a gain of zero has no multiplier: the smallest one rounds every value to zero
        multiplier = (gain.abs() * 2.0**-LAYER_NORM_FRAC_BITS / scale).clamp(min=2.0**-40)
        return torch.where(gain < 0, -1.0, 1.0), multiplier, offset / scale

    def integer(self, x: QTensor) -> QTensor:
        x = self.grid_in(x if self.stored is None else self.stored(x))
        eps = float(self.module.eps / x.unit.detach() ** 2)
        scale, qmin, qmax = self.grid_out.parameters_of_grid()
        if self.gain_mantissa is not None and self.gain_shift is not None and self.offset is not None:
            multiplier, offset = multiplier_value(self.gain_mantissa, self.gain_shift), self.offset
        else:
            sign, magnitude, offset = self._affine()
            multiplier, offset = sign * magnitude, round_ste(offset)
        q = layer_norm(x.q, eps, multiplier, offset, qmin, qmax, 2.0**-LAYER_NORM_FRAC_BITS)
        return x.like(q, scale.reshape([1] * (x.ndim - 1) + [-1]))

    def freeze(self) -> None:
        super().freeze()
        sign, multiplier, offset = self._affine()
        mantissa, self.gain_shift = quantize_multiplier(multiplier)
        self.gain_mantissa = mantissa * sign.long()
        self.offset = round_half_away(offset.detach())

    def thaw(self) -> None:
        super().thaw()
        self.gain_mantissa = self.gain_shift = self.offset = None
