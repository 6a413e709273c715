"""The results pages of the documentation and README.md's table.

    python benchmarks/results.py                       # write the pages
    python benchmarks/results.py --check               # status 1 where a page is not what would be written
    python benchmarks/results.py --numbers FILE        # do small runs still give the recorded numbers?
    python benchmarks/results.py --numbers FILE --record "what changed" --affects calibration

pages.json says which tables a page has, in which order. A table is one of two kinds:

- of the plan, benchmarks/tables.yaml: made of the records in docs/results/cells, which benchmarks/tables.py
  measures;
- stored: docs/results/<name>.json holds it with its own command, data, bits and checkpoint, and when it was
  measured.

A figure is marked as old by this command, not by hand. numbers.json lists every change of what licq computes:
a number, a date, a sentence, and the kinds of results that it affects. A cell, a table or a row has the last
change that it includes and the kinds that it depends on. It is old when a later change affects one of these.
Moving code does not make it old. `--numbers` tells when a change was forgotten: it compares the results
of benchmarks/same_numbers.py with recorded hashes. FILE has to be made on the kind of machine that
numbers.json names, because learned numbers depend on it.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout, whatever is installed

import main_ptq
from benchmarks import stored
from benchmarks.fingerprints import compare_numbers, record_change
from benchmarks.plan import PLAN, Plan, Table
from benchmarks.records import Records
from benchmarks.shown import OLD, OPEN, Shown, status_of_plan
from licq.support.cli import ArgumentParser, main_guard
from licq.support.errors import InputError

README = ROOT / "README.md"
IN_README = "embedded"  # the table of the plan that README.md shows a part of
README_COLUMNS = ("BD-rate", "delta J", "licq, calibration", "licq, file, of float's")  # ends of their titles
BEGIN, END = "<!-- results: embedded -->", "<!-- /results -->"
NOTE = "<!-- Written by benchmarks/results.py: change what it reads in docs/results, not this page. -->"


# Which results are old


def later_changes(measured: dict, depends: list[str], changes: list[dict]) -> list[dict]:
    """The changes of numbers.json after `measured` that affect one of the kinds in `depends`."""
    return [
        change
        for change in changes
        if change["number"] > measured["numbers"] and set(change["affects"]) & set(depends)
    ]


def rows_of(table: dict, changes: list[dict]) -> list[tuple[list[str], dict, list[dict]]]:
    """(cells, when measured, later changes) of each row. A row may name its own `measured` and `depends`."""
    rows = []
    for row in table["rows"]:
        own = row if isinstance(row, dict) else {"cells": row}
        measured = own.get("measured", table["measured"])
        depends = table["depends"] + own.get("depends", [])
        rows.append((own["cells"], measured, later_changes(measured, depends, changes)))
    return rows


# Pages


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _when(measured: dict) -> str:
    return f"measured {measured['date']}, version {measured['version']}"


def _since(changes: list[dict]) -> str:
    return " ".join(f"{change['change']} ({change['date']})." for change in changes)


def status(rows: list[tuple[list[str], dict, list[dict]]]) -> list[str]:
    """What is said about the age of a table's rows: one paragraph for each group of rows of one age."""
    groups: dict[tuple, list[str]] = {}
    facts: dict[tuple, tuple[dict, list[dict]]] = {}
    for cells, measured, changes in rows:
        key = (measured["date"], measured["version"], tuple(change["number"] for change in changes))
        groups.setdefault(key, []).append(_plain(cells[0]))
        facts[key] = (measured, changes)
    lines = []
    for key, names in groups.items():
        measured, changes = facts[key]
        which = "This table" if len(groups) == 1 else ", ".join(dict.fromkeys(names))
        if changes:
            mark = "† " if _is_mixed(rows) else ""
            lines.append(f"**{mark}Old.** {which}: {_when(measured)}. Changed since: {_since(changes)}")
        else:
            lines.append(f"{which}: {_when(measured)}; nothing that it depends on has changed since.")
    return lines


