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

_AUTOCAST = ("cpu", "cuda", "mps", "xpu")
_DENORMAL = 2.0**-1030


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


@contextlib.contextmanager
def plain_torch(learning: bool = False) -> Iterator[None]:
    """While this lasts, what a caller has set for all of PyTorch changes no number.

    Autocast and inference mode are off. New tensors are float32 and on the CPU where nothing else is said.
    Products of float32 are not shortened (`torch.set_float32_matmul_precision`), and denormal numbers stay.
    Also a decorator.

    Args:
        learning: gradients are on. Otherwise they are on where the caller has them on.
    """
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))  # which switches gradients on
            stack.enter_context(torch.no_grad())
        if learning:
            stack.enter_context(torch.enable_grad())
        for kind in _AUTOCAST:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_dtype() != torch.float32:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float32)
        if torch.empty(0).device.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if torch.get_float32_matmul_precision() != "highest":
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        if not torch.full((), _DENORMAL, dtype=torch.float64).mul(0.5):
            stack.callback(torch.set_flush_denormal, True)
            torch.set_flush_denormal(False)
        yield


def versions() -> dict[str, str]:
    """Versions of what a result depends on: licq, python, torch, compressai, timm, numpy, pillow."""
    result = {"licq": __version__, "python": platform.python_version()}
    for package in ("torch", "compressai", "timm", "numpy", "pillow"):
        try:
            result[package] = torch.__version__ if package == "torch" else metadata.version(package)
        except metadata.PackageNotFoundError:
            result[package] = "not installed"
    return result
