"""The tensor that flows through a rewritten codec: whole numbers and their scale, or (in a float unit) real
numbers.

The codec's own forward runs on it unchanged. Layout operations act on numbers and scale alike; every
operation that computes something is handed to the runtime, which finds the quantized function standing at
that place.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from licq.quant import primitives
from licq.support.errors import InputError

if TYPE_CHECKING:
    from licq.quant.runtime import Runtime
    from licq.quant.symbols import Recorder


class QTensor:
    """Values `q * scale` in the integer state, plain values `q` in the real state (`scale` is None).

    q:      float tensor; whole numbers in the integer state.
    scale:  float64 tensor, 0-dimensional (per tensor) or with q's number of dimensions and broadcastable to
    it.
    pixels: true for the image that enters the codec: 8-bit samples, exact on a grid of 1/255.
    latent: true for y_hat, z_hat and parts of them: values that came out of a rounding at a boundary of the
    codec.
    levels: true for probabilities that a softmax gave on levels of its own (`QuantConfig.softmax`).

    The tensors in q and scale never change: an operation in place puts others into these slots. Views of one
    another know that they are (`aliases`); what such an operation leaves behind with the old numbers loses
    its q and can no longer be read.
    """

    __slots__ = (
        "q",
        "scale",
        "runtime",
        "pixels",
        "latent",
        "levels",
        "aliases",
        "overwritten",
        "__weakref__",
    )

    def __init__(
        self,
        q: Tensor,
        scale: Tensor | None,
        runtime: "Runtime",
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
        self.aliases: list[weakref.ref[QTensor]] = []

    # ------------------------------------------------------------------------------------------ what it holds

    @property
    def is_integer(self) -> bool:
        return self.scale is not None

    def real(self) -> Tensor:
        """The values as an ordinary float32 tensor."""
        if self.scale is None:
            return self.q
        # the product is taken in float64: a whole number of more than 24 bits keeps all of them until the end
        return (self.q * self.scale).to(torch.float32)

    @property
    def recorder(self) -> "Recorder | None":
        """Of the program that is written down; None: the numbers are computed."""
        return None if self.runtime is None else self.runtime.tracer

    def like(self, q: Tensor, scale: Tensor | None) -> "QTensor":
        return QTensor(q, scale, self.runtime)

    def moved(self, q: Tensor, scale: Tensor | None) -> "QTensor":
        """The same values in another layout."""
        return QTensor(q, scale, self.runtime, latent=self.latent, levels=self.levels)

    def same(self) -> "QTensor":
        """Another object of the same values, which operations in place on this one leave as it is."""
        return QTensor(self.q, self.scale, self.runtime, self.pixels, self.latent, self.levels)

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
                    del other.q
        self.q, self.scale, self.aliases = new.q, new.scale, []
        self.pixels, self.latent, self.levels = new.pixels, new.latent, new.levels

    @property
    def readable(self) -> bool:
        return not hasattr(self, "overwritten")

    def detach(self) -> "QTensor":
        return self.moved(self.q.detach(), None if self.scale is None else self.scale.detach())

    def full_scale(self) -> Tensor:
        """The scale with as many dimensions as q, each of size 1 or q's."""
        return self.scale.reshape((1,) * self.q.ndim) if self.scale.ndim == 0 else self.scale

    def __repr__(self) -> str:
        state = "real" if self.scale is None else f"scale {tuple(self.scale.shape)}"
        return f"QTensor({tuple(self.q.shape)}, {state})"

    # ---------------------------------------------------------------------------------- to look like a tensor

    shape = property(lambda self: self.q.shape)
    ndim = property(lambda self: self.q.ndim)
    device = property(lambda self: self.q.device)
    dtype = property(lambda self: torch.float32)
    is_cuda = property(lambda self: self.q.is_cuda)
    requires_grad = property(lambda self: self.q.requires_grad)

    def size(self, dim: int | None = None):
        return self.q.shape if dim is None else self.q.shape[dim]

    def dim(self) -> int:
        return self.q.ndim

    def numel(self) -> int:
        return self.q.numel()

    def __len__(self) -> int:
        return len(self.q)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})

    def __getattr__(self, name: str):
        if name == "q" and not self.readable:
            raise InputError(
                f"licq cannot run this network: {self.overwritten} changes a tensor in place, and another view of it is read afterwards; "
                "write it as an operation that returns a new tensor"
            )
        method = getattr(torch.Tensor, name, None)
        if method is None or name.startswith("__") or not callable(method):
            raise AttributeError(f"a quantized tensor has no attribute {name!r}")
        return lambda *args, **kwargs: dispatch(method, (self, *args), kwargs)

    def __getitem__(self, index):
        return dispatch(torch.Tensor.__getitem__, (self, index), {})

    def __add__(self, other):
        return dispatch(torch.add, (self, other), {})

    __radd__ = __add__

    def __sub__(self, other):
        return dispatch(torch.sub, (self, other), {})

    def __rsub__(self, other):
        return dispatch(torch.add, (-self, other), {})

    def __mul__(self, other):
        return dispatch(torch.mul, (self, other), {})

    __rmul__ = __mul__

    def __truediv__(self, other):
        return dispatch(torch.div, (self, other), {})

    def __rtruediv__(self, other):
        return dispatch(torch.Tensor.__rtruediv__, (self, other), {})

    def __matmul__(self, other):
        return dispatch(torch.matmul, (self, other), {})

    def __rmatmul__(self, other):
        return dispatch(torch.matmul, (other, self), {})

    def __neg__(self):
        return dispatch(torch.neg, (self,), {})

    def __pow__(self, exponent):
        return dispatch(torch.pow, (self, exponent), {})


