"""The tables of the docs that runs of main_ptq.py make: run what is open, store it, write the pages.

    python benchmarks/tables.py --list                               # what is open, old, current; hours
    LICQ_DATA=... python benchmarks/tables.py --workers 2 --hours 10 # in the order of benchmarks/tables.yaml
    python benchmarks/tables.py --only paper-w8a8/minnen2018/nearest # TABLE/CODEC/METHOD; * for any
    python benchmarks/tables.py --show paper-w8a8                    # a table as it is now

A cell of the plan is one run of main_ptq.py. A finished one is stored in docs/results/cells. The same
command goes on where it was stopped, within a cell too, as long as the code is the same. What was not reached
stays open.
"""

import contextlib
import fnmatch
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout, whatever is installed

from tabulate import tabulate

import main_ptq
from benchmarks import results
from benchmarks.plan import PLAN, Cell, Plan, Table
from benchmarks.records import Records, code_digest, make_record, stamp
from licq.runs.folder import read_json
from licq.support import options
from licq.support.cli import ArgumentParser, main_guard
from licq.support.errors import InputError
from licq.support.files import writable_folder, write_json
from licq.support.work import in_words, side_by_side
from licq.workers.processes import in_processes
from licq.workers.task import Outcome, Task, last_log_line

_SAY_EVERY = 30  # seconds between two lines of progress in a log, 1 on a terminal


