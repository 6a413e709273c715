"""Arithmetic of calibration in compiled kernels: several operations of PyTorch in one pass over the numbers.

integer/calibration.c has the kernels. Each function here returns None where its kernel does not apply: without
a C compiler, away from the CPU, or for layouts that it does not know. PyTorch's own operations then do the same,
and the results are equal to the bit. Gradients differ in the order of their sums alone.
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
from torch.autograd.function import once_differentiable

from licq.support.kernels import compiled_libraries

_VERSION = 1  # of integer/calibration.c
_PIECE, _ROWS = 4096, 256  # PIECE and ROWS there
_MOST_ENTRIES = 1 << 15  # of a multiplier that is written out
_SMALL = 1 << 15  # numbers that are not worth a second thread
_switched_off = False


def _struct(name: str, pointers: str, counts: str, others: list[tuple[str, Any]], flags: str) -> Any:
    fields = [(field, ctypes.c_void_p) for field in pointers.split()]
    fields += [(field, ctypes.c_int64) for field in counts.split()]
    fields += others + [(field, ctypes.c_int32) for field in flags.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


_Requantize = _struct(
    "_Requantize",
    "x out inside m low high factor",
    "outer channels inner",
    [],
    "m_alike limits_alike factor_alike wide threads",
)
_RequantizeGradient = _struct(
    "_RequantizeGradient",
    "grad inside x grad_x m factor sums",
    "outer channels inner",
    [],
    "m_alike factor_alike wide threads",
)
_Weights = _struct(
    "_Weights",
    "w offset scale mask grad out sums",
    "outputs count",
    [("low", ctypes.c_float), ("high", ctypes.c_float)],
    "alike threads",
)
_Gdn = _struct(
    "_Gdn",
    "x norm mantissa shift low high slope grad out grad_norm sums",
    "outer channels inner",
    [],
    "inverse with_root threads",
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
    if _switched_off or any(t is not None and t.device.type != "cpu" for t in tensors):
        return None
    return _library()


def _threads(count: int) -> int:
    return 1 if count < _SMALL else torch.get_num_threads()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def layout(shape: torch.Size, *operands: Tensor | None) -> tuple[int, int, int] | None:
    """(outer, channels, inner) of numbers of this shape whose operands vary along the channels alone; None: they
    vary along several dimensions."""
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

    def _of_channels(self, multiplier: Tensor) -> Tensor:
        if self.trailing is None or multiplier.numel() == 1:
            return multiplier
        return _last(multiplier, len(self.trailing)).expand(self.trailing)

    def forward(self, acc: Tensor, multiplier: Tensor, inside: Tensor | None) -> Tensor:
        """The requantized numbers.

        Raises:
            ValueError: a multiplier that is not positive and finite.
        """
        wide = acc.dtype == torch.float64
        multiplier = self._of_channels(multiplier).to(torch.float64).contiguous()
        fixed = torch.empty(multiplier.numel(), dtype=torch.float64)
        if not self.library.fixed_multipliers(
            ctypes.c_void_p(multiplier.data_ptr()),
            ctypes.c_void_p(fixed.data_ptr()),
            ctypes.c_int64(fixed.numel()),
            ctypes.c_int32(not wide),
        ):
            raise ValueError("a requantization multiplier must be positive and finite")
        out = torch.empty(acc.shape, dtype=acc.dtype if self.low is None else torch.float32)
        factor = self.factor
        job = _Requantize(
            acc.data_ptr(),
            out.data_ptr(),
            _pointer(inside),
            fixed.data_ptr(),
            _pointer(self.low),
            _pointer(self.high),
            _pointer(factor),
            *self.shape,
            fixed.numel() == 1,
            self.low is None or self.low.numel() == 1,
            factor is None or factor.numel() == 1,
            wide,
            _threads(acc.numel()),
        )
        self.library.requantize_floats(ctypes.byref(job))
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
            parts = -(-outer // _ROWS) if along else -(-inner // _PIECE)
            shape = (parts, channels) if along else (outer, channels, parts)
            sums = torch.empty(shape, dtype=torch.float64)
        half = 1.0 if inside is None else 0.5
        m, factor = (self._of_channels(multiplier) * half).to(torch.float32).contiguous(), self.factor
        job = _RequantizeGradient(
            grad.data_ptr(),
            _pointer(inside),
            _pointer(acc),
            _pointer(grad_acc),
            m.data_ptr(),
            _pointer(factor),
            _pointer(sums),
            *self.shape,
            m.numel() == 1,
            factor is None or factor.numel() == 1,
            acc is not None and acc.dtype == torch.float64,
            _threads(grad.numel()),
        )
        self.library.requantize_gradient(ctypes.byref(job))
        if sums is not None:
            sums = (sums.sum(0) if sums.ndim == 2 else sums.sum((0, 2))) * half
            if multiplier.numel() == 1:
                sums = sums.sum()
            elif self.trailing is not None:
                sums = sums.reshape(self.trailing).sum_to_size(_last(multiplier, len(self.trailing)).shape)
            sums = sums.to(multiplier.dtype)
        return grad_acc, sums


def requantization(
    acc: Tensor, multiplier: Tensor, low: Tensor | None, high: Tensor | None, factor: Tensor | None
) -> Requantization | None:
    """The requantization of `fixedpoint.requantize_ste`, for a kernel."""
    library = kernels(acc, multiplier, low, high, factor)
    if library is None or acc.dtype not in (torch.float32, torch.float64) or acc.numel() == 0:
        return None
    if acc.dtype == torch.float64 and low is None and (factor is not None or acc.requires_grad):
        return None
    operands = (multiplier, low, high, factor)
    shape, order, trailing = layout(acc.shape, *operands), None, None
    if shape is None:
        first = min(
            acc.ndim - t.ndim + axis
            for t in operands
            if t is not None
            for axis, size in enumerate(t.shape)
            if size != 1
        )
        trailing = tuple(acc.shape[first:])
        if math.prod(trailing) > _MOST_ENTRIES:
            return None
        shape = math.prod(acc.shape[:first]), math.prod(trailing), 1
        low, high, factor = (
            t if t is None or t.numel() == 1 else _last(t, len(trailing)).expand(trailing)
            for t in (low, high, factor)
        )
    elif not acc.is_contiguous():
        strides = acc.stride()
        order = tuple(sorted(range(acc.ndim), key=lambda axis: -strides[axis]))
        in_memory = acc.detach().permute(order)
        if in_memory.is_contiguous():
            moved = (None if t is None else _first(t, acc.ndim).permute(order) for t in operands)
            shape = layout(in_memory.shape, *moved)
            assert shape is not None
        else:
            order = None
    if low is not None and high is not None and low.numel() != high.numel():
        low, high = torch.broadcast_tensors(low, high)
    low, high, factor = (
        None if t is None else t.detach().to(torch.float32).contiguous() for t in (low, high, factor)
    )
    return Requantization(library, shape, low, high, factor, order, trailing)


def _first(t: Tensor, ndim: int) -> Tensor:
    """t with dimensions of size 1 before its own, so that it has `ndim`."""
    return t.reshape((1,) * (ndim - t.ndim) + t.shape)


def _last(t: Tensor, ndim: int) -> Tensor:
    """t with its last `ndim` dimensions alone; those before have size 1."""
    return _first(t, max(ndim, t.ndim)).reshape(_first(t, max(ndim, t.ndim)).shape[-ndim:])


class _RoundedWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, scale, offset, mask, ends, library):
        ctx.ends, ctx.library, ctx.offset_shape = ends, library, offset.shape
        ctx.save_for_backward(w, scale, offset, mask)
        out = torch.empty_like(w)
        job = _weights(w, scale, offset, mask, ends, out)
        library.weights_rounded(ctypes.byref(job))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        w, scale, offset, mask = ctx.saved_tensors
        grad = grad.contiguous()
        grad_offset = torch.empty_like(grad)
        sums = torch.empty(len(w), dtype=torch.float64)
        job = _weights(w, scale, offset, mask, ctx.ends, grad_offset, grad, sums)
        ctx.library.weights_gradient(ctypes.byref(job))
        # the gradient of w / scale to scale is -w / scale^2
        grad_scale = -(sums if scale.numel() > 1 else sums.sum().reshape(scale.shape)) / scale
        return None, grad_scale, grad_offset, None, None, None


def _weights(
    w: Tensor,
    scale: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    ends: tuple[int, int],
    out: Tensor,
    grad: Tensor | None = None,
    sums: Tensor | None = None,
) -> Any:
    return _Weights(
        w.data_ptr(),
        offset.data_ptr(),
        scale.data_ptr(),
        _pointer(mask),
        _pointer(grad),
        out.data_ptr(),
        _pointer(sums),
        len(w),
        w.numel() // len(w),
        *ends,
        scale.numel() == 1,
        _threads(w.numel()),
    )


def rounded_weights(
    w: Tensor, scale: Tensor, offset: Tensor, unmasked: Tensor | None, qmin: int, qmax: int
) -> Tensor | None:
    """round(w / scale + offset), 0 where masked, clipped to qmin .. qmax; w takes no gradient.

    Args:
        w, offset: (outputs, ...), float32. scale: (outputs,) or (), float64.
        unmasked: bool of w's shape.
    """
    library = kernels(w, scale, offset, unmasked)
    takes = w.dtype == offset.dtype == torch.float32 and scale.dtype == torch.float64
    if library is None or not takes or w.requires_grad or w.numel() == 0:
        return None
    if offset.shape != w.shape or scale.numel() not in (1, len(w)):
        return None
    mask = None if unmasked is None else unmasked.contiguous()
    return _RoundedWeights.apply(
        w.contiguous(), scale.contiguous(), offset.contiguous(), mask, (qmin, qmax), library
    )


@dataclasses.dataclass(frozen=True)
class DivisiveNorm:
    """One GDN as `gdn_floats` takes it; tensors are of the channels."""

    library: ctypes.CDLL
    shape: tuple[int, int, int]
    mantissa: Tensor
    shift: Tensor
    low: Tensor
    high: Tensor
    inverse: bool
    with_root: bool
    fits: bool

    def _job(self, x: Tensor, norm: Tensor, **others: Tensor) -> Any:
        job = _Gdn(
            x=x.data_ptr(),
            norm=norm.data_ptr(),
            mantissa=self.mantissa.data_ptr(),
            shift=self.shift.data_ptr(),
            low=self.low.data_ptr(),
            high=self.high.data_ptr(),
            outer=self.shape[0],
            channels=self.shape[1],
            inner=self.shape[2],
            inverse=self.inverse,
            with_root=self.with_root,
            threads=_threads(x.numel()),
        )
        for name, tensor in others.items():
            setattr(job, name, tensor.data_ptr())
        return job

    def forward(self, x: Tensor, norm: Tensor) -> Tensor:
        out = torch.empty_like(x)
        self.library.gdn_floats(ctypes.byref(self._job(x, norm, out=out)), ctypes.c_int32(self.fits))
        return out

    def backward(
        self, grad: Tensor, x: Tensor, norm: Tensor, slope: Tensor, result: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(gradient of x, of norm, and for each channel the sum of the gradient times the real result)."""
        grad, slope = grad.contiguous(), slope.to(torch.float64).contiguous()
        grad_x, grad_norm = torch.empty_like(x), torch.empty_like(x)
        sums = torch.empty(self.shape[:2], dtype=torch.float64)
        job = self._job(x, norm, grad=grad, slope=slope, out=grad_x, grad_norm=grad_norm, sums=sums)
        self.library.gdn_gradient(ctypes.byref(job), ctypes.c_void_p(result.data_ptr()))
        return grad_x, grad_norm, sums.sum(0)


