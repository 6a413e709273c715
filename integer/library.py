"""The compiled kernels as ctypes sees them: the structures and constants of kernels.h, and their loading.

kernels.h documents the fields. `library` compares the mirror here with what was compiled.
"""

import ctypes
import warnings
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from licq.support.kernels import compiled_libraries

S8, U8, S16, S32 = range(4)
TYPES = {np.dtype(np.int8): S8, np.dtype(np.uint8): U8, np.dtype(np.int16): S16, np.dtype(np.int32): S32}
LOAD, STORE, RESCALE, ADD, ADD_CHANNELS, MULTIPLY, NEG, ABS, SQUARE, CLAMP, LEAKY, TABLE, GDN = range(13)
BLOCK = 16
"""Outputs of a layer that a kernel computes at a time."""
SLACK = 64
"""Bytes behind a tensor that a kernel may read, though it does not count them."""


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


def _pointers(names: str) -> list[tuple[str, Any]]:
    return _fields(ctypes.c_void_p, names)


def _int32s(names: str) -> list[tuple[str, Any]]:
    return _fields(ctypes.c_int32, names)


class Array(ctypes.Structure):
    _fields_ = [*_pointers("data"), *_int32s("type offset")]


class RescaleStep(ctypes.Structure):
    _fields_ = [*_pointers("multiplier low high factor"), *_int32s("limits_alike tie_free")]


class LeakyStep(ctypes.Structure):
    _fields_ = [*_pointers("multiplier"), *_int32s("tie_free")]


class AddStep(ctypes.Structure):
    _fields_ = _pointers("low high addend")


class ClampStep(ctypes.Structure):
    _fields_ = _pointers("low high")


class TableStep(ctypes.Structure):
    _fields_ = [*_pointers("entries"), *_int32s("first last")]


class GdnStep(ctypes.Structure):
    _fields_ = [*_pointers("mantissa shift low high scale"), *_int32s("inverse with_root fits_float64")]


class StoreStep(ctypes.Structure):
    _fields_ = _int32s("shuffle_side row_pixels")


class _StepUnion(ctypes.Union):
    _fields_ = [
        ("rescale", RescaleStep),
        ("leaky", LeakyStep),
        ("add", AddStep),
        ("clamp", ClampStep),
        ("table", TableStep),
        ("gdn", GdnStep),
        ("store", StoreStep),
    ]


class Step(ctypes.Structure):
    _anonymous_ = ("parameters",)
    _fields_ = [*_int32s("op dst a b period"), ("parameters", _StepUnion)]


class Product(ctypes.Structure):
    _fields_ = [
        *_pointers("x weights bias padding taps"),
        *_int32s("type batch height width inputs count rows columns stride_rows stride_columns outputs"),
        *_int32s("spread first_row first_column all_columns all_rows threads"),
    ]


class Winograd(ctypes.Structure):
    _fields_ = [
        *_pointers("x weights bias padding starts phases"),
        *_int32s("batch height width inputs stride first_y first_x rows columns outputs spread"),
        *_int32s("all_columns all_rows parts threads"),
    ]


class LayerNorm(ctypes.Structure):
    _fields_ = [
        *_pointers("x eps multiplier sign offset low high"),
        ("rows", ctypes.c_int64),
        ("eps_ceiling", ctypes.c_double),
        *_int32s("count threads"),
        ("out", Array),
    ]


class Attention(ctypes.Structure):
    _fields_ = [
        *_pointers("q k v score_scale weight_scale offset blank kind table"),
        ("batch", ctypes.c_int64),
        *_fields(ctypes.c_int64 * 3, "q_steps k_steps v_steps"),
        *_int32s("heads queries keys inner width last score_low score_high weight_low weight_high"),
        *_int32s("threads tie_free"),
        ("out", Array),
    ]


class Rows(ctypes.Structure):
    _fields_ = [*_pointers("cdfs starts offsets"), *_fields(ctypes.c_int64, "count length")]


