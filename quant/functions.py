"""Nodes of functions without weights: attention's matrix products, softmax, tables. Sums and gates are in
`quant.operands`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from licq.models.attention import MaskedSoftmax
from licq.quant import unchanged
from licq.quant.config import FLOAT_BITS, QuantConfig
from licq.quant.fixedpoint import round_half_away
from licq.quant.integer_functions import (
    LEVEL_UNIT,
    SOFTMAX_STEP,
    SOFTMAX_UNIT,
    level_table,
    softmax_table,
)
from licq.quant.modules import QuantModule, replaces
from licq.quant.primitives import leaky, table
from licq.quant.qtensor import QTensor
from licq.quant.quantizer import Quantizer
from licq.quant.storage import REGISTER_BITS
from licq.quant.sums import matmul, softmax
from licq.support.errors import InputError

FUNCTIONS: dict[str, type["QuantFunction"]] = {}
"""The nodes of functions by kind; any other kind is a table."""


def make_function(kind: str, options: dict[str, Any], config: QuantConfig) -> "QuantFunction":
    """The node of a function; `options` are its arguments that are not tensors (JSON)."""
    if kind in FUNCTIONS:
        return FUNCTIONS[kind](config, **options)
    return QuantTable(config, kind, **options)


class QuantFunction(QuantModule):
    """A function at one point of the forward. `make_function` finds a subclass by its `kind`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("kind"):
            FUNCTIONS[cls.kind] = cls

    def __init__(self, config: QuantConfig, **options: Any):
        super().__init__(config)
        self.options = options

    def wide_quantizer(self, is_stored: bool = False) -> Quantizer:
        """The quantizer of a wide activation: one scale for the tensor, `QuantConfig.carrier_bits`,
        headroom.

        Under `strict_int8` it has `REGISTER_BITS`, unless the tensor is stored.
        """
        bits = self.config.carrier_bits
        if self.config.strict_int8 and not is_stored:
            bits = max(bits, REGISTER_BITS)
        # eight bits have no room to spare
        headroom = self.config.headroom if bits > 8 else 1.0
        return Quantizer(
            bits, self.config.frac_bits, headroom=headroom, symmetry="one_sided" if bits <= 8 else "symmetric"
        )


class QuantWide(QuantFunction):
    """A wide activation with one scale, before a function that mixes the channels of a tensor. It is stored.

    "carrier" is its name in files, whose functions are called `carrier0` ..., and in
    `QuantConfig.carrier_bits`. These names are stored or public and stay.
    """

    kind = "carrier"

    def __init__(self, config: QuantConfig):
        super().__init__(config)
        self.grid = self.wide_quantizer(is_stored=True)

    def real(self, x: Tensor) -> Tensor:
        return x

    def observe(self, inputs: tuple, output: Any) -> None:
        self.grid.observe(output)

    def integer(self, x: QTensor) -> QTensor:
        return self.grid(x)


