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
MIN_PIECES = 3  # of work for a process to be worth its start


def default_jobs(pieces: int, threads: int | None) -> int:
    """How many processes to use for some pieces of work.

    As many as the machine has processors, or groups of `threads` processors; fewer where it has less than
    2 GiB of memory for each, or where a process would have fewer than 3 pieces.
    """
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = (
        os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else _MEMORY_A_JOB
    )
    return max(1, min(processors // (threads or 1), memory // _MEMORY_A_JOB, pieces // MIN_PIECES))


def ordered(function: Callable[[Any], Any], pieces: Sequence[Any], jobs: int) -> Iterator[Any]:
    """The results of `function` for each piece, in order.

    With more than one job, pieces are computed in as many processes, at most two a process ahead of the
    results that are taken. When `function` raises, the exception is raised here, and no further piece is
    begun.

    Raises:
        InputError: a process died.
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
            "a job died, most likely for lack of memory; use fewer `jobs` or a smaller `tile`"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)