def _plain(cell: str) -> str:
    return cell.replace("*", "").replace("`", "")


def _is_mixed(rows: list[tuple[list[str], dict, list[dict]]]) -> bool:
    """Some rows are old and some are not."""
    return len({bool(changes) for _, _, changes in rows}) > 1


def _unbroken(cell: str) -> str:
    """A short cell stays on one line: on a page wide tables scroll."""
    return cell.replace(" ", "\u00a0") if len(cell) <= 24 else cell


def _marked(rows: list[tuple[list[str], dict, list[dict]]]) -> list[list[str]]:
    """The cells, with a dagger at the first one of a row that is old where others are not."""
    mixed = len({bool(changes) for _, _, changes in rows}) > 1
    return [[cells[0] + " †", *cells[1:]] if mixed and changes else list(cells) for cells, _, changes in rows]


def section(table: dict, changes: list[dict]) -> str:
    """A table as a section of a page."""
    rows = rows_of(table, changes)
    parts = [f"## {table['title']}", *table["text"]]
    if table["settings"]:
        parts.append("\n".join(f"- **{name}:** {value}" for name, value in table["settings"].items()))
    if table["command"]:
        parts.append("```bash\n" + "\n".join(table["command"]) + "\n```")
    parts.append(
        markdown_table(table["columns"], [[_unbroken(cell) for cell in row] for row in _marked(rows)])
    )
    parts.append("\n>\n".join(f"> {line}" for line in status(rows)))
    if table["notes"]:
        parts.append("\n".join(f"- {note}" for note in table["notes"]))
    return "\n\n".join(parts)


# Tables of the plan


def plan_tables() -> tuple[dict[str, Table], Records]:
    """The tables of benchmarks/tables.yaml by their names, and the stored records."""
    records = Records()
    tables = Plan(PLAN, main_ptq.build_parser()).tables(records.ranked)
    return {table.name: table for table in tables}, records


def plan_section(table: Table, records: Records) -> str:
    """A table of the plan as a section of a page."""
    shown = Shown(table, records)
    parts = [f"## {table.content['title']}", *table.content.get("text", ())]
    parts.append(f"```bash\npython benchmarks/tables.py --only {table.name}\n```")
    if shown.rows:
        rows = [[_unbroken(cell) for cell in row] for row in shown.rows]
        parts.append(markdown_table(shown.columns, rows))
    parts.append("\n>\n".join(f"> {line}" for line in status_of_plan(table, records)))
    if table.content.get("notes"):
        parts.append("\n".join(f"- {note}" for note in table.content["notes"]))
    return "\n\n".join(parts)


def stored_tables() -> list[tuple[str, str, str]]:
    """(name, state, command) of every table that is stored with a command of its own."""
    changes = stored.load("numbers")["changes"]
    planned, _ = plan_tables()
    return [
        (name, _state(rows_of(table, changes))[1], "\n      ".join(table["command"]))
        for page in stored.load("pages")
        for name in page["tables"]
        if name not in planned
        for table in [stored.load(name)]
    ]


# Pages as files


def render() -> dict[Path, str]:
    """The text of every page, and README.md with its table."""
    changes = stored.load("numbers")["changes"]
    planned, records = plan_tables()
    pages = {}
    for page in stored.load("pages"):
        parts = [f"# {page['title']}", NOTE, *page["text"]]
        for name in page["tables"]:
            if name in planned:
                parts.append(plan_section(planned[name], records))
            else:
                parts.append(section(stored.load(name), changes))
        if page.get("overview"):
            parts.append(_overview(changes, planned, records))
        pages[stored.RESULTS / page["file"]] = "\n\n".join(parts) + "\n"
    text = README.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise InputError(f"{README}: the marks {BEGIN} and {END} are missing; put them around the table")
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    table = _readme_table(planned[IN_README], records)
    pages[README] = pattern.sub(lambda _: f"{BEGIN}\n{table}\n{END}", text)
    return pages


