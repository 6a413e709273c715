"""The results of a sweep: summary.csv, points.csv, summary.md and plots, from the reports of its runs."""

import csv
import io
import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tabulate import tabulate

from licq.evaluation.metrics import ms_ssim_db
from licq.report.figures import BASELINE_STYLE, FLOAT_STYLE, QUANT_STYLE
from licq.runs.folder import read_json
from licq.support.files import atomic_path, write_text
from licq.sweeps.sweep import CURVES, METRICS, SEED, Plot, Sweep, SweepRun

_STYLES = [QUANT_STYLE, BASELINE_STYLE] + [
    dict(color=color, marker=marker, markersize=5, linestyle="-", linewidth=1.2)
    for color, marker in (
        ("#009E73", "D"),
        ("#CC79A7", "v"),
        ("#E69F00", "P"),
        ("#56B4E9", "X"),
        ("#888888", "<"),
        ("#F0E442", ">"),
    )
]
_POINT = ("bpp", "psnr", "ms_ssim")
_DIGITS = 6  # decimals of a point of a curve
Curve = tuple[tuple[float, float], ...]  # (bpp, quality) by rising rate


@dataclass(frozen=True)
class Result:
    """A run and its result.

    Args:
        run: the run.
        folder: its folder.
        report: its report.json; None where it wrote none.
        error: the line that says why it failed; None where it did not.
    """

    run: SweepRun
    folder: Path
    report: dict | None
    error: str | None

    @classmethod
    def of(cls, run: SweepRun, folder: Path, error: str | None) -> "Result":
        """The result that the folder of a run holds."""
        return cls(run, folder, None if error else read_json(folder / "report.json"), error)

    def metric(self, name: str) -> float | None:
        """The value of a key of `METRICS`; None where the run has none."""
        if self.report is None:
            return None
        points = self.report["points"]
        if name in _POINT:
            return _mean(point["quant"][name] for point in points)
        if name == "delta_j_percent":
            return _mean(point[name] for point in points)
        if name == "peak_memory_mb":
            return max((point[name] for point in points if point[name] is not None), default=None)
        if name in ("calibration_seconds", "model_bytes"):
            # of each codec once: one of variable rate has many points
            return sum({point["checkpoint"]["sha256"]: point[name] or 0 for point in points}.values())
        return self.report.get(name)


def write_summary(folder: Path, sweep: Sweep, results: Sequence[Result]) -> str:
    """Write the summary into the sweep's folder, each file complete or not at all.

    Returns:
        The tables, for the terminal.
    """
    write_text(folder / "summary.csv", _runs_csv(sweep, results))
    write_text(folder / "points.csv", _points_csv(sweep, results))
    pictures = []
    for number, plot in enumerate(sweep.plots, 1):
        name = "plot.png" if len(sweep.plots) == 1 else f"plot{number}.png"
        if any(result.report for result in results):
            with atomic_path(folder / name) as temporary:
                _draw(plot, sweep, results, temporary)
            pictures.append(name)
    tables = [
        f"{METRICS[value]}\n\n{_table(sweep, results, value)}"
        for value in sweep.values
        if _has(results, value)
    ]
    finished = f"{len(results)} runs, {sum(result.error is None for result in results)} of them finished"
    more = (
        f"; {len(sweep.runs) - len(results)} others of the sweep have not been run"
        if len(results) < len(sweep.runs)
        else ""
    )
    parts = [f"# {sweep.title}", f"{finished}{more}.", *tables]
    if len(sweep.axes.get(SEED, ())) > 1 and tables:
        parts.append(f"Mean ± sample standard deviation over the seeds {', '.join(sweep.axes[SEED])}.")
    parts += [f"![{sweep.title}]({name})" for name in pictures]
    analyses = [
        f"- [{result.run.name}, quality {quality}](runs/{result.run.name}/q{quality}/analysis.md)"
        for result in results
        if result.error is None
        for quality in _analyzed(result.folder)
    ]
    if analyses:
        parts.append("Analyses:\n\n" + "\n".join(analyses))
    parts.append("## Runs\n\n" + _runs_table(sweep, results))
    write_text(folder / "summary.md", "\n\n".join(parts) + "\n")
    return "\n\n".join(tables)