class Mixture(ctypes.Structure):
    _fields_ = [
        *_pointers("scales means weights thresholds inverses reach normal"),
        *_int32s("levels boundary_bits components max_bins"),
    ]


class RansDecoder(ctypes.Structure):
    _fields_ = [
        *_pointers("words"),
        *_fields(ctypes.c_int64, "count next"),
        *_fields(ctypes.c_uint64, "state"),
    ]


STRUCTURES: tuple[type[ctypes.Structure], ...] = (
    Array,
    Step,
    Product,
    Winograd,
    LayerNorm,
    Attention,
    Rows,
    Mixture,
    RansDecoder,
)
_CONSTANTS = (
    "S8 U8 S16 S32 LOAD STORE RESCALE ADD ADD_CHANNELS MULTIPLY NEG ABS SQUARE CLAMP LEAKY TABLE GDN BLOCK"
).split()
_COUNTING = (
    "rans_bad_row rans_entries rans_mixture_entries rans_stream rans_symbols rans_mixture_symbols"
).split()

Layout = dict[str, tuple[int, int]]
"""(offset, size) in bytes of each structure (at 0) and field by name, and (value, 0) of each constant."""


def mirrored_layout(structures: Iterable[type[ctypes.Structure]] = STRUCTURES) -> Layout:
    """The layout of the classes of this file."""
    entries: Layout = {}
    for structure in structures:
        entries[structure.__name__] = (0, ctypes.sizeof(structure))
        entries.update(_field_entries(structure, structure.__name__, 0))
    return {**entries, **{name: (globals()[name], 0) for name in _CONSTANTS}}


def _field_entries(structure: Any, prefix: str, start: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Entries of the fields of a structure or union that lies at byte `start`."""
    anonymous = getattr(structure, "_anonymous_", ())
    for name, kind in structure._fields_:
        offset = start + getattr(structure, name).offset
        if name in anonymous:
            for member, member_kind in kind._fields_:
                yield f"{prefix}.{member}", (offset, ctypes.sizeof(member_kind))
                yield from _field_entries(member_kind, f"{prefix}.{member}", offset)
        else:
            yield f"{prefix}.{name}", (offset, ctypes.sizeof(kind))


def compiled_layout(kernels: ctypes.CDLL) -> Layout:
    """The layout of kernels.h when `kernels` was compiled; empty for kernels too old to tell."""
    if not hasattr(kernels, "layout_entry"):
        return {}
    kernels.layout_entry.restype = ctypes.c_char_p
    offset, size = ctypes.c_int64(), ctypes.c_int64()
    entries: Layout = {}
    while name := kernels.layout_entry(len(entries), ctypes.byref(offset), ctypes.byref(size)):
        entries[name.decode()] = (offset.value, size.value)
    return entries


def layout_difference(kernels: ctypes.CDLL) -> str | None:
    """The first structure, field or constant that the compiled kernels have otherwise; None: all agree."""
    compiled, mirrored = compiled_layout(kernels), mirrored_layout()
    if not compiled:
        return "no layout_entry"
    names = (*mirrored, *compiled)
    return next((name for name in names if compiled.get(name) != mirrored.get(name)), None)


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where the package was installed without a C compiler.

    None too, with a warning, where they were compiled from other sources than these.
    """
    stale = None
    for name, kernels in compiled_libraries():
        difference = layout_difference(kernels)
        if difference is None:
            for name in _COUNTING:
                getattr(kernels, name).restype = ctypes.c_int64
            return kernels
        stale = stale or f"{name} is of another version than its sources ({difference})"
    if stale is not None:
        warnings.warn(
            f"{stale}: build the kernels again by make env or pip install -e . ; until then the slower "
            "reference runs, with the same bits",
            stacklevel=2,
        )
    return None


def kernels() -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        RuntimeError: there are none; run `integer.reference.run` instead.
    """
    loaded = library()
    if loaded is None:
        raise RuntimeError(
            "no compiled kernels; install the package where there is a C compiler, or use the reference"
        )
    return loaded
