"""The results pages of the documentation and README.md's table, made from docs/results/*.json.

    python benchmarks/results.py                       # write the pages
    python benchmarks/results.py --check               # status 1 where a page is not what would be written
    python benchmarks/results.py --store embedded RUN  # rows of a table, from finished runs of main_ptq.py
    python benchmarks/results.py --numbers FILE        # do small runs still give the recorded numbers?
    python benchmarks/results.py --numbers FILE --record "what changed" --affects calibration

One JSON file holds one table with its command, data, bits and checkpoint, and when it was measured.
pages.json says which tables a page has, in which order.

A table is marked as old by this command, not by hand. numbers.json lists every change of what licq computes:
a number, a date, a sentence, and the kinds of results that it affects. A table, or a row, names the last
change that it includes and the kinds that it depends on. It is old when a later change affects one of these.
Moving code does not make a table old. `--numbers` tells when a change was forgotten: it compares the results
of benchmarks/same_numbers.py with recorded hashes. FILE has to be made on the kind of machine that
numbers.json names, because learned numbers depend on it.
"""

import datetime
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from licq.support.cli import ArgumentParser, main_guard
from licq.support.errors import InputError

RESULTS = ROOT / "docs" / "results"
README = ROOT / "README.md"
README_COLUMNS = (0, 1, 2, 4, 6, 8)  # of the table "embedded"
BEGIN, END = "<!-- results: embedded -->", "<!-- /results -->"
NOTE = "<!-- Written by benchmarks/results.py from docs/results/*.json: change these, not this page. -->"


def load(name: str) -> Any:
    """The content of docs/results/<name>.json.

    Raises:
        InputError: no such file, or one that is not JSON.
    """
    path = RESULTS / f"{name}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable table ({error})") from error


def dump(data: dict) -> str:
    """JSON with one line for each row of a table, so that a changed row is one changed line."""
    text = json.dumps(data | {"rows": []} if "rows" in data else data, indent=2, ensure_ascii=False)
    if data.get("rows"):
        rows = ",\n".join("    " + json.dumps(row, ensure_ascii=False) for row in data["rows"])
        text = text.replace('"rows": []', f'"rows": [\n{rows}\n  ]')
    return text + "\n"


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


def render() -> dict[Path, str]:
    """The text of every page, and README.md with its table."""
    changes = load("numbers")["changes"]
    pages = {}
    for page in load("pages"):
        parts = [f"# {page['title']}", NOTE, *page["text"]]
        parts += [section(load(name), changes) for name in page["tables"]]
        if page.get("overview"):
            parts.append(_overview(changes))
        pages[RESULTS / page["file"]] = "\n\n".join(parts) + "\n"
    text = README.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise InputError(f"{README}: the marks {BEGIN} and {END} are missing; put them around the table")
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    pages[README] = pattern.sub(lambda _: f"{BEGIN}\n{_readme_table(changes)}\n{END}", text)
    return pages


def _overview(changes: list[dict]) -> str:
    """Every table with its page and its age, and the changes of the numbers."""
    rows = []
    for page in load("pages"):
        for name in page["tables"]:
            table = load(name)
            parts = rows_of(table, changes)
            dates = sorted({measured["date"] for _, measured, _ in parts})
            old = sum(bool(later) for _, _, later in parts)
            state = (
                "current" if not old else "old" if old == len(parts) else f"{old} of {len(parts)} rows old"
            )
            anchor = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", table["title"]).strip().lower())
            rows.append(
                [
                    f"[{table['title']}]({page['file']}#{anchor})",
                    " to ".join(dates[:: max(1, len(dates) - 1)]),
                    state,
                ]
            )
    listed = [
        [str(each["number"]), each["date"], each["change"], ", ".join(each["affects"])] for each in changes
    ]
    return "\n\n".join(
        [
            "## How old is what",
            markdown_table(["table", "measured", "state"], rows),
            "## Changes of the numbers",
            "At these points licq began to compute other numbers. A table is old if it was measured before a "
            "change that affects it.",
            markdown_table(["number", "date", "change", "affects"], listed),
        ]
    )


def _readme_table(changes: list[dict]) -> str:
    table = load("embedded")
    rows = rows_of(table, changes)
    cells = [[row[index] for index in README_COLUMNS] for row in _marked(rows)]
    lines = [markdown_table([table["columns"][index] for index in README_COLUMNS], cells)]
    if any(later for _, _, later in rows):
        lines.append("† older than a change of the numbers: [results](docs/results/codecs.md) say which.")
    return "\n\n".join(lines)


# Rows from runs


