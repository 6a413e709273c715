"""What makes a result repeatable: seeds, threads, exact sums, and the versions that it depends on."""

import contextlib
import platform
import random
from collections.abc import Iterator
from importlib import metadata

import numpy as np
import torch

from licq.support.errors import InputError
from licq.support.version import __version__


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators (all devices).

    Raises:
        InputError: seed is outside 0 .. 2^32 - 1, numpy's range.
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"`seed` {seed} is out of range; choose one from 0 to 4294967295")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def set_threads(threads: int | None) -> int:
    """Let torch use `threads` CPU threads (None: leave as it is); returns the number in force.

    Floating-point sums are split by thread, so the last digits of a calibration depend on this number.

    Raises:
        InputError: threads is less than 1.
    """
    if threads is not None:
        if threads < 1:
            raise InputError(f"`threads` {threads} is out of range; choose 1 or more")
        torch.set_num_threads(threads)
    return torch.get_num_threads()


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """While this lasts, a GPU computes sums of products without approximation.

    TF32 is off, and so is cuDNN, which may use Winograd's or Fourier's algorithm. Sums of products of
    integers are then exact below the bounds of the overflow certificate, as they are on a CPU (design,
    section 4).
    """
    if device.type != "cuda":
        yield
        return
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def versions() -> dict[str, str]:
    """Versions of what a result depends on: licq, python, torch, compressai, timm, numpy, pillow."""
    result = {"licq": __version__, "python": platform.python_version()}
    for package in ("torch", "compressai", "timm", "numpy", "pillow"):
        try:
            result[package] = torch.__version__ if package == "torch" else metadata.version(package)
        except metadata.PackageNotFoundError:
            result[package] = "not installed"
    return result