def _operator(name: str) -> Callable:
    method = getattr(torch.Tensor, name)
    return lambda self, *others: dispatch(method, (self, *others), {})


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


# --------------------------------------------------------------------------------------------------- dispatch

Handler = Callable[["Runtime", Callable, tuple, dict], Any]
HANDLERS: dict[str, Handler] = {}


def handles(*names: str):
    """Register a handler for the torch functions and tensor methods of these names."""

    def register(handler: Handler) -> Handler:
        for name in names:
            HANDLERS[name] = handler
        return handler

    return register


_ALIASES = {
    "__add__": "add",
    "__radd__": "add",
    "__iadd__": "add",
    "__sub__": "sub",
    "__isub__": "sub",
    "__mul__": "mul",
    "__rmul__": "mul",
    "__imul__": "mul",
    "multiply": "mul",
    "__truediv__": "div",
    "__itruediv__": "div",
    "true_divide": "div",
    "divide": "div",
    "__eq__": "eq",
    "__ne__": "ne",
    "__lt__": "lt",
    "__le__": "le",
    "__gt__": "gt",
    "__ge__": "ge",
    "__abs__": "abs",
    "__matmul__": "matmul",
    "bmm": "matmul",
    "mm": "matmul",
    "__neg__": "neg",
    "negative": "neg",
    "concat": "cat",
    "concatenate": "cat",
    "swapaxes": "transpose",
    "clip": "clamp",
    "subtract": "sub",
}


def function_name(function: Callable) -> str:
    """The name under which a torch function, a method or its in-place variant is handled."""
    name = getattr(function, "__name__", str(function))
    if not name.startswith("__"):
        name = name.rstrip("_")
    return _ALIASES.get(name, name)


def runtime_of(arguments: Any) -> "Runtime | None":
    for argument in arguments:
        if isinstance(argument, QTensor):
            return argument.runtime
        if isinstance(argument, (list, tuple)):
            runtime = runtime_of(argument)
            if runtime is not None:
                return runtime
    return None


def is_in_place(function: Callable, kwargs: dict) -> bool:
    """Whether a torch function changes its first argument."""
    name = getattr(function, "__name__", "")
    if name.startswith("__"):
        return name == "__setitem__" or name[:3] == "__i" and name[3:-2] in ("add", "sub", "mul", "truediv")
    return name.endswith("_") or bool(kwargs.get("inplace"))


