"""How far the results of a program reach: the part of an image that they depend on.

A program runs on positions instead of numbers. Every number carries the first and the last row, and column,
of the image that it depends on. Every operation takes the extremes over what it reads; keys that a softmax
masks are not read. So a program of a few hundred pixels says how far from a cut the numbers of a large
image's tile are those of the whole image (`integer.tiles`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from licq.integer.groups import padding_of
from licq.integer.program import Program
from licq.integer.reference import MEANING, Meaning, interpret
from licq.integer.tiles import Reach, Span
from licq.quant import operations as ops
from licq.quant.integer_functions import MASKED
from licq.quant.operations import Operation

BATCH = 4
"""Images of the program that is traced: for first rows, last rows, first columns and last columns."""
_FAR = 2.0**20
_NOTHING = 1.0  # depends on nothing, and may be other than zero; 0: is zero


def reach(program: Program, height: int, width: int, multiple: int) -> Reach | None:
    """The reach of all outputs of a program of BATCH images of height x width; None where these are too small
    to tell.

    Inputs and outputs have rows and columns as their last dimensions.
    """
    inputs = {
        name: _positions(program.values[number].shape, height, width)
        for name, number in program.inputs.items()
    }
    results = list(interpret(program, inputs, _EXTREMES).values())
    rows = _span(
        [_distances(part.amax(tuple(range(1, part.ndim - 2)))[:2].amax(2), height) for part in results],
        multiple,
    )
    columns = _span(
        [_distances(part.amax(tuple(range(1, part.ndim - 2)))[2:].amax(1), width) for part in results],
        multiple,
    )
    return Reach(rows, columns) if rows and columns else None


def _positions(shape: tuple[int, ...], height: int, width: int) -> Tensor:
    """What the numbers of an input depend on: themselves.

    A first position is stated as _FAR - position and a last one as _FAR + position, so that the extreme is
    the maximum of both.
    """
    parts = []
    for length, count, dim in ((height, shape[-2], -2), (width, shape[-1], -1)):
        size = length // count
        first = torch.arange(count, dtype=torch.float32) * size
        for part in (_FAR - first, _FAR + first + size - 1):
            view = [1] * len(shape)
            view[dim] = count
            parts.append(part.reshape(view).expand(1, *shape[1:]))
    return torch.cat(parts)


def _distances(positions: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each pixel along an axis: how many before and after it depends on, and whether these end inside.

    positions: (2, n), first and last ones.
    """
    size = length // positions.shape[1]
    pixel = torch.arange(positions.shape[1]) * size
    first, last = _FAR - positions[0], positions[1] - _FAR
    inside = (first > 0) & (last < length - 1)
    before, after = (pixel - first).clamp(min=0), (last - pixel - size + 1).clamp(min=0)
    return before.repeat_interleave(size), after.repeat_interleave(size), inside.repeat_interleave(size)


def _span(parts: list[tuple[Tensor, Tensor, Tensor]], multiple: int) -> Span | None:
    before, after = (torch.stack([part[side] for part in parts]).amax(0) for side in (0, 1))
    inside = torch.stack([part[2] for part in parts]).all(0).nonzero().flatten()
    if not len(inside):
        return None
    middle = slice(int(inside[0]), int(inside[-1]) + 1)
    if len(inside) != middle.stop - middle.start:
        return None
    for period in (multiple, 2 * multiple, 4 * multiple, 8 * multiple):
        if len(inside) >= 2 * period and all(
            torch.equal(part[middle][period:], part[middle][:-period]) for part in (before, after)
        ):
            return Span(int(before.max()), int(after.max()), period)
    return None


# --------------------------------------------------------------------- what each operation makes of positions


def _slim(x: Tensor) -> Tensor:
    """x without the channels that are one channel repeated."""
    return x[:, :1] if x.ndim > 2 and x.stride(1) == 0 else x