def divisive_norm(
    x: Tensor,
    norm: Tensor,
    mantissa: Tensor,
    shift: Tensor,
    low: Tensor,
    high: Tensor,
    slope: Tensor,
    inverse: bool,
    with_root: bool,
) -> DivisiveNorm | None:
    """GDN of `primitives.gdn`, for a kernel: x float32 and norm float64, (B, C, ...); the others (1, C, ...)."""
    library = kernels(x, norm, mantissa, shift, low, high, slope)
    if library is None or x.dtype != torch.float32 or norm.dtype != torch.float64 or x.shape != norm.shape:
        return None
    of_channels = [mantissa, shift, low, high, slope]
    if x.ndim < 2 or x.numel() == 0 or any(t.numel() != x.shape[1] for t in of_channels):
        return None
    # the room of `gdn_root_row`; numbers of 16 bits are below 2^15
    limits = max(float(low.min().abs()), float(high.max().abs()))
    fits = with_root and limits <= 2**15 and int(shift.abs().max()) < 512
    return DivisiveNorm(
        library,
        (x.shape[0], x.shape[1], x[0, 0].numel()),
        mantissa.to(torch.float64).contiguous(),
        shift.to(torch.int64).contiguous(),
        low.detach().to(torch.float32).contiguous(),
        high.detach().to(torch.float32).contiguous(),
        bool(inverse),
        with_root,
        fits,
    )


