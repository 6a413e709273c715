"""The operations of an integer program, one typed dataclass a kind, and the ranges of what they compute.

`integer.reference` holds the meaning of each kind as a few lines of PyTorch, and faster kernels equal it to
the bit. The primitives of `quant.primitives` emit these operations, each with the proven range of its result.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

Ends = Tensor | int | None
"""A limit of a result: one for all channels, or a tensor that broadcasts to the result; None: no limit."""


@dataclass(frozen=True)
class Range:
    """low <= every number <= high."""

    low: int
    high: int

    @property
    def largest(self) -> int:
        """The largest magnitude."""
        return max(-self.low, self.high)

    @property
    def dtype(self) -> torch.dtype:
        """The smallest type that holds the range; uint8 only where there is no negative number."""
        for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32):
            info = torch.iinfo(dtype)
            if info.min <= self.low and self.high <= info.max:
                return dtype
        return torch.int64

    def union(self, other: "Range") -> "Range":
        return Range(min(self.low, other.low), max(self.high, other.high))

    @property
    def with_zero(self) -> "Range":
        return self.union(Range(0, 0))

    def __neg__(self) -> "Range":
        return Range(-self.high, -self.low)

    def __add__(self, other: "Range") -> "Range":
        return Range(self.low + other.low, self.high + other.high)

    def __mul__(self, other: "Range") -> "Range":
        ends = [a * b for a in (self.low, self.high) for b in (other.low, other.high)]
        return Range(min(ends), max(ends))

    def clamped(self, low: Ends, high: Ends) -> "Range":
        """The range of the numbers after they are clipped to limits, which may differ between channels."""
        first, last = self.low, self.high
        if low is not None:
            lows = torch.as_tensor(low)
            first, last = max(first, int(lows.min())), max(last, int(lows.max()))
        if high is not None:
            highs = torch.as_tensor(high)
            first, last = min(first, int(highs.min())), min(last, int(highs.max()))
        return Range(first, last)

    @classmethod
    def of(cls, numbers: Tensor) -> "Range":
        return cls(int(numbers.min()), int(numbers.max())) if numbers.numel() else cls(0, 0)


@dataclass(frozen=True, eq=False)
class Operation:
    """One step of a program.

    inputs, outputs: numbers of values. node: the layer or function of the codec that the step belongs to.
    """

    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    node: str = ""

    kind: ClassVar[str]
    keeps_zero: ClassVar[bool] = False  # the result of 0 is 0, apart from limits

    def attributes(self) -> dict[str, Any]:
        """The attributes beside inputs, outputs and node, by name."""
        names = (field.name for field in dataclasses.fields(self))
        return {name: getattr(self, name) for name in names if name not in ("inputs", "outputs", "node")}

    def parameters(self) -> dict[str, Tensor]:
        """The attributes that may differ between channels, multipliers and limits; without those that are
        None."""
        names = ("mantissa", "shift", "low", "high", "refinement")
        values = {name: getattr(self, name, None) for name in names}
        return {name: torch.as_tensor(value) for name, value in values.items() if value is not None}

    def __repr__(self) -> str:
        return f"{self.outputs} = {self.kind} {self.inputs}  [{self.node}]"


@dataclass(frozen=True, eq=False, repr=False)
class Input(Operation):
    """Pixels or symbols, given from outside; `node` is its name."""

    kind: ClassVar[str] = "input"


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Constant(Operation):
    """value: int64."""

    kind: ClassVar[str] = "constant"
    value: Tensor


# ------------------------------------------------------------------------------------------------ elementwise


class Elementwise(Operation):
    """Each number of the result comes from the numbers at its own position."""


class Unary(Elementwise):
    """Elementwise, of one value and of parameters of channels."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Rescale(Unary):
    """round_half_away(x * mantissa * 2^-shift), clipped to low .. high, times `refinement` (split
    channels)."""

    kind: ClassVar[str] = "rescale"
    keeps_zero: ClassVar[bool] = True
    mantissa: Tensor
    shift: Tensor
    low: Tensor | None
    high: Tensor | None
    refinement: Tensor


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Leaky(Unary):
    """x, or round_half_away(x * mantissa * 2^-shift) where x is negative."""

    kind: ClassVar[str] = "leaky"
    keeps_zero: ClassVar[bool] = True
    mantissa: Tensor
    shift: Tensor


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Clamp(Unary):
    """x clipped to low .. high; None: no limit on that side."""

    kind: ClassVar[str] = "clamp"
    low: Tensor | None
    high: Tensor | None


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Table(Unary):
    """table[x - first]; numbers beyond the table take its first or last entry."""

    kind: ClassVar[str] = "table"
    table: Tensor
    first: int


class Neg(Unary):
    kind: ClassVar[str] = "neg"
    keeps_zero: ClassVar[bool] = True


