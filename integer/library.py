"""The compiled kernels (`kernels.c`, `winograd.c`) as ctypes sees them: structures, numbers of steps and
types."""

import ctypes
from functools import lru_cache
from pathlib import Path

import torch

S8, U8, S16, S32 = range(4)
TYPES = {torch.int8: S8, torch.uint8: U8, torch.int16: S16, torch.int32: S32}
LOAD, STORE, RESCALE, ADD, PRODUCT, NEG, ABS, SQUARE, CLAMP, LEAKY, TABLE, GDN, ADDC = range(13)
SLACK = 64
"""Bytes behind a tensor that a kernel may read, though it does not count them."""


class Array(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("type", ctypes.c_int32), ("offset", ctypes.c_int32)]


class Step(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("op", "dst", "a", "b", "period", "first", "last", "quick")),
        *((name, ctypes.c_void_p) for name in ("multiplier", "low", "high", "factor", "table", "scale")),
    ]


class Product(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weights", "bias", "border", "taps")),
        *(
            (name, ctypes.c_int32)
            for name in (
                "type",
                "batch",
                "height",
                "width",
                "inputs",
                "count",
                "rows",
                "columns",
                "stride_rows",
                "stride_columns",
                "outputs",
                "spread",
                "first_row",
                "first_column",
                "all_columns",
                "all_rows",
                "threads",
            )
        ),
    ]


class Winograd(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weights", "bias", "border", "starts", "phases")),
        *(
            (name, ctypes.c_int32)
            for name in (
                "batch",
                "height",
                "width",
                "inputs",
                "stride",
                "first_y",
                "first_x",
                "rows",
                "columns",
                "outputs",
                "spread",
                "all_columns",
                "all_rows",
                "parts",
                "threads",
            )
        ),
    ]


class LayerNorm(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "eps", "multiplier", "sign", "offset", "low", "high")),
        ("rows", ctypes.c_int64),
        ("eps_ceiling", ctypes.c_double),
        ("count", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("out", Array),
    ]


class Attention(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("q", "k", "v", "score_scale", "weight_scale", "offset", "blank", "kind", "table")
        ),
        ("batch", ctypes.c_int64),
        *((name, ctypes.c_int64 * 3) for name in ("q_steps", "k_steps", "v_steps")),
        *(
            (name, ctypes.c_int32)
            for name in (
                "heads",
                "queries",
                "keys",
                "inner",
                "width",
                "last",
                "score_low",
                "score_high",
                "weight_low",
                "weight_high",
                "threads",
                "quick",
            )
        ),
        ("out", Array),
    ]


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where the package was installed without a C compiler."""
    for path in sorted(Path(__file__).parent.glob("_kernels*.so")):
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            continue
    return None
