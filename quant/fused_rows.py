"""Softmax, layer normalization and compensated rounding of calibration in compiled kernels; see
`quant.fused`."""

import ctypes
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from licq.quant.fused import NO_MULTIPLIER, kernels, pointer, structure, threads

_Softmax = structure(
    "_Softmax",
    "q offset kind table grad out",
    "batch tiles rows keys last",
    [("unit", ctypes.c_float)],
    "threads",
)
_LayerNorm = structure(
    "_LayerNorm",
    "x eps multiplier sign offset low high gain grad inside out clipped",
    "rows count",
    [("eps_ceiling", ctypes.c_double), ("eps_real", ctypes.c_double)],
    "threads",
)
_Compensation = structure(
    "_Compensation",
    "target work within mask w_int error",
    "columns outputs",
    [("low", ctypes.c_float), ("high", ctypes.c_float)],
    "threads",
)
_MOST_KEYS = 4096  # of 2^12 each, whose sum float32 holds
_REACH = 1 << 14  # entries of the table of real exponentials; beyond they are 0 beside the largest


@lru_cache(maxsize=4)
def _exponentials(step: float) -> Tensor:
    """exp(-i * step), float32; the last entry is 0, for everything further away."""
    table = torch.exp(-torch.arange(_REACH, dtype=torch.float64) * step).float()
    table[-1] = 0
    return table


class _SoftmaxRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, job, unit, step):
        ctx.job, ctx.unit, ctx.step = job, unit, step
        out = torch.empty_like(q)
        _run(job, q, out)
        ctx.save_for_backward(q)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (q,) = ctx.saved_tensors
        grad, out = grad.contiguous(), torch.empty_like(q)
        _run(ctx.job, q, out, grad, _exponentials(ctx.step), ctx.step / ctx.unit)
        return out, None, None, None


class _Rows(NamedTuple):
    """How the scores of a softmax lie, with their offsets."""

    library: ctypes.CDLL
    offset: Tensor | None
    kinds: Tensor | None
    table: Tensor
    shape: tuple[int, int, int, int]


def _run(
    rows: _Rows,
    q: Tensor,
    out: Tensor,
    grad: Tensor | None = None,
    table: Tensor | None = None,
    unit: float = 0.0,
) -> None:
    table = rows.table if table is None else table
    job = _Softmax(
        q.data_ptr(),
        pointer(rows.offset),
        pointer(rows.kinds),
        table.data_ptr(),
        pointer(grad),
        out.data_ptr(),
        *rows.shape,
        table.numel() - 1,
        unit,
        threads(q.numel()),
    )
    if rows.library.softmax_rows(ctypes.byref(job), ctypes.c_int32(grad is not None)):
        raise MemoryError("no memory for a row of a softmax")


def softmax(
    q: Tensor,
    table: Tensor,
    offset: Tensor | None,
    kinds: Tensor | None,
    dim: int,
    unit: float,
    step: float,
) -> Tensor | None:
    """`integer_functions.fixed_softmax` along the last dimension, with the real softmax's gradient.

    Args:
        q, table, offset, kinds, dim: those of `fixed_softmax`; the offset takes no gradient.
        unit: of the probabilities. step: of the scores, in nats.
    """
    library = kernels(q, table, offset, kinds)
    if library is None or q.dtype != torch.float32 or dim % q.ndim != q.ndim - 1 or q.numel() == 0:
        return None
    if q.shape[-1] > _MOST_KEYS or table.dtype != torch.float32:
        return None
    keys, batch, tiles = q.shape[-1], 1, 1
    if offset is not None:
        if offset.requires_grad and torch.is_grad_enabled():
            return None
        if kinds is None:
            same = offset.reshape(offset.shape[next((i for i, n in enumerate(offset.shape) if n != 1), 0) :])
            if not same.ndim or same.shape != q.shape[q.ndim - same.ndim :]:
                return None
            batch = math.prod(q.shape[: q.ndim - same.ndim])
        else:
            if q.ndim < 3 or offset.shape[1:] != q.shape[2:] or kinds.dtype != torch.int64:
                return None
            batch, tiles = q.shape[0], q.shape[1]
        offset = offset.detach().to(torch.float32).contiguous()
    rows = q.numel() // (batch * tiles * keys)
    kinds = None if kinds is None else kinds.contiguous()
    job = _Rows(library, offset, kinds, table.contiguous(), (batch, tiles, rows, keys))
    return _SoftmaxRows.apply(q.contiguous(), job, unit, step)