class Abs(Unary):
    kind: ClassVar[str] = "abs"
    keeps_zero: ClassVar[bool] = True


class Square(Unary):
    kind: ClassVar[str] = "square"
    keeps_zero: ClassVar[bool] = True


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Mask(Elementwise):
    """x * mask, which holds 0 and 1."""

    kind: ClassVar[str] = "mask"
    mask: Tensor


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Add(Elementwise):
    """x + y, clipped to low .. high."""

    kind: ClassVar[str] = "add"
    low: int | None
    high: int | None


class Product(Elementwise):
    """x * y, number by number."""

    kind: ClassVar[str] = "product"


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Gdn(Elementwise):
    """`quant.integer_functions.integer_gdn` of x and its norm, clipped to low .. high."""

    kind: ClassVar[str] = "gdn"
    mantissa: Tensor
    shift: Tensor
    low: Tensor
    high: Tensor
    inverse: bool
    algorithm: str


# -------------------------------------------------------------------------------------- sums along dimensions


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class MultiplyAccumulate(Operation):
    """Products with `weight`, (outputs, inputs / groups, ...), summed up, plus `bias`; no partial sum exceeds
    `bound`."""

    weight: Tensor
    bias: Tensor | None
    bound: int


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Linear(MultiplyAccumulate):
    """Along the last dimension."""

    kind: ClassVar[str] = "linear"


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Convolution(MultiplyAccumulate):
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int

    @property
    def pads(self) -> tuple[int, ...]:
        """The padding along each axis, where it is not stated by a word."""
        assert not isinstance(self.padding, str)
        return self.padding


class Conv2d(Convolution):
    kind: ClassVar[str] = "conv"


class Conv3d(Convolution):
    kind: ClassVar[str] = "conv3d"


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class ConvTranspose2d(Convolution):
    kind: ClassVar[str] = "deconv"
    output_padding: tuple[int, ...]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class MatMul(Operation):
    """The matrix product of two values; no partial sum exceeds `bound`."""

    kind: ClassVar[str] = "matmul"
    bound: int


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Sum(Operation):
    kind: ClassVar[str] = "sum"
    dim: Any
    keepdim: bool


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Softmax(Operation):
    """`quant.integer_functions.fixed_softmax`; `blank` marks rows without a key, whose probabilities are
    0."""

    kind: ClassVar[str] = "softmax"
    table: Tensor
    offset: Tensor | None
    kinds: Tensor | None
    blank: Tensor | None
    dim: int


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LayerNorm(Operation):
    """`quant.integer_functions.integer_layer_norm`, rescaled, with the sign of `mantissa`, plus `offset`,
    clipped."""

    kind: ClassVar[str] = "layer_norm"
    eps: float
    mantissa: Tensor
    shift: Tensor
    offset: Tensor
    low: Tensor
    high: Tensor


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Attention(Operation):
    """Scores, softmax and weighted sum at once, of queries, keys (transposed) and values; `integer.passes`
    makes it.

    The attributes are the operations that it stands for.
    """

    kind: ClassVar[str] = "attention"
    products: MatMul
    scores: Rescale
    softmax: Softmax
    weights: Rescale
    output: MatMul


# ----------------------------------------------------------------------------------------------------- layout


@dataclass(frozen=True)
class Operand:
    """Input number `index` of an operation, among the arguments of its layout function."""

    index: int


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Layout(Operation):
    """A PyTorch function that moves numbers and computes none.

    arguments: its positional arguments, with an `Operand` in the place of each value. options: by keyword.
    """

    kind: ClassVar[str] = "layout"
    name: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument that may be given by position or by name."""
        return self.options.get(name, self.arguments[position] if len(self.arguments) > position else default)

    def __repr__(self) -> str:
        return f"{self.outputs} = {self.name} {self.inputs}  [{self.node}]"


# ------------------------------------------------------------------------------------------------- boundaries


@dataclass(frozen=True)
class Boundary:
    """A point of the program where a latent is rounded, with the numbers of the values that meet there.

    All values but the symbols are in units of 2^-boundary_bits.

    kind: round, entropy_bottleneck, gaussian, mixture or offsets.
    latent: before it is rounded. decoded: what a decoder makes of the symbols.
    whole: the symbols are round(latent), not round(latent - means); true for every mixture.
    step: the step of the symbols of a variable-rate bottleneck.
    """

    kind: str
    node: str
    latent: int
    symbols: int
    decoded: int
    means: int | None = None
    scales: int | None = None
    weights: int | None = None
    whole: bool = False
    step: Tensor | None = None

    VALUES: ClassVar[tuple[str, ...]] = ("latent", "symbols", "decoded", "means", "scales", "weights")

    def values(self) -> Iterator[tuple[str, int]]:
        """(name of the field, number of the value) of those that are not None."""
        for name in self.VALUES:
            number = getattr(self, name)
            if number is not None:
                yield name, number
