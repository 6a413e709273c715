"""The pictures of an analysis, functions of its dictionary alone."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from licq.report.analysis_numbers import NOTHING, alive, lowest

# Okabe and Ito's colours, told apart also by colour-blind readers
_WEIGHTS, _INPUTS, _BOTH, _GREY = "#0072B2", "#E69F00", "#D55E00", "#888888"
_SIDES = (("weights", _WEIGHTS), ("inputs", _INPUTS), ("both", _BOTH))
_BARS = 30  # units in the picture


def draw_delta_j(analysis: dict) -> Figure:
    """Bars of delta J for each part alone, in execution order; of many the ones that cost most."""
    kinds = [("layers", "layer")] + ([("units", analysis["unit"])] if analysis["unit"] != "layer" else [])
    kinds = [(key, kind, _largest(analysis[key])) for key, kind in kinds]
    rows = [len(shown) for _, _, shown in kinds]
    figure = Figure(figsize=(7.5, 1.2 + 0.22 * sum(rows) + 0.7 * len(rows)), dpi=150, layout="constrained")
    whole = analysis["float"]["j"]
    for axis, (key, kind, shown) in zip(
        figure.subplots(len(kinds), 1, squeeze=False, height_ratios=[count + 2 for count in rows])[:, 0],
        kinds,
    ):
        positions = range(len(shown))
        for offset, (side, colour) in zip((-0.27, 0.0, 0.27), _SIDES):
            values = [100 * analysis[key][name][side]["j"] / whole for name in shown]
            axis.barh(
                [position + offset for position in positions], values, height=0.27, color=colour, label=side
            )
        predicted = [
            (position, sum(analysis[key][name]["predicted"].values()))
            for position, name in enumerate(shown)
            if analysis[key][name]["predicted"]
        ]
        axis.plot(
            [100 * value / whole for _, value in predicted],
            [position for position, _ in predicted],
            "k|",
            markersize=7,
            label="predicted, both",
        )
        axis.set_yticks(list(positions), shown, fontsize=7)
        axis.invert_yaxis()
        axis.set_xlabel(f"rise of J with one {kind} quantized alone [% of J]", fontsize=8)
        axis.tick_params(axis="x", labelsize=7)
        axis.grid(True, axis="x", linewidth=0.4, alpha=0.5)
    figure.axes[0].legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.suptitle(analysis["title"], fontsize=9)
    return figure


def _largest(units: dict) -> list[str]:
    costly = sorted(units, key=lambda name: -units[name]["both"]["j"])[:_BARS]
    return [name for name in units if name in costly]


def draw_ranges(analysis: dict) -> Figure:
    """For each layer where its channels' largest magnitudes lie, and the outliers of each channel."""
    names = list(analysis["channels"])
    figure = Figure(figsize=(max(7.5, 0.22 * len(names)), 6.5), dpi=150, layout="constrained")
    for column, (side, colour) in enumerate(_SIDES[:2]):
        ranges, outliers = figure.add_subplot(2, 2, 1 + column), figure.add_subplot(2, 2, 3 + column)
        layers = [analysis["channels"][name][side] for name in names]
        _spans(ranges, [layer["max"] for layer in layers], colour)
        _spans(
            outliers,
            [[a / b for a, b in zip(layer["max"], layer["p999"]) if b > NOTHING * a] for layer in layers],
            colour,
        )
        ranges.set_title(f"{side}: largest magnitude of a channel", fontsize=8)
        outliers.set_title(f"{side}: max / 99.9th percentile of a channel", fontsize=8)
        for axis in (ranges, outliers):
            axis.set_yscale("log")
            axis.tick_params(which="both", labelsize=7)
            axis.set_xticks(
                range(len(names)), names if axis is outliers else [""] * len(names), rotation=90, fontsize=6
            )
            axis.grid(True, axis="y", linewidth=0.4, alpha=0.5)
    figure.suptitle(
        f"{analysis['title']}: bar from the smallest to the largest channel, dot at the median", fontsize=9
    )
    return figure


