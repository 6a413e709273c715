"""Functions that move the numbers of quantized tensors and compute none: numbers and scale move alike."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from licq.quant.dispatch import arguments, handles
from licq.quant.formulas import Taken
from licq.quant.qtensor import QTensor, Repeated, to_real
from licq.quant.reductions import dims_of, total
from licq.quant.torch_functions import function_name


def collapse(scale: Tensor) -> Tensor:
    """Undo an expansion: dimensions along which the entries are one and the same shrink to size 1."""
    for dim, (size, stride) in enumerate(zip(scale.shape, scale.stride())):
        if size > 1 and stride == 0:
            scale = scale.narrow(dim, 0, 1)
    return scale


_ONE_VIEW = ("permute", "transpose", "t", "unsqueeze", "squeeze", "movedim")


def _moved(scale: Tensor, shape: Sequence[int], function: Callable, args: tuple, kwargs: dict) -> Tensor:
    """The scale of numbers of this shape behind a layout function that gives one tensor."""
    return _taken(scale, collapse(function(_places(scale).expand(shape), *args[1:], **kwargs)))


def _repeated_view(x: QTensor, move: Callable[[Tensor], Tensor], places: Tensor, scale: Tensor) -> QTensor:
    """x behind one more move, its numbers still not computed."""
    assert x.repeated is not None
    repeated = dataclasses.replace(
        x.repeated,
        moves=(*x.repeated.moves, move),
        places=places,
        scale=scale,
        form=move(x.repeated.form),
    )
    return QTensor.of_repeated(repeated, x)


def _places(scale: Tensor) -> Tensor:
    """The number of each entry, of the scale's shape.

    Layout functions move these in place of the scale itself: the gradient of a scale that is expanded to a
    whole feature map would be as large.
    """
    return torch.arange(scale.numel(), device=scale.device).reshape(scale.shape)


def _taken(scale: Tensor, places: Tensor) -> Tensor:
    """The entries of a scale at these places, of their shape."""
    if places.numel() == 1 and scale.numel() == 1:
        return scale.reshape(places.shape)
    return scale.reshape(-1).index_select(0, places.reshape(-1)).reshape(places.shape)


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
    if x.repeated is not None and function_name(function) in _ONE_VIEW:
        places = _moved(x.repeated.places, x.shape, function, args, kwargs)
        scale = x.scale if x.scale.ndim == 0 else _moved(x.scale, x.shape, function, args, kwargs)
        return _repeated_view(x, lambda q: function(q, *args[1:], **kwargs), places, scale)
    q = function(x.q, *args[1:], **kwargs)
    many = isinstance(q, (list, tuple))
    parts = q if many else (q,)
    if x.scale is None or x.scale.ndim == 0 or function_name(function) in ("contiguous", "clone"):
        scales = [x.scale] * len(parts)
    else:
        places = _places(x.scale).expand(x.q.shape)
        moved = function(places, *args[1:], **kwargs)
        scales = [_taken(x.scale, collapse(part)) for part in (moved if many else (moved,))]
    views = [x.moved(part, scale) for part, scale in zip(parts, scales)]
    if function_name(function) == "__getitem__":
        views[0].formula = Taken(x.same(), args[1])
    elif function_name(function) == "clone":
        views[0].formula = x.formula
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
    if x.repeated is not None and function_name(function) in ("reshape", "view", "flatten", "unflatten"):

        def move(q: Tensor) -> Tensor:
            if function_name(function) == "view":
                return q.reshape(*args[1:], **kwargs)
            return function(q, *args[1:], **kwargs)

        new = move(x.repeated.form).shape
        scale = x.scale if x.scale.ndim == 0 else reshape_scale(x.scale, x.shape, new)
        return _repeated_view(x, move, reshape_scale(x.repeated.places, x.shape, new), scale)
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
    if function_name(function) == "index_select" and _worth_deferring(x, dims, given["index"]):
        index = given["index"]
        shape = [1 if axis in (0, dims % x.ndim) else size for axis, size in enumerate(x.shape)]
        places = torch.arange(math.prod(shape), device=x.q.device).reshape(shape)
        form = torch.empty(x.shape, device="meta").narrow(dims, 0, 1)
        form = form.expand([index.numel() if axis == dims % x.ndim else n for axis, n in enumerate(x.shape)])
        gather = partial(torch.index_select, dim=dims, index=index)
        return QTensor.of_repeated(Repeated(x.q, x.scale, (gather,), places, tuple(shape), form), x)
    return x.moved(function(x.q, *args[1:], **kwargs), x.scale)


_MOST_PLACES = 1 << 15


def _worth_deferring(x: QTensor, dim: int, index: Tensor) -> bool:
    """Whether a gather makes more integers of x, so that they are better quantized before."""
    if not x.is_integer or x.recorder is not None or x.repeated is not None or x.ndim < 2:
        return False
    places = x.shape[1:].numel() // max(1, x.shape[dim])
    return dim % x.ndim != 0 and index.numel() > x.shape[dim] and places <= _MOST_PLACES


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


@handles("unfold", "sum", "max_pool2d", "upsample_nearest2d")
def _mixing_channels(runtime, function, args, kwargs):
    """Functions that bring numbers of different channels together: on one scale for the whole tensor
    first."""
    x = args[0]
    if function_name(function) == "sum" and x.bound:
        given = arguments(args, kwargs, ["dim", "keepdim"])
        return total(runtime, x, dims_of(x, given.get("dim")), bool(given.get("keepdim", False)))
    x = runtime.one_scale_along(x, range(x.ndim))
    q = x.q
    if function_name(function) == "sum" and x.is_integer and not x.recorder:
        q = q.double()  # float32 has no place for large sums
    return x.like(function(q, *args[1:], **kwargs), x.scale)


@handles("gather", "take_along_dim")
def _gather(runtime, function, args, kwargs):
    x, given = args[0], arguments(args, kwargs, ["dim", "index"])
    if function_name(function) == "take_along_dim":
        given = {"index": None, "dim": None, **arguments(args, kwargs, ["index", "dim"])}
    dim, index = given["dim"], given["index"]
    if dim is None or not isinstance(x, QTensor) or not isinstance(index, Tensor):
        return runtime.in_float(function, args, kwargs)
    x = runtime.one_scale_along(x, range(x.ndim))
    return x.moved(function(x.q, *args[1:], **kwargs), x.scale)


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