@dataclass
class Measuring:
    """The cells that a command measures.

    Args:
        plan, records: what there is to measure, and what has been.
        out: the runs' folder; those of one state of the code lie together.
        only: patterns TABLE/CODEC/METHOD; none for everything.
        redo_old: old cells are measured again; else only open ones.
        deadline: `time.monotonic()` at which the last cell should be finished.
    """

    plan: Plan
    records: Records
    out: Path
    only: list[str]
    redo_old: bool = True
    workers: int = 1
    deadline: float = float("inf")
    quiet: bool = False
    started: dict[str, tuple[Cell, dict[str, Any], float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    finished: int = 0

    def __post_init__(self):
        self.folder = self.out / code_digest()
        self.failed_before = read_json(self.folder / "failed.json") or {}

    def tables(self) -> list[Table]:
        return self.plan.tables(self.records.ranked)

    def unfinished(self) -> list[Cell]:
        """The cells that are not current, and can be run, in their order."""
        cells = dict.fromkeys(
            cell for table in self.tables() for cell in table.distinct if is_chosen(table, cell, self.only)
        )
        states = ("open", "old") if self.redo_old else ("open",)
        return [cell for cell in cells if not cell.problem and self.records.state(cell) in states]

    def left(self) -> list[Cell]:
        """Those of them that this command has not begun."""
        return [
            cell for cell in self.unfinished() if cell.key not in self.started and cell.key not in self.failed
        ]

    def tasks(self) -> Iterator[Task]:
        """The next cell that still fits, again and again: which one it is depends on what is finished."""
        while True:
            now = time.monotonic()
            fitting = (cell for cell in self.left() if now + 60 * self.records.minutes(cell) <= self.deadline)
            cell = next(fitting, None)
            if cell is None:
                return
            self.started[cell.key] = cell, stamp(), now
            self.say(f"begins {cell.key}, {in_words(60 * self.records.minutes(cell))}")
            yield self.task(cell)

    def task(self, cell: Cell) -> Task:
        folder = self.folder / cell.key
        words = tuple(self.plan.here(cell.words))
        return Task(cell.key, "main_ptq", words, str(folder), str(self.folder / "shared"), resume=True)

    def run(self) -> None:
        """Measure. A cell that fails does not stop the others."""
        shown = time.monotonic()
        interval = 1 if sys.stderr.isatty() else _SAY_EVERY
        while self.left():
            before = len(self.started)
            with contextlib.closing(in_processes(self.tasks(), self.workers)) as outcomes:
                for outcome in outcomes:
                    if outcome is not None:
                        self.take(outcome)
                    elif time.monotonic() - shown > interval:
                        self.say(self.progress())
                        shown = time.monotonic()
            if len(self.started) == before:  # nothing fits
                return

    def take(self, outcome: Outcome) -> None:
        """Store the result of a cell that has ended, or why it has failed."""
        cell, measured, since = self.started[outcome.task.name]
        error = outcome.error
        if error is None:
            try:
                minutes = (time.monotonic() - since) / 60
                self.records.put(cell, make_record(cell, Path(outcome.task.folder), measured, minutes))
                self.finished += 1
            except InputError as raised:
                error = str(raised)
        self.failed_before.pop(cell.key, None)
        if error is not None:
            self.failed[cell.key] = error
            self.say(f"{cell.key} failed: {error}")
        write_json(self.folder / "failed.json", self.failed_before | self.failed)

    def progress(self) -> str:
        """How many cells are finished, how long the others take, and what was said last."""
        running = [cell for cell, _, _ in self.started.values() if self.records.state(cell) != "current"]
        running = [cell for cell in running if cell.key not in self.failed]
        left = [60 * self.records.minutes(cell) for cell in [*running, *self.left()]]
        words = in_words(side_by_side(left, self.workers)) if left else "nothing"
        until = (
            ""
            if self.deadline == float("inf")
            else f", stops in {in_words(self.deadline - time.monotonic())}"
        )
        last = last_log_line([self.task(cell) for cell in running])
        return f"{self.finished} finished, {len(left)} left, {words}{until}; {last}"

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)


def is_chosen(table: Table, cell: Cell, only: list[str]) -> bool:
    """Whether a cell of a table matches one of the patterns TABLE/CODEC/METHOD, or there are none."""
    if not only:
        return True
    methods = {
        dict(labels).get("method", "")
        for labels, cells in table.cells.items()
        for other in cells
        if other == cell
    }
    for pattern in only:
        parts = [*pattern.split("/", 2), "*", "*"][:3]
        if (
            fnmatch.fnmatch(table.name, parts[0])
            and fnmatch.fnmatch(cell.codec, parts[1])
            and any(fnmatch.fnmatch(name, parts[2]) for name in {*methods, cell.name})
        ):
            return True
    return False


def check_only(tables: list[Table], only: list[str]) -> None:
    """Raises InputError for a pattern that matches no cell."""
    for pattern in only:
        if not any(is_chosen(table, cell, [pattern]) for table in tables for cell in table.distinct):
            names = ", ".join(table.name for table in tables)
            raise InputError(
                f"--only {pattern}: no cell of the plan; it is TABLE/CODEC/METHOD, tables are {names}"
            )


def listed(measuring: Measuring) -> str:
    """What is open, old, current and failed, with the hours that the rest takes."""
    records, seen, rows, details = measuring.records, set(), [], []
    total = 0.0
    for table in measuring.tables():
        cells = [cell for cell in table.distinct if is_chosen(table, cell, measuring.only)]
        if measuring.only and not cells:
            continue
        states = [records.state(cell) for cell in cells]
        new = [cell for cell in cells if cell not in seen]
        unfinished = [cell for cell in new if records.state(cell) != "current" and not cell.problem]
        minutes = sum(map(records.minutes, unfinished))
        seen.update(cells)
        total += minutes
        rows.append(
            [table.name, len(cells), *(states.count(state) for state in ("current", "old", "open"))]
            + [sum(cell.problem is not None for cell in cells), len(new), f"{minutes / 60:.1f}"]
        )
        if measuring.only:
            details += [
                f"{state:8} {records.minutes(cell):6.1f} min  {cell.key}"
                for cell, state in zip(cells, states)
            ]
    heads = ["table", "cells", "current", "old", "open", "cannot run", "in no table before", "hours"]
    lines = [tabulate(rows, heads, tablefmt="github"), f"{total / 60:.1f} hours of one thread are left."]
    problems: dict[str, list[str]] = {}
    for cell in seen:
        if cell.problem:
            problems.setdefault(cell.problem, []).append(cell.key)
    lines += [f"cannot run ({why}): {len(keys)} cells" for why, keys in problems.items()]
    lines += [f"failed: {key}: {why}" for key, why in (measuring.failed_before | measuring.failed).items()]
    return "\n".join([*lines, *details])


def others() -> str:
    """The tables that have commands of their own, with their age."""
    lines = ["Tables with commands of their own (docs/results/NAME.json):"]
    for name, state, command in results.stored_tables():
        lines.append(f"  {name}: {state}" + (f"\n      {command}" if command else ""))
    return "\n".join(lines)


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="CONTRIBUTING.md says more: Make the tables",
        allow_abbrev=False,
    )
    parser.add_argument("--list", action="store_true", help="only say what is open, old and current")
    parser.add_argument("--show", metavar="TABLE", help="only print this table as it is now")
    parser.add_argument(
        "--only",
        metavar="TABLE/CODEC/METHOD",
        action="append",
        default=[],
        help="only these cells, with * for any; repeatable (default: all)",
    )
    parser.add_argument(
        "--workers", metavar="N", type=options.positive, default=1, help="runs at a time (default: 1)"
    )
    parser.add_argument(
        "--hours",
        metavar="H",
        type=options.positive_number,
        help="begin no cell that would not be finished within so many hours (default: no limit)",
    )
    parser.add_argument(
        "--open", action="store_true", help="leave old cells as they are (default: measured again)"
    )
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        type=Path,
        default=Path("runs/tables"),
        help="the runs (default: %(default)s)",
    )
    parser.add_argument(
        "--cells",
        metavar="FOLDER",
        type=Path,
        help="records elsewhere than in docs/results/cells; no pages are written",
    )
    parser.add_argument(
        "--plan", metavar="FILE", type=Path, default=PLAN, help="(default: benchmarks/tables.yaml)"
    )
    parser.add_argument(
        "--checkpoints",
        metavar="FOLDER",
        type=Path,
        help="of public codecs (default: $LICQ_DATA/checkpoints)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    return parser


def main() -> int:
    args = build_parser().parse_args()
    plan = Plan(args.plan, main_ptq.build_parser(), args.checkpoints)
    records = Records(args.cells)
    measuring = Measuring(
        plan, records, args.out.resolve(), args.only, not args.open, args.workers, quiet=args.quiet
    )
    tables = measuring.tables()
    check_only(tables, args.only)
    if args.show:
        known = {table.name: table for table in tables}
        if args.show not in known:
            raise InputError(f"--show {args.show}: no such table; choose from {', '.join(known)}")
        print(results.plan_section(known[args.show], records))
        return 0
    if args.list:
        print(listed(measuring))
        if not args.only:
            print(others())
        return 0
    writable_folder(measuring.folder)
    if args.hours:
        measuring.deadline = time.monotonic() + 3600 * args.hours
    try:
        measuring.run()
    finally:
        if args.cells is None and measuring.finished:
            results.write()
    print(listed(measuring))
    for key, why in measuring.failed.items():
        print(f"failed: {key}: {why}", file=sys.stderr)
    return 2 if measuring.failed else 0


if __name__ == "__main__":
    sys.exit(main_guard(main, "the same command goes on where it was stopped"))
