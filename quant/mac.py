"""Multiply-accumulate layers: integer inputs, weights and biases, and their accumulator."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from licq.quant import fused_layers, unchanged
from licq.quant.config import FLOAT_BITS, QuantConfig
from licq.quant.fixedpoint import int_range, requantize_ste, round_half_away, round_ste
from licq.quant.modules import QuantModule
from licq.quant.operations import MultiplyAccumulate
from licq.quant.qtensor import QTensor
from licq.quant.quantizer import NO_INTEGERS, Quantizer
from licq.quant.sums import multiply_accumulate
from licq.quant.transforms import TRANSFORMS
from licq.quant.weights import WeightQuantizer, per_output
from licq.quant.wide_products import exact_sums
from licq.support.errors import InputError

LARGEST_BIAS = 2**30
"""Of a bias in units of the accumulator, which leaves the other half to the products."""


class _BiasSTE(torch.autograd.Function):
    """round(bias / scale) as an int32, float64; the gradient of bias / scale, 0 where it is clipped."""

    @staticmethod
    def forward(ctx, bias, scale):
        ratio = bias.double() / scale
        rounded = round_half_away(ratio)
        ctx.save_for_backward(ratio, scale)
        ctx.bias_shape, ctx.dtype = bias.shape, bias.dtype
        return rounded.clamp_(-(2.0**31), 2.0**31 - 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        ratio, scale = ctx.saved_tensors
        grad = torch.where(ratio.abs() < 2.0**31, grad / scale, 0.0)
        grad_scale = (-grad * ratio).sum_to_size(scale.shape) if ctx.needs_input_grad[1] else None
        return grad.sum_to_size(ctx.bias_shape).to(ctx.dtype), grad_scale


class QuantMAC(QuantModule):
    """A layer that multiplies and accumulates: y = W x + b.

    The input is quantized with one scale per channel, s_x[k]. The weights take over the spread of the scales,
    w'[o, k] = w[o, k] * s_x[k] / s_ref, before they are quantized per output channel. So the accumulator of
    output o has the single scale s_ref * s_w[o] (design, section 3). The output stays in the accumulator.
    """

    simulates = True
    sums = True

    channel_dim: int = 1
    """Of input and output."""

    only: str | None = None
    """For measurements: "weights" or "inputs" alone are integers; None: both."""

    module: Any
    """The layer that stood here; subclasses state its type."""

    weight_int: Tensor | None  # these four: None until frozen
    bias_int: Tensor | None
    out_scale: Tensor | None
    bound: Tensor | None

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
            scales=config.input_scales,
        )
        self.input_grid.allows_act_drop = self.input_power == 1
        self.input_grid.widens = True
        self.input_grid.border_dim = self.channel_dim
        self.log_n_bias = nn.Parameter(torch.zeros(()), requires_grad=False)
        # a learned correction of the bias
        self.bias_change = nn.Parameter(torch.zeros(self.outputs), requires_grad=False)
        # the last input scale, its dimension, the module's parameters, and what `folded_weight` was with them
        self._known: tuple[Tensor, int | None, list[tuple], tuple[Tensor, Tensor]] | None = None
        self.register_buffer("weight_int", None)
        self.register_buffer("bias_int", None)
        self.register_buffer("out_scale", None)
        self.register_buffer("bound", None)

    def set_bits(self, w_bits: int | None = None, a_bits: int | None = None) -> None:
        """Give this layer other bits than the model's, before it is observed. None: as in its `config`."""
        config = self.config
        self.config = dataclasses.replace(
            config, w_bits=w_bits or config.w_bits, a_bits=a_bits or config.a_bits
        )
        self.weight_quantizer.bits, self.input_grid.bits = self.config.w_bits, self.input_bits

    # ------------------------------------------------------------------------- what a kind of layer overrides

    @property
    def groups(self) -> int:
        """Of a grouped convolution."""
        return 1

    @property
    def input_power(self) -> int:
        """The power of the inputs in the sums. The noise models of `quant.transforms` hold for 1."""
        return 1

    @property
    def input_bits(self) -> int:
        """Of the input quantizer. `observe` raises them where the layer reads latents."""
        return self.config.a_bits

    @property
    def outputs(self) -> int:
        """The number of output channels."""
        raise NotImplementedError

    def canonical(self, weight: Tensor) -> Tensor:
        """The layer's weight as (outputs, inputs / groups, ...)."""
        return weight

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """W x with the canonical weight."""
        raise NotImplementedError

    product_with_bias: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    """`product` plus a bias, where one function of PyTorch does both."""

    product_gradient: Callable[[Tensor, Tensor, Tensor, tuple[bool, bool]], tuple] | None = None
    """(gradient of `product`, x, weight, which are needed) -> gradients of x and of the weight.

    None where `window` gives None.
    """

    def operation(self, weight: Tensor, bias: Tensor | None, bound: int) -> MultiplyAccumulate:
        """The operation of this kind of layer, with integer weights (canonical) and biases."""
        raise NotImplementedError

    # ----------------------------------------------------------------------------------- weights and biases

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

    def start_rounding_border(self) -> None:
        """Let the rounding border of each input channel be learned; see `Quantizer`."""
        self.input_grid.start_rounding_border(self.float_weight().shape[1] * self.groups)

    def start_weights(self) -> None:
        """Set the first range and rounding of the weights, for the current input scales."""
        weight, reference = self.folded_weight()
        self.weight_quantizer.initialize(weight, self.min_scale(reference))

    def folded_weight(self) -> tuple[Tensor, Tensor]:
        """(w', s_ref): the weights times the spread of the input scales, float32, and the largest scale."""
        if self.config.a_bits == FLOAT_BITS or self.config.is_simulated:
            weight = self.float_weight()
            return weight, torch.ones((), dtype=torch.float64, device=weight.device)
        scale = self.input_grid.parameters_of_grid()[0]
        return self.folded_once(scale, lambda: self._folded(scale))

    def _folded(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        weight, reference = self.float_weight(), scale.detach().max()
        return (weight * self.per_input(scale / reference, weight)).float(), reference

    def folded_once(self, scale: Tensor, fold: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """What `fold` gave last, where nothing that it reads has changed since.

        A grid gives the same scale again, not an equal one, as long as its range stays.
        """
        parameters = list(self.module.parameters())
        if any(t.is_inference() for t in parameters) or (
            torch.is_grad_enabled() and any(t.requires_grad for t in (scale, *parameters))
        ):
            return fold()
        versions = [(t, t._version, t.data_ptr()) for t in parameters]
        known = self._known
        if known is None or known[0] is not scale or known[1] != self.input_grid.channel_dim:
            known = None
        elif any(a is not b or now != then for (a, *now), (b, *then) in zip(versions, known[2])):
            known = None
        if known is None:
            self._known = known = scale, self.input_grid.channel_dim, versions, fold()
        return known[3]

    def integer_weight(self) -> tuple[Tensor, Tensor]:
        """(w_int, scales of the accumulator): canonical weights, and (outputs,) float64."""
        weight, reference = self.folded_weight()
        if self.config.w_bits == FLOAT_BITS:
            return weight, reference.expand(self.outputs)
        w_int, scale = self.weight_quantizer(weight, self.min_scale(reference))
        return w_int, (scale * reference / self.input_grid.refinement).expand(self.outputs)

    def float_bias(self) -> Tensor | None:
        """The float bias with its learned correction: (outputs,)."""
        return None if self.module.bias is None else self.module.bias + self.bias_change

    @torch.no_grad()
    def min_scale(self, reference: Tensor) -> Tensor | None:
        """The smallest s_w, (outputs,), with which sums fit their accumulator; None: any s_w does.

        The bias takes at most half of an int32 accumulator. Sums fit `QuantConfig.accumulator_bits` whichever
        neighbour each weight is rounded to.

        Raises:
            InputError: the accumulator is too narrow for every s_w.
        """
        if self.config.is_simulated:
            return None
        bias, limit = self.float_bias(), 2.0 ** (self.config.accumulator_bits - 1)
        share = None if bias is None else bias.abs().double() / (reference / self.input_grid.refinement)
        if not self.config.accumulator_bits or self.config.a_bits == FLOAT_BITS:
            return None if share is None else share / LARGEST_BIAS
        weight = self.folded_weight()[0].double()
        largest = self.largest_inputs(weight)
        room = limit - 2 - self.largest_sum(largest.expand_as(weight))
        if float(room.min()) <= 0:
            raise InputError(
                f"{self.name}: sums of {self.input_grid.bits}-bit inputs cannot fit "
                f"{self.config.accumulator_bits} bits; raise `accumulator_bits`"
            )
        products = self.largest_sum(weight.abs() * largest)
        return (products if share is None else products + share) / room

    def largest_inputs(self, weight: Tensor) -> Tensor:
        """The largest magnitude of each input, to its power, shaped to broadcast against the canonical
        weight."""
        return self.per_input(self.input_grid.largest().double() ** self.input_power, weight)

    def integer_bias(self, out_scale: Tensor) -> Tensor | None:
        """The bias in units of the accumulator: rounded to int32, or 8 bits rescaled by eq. 19."""
        bias = self.float_bias()
        if bias is None:
            return None
        if self.config.bias_bits != 8:
            return _BiasSTE.apply(bias, out_scale)
        b_int, scale = self._bias_of_8_bits(bias)
        return requantize_ste(b_int.double(), scale / out_scale).clamp(-(2.0**31), 2.0**31 - 1)

    def _bias_of_8_bits(self, bias: Tensor) -> tuple[Tensor, Tensor]:
        """(integers, their scale), eq. 17."""
        qmax = int_range(8)[1]
        largest = bias.detach().abs().amax().clamp(min=2**-12).double()
        scale = self.weight_quantizer.make_scale(
            torch.exp(self.log_n_bias.double()) * largest / qmax, self.config.frac_bits
        )
        return round_ste((bias / scale).float()).clamp(-qmax, qmax), scale

    def rounded_weight(self) -> Tensor:
        """The canonical weight that w_int represents, without the spread of the input scales; float32."""
        w_int, scale = self.integer_weight()
        if self.config.a_bits == FLOAT_BITS or self.config.is_simulated:
            return (per_output(scale, w_int) * w_int).float()
        step = self.input_grid.parameters_of_grid()[0] / self.input_grid.refinement
        return (per_output(scale, w_int) * w_int / self.per_input(step**self.input_power, w_int)).float()

    def real_with(self, x: Tensor, weight: Tensor) -> Tensor:
        """The original computation with another weight (canonical)."""
        y, bias = self.product(x, weight), self.float_bias()
        return y if bias is None else y + bias.reshape(self._channel_shape(y.ndim))

    def _channel_shape(self, ndim: int) -> list[int]:
        """The shape with which a vector over output channels broadcasts against an output."""
        shape = [1] * ndim
        shape[self.channel_dim % ndim] = -1
        return shape

    # ------------------------------------------------------------------------------------------- computation

    def one_side(self, x: QTensor) -> QTensor:
        """Quantize the weights alone or the inputs alone, as `only` says, to measure what each costs."""
        if self.only == "weights":
            return x.like(self.real_with(x.real(), self.rounded_weight()), None)
        return x.like(self.real_with(self.input_grid(x).real(), self.float_weight()), None)

    def integer(self, x: QTensor) -> QTensor:
        if self.only is not None:
            return self.one_side(x)
        if self.runtime.tracer is not None and self.weight_int is None:
            raise InputError(f"{self.name} has {NO_INTEGERS}")
        x = self.input_grid(x)
        if self.config.is_simulated:
            return self._simulated(x)
        if self.config.w_bits == FLOAT_BITS or not x.is_integer:
            return self._weights_or_inputs_only(x)
        layer, out_scale = self.integer_layer()
        q = multiply_accumulate(
            x.q,
            layer,
            self.product,
            self.channel_dim,
            with_bias=self.product_with_bias,
            exact_sums=partial(exact_sums, self),
        )
        return x.like(q, out_scale.reshape(self._channel_shape(q.ndim)))

    def integer_layer(self) -> tuple[MultiplyAccumulate, Tensor]:
        """(the layer on integers, the scales of its accumulator (outputs,)): frozen, or in the present state
        of learning."""
        if self.weight_int is not None and self.out_scale is not None and self.bound is not None:
            return self.operation(self.weight_int, self.bias_int, int(self.bound)), self.out_scale
        return unchanged.once(self, self._integer_layer, *self._read())

    def _read(self) -> list[Tensor]:
        """What the integers of the layer depend on."""
        parameters = [*self.module.parameters(), *self.weight_quantizer.parameters()]
        return [*parameters, self.input_grid.log_n, self.bias_change, self.log_n_bias]

    def _integer_layer(self) -> tuple[MultiplyAccumulate, Tensor]:
        w_int, out_scale = self.integer_weight()
        b_int = self.integer_bias(out_scale)
        return self.operation(w_int, b_int, self.rough_bound(w_int, b_int)), out_scale

    def _weights_or_inputs_only(self, x: QTensor) -> QTensor:
        """The computation with 32 bits on one side: real arithmetic on quantized values."""
        weight = self.float_weight()
        if not x.is_integer and self.config.w_bits != FLOAT_BITS:
            w_int, scale = self.weight_quantizer(weight)
            weight = (w_int * per_output(scale, w_int)).float()
        return x.like(self.real_with(x.real(), weight), None)

    def _simulated(self, x: QTensor) -> QTensor:
        """Float arithmetic on rounded inputs, weights and biases."""
        weight, bias = unchanged.once((self, "simulated"), self._simulated_layer, *self._read())
        y = self.product(x.real(), weight)
        return x.like(y if bias is None else y + bias.reshape(self._channel_shape(y.ndim)), None)

    def _simulated_layer(self) -> tuple[Tensor, Tensor | None]:
        """The real numbers that the rounded weights (canonical) and biases stand for."""
        floats = self.config.w_bits == FLOAT_BITS
        weight, bias = self.float_weight() if floats else self.rounded_weight(), self.float_bias()
        if bias is not None and self.config.bias_bits == 8:
            b_int, scale = self._bias_of_8_bits(bias)
            bias = (b_int * scale).float()
        return weight, bias

    def weighted_numbers(self, x: QTensor) -> Tensor:
        """What the weights are multiplied with: the integers of the layer's input quantizer, or with
        simulated scales the numbers that these stand for."""
        quantized = self.input_grid(x)
        return quantized.real() if self.config.is_simulated else quantized.q

    def freeze(self) -> None:
        super().freeze()
        if self.weight_quantizer.rounding is not None:
            self.weight_quantizer.rounding.harden()  # AdaRound's soft steps are no integers
        if FLOAT_BITS in (self.config.w_bits, self.config.a_bits) or self.config.is_simulated:
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
        """max over outputs of sum |w_int| * max |x_int| + |b_int|, which no partial sum can exceed (design,
        section 4).

        The bound is of integers without their zero point. A kernel may add integers with zero points, and the
        digits of split channels, and subtract the zero points at the end. Its sums wrap around in int32, and
        the result is right all the same, since int32 counts modulo 2^32.
        """
        total = self.largest_sum(w_int.double().abs() * self.largest_inputs(w_int))
        return (total if b_int is None else total + b_int.abs()).max()

    @torch.no_grad()
    def rough_bound(self, w_int: Tensor, b_int: Tensor | None) -> int:
        """A number that `accumulator_bound` does not exceed, in float32 and so much faster."""
        if self.groups > 1:
            return int(self.accumulator_bound(w_int, b_int))
        largest = unchanged.once(
            (self, "largest"),
            lambda: (self.input_grid.largest().double() ** self.input_power).float(),
            self.input_grid.log_n,
        )
        if type(self).largest_sum is QuantMAC.largest_sum:
            bound = fused_layers.largest_sum(w_int, largest, b_int)
            if bound is not None:
                return int(bound * (1 + 2.0**-10)) + 1
        weight = w_int.abs().float()
        rows = weight.flatten(2) if weight.ndim > 2 else weight.T
        sums = torch.matmul(largest.expand(weight.shape[1]), rows)
        total = self.largest_sum(sums.reshape(len(weight), 1, *weight.shape[2:]))
        total = (total if b_int is None else total + b_int.abs()).max()
        return int(float(total) * (1 + 2.0**-10)) + 1

    def window(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """(sides of the window of inputs that meet at an output, steps between them); None: unknown."""
        return None

    def learned_bound(self) -> Tensor:
        """The `accumulator_bound` of a layer in the present state of learning."""
        w_int, out_scale = self.integer_weight()
        return self.accumulator_bound(w_int, self.integer_bias(out_scale))

    def largest_sum(self, products: Tensor) -> Tensor:
        """(outputs,): the largest sum at an output position.

        Args:
            products: the largest product of each weight, in the canonical shape.
        """
        return products.flatten(1).sum(1)

    def learnable(self) -> dict[str, list[nn.Parameter]]:
        knobs: dict[str, list[nn.Parameter]] = {}
        if self.config.w_bits != FLOAT_BITS:
            knobs["range_w"] = [self.weight_quantizer.log_n]
            knobs["rounding"] = self.weight_quantizer.rounding_parameters()
        if self.config.a_bits != FLOAT_BITS and not self.input_grid.exact:
            knobs["range_a"] = [self.input_grid.log_n]
            knobs["border"] = [] if self.input_grid.border is None else [self.input_grid.border]
        if self.module.bias is not None:
            knobs["bias"] = [self.bias_change]
            if self.config.bias_bits == 8:
                knobs["range_b"] = [self.log_n_bias]
        return knobs
