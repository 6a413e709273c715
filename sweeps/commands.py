"""main_ptq.py --sweep: the runs of a sweep file, one after the other or many at once, and one summary.

OUT/sweep.json        the settings: the command line of each run
OUT/finished.json     how each run ended that has ended
OUT/runs/<name>/      an ordinary run of main_ptq.py, and log.txt, what it printed
OUT/shared/           measurements that several runs need: of float codecs, of JPEG; --shared puts them
                      elsewhere
OUT/summary.md, summary.csv, points.csv, plot.png
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from licq.runs.folder import forget_run, read_json, refuse_other_settings
from licq.support import options
from licq.support.cli import ArgumentParser
from licq.support.errors import InputError
from licq.support.files import writable_folder, write_json
from licq.support.version import __version__
from licq.sweeps.grid import Sweep, list_sweeps, load_sweep
from licq.workers.engine import Engine
from licq.workers.task import Task


def add_flags(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """--sweep and where its runs go."""
    parser.add_argument(
        "--sweep",
        metavar="NAME",
        help=f"many runs from one file: {', '.join(list_sweeps())} or the path of a YAML file; "
        "other flags hold for every run; docs/sweeps.md says more (default: one run)",
    )
    parser.add_argument(
        "--only",
        metavar="AXIS=VALUE",
        type=options.assignment,
        action="append",
        default=[],
        help="of a sweep only the runs at these values of an axis, separated by commas; repeatable. With "
        "--resume others are added to what a folder holds (default: all)",
    )
    options.add_engine(parser)


def run(argv: Sequence[str], parser: ArgumentParser, check: Callable[[argparse.Namespace], object]) -> int:
    """Run main_ptq.py with --sweep.

    Args:
        argv: its command line.
        parser: of main_ptq.py.
        check: raises InputError for settings of a run that make no sense.

    Returns:
        The exit status.

    Raises:
        InputError: the sweep cannot be run; or runs have failed, when all others are done and the summary is
            written.
    """
    of_the_sweep = ArgumentParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    add_flags(of_the_sweep)
    of_the_sweep.add_argument("--out")
    of_the_sweep.add_argument("--shared")
    of_the_sweep.add_argument("--threads", type=options.threads)
    of_the_sweep.add_argument("--resume", action="store_true")
    of_the_sweep.add_argument("--quiet", action="store_true")
    args, changes = of_the_sweep.parse_known_args(argv)
    sweep = load_sweep(args.sweep, parser, changes)
    if args.ray and args.gpu_share is None:
        args.gpu_share = sweep.gpu_share
    out = Path(args.out or f"runs/sweep_{sweep.name}")
    before = read_json(out / "sweep.json") if args.resume else None
    if before and args.threads is None:
        args.threads = before["settings"]["threads"]  # the last digits of every run depend on it
    engine = Engine.from_args(args)
    chosen = {one.name for one in sweep.chosen(args.only)}
    for one in sweep.runs:
        try:
            check(parser.parse_args(one.words))
        except InputError as error:
            raise InputError(f"--sweep {args.sweep}, run {one.name}: {error}") from error
    threads = engine.threads or _threads_of_torch()  # stated, so that a resumption elsewhere has as many
    engine = replace(engine, threads=threads)
    words = {one.name: _with_threads(one.words, threads) for one in sweep.runs}
    settings = {"licq": __version__, "sweep": sweep.name, "threads": threads, "runs": words}
    if before:
        refuse_other_settings(out, _named_threads(before["settings"]), settings)
    writable_folder(out)
    if not before:
        # A run whose worker dies is resumed. It must not find what another sweep has left in its folder.
        for one in sweep.runs:
            forget_run(out / "runs" / one.name)
    finished = (read_json(out / "finished.json") or {}) if before else {}
    write_json(out / "sweep.json", {"settings": settings})
    write_json(out / "finished.json", finished)
    done = {
        name
        for name, outcome in finished.items()
        if outcome["error"] is None and (out / "runs" / name).is_dir()
    }
    shared = str(Path(args.shared or out / "shared").resolve())
    tasks = [
        Task(
            one.name,
            "main_ptq",
            tuple(words[one.name]),
            str((out / "runs" / one.name).resolve()),
            shared,
            before is not None,
        )
        for one in sweep.runs
        if one.name in chosen - done
    ]
    if done & chosen and not args.quiet:
        print(f"{len(done & chosen)} of {len(chosen)} runs were finished before", file=sys.stderr)
    for outcome in engine.run(tasks, f"sweep {sweep.name}", "run", args.quiet):
        finished[outcome.task.name] = {
            "error": outcome.error,
            "attempts": outcome.attempts,
            "seconds": outcome.seconds,
        }
        write_json(out / "finished.json", finished)
        if outcome.error and not args.quiet:
            print(f"run {outcome.task.name} failed: {outcome.error}", file=sys.stderr)
    return _finish(out, sweep, finished)


def _threads_of_torch() -> int:
    """The number of threads that PyTorch has chosen."""
    import torch

    return torch.get_num_threads()


def _with_threads(words: Sequence[str], threads: int) -> list[str]:
    """The command line of a run with the number of threads, where it does not have one already."""
    return [*words, *(["--threads", str(threads)] if "--threads" not in words else [])]


def _named_threads(settings: dict) -> dict:
    """Settings of a sweep, with the number of threads that earlier versions did not state."""
    if settings["threads"] is not None:
        return settings
    threads = _threads_of_torch()
    return settings | {
        "threads": threads,
        "runs": {name: _with_threads(words, threads) for name, words in settings["runs"].items()},
    }


def _finish(out: Path, sweep: Sweep, finished: dict[str, dict]) -> int:
    """Write and print the summary; returns the exit status."""
    from licq.sweeps.summary import Result, write_summary  # here: matplotlib takes a second to import

    results = [
        Result.of(one, out / "runs" / one.name, finished[one.name]["error"])
        for one in sweep.runs
        if one.name in finished
    ]
    tables = write_summary(out, sweep, results)
    print(f"{sweep.title}\n\n{tables}\n\nsummary:  {out / 'summary.md'}, summary.csv, points.csv")
    failed = [result for result in results if result.error]
    if failed:
        names = ", ".join(result.run.name for result in failed[:3])
        more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
        raise InputError(
            f"{len(failed)} of {len(results)} runs failed: {names}{more} ({failed[0].error}); mend that and "
            f"go on with --resume; {out / 'summary.md'} has the others"
        )
    return 0
