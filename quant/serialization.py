"""The file format of quantized models: a header in JSON, tensors in few bytes, and a seal.

`quant.saving` writes files and `quant.loading` makes models of them.

A file holds what the integer program reads and nothing else: integer weights and biases, scales, ranges,
tables, multipliers, the entropy models, and the parameters of what stayed in float. Float weights that became
integers are not in it. Integers are stored in the smallest integer type that holds them, and packed where
they have fewer than eight bits. Tables of functions are stored as the steps between their entries. All is
compressed. The header says how to rebuild the program around the codec's own forward. A SHA-256 seals tensors
and header.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from licq.models.checkpoint_files import (
    QUANTIZED_FORMAT,
    pack_cdfs,
    read_outside,
    read_tensors,
    write_tensors,
)
from licq.quant.identity import identity_of
from licq.quant.packing import bits_needed, pack, unpack
from licq.support.errors import InputError

VERSION = 4
_READABLE = (3, 4)
_IDENTITY = "identity"
_MIN_PACKED = 65  # packing fewer integers is not worth it
_TABLES = ("table", "cumulative")  # names of functions' tables, along the last dimension
_SMALL_TYPES = (torch.int8, torch.int16, torch.int32)
_DEFECTS = (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, RuntimeError)
"""What code raises on a header or tensors that are not as they should be."""


@contextmanager
def refusing(message: str) -> Iterator[None]:
    """Within it, what a damaged or foreign file makes code raise is an `InputError`.

    Args:
        message: with "{error}" in the place of what was raised.
    """
    try:
        yield
    except _DEFECTS as error:
        raise InputError(message.format(error=repr(error))) from error


# ---------------------------------------------------------------------------------------------------- writing


def write_quantized(path: str | Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """Write header and tensors, whole or not at all; returns the size of the file in bytes.

    Args:
        header: JSON, with the model's `identity`; the format, its version and how the tensors are stored are
            added here.
        tensors: on the CPU; in the types that the program uses.

    Raises:
        InputError: the file cannot be written.
    """
    stored, storage = _stored(tensors)
    # through JSON and back, so that the seal is on what a reader will see
    content = {"format": QUANTIZED_FORMAT, "version": VERSION, **header, **storage}
    content = json.loads(json.dumps(content))
    write_tensors(
        path,
        stored,
        {**content, "sha256_header": seal(content)},
        compress=True,
        outside={_IDENTITY: content[_IDENTITY]},
    )
    return Path(path).stat().st_size


def _stored(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors in few bytes, what the header says of it): the inverse of `_restored`."""
    stored: dict[str, Tensor] = {}
    types: dict[str, str] = {}
    packed: dict[str, list] = {}
    steps: list[str] = []
    for name, tensor in pack_cdfs(dict(tensors)).items():
        small = _smallest(tensor)
        if name.rpartition(".")[2] in _TABLES and small.dtype in _SMALL_TYPES:
            first = torch.zeros(*tensor.shape[:-1], 1, dtype=torch.int64)
            small = _smallest(small.long().diff(prepend=first))
            types[name] = _type_name(tensor.dtype)
            steps.append(name)
        else:
            if small.dtype != tensor.dtype:
                types[name] = _type_name(tensor.dtype)
            # the lengths of CDF tables are read before anything is unpacked
            packs = name.rpartition(".")[2] != "_cdf_length" and tensor.numel() >= _MIN_PACKED
            if small.dtype == torch.int8 and packs:
                bits = bits_needed(small)
                if bits < 8:
                    small, packed[name] = pack(small, bits), [bits, list(tensor.shape)]
        stored[name] = small
    return stored, {"types": types, "packed": packed, "steps": steps}


def _smallest(tensor: Tensor) -> Tensor:
    """The tensor in the smallest integer type from which every bit comes back, or as it is; contiguous."""
    tensor = tensor.contiguous()
    if tensor.dtype in (torch.float32, torch.float64, torch.int64, torch.int32):
        for dtype in _SMALL_TYPES:
            small = tensor.to(dtype)
            if dtype.itemsize < tensor.dtype.itemsize and same_bits(small.to(tensor.dtype), tensor):
                return small
    return tensor


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one type are equal as bytes: -0.0 is not 0.0."""
    return a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def seal(header: Mapping[str, Any]) -> str:
    """SHA-256 of the header as JSON."""
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------------------------------------------- reading


def read_quantized(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(header, tensors in the types that the program uses) of a quantized model's file, verified.

    The header's keys: identity, arch, kwargs, class, config, functions, order, grids, kept_in_float,
    left_alone, extra ... Files of earlier versions state no identity; theirs is that of their content.

    Raises:
        InputError: no such file, damaged, not a quantized model, or of another version.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no quantized model at {path}; give a file that main_ptq.py has written as `model`")
    tensors, header = read_tensors(path)
    if header.get("format") != QUANTIZED_FORMAT:
        raise InputError(
            f"{path} is no quantized model but a float checkpoint; "
            "quantize it first: main_ptq.py takes it as `checkpoint`"
        )
    if header.get("version") not in _READABLE:
        raise InputError(
            f"{path} has version {header.get('version')} of the format, this program reads {VERSION}; "
            "quantize the codec again"
        )
    if header.pop("sha256_header", None) != seal(header):
        raise InputError(
            f"{path} is damaged (its header does not have the SHA-256 that it states); copy or make it again"
        )
    with refusing(f"{path} is damaged ({{error}}); copy or make it again"):
        tensors = _restored(header, tensors)
        header.setdefault(_IDENTITY, identity_of(header, tensors))
        return header, tensors


def read_identity(path: str | Path) -> str:
    """The identity that a quantized model's file states, 64 hexadecimal digits. The file is not verified.

    Raises:
        InputError: no such file, or none of a quantized model.
    """
    stated = read_outside(path).get(_IDENTITY)
    return stated if isinstance(stated, str) else read_quantized(path)[0][_IDENTITY]


def _restored(header: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stored tensors in the types that the program uses, as the header says."""
    for name, (bits, shape) in header["packed"].items():
        if name in tensors:
            tensors[name] = unpack(tensors[name], bits, tuple(shape))
    for name in header.get("steps", ()):
        if name in tensors:
            tensors[name] = tensors[name].long().cumsum(-1)
    for name, type_name in header["types"].items():
        if name in tensors:  # CDF tables are unpacked by now, under other names and in their own type
            dtype = getattr(torch, type_name)
            if not isinstance(dtype, torch.dtype):
                raise TypeError(f"{type_name} is no type")
            tensors[name] = tensors[name].to(dtype)
    return tensors
