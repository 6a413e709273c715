"""A task, how it ended, and how to run it in this process."""

import contextlib
import importlib
import os
import platform
import shlex
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from licq.support.cli import explain

LOG = "log.txt"
RETRIES = 2  # how often a task is begun again after its worker has died
_FIRST_FILES = ("run.json", "partial.json")  # an entry writes one of them before it keeps anything else


@dataclass(frozen=True)
class Task:
    """One command line, whose results are the files of one folder.

    Args:
        name: for the user; no two tasks of a command have the same.
        entry: the module whose `main(words)` runs the command and returns its exit status, such as
            "main_ptq".
        words: the command line without --out, --resume and --shared, which `command` adds.
        folder: the value of --out. It also gets log.txt, what the command printed.
        shared: the value of --shared, one folder for all tasks; None where the entry has no such flag.
        resume: continue from what the folder holds. After a worker's death a task is continued in any case.
    """

    name: str
    entry: str
    words: tuple[str, ...]
    folder: str
    shared: str | None = None
    resume: bool = False

    def command(self, resume: bool) -> list[str]:
        """The complete command line for the entry."""
        shared = ["--shared", self.shared] if self.shared else []
        return [*self.words, "--out", self.folder, *shared, *(["--resume"] if resume else [])]


@dataclass(frozen=True)
class Outcome:
    """How a task ended.

    Args:
        task: the task.
        error: the line that says what went wrong; None where nothing did.
        attempts: how often the task was begun.
        seconds: the time of all attempts together.
    """

    task: Task
    error: str | None
    attempts: int
    seconds: float


def run_here(task: Task, resume: bool, silent: bool) -> str | None:
    """Run a task in this process.

    What the entry prints goes to the task's log.txt, and so does its standard error where `silent`. An
    exception does not pass through: it becomes the line that is returned, and a defect leaves its traceback
    in the log.

    Args:
        resume: continue from what the folder holds.
        silent: nothing on this process's standard error.

    Returns:
        The line that says what went wrong, or None.
    """
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
                what = " ".join(str(raised).split())
                error = f"{type(raised).__name__}: {what} (a defect, please report it; {log.name} has more)"
        if error:
            print("error:", error, file=log)
        return error


def has_begun(task: Task, since: float) -> bool:
    """Whether the task's folder holds a run that was begun after the time `since` (seconds since 1970)."""
    for name in _FIRST_FILES:
        with contextlib.suppress(OSError):
            if (Path(task.folder) / name).stat().st_mtime >= since:
                return True
    return False


def worker_died(attempts: int) -> str:
    """The error of a task whose worker died at every attempt."""
    return (
        f"its worker died {attempts} times, most likely for lack of memory; run fewer at a time, or with a "
        "smaller `crop`"
    )


def last_log_line(tasks: Sequence[Task]) -> str:
    """The last line of the log that was written to last, e.g. the progress of a run; empty without a log."""
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
