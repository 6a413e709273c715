"""The tensor that flows through a rewritten codec: integers with their scale, or real numbers.

The codec's own forward runs on it unchanged: every PyTorch function that is called on one goes to
`quant.dispatch`. Functions that move numbers move the scale likewise. Functions that compute are run by the
node that the runtime has for this point of the forward.
"""

import dataclasses
import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from licq.quant.symbols import Recorder, Symbol
from licq.support.errors import InputError


@dataclasses.dataclass(frozen=True)
class Repeated:
    """Integers of which a gather makes more, as the overlapping windows of an attention do.

    They are quantized before: requantization goes number by number, so it gives the same bits.
    """

    numbers: Tensor
    """Before the gather."""

    scale: Tensor
    """Of the tensor behind the moves."""

    moves: tuple[Callable[[Tensor], Tensor], ...]
    """The gather and what has moved its result since."""

    places: Tensor
    """int64, of the form that a scale of the moved tensor has: the number of each entry in a scale of
    `numbers` of the shape `shape`."""

    shape: tuple[int, ...]

    form: Tensor
    """The moved tensor, without memory."""

    def moved(self, numbers: Tensor) -> Tensor:
        for move in self.moves:
            numbers = move(numbers)
        return numbers

    def before(self, values: Tensor) -> Tensor | None:
        """Values that broadcast to the moved tensor, as they broadcast to `numbers`; None: they cannot."""
        if values.numel() == 1:
            return values.reshape(())
        if self.places.numel() != math.prod(self.shape):  # a reshape has mixed them with what was gathered
            return None
        values = values.reshape((1,) * (self.places.ndim - values.ndim) + values.shape)
        if any(size not in (1, places) for size, places in zip(values.shape, self.places.shape)):
            return None
        order = torch.argsort(self.places.reshape(-1))
        return values.expand(self.places.shape).reshape(-1).index_select(0, order).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class Same:
    """The formula of x, cut off from autograd."""

    x: "QTensor"


