"""The pictures of a report, each drawn from the report's dictionary alone: rd.png, and what report.html holds
as SVG."""

import io
import math
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from licq.evaluation.metrics import ms_ssim_db
from licq.report.changes import image_deltas
from licq.report.labels import baseline_label, codec_label, is_everywhere, percent

# Okabe and Ito's colours, told apart also by colour-blind readers; markers and dashes tell the curves apart
# in print.
FLOAT_STYLE = dict(
    color="#000000", marker="o", markersize=7, markerfacecolor="none", linestyle="-", linewidth=1.3
)
QUANT_STYLE = dict(color="#D55E00", marker="s", markersize=3.8, linestyle="--", linewidth=1.3)
BASELINE_STYLE = dict(color="#0072B2", marker="^", markersize=5, linestyle=":", linewidth=1.3)
_ANCHORS = [
    dict(color="#888888", linestyle="-.", linewidth=1.1),
    dict(color="#009E73", linestyle=(0, (1, 1)), linewidth=1.1),
    dict(color="#CC79A7", linestyle=(0, (5, 2)), linewidth=1.1),
    dict(color="#56B4E9", linestyle=(0, (4, 1, 1, 1)), linewidth=1.1),
]


def draw_rd(report: dict, path: str | Path) -> None:
    """rd.png: PSNR against bpp, and MS-SSIM in dB beside it where every point has it."""
    measures = rd_measures(report)
    figure = Figure(figsize=(max(5.2, 4.4 * len(measures)), 3.8), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    for axis, measure in zip(figure.subplots(1, len(measures), squeeze=False)[0], measures):
        _draw_curves(axis, report, measure)
    _legend_below(figure, columns=3)
    figure.suptitle(f"{report['arch']} on {report['dataset']} ({report['images']} images)", fontsize=10)
    figure.savefig(path, format="png")


def rd_measures(report: dict) -> list[str]:
    """What can be drawn against the rate: "psnr", and "ms_ssim" where every point has it."""
    similar = all(
        point[codec]["ms_ssim"] is not None for point in report["points"] for codec in _codecs(report)
    )
    return ["psnr", "ms_ssim"] if similar else ["psnr"]


def rd_svg(report: dict, measure: str) -> bytes:
    """One panel of the R-D curves."""
    figure = Figure(figsize=(4.6, 4.0), layout="constrained")
    _draw_curves(figure.subplots(), report, measure)
    _legend_below(figure, columns=2)
    return _svg(figure)


def scatter_svg(report: dict) -> bytes | None:
    """Every image's change of rate against its change of PSNR, in a colour for each quality; None where no
    image has any."""
    deltas = image_deltas(report)
    if not deltas:
        return None
    figure = Figure(figsize=(4.6, 4.0), layout="constrained")
    axis = figure.subplots()
    qualities = [point["quality"] for point in report["points"]]
    for index, quality in enumerate(qualities):
        changes = [change for change in deltas if change["quality"] == quality]
        axis.scatter(
            [change["bpp"] for change in changes],
            [change["psnr"] for change in changes],
            s=36,
            linewidths=0.4,
            edgecolors="white",
            color=matplotlib.colormaps["viridis"](index / max(1, len(qualities) - 1) * 0.9),
            label=f"quality {quality}",
            marker="osD^vP*X"[index % 8],
            zorder=2,
        )
    axis.axhline(0, color="#000000", linewidth=0.6, zorder=1)
    axis.axvline(0, color="#000000", linewidth=0.6, zorder=1)
    axis.set_xlabel("change of rate [%]")
    axis.set_ylabel("change of PSNR [dB]")
    axis.grid(True, linewidth=0.4, alpha=0.5)
    _legend_below(figure, columns=4)
    return _svg(figure)


def rises_svg(rises: dict[str, tuple[float, float]]) -> bytes:
    """A bar for each layer of `predicted_rises`: what its inputs and what its weights add to J, in
    percent."""
    figure = Figure(figsize=(4.6, 0.8 + 0.2 * len(rises)), layout="constrained")
    axis = figure.subplots()
    positions = range(len(rises))
    inputs, weights = ([pair[part] for pair in rises.values()] for part in (0, 1))
    axis.barh(positions, inputs, height=0.7, color=BASELINE_STYLE["color"], label="inputs")
    axis.barh(positions, weights, left=inputs, height=0.7, color=QUANT_STYLE["color"], label="weights")
    axis.set_yticks(positions, list(rises), fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("predicted rise of J [%]")
    axis.grid(True, axis="x", linewidth=0.4, alpha=0.5)
    axis.legend(fontsize=8, loc="lower right", frameon=False)
    return _svg(figure)


def _svg(figure: Figure) -> bytes:
    """The same bytes every time; text stays text."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "licq"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _codecs(report: dict) -> list[str]:
    return [codec for codec in ("fp32", "quant", "baseline") if is_everywhere(report, codec)]


def _draw_curves(axis, report: dict, measure: str) -> None:
    names = {
        "fp32": f"{report['arch']}, float",
        "quant": _with_bd(codec_label(report), report.get(f"bd_rate_{measure}")),
        "baseline": _with_bd(baseline_label(report), report.get(f"bd_rate_{measure}_baseline")),
    }
    styles = {"fp32": FLOAT_STYLE, "quant": QUANT_STYLE, "baseline": BASELINE_STYLE}
    drawn = []
    for codec in _codecs(report):
        rate, quality = _curve([point[codec] for point in report["points"]], measure)
        drawn += list(zip(rate, quality))
        axis.plot(rate, quality, label=names[codec], **styles[codec])
    low, high = _span([quality for _, quality in drawn])
    largest = max((rate for rate, _ in drawn), default=1.0)
    for style, (name, anchor) in zip(_ANCHORS, (report.get("anchors") or {}).items()):
        rate, quality = _curve(anchor, measure)
        if rate:
            axis.plot(rate, quality, label=name, zorder=1, **style)
    # The codec fills the picture; an anchor may leave it.
    axis.set_xlim(0, largest * 1.12)
    axis.set_ylim(low, high)
    axis.set_xlabel("rate [bpp" + (", estimated]" if report["bpp_source"] == "estimate" else "]"))
    axis.set_ylabel({"psnr": "PSNR (RGB) [dB]", "ms_ssim": "MS-SSIM [dB]"}[measure])
    axis.grid(True, linewidth=0.4, alpha=0.5)


def _legend_below(figure: Figure, columns: int) -> None:
    """The first panel's, below all: a codec's curve and JPEG's leave no free corner between them."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _with_bd(name: str, value: float | None) -> str:
    return name if value is None else f"{name} (BD-rate {percent(value)})"


def _curve(points: list[dict], measure: str) -> tuple[list[float], list[float]]:
    """Rates and qualities that can be drawn: a lossless point, of infinite quality, cannot."""
    known = sorted((point["bpp"], point[measure]) for point in points if point[measure] is not None)
    known = [(rate, ms_ssim_db(value) if measure == "ms_ssim" else value) for rate, value in known]
    known = [(rate, value) for rate, value in known if math.isfinite(value)]
    return [rate for rate, _ in known], [value for _, value in known]


def _span(values: list[float]) -> tuple[float, float]:
    low, high = min(values, default=30.0), max(values, default=40.0)
    margin = 0.08 * (high - low) or 0.5
    return low - 2 * margin, high + margin
