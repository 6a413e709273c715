"""For a while parameters stay as they are: what depends on them alone is then computed once.

Calibration runs a codec many times between two changes of its parameters, and most parameters are not
learned. The passes say so, because to compare all values at every run would take as long as the arithmetic.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

_constants: dict | None = None  # what depends on tensors without gradients alone
_everything: dict | None = None


@contextlib.contextmanager
def constants() -> Iterator[None]:
    """While this lasts, parameters that take no gradient do not change."""
    global _constants
    before, _constants = _constants, {}
    try:
        yield
    finally:
        _constants = before


@contextlib.contextmanager
def everything() -> Iterator[None]:
    """While this lasts, no parameter changes."""
    global _everything
    before, _everything = _everything, {}
    try:
        yield
    finally:
        _everything = before


def memory(*tensors: Tensor | None) -> dict | None:
    """Where to keep what depends on these alone; None: they may change, or take gradients."""
    if _constants is not None and not any(t is not None and t.requires_grad for t in tensors):
        return _constants
    return None if torch.is_grad_enabled() else _everything
