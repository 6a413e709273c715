"""Tables of the plan in Markdown, made of records.

`show.shape` of a table says how: "pivot" (default), "points", "layers", "landscape" or "claims". A cell of
the plan that has no record is "not measured"; a figure older than the code that it measures has a dagger.
"""

import itertools
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, whatever is installed

from benchmarks.plan import Cell, Table
from benchmarks.records import Records, delta_j
from licq.sweeps.values import one_of

OPEN, OLD = "not measured", "†"
SIMULATED = "simulated"


def percent(value: float) -> str:
    return f"{value:+.0f} %" if abs(value) >= 100 else f"{value:+.2f} %"


def between(values: list[float], form: str) -> str:
    """The smallest and the largest value."""
    low, high = (format(end, form) for end in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _of_points(key: str, form: str, unit: str) -> Callable[[dict], str]:
    def text(record: dict) -> str:
        values = [point[key] for point in record["points"] if point[key] is not None]
        return f"{between(values, form)} {unit}" if values else "n/a"

    return text


def _size(record: dict) -> str:
    shares = [100 * point["model_bytes"] / point["fp32_model_bytes"] for point in record["points"]]
    return f"{between(shares, '.1f')} %"


# Of numbers tables have the mean over seeds, of texts that of the first seed.
NUMBERS: dict[str, tuple[str, Callable[[dict], float | None]]] = {
    "bd_rate": ("BD-rate", lambda record: record["bd_rate_psnr"]),
    "bd_rate_files": ("BD-rate, files", lambda record: record["bd_rate_psnr_real"]),
    "bd_rate_cubic": ("BD-rate, cubic", lambda record: record["bd_rate_psnr_cubic"]),
    "bd_rate_ms_ssim": ("MS-SSIM BD-rate", lambda record: record["bd_rate_ms_ssim"]),
    "delta_j": ("delta J", delta_j),
}
TEXTS: dict[str, tuple[str, Callable[[dict], str]]] = {
    "delta_j_range": ("delta J of the rates", _of_points("delta_j_percent", "+.2f", "%")),
    "calibration": ("calibration", _of_points("calibration_seconds", ".0f", "s")),
    "memory": ("peak memory", _of_points("peak_memory_mb", ".0f", "MB")),
    "size": ("file, of float's", _size),
}
PAPER = "paper"
TITLES = {name: title for name, (title, _) in (NUMBERS | TEXTS).items()} | {PAPER: "paper"}


class Shown:
    """A table as columns and rows of text.

    Attributes:
        columns, rows: the header, and the cells of each line.
    """

    def __init__(self, table: Table, records: Records):
        self.table, self.records = table, records
        self.show: Mapping[str, Any] = table.content.get("show") or {}
        self.columns: list[str] = []
        self.rows: list[list[str]] = []
        shape = one_of(self.show.get("shape", "pivot"), f"{table.name}: shape", _SHAPES)
        if table.cells:
            _SHAPES[shape](self)

    def names(self, key: str) -> list[str]:
        """The axes that `show` gives under a key."""
        given = self.show.get(key) or []
        return [
            one_of(axis, f"{self.table.name}: {key}", self.table.axes)
            for axis in (given if isinstance(given, list) else [given])
        ]

    def combinations(self, axes: list[str]) -> list[dict[str, str]]:
        """The labels of these axes at which the table has cells."""
        found = dict.fromkeys(
            tuple((axis, dict(labels)[axis]) for axis in axes)
            for labels in self.table.cells
            if set(axes) <= dict(labels).keys()
        )
        order = {combination: index for index, combination in enumerate(self._product(axes))}
        return [dict(combination) for combination in sorted(found, key=lambda one: order[one])]

    def _product(self, axes: list[str]) -> list[tuple[tuple[str, str], ...]]:
        pairs = ([(axis, label) for label in self.table.axes[axis]] for axis in axes)
        return list(itertools.product(*pairs))

    def mark(self, text: str, cells: list[Cell]) -> str:
        """The text with a dagger where a cell is old."""
        return f"{text} {OLD}" if any(self.records.state(cell) == "old" for cell in cells) else text

    def figure(self, name: str, labels: Mapping[str, str]) -> str:
        """One value of the cells at these labels: empty where the table has none."""
        if name == PAPER:
            published = (
                self.table.content.get("paper", {}).get(labels.get("method"), {}).get(labels.get("codec"))
            )
            return "" if published is None else percent(published)
        cells = self.table.at(**labels)
        if not cells:
            return ""
        known = [record for cell in cells if (record := self.records.get(cell))]
        if not known:
            return OPEN
        one_of(name, f"{self.table.name}: value", TITLES)
        if name in TEXTS:
            return self.mark(TEXTS[name][1](known[0]), cells)
        values = self.records.value(cells, NUMBERS[name][1])
        if not values:
            return self.mark("n/a", cells)
        text = percent(statistics.mean(values))
        if len(cells) > 1:
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            text = f"{text.removesuffix(' %')}{spread} %"
            text += "" if len(values) == len(cells) else f" ({len(values)} of {len(cells)} seeds)"
        return self.mark(text, cells)

    def label(self, labels: Mapping[str, str], name: str) -> str:
        """A label of a row; a method that no integer machine computes says so."""
        cells = [
            cell
            for key, seeds in self.table.cells.items()
            if labels.items() <= dict(key).items()
            for cell in seeds
        ]
        simulated = name == "method" and all(
            cell.config.get("a_scales") == SIMULATED
            or 32 in (cell.config.get("a_bits"), cell.config.get("w_bits"))
            for cell in cells
        )
        return f"{labels[name]} ({SIMULATED})" if simulated else labels[name]


def _pivot(shown: Shown) -> None:
    """A row for each combination of labels of `rows`; for each of `columns` the `values`; then `more`."""
    rows, columns = shown.names("rows"), shown.names("columns")
    figures = []
    for labels in shown.combinations(columns):
        for name in shown.show.get("values", ["bd_rate", "delta_j"]):
            figures.append((", ".join([*labels.values(), TITLES.get(name, name)]), name, labels))
    for one in shown.show.get("more", ()):
        labels = {axis: label for axis, label in one.items() if axis != "value"}
        figures.append((", ".join([*labels.values(), TITLES[one["value"]]]), one["value"], labels))
    lines = []
    for labels in shown.combinations(rows):
        cells = [shown.figure(name, labels | at) for _, name, at in figures]
        first = [cells for _, _, at in figures for cells in [shown.table.at(**(labels | at))]]
        values = [value for one in first for value in shown.records.value(one, delta_j)]
        order = (statistics.mean(values) if values else float("inf")) if shown.show.get("sort") else 0
        lines.append((order, [*(shown.label(labels, axis) for axis in rows), *cells]))
    filled = [any(cells[len(rows) + index] for _, cells in lines) for index in range(len(figures))]
    shown.columns = rows + [title for (title, _, _), any_of in zip(figures, filled) if any_of]
    for _, cells in sorted(lines, key=lambda line: line[0]):
        values = [cell for cell, any_of in zip(cells[len(rows) :], filled) if any_of]
        shown.rows.append([*cells[: len(rows)], *values])


def _points(shown: Shown) -> None:
    """A row for each rate: of the float codec bpp and PSNR, of each method bpp, PSNR and change of J."""
    rows, columns = shown.names("rows"), shown.names("columns")
    methods = shown.combinations(columns)
    shown.columns = [*rows, "quality", "float bpp", "float PSNR"]
    for labels in methods:
        shown.columns += [f"{', '.join(labels.values())}: {what}" for what in ("bpp", "PSNR", "delta J")]
    for labels in shown.combinations(rows):
        cells = [(shown.table.at(**(labels | at)) or [None])[0] for at in methods]
        known = [cell and shown.records.get(cell) for cell in cells]
        first = next((record for record in known if record), None)
        names = [labels[axis] for axis in rows]
        if first is None:
            shown.rows.append([*names, "", OPEN, "", *[""] * 3 * len(methods)])
            continue
        for index, point in enumerate(first["points"]):
            row = [*names, f"{point['quality']:g}"]
            row += [f"{point['fp32']['bpp_estimated']:.4f}", f"{point['fp32']['psnr']:.3f}"]
            for cell, record in zip(cells, known):
                if record is None:
                    row += [OPEN if cell else "", "", ""]
                    continue
                quant, rise = record["points"][index]["quant"], record["points"][index]["delta_j_percent"]
                row += [f"{quant['bpp']:.4f}", f"{quant['psnr']:.3f}"]
                row.append(shown.mark("n/a" if rise is None else percent(rise), [cell]))
            shown.rows.append(row)


def _layers(shown: Shown) -> None:
    """A row for each rate: what learning did on its crops, and the layers with most of what is predicted."""
    rows = shown.names("rows")
    shown.columns = [*rows, "quality", "before learning", "after", "predicted: inputs"]
    shown.columns += ["predicted: weights, if nearest", "layers with most of it"]
    for labels in shown.combinations(rows):
        (cell,) = shown.table.at(**labels)
        record = shown.records.get(cell)
        names = [labels[axis] for axis in rows]
        if record is None:
            shown.rows.append([*names, "", OPEN, "", "", "", ""])
        for point in record["points"] if record else ():
            learned = point.get("learned")
            if learned is None:
                continue
            layers = ", ".join(f"{name} {rise:.2f} %" for name, rise in learned["layers"].items())
            figures = [f"{learned[key]:+.2f} %" for key in ("start", "end")]
            figures += [f"{learned[key]:.2f} %" for key in ("inputs", "weights")]
            shown.rows.append([*names, f"{point['quality']:g}", *figures, shown.mark(layers, [cell])])


def _landscape(shown: Shown) -> None:
    """A row for each cell: where the errors and J are least over the range of one layer's weights."""
    rows = shown.names("rows")
    measures = {"error": "least error of weights", "output_error": "of the output", "rise": "least J"}
    shown.columns = [*rows, "layer", *(f"{title}: N, rise of J" for title in measures.values()), "minima"]
    for labels in shown.combinations(rows):
        cells = shown.table.at(**labels)
        record = cells and shown.records.get(cells[0])
        names = [labels[axis] for axis in rows]
        if not record:
            shown.rows.append([*names, OPEN, *[""] * (len(measures) + 1)])
            continue
        points = sorted(record["landscape"], key=lambda point: point["n"])
        row = [*names, shown.mark(record["layer"], cells)]
        for key in measures:
            least = min((point for point in points if key in point), key=lambda point: point[key])
            row.append(f"{least['n']:.2f}, {least['rise']:+.3f} %")
        rises = [float("inf"), *(point["rise"] for point in points), float("inf")]
        minima = sum(a > b < c for a, b, c in zip(rises, rises[1:], rises[2:]))
        shown.rows.append([*row, str(minima)])


def _claims(shown: Shown) -> None:
    """A row for each claim: the BD-rates of its methods in the claimed order, and whether they are in it."""
    codecs = shown.table.axes["codec"]
    shown.columns = ["claim", *codecs]
    for claim in shown.show["claims"]:
        row = [claim["claim"]]
        for codec in codecs:
            cells = [shown.table.at(codec=codec, method=name, **claim["at"]) for name in claim["order"]]
            values = [shown.records.value(one, NUMBERS["bd_rate"][1]) for one in cells]
            if not all(values):
                row.append("no BD-rate" if all(map(shown.records.get, sum(cells, []))) else OPEN)
                continue
            figures = [statistics.mean(one) for one in values]
            holds = all(a < b for a, b in zip(figures, figures[1:]))
            holds &= figures[0] <= claim.get("most", float("inf"))
            text = f"{'holds' if holds else '**does not hold**'}: {', '.join(map(percent, figures))}"
            row.append(shown.mark(text, sum(cells, [])))
        shown.rows.append(row)


_SHAPES: dict[str, Callable[[Shown], None]] = {
    "pivot": _pivot,
    "points": _points,
    "layers": _layers,
    "landscape": _landscape,
    "claims": _claims,
}


def status_of_plan(table: Table, records: Records) -> list[str]:
    """What is open, what is old and since what, and where and when the rest was measured."""
    cells = table.distinct
    states = {name: [cell for cell in cells if records.state(cell) == name] for name in ("open", "old")}
    lines = []
    reasons: dict[str, list[Cell]] = {}
    for cell in states["old"]:
        for reason in records.why_old(cell):
            reasons.setdefault(reason, []).append(cell)
    for reason, old in reasons.items():
        lines.append(f"**{OLD} Old:** {_named(old, cells)}. Since then: {reason}.")
    if states["open"]:
        lines.append(
            f"**Open:** {_named(states['open'], cells)}: `python benchmarks/tables.py --only {table.name}`."
        )
    origins: dict[str, list[Cell]] = {}
    for cell in cells:
        record = records.get(cell)
        if record:
            origins.setdefault(where(record), []).append(cell)
    for origin, measured in origins.items():
        lines.append(
            f"Measured {origin}" + ("" if len(origins) == 1 else f": {_named(measured, cells)}") + "."
        )
    return lines or ["Nothing of this table can be named yet: it depends on another one."]


def where(record: dict) -> str:
    """The commit and the machine of a record, in words."""
    changed = " with changes that are not committed" if record["dirty"] else ""
    machine = record["machine"]
    return (
        f"at commit {record['commit'][:7]}{changed}, version {record['version']}, torch {machine['torch']}, "
        f"{machine['cpu']} ({machine['instructions']})"
    )


def _named(some: list[Cell], cells: list[Cell], most: int = 6) -> str:
    """Cells in words."""
    if len(some) == len(cells):
        return "all cells" if len(cells) > 1 else "the cell"
    names = ", ".join(cell.key for cell in some[:most])
    return f"{len(some)} of {len(cells)} cells ({names}{' …' if len(some) > most else ''})"