def out_of_place(function: Callable, name: str) -> Callable | None:
    """The function that returns what this one, in place, writes; None where there is none (fill_, copy_, x[i]
    = y)."""
    if not getattr(function, "__name__", "").endswith("_"):
        return function  # inplace=True
    return next(
        (
            getattr(home, name)
            for home in (torch.Tensor, torch, F)
            if hasattr(home, name) and name != "__setitem__"
        ),
        None,
    )


def dispatch(function: Callable, args: tuple, kwargs: dict):
    """Run a torch function whose arguments hold quantized tensors."""
    runtime = runtime_of(args) or runtime_of(kwargs.values())
    for position, key in enumerate(("input", "other")):
        if len(args) == position and key in kwargs:
            args, kwargs = (
                (*args, kwargs[key]),
                {name: value for name, value in kwargs.items() if name != key},
            )
    name = function_name(function)
    outer, runtime.calling = runtime.calling, name
    if not is_in_place(function, kwargs):
        result = _run(runtime, name, function, args, kwargs)
    elif isinstance(args[0], QTensor):
        result = args[0]
        result.overwrite(_result_of_in_place(runtime, name, function, args, kwargs), name)
    elif function.__name__.startswith("__i"):  # t += x only names the sum t
        result = _run(runtime, name, function, args, kwargs)
    else:  # an ordinary tensor is written to
        result = runtime.in_float(function, args, kwargs)
    runtime.calling = outer
    return result


def _run(runtime: "Runtime", name: str, function: Callable, args: tuple, kwargs: dict):
    handler = HANDLERS.get(name)
    return (
        runtime.in_float(function, args, kwargs)
        if handler is None
        else handler(runtime, function, args, kwargs)
    )


def _result_of_in_place(
    runtime: "Runtime", name: str, function: Callable, args: tuple, kwargs: dict
) -> QTensor:
    """What a function in place will write into its first argument, which is not changed here."""
    if name == "__setitem__" and isinstance(args[2], (int, float)) and args[2] == 0:
        return _with_zeros(*args[:2])
    instead = out_of_place(function, name)
    if instead is not None:
        return _run(
            runtime, name, instead, args, {key: value for key, value in kwargs.items() if key != "inplace"}
        )
    written = QTensor(args[0].real().clone(), None, runtime)
    runtime.in_float(function, (written, *args[1:]), kwargs)
    return written


def _with_zeros(x: QTensor, index: Any) -> QTensor:
    """x with zeros at x[index], which are exact on any scale."""
    mask = torch.ones(x.shape, device=x.device)
    mask[to_real(index)] = 0
    return x.moved(primitives.mask(x.q, mask), x.scale)


def arguments(args: tuple, kwargs: dict, names: Iterable[str]) -> dict[str, Any]:
    """The given arguments behind the first one, by name."""
    return {**dict(zip(names, args[1:])), **kwargs}


def to_real(argument: Any) -> Any:
    """The argument with every quantized tensor in it replaced by its values."""
    if isinstance(argument, QTensor):
        return argument.real()
    if isinstance(argument, (list, tuple)):
        return type(argument)(to_real(item) for item in argument)
    if isinstance(argument, dict):
        return {key: to_real(item) for key, item in argument.items()}
    return argument


# ----------------------------------------------------------------------------------------------------- layout


def collapse(scale: Tensor) -> Tensor:
    """Undo an expansion: dimensions along which the entries are one and the same shrink to size 1."""
    for dim, (size, stride) in enumerate(zip(scale.shape, scale.stride())):
        if size > 1 and stride == 0:
            scale = scale.narrow(dim, 0, 1)
    return scale


