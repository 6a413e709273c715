"""Where the tasks of a command run: in this process, in worker processes, or on a Ray cluster."""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

from licq.support.errors import InputError
from licq.support.progress import progress, time_left
from licq.workers.processes import in_processes
from licq.workers.task import Outcome, Task, last_log_line, run_here


@dataclass(frozen=True)
class Engine:
    """Where tasks run. Without `workers` and `ray`: one after the other in this process.

    Args:
        workers: processes at a time, on this machine.
        ray: the address of a Ray cluster; "auto": of the cluster that this machine belongs to, else of one
            that is started here.
        gpu_share: on Ray, the share of a GPU that a task takes, 0 to 1; None: 1 where the cluster has GPUs.
        threads: CPU threads of a task; Ray counts it with as many processors. None: PyTorch's choice.
    """

    workers: int | None = None
    ray: str | None = None
    gpu_share: float | None = None
    threads: int | None = None

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "Engine":
        """The engine that the flags of `support.options.add_engine` and --threads ask for.

        Raises:
            InputError: flags that contradict each other.
        """
        if args.workers and args.ray:
            raise InputError("`workers` and `ray` exclude each other; give one of them")
        if args.gpu_share is not None and not args.ray:
            raise InputError("`gpu_share` is for `ray`; leave it out")
        return cls(args.workers, args.ray, args.gpu_share, args.threads or _default_threads(args))

    def run(
        self,
        tasks: Sequence[Task],
        desc: str,
        unit: str,
        quiet: bool = False,
        watch: Callable[[], None] | None = None,
    ) -> Iterator[Outcome]:
        """Run the tasks. A task that fails does not stop the others.

        Args:
            desc: for the progress on standard error: what the tasks are together.
            unit: what one of them is called.
            quiet: no progress.
            watch: called about twice a second, of tasks in other processes; it shows the progress.

        Yields:
            The outcome of each task as it ends, in any order.

        Raises:
            InputError: the Ray cluster cannot be reached, or has no node for such a task.
        """
        if self.ray:
            from licq.workers.on_ray import on_ray  # here: Ray is an optional package

            outcomes = on_ray(tasks, self.ray, self.threads or 1, self.gpu_share)
        elif self.workers:
            outcomes = in_processes(tasks, self.workers)
        else:
            yield from _in_this_process(tasks, unit, quiet)
            return
        if watch is not None:
            yield from _watched(outcomes, watch)
        else:
            yield from _with_progress(outcomes, tasks, desc, unit, quiet)


def _with_progress(
    outcomes: Generator[Outcome | None, None, None],
    tasks: Sequence[Task],
    desc: str,
    unit: str,
    quiet: bool,
) -> Iterator[Outcome]:
    """The outcomes, with a bar of the finished tasks and the last line of what the running ones say."""
    bar = progress(total=len(tasks), desc=desc, unit=unit, enabled=not quiet)
    interval = 1 if sys.stderr.isatty() else 10
    with bar, contextlib.closing(outcomes):
        shown = time.monotonic()
        for outcome in outcomes:
            if outcome is not None:
                bar.update()
                yield outcome
            elif not quiet and time.monotonic() - shown > interval:
                bar.set_postfix_str(last_log_line(tasks))
                shown = time.monotonic()


def _watched(outcomes: Generator[Outcome | None, None, None], watch: Callable[[], None]) -> Iterator[Outcome]:
    with contextlib.closing(outcomes):
        for outcome in outcomes:
            if outcome is not None:
                yield outcome
            watch()


def _in_this_process(tasks: Sequence[Task], unit: str, quiet: bool) -> Iterator[Outcome]:
    first_started = time.monotonic()
    for index, task in enumerate(tasks):
        if not quiet:
            left = time_left(first_started, index, len(tasks))
            print(f"{unit} {index + 1} of {len(tasks)}: {task.name}{left}", file=sys.stderr, flush=True)
        started = time.monotonic()
        error = run_here(task, task.resume, silent=quiet)
        yield Outcome(task, error, 1, time.monotonic() - started)


def _default_threads(args: argparse.Namespace) -> int | None:
    """The processors of this machine in equal parts; on Ray 1; None, PyTorch's choice, where one task runs at
    a time."""
    if args.ray:
        return 1
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, processors // args.workers) if args.workers else None
