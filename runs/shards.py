"""The images of an evaluation in shards: measured here or as tasks of the engine, each kept until all are
there.

    OUT/shards/run.json                what they belong to
    OUT/shards/<first>-<end>/part.json what was measured on images first ... end - 1; of a task, beside its
    log.txt
"""

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from licq.runs.folder import read_json, refuse_other_settings
from licq.support.errors import InputError
from licq.support.files import write_json
from licq.support.progress import time_left
from licq.workers.engine import Engine, Task

PART = "part.json"
# images in a shard: what an interruption costs, and what is worth the start of a process
_MAX_IMAGES, _MIN_IMAGES = 64, 4


def measured_in_shards(
    count: int,
    out: Path,
    settings: dict[str, Any],
    engine: Engine,
    words: Sequence[str],
    resume: bool,
    quiet: bool,
    measure: Callable[[slice], dict],
) -> list[dict]:
    """The parts of all shards, in the order of the images, as they come back from JSON where there is more
    than one.

    Args:
        count: images. settings: everything that the parts depend on.
        words: main_eval.py's command line, for shards in other processes. measure: the part of some images,
        in this process.
        resume: take the parts that an interrupted command has left.

    Raises:
        InputError: a shard failed, or what is to be resumed belongs to other settings.
    """
    shards, folder = _split(count, bool(engine.workers or engine.ray)), out / "shards"
    before = read_json(folder / "run.json") if resume else None
    if before:
        refuse_other_settings(folder, before["settings"], settings)
    else:
        shutil.rmtree(folder, ignore_errors=True)
    if len(shards) == 1 and not (engine.workers or engine.ray):
        return [measure(shards[0])]
    write_json(folder / "run.json", {"settings": settings})
    folders = {f"{shard.start}-{shard.stop}": folder / f"{shard.start}-{shard.stop}" for shard in shards}
    missing = [
        shard for shard, shard_folder in zip(shards, folders.values()) if not (shard_folder / PART).is_file()
    ]
    if len(missing) < len(shards) and not quiet:
        print(f"{len(shards) - len(missing)} of {len(shards)} parts were finished before", file=sys.stderr)
    if engine.workers or engine.ray:
        tasks = [
            Task(
                f"images {name}",
                "main_eval",
                (*words, "--shard", name.replace("-", ":")),
                str(shard_folder.resolve()),
            )
            for name, shard_folder in folders.items()
            if not (shard_folder / PART).is_file()
        ]
        for outcome in engine.run(tasks, "evaluating", "shard", quiet):
            if outcome.error:
                raise InputError(outcome.error)
    else:
        _measure_here(missing, folders, count, measure, quiet)
    return [_read_part(shard_folder) for shard_folder in folders.values()]


def _read_part(shard_folder: Path) -> dict:
    part = read_json(shard_folder / PART)
    if part is None:
        raise InputError(
            f"{shard_folder / PART} is missing or damaged; run the same command again, without --resume"
        )
    return part


def _measure_here(
    missing: Sequence[slice],
    folders: dict[str, Path],
    count: int,
    measure: Callable[[slice], dict],
    quiet: bool,
) -> None:
    started = time.monotonic()
    for index, shard in enumerate(missing):
        if not quiet:
            left = time_left(started, index, len(missing))
            print(f"images {shard.start + 1} to {shard.stop} of {count}{left}", file=sys.stderr, flush=True)
        write_json(folders[f"{shard.start}-{shard.stop}"] / PART, measure(shard))


def _split(count: int, many: bool) -> list[slice]:
    """Ranges of at most 64 images; smaller ones for many workers, but the same for any number of them."""
    size = min(_MAX_IMAGES, max(_MIN_IMAGES, -(-count // _MAX_IMAGES))) if many else _MAX_IMAGES
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def forget_shards(out: Path) -> None:
    """The report is written: what only a resumption needs can go."""
    shutil.rmtree(out / "shards", ignore_errors=True)