@handles(
    "permute",
    "transpose",
    "t",
    "unsqueeze",
    "squeeze",
    "movedim",
    "chunk",
    "split",
    "narrow",
    "select",
    "__getitem__",
    "expand",
    "unbind",
    "flip",
    "contiguous",
    "clone",
)
def _view(runtime, function, args, kwargs):
    """Layout functions that are views, or cheap copies, of numbers and scale alike."""
    x = args[0]
    q = function(x.q, *args[1:], **kwargs)
    many = isinstance(q, (list, tuple))
    parts = q if many else (q,)
    if x.scale is None or x.scale.ndim == 0 or function_name(function) in ("contiguous", "clone"):
        scales = [x.scale] * len(parts)
    else:
        scale = function(x.scale.expand(x.q.shape), *args[1:], **kwargs)
        scales = [collapse(part) for part in (scale if many else (scale,))]
    views = [x.moved(part, scale) for part, scale in zip(parts, scales)]
    x.share(views)
    return type(q)(views) if many else views[0]


def reshape_scale(scale: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """A scale broadcastable to shape `old`, for the same numbers in shape `new`; only as large as it must be.

    The two shapes are cut into runs of equal size. A run over which the scale is constant stays of size 1.
    """
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        left, right = i, j
        a = b = 1
        while True:
            if i < len(old) and (a <= b or j >= len(new)):
                a *= old[i]
                i += 1
            elif j < len(new):
                b *= new[j]
                j += 1
            if a == b and (i > left or i >= len(old)) and (j > right or j >= len(new)):
                break
        groups.append((left, i, right, j))
    middle, target = [], []
    for left, i, right, j in groups:
        constant = all(scale.shape[d] == 1 for d in range(left, i))
        middle += [1] * (i - left) if constant else list(old[left:i])
        target += [1] * (j - right) if constant else list(new[right:j])
    return scale.expand(middle).reshape(target)


@handles("reshape", "view", "flatten", "unflatten", "reshape_as", "view_as")
def _reshape(runtime, function, args, kwargs):
    x = args[0]
    q = (
        function(x.q, *[to_real(a) for a in args[1:]], **kwargs)
        if function_name(function) != "view"
        else x.q.reshape(*args[1:], **kwargs)
    )
    scale = x.scale
    if scale is not None and scale.ndim:
        scale = reshape_scale(scale, x.q.shape, q.shape)
    view = x.moved(q, scale)
    x.share([view])
    return view


_ARGUMENTS_OF_MOVES = {
    "roll": ("shifts", "dims"),
    "index_select": ("dim", "index"),
    "repeat_interleave": ("repeats", "dim"),
}


@handles(*_ARGUMENTS_OF_MOVES)
def _along_dims(runtime, function, args, kwargs):
    """Copies that move positions about: the scale must not vary along the dimension they touch."""
    x = args[0]
    given = arguments(args, kwargs, _ARGUMENTS_OF_MOVES[function_name(function)])
    dims = given.get("dims", given.get("dim"))
    if dims is None:  # of the tensor as one row
        return runtime.in_float(function, args, kwargs)
    x = runtime.one_scale_along(x, [dims] if isinstance(dims, int) else dims)
    return x.moved(function(x.q, *args[1:], **kwargs), x.scale)


@handles("pad")
def _pad(runtime, function, args, kwargs):
    x, padding = args[0], args[1] if len(args) > 1 else kwargs["pad"]
    mode = kwargs.get("mode", args[2] if len(args) > 2 else "constant")
    value = kwargs.get("value", args[3] if len(args) > 3 else None)
    touched = [x.ndim - 1 - i for i in range(len(padding) // 2) if padding[2 * i] or padding[2 * i + 1]]
    if (mode == "constant" and value not in (None, 0, 0.0)) or mode not in (
        "constant",
        "replicate",
        "reflect",
        "circular",
    ):
        return runtime.in_float(function, args, kwargs)
    x = runtime.one_scale_along(x, touched)
    return x.moved(F.pad(x.q, list(padding), mode=mode), x.scale)


@handles("pixel_shuffle", "pixel_unshuffle")
def _shuffle(runtime, function, args, kwargs):
    """The scales move with their numbers: a scale per channel becomes one per channel and position in the
    cell."""
    x = args[0]
    scale = x.scale
    if scale is not None and scale.ndim:
        scale = function(scale.expand(1, *x.q.shape[1:]), *args[1:], **kwargs)
    return x.moved(function(x.q, *args[1:], **kwargs), scale)


@handles("unfold", "sum", "mean", "max_pool2d", "avg_pool2d", "upsample_nearest2d")
def _mixing_channels(runtime, function, args, kwargs):
    """Functions that bring numbers of different channels together: on one scale for the whole tensor
    first."""
    x = args[0]
    name = function_name(function)
    if name in ("mean", "avg_pool2d"):
        return (
            runtime.in_float(function, args, kwargs)
            if x.is_integer
            else x.like(function(x.q, *args[1:], **kwargs), None)
        )
    x = runtime.one_scale_along(x, range(x.ndim))
    return x.like(function(x.q, *args[1:], **kwargs), x.scale)


@handles("zeros_like")
def _zeros_like(runtime, function, args, kwargs):
    x = args[0]
    return x.like(torch.zeros_like(x.q), x.scale)


@handles("cat", "stack")
def _cat(runtime, function, args, kwargs):
    parts = list(args[0])
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    first = next(part for part in parts if isinstance(part, QTensor))
    if not all(isinstance(part, QTensor) and part.latent for part in parts):
        first = first.like(first.q, first.scale)
    if any(isinstance(part, QTensor) and not part.is_integer for part in parts):
        return first.moved(function([to_real(part) for part in parts], dim), None)
    parts = [part if isinstance(part, QTensor) else runtime.constant(part) for part in parts]
    q = function([part.q for part in parts], dim)
    scales = [part.scale for part in parts]
    if all(scale is scales[0] for scale in scales) and scales[0].ndim == 0:
        return first.moved(q, scales[0])
    if function_name(function) == "stack":
        dim = dim % q.ndim
        full = [part.full_scale().unsqueeze(dim) for part in parts]
        sizes = [1] * len(parts)
    else:
        dim = dim % q.ndim
        full = [part.full_scale() for part in parts]
        sizes = [part.shape[dim] for part in parts]
    shape = [max(scale.shape[d] for scale in full) for d in range(q.ndim)]
    expanded = [scale.expand(*shape[:dim], size, *shape[dim + 1 :]) for scale, size in zip(full, sizes)]
    return first.moved(q, torch.cat(expanded, dim))


# ----------------------------------------------------------------------- arithmetic that is exact on the spot


@handles("neg")
def _neg(runtime, function, args, kwargs):
    x = args[0]
    return x.like(primitives.negative(x.q), x.scale)


@handles("abs")
def _abs(runtime, function, args, kwargs):
    x = args[0]
    return x.like(primitives.absolute(x.q), x.scale)


@handles("relu", "relu6")
def _relu(runtime, function, args, kwargs):
    x = args[0]
    if function_name(function) == "relu6":
        return runtime.function("relu6", {}, (x,))
    return x.like(primitives.clamp(x.q, 0, None), x.scale)


@handles("mul", "div")
def _mul(runtime, function, args, kwargs):
    a, b = args[0], args[1]
    if function_name(function) == "div":
        if not isinstance(a, QTensor) or isinstance(b, QTensor) or kwargs.get("rounding_mode") is not None:
            return runtime.in_float(function, args, kwargs)
        b = 1 / b
    if not isinstance(a, QTensor):
        a, b = b, a
    if isinstance(b, Tensor) and b.ndim == 0 and not b.requires_grad:
        b = float(b)
    if isinstance(b, (int, float)):
        if not a.is_integer:
            return a.like(a.q * b, None)
        if b == 0:
            return a.like(torch.zeros_like(a.q), a.scale)
        return a.like(a.q if b > 0 else primitives.negative(a.q), a.scale * abs(float(b)))
    if (
        isinstance(b, Tensor)
        and not b.requires_grad
        and b.ndim == a.ndim
        and b.numel() == b.shape[0]
        and bool((b > 0).all())
    ):
        # one factor an image, a variable-rate codec's gain: it goes into the scale
        return a.moved(a.q, a.full_scale() * b.double()) if a.is_integer else a.moved(a.q * b, None)
    if isinstance(b, Tensor) and not b.requires_grad and bool(((b == 0) | (b == 1)).all()):
        return a.moved(primitives.mask(a.q, b), a.scale)
    return runtime.function("mul", {}, (a, b))


@handles("add", "sub")
def _add(runtime, function, args, kwargs):
    a, b = args[0], args[1]
    if kwargs.get("alpha", 1) != 1:
        b = b * kwargs["alpha"]
    if function_name(function) == "sub":
        b = -b
    if not isinstance(a, QTensor):
        a, b = b, a
    if isinstance(b, (int, float)) and b == 0:
        return a.same()
    return runtime.function("add", {}, (a, b))


# -------------------------------------------------------------- functions with an integer algorithm of theirs


@handles("matmul")
def _matmul(runtime, function, args, kwargs):
    if not all(isinstance(a, QTensor) for a in args[:2]):
        return runtime.in_float(function, args, kwargs)
    return runtime.function("matmul", {}, args[:2])


@handles("softmax")
def _softmax(runtime, function, args, kwargs):
    dim = arguments(args, kwargs, ["dim"]).get("dim")
    if dim is None:  # as torch.nn.functional.softmax chooses it
        dim = 0 if args[0].ndim in (0, 1, 3) else 1
    return runtime.function("softmax", {"dim": dim}, (args[0],))


@handles("leaky_relu")
def _leaky_relu(runtime, function, args, kwargs):
    slope = kwargs.get("negative_slope", args[1] if len(args) > 1 else 0.01)
    return runtime.function("leaky_relu", {"slope": slope}, (args[0],))


@handles("gelu")
def _gelu(runtime, function, args, kwargs):
    approximate = kwargs.get("approximate", args[1] if len(args) > 1 else "none")
    return runtime.function("gelu" if approximate == "none" else "gelu_tanh", {}, (args[0],))


_OPTIONS_OF_TABLES = {"elu": {"alpha": 1.0}, "softplus": {"beta": 1.0, "threshold": 20.0}}


@handles(
    "sigmoid",
    "tanh",
    "silu",
    "softplus",
    "exp",
    "elu",
    "hardswish",
    "hardsigmoid",
    "mish",
    "square",
    "sqrt",
    "log",
)
def _table(runtime, function, args, kwargs):
    """The table of a function with its arguments, of which the node keeps those that are not the defaults."""
    name = function_name(function)
    defaults = _OPTIONS_OF_TABLES.get(name, {})
    given = arguments(args, kwargs, defaults)
    given.pop("inplace", None)
    known = given.keys() <= defaults.keys() and len(args) <= 1 + len(defaults)
    if not known or not all(isinstance(value, (int, float)) for value in given.values()):
        return runtime.in_float(function, args, kwargs)
    options = {key: float(value) for key, value in given.items() if value != defaults[key]}
    return runtime.function(name, options, (args[0],))


@handles("pow")
def _pow(runtime, function, args, kwargs):
    exponent = arguments(args, kwargs, ["exponent"]).get("exponent")
    if not isinstance(args[0], QTensor) or not isinstance(exponent, (int, float)) or exponent != 2:
        return runtime.in_float(function, args, kwargs)
    return runtime.function("square", {}, (args[0],))


@handles("clamp")
def _clamp(runtime, function, args, kwargs):
    low = kwargs.get("min", args[1] if len(args) > 1 else None)
    high = kwargs.get("max", args[2] if len(args) > 2 else None)
    x = args[0]
    if not x.is_integer:
        return x.like(x.q.clamp(low, high), None)
    if any(isinstance(limit, (Tensor, QTensor)) for limit in (low, high)):
        return runtime.in_float(function, args, kwargs)
    scale = x.scale.detach()
    low, high = (None if limit is None else torch.round(limit / scale) for limit in (low, high))
    return x.like(primitives.clamp(x.q, low, high), x.scale)


@handles("dropout", "dropout2d")
def _dropout(runtime, function, args, kwargs):
    training = kwargs.get("training", args[2] if len(args) > 2 else True)
    return runtime.in_float(function, args, kwargs) if training else args[0]
