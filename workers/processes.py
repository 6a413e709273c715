"""Tasks in worker processes of this machine."""

import contextlib
import itertools
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path

from licq.workers.task import LOG, RETRIES, Outcome, Task, has_begun, worker_died

_PULSE = 0.5  # seconds between two looks at the running tasks
_GRACE = 10  # seconds for a worker to end after an interrupt

# A worker imports exactly what this process would. With this process's sys.path it finds the same licq, be
# that a checkout or an installed package, and PYTHONPATH, on which a checkout's models/ would hide a user's
# own, stays as it is.
_START_WORKER = "import sys; sys.path[:] = sys.argv[1:]; from licq.workers.worker import main; main()"


def in_processes(tasks: Iterable[Task], workers: int) -> Generator[Outcome | None, None, None]:
    """Run tasks in worker processes, at most `workers` at a time.

    The next task is taken from `tasks` when a worker is free for it, and after the outcome of the one before
    was yielded: a generator may choose by what is finished.

    A task whose worker dies is begun again, `RETRIES` times, and continues from what its folder holds. When
    the generator is closed, the workers end.

    Yields:
        The outcome of each task as it ends, in any order, and None about twice a second while none ends.
    """
    pool = _Workers(workers)
    with ThreadPoolExecutor(workers) as executor:
        waiting, pending = iter(tasks), set()
        try:
            while True:
                free = workers - len(pending)
                pending |= {executor.submit(pool.run, task) for task in itertools.islice(waiting, free)}
                if not pending:
                    return
                done, pending = wait(pending, timeout=_PULSE, return_when=FIRST_COMPLETED)
                yield from [future.result() for future in done] or [None]
        finally:
            pool.stopped.set()
            executor.shutdown(wait=False, cancel_futures=True)
            pool.end()


class _Workers:
    """The worker processes. Each holds a slot, a number from 0; with GPUs, the slot says which one it has."""

    def __init__(self, count: int):
        self.slots: queue.Queue[int] = queue.Queue()
        for slot in range(count):
            self.slots.put(slot)
        self.devices = _devices()
        self.running: dict[int, subprocess.Popen[str]] = {}
        self.stopped = threading.Event()

    def run(self, task: Task) -> Outcome:
        """All attempts at a task; called from one thread a slot."""
        slot = self.slots.get()
        started, since = time.monotonic(), time.time()
        attempts, answer = 0, None
        try:
            Path(task.folder).mkdir(parents=True, exist_ok=True)
            while answer is None and attempts <= RETRIES and not self.stopped.is_set():
                attempts += 1
                answer = self._attempt(task, task.resume or has_begun(task, since), slot)
            error = worker_died(attempts) if answer is None else answer["error"]
            return Outcome(task, error, attempts, time.monotonic() - started)
        finally:
            self.slots.put(slot)

    def end(self) -> None:
        """End all workers: first by their closed standard input, after `_GRACE` seconds by a signal."""
        processes = list(self.running.values())
        for process in processes:
            if process.stdin is not None:
                with contextlib.suppress(OSError, ValueError):
                    process.stdin.close()
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
            process.kill()

    def _attempt(self, task: Task, resume: bool, slot: int) -> dict[str, str | None] | None:
        """What the worker answered, {"error": the line or None}; None where it died before it could."""
        environment = dict(os.environ)
        if self.devices and "--device" not in task.words:
            environment["CUDA_VISIBLE_DEVICES"] = self.devices[slot % len(self.devices)]
        with open(Path(task.folder) / LOG, "a", encoding="utf-8") as log:
            # In a session of its own: an interrupt from the terminal reaches this process alone, which then
            # ends its workers.
            process = subprocess.Popen(
                [sys.executable, "-c", _START_WORKER, *map(str, sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,
            )
        self.running[slot] = process
        answer = ""
        assert process.stdin is not None and process.stdout is not None  # they are pipes
        with process, contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps({"task": asdict(task), "resume": resume}) + "\n")
            process.stdin.flush()
            answer = process.stdout.read()
        del self.running[slot]
        return json.loads(answer) if answer.endswith("\n") else None


def _devices() -> list[str]:
    """The GPUs that the workers share, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]
