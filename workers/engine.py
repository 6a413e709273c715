"""Where tasks run: in this process, in local worker processes, or on a Ray cluster. A task is a command line
of ours."""

import argparse
import contextlib
import importlib
import json
import os
import platform
import queue
import shlex
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

from licq.support.cli import explain
from licq.support.errors import InputError
from licq.support.progress import progress, time_left

ROOT = Path(__file__).resolve().parent.parent
LOG = "log.txt"
RETRIES = 2  # how often a task is taken up again after its worker has died
_PULSE = 0.5  # seconds between two looks at what runs
_GRACE = 10  # seconds for a worker to end after an interrupt


@dataclass(frozen=True)
class Task:
    """One command line, whose results are the files of one folder.

    name:   for the user, and different from the other tasks'.
    entry:  the module whose main(words) runs it.
    words:  its command line without --out, --resume and --shared, which the engine adds.
    folder: its --out, which also gets log.txt, what the command said.
    shared: its --shared, one folder for all tasks; None where the entry has no such flag.
    resume: go on with what the folder holds. After a worker's death that is done anyway.
    """

    name: str
    entry: str
    words: tuple[str, ...]
    folder: str
    shared: str | None = None
    resume: bool = False

    def command(self, resume: bool) -> list[str]:
        """The words for its entry."""
        shared = ["--shared", self.shared] if self.shared else []
        return [*self.words, "--out", self.folder, *shared, *(["--resume"] if resume else [])]


@dataclass(frozen=True)
class Outcome:
    """How a task ended. error: its one line, None when it went well. attempts: times it was begun. seconds:
    all of them together."""

    task: Task
    error: str | None
    attempts: int
    seconds: float


@dataclass(frozen=True)
class Engine:
    """Where tasks run: in this process, in `workers` processes at a time, or on the Ray cluster at address
    `ray`.

    gpu_share: of a GPU for each task on Ray; None: a whole one where the cluster has any.
    threads: CPU threads, and on Ray processors, that a task is counted with.
    """

    workers: int | None = None
    ray: str | None = None
    gpu_share: float | None = None
    threads: int | None = None

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "Engine":
        """From the flags of `support.options.add_engine` and --threads.

        Raises:
            InputError: flags that contradict each other.
        """
        if args.workers and args.ray:
            raise InputError("--workers and --ray exclude each other; give one of them")
        if args.gpu_share is not None and not args.ray:
            raise InputError("--gpu_share is for --ray; leave it out")
        return cls(args.workers, args.ray, args.gpu_share, args.threads or _default_threads(args))

    def run(self, tasks: Sequence[Task], desc: str, unit: str, quiet: bool = False) -> Iterator[Outcome]:
        """The outcome of each task as it ends, in any order. A task that fails does not stop the others.

        Raises:
            InputError: the Ray cluster cannot be reached, or could never run such a task.
        """
        if not (self.workers or self.ray):
            yield from _in_this_process(tasks, unit, quiet)
            return
        if self.ray:
            from licq.workers.on_ray import on_ray

            going = on_ray(tasks, self)
        else:
            going = _in_workers(tasks, self.workers)
        bar = progress(total=len(tasks), desc=desc, unit=unit, enabled=not quiet)
        with bar, contextlib.closing(going):
            shown = time.monotonic()
            for outcome in going:
                if outcome is not None:
                    bar.update()
                    yield outcome
                elif not quiet and time.monotonic() - shown > max(bar.mininterval, 1):
                    bar.set_postfix_str(_last_words(tasks))
                    shown = time.monotonic()


def _default_threads(args: argparse.Namespace) -> int | None:
    """The processors of this machine in equal parts; one on Ray; None, PyTorch's choice, where one task runs
    at a time."""
    if args.ray:
        return 1
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, processors // args.workers) if args.workers else None


