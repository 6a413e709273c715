"""analysis.md and its tables, functions of the analysis' dictionary alone, and all files of an analysis."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from tabulate import tabulate

from licq.report.analysis_figures import draw_channels, draw_delta_j, draw_landscape, draw_ranges
from licq.report.analysis_numbers import NOTHING, alive, lowest
from licq.support.files import atomic_path, write_json, write_text

_SIDES = ("weights", "inputs", "both")


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
        "## Tensors between layers",
        "Each row: this tensor alone is rounded, all else is float. A layer's input is what its weights are "
        "multiplied with; operands are those of sums, gates and attention's products. Levels: how many "
        "steps of the grid the values span, in the channel in the middle and in the poorest one. Below a "
        "step: share of the values that are smaller than a step and not zero. Few levels and many small "
        "values in a tensor with one scale ask for scales of channels. Under `--strict_int8` tensors of 16 "
        "bits are in registers and the others are stored.",
        stored_table(analysis),
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
    order = sorted(analysis[key].items(), key=lambda unit: -unit[1]["both"]["j"])
    rows = []
    for name, rises in order[:most]:
        predicted = rises["predicted"]
        rows.append(
            [
                name,
                *(_percent(rises[side]["j"], whole) for side in _SIDES),
                f"{rises['both']['bpp']:+.5f}",
                f"{rises['both']['weighted_distortion']:+.5f}",
                *(
                    ("", "")
                    if predicted is None
                    else (_percent(predicted[side], whole) for side in ("weights", "inputs"))
                ),
            ]
        )
    if most is None:
        units = list(analysis[key].values())
        known = [unit["predicted"] for unit in units if unit["predicted"]]
        rows.append(
            [
                "sum",
                *(_percent(sum(unit[side]["j"] for unit in units), whole) for side in _SIDES),
                *(
                    f"{sum(unit['both'][part] for unit in units):+.5f}"
                    for part in ("bpp", "weighted_distortion")
                ),
                *(_percent(sum(unit[side] for unit in known), whole) for side in ("weights", "inputs")),
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


def stored_table(analysis: dict, most: int | None = None) -> str:
    """The tensors between layers, largest rise first."""
    whole = analysis["float"]["j"]
    order = sorted(analysis["stored"].items(), key=lambda tensor: -tensor[1]["j"])
    rows = [
        [
            name,
            tensor["bits"],
            tensor["scales"],
            f"{tensor['low']:.3g} .. {tensor['high']:.3g}",
            f"{tensor['levels']} / {tensor['fewest_levels']}",
            f"{100 * tensor['below_step']:.1f}%",
            _percent(tensor["j"], whole),
            f"{tensor['bpp']:+.5f}",
            f"{tensor['weighted_distortion']:+.5f}",
        ]
        for name, tensor in order[:most]
    ]
    header = ["tensor", "bits", "scales", "range", "levels", "below a step", "delta J", "R", "lambda * D"]
    return _table(header, rows)


def _channel_table(analysis: dict) -> str:
    rows = []
    for name, sides in analysis["channels"].items():
        row = [name]
        for side in ("weights", "inputs"):
            channels = sides[side]
            row += [
                f"{max(channels['max']):.4g}",
                f"{_spread(channels):.1f}",
                f"{_worst(channels, 'p999'):.1f}",
                f"{_worst(channels, 'rms'):.1f}",
            ]
        rows.append(row)
    header = ["layer"] + [
        f"{side}: {what}"
        for side in ("weights", "inputs")
        for what in ("max", "spread", "max / p99.9", "max / rms")
    ]
    return _table(header, rows)


def _spread(channels: dict) -> float:
    ordered = sorted(alive(channels["max"])) or [1.0]
    return ordered[-1] / ordered[len(ordered) // 2]


def _worst(channels: dict, measure: str) -> float:
    return max(
        (
            largest / value
            for largest, value in zip(channels["max"], channels[measure])
            if value > NOTHING * largest
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
        best, of_error = lowest(plane["j"]), lowest(plane["output_error"])
        factors = plane["factors"]
        lines.append(
            f"- both: J is least at N = {factors[best[0]]:.2f} of weights and {factors[best[1]]:.2f} of "
            f"inputs ({_percent(plane['j'][best[0]][best[1]], whole)}); the squared error of the output at "
            f"{factors[of_error[0]]:.2f} and {factors[of_error[1]]:.2f}, where J has "
            f"{_percent(plane['j'][of_error[0]][of_error[1]], whole)}"
        )
    return "\n".join([lines[0], "", *lines[1:]])


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
