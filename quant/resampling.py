"""Handlers of interpolation, pooling and cumulative sums.

Each is a linear map along each axis. Its weights are integers: multiples of their smallest one, where they
are, so that the result is exact on a smaller scale; else fixed-point numbers of `WEIGHT_BITS`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from licq.quant import primitives
from licq.quant.dispatch import Forward, arguments, handles
from licq.quant.qtensor import QTensor
from licq.quant.reductions import LARGEST_WIDE, fitting, mean
from licq.quant.sums import matmul

WEIGHT_BITS = 12


class AxisMap:
    """A linear map of numbers along one axis, by few taps for each result.

    Args:
        weights: (inputs, outputs), float64.

    Attributes:
        indexes: (taps, outputs), int64. steps: (taps, outputs), integers. unit: what they are multiples of.
        gain: the largest sum of magnitudes of the steps of a result.
    """

    def __init__(self, weights: Tensor):
        taps = max(1, int((weights != 0).sum(0).max()))
        order = torch.argsort((weights != 0).to(torch.uint8), dim=0, descending=True, stable=True)[:taps]
        chosen = weights.gather(0, order)
        self.unit = float(chosen[chosen != 0].abs().min())
        self.steps = torch.round(chosen / self.unit)
        exact = float((chosen / self.unit - self.steps).abs().max()) < 1e-6
        if not exact or float(self.steps.abs().max()) > 2**WEIGHT_BITS:
            self.unit = 2.0**-WEIGHT_BITS
            self.steps = torch.round(chosen / self.unit)
            # the weights of a result keep their sum, so that a constant stays one
            rest = torch.round(chosen.sum(0) / self.unit) - self.steps.sum(0)
            largest = chosen.abs().argmax(0, keepdim=True)
            self.steps.scatter_add_(0, largest, rest[None])
        self.indexes = order
        self.gain = int(self.steps.abs().sum(0).max())

    @property
    def only_moves(self) -> bool:
        return len(self.indexes) == 1 and self.unit == 1 and bool((self.steps == 1).all())

    def __call__(self, q: Tensor, x: QTensor, axis: int) -> Tensor:
        """The map of integers along an axis."""
        result = None
        for index, steps in zip(self.indexes, self.steps):
            part = q.index_select(axis, index.to(x.device))
            if not bool((steps == 1).all()):
                shape = [-1 if d == axis else 1 for d in range(x.ndim)]
                part = primitives.product(
                    part, primitives.constant(steps.reshape(shape).to(x.device), x.recorder)
                )
            result = part if result is None else primitives.add(result, part)
        assert result is not None
        return result


def resampled(runtime: Forward, x: QTensor, maps: dict[int, AxisMap]) -> QTensor:
    """x mapped along each axis, on one scale."""
    if all(found.only_moves for found in maps.values()):
        x = runtime.one_scale_along(x, maps)
        q = x.q
        for axis, found in maps.items():
            q = found(q, x, axis)
        return x.moved(q, x.scale)
    x = runtime.function("carrier", {}, (x,))
    if not x.is_integer:
        raise AssertionError("real numbers are resampled by PyTorch")
    q, unit, size = x.q if x.recorder else x.q.double(), x.unit, LARGEST_WIDE
    for axis, found in maps.items():
        q, unit, size = fitting(q, unit, size, found.gain)
        q, unit, size = found(q, x, axis), unit * found.unit, size * found.gain
    return x.like(q, unit)


def _real(runtime: Forward, x: QTensor, function, args, kwargs, moves: bool) -> QTensor:
    """The same on real numbers, with the node that the integers will have."""
    if moves:
        x = runtime.one_scale_along(x, range(x.ndim))
    else:
        x = runtime.function("carrier", {}, (x,))
    return x.like(function(x.q, *args[1:], **kwargs), None)


def _along_axes(runtime: Forward, x: QTensor, function, args, kwargs, weights: dict[int, Tensor]) -> QTensor:
    """x mapped along axes by matrices (inputs, outputs); an axis of an identity stays."""
    maps = {
        axis: AxisMap(matrix.double())
        for axis, matrix in weights.items()
        if matrix.shape[0] != matrix.shape[1] or not torch.equal(matrix, torch.eye(len(matrix)).to(matrix))
    }
    if not x.is_integer:
        return _real(runtime, x, function, args, kwargs, all(found.only_moves for found in maps.values()))
    return resampled(runtime, x, maps)


def _pair(value, count: int = 2) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value] * count


def _eye(size: int) -> Tensor:
    """(1, size, 1, size): the inputs one by one, as channels of images of one row."""
    return torch.eye(size, dtype=torch.float64).reshape(1, size, 1, size)


# -------------------------------------------------------------------------------------------- interpolation


@handles("interpolate", "upsample")
def _interpolate(runtime, function, args, kwargs):
    names = ["size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias"]
    x, given = args[0], arguments(args, kwargs, names)
    mode = given.get("mode", "nearest")
    modes = ("nearest", "nearest-exact", "bilinear", "bicubic", "area")
    if x.ndim != 4 or mode not in modes:
        return runtime.in_float(function, args, kwargs)
    options = {key: given[key] for key in names[2:] if given.get(key) is not None}
    sizes = None if given.get("size") is None else _pair(given["size"])
    factors = None if given.get("scale_factor") is None else _pair(given["scale_factor"])
    weights = {}
    for number, axis in enumerate((2, 3)):
        where = (
            {"size": (1, int(sizes[number]))}
            if sizes is not None
            else {"scale_factor": (1.0, float(factors[number]))}  # type: ignore[index]
        )
        weights[axis] = F.interpolate(_eye(x.shape[axis]), **where, **options)[0, :, 0]
    return _along_axes(runtime, x, function, args, kwargs, weights)


# ----------------------------------------------------------------------------------------------------- pools


def _blocks(x: QTensor, sides: Sequence[int]) -> QTensor:
    """(B, C, h, sides[0], w, sides[1]): the blocks into which an image falls."""
    batch, channels, height, width = x.shape
    return x.reshape(batch, channels, height // sides[0], sides[0], width // sides[1], sides[1])


@handles("avg_pool2d")
def _avg_pool(runtime, function, args, kwargs):
    names = ["kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"]
    x, given = args[0], arguments(args, kwargs, names)
    kernel = _pair(given["kernel_size"])
    stride = _pair(given.get("stride") or kernel)
    padding, ceil_mode = _pair(given.get("padding", 0)), bool(given.get("ceil_mode", False))
    if given.get("divisor_override") is not None or x.ndim != 4:
        return runtime.in_float(function, args, kwargs)
    whole = all(size % side == 0 for size, side in zip(x.shape[2:], kernel))
    if kernel == stride and padding == [0, 0] and whole:
        return mean(runtime, _blocks(x, kernel), [3, 5], keepdim=False)
    weights = {
        axis: F.avg_pool2d(
            _eye(x.shape[axis]),
            (1, kernel[i]),
            (1, stride[i]),
            (0, padding[i]),
            ceil_mode,
            given.get("count_include_pad", True),
        )[0, :, 0]
        for i, axis in enumerate((2, 3))
    }
    return _along_axes(runtime, x, function, args, kwargs, weights)


def _sizes(x: QTensor, output) -> list[int]:
    return [int(size) if given is None else int(given) for given, size in zip(_pair(output), x.shape[2:])]


@handles("adaptive_avg_pool2d")
def _adaptive_avg_pool(runtime, function, args, kwargs):
    x, given = args[0], arguments(args, kwargs, ["output_size"])
    if x.ndim != 4:
        return runtime.in_float(function, args, kwargs)
    sizes = _sizes(x, given["output_size"])
    if all(size % out == 0 for size, out in zip(x.shape[2:], sizes)):
        sides = [size // out for size, out in zip(x.shape[2:], sizes)]
        return mean(runtime, _blocks(x, sides), [3, 5], keepdim=False)
    weights = {
        axis: F.adaptive_avg_pool2d(_eye(x.shape[axis]), (1, out))[0, :, 0]
        for axis, out in zip((2, 3), sizes)
    }
    return _along_axes(runtime, x, function, args, kwargs, weights)


@handles("adaptive_max_pool2d")
def _adaptive_max_pool(runtime, function, args, kwargs):
    x, given = args[0], arguments(args, kwargs, ["output_size", "return_indices"])
    sizes = _sizes(x, given["output_size"]) if x.ndim == 4 else []
    whole = sizes and all(size % out == 0 for size, out in zip(x.shape[2:], sizes))
    if not whole or given.get("return_indices"):
        return runtime.in_float(function, args, kwargs)
    return _blocks(x, [size // out for size, out in zip(x.shape[2:], sizes)]).amax((3, 5))


# ------------------------------------------------------------------------------------------------------ sums


@handles("cumsum")
def _cumsum(runtime, function, args, kwargs):
    dim = arguments(args, kwargs, ["dim"])["dim"] % args[0].ndim
    x = runtime.function("carrier", {}, (args[0],))
    if not x.is_integer:
        return x.like(x.q.cumsum(dim), None)
    # sums of all before: a product with a triangle of ones
    ones = torch.ones(x.shape[dim], x.shape[dim], device=x.device).triu()
    rows = x.q if dim == x.ndim - 1 else x.q.transpose(dim, -1)
    sums = matmul(rows, primitives.constant(ones, x.recorder), wide=True)
    return x.like(sums if dim == x.ndim - 1 else sums.transpose(dim, -1), x.scale)