def _analyzed(folder: Path) -> list[int]:
    """The qualities for which a run has written an analysis."""
    return sorted(int(path.parent.name[1:]) for path in folder.glob("q*/analysis.md"))


def _runs_csv(sweep: Sweep, results: Sequence[Result]) -> str:
    rows = [
        [
            result.run.name,
            *(result.run.labels[axis] for axis in sweep.axes),
            "failed" if result.error else "done",
            *(result.metric(name) for name in METRICS),
            result.error,
        ]
        for result in results
    ]
    return _csv(["run", *sweep.axes, "status", *METRICS, "error"], rows)


def _points_csv(sweep: Sweep, results: Sequence[Result]) -> str:
    codecs = ("fp32", "quant", "baseline")
    rows = [
        [
            result.run.name,
            *(result.run.labels[axis] for axis in sweep.axes),
            point["quality"],
            point["lambda"],
            point["delta_j_percent"],
            *((point.get(codec) or {}).get(key) for codec in codecs for key in _POINT),
        ]
        for result in results
        if result.report
        for point in result.report["points"]
    ]
    return _csv(
        [
            "run",
            *sweep.axes,
            "quality",
            "lambda",
            "delta_j_percent",
            *(f"{codec}_{key}" for codec in codecs for key in _POINT),
        ],
        rows,
    )


