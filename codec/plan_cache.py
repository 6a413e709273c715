"""Plans in the user's cache folder, so that the second image of a size is coded without making them again.

An entry's name is a hash of all that a plan follows from: the model's file, the size and the rate, and this
version of licq with its kernels, its libraries and the processor. So an entry is never wrong; one that is
damaged is made again. The environment variable LICQ_PLANS=off switches the cache off.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from licq.data.datasets import cache_folder
from licq.support.array_files import read_arrays, write_arrays
from licq.support.errors import InputError
from licq.support.version import __version__

MAX_BYTES = 2**29  # of all entries together; those that were used the longest ago go first
_SOURCES = ("codec", "data", "integer", "models", "quant", "support")
_LIBRARIES = ("torch", "compressai", "numpy")
_SUFFIX = ".plan"


def folder() -> Path | None:
    """Where plans are kept: `plans` in the cache folder; None: nowhere."""
    if os.environ.get("LICQ_PLANS", "").lower() == "off" or os.environ.get("LICQ_KERNELS") == "reference":
        return None
    return cache_folder() / "plans"


def read(*key: Any) -> tuple[Any, list[np.ndarray]] | None:
    """(content, arrays) of an entry; None where there is none that is whole."""
    path = _path(key)
    if path is None:
        return None
    try:
        entry = read_arrays(path)
        os.utime(path)
    except (OSError, ValueError):
        return None
    return entry


def write(content: Any, arrays: list[np.ndarray], *key: Any) -> None:
    """Keep an entry; where that is impossible (no room, no right) nothing is kept and nothing is told."""
    path = _path(key)
    if path is None or sum(array.nbytes for array in arrays) > MAX_BYTES // 4:
        return
    with contextlib.suppress(OSError, InputError):
        write_arrays(path, content, arrays)
        _make_room(path.parent)


def _path(key: tuple[Any, ...]) -> Path | None:
    where = folder()
    if where is None:
        return None
    text = json.dumps([_machine(), *key])
    return where / (hashlib.sha256(text.encode()).hexdigest()[:32] + _SUFFIX)


def _make_room(where: Path) -> None:
    entries = sorted(((path.stat(), path) for path in where.glob(f"*{_SUFFIX}")), key=lambda e: e[0].st_mtime)
    total = sum(status.st_size for status, _ in entries)
    for status, path in entries[:-1]:
        if total <= MAX_BYTES:
            break
        path.unlink(missing_ok=True)
        total -= status.st_size


@lru_cache(maxsize=1)
def _machine() -> str:
    """A hash of this version of licq, of its kernels and libraries, and of the processor."""
    root = Path(__file__).resolve().parent.parent
    text = hashlib.sha256(f"{__version__} {sys.version} {platform.machine()} {sys.byteorder}".encode())
    for name in _SOURCES:
        for path in sorted((*(root / name).glob("*.py"), *(root / name).glob("_kernels*.so"))):
            text.update(f"{name}/{path.name} ".encode() + hashlib.sha256(path.read_bytes()).digest())
    for name in _LIBRARIES:
        text.update(f"{name} {importlib.metadata.version(name)} ".encode())
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        named = {line.partition("\t")[0]: line for line in lines}
        text.update("".join(named.get(name, "") for name in ("model name", "flags", "Features")).encode())
    return text.hexdigest()
