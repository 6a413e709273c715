"""Quantized layers: the base class `QuantModule` and the multiply-accumulate layers."""

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from licq.quant import operations as ops
from licq.quant.config import FLOAT_BITS, QuantConfig
from licq.quant.fixedpoint import int_range, power_of_two_scale, requantize_ste, round_ste
from licq.quant.grid import NO_INTEGERS, SCALES, Grid
from licq.quant.operations import MultiplyAccumulate
from licq.quant.primitives import multiply_accumulate
from licq.quant.qtensor import QTensor
from licq.quant.ranges import RangeSpec
from licq.quant.rounding import Rounding, make_rounding
from licq.quant.runtime import Runtime
from licq.quant.transforms import TRANSFORMS, range_groups
from licq.support.errors import InputError

EXACT_FLOAT32 = 2**24  # whole numbers below this are exact in float32, so is any order of summing them


LARGEST_BIAS = 2**30
LARGEST_ACCUMULATOR = 2**31 - 1  # of int32 kernels


class QuantModule(nn.Module):
    """A node of a quantized codec: a layer or a function, in one of three states.

    Float (`quantized` is False): the original computation on real values. Observing: the same, and the grids
    watch.
    Quantized: `integer` on whole numbers. Subclasses implement `real`, `observe` and `integer`.
    """

    kind = ""
    gives_latents = False  # its (first) output is y_hat or z_hat
    gives_levels = False  # its output is on levels that are no multiples of a step

    def __init__(self, config: QuantConfig):
        super().__init__()
        self.config = config
        self.quantized = False
        self.name = ""
        self.runtime: Runtime | None = None
        self.calls = 0  # in one forward of the codec

    def bind(self, runtime: Runtime, name: str) -> None:
        # not through nn.Module's __setattr__: the runtime holds modules and must not become a submodule
        object.__setattr__(self, "runtime", runtime)
        self.name = name

    def __getattr__(self, name: str) -> Any:
        # the codec's forward may ask the layer that stood here for its attributes
        try:
            return super().__getattr__(name)
        except AttributeError:
            wrapped = self.__dict__.get("_modules", {}).get("module")
            if wrapped is None:
                raise
            return getattr(wrapped, name)

    def forward(self, *inputs, **kwargs):
        return self.runtime.execute(self, inputs, lambda: self._run(inputs, kwargs))

    def _run(self, inputs: tuple, kwargs: dict):
        runtime = self.runtime
        inputs = tuple(
            QTensor(x, None, runtime) if isinstance(x, Tensor) and self.wraps(i) else x
            for i, x in enumerate(inputs)
        )
        if runtime.tracer is not None:
            runtime.tracer.node = self.name
            if not self.quantized:
                raise InputError(
                    f"{self.name} is kept in float, so the model cannot be lowered; quantize it with all nodes"
                )
        if self.quantized:
            return self.integer(*inputs, **kwargs)
        output = self.real(*(x.real() if isinstance(x, QTensor) else x for x in inputs), **kwargs)
        if runtime.observing:
            runtime.nodes.setdefault(self.name, self)
            self.calls += 1
            self.observe(inputs, output)
        output = runtime.wrap(output)
        if self.gives_latents:
            (output[0] if isinstance(output, tuple) else output).latent = True
        elif self.gives_levels:
            output.levels = True
        return output

    def wraps(self, index: int) -> bool:
        """Whether a plain tensor as input number `index` is data (True) or a constant (False)."""
        return index == 0

    def real(self, *inputs: Tensor, **kwargs) -> Any:
        """The original computation."""
        raise NotImplementedError

    def observe(self, inputs: tuple, output: Any) -> None:
        """Let the grids watch one forward."""

    def integer(self, *inputs: QTensor, **kwargs) -> Any:
        """The same on whole numbers."""
        raise NotImplementedError

    def initialize(self) -> None:
        """Static ranges from what was observed."""
        for grid in self.grids():
            grid.initialize()

    def grids(self) -> list[Grid]:
        return [module for module in self.children() if isinstance(module, Grid)]

    def freeze(self) -> None:
        """Make everything final: `integer` then uses stored whole numbers and stored scales only."""
        for grid in self.grids():
            grid.freeze()

    def thaw(self) -> None:
        for grid in self.grids():
            grid.thaw()

    def learnable(self) -> dict[str, list[nn.Parameter]]:
        """What reconstruction may learn here, by knob: range_w, range_b, range_a, rounding, border, bias."""
        return {}