class QTensor:
    """Values `q * scale` in the integer state, plain values `q` in the real state (`scale` is None).

    q:       float tensor, of integers in the integer state; or a symbol while a program is written down.
    scale:   float64 tensor, 0-dimensional (per tensor) or with q's number of dimensions and broadcastable to
    it.
    runtime: the `quant.runtime.Runtime`; None for a tensor that no forward runs on.
    pixels:  true for the image that enters the codec: 8-bit samples, exact on a grid of 1/255.
    latent:  true for y_hat, z_hat and parts of them: values that came out of a rounding at a boundary of the
    codec.
    levels:  true for probabilities on the levels of `QuantConfig.softmax`.
    boolean: true for the result of a comparison: 0 and 1, on the scale 1.
    bound:   the largest magnitude of integers of more bits than a wide activation has, where it is known:
    squares and their means; 0: nothing is known.
    root:    (v, inverse): the tensor is the root of v, or 1 over it.
    forward: the number of the forward that made it (`Runtime.number`).

    repeated: where the numbers are not computed yet; reading q computes them.
    origin: where the tensor comes from, while that is found out (`quant.storage`).
    formula: how the forward has written it (`quant.formulas`); None: nothing is known.

    The tensors in q and scale never change: an operation in place puts new ones into these slots. A quantized
    tensor knows its views and what it is a view of (`aliases`). After an operation in place on one of them,
    the others hold old numbers; they lose their q and can no longer be read.
    """

    __slots__ = (
        "q",
        "scale",
        "runtime",
        "pixels",
        "latent",
        "levels",
        "boolean",
        "bound",
        "root",
        "forward",
        "aliases",
        "overwritten",
        "repeated",
        "origin",
        "formula",
        "__weakref__",
    )
    q: Tensor

    def __init__(
        self,
        q: Tensor,
        scale: Tensor | None,
        runtime: Any,
        pixels: bool = False,
        latent: bool = False,
        levels: bool = False,
    ):
        self.q, self.scale, self.runtime, self.pixels, self.latent, self.levels = (
            q,
            scale,
            runtime,
            pixels,
            latent,
            levels,
        )
        self.boolean, self.bound = False, 0
        self.root: tuple[QTensor, bool] | None = None
        self.forward: int = 0 if runtime is None else runtime.number
        self.aliases: list[weakref.ref[QTensor]] = []
        self.repeated: Repeated | None = None
        self.origin: Any = None
        self.formula: Any = None

    @classmethod
    def of_repeated(cls, repeated: "Repeated", like: "QTensor") -> "QTensor":
        """Numbers that are repeated when they are asked for; a tensor in another layout than `like`."""
        x = like.moved(repeated.form, repeated.scale)
        x.repeated = repeated
        del x.q
        return x

    # ------------------------------------------------------------------------------------------ what it holds

    @property
    def is_integer(self) -> bool:
        return self.scale is not None

    @property
    def unit(self) -> Tensor:
        """The scale of integers; not to be asked for in the real state."""
        assert self.scale is not None
        return self.scale

    def real(self) -> Tensor:
        """The values as an ordinary float32 tensor."""
        if self.scale is None:
            return self.q
        # the product is taken in float64: an integer of more than 24 bits keeps all of them until the end
        return (self.q * self.scale).to(torch.float32)

    @property
    def recorder(self) -> Recorder | None:
        """Of the program that is written down; None: the numbers are computed."""
        return None if self.runtime is None else self.runtime.tracer

    def like(self, q: Tensor, scale: Tensor | None) -> "QTensor":
        return QTensor(q, scale, self.runtime)

    def moved(self, q: Tensor, scale: Tensor | None) -> "QTensor":
        """The same values in another layout."""
        moved = QTensor(q, scale, self.runtime, latent=self.latent, levels=self.levels)
        moved.boolean, moved.bound = self.boolean, self.bound
        return moved

    def same(self) -> "QTensor":
        """Another object of the same values, which operations in place on this one leave as it is."""
        same = QTensor(self.q, self.scale, self.runtime, self.pixels, self.latent, self.levels)
        same.boolean, same.bound, same.root = self.boolean, self.bound, self.root
        same.formula = self.formula
        return same

    def share(self, views: Sequence["QTensor"]) -> None:
        """These may share their memory with this tensor; several of them are disjoint parts."""
        self.aliases.append(weakref.ref(self))
        for view in views:
            view.aliases = self.aliases if len(views) == 1 else self.aliases[:]
        for view in views:
            reference = weakref.ref(view)
            self.aliases.append(reference)
            if len(views) > 1:
                view.aliases.append(reference)

    def overwrite(self, new: "QTensor", function: str) -> None:
        """Take the values of `new`, the result of `function` in place."""
        if new is self:
            return
        numbers, scale = new.q, new.scale
        if self.runtime.tracer is None:  # symbols have no memory
            for reference in self.aliases:
                other = reference()
                if (
                    other is not None
                    and other is not self
                    and other.readable
                    and _shares_memory(other.q, self.q)
                ):
                    other.overwritten = f"{function} in {self.runtime.where}"
                    other.formula = other.root = None  # they speak of the numbers that are gone
                    del other.q
        self.q, self.scale, self.aliases, self.repeated = numbers, scale, [], None
        self.pixels, self.latent, self.levels = new.pixels, new.latent, new.levels
        self.boolean, self.bound, self.root = new.boolean, new.bound, new.root
        self.origin, self.formula = new.origin, new.formula

    @property
    def readable(self) -> bool:
        return not hasattr(self, "overwritten")

    def detach(self) -> "QTensor":
        numbers = self.q if isinstance(self.q, Symbol) else self.q.detach()
        cut_off = self.moved(numbers, None if self.scale is None else self.scale.detach())
        cut_off.latent, cut_off.formula = self.latent, Same(self.same())
        return cut_off

    def full_scale(self) -> Tensor:
        """The scale with as many dimensions as q, each of size 1 or q's."""
        scale = self.unit
        return scale.reshape((1,) * self.q.ndim) if scale.ndim == 0 else scale

    def __repr__(self) -> str:
        state = "real" if self.scale is None else f"scale {tuple(self.scale.shape)}"
        return f"QTensor({tuple(self.q.shape)}, {state})"

    # ---------------------------------------------------------------------------------- to look like a tensor

    @property
    def shape(self) -> torch.Size:
        return self.q.shape if self.repeated is None else self.repeated.form.shape

    ndim = property(lambda self: len(self.shape))
    device = property(lambda self: self.q.device)
    dtype = property(lambda self: torch.bool if self.boolean else torch.float32)
    is_cuda = property(lambda self: self.q.is_cuda)
    is_nested = False
    requires_grad = property(lambda self: self.q.requires_grad)

    def size(self, dim: int | None = None):
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def numel(self) -> int:
        return self.shape.numel()

    def __len__(self) -> int:
        return len(self.q)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        runtime = runtime_of(args) or runtime_of(kwargs.values())
        return runtime.dispatch(function, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "q" and self.readable and self.repeated is not None:
            self.q = self.repeated.moved(self.repeated.numbers)
            self.repeated = None
            return self.q
        if name == "q" and not self.readable:
            raise InputError(
                f"licq cannot run this network: {self.overwritten} changes a tensor in place, and another "
                "view of it is read afterwards; write it as an operation that returns a new tensor"
            )
        method = getattr(torch.Tensor, name, None)
        if method is None or name.startswith("__") or not callable(method):
            raise AttributeError(f"a quantized tensor has no attribute {name!r}")
        return lambda *args, **kwargs: self.runtime.dispatch(method, (self, *args), kwargs)

    def __getitem__(self, index):
        return self.runtime.dispatch(torch.Tensor.__getitem__, (self, index), {})

    def __add__(self, other):
        return self.runtime.dispatch(torch.add, (self, other), {})

    __radd__ = __add__

    def __sub__(self, other):
        return self.runtime.dispatch(torch.sub, (self, other), {})

    def __rsub__(self, other):
        return self.runtime.dispatch(torch.add, (-self, other), {})

    def __mul__(self, other):
        return self.runtime.dispatch(torch.mul, (self, other), {})

    __rmul__ = __mul__

    def __truediv__(self, other):
        return self.runtime.dispatch(torch.div, (self, other), {})

    def __rtruediv__(self, other):
        return self.runtime.dispatch(torch.Tensor.__rtruediv__, (self, other), {})

    def __matmul__(self, other):
        return self.runtime.dispatch(torch.matmul, (self, other), {})

    def __rmatmul__(self, other):
        return self.runtime.dispatch(torch.matmul, (other, self), {})

    def __neg__(self):
        return self.runtime.dispatch(torch.neg, (self,), {})

    def __pow__(self, exponent):
        return self.runtime.dispatch(torch.pow, (self, exponent), {})


def _operator(name: str) -> Callable:
    method = getattr(torch.Tensor, name)
    return lambda self, *others: self.runtime.dispatch(method, (self, *others), {})


# After the class: with __eq__ in its body it would lose its hash.
for _name in (
    "__eq__",
    "__ne__",
    "__lt__",
    "__le__",
    "__gt__",
    "__ge__",
    "__abs__",
    "__mod__",
    "__and__",
    "__rand__",
    "__or__",
    "__ror__",
    "__xor__",
    "__rxor__",
    "__invert__",
    "__floordiv__",
    "__rfloordiv__",
    "__rpow__",
    "__iadd__",
    "__isub__",
    "__imul__",
    "__itruediv__",
    "__setitem__",
    "__bool__",
    "__int__",
    "__float__",
):
    setattr(QTensor, _name, _operator(_name))


def _shares_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def runtime_of(arguments: Iterable[Any]) -> Any:
    """The runtime of the first quantized tensor among arguments, also in lists and tuples; None: there is
    none."""
    for argument in arguments:
        if isinstance(argument, QTensor):
            return argument.runtime
        if isinstance(argument, (list, tuple)):
            runtime = runtime_of(argument)
            if runtime is not None:
                return runtime
    return None


def to_real(argument: Any) -> Any:
    """The argument with every quantized tensor in it replaced by its values."""
    if isinstance(argument, QTensor):
        return argument.real().bool() if argument.boolean else argument.real()
    if isinstance(argument, (list, tuple)):
        return type(argument)(to_real(item) for item in argument)
    if isinstance(argument, dict):
        return {key: to_real(item) for key, item in argument.items()}
    return argument