def energy_of_channels(x: Tensor, dim: int) -> Tensor:
    """Sums of squares along the channels: float32, of x's shape without that dimension."""
    dim %= x.ndim
    library = kernels(x)
    if library is None or x.dtype != torch.float32 or dim == x.ndim - 1:
        return torch.linalg.vector_norm(x, dim=dim, dtype=torch.float32).square()
    x = x.contiguous()
    out = torch.empty((*x.shape[:dim], *x.shape[dim + 1 :]), dtype=torch.float32)
    outer, inner = math.prod(x.shape[:dim]), math.prod(x.shape[dim + 1 :])
    library.channel_energy(
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_int64(outer),
        ctypes.c_int64(x.shape[dim]),
        ctypes.c_int64(inner),
        ctypes.c_int32(_threads(x.numel())),
    )
    return out


def ends_of_channels(x: Tensor, dim: int | None) -> tuple[Tensor, Tensor, Tensor] | None:
    """(smallest, largest number, sum of squares) of each channel, float32; dim None: of all together."""
    library = kernels(x)
    if library is None or x.dtype != torch.float32 or x.numel() == 0:
        return None
    dim = None if dim is None else dim % x.ndim
    if not x.is_contiguous():  # in the order in which it lies in memory it mostly is
        order = sorted(range(x.ndim), key=lambda axis: -x.stride(axis))
        x, dim = x.permute(order).contiguous(), None if dim is None else order.index(dim)
    along = dim is not None and dim == x.ndim - 1 and x.ndim > 1
    if along:
        rows, count = x.numel() // x.shape[-1], x.shape[-1]
        shape = (-(-rows // _ROWS), count)
    else:
        shape = (1, 1) if dim is None else (math.prod(x.shape[:dim]), x.shape[dim])
        rows = math.prod(shape)
        count = x.numel() // rows
    low, high = torch.empty(shape), torch.empty(shape)
    squares = torch.empty(shape, dtype=torch.float64)
    (library.column_ends if along else library.row_ends)(
        *(ctypes.c_void_p(t.data_ptr()) for t in (x, low, high, squares)),
        ctypes.c_int64(rows),
        ctypes.c_int64(count),
        ctypes.c_int32(_threads(x.numel())),
    )
    return low.amin(0), high.amax(0), squares.sum(0).float()
