"""Files of plain data and arrays: a seal, JSON, and the arrays' bytes. No torch, no pickles.

bytes  32  SHA-256 of all that follows
        8  length of the JSON
           JSON: {"content": anything, "arrays": [[type, shape, first byte], ...]}
           the arrays, each at a multiple of 64 bytes from the beginning of the file, and 64 bytes behind
           the last one
"""

import hashlib
import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np

from licq.support.files import atomic_path

_SEAL, _ALIGNED = 32, 64


def write_arrays(path: Path, content: Any, arrays: list[np.ndarray]) -> int:
    """Write a file, whole or not at all; returns its size in bytes.

    Raises:
        InputError: it cannot be written.
    """
    entries, position = [], 0
    for array in arrays:
        entries.append([array.dtype.str, array.shape, position])
        position += -(-array.nbytes // _ALIGNED) * _ALIGNED
    text = json.dumps({"content": content, "arrays": entries}, separators=(",", ":")).encode()
    text += b" " * (-(_SEAL + 8 + len(text)) % _ALIGNED)
    body = bytearray(len(text).to_bytes(8, "little") + text)
    for array in arrays:
        body += array.tobytes()
        body += bytes(-len(array.tobytes()) % _ALIGNED)
    body += bytes(_ALIGNED)
    with atomic_path(path) as temporary:
        temporary.write_bytes(hashlib.sha256(body).digest() + body)
    return _SEAL + len(body)


def read_arrays(path: Path) -> tuple[Any, list[np.ndarray]]:
    """(content, arrays) of a file; the arrays are read-only views of it.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    with open(path, "rb") as stream:
        memory = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)  # ValueError where it is empty
    if len(memory) < _SEAL + 8 or hashlib.sha256(memoryview(memory)[_SEAL:]).digest() != memory[:_SEAL]:
        raise ValueError(f"{path} is damaged")
    start = _SEAL + 8 + int.from_bytes(memory[_SEAL : _SEAL + 8], "little")
    head = json.loads(memory[_SEAL + 8 : start])
    arrays = [
        np.frombuffer(memory, np.dtype(kind), int(np.prod(shape)), start + position).reshape(shape)
        for kind, shape, position in head["arrays"]
    ]
    return head["content"], arrays