class QuantMatMul(QuantFunction):
    """One of attention's two matrix products, with both operands in `QuantConfig.a_bits`.

    Operands have one scale per head. Dimension -3 of four or more is taken for the heads, unless its size
    varies in calibration; then there is one scale for the tensor.

    Args:
        heads: whether there are scales per head.
        depth: the largest number of terms of a sum that was observed.
    """

    kind = "matmul"
    simulates = True
    sums = True

    def __init__(self, config: QuantConfig, heads: bool = True, depth: int = 0):
        super().__init__(config, heads=heads, depth=depth)
        dim = -3 if heads and config.a_granularity == "channel" else None
        self.grid_a, self.grid_b = (
            Quantizer(
                config.a_bits,
                config.frac_bits,
                dim,
                config.a_range,
                symmetry=config.a_symmetry,
                scales=config.input_scales,
            )
            for _ in "ab"
        )
        self.grid_a.allows_act_drop = self.grid_b.allows_act_drop = True
        self.grid_a.widens = self.grid_b.widens = True

    def real(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    def wraps(self, index: int) -> bool:
        return True

    def observe(self, inputs: tuple, output: Any) -> None:
        if min(x.ndim for x in inputs) < 4 or any(
            grid.channels_seen not in (0, x.shape[-3])
            for grid, x in self._grids_of_heads(inputs)  # windows, not heads
        ):
            self.grid_a.merge_channels()
            self.grid_b.merge_channels()
            self.options["heads"] = False
        if inputs[0].levels:  # probabilities that stay on their levels
            self.grid_a.channel_dim, self.grid_a.bits, self.grid_a.fixed = None, 16, LEVEL_UNIT
        self.grid_a.observe(inputs[0].real())
        self.grid_b.observe(inputs[1].real())
        self.options["depth"] = max(self.options["depth"], inputs[0].shape[-1])

    def _grids_of_heads(self, inputs: tuple) -> list[tuple[Quantizer, QTensor]]:
        return [
            (grid, x) for grid, x in zip((self.grid_a, self.grid_b), inputs) if grid.channel_dim is not None
        ]

    def _check_heads(self, inputs: tuple) -> None:
        for grid, x in self._grids_of_heads(inputs):
            heads = (grid.scale if grid.frozen else grid.low).numel()
            if heads not in (1, x.shape[-3]):
                raise InputError(
                    f"{self.name} was calibrated with a scale for each of {heads} heads (dimension -3) "
                    f"and meets {x.shape[-3]}; calibrate on images of more than one size, "
                    "or with `a_granularity=tensor`"
                )

    @property
    def bound(self) -> Tensor | None:
        """What no partial sum can exceed; None where it is not known."""
        if FLOAT_BITS in (self.grid_a.bits, self.grid_b.bits) or not self.options["depth"]:
            return None
        return self.options["depth"] * self.grid_a.largest().max() * self.grid_b.largest().max()

    def integer(self, a: QTensor, b: QTensor) -> QTensor:
        self._check_heads((a, b))
        a, b = self.grid_a(a), self.grid_b(b)
        if self.config.is_simulated or not (a.is_integer and b.is_integer):
            return a.like(a.real() @ b.real(), None)
        wide = max(self.grid_a.bits, self.grid_b.bits) > 8  # sums of such products pass 2^24
        return a.like(matmul(a.q, b.q, wide), a.unit * b.unit)

    def learnable(self) -> dict[str, list]:
        grids = [grid for grid in (self.grid_a, self.grid_b) if grid.bits != 32 and grid.fixed is None]
        return {"range_a": [grid.log_n for grid in grids]} if grids else {}


class QuantSoftmax(QuantFunction):
    """Softmax along one dimension by a table of exponentials and a fixed-point reciprocal.

    The scores are integers in units of 1/256 nat, so that a difference of scores is the index into the table.
    A constant bias may be added to them; -inf masks a key. Where `QuantConfig.softmax` asks for levels, a
    second table brings each probability to the nearest one.
    """

    kind = "softmax"

    def __init__(self, config: QuantConfig, dim: int = -1):
        super().__init__(config, dim=dim)
        self.dim = dim
        self.grid = Quantizer(16, config.frac_bits, fixed=SOFTMAX_STEP)
        self.table: Tensor
        self.levels: Tensor | None
        self.register_buffer("table", softmax_table())
        on_levels = config.softmax != "linear" and config.a_bits != FLOAT_BITS
        self.register_buffer(
            "levels", level_table(config.softmax, config.softmax_bits) if on_levels else None
        )

    @property
    def gives_levels(self) -> bool:
        return self.levels is not None

    def real(self, scores: Tensor, bias: Tensor | None = None, kinds: Tensor | None = None) -> Tensor:
        if kinds is not None and bias is not None:
            bias = bias.index_select(0, kinds)
        return F.softmax(scores if bias is None else scores + bias, self.dim)

    def integer(self, scores: QTensor, bias: Tensor | None = None, kinds: Tensor | None = None) -> QTensor:
        p = softmax(self.grid(scores).q, self.table, bias, kinds, self.dim)
        if self.levels is None:
            return scores.like(p, torch.as_tensor(SOFTMAX_UNIT, dtype=torch.float64, device=p.device))
        p = table(p, self.levels, 0, lambda p: p * (SOFTMAX_UNIT / LEVEL_UNIT))
        unit = torch.as_tensor(LEVEL_UNIT, dtype=torch.float64, device=p.device)
        return QTensor(p, unit, scores.runtime, levels=True)


@replaces(MaskedSoftmax)
def _masked_softmax(module: MaskedSoftmax, config: QuantConfig) -> QuantSoftmax:
    return QuantSoftmax(config)


class QuantLeakyReLU(QuantFunction):
    """LeakyReLU in the accumulator: negative numbers are requantized by the slope, others stay."""

    kind = "leaky_relu"

    def __init__(self, config: QuantConfig, slope: float = 0.01):
        super().__init__(config, slope=slope)
        self.slope = slope

    def real(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.slope)

    def integer(self, x: QTensor) -> QTensor:
        if not x.is_integer:
            return x.like(self.real(x.q), None)
        return x.like(leaky(x.q, self.slope), x.scale)


_ELEMENTWISE: dict[str, Callable[..., Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "softplus": F.softplus,
    "exp": torch.exp,
    "elu": F.elu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "mish": F.mish,
    "relu6": F.relu6,
    "square": torch.square,
    "sqrt": lambda x: torch.sqrt(x.clamp(min=0)),
    "log": lambda x: torch.log(x.clamp(min=1e-12)),
    "log2": lambda x: torch.log2(x.clamp(min=1e-12)),
    "log10": lambda x: torch.log10(x.clamp(min=1e-12)),
    "celu": F.celu,
    "selu": F.selu,
    "log_sigmoid": F.logsigmoid,
    "tanhshrink": F.tanhshrink,
    "softshrink": F.softshrink,
    "hardshrink": F.hardshrink,
    "threshold": F.threshold,
    "softsign": F.softsign,
    "power": lambda x, exponent: torch.pow(x, exponent),
    **{
        name: getattr(torch, name)
        for name in (
            "erf erfc erfinv sin cos tan asin acos atan sinh cosh asinh acosh atanh log1p exp2 expm1 sign "
            "sgn reciprocal"
        ).split()
    },
}
"""What has no value at a point (1 / 0, the root of a negative number) gets the end of the range, or 0."""


class QuantTable(QuantFunction):
    """Any elementwise function: the input in `QuantConfig.table_bits`, the output a wide activation.

    The table is computed in float64 in calibration and stored with the model, so decoding never evaluates the
    function.

    Args:
        kind: a name of `_ELEMENTWISE`. options: further arguments of that function.

    Raises:
        ValueError: a kind that has no table.
    """

    def __init__(self, config: QuantConfig, kind: str, **options: float):
        super().__init__(config, **options)
        if kind not in _ELEMENTWISE:
            raise ValueError(f"no table for the function {kind!r}")
        self.kind = kind
        self.f = partial(_ELEMENTWISE[kind], **options)
        self.grid_in = Quantizer(
            config.table_bits, config.frac_bits, headroom=1.25 if config.table_bits > 8 else 1.0
        )
        self.grid_out = self.wide_quantizer()
        self.register_buffer("table", None)

    def real(self, x: Tensor) -> Tensor:
        return self.f(x)

    def observe(self, inputs: tuple, output: Any) -> None:
        self.grid_in.observe(inputs[0].real())
        self.grid_out.observe(output)

    def build(self) -> Tensor:
        """The entries for every integer of the input quantizer, as integers of the output quantizer."""
        scale_in, qmin, qmax = self.grid_in.parameters_of_grid()
        scale_out, low, high = self.grid_out.parameters_of_grid()
        index = torch.arange(int(qmin), int(qmax) + 1, dtype=torch.float64, device=scale_in.device)
        values = (self.f(index * scale_in.detach()) / scale_out.detach()).nan_to_num(nan=0.0)
        entries = round_half_away(values)
        return entries.clamp(float(low), float(high)).float()

    def integer(self, x: QTensor) -> QTensor:
        x = self.grid_in(x)
        scale_out = self.grid_out.parameters_of_grid()[0]
        first = int(self.grid_in.parameters_of_grid()[1])
        with torch.no_grad():
            entries = self.entries() if self.table is None else self.table
        if x.unit.requires_grad or scale_out.requires_grad:

            def smooth(numbers: Tensor) -> Tensor:
                return self.f(numbers * x.unit.float()) / scale_out.float()

            return x.like(table(x.q, entries, first, smooth), scale_out)
        return x.like(table(x.q, entries, first, slopes=self.slopes), scale_out)

    def entries(self) -> Tensor:
        """`build`, once as long as the grids stay."""
        return self._kept("entries", self.build)

    def slopes(self) -> Tensor:
        """The derivative at every integer of the input quantizer, in steps of the output quantizer."""
        return self._kept("slopes", self._slopes)

    def _kept(self, what: str, make: Callable[[], Tensor]) -> Tensor:
        return unchanged.once((self, what), make, self.grid_in.log_n, self.grid_out.log_n)

    def _slopes(self) -> Tensor:
        scale_in, qmin, qmax = (t.detach() for t in self.grid_in.parameters_of_grid())
        scale_out = self.grid_out.parameters_of_grid()[0].detach()
        index = torch.arange(int(qmin), int(qmax) + 1, dtype=torch.float64, device=scale_in.device)
        with torch.enable_grad():
            index.requires_grad_()
            (slopes,) = torch.autograd.grad((self.f(index * scale_in) / scale_out).sum(), index)
        return slopes.float()

    def freeze(self) -> None:
        super().freeze()
        self.table = self.build()

    def thaw(self) -> None:
        super().thaw()
        self.table = None
