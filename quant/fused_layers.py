"""Rounded weights, GDN, ranges and energies of calibration in compiled kernels; see `quant.fused`."""

import ctypes
import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from licq.quant.fused import ROWS, kernels, pointer, structure, threads

_SHORT, _MOST_COLUMNS = 64, 4096  # shorter rows of a channel are taken side by side
_Weights = structure(
    "_Weights",
    "w offset scale mask grad out sums",
    "outputs count",
    [("low", ctypes.c_float), ("high", ctypes.c_float)],
    "alike threads",
)
_Gdn = structure(
    "_Gdn",
    "x norm mantissa shift low high slope grad out grad_norm sums",
    "outer channels inner",
    [],
    "inverse with_root threads",
)


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
        pointer(mask),
        pointer(grad),
        out.data_ptr(),
        pointer(sums),
        len(w),
        w.numel() // len(w),
        *ends,
        scale.numel() == 1,
        threads(w.numel()),
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
            threads=threads(x.numel()),
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
    """GDN of `primitives.gdn`, for a kernel.

    x is float32 and norm float64, (B, C, ...); the others are (1, C, ...).
    """
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
        ctypes.c_int32(threads(x.numel())),
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
    inner = 1 if dim is None else math.prod(x.shape[dim + 1 :])
    columns = 0 if dim is None else x.shape[dim] * inner
    if inner < _SHORT and 0 < columns <= _MOST_COLUMNS and x.numel() > columns:
        rows, count = x.numel() // columns, columns
        shape = (-(-rows // ROWS), count)
    else:
        columns = 0
        shape = (1, 1) if dim is None else (math.prod(x.shape[:dim]), x.shape[dim])
        rows = math.prod(shape)
        count = x.numel() // rows
    low, high = torch.empty(shape), torch.empty(shape)
    squares = torch.empty(shape, dtype=torch.float64)
    (library.column_ends if columns else library.row_ends)(
        *(ctypes.c_void_p(t.data_ptr()) for t in (x, low, high, squares)),
        ctypes.c_int64(rows),
        ctypes.c_int64(count),
        ctypes.c_int32(threads(x.numel())),
    )
    if columns and inner > 1:
        low, high, squares = (t.reshape(-1, columns // inner, inner) for t in (low, high, squares))
        return low.amin((0, 2)), high.amax((0, 2)), squares.sum((0, 2)).float()
    return low.amin(0), high.amax(0), squares.sum(0).float()


def largest_sum(w_int: Tensor, largest: Tensor, bias: Tensor | None) -> float | None:
    """The largest over outputs of sum |w_int| * largest + |bias|.

    Args:
        w_int: (outputs, inputs, ...). largest: (inputs,) or (), float32. bias: (outputs,), float64.
    """
    library = kernels(w_int, largest, bias)
    if library is None or w_int.dtype != torch.float32 or largest.dtype != torch.float32:
        return None
    if bias is not None and bias.dtype != torch.float64:
        return None
    w_int, largest = w_int.contiguous(), largest.expand(w_int.shape[1]).contiguous()
    bias = None if bias is None else bias.expand(len(w_int)).contiguous()
    library.largest_sum.restype = ctypes.c_double
    return library.largest_sum(
        *(ctypes.c_void_p(pointer(t)) for t in (w_int, largest, bias)),
        *(ctypes.c_int64(n) for n in (len(w_int), w_int.shape[1], w_int[0, 0].numel())),
    )