def stored_rows(kind: str, folders: list[Path]) -> list[dict]:
    """Rows of a table from finished runs.

    Args:
        kind: "codecs", one row for each run, or "points", one for each quality.

    Raises:
        InputError: a folder without report.json.
    """
    from benchmarks.codec_table import HEADS, row

    rows = []
    for folder in folders:
        path = folder / "report.json"
        if not path.is_file():
            raise InputError(f"{folder} holds no report.json; give folders that main_ptq.py has finished")
        report = json.loads(path.read_text(encoding="utf-8"))
        date = datetime.date.fromtimestamp(path.stat().st_mtime).isoformat()
        included = [change["number"] for change in load("numbers")["changes"] if change["date"] <= date]
        measured = {"date": date, "version": report["versions"]["licq"], "numbers": max(included, default=0)}
        if kind == "codecs":
            cells = [
                cell for head, cell in zip(HEADS, row(report), strict=True) if head not in ("rates", "images")
            ]
            rows.append({"cells": cells, "measured": measured})
        else:
            rows += [{"cells": point_cells(point), "measured": measured} for point in report["points"]]
    return rows


def point_cells(point: dict) -> list[str]:
    """One rate point of report.json as a row of a table of kind "points"."""

    def codec(name: str, key: str) -> list[str]:
        if name not in point:
            return ["", "", ""]
        return [f"{point[name]['bpp']:.4f}", f"{point[name]['psnr']:.3f}", f"{point[key]:+.2f} %"]

    return [
        f"{point['quality']:g}",
        f"{point['fp32']['bpp']:.4f}",
        f"{point['fp32']['psnr']:.3f}",
        *codec("quant", "delta_j_percent"),
        *codec("baseline", "baseline_delta_j_percent"),
        f"{point['calibration_seconds']:.0f} s",
        f"{point['peak_memory_mb']:.0f} MB",
    ]


def store(name: str, folders: list[Path]) -> None:
    """Put rows of finished runs into a table, in the place of rows with the same first cell.

    Raises:
        InputError: the table is not made from runs.
    """
    table = load(name)
    if "from" not in table:
        raise InputError(f"the table {name!r} is not made from runs of main_ptq.py; change {name}.json")
    fresh = {row["cells"][0]: row for row in stored_rows(table["from"], folders)}
    rows = []
    for row in table["rows"]:
        own = row if isinstance(row, dict) else {"cells": row}
        new = fresh.pop(own["cells"][0], None)
        rows.append(row if new is None else {key: own[key] for key in ("depends",) if key in own} | new)
    (RESULTS / f"{name}.json").write_text(
        dump(table | {"rows": rows + list(fresh.values())}), encoding="utf-8"
    )


# Have the numbers changed?


def fingerprints(results: dict) -> dict[str, str]:
    """A hash of what benchmarks/same_numbers.py stored for each of its runs.

    Left out are times, and hashes of models' files, which hold times.
    """
    return {
        name: hashlib.sha256(json.dumps(_without_times(result), sort_keys=True).encode()).hexdigest()[:16]
        for name, result in sorted(results.items())
    }


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_times(part)
            for key, part in value.items()
            if "seconds" not in key and key != "models"
        }
    return [_without_times(part) for part in value] if isinstance(value, list) else value


def machine() -> str:
    """What learned numbers depend on: PyTorch's version and the instruction set that it uses."""
    import torch

    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"


def read_fingerprints(path: Path) -> dict[str, str]:
    """`fingerprints` of a file that benchmarks/same_numbers.py has written.

    Raises:
        InputError: it is not such a file.
    """
    try:
        return fingerprints(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: not a file of benchmarks/same_numbers.py ({error})") from error


def compare_numbers(path: Path) -> list[str]:
    """The runs in a file of benchmarks/same_numbers.py that differ from the recorded ones.

    Raises:
        InputError: not such a file, or hashes were recorded on another kind of machine.
    """
    numbers = load("numbers")
    if numbers["machine"] != machine():
        raise InputError(
            f"hashes were recorded with {numbers['machine']}, this is {machine()}; compare two checkouts by "
            "benchmarks/same_numbers.py --compare"
        )
    recorded = numbers["fingerprints"]
    return [name for name, value in read_fingerprints(path).items() if recorded.get(name) != value]


def record_change(path: Path, change: str, affects: list[str]) -> None:
    """Write a change of the numbers, and the hashes after it, to numbers.json."""
    numbers = load("numbers")
    entry = {
        "number": numbers["changes"][-1]["number"] + 1,
        "date": datetime.date.today().isoformat(),
        "change": change,
        "affects": affects,
    }
    numbers["changes"].append(entry)
    numbers["machine"] = machine()
    numbers["fingerprints"] |= read_fingerprints(path)
    (RESULTS / "numbers.json").write_text(dump(numbers), encoding="utf-8")


def main() -> int:
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--check", action="store_true", help="only compare the pages with what would be written"
    )
    parser.add_argument("--store", metavar="TABLE", help="put the results of finished runs into this table")
    parser.add_argument(
        "runs", metavar="RUN", nargs="*", type=Path, help="folders of main_ptq.py, for --store"
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
    if args.store:
        store(args.store, args.runs)
    pages = render()
    if args.check:
        different = [
            path for path, text in pages.items() if not path.is_file() or path.read_text("utf-8") != text
        ]
        for path in different:
            print(f"{path.relative_to(ROOT)} is not what benchmarks/results.py writes; run it")
        return int(bool(different))
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
    print(f"{len(pages)} pages written")
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
