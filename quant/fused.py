"""Arithmetic of calibration in compiled kernels: several operations of PyTorch in one pass over the numbers.

integer/calibration.c has the kernels. Each function here returns None where its kernel does not apply:
without a C compiler, away from the CPU, or for layouts that it does not know. PyTorch's own operations then
do the same, and the results are equal to the bit. Gradients differ in the order of their sums alone.
"""

import contextlib
import ctypes
import dataclasses
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from licq.quant import unchanged
from licq.support.kernels import compiled_libraries

_VERSION = 2  # of integer/calibration.c and calibration_rows.c
PIECE, ROWS = 4096, 256  # PIECE and ROWS there
_MOST_ENTRIES = 1 << 15  # of a multiplier that is written out
_SMALL = 1 << 15  # numbers that are not worth a second thread
NO_MULTIPLIER = "a requantization multiplier must be positive and finite"
_switched_off = False


def structure(name: str, pointers: str, counts: str, others: list[tuple[str, Any]], flags: str) -> Any:
    fields = [(field, ctypes.c_void_p) for field in pointers.split()]
    fields += [(field, ctypes.c_int64) for field in counts.split()]
    fields += others + [(field, ctypes.c_int32) for field in flags.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


_Requantize = structure(
    "_Requantize",
    "x out inside m low high factor",
    "outer channels inner",
    [],
    "m_alike limits_alike factor_alike wide threads",
)
_RequantizeGradient = structure(
    "_RequantizeGradient",
    "grad inside x grad_x m factor sums",
    "outer channels inner",
    [("half", ctypes.c_double)],
    "m_alike factor_alike wide threads",
)


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    for _, library in compiled_libraries():
        if hasattr(library, "calibration_version") and library.calibration_version() == _VERSION:
            return library
    return None


@contextlib.contextmanager
def switched_off() -> Iterator[None]:
    """While this lasts PyTorch's own operations compute."""
    global _switched_off
    before, _switched_off = _switched_off, True
    try:
        yield
    finally:
        _switched_off = before


def kernels(*tensors: Tensor | None) -> ctypes.CDLL | None:
    """The kernels for these tensors; None: PyTorch has to do."""
    if _switched_off:
        return None
    for tensor in tensors:
        if tensor is not None and not tensor.is_cpu:
            return None
    return _library()


def threads(count: int) -> int:
    return 1 if count < _SMALL else torch.get_num_threads()


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def layout(shape: torch.Size, *operands: Tensor | None) -> tuple[int, int, int] | None:
    """(outer, channels, inner) of numbers of this shape whose operands vary along the channels alone.

    None: they vary along several dimensions.
    """
    dim = None
    for operand in operands:
        if operand is None or operand.numel() == 1:
            continue
        start = len(shape) - operand.ndim
        for axis, size in enumerate(operand.shape, start):
            if size != 1:
                if dim not in (None, axis) or axis < 0 or size != shape[axis]:
                    return None
                dim = axis
    if dim is None:
        return 1, 1, math.prod(shape)
    return math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :])


