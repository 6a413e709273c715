"""The compiled kernels as ctypes sees them: structures, numbers of steps and types."""

import ctypes
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch

S8, U8, S16, S32 = range(4)
TYPES = {torch.int8: S8, torch.uint8: U8, torch.int16: S16, torch.int32: S32}
LOAD, STORE, RESCALE, ADD, PRODUCT, NEG, ABS, SQUARE, CLAMP, LEAKY, TABLE, GDN, ADDC = range(13)
SLACK = 64
"""Bytes behind a tensor that a kernel may read, though it does not count them."""

_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class Array(ctypes.Structure):
    """Numbers in memory, (pixels, channels); a stored number is the number plus `offset`."""

    _fields_ = [("data", _POINTER), *_fields(_INT, "type offset")]


class OfRescale(ctypes.Structure):
    """same_limits: for all channels. tie_free: the multiplier is one of `integer.multipliers`."""

    _fields_ = _fields(_INT, "same_limits tie_free")


class OfLeaky(ctypes.Structure):
    """tie_free: the multiplier is one of `integer.multipliers`."""

    _fields_ = _fields(_INT, "tie_free")


class OfTable(ctypes.Structure):
    """first: input of the first entry. last: number of entries - 1."""

    _fields_ = _fields(_INT, "first last")


class OfGdn(ctypes.Structure):
    """root: of the norm, as GDN has it and GDN1 has not. vectors: the numbers have room in vectors of
    four."""

    _fields_ = _fields(_INT, "inverse root vectors")


class OfStore(ctypes.Structure):
    """side: of the square of pixels that a pixel's channels are, or 0. width: pixels in a row."""

    _fields_ = _fields(_INT, "side width")


class _OfKind(ctypes.Union):
    _fields_ = [
        ("rescale", OfRescale),
        ("leaky", OfLeaky),
        ("table", OfTable),
        ("gdn", OfGdn),
        ("store", OfStore),
    ]


class Step(ctypes.Structure):
    """One elementwise operation on registers; kernels.h documents the fields."""

    _anonymous_ = ("of_kind",)
    _fields_ = [
        *_fields(_INT, "op dst a b period"),
        ("of_kind", _OfKind),
        *_fields(_POINTER, "multiplier low high factor entries constant shift scale"),
    ]


class Product(ctypes.Structure):
    """Products by taps; kernels.h documents the fields."""

    _fields_ = [
        *_fields(_POINTER, "x weights bias padding taps"),
        *_fields(
            _INT, "type batch height width inputs count rows columns stride_rows stride_columns outputs"
        ),
        *_fields(_INT, "spread first_row first_column all_columns all_rows threads"),
    ]


class Winograd(ctypes.Structure):
    """Products by Winograd's algorithm; kernels.h documents the fields."""

    _fields_ = [
        *_fields(_POINTER, "x weights bias padding starts phases"),
        *_fields(_INT, "batch height width inputs stride first_y first_x rows columns outputs spread"),
        *_fields(_INT, "all_columns all_rows parts threads"),
    ]


class LayerNorm(ctypes.Structure):
    """Layer normalization; kernels.h documents the fields."""

    _fields_ = [
        *_fields(_POINTER, "x eps multiplier sign offset low high"),
        ("rows", _LONG),
        ("eps_ceiling", ctypes.c_double),
        *_fields(_INT, "count threads"),
        ("out", Array),
    ]


class Attention(ctypes.Structure):
    """Attention; kernels.h documents the fields."""

    _fields_ = [
        *_fields(_POINTER, "q k v score_scale weight_scale offset blank kind table"),
        ("batch", _LONG),
        *_fields(_LONG * 3, "q_steps k_steps v_steps"),
        *_fields(_INT, "heads queries keys inner width last score_low score_high weight_low weight_high"),
        *_fields(_INT, "threads tie_free"),
        ("out", Array),
    ]


STRUCTURES = (Array, Step, Product, Winograd, LayerNorm, Attention)


class _Entry(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("value", _LONG)]


def compiled_layout(kernels: ctypes.CDLL) -> dict[str, int]:
    """Sizes of structures and offsets of fields, as the C compiler laid them out; {} from kernels that do not
    say."""
    try:
        function = kernels.layout
    except AttributeError:
        return {}
    function.restype = ctypes.POINTER(_Entry)
    entries, found, position = function(), {}, 0
    while entries[position].name:
        found[entries[position].name.decode()] = entries[position].value
        position += 1
    return found


def expected_layout(structures: tuple[type[ctypes.Structure], ...] = STRUCTURES) -> dict[str, int]:
    """Sizes of structures and offsets of fields, as ctypes lays them out."""
    expected = {}
    for structure in structures:
        expected[structure.__name__] = ctypes.sizeof(structure)
        expected |= {f"{structure.__name__}.{name}": offset for name, offset in _offsets(structure)}
    return expected


def _offsets(structure: Any) -> Iterator[tuple[str, int]]:
    fields = cast(Any, structure._fields_)
    for name, kind in fields:
        start = getattr(structure, name).offset
        if issubclass(kind, ctypes.Union):
            for member, group in cast(Any, kind)._fields_:
                yield from ((f"{member}.{field}", start + offset) for field, offset in _offsets(group))
        else:
            yield name, start


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where the package was installed without a C compiler, or where they are of
    another version."""
    for path in sorted(Path(__file__).parent.glob("_kernels*.so")):
        try:
            kernels = ctypes.CDLL(str(path))
        except OSError:
            continue
        if compiled_layout(kernels) == expected_layout():
            return kernels
        warnings.warn(
            f"the compiled kernels {path.name} are of another version of licq, so the slower reference runs, "
            "with the same bits; install licq again to build them",
            stacklevel=2,
        )
    return None