class _LayerNormRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, library, fields):
        ctx.library, ctx.fields = library, fields
        out = torch.empty_like(x)
        clipped = torch.empty(x.shape, dtype=torch.int8) if ctx.needs_input_grad[0] else None
        library.layer_norm_rows(ctypes.byref(_layer_norm(fields, x, out=out, clipped=clipped)))
        ctx.save_for_backward(x, clipped)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, clipped = ctx.saved_tensors
        grad, out = grad.contiguous(), torch.empty_like(x)
        job = _layer_norm(ctx.fields, x, out=out, grad=grad, inside=clipped)
        ctx.library.layer_norm_gradient(ctypes.byref(job))
        return out, None, None


def _layer_norm(fields: dict[str, Any], x: Tensor, **tensors: Tensor | None) -> Any:
    count = x.shape[-1]
    job = _LayerNorm(x=x.data_ptr(), rows=x.numel() // count, count=count, threads=threads(x.numel()))
    for name, value in (fields | tensors).items():
        setattr(job, name, pointer(value) if isinstance(value, Tensor) else value)
    return job


def layer_norm(
    x: Tensor,
    eps: float,
    multiplier: Tensor,
    offset: Tensor,
    low: Tensor,
    high: Tensor,
    unit: float,
    constants: Callable[[int, float], Tensor],
) -> Tensor | None:
    """`sums.layer_norm` of x, whose other arguments take no gradient.

    constants: `integer_functions.layer_norm_constants`.
    """
    library = kernels(x, multiplier, offset, low, high)
    if library is None or x.dtype != torch.float32 or x.numel() == 0:
        return None
    count = x.shape[-1]
    if not 0 < count <= 1024 or not 0 <= eps <= 2**30:
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in (multiplier, offset, low, high)):
        return None
    sign = torch.where(multiplier < 0, -1.0, 1.0).double()
    magnitude = multiplier.detach().abs().double().expand(count).contiguous()
    fixed = torch.empty(count, dtype=torch.float64)
    if not library.fixed_multipliers(
        ctypes.c_void_p(magnitude.data_ptr()),
        ctypes.c_void_p(fixed.data_ptr()),
        ctypes.c_int64(count),
        ctypes.c_int32(1),
    ):
        raise ValueError(NO_MULTIPLIER)

    def of_channels(t: Tensor) -> Tensor:
        return t.detach().to(torch.float32).expand(count).contiguous()

    fields = {
        "eps": constants(count, eps),
        "multiplier": fixed,
        "sign": of_channels(sign),
        "offset": of_channels(offset),
        "low": of_channels(low),
        "high": of_channels(high),
        "gain": of_channels(sign * magnitude / unit),
        "eps_ceiling": math.ceil(count**2 * eps),
        "eps_real": eps,
    }
    return _LayerNormRows.apply(x.contiguous(), library, fields)


def compensated_block(
    target: Tensor,
    work: Tensor,
    within: Tensor,
    limits: tuple[int, int],
    mask: Tensor | None,
    w_int: Tensor,
    error: Tensor,
) -> bool:
    """Round a block of columns one after the other, as `reconstruction.gptq.gptq` does; False: no kernel.

    Args:
        target, work: (columns, outputs), what each column aims at and the real weights; target is changed.
        within: (columns, columns), what an error in one column adds to the aims of those behind it.
        mask: (columns, outputs) bool, or None.
        w_int, error: (columns, outputs), for the results; rows of a contiguous tensor.
    """
    library = kernels(target, work, within, mask)
    operands = (target, work, within, w_int, error)
    if library is None or any(t.dtype != torch.float32 or not t.is_contiguous() for t in operands):
        return False
    mask = None if mask is None else mask.contiguous()
    job = _Compensation(
        target.data_ptr(),
        work.data_ptr(),
        within.data_ptr(),
        pointer(mask),
        w_int.data_ptr(),
        error.data_ptr(),
        *target.shape,
        *limits,
        threads(target.numel() * len(target)),
    )
    library.compensated_block(ctypes.byref(job))
    return True
