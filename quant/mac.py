"""Multiply-accumulate layers: integer inputs, weights and biases, and the accumulator that they are summed
in."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from licq.quant.config import FLOAT_BITS, QuantConfig
from licq.quant.fixedpoint import int_range, requantize_ste, round_ste
from licq.quant.modules import QuantModule
from licq.quant.operations import MultiplyAccumulate
from licq.quant.primitives import multiply_accumulate
from licq.quant.qtensor import QTensor
from licq.quant.quantizer import NO_INTEGERS, Quantizer
from licq.quant.transforms import TRANSFORMS
from licq.quant.weights import WeightQuantizer
from licq.support.errors import InputError

LARGEST_BIAS = 2**30
LARGEST_ACCUMULATOR = 2**31 - 1
"""Of int32 kernels."""


class QuantMAC(QuantModule):
    """A layer that multiplies and accumulates: y = W x + b.

    The input is put on a grid with one scale per channel, s_x[k]; the weights take over its spread,
    w'[o, k] = w[o, k] * s_x[k] / s_ref, before they are quantized per output channel, so the accumulator of
    output o has the single scale s_ref * s_w[o] (design, section 3). The output stays in the accumulator.
    """

    channel_dim = 1
    only: str | None = None  # for measurements: "weights" or "inputs" are whole numbers, the rest is real

    def __init__(self, module: nn.Module, config: QuantConfig):
        super().__init__(config)
        self.module = module
        mask = getattr(module, "mask", None)
        self.weight_quantizer = WeightQuantizer(config, None if mask is None else self.canonical(mask))
        self.input_grid = Quantizer(
            self.input_bits,
            config.frac_bits,
            self.channel_dim if config.a_granularity == "channel" else None,
            config.a_range,
            config.a_headroom,
            symmetry=config.a_symmetry,
            scales=config.scales,
        )
        self.input_grid.droppable = self.input_power == 1
        self.input_grid.border_dim = self.channel_dim
        self.log_n_bias = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.bias_change = nn.Parameter(
            torch.zeros(self.outputs), requires_grad=False
        )  # a learned correction
        self.register_buffer("weight_int", None)
        self.register_buffer("bias_int", None)
        self.register_buffer("out_scale", None)
        self.register_buffer("bound", None)

    def set_bits(self, w_bits: int | None = None, a_bits: int | None = None) -> None:
        """Give this layer bits of its own, before it is observed; None: as they are."""
        config = self.config
        self.config = dataclasses.replace(
            config, w_bits=w_bits or config.w_bits, a_bits=a_bits or config.a_bits
        )
        self.weight_quantizer.bits, self.input_grid.bits = self.config.w_bits, self.input_bits

    # what a kind of layer says of itself --------------------------------------------------------------------

    groups = 1
    input_power = (
        1  # the inputs enter the sums to this power; the noise models of `quant.transforms` are of the first
    )

    @property
    def input_bits(self) -> int:
        """Of the input grid; layers that read latents have more, as shows when they are observed."""
        return self.config.a_bits

    @property
    def outputs(self) -> int:
        raise NotImplementedError

    def canonical(self, weight: Tensor) -> Tensor:
        """The layer's weight as (outputs, inputs / groups, ...)."""
        return weight

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """W x with the canonical weight."""
        raise NotImplementedError

    # --------------------------------------------------------------------------------------------------------

    def real(self, x: Tensor) -> Tensor:
        return self.module(x)

    def observe(self, inputs: tuple, output: Any) -> None:
        if inputs[0].latent:
            self.input_grid.bits = max(self.config.a_bits, self.config.latent_bits)
        self.input_grid.observe(inputs[0].real(), inputs[0].pixels, inputs[0].latent)

    def float_weight(self) -> Tensor:
        """The canonical float weight, masked where the layer has a mask."""
        weight = self.canonical(self.module.weight)
        mask = self.weight_quantizer.mask
        return weight if mask is None else weight * mask

    def per_input(self, values: Tensor, weight: Tensor) -> Tensor:
        """A vector over input channels, shaped to broadcast against the canonical weight (outputs,
        inputs/groups, ...)."""
        if values.ndim == 0:
            return values
        tail = [1] * (weight.ndim - 2)
        if self.groups == 1:
            return values.reshape(1, -1, *tail)
        rows = values.reshape(self.groups, -1).repeat_interleave(self.outputs // self.groups, 0)
        return rows.reshape(self.outputs, -1, *tail)

    def initialize(self) -> None:
        super().initialize()
        if self.config.w_bits == FLOAT_BITS:
            return
        scales = self.config.a_bits != FLOAT_BITS and self.input_grid.channel_dim is not None
        transform = TRANSFORMS.get(self.config.transform)
        if transform and scales and not self.input_grid.exact and self.input_power == 1:
            with torch.no_grad():
                self.input_grid.log_n.data = transform(self)
        self.start_weights()

    def start_border(self) -> None:
        """A border for each input channel, see `Grid.start_border`."""
        self.input_grid.start_border(self.float_weight().shape[1] * self.groups)

    def start_weights(self) -> None:
        """First range and rounding of the weights, for the input scales as they are now."""
        weight, reference = self.folded_weight()
        self.weight_quantizer.initialize(weight, self.least_scale(reference))

    def folded_weight(self) -> tuple[Tensor, Tensor]:
        """(w' float32, s_ref): the weights with the spread of the input scales folded in."""
        weight = self.float_weight()
        if self.config.a_bits == FLOAT_BITS:
            return weight, torch.ones((), dtype=torch.float64, device=weight.device)
        scale = self.input_grid.parameters_of_grid()[0]
        reference = scale.detach().max()
        return (weight * self.per_input(scale / reference, weight)).float(), reference

    def integer_weight(self) -> tuple[Tensor, Tensor]:
        """(w_int canonical, scale of the accumulator per output, float64)."""
        weight, reference = self.folded_weight()
        if self.config.w_bits == FLOAT_BITS:
            return weight, reference.expand(self.outputs)
        w_int, scale = self.weight_quantizer(weight, self.least_scale(reference))
        return w_int, (scale * reference / self.input_grid.refinement).expand(self.outputs)

    def float_bias(self) -> Tensor | None:
        """The float bias with its learned correction."""
        return None if self.module.bias is None else self.module.bias + self.bias_change

    @torch.no_grad()
    def least_scale(self, reference: Tensor) -> Tensor | None:
        """The smallest s_w, per output, for which the bias takes at most half of an int32 accumulator, and
        for which sums fit `accumulator_bits` however the weights are rounded to a neighbour."""
        bias, limit = self.float_bias(), 2.0 ** (self.config.accumulator_bits - 1)
        share = None if bias is None else bias.abs().double() / (reference / self.input_grid.refinement)
        if not self.config.accumulator_bits or self.config.a_bits == FLOAT_BITS:
            return None if share is None else share / LARGEST_BIAS
        weight = self.folded_weight()[0].double()
        largest = self.largest_inputs(weight)
        room = limit - 2 - self.largest_sum(largest.expand_as(weight))
        if float(room.min()) <= 0:
            raise InputError(
                f"{self.name}: sums of {self.input_grid.bits}-bit inputs cannot fit {self.config.accumulator_bits} bits; raise accumulator_bits"
            )
        least = self.largest_sum(weight.abs() * largest)
        return (least if share is None else least + share) / room

    def largest_inputs(self, weight: Tensor) -> Tensor:
        """The largest magnitude of each input, to its power, shaped to broadcast against the canonical
        weight."""
        return self.per_input(self.input_grid.largest().double() ** self.input_power, weight)

    def integer_bias(self, out_scale: Tensor) -> Tensor | None:
        """The bias in units of the accumulator: rounded to int32, or INT8 rescaled by eq. 19."""
        bias = self.float_bias()
        if bias is None:
            return None
        if self.config.bias_bits == 8:
            qmax = int_range(8)[1]
            largest = bias.detach().abs().amax().clamp(min=2**-12).double()
            scale = self.weight_quantizer.make_scale(
                torch.exp(self.log_n_bias.double()) * largest / qmax, self.config.frac_bits
            )
            b_int = round_ste((bias / scale).float()).clamp(-qmax, qmax)
            return requantize_ste(b_int.double(), scale / out_scale).clamp(-(2.0**31), 2.0**31 - 1)
        return round_ste(bias.double() / out_scale).clamp(-(2.0**31), 2.0**31 - 1)

    def rounded_weight(self) -> Tensor:
        """The canonical weight that the whole numbers stand for, without the spread of the input scales."""
        w_int, scale = self.integer_weight()
        if self.config.a_bits == FLOAT_BITS:
            return (WeightQuantizer._view(scale, w_int) * w_int).float()
        step = self.input_grid.parameters_of_grid()[0] / self.input_grid.refinement
        return (
            WeightQuantizer._view(scale, w_int) * w_int / self.per_input(step**self.input_power, w_int)
        ).float()

    def real_with(self, x: Tensor, weight: Tensor) -> Tensor:
        """The original computation with another weight (canonical)."""
        y = self.product(x, weight)
        if self.module.bias is None:
            return y
        shape = [1] * y.ndim
        shape[self.channel_dim % y.ndim] = -1
        return y + self.float_bias().reshape(shape)

    def one_side(self, x: QTensor) -> QTensor:
        """Only the weights, or only the inputs, in whole numbers: what each of them costs by itself."""
        if self.only == "weights":
            return x.like(self.real_with(x.real(), self.rounded_weight()), None)
        return x.like(self.real_with(self.input_grid(x).real(), self.float_weight()), None)

    def integer(self, x: QTensor) -> QTensor:
        if self.only is not None:
            return self.one_side(x)
        if self.runtime.tracer is not None and self.weight_int is None:
            raise InputError(f"{self.name} has {NO_INTEGERS}")
        x = self.input_grid(x)
        if self.config.w_bits == FLOAT_BITS or not x.is_integer:
            return self._weights_or_inputs_only(x)
        layer, out_scale = self.integer_layer()
        q = multiply_accumulate(x.q, layer, self.product, self.channel_dim)
        shape = [1] * q.ndim
        shape[self.channel_dim % q.ndim] = -1
        return x.like(q, out_scale.reshape(shape))

    def integer_layer(self) -> tuple[MultiplyAccumulate, Tensor]:
        """(the layer on integers, the scale of its accumulator per output): as frozen, or as it is learned
        now."""
        if self.weight_int is not None:
            return self.operation(self.weight_int, self.bias_int, int(self.bound)), self.out_scale
        w_int, out_scale = self.integer_weight()
        b_int = self.integer_bias(out_scale)
        with torch.no_grad():
            bound = int(self.accumulator_bound(w_int, b_int))
        return self.operation(w_int, b_int, bound), out_scale

    def operation(self, weight: Tensor, bias: Tensor | None, bound: int) -> MultiplyAccumulate:
        """The operation of this kind of layer, with integer weights (canonical) and biases."""
        raise NotImplementedError

    def _weights_or_inputs_only(self, x: QTensor) -> QTensor:
        """Ablations with 32 bits on one side: real arithmetic on quantized values."""
        if x.is_integer:
            weight, scale = self.float_weight(), None
        else:
            weight, scale = self.float_weight(), None
            if self.config.w_bits != FLOAT_BITS:
                w_int, scale = self.weight_quantizer(weight)
                weight = (w_int * WeightQuantizer._view(scale, w_int)).float()
        return x.like(self.real_with(x.real(), weight), None)

    def freeze(self) -> None:
        super().freeze()
        if self.weight_quantizer.rounding is not None:
            self.weight_quantizer.rounding.harden()  # soft steps are no whole numbers
        if FLOAT_BITS in (self.config.w_bits, self.config.a_bits):
            return
        with torch.no_grad():
            w_int, out_scale = self.integer_weight()
            b_int = self.integer_bias(out_scale)
            self.weight_int = w_int.to(torch.int8 if self.config.w_bits <= 8 else torch.int16)
            self.bias_int, self.out_scale = b_int, out_scale.contiguous()
            self.bound = self.accumulator_bound(w_int, b_int)

    def thaw(self) -> None:
        super().thaw()
        self.weight_int = self.bias_int = self.out_scale = self.bound = None

    def accumulator_bound(self, w_int: Tensor, b_int: Tensor | None) -> Tensor:
        """max over outputs of sum |w_int| * max |x_int| + |b_int|: no partial sum can exceed it (design,
        section 4).

        Of numbers without their zero point. A kernel that adds stored ones and the digits of split channels
        first, and takes off the zero points at the end, needs sums modulo 2^32, which int32 is.
        """
        total = self.largest_sum(w_int.double().abs() * self.largest_inputs(w_int))
        return (total if b_int is None else total + b_int.abs()).max()

    def bound_now(self) -> Tensor:
        """The bound of a layer that still learns."""
        w_int, out_scale = self.integer_weight()
        return self.accumulator_bound(w_int, self.integer_bias(out_scale))

    def largest_sum(self, products: Tensor) -> Tensor:
        """(outputs,): the most that an output position can sum up, from the largest product of each
        (canonical) weight."""
        return products.flatten(1).sum(1)

    def learnable(self) -> dict[str, list[nn.Parameter]]:
        knobs: dict[str, list[nn.Parameter]] = {}
        if self.config.w_bits != FLOAT_BITS:
            knobs["range_w"] = [self.weight_quantizer.log_n]
            knobs["rounding"] = list(self.weight_quantizer.rounding.parameters())
        if self.config.a_bits != FLOAT_BITS and not self.input_grid.exact:
            knobs["range_a"] = [self.input_grid.log_n]
            knobs["border"] = [] if self.input_grid.border is None else [self.input_grid.border]
        if self.module.bias is not None:
            knobs["bias"] = [self.bias_change]
            if self.config.bias_bits == 8:
                knobs["range_b"] = [self.log_n_bias]
        return knobs