def write() -> int:
    """Write the pages; returns their number."""
    pages = render()
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
    return len(pages)


def _state(rows: list[tuple[list[str], dict, list[dict]]]) -> tuple[str, str]:
    """When a stored table was measured, and whether it is old."""
    dates = sorted({measured["date"] for _, measured, _ in rows})
    old = sum(bool(later) for _, _, later in rows)
    state = "current" if not old else "old" if old == len(rows) else f"{old} of {len(rows)} rows old"
    return " to ".join(dates[:: max(1, len(dates) - 1)]), state


def _state_of_plan(table: Table, records: Records) -> tuple[str, str]:
    """The same of a table of the plan."""
    cells = table.distinct
    dates = sorted({record["date"] for cell in cells if (record := records.get(cell))})
    states = [records.state(cell) for cell in cells]
    count = {state: states.count(state) for state in ("current", "old", "open")}
    words = [f"{number} {state}" for state, number in count.items() if number]
    return " to ".join(dates[:: max(1, len(dates) - 1)]), ", ".join(words) + " cells" if words else "open"


def _overview(changes: list[dict], planned: dict[str, Table], records: Records) -> str:
    """Every table with its page and its age, and the changes of the numbers."""
    rows = []
    for page in stored.load("pages"):
        for name in page["tables"]:
            if name in planned:
                title, state = planned[name].content["title"], _state_of_plan(planned[name], records)
            else:
                table = stored.load(name)
                title, state = table["title"], _state(rows_of(table, changes))
            anchor = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())
            rows.append([f"[{title}]({page['file']}#{anchor})", *state])
    listed = [
        [str(each["number"]), each["date"], each["change"], ", ".join(each["affects"])] for each in changes
    ]
    return "\n\n".join(
        [
            "## How old is what",
            markdown_table(["table", "measured", "state"], rows),
            "## Changes of the numbers",
            "At these points licq began to compute other numbers. A figure is old if it was measured before "
            "a change that affects it.",
            markdown_table(["number", "date", "change", "affects"], listed),
        ]
    )


def _readme_table(table: Table, records: Records) -> str:
    shown = Shown(table, records)
    chosen = [
        index
        for index, title in enumerate(shown.columns)
        if index == 0 or title.endswith(README_COLUMNS) and "MS-SSIM" not in title
    ]
    rows = [[row[index] for index in chosen] for row in shown.rows]
    lines = [markdown_table([shown.columns[index] for index in chosen], rows)]
    for mark, words in ((OLD, "older than a change of the numbers"), (OPEN, "not yet, with this version")):
        if any(mark in cell for row in rows for cell in row):
            lines.append(f"{mark}: {words}; [results](docs/results/codecs.md) say which.")
    return "\n\n".join(lines)


def main() -> int:
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--check", action="store_true", help="only compare the pages with what would be written"
    )
    parser.add_argument("--numbers", metavar="FILE", type=Path, help="results of same_numbers.py to compare")
    parser.add_argument(
        "--record", metavar="TEXT", help="with --numbers: say what has changed, and record it"
    )
    parser.add_argument(
        "--affects", nargs="+", default=["calibration"], help="kinds of results that it changes"
    )
    args = parser.parse_args()
    if args.numbers and args.record:
        record_change(args.numbers, args.record, args.affects)
    elif args.numbers:
        different = compare_numbers(args.numbers)
        print(f"changed: {', '.join(different)}; if that is meant: --record" if different else "equal")
        return int(bool(different))
    if args.check:
        different = [
            path for path, text in render().items() if not path.is_file() or path.read_text("utf-8") != text
        ]
        for path in different:
            print(f"{path.relative_to(ROOT)} is not what benchmarks/results.py writes; run it")
        return int(bool(different))
    print(f"{write()} pages written")
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
