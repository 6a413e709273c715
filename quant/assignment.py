"""Item assignment, constant tensors and rounding, as the forwards of context models write them."""

from typing import Any

import torch
from torch import Tensor

from licq.quant import primitives
from licq.quant.dispatch import Forward, arguments, handles
from licq.quant.formulas import (
    Difference,
    Fixed,
    Rounded,
    Taken,
    Written,
    fixed_values,
    is_zero,
    snapshot,
)
from licq.quant.qtensor import QTensor, to_real
from licq.quant.torch_functions import function_name


def fixed(runtime: Any, values: Tensor, like: QTensor) -> QTensor:
    """A tensor that does not depend on the image, in the state of `like`."""
    if not like.is_integer:
        result = QTensor(values, None, runtime)
    elif not bool(torch.any(values != 0)):
        scale = like.scale if like.unit.ndim == 0 or like.shape == values.shape else like.unit.amax()
        result = QTensor(primitives.constant(values, runtime.tracer), scale, runtime)
    else:
        numbers = runtime.constant(values)
        result = QTensor(primitives.constant(numbers.q, runtime.tracer), numbers.scale, runtime)
    result.formula = Fixed(values)
    return result


_FILLS = {"new_zeros": 0.0, "zeros_like": 0.0, "new_ones": 1.0, "ones_like": 1.0}


@handles(*_FILLS, "new_full", "full_like", "new_tensor")
def _constant(runtime, function, args, kwargs):
    name, x = function_name(function), args[0]
    dtype = kwargs.get("dtype")
    if name == "new_tensor" or (dtype is not None and not dtype.is_floating_point):
        options = {"dtype": dtype, "device": x.device}
        if name.endswith("_like"):
            return torch.full(x.shape, _fill(name, args, kwargs), **options)
        return getattr(torch.empty(0, device=x.device), name)(*args[1:], **kwargs)
    if name.endswith("_like"):
        shape, value = x.shape, _fill(name, args, kwargs)
    elif name == "new_full":
        given = arguments(args, kwargs, ["size", "fill_value"])
        shape, value = given["size"], given["fill_value"]
    else:
        sizes = args[1:] or (kwargs["size"],)
        shape = sizes[0] if isinstance(sizes[0], (tuple, list, torch.Size)) else sizes
        value = _FILLS[name]
    return fixed(runtime, torch.full(tuple(shape), float(value), device=x.device), x)


def _fill(name: str, args: tuple, kwargs: dict) -> float:
    return _FILLS[name] if name in _FILLS else arguments(args, kwargs, ["fill_value"])["fill_value"]


# -------------------------------------------------------------------------------------------- item assignment


def ones_at(x: QTensor, index: Any) -> Tensor:
    """1 at x[index] and 0 elsewhere, of size 1 along the first dimensions where it is the same."""
    ones = torch.zeros(x.shape, device=x.device)
    ones[to_real(index)] = 1
    for dim in range(max(0, x.ndim - 2)):
        first = ones.narrow(dim, 0, 1)
        if bool((ones == first).all()):
            ones = first
    return ones.contiguous()


def kept(x: QTensor, ones: Tensor) -> QTensor:
    """x where `ones` holds 1, else 0; exact on any scale."""
    if bool(ones.all()):
        return x.same()
    if is_zero(x):
        return x.same()
    values = fixed_values(x)
    if values is not x:
        return fixed(x.runtime, values * ones, x)
    if not bool(ones.any()):
        return fixed(x.runtime, torch.zeros(x.shape, device=x.device), x)
    return x.moved(primitives.mask(x.q, ones), x.scale)


def disjoint_sum(runtime: Forward, a: QTensor, b: QTensor) -> QTensor:
    """a + b, where one is 0 wherever the other is not: exact where both have one scale."""
    if is_zero(a):
        return b.same()
    if is_zero(b):
        return a.same()
    exact = a.is_integer and b.is_integer and a.unit.shape == b.unit.shape and torch.equal(a.unit, b.unit)
    if runtime.observing or a.is_integer != b.is_integer or (a.is_integer and not exact):
        result = runtime.function("add", {}, (a, b))
    else:
        runtime.skip_function("add")
        result = a.like(primitives.add(a.q, b.q), a.scale)
    result.latent = a.latent and b.latent
    return result


@handles("__setitem__")
def _assigned(runtime, function, args, kwargs):
    """x behind x[index] = value."""
    x, index, value = args
    ones = ones_at(x, index)
    rest = kept(x, 1 - ones)
    value = fixed_values(value)
    if isinstance(value, (bool, int, float)) and value == 0:
        return rest
    if not isinstance(value, QTensor):
        values = torch.zeros(x.shape, device=x.device)
        values[to_real(index)] = value
        if isinstance(rest.formula, Fixed):
            return fixed(runtime, rest.formula.values + values, x)
        return runtime.function("add", {}, (rest, values))
    return disjoint_sum(runtime, rest, _placed(runtime, x, index, ones, value))


def _placed(runtime: Forward, x: QTensor, index: Any, ones: Tensor, value: QTensor) -> QTensor:
    """A tensor of x's shape that holds the value at `index`, and 0 elsewhere."""
    taken = value.formula
    if isinstance(taken, Taken) and taken.x.shape == x.shape and _same_index(taken.index, index):
        return kept(taken.x, ones)
    order = torch.arange(x.numel(), device=x.device).reshape(x.shape)[to_real(index)]
    if order.numel() == x.numel() and torch.equal(order.flatten(), torch.arange(x.numel(), device=x.device)):
        return value.expand(order.shape).reshape(x.shape)
    value = runtime.one_scale_along(value, range(value.ndim))
    flat = value.expand(order.shape).reshape(-1)
    nothing = fixed(runtime, torch.zeros(1, device=x.device), flat)
    gather = torch.full((x.numel(),), order.numel(), device=x.device)
    gather[order.flatten()] = torch.arange(order.numel(), device=x.device)
    both = flat.moved(torch.cat([flat.q, nothing.q]), flat.scale)
    return both.moved(both.q.index_select(0, gather).reshape(x.shape), flat.scale)


def _same_index(a: Any, b: Any) -> bool:
    plain = (slice, int, type(None), type(Ellipsis))
    a, b = (index if isinstance(index, tuple) else (index,) for index in (a, b))
    return all(isinstance(part, plain) for part in (*a, *b)) and a == b


@handles("masked_fill")
def _masked_fill(runtime, function, args, kwargs):
    given = arguments(args, kwargs, ["mask", "value"])
    mask, value = fixed_values(given["mask"]), given["value"]
    if isinstance(mask, QTensor) or not isinstance(value, (int, float)) or value != 0:
        return runtime.in_float(function, args, kwargs)
    return kept(args[0], (~mask.bool()).to(torch.float32).expand(args[0].shape[-mask.ndim :]))


# -------------------------------------------------------------------------------------------------- rounding


@handles("round")
def _round(runtime, function, args, kwargs):
    """round(x - means) is the rounding of x about its means, a boundary of the codec."""
    if len(args) > 1 or kwargs:
        return runtime.in_float(function, args, kwargs)
    x = args[0]
    formula = x.formula
    about: tuple[Any, ...] = (x,)
    if isinstance(formula, Difference):
        about = (formula.a, formula.b.values if isinstance(formula.b, Written) else formula.b)
    symbols, decoded = runtime.function("round", {}, about)
    symbols.latent = decoded.latent = True
    if isinstance(formula, Difference):
        decoded_then = snapshot(decoded)
        assert isinstance(decoded_then, QTensor)
        symbols.formula = Rounded(formula.b, decoded_then)
    return symbols
