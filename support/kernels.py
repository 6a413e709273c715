"""The library of compiled kernels, which `setup.py` builds beside the sources in integer/."""

import ctypes
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "integer"


def compiled_libraries() -> Iterator[tuple[str, ctypes.CDLL]]:
    """(file name, library) of each that can be loaded; none where the package was installed without a C
    compiler."""
    for path in sorted(FOLDER.glob("_kernels*.so")):
        try:
            yield path.name, ctypes.CDLL(str(path))
        except OSError:
            continue
