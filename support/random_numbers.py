"""Random numbers that a function draws: found, and undone."""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode


@contextlib.contextmanager
def restored(device: torch.device | str) -> Iterator[None]:
    """Behind it, the generators of Python, numpy and torch are where they were before it."""
    device = torch.device(device)
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def generators() -> tuple[bytes, str]:
    """The states of Python's and numpy's generators, to be compared."""
    return repr(random.getstate()).encode(), repr(np.random.get_state())


class Redrawn(TorchDispatchMode):
    """While this lasts, torch draws other random numbers than it would, also those of a seed that is set
    within.

    Args:
        where: asked for each draw.

    Attributes:
        drawn: (name of the function, what `where` gave) of each draw.
    """

    def __init__(self, where: Callable[[], str]):
        super().__init__()
        self.where = where
        self.drawn: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.drawn.append((func.overloadpacket.__name__.rstrip("_"), self.where()))
            generator = kwargs.get("generator")
            if generator is not None:
                torch.rand(1, generator=generator, device=generator.device)
            else:
                devices = {part.device for part in args if isinstance(part, torch.Tensor)}
                for device in devices | {torch.device("cpu"), torch.device(kwargs.get("device") or "cpu")}:
                    torch.rand(1, device=device)
        return func(*args, **kwargs)