def _csv(header: list[str], rows: Iterable[Sequence]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def _table(sweep: Sweep, results: Sequence[Result], value: str) -> str:
    """A metric as a table. The rows and columns are the combinations of values of their axes."""
    columns = _combinations(sweep, results, sweep.columns)
    rows = []
    for row in _combinations(sweep, results, sweep.rows):
        cells = [
            _cell(
                [
                    result
                    for result in results
                    if _is_at(result, sweep.rows, row) and _is_at(result, sweep.columns, column)
                ],
                value,
            )
            for column in columns
        ]
        rows.append([*row, *cells])
    header = [
        *sweep.rows,
        *(
            ", ".join(map(_heading, sweep.columns, column)) if column else METRICS[value]
            for column in columns
        ),
    ]
    return _tabulate(header, rows, len(sweep.rows))


def _combinations(sweep: Sweep, results: Sequence[Result], axes: Sequence[str]) -> list[tuple[str, ...]]:
    """The combinations of values of some axes that were run (--only leaves others out)."""
    return [
        labels
        for labels in product(*(sweep.axes[axis] for axis in axes))
        if any(_is_at(result, axes, labels) for result in results)
    ]


def _heading(axis: str, label: str) -> str:
    """A value as a heading; a number has the name of its axis before it."""
    return f"{axis.removeprefix('set.')} {label}" if label[:1] in "0123456789.-" else label


def _cell(results: Sequence[Result], value: str) -> str:
    """The mean and the spread of a metric over the seeds."""
    known = [metric for result in results if (metric := result.metric(value)) is not None]
    failed = sum(result.error is not None for result in results)
    if not known:
        return "failed" if failed else "n/a"
    style = (
        "+.2f"
        if value.endswith("_percent") or value.startswith("bd_rate")
        else ".3f"
        if value in _POINT
        else ".0f"
    )
    text = format(mean(known), style) + (f" ± {stdev(known):{style.lstrip('+')}}" if len(known) > 1 else "")
    return text + (f" ({len(known)} of {len(results)})" if len(known) < len(results) else "")


def _runs_table(sweep: Sweep, results: Sequence[Result]) -> str:
    rows = [
        [
            f"[{result.run.name}](runs/{result.run.name})",
            (result.error or "done").replace("|", "\\|"),
            f"`{shlex.join(result.run.words)}`".replace("|", "\\|"),
        ]
        for result in results
    ]
    return _tabulate(["run", "result", "flags"], rows, 3)


def _draw(plot: Plot, sweep: Sweep, results: Sequence[Result], path: Path) -> None:
    """Draw a plot, with a panel for each combination of the axes that are neither x nor lines."""
    others = [axis for axis in sweep.axes if axis not in (plot.x, plot.lines, SEED)]
    panels = _combinations(sweep, results, others)
    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(5.2 * across, 4 * down), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, axes in zip(panels, figure.subplots(down, across, squeeze=False).flat):
        of_panel = [result for result in results if result.report and _is_at(result, others, panel)]
        _draw_lines(axes, of_panel, plot, sweep)
        axes.set(
            xlabel="bpp" if plot.x == "bpp" else plot.x,
            ylabel=CURVES[plot.y] if plot.x == "bpp" else METRICS[plot.y],
            title=", ".join(map(_heading, others, panel)) or sweep.title,
        )
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def _draw_lines(axes: Axes, results: Sequence[Result], plot: Plot, sweep: Sweep) -> None:
    """The lines of one panel, and over bpp the curves of the float codecs."""
    floats: dict[Curve, dict] = {}  # lines of several codecs or data sets have a float curve each
    for number, label in enumerate(sweep.axes[plot.lines] if plot.lines else [None]):
        of_line = [
            result for result in results if plot.lines is None or result.run.labels[plot.lines] == label
        ]
        style = _STYLES[number % len(_STYLES)] | {"label": label or "quantized"}
        if plot.x == "bpp":
            _draw_curve(axes, _curve(of_line, "quant", plot.y), plot.y, style)
            float_style = FLOAT_STYLE | {"color": style["color"], "label": f"float, {label}"}
            floats.setdefault(_curve(of_line, "fp32", plot.y), float_style)
        else:
            _draw_metric(axes, of_line, plot, sweep, style)
    floats.pop((), None)
    for curve, style in floats.items():
        _draw_curve(axes, curve, plot.y, style if len(floats) > 1 else FLOAT_STYLE | {"label": "float"})


def _curve(results: Sequence[Result], codec: str, measure: str) -> Curve:
    """The R-D points of a codec ("quant" or "fp32"), means over the runs at each quality."""
    by_quality: dict[int, list[dict]] = {}
    for result in results:
        for point in result.report["points"] if result.report else ():
            if point[codec] is not None and point[codec][measure] is not None:
                by_quality.setdefault(point["quality"], []).append(point[codec])
    # rounded, so that a codec's curve is the same where machines differ in the last digits
    return tuple(
        sorted(
            (
                round(mean(point["bpp"] for point in points), _DIGITS),
                round(mean(point[measure] for point in points), _DIGITS),
            )
            for points in by_quality.values()
        )
    )


def _draw_curve(axes: Axes, curve: Curve, measure: str, style: dict) -> None:
    if curve:
        rates, values = zip(*curve)
        axes.plot(rates, [ms_ssim_db(value) for value in values] if measure == "ms_ssim" else values, **style)


def _draw_metric(axes: Axes, results: Sequence[Result], plot: Plot, sweep: Sweep, style: dict) -> None:
    """A metric over an axis, with the spread over the seeds.

    Labels that are numbers are drawn to scale, others side by side.
    """
    labels = sweep.axes[plot.x]
    try:
        positions = [float(label) for label in labels]
    except ValueError:
        positions = [float(index) for index in range(len(labels))]
    points = []
    for position, label in zip(positions, labels):
        of_label = [result for result in results if result.run.labels[plot.x] == label]
        known = [metric for result in of_label if (metric := result.metric(plot.y)) is not None]
        if known:
            points.append((position, mean(known), stdev(known) if len(known) > 1 else 0.0))
    axes.set_xticks(positions, labels)
    if points:
        x, y, spread = zip(*sorted(points))
        axes.errorbar(x, y, yerr=spread if any(spread) else None, capsize=3, **style)


def _is_at(result: Result, axes: Sequence[str], labels: Sequence[str]) -> bool:
    """Whether the run has these values of these axes."""
    return all(result.run.labels[axis] == label for axis, label in zip(axes, labels))


def _has(results: Sequence[Result], value: str) -> bool:
    """Whether there is anything to show in the table of a metric: a value, or a run that failed."""
    return any(result.metric(value) is not None or result.error for result in results)


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean; None without values, and where one is not known."""
    given = list(values)
    known = [value for value in given if value is not None]
    return mean(known) if known and len(known) == len(given) else None


def _tabulate(header: list[str], rows: list[list], text_columns: int) -> str:
    align = ["left" if index < text_columns else "right" for index in range(len(header))]
    return tabulate(rows, headers=header, tablefmt="github", disable_numparse=True, colalign=align)