def run_here(task: Task, resume: bool, silent: bool) -> str | None:
    """Run a task in this process; returns its error's line, or None. Its standard output, and if `silent` its
    error, go to log.txt."""
    Path(task.folder).mkdir(parents=True, exist_ok=True)
    command = task.command(resume)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(
            open(Path(task.folder) / LOG, "a" if resume else "w", encoding="utf-8", buffering=1)
        )
        stack.enter_context(contextlib.redirect_stdout(log))
        if silent:
            stack.enter_context(contextlib.redirect_stderr(log))
        print(f"process {os.getpid()} on {platform.node()}: {task.entry}.py {shlex.join(command)}")
        try:
            status = importlib.import_module(task.entry).main(command)
            error = f"exit status {status}" if status else None
        except Exception as raised:
            error = explain(raised)
            if error is None:
                traceback.print_exc(file=log)
                error = f"{type(raised).__name__}: {' '.join(str(raised).split())} (a defect, please report it; {log.name} has more)"
        if error:
            print("error:", error, file=log)
        return error


def has_begun(task: Task, since: float) -> bool:
    """Whether its folder holds the beginning of a run that was started after the time `since`."""
    try:
        return (Path(task.folder) / "run.json").stat().st_mtime >= since
    except OSError:
        return False


def died(attempts: int) -> str:
    """The line for a task whose worker died every time."""
    return f"its worker died {attempts} times, most likely for lack of memory; run fewer at a time, or with a smaller --crop"


def _in_this_process(tasks: Sequence[Task], unit: str, quiet: bool) -> Iterator[Outcome]:
    started = time.monotonic()
    for index, task in enumerate(tasks):
        if not quiet:
            print(
                f"{unit} {index + 1} of {len(tasks)}: {task.name}{time_left(started, index, len(tasks))}",
                file=sys.stderr,
                flush=True,
            )
        began = time.monotonic()
        error = run_here(task, task.resume, silent=quiet)
        yield Outcome(task, error, 1, time.monotonic() - began)


def _in_workers(tasks: Sequence[Task], workers: int) -> Iterator[Outcome | None]:
    """Outcomes, and None now and then while nothing ends."""
    slots: queue.Queue[int] = queue.Queue()
    for slot in range(workers):
        slots.put(slot)
    devices = _devices()
    running: dict[int, subprocess.Popen] = {}
    stopped = threading.Event()

    def attempt(task: Task, resume: bool, slot: int) -> tuple[bool, str | None]:
        """Whether the worker lived to say how the task ended, and its error's line."""
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        }
        if devices and "--device" not in task.words:
            environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
        with open(Path(task.folder) / LOG, "a", encoding="utf-8") as log:
            # In a session of its own: an interrupt from the terminal reaches this process alone, which then
            # ends its workers.
            process = subprocess.Popen(
                [sys.executable, "-m", "licq.workers.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,
            )
        running[slot] = process
        with process, contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps({"task": asdict(task), "resume": resume}) + "\n")
            process.stdin.flush()
            answer = process.stdout.read()
        del running[slot]
        return (True, json.loads(answer)["error"]) if answer.endswith("\n") else (False, None)

    def run(task: Task) -> Outcome:
        slot = slots.get()
        began, since = time.monotonic(), time.time()
        try:
            Path(task.folder).mkdir(parents=True, exist_ok=True)
            for number in range(1, RETRIES + 2):  # noqa: B007
                lived, error = (
                    (False, None)
                    if stopped.is_set()
                    else attempt(task, task.resume or has_begun(task, since), slot)
                )
                if lived or stopped.is_set():
                    break
            return Outcome(task, error if lived else died(number), number, time.monotonic() - began)
        finally:
            slots.put(slot)

    with ThreadPoolExecutor(workers) as executor:
        pending = {executor.submit(run, task) for task in tasks}
        try:
            while pending:
                done, pending = wait(pending, timeout=_PULSE, return_when=FIRST_COMPLETED)
                yield from [future.result() for future in done] or [None]
        finally:
            stopped.set()
            executor.shutdown(wait=False, cancel_futures=True)
            for process in list(running.values()):
                with contextlib.suppress(OSError, ValueError):
                    process.stdin.close()  # the worker's sign to end
            for process in list(running.values()):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_GRACE)
                process.kill()


def _devices() -> list[str]:
    """The GPUs that local workers share, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def _last_words(tasks: Sequence[Task]) -> str:
    """What was said last in any task's log, e.g. the progress of a run."""
    logs = []
    for task in tasks:
        with contextlib.suppress(OSError):
            path = Path(task.folder) / LOG
            logs.append((path.stat().st_mtime, path, task.name))
    if not logs:
        return ""
    _, path, name = max(logs)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return f"{name}: {lines[-1] if len(lines) > 1 else 'starts'}"[:100]
