"""What a reader sees of an analysis: tables and pictures, functions of the dictionaries alone."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from tabulate import tabulate

from licq.support.files import atomic_path, write_json, write_text

# Okabe and Ito's colours, told apart also by colour-blind readers
_WEIGHTS, _INPUTS, _BOTH, _GREY = "#0072B2", "#E69F00", "#D55E00", "#888888"
_SIDES = (("weights", _WEIGHTS), ("inputs", _INPUTS), ("both", _BOTH))
_BARS = 30  # units in the picture
_NOTHING = 1e-4


def write_analysis(folder: Path, analysis: dict) -> None:
    """analysis.json, analysis.md, delta_j.png, ranges.png, channels.png, landscape.png in `folder`, each
    whole or not at all."""
    write_json(folder / "analysis.json", analysis)
    for name, figure in (
        ("delta_j", draw_delta_j(analysis)),
        ("ranges", draw_ranges(analysis)),
        ("channels", draw_channels(analysis)),
        ("landscape", draw_landscape(analysis)),
    ):
        with atomic_path(folder / f"{name}.png") as temporary:
            FigureCanvasAgg(figure)
            figure.savefig(temporary, format="png")
    write_text(folder / "analysis.md", render_analysis(analysis))


def render_analysis(analysis: dict) -> str:
    """analysis.md."""
    real, every = analysis["float"], analysis["all"]
    units = [("layers", "Layers")] + (
        [("units", f"Units: {analysis['unit']}s")] if analysis["unit"] != "layer" else []
    )
    parts = [
        f"# {analysis['title']}",
        f"On {analysis['crops']} calibration crops the float codec has J {real['j']:.4f} (R "
        f"{real['bpp']:.4f} bpp, lambda * D {real['weighted_distortion']:.4f}); with everything quantized, "
        f"before learning, J rises by {_percent(every['j'], real['j'])} (R {every['bpp']:+.5f}, lambda * D "
        f"{every['weighted_distortion']:+.5f}).",
        "Each row: this part alone is quantized, the rest is float. delta J is in percent of the float "
        "codec's J; R and lambda * D are the changes with both sides quantized, in bits per pixel. "
        "Predicted: rounding noise by the curvature of J, for weights rounded to nearest and without "
        "clipping (reconstruction/sensitivity.py).",
    ]
    for key, heading in units:
        parts += [f"## {heading}", unit_table(analysis, key)]
    parts += [
        "![delta J of each part](delta_j.png)",
        "## Ranges of channels",
        "Spread: the largest channel's largest magnitude over the median channel's, without channels that "
        "are switched off. Outliers: the largest value of max / 99.9th percentile and of max / rms among a "
        "layer's channels. Weights: output channels; inputs: input channels, in float.",
        _channel_table(analysis),
        "![ranges](ranges.png)",
        f"![channels of {analysis['landscape']['layer']}](channels.png)",
        f"## Landscape of {analysis['landscape']['layer']}",
        _landscape_text(analysis),
        "![landscape](landscape.png)",
    ]
    return "\n\n".join(parts) + "\n"


def unit_table(analysis: dict, key: str = "layers", most: int | None = None) -> str:
    """The rises of each unit, largest first."""
    whole = analysis["float"]["j"]
    order = sorted(analysis[key].items(), key=lambda item: -item[1]["both"]["j"])
    rows = []
    for name, found in order[:most]:
        predicted = found["predicted"]
        rows.append(
            [
                name,
                *(_percent(found[side]["j"], whole) for side, _ in _SIDES),
                f"{found['both']['bpp']:+.5f}",
                f"{found['both']['weighted_distortion']:+.5f}",
                *(
                    ("", "")
                    if predicted is None
                    else (_percent(predicted[side], whole) for side in ("weights", "inputs"))
                ),
            ]
        )
    if most is None:
        rows.append(
            [
                "sum",
                *(
                    _percent(sum(found[side]["j"] for found in analysis[key].values()), whole)
                    for side, _ in _SIDES
                ),
                *(
                    f"{sum(found['both'][part] for found in analysis[key].values()):+.5f}"
                    for part in ("bpp", "weighted_distortion")
                ),
                *(
                    _percent(
                        sum(
                            found["predicted"][side] for found in analysis[key].values() if found["predicted"]
                        ),
                        whole,
                    )
                    for side in ("weights", "inputs")
                ),
            ]
        )
    header = [
        "part",
        "weights",
        "inputs",
        "both",
        "R",
        "lambda * D",
        "predicted, weights",
        "predicted, inputs",
    ]
    return _table(header, rows)


def _channel_table(analysis: dict) -> str:
    rows = []
    for name, sides in analysis["channels"].items():
        row = [name]
        for side in ("weights", "inputs"):
            facts = sides[side]
            row += [
                f"{max(facts['max']):.4g}",
                f"{_spread(facts):.1f}",
                f"{_worst(facts, 'p999'):.1f}",
                f"{_worst(facts, 'rms'):.1f}",
            ]
        rows.append(row)
    header = ["layer"] + [
        f"{side}: {what}"
        for side in ("weights", "inputs")
        for what in ("max", "spread", "max / p99.9", "max / rms")
    ]
    return _table(header, rows)


def _alive(values: Sequence[float]) -> list[float]:
    """Those that are not nothing beside the largest: channels that training has switched off would fill a
    picture alone."""
    return [value for value in values if value > _NOTHING * max(values)]


def _spread(facts: dict) -> float:
    ordered = sorted(_alive(facts["max"])) or [1.0]
    return ordered[-1] / ordered[len(ordered) // 2]


def _worst(facts: dict, measure: str) -> float:
    return max(
        (
            largest / value
            for largest, value in zip(facts["max"], facts[measure])
            if value > _NOTHING * largest
        ),
        default=0.0,
    )


def _landscape_text(analysis: dict) -> str:
    """Where J and the errors are least."""
    landscape, whole = analysis["landscape"], analysis["float"]["j"]
    lines = [
        f"J, R and D when {landscape['layer']} alone is quantized and its range is N times what the method "
        "starts from (eqs. 15, 16), weights rounded to nearest. As in Fig. 2 of arXiv 2211.02854, the least "
        "error need not be the least J."
    ]
    for side in ("weights", "inputs"):
        points = landscape[side]
        if points:
            best = min(points, key=lambda point: point["j"])
            lines.append(
                f"- {side}: J is least at N = {best['n']:.2f} ({_percent(best['j'], whole)}); "
                + "; ".join(
                    f"{what} at N = {point['n']:.2f}, where J has {_percent(point['j'], whole)}"
                    for what, key in (
                        ("the squared error of the layer's output", "output_error"),
                        ("the error of the weights", "error"),
                    )
                    if key in points[0]
                    for point in [min(points, key=lambda point: point[key])]
                )
            )
    plane = landscape["plane"]
    if plane:
        best, of_error = _lowest(plane["j"]), _lowest(plane["output_error"])
        factors = plane["factors"]
        lines.append(
            f"- both: J is least at N = {factors[best[0]]:.2f} of weights and {factors[best[1]]:.2f} of "
            f"inputs ({_percent(plane['j'][best[0]][best[1]], whole)}); the squared error of the output at "
            f"{factors[of_error[0]]:.2f} and {factors[of_error[1]]:.2f}, where J has "
            f"{_percent(plane['j'][of_error[0]][of_error[1]], whole)}"
        )
    return "\n".join([lines[0], "", *lines[1:]])


def _lowest(rows: Sequence[Sequence[float]]) -> tuple[int, int]:
    return min(
        ((i, j) for i, row in enumerate(rows) for j in range(len(row))), key=lambda at: rows[at[0]][at[1]]
    )


# --------------------------------------------------------------------------------------------------- pictures


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
        places = range(len(shown))
        for offset, (side, colour) in zip((-0.27, 0.0, 0.27), _SIDES):
            values = [100 * analysis[key][name][side]["j"] / whole for name in shown]
            axis.barh([place + offset for place in places], values, height=0.27, color=colour, label=side)
        predicted = [
            (place, sum(analysis[key][name]["predicted"].values()))
            for place, name in enumerate(shown)
            if analysis[key][name]["predicted"]
        ]
        axis.plot(
            [100 * value / whole for _, value in predicted],
            [place for place, _ in predicted],
            "k|",
            markersize=7,
            label="predicted, both",
        )
        axis.set_yticks(list(places), shown, fontsize=7)
        axis.invert_yaxis()
        axis.set_xlabel(f"rise of J with one {kind} quantized alone [% of J]", fontsize=8)
        axis.tick_params(axis="x", labelsize=7)
        axis.grid(True, axis="x", linewidth=0.4, alpha=0.5)
    figure.axes[0].legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.suptitle(analysis["title"], fontsize=9)
    return figure


def _largest(units: dict) -> list[str]:
    kept = sorted(units, key=lambda name: -units[name]["both"]["j"])[:_BARS]
    return [name for name in units if name in kept]


def draw_ranges(analysis: dict) -> Figure:
    """For each layer where its channels' largest magnitudes lie, and the outliers of each channel."""
    names = list(analysis["channels"])
    figure = Figure(figsize=(max(7.5, 0.22 * len(names)), 6.5), dpi=150, layout="constrained")
    for column, (side, colour) in enumerate(_SIDES[:2]):
        ranges, outliers = figure.add_subplot(2, 2, 1 + column), figure.add_subplot(2, 2, 3 + column)
        facts = [analysis["channels"][name][side] for name in names]
        _spans(ranges, [fact["max"] for fact in facts], colour)
        _spans(
            outliers,
            [[a / b for a, b in zip(fact["max"], fact["p999"]) if b > _NOTHING * a] for fact in facts],
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
    for place, own in enumerate(values):
        alive = sorted(_alive(own))
        if alive:
            axis.vlines(place, alive[0], alive[-1], color=colour, linewidth=3, alpha=0.45)
            axis.plot(place, alive[len(alive) // 2], "o", color=colour, markersize=3)


def draw_channels(analysis: dict) -> Figure:
    """Channels of the landscape's layer, largest first."""
    name = analysis["landscape"]["layer"]
    figure = Figure(figsize=(7.5, 3.2), dpi=150, layout="constrained")
    for axis, (side, colour) in zip(figure.subplots(1, 2), _SIDES[:2]):
        facts = analysis["channels"][name][side]
        order = sorted(range(len(facts["max"])), key=lambda channel: -facts["max"][channel])
        for key, label, style in (
            ("max", "max", "-"),
            ("p999", "99.9th percentile", "--"),
            ("rms", "rms", ":"),
        ):
            axis.plot(
                [facts[key][channel] for channel in order], style, color=colour, linewidth=1.2, label=label
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
    least = min(points, key=lambda point: point["output_error"])
    error.plot(least["n"], least["output_error"], "v", color=_GREY, markersize=6)
    error.set_yscale("log")
    error.tick_params(which="both", labelsize=7)
    handles = [*axis.get_legend_handles_labels()[0], *error.get_legend_handles_labels()[0]]
    axis.legend(
        handles,
        [handle.get_label() for handle in handles],
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
    for label, colour, chosen in (
        ("N < 1", _WEIGHTS, [p for p in points if p["n"] < 1]),
        ("N >= 1", _INPUTS, [p for p in points if p["n"] >= 1]),
    ):
        axis.plot(
            [100 * point["error"] for point in chosen],
            [100 * point["j"] / whole for point in chosen],
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
        row, column = _lowest(plane[key])
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


def _percent(value: float, whole: float) -> str:
    return f"{100 * value / whole:+.3f}%"


def _table(header: list[str], rows: list[list]) -> str:
    return tabulate(
        rows,
        headers=header,
        tablefmt="github",
        disable_numparse=True,
        colalign=["left"] + ["right"] * (len(header) - 1),
    )
