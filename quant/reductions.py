"""Handlers of means, moments and normalizations along dimensions.

A mean of wide activations is an exact sum on a smaller scale. A second moment is a sum of exact squares: its
integers keep all their bits (`QTensor.bound`) until a root or a quotient reads them, so that small numbers
have a small relative error.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from licq.quant import primitives
from licq.quant.dispatch import Forward, arguments, handles
from licq.quant.qtensor import QTensor, to_real
from licq.quant.torch_functions import SQUARE_BITS, function_name

_LARGEST_SUM = 2**30
LARGEST_WIDE = 2**15
_PART = 32
"""Of so many numbers a sum is taken before bits are dropped."""


def dims_of(x: QTensor, dim: int | Iterable[int] | None) -> list[int]:
    """Dimensions as they are counted from the front; None: all."""
    if dim is None:
        return list(range(x.ndim))
    return [d % x.ndim for d in ([dim] if isinstance(dim, int) else dim)] or list(range(x.ndim))


def squared(runtime: Forward, x: QTensor) -> QTensor:
    """x * x with all its bits."""
    y = runtime.function("squared", {}, (x,))
    y.bound = (2 ** (SQUARE_BITS - 1)) ** 2
    return y


def total(runtime: Forward, x: QTensor, dims: list[int], keepdim: bool, divisor: float = 1.0) -> QTensor:
    """The sum along dimensions, divided by a number: exact, where 31 bits hold it."""
    bound = x.bound
    if not bound:
        x = runtime.function("carrier", {}, (x,))
    if not x.is_integer:
        y = x.like(x.q.sum(dims, keepdim) / divisor, None)
        y.bound = bound
        return y
    q, unit, size = x.q, x.unit, bound or LARGEST_WIDE
    q = q if x.recorder else q.double()
    for d in sorted(dims, reverse=True):
        q, unit, size = _summed(q, d, unit, size)
    if not keepdim:
        for d in sorted(dims, reverse=True):
            q = q.squeeze(d)
    y = x.like(q, unit / divisor)
    y.bound = size if bound else 0
    return y


def _summed(q: Tensor, dim: int, unit: Tensor, size: int) -> tuple[Tensor, Tensor, int]:
    """The sum along a dimension, which stays with length 1, its unit and its largest magnitude.

    Sums of many numbers are sums of sums. Bits are dropped from sums, not from the numbers, so that many
    small numbers do not all become zero.
    """
    while (count := q.shape[dim]) > 1:
        q, unit, size = fitting(q, unit, size, min(count, _PART))
        part = min(count, _LARGEST_SUM // size)
        whole = count // part * part
        parts = q.narrow(dim, 0, whole).unflatten(dim, (whole // part, part)).sum([dim + 1], True)
        rest = [q.narrow(dim, whole, count - whole).sum([dim], True)] if count > whole else []
        parts = parts.squeeze(dim + 1)
        q, size = torch.cat([parts, *rest], dim) if rest else parts, size * part
    return q, unit, size


def fitting(q: Tensor, unit: Tensor, size: int, count: float) -> tuple[Tensor, Tensor, int]:
    """The numbers, their unit and largest magnitude, without the bits by which `count` of them could pass
    the largest sum."""
    if size * count <= _LARGEST_SUM:
        return q, unit, size
    drop = 1
    while ((size >> drop) + 1) * count > _LARGEST_SUM:
        drop += 1
    return primitives.rescale(q, 2.0**-drop), unit * 2.0**drop, (size >> drop) + 1


def mean(runtime: Forward, x: QTensor, dims: list[int], keepdim: bool = True) -> QTensor:
    """The mean along dimensions."""
    return total(runtime, x, dims, keepdim, math.prod(x.shape[d] for d in dims))


def variance(runtime: Forward, x: QTensor, dims: list[int], keepdim: bool, correction: float) -> QTensor:
    """The second moment about the mean, over count - correction."""
    count = math.prod(x.shape[d] for d in dims)
    squares = squared(runtime, x - mean(runtime, x, dims))
    return total(runtime, squares, dims, keepdim, max(count - correction, 0) or math.nan)


def root(runtime: Forward, v: QTensor, inverse: bool = False) -> QTensor:
    """sqrt(v), or 1 / sqrt(v), of a second moment; a quotient by it reads v itself."""
    y = runtime.function("root", {"inverse": inverse}, (v,))
    y.root = v.same(), inverse
    return y


def normalized(runtime: Forward, x: QTensor, dims: list[int], eps: float, centered: bool) -> QTensor:
    """x, less its mean where it is `centered`, over the root of its second moment plus eps."""
    if centered:
        x = x - mean(runtime, x, dims)
    moment = mean(runtime, squared(runtime, x), dims) + eps
    return runtime.function("div_root", {}, (x, moment))


def affine(runtime: Forward, x: QTensor, gain: Tensor | None, offset: Tensor | None, dim: int) -> QTensor:
    """x * gain + offset with constants for each channel."""
    if gain is None and offset is None:
        return x
    shape = gain.shape if gain is not None else offset.shape  # type: ignore[union-attr]
    gain = torch.ones(shape, device=x.device) if gain is None else gain
    offset = torch.zeros(shape, device=x.device) if offset is None else offset
    return runtime.function("affine", {"dim": dim}, (x, gain, offset))


def _constant(*parts) -> bool:
    return not any(isinstance(part, QTensor) for part in parts)


# ----------------------------------------------------------------------------------------- means and moments


@handles("mean")
def _mean(runtime, function, args, kwargs):
    given = arguments(args, kwargs, ["dim", "keepdim"])
    x = args[0]
    return mean(runtime, x, dims_of(x, given.get("dim")), bool(given.get("keepdim", False)))


@handles("var", "std", "var_mean", "std_mean")
def _spread(runtime, function, args, kwargs):
    name, x = function_name(function), args[0]
    given = arguments(args, kwargs, ["dim", "unbiased", "keepdim"])
    dim, correction = given.get("dim"), given.get("correction")
    if isinstance(dim, bool):  # x.var(unbiased)
        given["unbiased"], dim = dim, None
    if correction is None:
        correction = 1 if given.get("unbiased", True) in (True, None) else 0
    dims, keepdim = dims_of(x, dim), bool(given.get("keepdim", False))
    v = variance(runtime, x, dims, keepdim, float(correction))
    spread = root(runtime, v) if name.startswith("std") else v
    return (spread, mean(runtime, x, dims, keepdim)) if name.endswith("mean") else spread


@handles("norm", "linalg_norm")
def _norm(runtime, function, args, kwargs):
    x, given = args[0], arguments(args, kwargs, ["p", "dim", "keepdim"])
    order, dim = given.get("p", given.get("ord", 2)), given.get("dim")
    whole = function_name(function) == "linalg_norm" and order is not None and not isinstance(dim, int)
    if whole or order not in (None, 2, "fro") or given.get("dtype") is not None:
        return runtime.in_float(function, args, kwargs)
    dims, keepdim = dims_of(x, dim), bool(given.get("keepdim", False))
    return root(runtime, total(runtime, squared(runtime, x), dims, keepdim))


@handles("normalize")
def _normalize(runtime, function, args, kwargs):
    x, given = args[0], arguments(args, kwargs, ["p", "dim", "eps", "out"])
    if given.get("p", 2.0) != 2:
        return runtime.in_float(function, args, kwargs)
    dims = dims_of(x, given.get("dim", 1))
    energy = total(runtime, squared(runtime, x), dims, True)
    return runtime.function("div_root", {}, (x, energy.clamp(min=given.get("eps", 1e-12) ** 2)))


# ------------------------------------------------------------------------------------------- normalizations


@handles("batch_norm")
def _batch_norm(runtime, function, args, kwargs):
    names = ["running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"]
    x, given = args[0], arguments(args, kwargs, names)
    average, spread, gain, offset = (given.get(name) for name in names[:4])
    parts = (average, spread, gain, offset)
    if (
        not isinstance(x, QTensor)
        or average is None
        or spread is None
        or given.get("training")
        or not _constant(*parts)
    ):
        return runtime.in_float(function, args, kwargs)  # statistics of the batch
    factor = torch.rsqrt(spread.double() + given.get("eps", 1e-5))
    factor = factor if gain is None else factor * gain.double()
    shift = -average.double() * factor
    return affine(runtime, x, factor, shift if offset is None else shift + offset.double(), 1)


@handles("group_norm")
def _group_norm(runtime, function, args, kwargs):
    x, given = args[0], arguments(args, kwargs, ["num_groups", "weight", "bias", "eps"])
    gain, offset = given.get("weight"), given.get("bias")
    if not isinstance(x, QTensor) or not _constant(gain, offset):
        return runtime.in_float(function, args, kwargs)
    rows = x.reshape(x.shape[0], given["num_groups"], -1)
    y = normalized(runtime, rows, [2], given.get("eps", 1e-5), True).reshape(x.shape)
    return affine(runtime, y, gain, offset, 1)


@handles("instance_norm")
def _instance_norm(runtime, function, args, kwargs):
    names = ["running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"]
    x, given = args[0], arguments(args, kwargs, names)
    gain, offset = given.get("weight"), given.get("bias")
    if not isinstance(x, QTensor) or not _constant(gain, offset):
        return runtime.in_float(function, args, kwargs)
    if not given.get("use_input_stats", True):
        return F.batch_norm(x, *(given.get(name) for name in names[:4]), eps=given.get("eps", 1e-5))  # type: ignore[misc]
    y = normalized(runtime, x, list(range(2, x.ndim)), given.get("eps", 1e-5), True)
    return affine(runtime, y, gain, offset, 1)


@handles("layer_norm", "rms_norm")
def _layer_norm(runtime, function, args, kwargs):
    centered = function_name(function) == "layer_norm"
    names = ["normalized_shape", "weight", *(["bias"] if centered else []), "eps"]
    x, given = args[0], arguments(args, kwargs, names)
    gain, offset = given.get("weight"), given.get("bias")
    if not isinstance(x, QTensor) or not _constant(gain, offset):
        return runtime.in_float(function, args, kwargs)
    eps = given.get("eps", 1e-5 if centered else None)
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    count = len(given["normalized_shape"])
    y = normalized(runtime, x, list(range(x.ndim - count, x.ndim)), eps, centered)
    if count == 1:
        return affine(runtime, y, gain, offset, x.ndim - 1)
    y = y if gain is None else y * to_real(gain)
    return y if offset is None else y + to_real(offset)