class WeightQuantizer(nn.Module):
    """Whole-number weights and their scale, eqs. 3, 4, 14, 15; the first dimension is the output channel."""

    def __init__(self, config: QuantConfig, mask: Tensor | None):
        super().__init__()
        self.bits, self.frac_bits = config.w_bits, config.frac_bits
        self.make_scale = SCALES[config.scales]
        self.per_channel = config.w_granularity != "tensor"
        self.group_count = (
            int(config.w_granularity.removeprefix("groups"))
            if config.w_granularity.startswith("groups")
            else 0
        )
        self.spec = RangeSpec.parse(config.w_range)
        self.rounding_name = config.rounding
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("group", None)  # of each output channel, where they share scales
        self.log_n = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.rounding: Rounding | None = None

    def initialize(self, w: Tensor, least: Tensor | None = None) -> None:
        """Ranges and the rounding scheme for the (folded) weights w: (outputs, inputs, ...); `least` as in
        `scale`."""
        w = w.detach()
        estimate = self.spec.estimate(w, 0 if self.per_channel else None, self.bits, True).to(w)
        self.group = range_groups(estimate, self.group_count) if self.group_count else None
        ratio = self._of_groups(estimate) / self._of_groups(self._largest(w))
        self.log_n = nn.Parameter(torch.log(ratio.clamp(1e-3, 1.0)), requires_grad=False)
        if self.make_scale is power_of_two_scale and self.spec.method != "max":
            self._choose_power(w, least)
        self.set_rounding(self.rounding_name, w, least)

    def _choose_power(self, w: Tensor, least: Tensor | None) -> None:
        """Of the two powers of two about the estimate, the one with the smaller squared error."""
        qmax, upper = int_range(self.bits)[1], self.log_n.data
        errors = []
        for log_n in (upper, upper - math.log(2)):
            self.log_n.data = log_n
            scale = self._view(self.scale(w, least), w)
            error = ((w / scale).round().clamp(-qmax, qmax) * scale - w).square().flatten(1).sum(1)
            if self.group is not None:
                error = error.new_zeros(len(upper)).index_add_(0, self.group, error)
            errors.append(error if upper.ndim else error.sum())
        self.log_n.data = torch.where(errors[1] < errors[0], upper - math.log(2), upper)

    def set_rounding(self, name: str, w: Tensor, least: Tensor | None = None) -> None:
        """Start a rounding scheme at the weights w."""
        self.rounding_name = name
        self.rounding = make_rounding(name, self.in_steps(w, least), self.mask)
        self.rounding.requires_grad_(False)

    @torch.no_grad()
    def in_steps(self, w: Tensor, least: Tensor | None = None) -> Tensor:
        """w / s_w, float32."""
        return (w / self._view(self.scale(w, least), w)).float()

    def _largest(self, w: Tensor) -> Tensor:
        largest = w.abs().flatten(1).amax(1) if self.per_channel else w.abs().amax()
        # an output channel without weights keeps a scale of the others' order, so that its bias does not
        # overflow
        return largest.clamp(min=float(largest.detach().max().clamp(min=1e-12)) * 2**-12)

    def _of_groups(self, values: Tensor) -> Tensor:
        """The largest value of each group of output channels; without groups as it is."""
        if self.group is None:
            return values
        return values.new_zeros(int(self.group.max()) + 1).scatter_reduce(
            0, self.group, values, "amax", include_self=False
        )

    def scale(self, w: Tensor, least: Tensor | None = None) -> Tensor:
        """s_w: (outputs,) or (), float64, eqs. 3 and 15; not below `least`, which keeps sums inside their
        accumulator."""
        qmax = int_range(self.bits)[1]
        scale = torch.exp(self.log_n.double()) * self._of_groups(self._largest(w).double()) / qmax
        if least is not None:
            least = (
                torch.ceil(least * 2.0**self.frac_bits) * 2.0**-self.frac_bits
            )  # rounded to the nearest it could end below itself
            scale = torch.maximum(scale, self._of_groups(least) if scale.ndim else least.max())
        scale = self.make_scale(scale, self.frac_bits)
        return scale if self.group is None else scale[self.group]

    @staticmethod
    def _view(scale: Tensor, w: Tensor) -> Tensor:
        return scale.reshape(-1, *[1] * (w.ndim - 1)) if scale.ndim else scale

    def forward(self, w: Tensor, least: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(w_int of w's shape, s_w)."""
        scale = self.scale(w, least)
        qmin, qmax = int_range(self.bits)
        w_int = self.rounding((w / self._view(scale, w)).float())
        return w_int.clamp(qmin, qmax), scale


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
        self.input_grid = Grid(
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


class QuantConv2d(QuantMAC):
    """Conv2d, also with a mask (MaskedConv2d, MultistageMaskedConv2d) and with groups."""

    kind = "conv"
    convolve = staticmethod(F.conv2d)
    on_integers = ops.Conv2d

    @property
    def groups(self) -> int:
        return self.module.groups

    @property
    def outputs(self) -> int:
        return self.module.out_channels

    def real(self, x: Tensor) -> Tensor:
        # the mask is applied to the weight, not written into the parameter as CompressAI's layer does
        m = self.module
        return self.convolve(x, self.float_weight(), m.bias, m.stride, m.padding, m.dilation, m.groups)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        m = self.module
        return self.convolve(x, weight, None, m.stride, m.padding, m.dilation, m.groups)

    def operation(self, weight: Tensor, bias: Tensor | None, bound: int) -> MultiplyAccumulate:
        m = self.module
        return self.on_integers(
            weight=weight,
            bias=bias,
            bound=bound,
            stride=m.stride,
            padding=m.padding,
            dilation=m.dilation,
            groups=m.groups,
        )


class QuantConv3d(QuantConv2d):
    """Conv3d, also with a mask (MaskedConv3d)."""

    kind = "conv3d"
    convolve = staticmethod(F.conv3d)
    on_integers = ops.Conv3d


class QuantConvTranspose2d(QuantMAC):
    """ConvTranspose2d; its weight is (inputs, outputs / groups, kh, kw)."""

    kind = "deconv"

    @property
    def groups(self) -> int:
        return self.module.groups

    @property
    def outputs(self) -> int:
        return self.module.out_channels

    def canonical(self, weight: Tensor) -> Tensor:
        inputs, per_group, *kernel = weight.shape
        grouped = weight.reshape(self.module.groups, inputs // self.module.groups, per_group, *kernel)
        return grouped.transpose(1, 2).reshape(-1, inputs // self.module.groups, *kernel)

    def _original(self, weight: Tensor) -> Tensor:
        outputs, per_group, *kernel = weight.shape
        grouped = weight.reshape(self.module.groups, outputs // self.module.groups, per_group, *kernel)
        return grouped.transpose(1, 2).reshape(-1, outputs // self.module.groups, *kernel)

    def largest_sum(self, products: Tensor) -> Tensor:
        """Taps meet at an output position only where they are of one residue of the stride, on both axes."""
        sums = products.sum(1)
        for axis, (size, stride, dilation) in enumerate(
            zip(self.module.kernel_size, self.module.stride, self.module.dilation), 1
        ):
            residues = (torch.arange(size, device=sums.device) * dilation) % stride
            shape = [*sums.shape[:axis], stride, *sums.shape[axis + 1 :]]
            sums = sums.new_zeros(shape).index_add_(axis, residues, sums)
        return sums.flatten(1).amax(1)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        m = self.module
        return F.conv_transpose2d(
            x, self._original(weight), None, m.stride, m.padding, m.output_padding, m.groups, m.dilation
        )

    def operation(self, weight: Tensor, bias: Tensor | None, bound: int) -> MultiplyAccumulate:
        m = self.module
        return ops.ConvTranspose2d(
            weight=weight,
            bias=bias,
            bound=bound,
            stride=m.stride,
            padding=m.padding,
            dilation=m.dilation,
            groups=m.groups,
            output_padding=m.output_padding,
        )


class QuantLinear(QuantMAC):
    """Linear on the last dimension."""

    kind = "linear"
    channel_dim = -1

    @property
    def outputs(self) -> int:
        return self.module.out_features

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def operation(self, weight: Tensor, bias: Tensor | None, bound: int) -> MultiplyAccumulate:
        return ops.Linear(weight=weight, bias=bias, bound=bound)


PLAIN_LAYERS = (
    QuantConv2d,
    QuantConvTranspose2d,
    QuantLinear,
)  # those with weights of their own; not the products of attention
