"""For a while parameters stay as they are: what depends on them alone is then computed once.

Calibration runs a codec many times between two changes of its parameters, and most parameters are not
learned. The passes say so, because to compare all values at every run would take as long as the arithmetic.
"""

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


class _Memories(threading.local):
    """Of this thread: others may calibrate other codecs meanwhile."""

    constants: dict | None = None
    """What depends on tensors without gradients alone."""

    everything: dict | None = None


_memories = _Memories()


@contextlib.contextmanager
def constants() -> Iterator[None]:
    """While this lasts, parameters that take no gradient do not change."""
    before, _memories.constants = _memories.constants, {}
    try:
        yield
    finally:
        _memories.constants = before


@contextlib.contextmanager
def everything() -> Iterator[None]:
    """While this lasts, no parameter changes."""
    before, _memories.everything = _memories.everything, {}
    try:
        yield
    finally:
        _memories.everything = before


def memory(*tensors: Tensor | None) -> dict | None:
    """Where to keep what depends on these alone; None: they may change, or take gradients."""
    if _memories.constants is not None and not any(t is not None and t.requires_grad for t in tensors):
        return _memories.constants
    return None if torch.is_grad_enabled() else _memories.everything


def once(key: Hashable, make: Callable[[], Result], *tensors: Tensor | None) -> Result:
    """What `make` gives, computed once as long as these tensors, on which alone it depends, stay."""
    kept = memory(*tensors)
    if kept is None:
        return make()
    if key not in kept:
        kept[key] = make()
    return kept[key]


def keep(kept: dict, *tensors: Tensor) -> None:
    """Keep tensors themselves, so that each is known by its identity."""
    for tensor in tensors:
        kept[id(tensor)] = tensor


def is_kept(kept: dict, tensor: Tensor) -> bool:
    """Whether a memory keeps this tensor, not an equal one."""
    return kept.get(id(tensor)) is tensor