def _larger(a: Tensor, b: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(a.shape, b.shape)
    return torch.maximum(_slim(a), _slim(b)).expand(shape) if a.ndim == b.ndim else torch.maximum(a, b)


def _added(operation: Operation, a: Tensor, b: Tensor) -> Tensor:
    return _larger(a, b)


def _multiplied(operation: ops.Product, a: Tensor, b: Tensor) -> Tensor:
    return _larger(a, b).masked_fill((a == 0) | (b == 0), 0.0)


def _pads(conv: ops.Conv2d) -> list[int]:
    """Zeros above, below, on the left and on the right."""
    if not isinstance(conv.padding, str):
        return [pad for pad in conv.padding for _ in range(2)]
    if conv.padding == "valid":
        return [0] * 4
    totals = [step * (size - 1) for step, size in zip(conv.dilation, conv.weight.shape[2:])]
    return [pad for total in totals for pad in (total // 2, total - total // 2)]  # as PyTorch pads to "same"


def _convolved(conv: ops.Conv2d, x: Tensor) -> Tensor:
    top, bottom, left, right = _pads(conv)
    x = F.pad(_slim(x).amax(1, keepdim=True), (left, right, top, bottom))
    out = F.max_pool2d(x, conv.weight.shape[2:], conv.stride, 0, conv.dilation)
    return out.clamp(min=_NOTHING).expand(-1, conv.weight.shape[0], -1, -1)


def _deconvolved(conv: ops.ConvTranspose2d, x: Tensor) -> Tensor:
    """weight: (outputs, inputs / groups, height, width)."""
    kernel, stride, dilation = conv.weight.shape[2:], conv.stride, conv.dilation
    x = _slim(x).amax(1, keepdim=True)
    sparse = x.new_zeros(*x.shape[:2], *((size - 1) * step + 1 for size, step in zip(x.shape[2:], stride)))
    sparse[:, :, :: stride[0], :: stride[1]] = x
    pads = []
    for axis in (1, 0):
        edge = dilation[axis] * (kernel[axis] - 1) - padding_of(conv)[axis]
        pads += [edge, edge + conv.output_padding[axis]]
    out = F.max_pool2d(F.pad(sparse, pads), kernel, 1, 0, dilation)
    return out.clamp(min=_NOTHING).expand(-1, conv.weight.shape[0], -1, -1)


def _linear(linear: ops.Linear, x: Tensor) -> Tensor:
    out = x.amax(-1, keepdim=True).clamp(min=_NOTHING)
    return out.expand(*x.shape[:-1], linear.weight.shape[0])


def _matmul(operation: ops.MatMul, a: Tensor, b: Tensor) -> Tensor:
    """The smaller of two bounds: what a row and a column hold; and, over the numbers of a row that may be
    other than zero, what these and all that they are multiplied with hold."""
    ends = torch.maximum(a.amax(-1, keepdim=True), b.amax(-2, keepdim=True))
    inner = b.amax(-1)[..., None, :]
    read = torch.where((a == 0) | (inner == 0), 0.0, torch.maximum(a, inner)).amax(-1, keepdim=True)
    return torch.minimum(ends, read)


def _softmax(operation: ops.Softmax, x: Tensor) -> Tensor:
    """Masked keys get zero, whatever their score is; so they have no part in the others' either."""
    masked = torch.zeros((), dtype=torch.bool)
    if operation.offset is not None and int(operation.table[-1]) == 0:
        masked = operation.offset == int(MASKED)
        masked = masked if operation.kinds is None else masked.index_select(0, operation.kinds)
    read = x.masked_fill(masked, 0.0)
    return read.amax(operation.dim, keepdim=True).clamp(min=_NOTHING).expand(x.shape).masked_fill(masked, 0.0)


def _layer_norm(operation: ops.LayerNorm, x: Tensor) -> Tensor:
    return x.amax(-1, keepdim=True).clamp(min=_NOTHING).expand(x.shape)


def _same(operation: Operation, x: Tensor) -> Tensor:
    return x


def _not_zero(operation: Operation, x: Tensor) -> Tensor:
    return x.clamp(min=_NOTHING)


_EXTREMES: Meaning = {
    ops.Constant: lambda operation: (operation.value != 0).float() * _NOTHING,
    ops.Conv2d: _convolved,
    ops.ConvTranspose2d: _deconvolved,
    ops.Linear: _linear,
    ops.MatMul: _matmul,
    ops.Add: _added,
    ops.Product: _multiplied,
    ops.Mask: lambda operation, x: x * (operation.mask != 0),
    ops.Sum: lambda operation, x: x.amax(operation.dim, keepdim=operation.keepdim),
    ops.Softmax: _softmax,
    ops.LayerNorm: _layer_norm,
    ops.Gdn: _added,
    ops.Layout: MEANING[ops.Layout],
    **dict.fromkeys((ops.Rescale, ops.Leaky, ops.Neg, ops.Abs, ops.Square), _same),
    **dict.fromkeys((ops.Clamp, ops.Table), _not_zero),
}
