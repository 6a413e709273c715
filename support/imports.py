"""Importing large packages in less time."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """While this lasts Python does not look for garbage, and never looks through what is there at its end.

    Modules that are imported stay until the process ends. Looking through them again and again, and once more
    at the end, takes a third of the time of importing torch and CompressAI.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
