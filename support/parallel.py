"""Work on many files in several processes, results in order, in bounded memory."""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from licq.support.errors import InputError

_MEMORY_A_JOB = 2 * 2**30  # bytes
_START = 3  # a process has to have so many pieces of work to be worth its start


def default_jobs(pieces: int, threads: int | None) -> int:
    """Processes for so many pieces of work: as many as there are processors (or groups of `threads`), 2 GiB
    of memory for each."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = (
        os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else _MEMORY_A_JOB
    )
    return max(1, min(processors // (threads or 1), memory // _MEMORY_A_JOB, pieces // _START))


def ordered(function: Callable[[Any], Any], pieces: Sequence[Any], jobs: int) -> Iterator[Any]:
    """`function` of each piece, in order; with more than one job in processes of their own, never more than
    two pieces a process ahead.

    What `function` raises is raised here, and what has not begun is not begun.
    """
    if jobs == 1:
        yield from map(function, pieces)
        return
    executor = ProcessPoolExecutor(
        jobs, get_context("spawn"), initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
    )
    waiting: deque = deque()
    try:
        for piece in pieces:
            waiting.append(executor.submit(function, piece))
            if len(waiting) >= 2 * jobs:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise InputError(
            "a job died, most likely for lack of memory; use fewer --jobs or a smaller --tile"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)
