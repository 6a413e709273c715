"""`--workers N`: the qualities of a run in N worker processes.

Each worker runs the same command line with `--part QUALITY`, which does that quality alone, in the run's
folder. Then the run itself finds all of them finished.

    OUT/q<quality>/log.txt        what the worker says; gone when all qualities are finished
    OUT/q<quality>/progress.json  how far it is; gone when it has ended
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from licq.runs.folder import read_json
from licq.support import options
from licq.support.errors import InputError
from licq.support.files import write_json
from licq.support.work import Work
from licq.workers.engine import Engine
from licq.workers.task import LOG, Task

_PROGRESS = "progress.json"


def run_in_workers(
    argv: Sequence[str],
    engine: Engine,
    folder: Path,
    qualities: Sequence[int],
    resume: bool,
    work: Work | None,
) -> None:
    """Run qualities in worker processes. One that fails does not stop the others.

    Args:
        argv: the run's command line. folder: the run's. work: shows how far they are; None: nothing does.

    Raises:
        InputError: qualities have failed, when all others are finished.
    """
    words = [*options.words_of_parts(argv), "--threads", str(engine.threads)]
    tasks = [
        Task(
            f"quality {quality}",
            "main_ptq",
            (*words, "--part", str(quality)),
            str((folder / f"q{quality}").resolve()),
            resume=resume,
        )
        for quality in qualities
    ]
    running = {task.name: Path(task.folder) for task in tasks}
    failed: dict[str, str] = {}

    def watch() -> None:
        if work is not None:
            _look(work, running, len(tasks))

    try:
        for outcome in engine.run(tasks, "quantizing", "quality", quiet=work is None, watch=watch):
            place = running.pop(outcome.task.name)
            if outcome.error:
                failed[outcome.task.name] = outcome.error
            if work is not None:
                work.finish(place.name)
                work.say(
                    f"{outcome.task.name}: {'failed, ' + outcome.error if outcome.error else 'finished'}"
                )
    finally:
        for task in tasks:
            (Path(task.folder) / _PROGRESS).unlink(missing_ok=True)
    if failed:
        name, error = next(iter(failed.items()))
        more = f" ({len(failed)} of {len(tasks)} failed: {', '.join(failed)})" if len(failed) > 1 else ""
        raise InputError(
            f"{name}: {error}{more}; what is finished is kept: mend that and go on with --resume"
        )
    for task in tasks:
        (Path(task.folder) / LOG).unlink(missing_ok=True)


def publish(folder: Path, state: dict) -> None:
    """In a worker: say how far its quality is, if that can be written."""
    with contextlib.suppress(InputError, OSError):
        write_json(folder / _PROGRESS, state)


def _look(work: Work, running: dict[str, Path], count: int) -> None:
    """Show what the workers have published."""
    doing = []
    for name, folder in running.items():
        state = read_json(folder / _PROGRESS)
        if state is not None:
            work.take(folder.name, state)
            doing.append(f"{name} {state['doing']}")
    done = f"{count - len(running)} of {count} qualities done"
    work.draw("; ".join([done, *doing]))
