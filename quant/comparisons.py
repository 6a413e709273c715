"""Handlers of comparisons, of what is chosen by them, and of minimum and maximum."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from licq.quant import primitives
from licq.quant.dispatch import Forward, arguments, handles
from licq.quant.qtensor import QTensor, to_real
from licq.quant.torch_functions import function_name
from licq.support.errors import InputError

_MIRRORED = {"gt": "lt", "ge": "le", "lt": "gt", "le": "ge", "eq": "eq", "ne": "ne"}
_FARTHEST = 2.0**30


def boolean(like: QTensor, q: Tensor) -> QTensor:
    """0 and 1, as integers of the scale 1 where `like` is integer."""
    scale = torch.ones((), dtype=torch.float64, device=like.device) if like.is_integer else None
    result = like.like(q, scale)
    result.boolean = True
    return result


@handles("gt", "ge", "lt", "le", "eq", "ne")
def _compare(runtime, function, args, kwargs):
    name, (a, b) = function_name(function), args[:2]
    if not isinstance(a, QTensor):
        name, a, b = _MIRRORED[name], b, a
    if isinstance(b, Tensor) and b.ndim == 0:
        b = float(b)
    if isinstance(b, str) or b is None or len(args) > 2:
        return runtime.in_float(function, args, kwargs)
    if not isinstance(b, (int, float)):
        # the difference is a wide activation
        a, b = runtime.function("add", {}, (a, -b)), 0
    if not a.is_integer:
        return boolean(a, getattr(torch, name)(a.q, b).float())
    bits = _steps_above(a, name, float(b))
    return boolean(a, bits if a.recorder else bits.detach().float())  # as in PyTorch, without a gradient


def _steps_above(a: QTensor, name: str, limit: float) -> Tensor:
    """0 or 1 for each number of a: whether it compares so with the limit. Exact on the integers of a."""
    steps = limit / a.unit.detach()
    if name in ("eq", "ne"):
        distance = primitives.absolute(_less(a, torch.round(steps)))
        unequal = primitives.clamp(distance, 0, 1)
        return unequal if name == "ne" else _complement(unequal, a)
    # x > c: at least the next integer above c; x >= c: at least the first one that is not below c
    first = torch.floor(steps) + 1 if name in ("gt", "le") else torch.ceil(steps)
    above = primitives.clamp(_less(a, first - 1), 0, 1)
    return above if name in ("gt", "ge") else _complement(above, a)


def _less(a: QTensor, steps: Tensor) -> Tensor:
    steps = steps.clamp(-_FARTHEST, _FARTHEST)
    return primitives.add(a.q if a.recorder else a.q.double(), primitives.constant(-steps, a.recorder))


def _complement(bits: Tensor, a: QTensor) -> Tensor:
    one = primitives.constant(torch.ones((), dtype=torch.float64, device=a.device), a.recorder)
    return primitives.subtract(one, bits)


@handles("logical_and", "logical_or", "logical_xor", "logical_not")
def _logic(runtime, function, args, kwargs):
    name, operands = function_name(function), list(args[:2])
    if not all(isinstance(x, QTensor) and x.boolean for x in operands if isinstance(x, QTensor)):
        return runtime.in_float(function, args, kwargs)
    like = next(x for x in operands if isinstance(x, QTensor))
    if not like.is_integer:
        return boolean(like, getattr(torch, name)(*(to_real(x) for x in operands)).float())
    bits = [
        x.q if isinstance(x, QTensor) else primitives.constant(torch.as_tensor(x).double(), like.recorder)
        for x in operands
    ]
    if name == "logical_not":
        return boolean(like, _complement(bits[0], like))
    a, b = bits
    if name == "logical_and":
        return boolean(like, primitives.product(a, b))
    total = primitives.add(a, b)
    if name == "logical_or":
        return boolean(like, primitives.clamp(total, 0, 1))
    both = primitives.product(a, b)
    return boolean(like, primitives.subtract(total, primitives.add(both, both)))


@handles("float", "type_as", "to", "double")
def _converted(runtime, function, args, kwargs):
    """Another type or device: quantized tensors have one."""
    x, given = args[0], [*args[1:], *kwargs.values()]
    types = [part for part in given if isinstance(part, torch.dtype)]
    if not isinstance(x, QTensor) or any(not kind.is_floating_point for kind in types):
        return runtime.in_float(function, args, kwargs)
    same = x.same()
    if x.boolean and (types or function_name(function) in ("float", "double") or _floats(given)):
        same.boolean = False
    return same


def _floats(given: list) -> bool:
    return any(isinstance(x, QTensor) or isinstance(x, Tensor) and x.is_floating_point() for x in given)


@handles("where")
def _where(runtime, function, args, kwargs):
    given = arguments((None, *args), kwargs, ["condition", "input", "other"])
    condition, a, b = (given.get(key) for key in ("condition", "input", "other"))
    if function is torch.Tensor.where:  # x.where(condition, other)
        condition, a = a, condition
    if a is None or b is None or isinstance(condition, QTensor) and not condition.boolean:
        return runtime.in_float(function, args, kwargs)
    numbers = [x.item() if isinstance(x, Tensor) and x.ndim == 0 else x for x in (a, b)]
    return runtime.function("where", {}, (condition, *numbers))


class Chosen(NamedTuple):
    """What `torch.max` gives along a dimension."""

    values: Any
    indices: Any


class Unread:
    """In the place of indices, which have no integer form: reading them is an error."""

    def __getattr__(self, name: str) -> Any:
        raise InputError("licq cannot run this network: it reads the indices of a minimum or maximum")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise InputError("licq cannot run this network: it reads the indices of a minimum or maximum")


@handles("maximum", "minimum", "max", "min", "amax", "amin")
def _extremum(runtime: Forward, function, args, kwargs):
    name = function_name(function)
    largest = "max" in name
    given = arguments(args, kwargs, ["other" if name.endswith("imum") else "dim", "keepdim"])
    other = given.get("other", given.get("dim"))
    if isinstance(other, (Tensor, QTensor)):
        a, b = (args[0], other) if isinstance(args[0], QTensor) else (other, args[0])
        return runtime.function("maximum" if largest else "minimum", {}, (a, b))
    x, keepdim = args[0], bool(given.get("keepdim", False))
    dims = list(range(x.ndim)) if other in (None, ()) else [other] if isinstance(other, int) else list(other)
    if kwargs.get("out") is not None:
        return runtime.in_float(function, args, kwargs)
    x = runtime.one_scale_along(x, dims)
    values = x.moved(
        x.q.amax(dims, keepdim) if largest else x.q.amin(dims, keepdim),
        x.scale if x.scale is None or x.scale.ndim == 0 else x.scale.amax(dims, keepdim),
    )
    return Chosen(values, Unread()) if name in ("max", "min") and other is not None else values