@dataclasses.dataclass(frozen=True)
class Requantization:
    """One requantization as `requantize_floats` takes it."""

    library: ctypes.CDLL
    shape: tuple[int, int, int]
    low: Tensor | None
    high: Tensor | None
    factor: Tensor | None
    order: tuple[int, ...] | None = None
    """Of acc's dimensions in memory, where that is another one; the result lies likewise."""

    trailing: tuple[int, ...] | None = None
    """Sizes of the dimensions, the last ones, along which multipliers vary, where these are several."""

    @property
    def limited(self) -> bool:
        return self.low is not None

    def in_memory(self, x: Tensor) -> Tensor:
        """x, of acc's shape, as the kernel takes it."""
        return (x if self.order is None else x.permute(self.order)).contiguous()

    def from_memory(self, x: Tensor) -> Tensor:
        """What `in_memory` was made of."""
        if self.order is None:
            return x
        return x.permute([self.order.index(axis) for axis in range(x.ndim)])

    def _lying(self, multiplier: Tensor) -> Tensor:
        """The multiplier with its dimensions in memory's order."""
        if self.order is None:
            return multiplier
        return _first(multiplier, len(self.order)).permute(self.order)

    def _of_channels(self, multiplier: Tensor) -> Tensor:
        if self.trailing is None or multiplier.numel() == 1:
            return multiplier
        return _last(self._lying(multiplier), len(self.trailing)).expand(self.trailing)

    def _summed(self, sums: Tensor, multiplier: Tensor) -> Tensor:
        """Sums of channels as the gradient of the multiplier, whose number of entries it has."""
        if multiplier.numel() == 1:
            return sums.sum()
        if self.trailing is None:
            return sums
        lying = self._lying(multiplier)
        sums = sums.reshape(self.trailing).sum_to_size(_last(lying, len(self.trailing)).shape)
        return sums if self.order is None else self.from_memory(sums.reshape(lying.shape))

    def forward(self, acc: Tensor, multiplier: Tensor, inside: Tensor | None) -> Tensor:
        """The requantized numbers.

        Raises:
            ValueError: a multiplier that is not positive and finite.
        """
        multiplier = self._of_channels(multiplier).to(torch.float64).contiguous()
        out = torch.empty(acc.shape, dtype=acc.dtype if self.low is None else torch.float32)
        factor = self.factor
        job = _Requantize(
            acc.data_ptr(),
            out.data_ptr(),
            pointer(inside),
            multiplier.data_ptr(),
            pointer(self.low),
            pointer(self.high),
            pointer(factor),
            *self.shape,
            multiplier.numel() == 1,
            self.low is None or self.low.numel() == 1,
            factor is None or factor.numel() == 1,
            acc.dtype == torch.float64,
            threads(acc.numel()),
        )
        failed = self.library.requantize_floats(ctypes.byref(job))
        if failed:
            raise MemoryError() if failed > 1 else ValueError(NO_MULTIPLIER)
        return out

    def backward(
        self, grad: Tensor, multiplier: Tensor, acc: Tensor | None, inside: Tensor | None, needs_acc: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """(the gradient of acc, that of the multiplier where acc is given)."""
        grad = grad.to(torch.float32).contiguous()
        outer, channels, inner = self.shape
        grad_acc = torch.empty_like(grad) if needs_acc else None
        sums = None
        if acc is not None:
            along = inner == 1 and channels > 1
            parts = -(-outer // ROWS) if along else -(-inner // PIECE)
            shape = (parts, channels) if along else (outer, channels, parts)
            sums = torch.empty(shape, dtype=torch.float64)
        half = 1.0 if inside is None else 0.5
        m, factor = self._of_channels(multiplier).to(torch.float64).contiguous(), self.factor
        job = _RequantizeGradient(
            grad.data_ptr(),
            pointer(inside),
            pointer(acc),
            pointer(grad_acc),
            m.data_ptr(),
            pointer(factor),
            pointer(sums),
            *self.shape,
            half,
            m.numel() == 1,
            factor is None or factor.numel() == 1,
            acc is not None and acc.dtype == torch.float64,
            threads(grad.numel()),
        )
        if self.library.requantize_gradient(ctypes.byref(job)):
            raise MemoryError()
        if sums is not None:
            sums = (sums.sum(0) if sums.ndim == 2 else sums.sum((0, 2))) * half
            sums = self._summed(sums, multiplier).to(multiplier.dtype)
        return grad_acc, sums


def requantization(
    acc: Tensor, multiplier: Tensor, low: Tensor | None, high: Tensor | None, factor: Tensor | None
) -> Requantization | None:
    """The requantization of `fixedpoint.requantize_ste`, for a kernel."""
    kept = None if _switched_off else unchanged.memory(low, high, factor)
    operands = (low, high, factor)
    if kept is None or not all(t is None or unchanged.is_kept(kept, t) for t in operands):
        return _requantization(acc, multiplier, *operands)
    form = (acc.shape, acc.stride(), acc.dtype, acc.device, acc.requires_grad, multiplier.shape)
    key = (_requantization, *form, *map(id, operands))
    if key not in kept:
        kept[key] = _requantization(acc, multiplier, *operands)
    return kept[key]


def _requantization(
    acc: Tensor, multiplier: Tensor, low: Tensor | None, high: Tensor | None, factor: Tensor | None
) -> Requantization | None:
    library = kernels(acc, multiplier, low, high, factor)
    if library is None or acc.dtype not in (torch.float32, torch.float64) or acc.numel() == 0:
        return None
    if acc.dtype == torch.float64 and low is None and (factor is not None or acc.requires_grad):
        return None
    order, lies, operands = _order_in_memory(acc), acc.shape, (multiplier, low, high, factor)
    if order is not None:
        lies = acc.detach().permute(order).shape
        operands = tuple(None if t is None else _first(t, acc.ndim).permute(order) for t in operands)
    shape, trailing = layout(lies, *operands), None
    if shape is None:
        first = min(
            len(lies) - t.ndim + axis
            for t in operands
            if t is not None
            for axis, size in enumerate(t.shape)
            if size != 1
        )
        trailing = tuple(lies[first:])
        if math.prod(trailing) > _MOST_ENTRIES:
            return None
        shape = math.prod(lies[:first]), math.prod(trailing), 1
        low, high, factor = (
            t if t is None or t.numel() == 1 else _last(t, len(trailing)).expand(trailing)
            for t in operands[1:]
        )
    if low is not None and high is not None and low.numel() != high.numel():
        low, high = torch.broadcast_tensors(low, high)
    low, high, factor = (
        None if t is None else t.detach().to(torch.float32).contiguous() for t in (low, high, factor)
    )
    return Requantization(library, shape, low, high, factor, order, trailing)


def _order_in_memory(x: Tensor) -> tuple[int, ...] | None:
    """The order of dimensions in which x is contiguous, where it is another than its own; else None."""
    if x.is_contiguous():
        return None
    strides = x.stride()
    order = tuple(sorted(range(x.ndim), key=lambda axis: -strides[axis]))
    return order if x.detach().permute(order).is_contiguous() else None


def _first(t: Tensor, ndim: int) -> Tensor:
    """t with dimensions of size 1 before its own, so that it has `ndim`."""
    return t.reshape((1,) * (ndim - t.ndim) + t.shape)


def _last(t: Tensor, ndim: int) -> Tensor:
    """t with its last `ndim` dimensions alone; those before have size 1."""
    return _first(t, max(ndim, t.ndim)).reshape(_first(t, max(ndim, t.ndim)).shape[-ndim:])