def _spans(axis: Axes, values: Sequence[Sequence[float]], colour: str) -> None:
    for position, channels in enumerate(values):
        ordered = sorted(alive(channels))
        if ordered:
            axis.vlines(position, ordered[0], ordered[-1], color=colour, linewidth=3, alpha=0.45)
            axis.plot(position, ordered[len(ordered) // 2], "o", color=colour, markersize=3)


def draw_channels(analysis: dict) -> Figure:
    """Channels of the landscape's layer, largest first."""
    name = analysis["landscape"]["layer"]
    figure = Figure(figsize=(7.5, 3.2), dpi=150, layout="constrained")
    for axis, (side, colour) in zip(figure.subplots(1, 2), _SIDES[:2]):
        channels = analysis["channels"][name][side]
        order = sorted(range(len(channels["max"])), key=lambda channel: -channels["max"][channel])
        for key, label, style in (
            ("max", "max", "-"),
            ("p999", "99.9th percentile", "--"),
            ("rms", "rms", ":"),
        ):
            axis.plot(
                [channels[key][channel] for channel in order], style, color=colour, linewidth=1.2, label=label
            )
        axis.set_yscale("log")
        axis.set_xlabel(
            f"{'output' if side == 'weights' else 'input'} channel, by its largest magnitude", fontsize=8
        )
        axis.set_title(f"{side} of {name}", fontsize=8)
        axis.tick_params(which="both", labelsize=7)
        axis.grid(True, linewidth=0.4, alpha=0.5)
        axis.legend(fontsize=7, frameon=False)
    return figure


def draw_landscape(analysis: dict) -> Figure:
    """J over N for weights and inputs, J over the weights' error (Fig. 2 of the paper), and J over both N."""
    landscape, whole = analysis["landscape"], analysis["float"]["j"]
    panels = [("curve", "weights"), ("fig2", "weights")] + (
        [("curve", "inputs"), ("plane", "both")] if landscape["plane"] else []
    )
    figure = Figure(figsize=(8.5, 3.4 * (len(panels) // 2)), dpi=150, layout="constrained")
    for axis, (kind, side) in zip(figure.subplots(len(panels) // 2, 2, squeeze=False).flat, panels):
        axis.tick_params(which="both", labelsize=7)
        if kind == "plane":
            _draw_plane(figure, axis, landscape["plane"], whole)
            continue
        axis.grid(True, linewidth=0.4, alpha=0.5)
        points = landscape[side]
        axis.set_ylabel("change of J [%]", fontsize=8)
        if kind == "fig2":
            _draw_against_error(axis, points, whole)
        else:
            _draw_curve(axis, points, side, whole)
    figure.suptitle(f"{analysis['title']}: {landscape['layer']} alone quantized", fontsize=9)
    return figure


def _draw_curve(axis: Axes, points: list[dict], side: str, whole: float) -> None:
    n = [point["n"] for point in points]
    lines = (
        ("j", "J", _BOTH, "-", 2.2),
        ("bpp", "R", _WEIGHTS, "-", 1.0),
        ("weighted_distortion", "lambda * D", "#009E73", (0, (3, 2)), 1.2),
    )
    for key, label, colour, style, width in lines:
        axis.plot(
            n,
            [100 * point[key] / whole for point in points],
            color=colour,
            linestyle=style,
            linewidth=width,
            label=label,
        )
    best = min(points, key=lambda point: point["j"])
    axis.plot(best["n"], 100 * best["j"] / whole, "v", color=_BOTH, markersize=6)
    # a share of the curve around its minimum: ranges that clip cost many times more and would flatten the
    # picture
    top = 100 * max(sorted(point["j"] for point in points)[len(points) * 3 // 5], 2 * abs(best["j"])) / whole
    low = (
        100
        * min(
            min(point[key] for key in ("j", "bpp", "weighted_distortion"))
            for point in points
            if 100 * point["j"] / whole <= top
        )
        / whole
    )
    axis.set_ylim(low - 0.1 * (top - low), top * 1.1)
    axis.set_xlabel(f"N of the {side}", fontsize=8)
    error = axis.twinx()
    error.plot(
        n,
        [point["output_error"] for point in points],
        color=_GREY,
        linewidth=1,
        linestyle="--",
        label="error of the output (right)",
    )
    lowest_error = min(points, key=lambda point: point["output_error"])
    error.plot(lowest_error["n"], lowest_error["output_error"], "v", color=_GREY, markersize=6)
    error.set_yscale("log")
    error.tick_params(which="both", labelsize=7)
    handles = [*axis.get_legend_handles_labels()[0], *error.get_legend_handles_labels()[0]]
    axis.legend(
        handles,
        [str(handle.get_label()) for handle in handles],
        fontsize=6.5,
        frameon=False,
        ncols=4,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
    )


def _draw_against_error(axis: Axes, points: list[dict], whole: float) -> None:
    axis.plot(
        [100 * point["error"] for point in points],
        [100 * point["j"] / whole for point in points],
        "-",
        color="#CCCCCC",
        linewidth=0.8,
        zorder=1,
    )
    for label, colour, part in (
        ("N < 1", _WEIGHTS, [p for p in points if p["n"] < 1]),
        ("N >= 1", _INPUTS, [p for p in points if p["n"] >= 1]),
    ):
        axis.plot(
            [100 * point["error"] for point in part],
            [100 * point["j"] / whole for point in part],
            "o",
            color=colour,
            markersize=3,
            label=label,
        )
    if min(point["j"] for point in points) > 0:
        axis.set_yscale("log")
    axis.xaxis.set_major_formatter(PercentFormatter(decimals=1))
    axis.set_xlabel("mean error of the weights [% of their mean magnitude]", fontsize=8)
    axis.legend(fontsize=7, frameon=False)


def _draw_plane(figure: Figure, axis: Axes, plane: dict, whole: float) -> None:
    values = [[100 * value / whole for value in row] for row in plane["j"]]
    floor = max(min(min(row) for row in values), max(max(row) for row in values) * 1e-4, 1e-9)
    edges = _edges(plane["factors"])
    mesh = axis.pcolormesh(
        edges, edges, [[max(value, floor) for value in row] for row in values], norm=LogNorm(), cmap="viridis"
    )
    bar = figure.colorbar(mesh, ax=axis)
    bar.set_label("change of J [%]", fontsize=8)
    bar.ax.tick_params(which="both", labelsize=7)
    for key, label, marker, colour in (
        ("j", "J least", "o", "white"),
        ("output_error", "error of the output least", "x", "red"),
    ):
        row, column = lowest(plane[key])
        axis.plot(
            plane["factors"][column],
            plane["factors"][row],
            marker,
            color=colour,
            markersize=8,
            markeredgewidth=1.8,
            markerfacecolor="none",
            linestyle="",
            label=label,
        )
    axis.set_xlabel("N of the inputs", fontsize=8)
    axis.set_ylabel("N of the weights", fontsize=8)
    axis.legend(fontsize=7, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0), facecolor="#999999")


def _edges(centres: Sequence[float]) -> list[float]:
    half = (centres[1] - centres[0]) / 2
    return [centre - half for centre in centres] + [centres[-1] + half]
