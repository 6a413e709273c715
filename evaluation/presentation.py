"""What a reader sees of report.json: report.md and the R-D plot. Both are functions of the report's dictionary alone."""

import math
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tabulate import tabulate

from evaluation.analysis_report import bits_section
from evaluation.metrics import ms_ssim_db

# Okabe and Ito's colours, told apart also by colour-blind readers; markers and dashes tell the curves apart in print.
_FLOAT = dict(color="#000000", marker="o", markersize=7, markerfacecolor="none", linestyle="-", linewidth=1.3)
_QUANT = dict(color="#D55E00", marker="s", markersize=3.8, linestyle="--", linewidth=1.3)
_BASELINE = dict(color="#0072B2", marker="^", markersize=5, linestyle=":", linewidth=1.3)
_ANCHORS = [dict(color="#888888", linestyle="-.", linewidth=1.1), dict(color="#009E73", linestyle=(0, (1, 1)), linewidth=1.1),
            dict(color="#CC79A7", linestyle=(0, (5, 2)), linewidth=1.1)]


def percent(value: float | None) -> str:
    """A change in percent for a reader, with its sign; "n/a" for None."""
    return "n/a" if value is None else f"{value:+.2f}%"


DEFAULT_PRESET = "licq"  # its runs are told apart by their loss


def codec_label(report: dict) -> str:
    """What the quantized codec is called in the table and the plot, e.g. W8A8 rd; "float" where there is none."""
    if report["w_bits"] is None:
        return "float"
    method = report["loss"] if report["preset"] in (None, DEFAULT_PRESET) else report["preset"]
    if any(point.get("bits") for point in report["points"]):
        return f"mixed bits {method}"
    return f"W{report['w_bits']}A{report['a_bits']} {method}"


def baseline_label(report: dict) -> str:
    """What the third codec is called."""
    return "plain" if report.get("baseline") else "without reconstruction"


def render_markdown(report: dict) -> str:
    """report.md: the findings in a sentence, the tables, and what the numbers mean."""
    label = codec_label(report)
    parts = [f"# {report['arch']}, {label}, on {report['dataset']}", _finding(report), "![R-D curves](rd.png)",
             "## Rate and distortion", _points_table(report), _explanation(report),
             "## BD-rate", _bd_table(report), *_notes(report),
             "## Cost", _cost_table(report), *bits_section(report), *_remaining(report)]
    left = _lines(report.get("kept_in_float") or []) + _lines(report.get("left_alone") or {})
    if left:
        parts += ["## Left in float", "\n".join(f"- {item}" for item in left)]
    elif "kept_in_float" in report:
        parts += ["## Left in float", "Nothing."]
    if report.get("warnings"):
        parts += ["## Warnings", "\n".join(f"- {item}" for item in report["warnings"])]
    parts += ["## Settings", _settings(report)]
    return "\n\n".join(part for part in parts if part) + "\n"


_LAYERS_SHOWN = 8


def _remaining(report: dict) -> list[str]:
    """Where rounding noise still raises J, by the history's prediction; nothing where there is none."""
    points = [point for point in report["points"] if (point.get("history") or {}).get("predicted")]
    if not points:
        return []
    rows = []
    for point in points:
        history = point["history"]
        unit = 100 / history["j_float"]
        parts = {name: (unit * both["inputs"], unit * both["weights"]) for name, both in history["predicted"].items()}
        first = sorted(parts.items(), key=lambda item: -sum(item[1]))[:_LAYERS_SHOWN]
        rows.append([point["quality"], *(f"{sum(values):.2f}%" for values in zip(*parts.values())),
                     f"{100 * history['splitting']['extra_macs']:.1f}%",
                     ", ".join(f"{name} {inputs + weights:.2f}%" for name, (inputs, weights) in first)])
    table = tabulate(rows, headers=["quality", "inputs", "weights", "operations added by splitting", "layers with most of it"],
                     tablefmt="github", disable_numparse=True)
    text = ("Rise of J on the calibration crops that rounding noise alone makes, predicted from the curvature of J at each layer's "
            "output (reconstruction/sensitivity.py): weights as if rounded to nearest, clipping left out.")
    return ["## Where the loss remains", table, text]


def render_summary(report: dict) -> str:
    """What a terminal shows at the end of a run: a compact table and the BD-rates, in plain text."""
    label, plain = codec_label(report), baseline_label(report)
    names = [("fp32", "float"), ("quant", label), ("baseline", plain)]
    codecs = [(codec, name) for codec, name in names if any(point.get(codec) is not None for point in report["points"])]
    deltas = [("delta_j_percent", label), ("baseline_delta_j_percent", plain)]
    deltas = [(key, name) for key, name in deltas if any(point.get(key) is not None for point in report["points"])]
    header = ["quality"] + [text for _, name in codecs for text in (f"{name}\nbpp", "\nPSNR")] + [f"{name}\ndelta J" for _, name in deltas]
    rows = [[point["quality"]]
            + [f"{point[codec][key]:{style}}" for codec, _ in codecs for key, style in (("bpp", ".4f"), ("psnr", ".3f"))]
            + [percent(point.get(key)) for key, _ in deltas] for point in report["points"]]
    lines = [f"{report['arch']} on {report['dataset']} ({report['images']} images), bpp "
             + ("estimated from likelihoods" if report["bpp_source"] == "estimate" else "of written and decoded bitstreams"), "",
             tabulate(rows, headers=header, tablefmt="simple", disable_numparse=True, stralign="right"), ""]
    if _is_everywhere(report, "fp32") and _is_everywhere(report, "quant"):
        line = f"BD-rate against float: {percent(report['bd_rate_psnr'])} ({label})"
        line += f", {percent(report['bd_rate_psnr_baseline'])} ({plain})" if _has_baseline(report) else ""
        reason = report["bd_rate_notes"].get("bd_rate_psnr")
        lines.append(line + (f"; {reason.removeprefix('BD-rate: ')}" if reason else ""))
    if report.get("bd_rate_psnr_files") is not None:
        lines.append(f"BD-rate of files against the estimate: {report['bd_rate_psnr_files']:+.3f}%")
    for name, values in (report.get("anchor_bd_rate_psnr") or {}).items():
        lines.append(f"BD-rate against {name}: " + ", ".join(f"{percent(values[codec])} ({text})" for codec, text in codecs if codec in values))
    if report.get("baseline"):
        lines.append(f"{plain}: {report['baseline']}")
    return "\n".join(lines).rstrip()


def coverage_lines(coverage: dict) -> list[str]:
    """`QuantModel.coverage()["kept_in_float"]` as lines for a reader."""
    return [f"{item['function']} in {item['in']}" for item in coverage["kept_in_float"]]


def draw_rd(report: dict, path: str | Path) -> None:
    """rd.png: PSNR against bpp, and MS-SSIM in dB beside it where every point has it."""
    codecs = [codec for codec in ("fp32", "quant", "baseline") if _is_everywhere(report, codec)]
    measures = ["psnr"]
    if all(point[codec]["ms_ssim"] is not None for point in report["points"] for codec in codecs):
        measures.append("ms_ssim")
    figure = Figure(figsize=(max(5.2, 4.4 * len(measures)), 3.8), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    names = {"fp32": f"{report['arch']}, float", "quant": _with_bd(codec_label(report), report.get("bd_rate_psnr")),
             "baseline": _with_bd(baseline_label(report), report.get("bd_rate_psnr_baseline"))}
    styles = {"fp32": _FLOAT, "quant": _QUANT, "baseline": _BASELINE}
    for axis, measure in zip(figure.subplots(1, len(measures), squeeze=False)[0], measures):
        own = []
        for codec in codecs:
            rate, quality = _curve([point[codec] for point in report["points"]], measure)
            own += list(zip(rate, quality))
            axis.plot(rate, quality, label=names[codec], **styles[codec])
        low, high = _span([quality for _, quality in own])
        largest = max((rate for rate, _ in own), default=1.0)
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
    # Below the panels: a codec's curve and JPEG's leave no free corner between them.
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(f"{report['arch']} on {report['dataset']} ({report['images']} images)", fontsize=10)
    figure.savefig(path, format="png")


def _is_everywhere(report: dict, codec: str) -> bool:
    return bool(report["points"]) and all(point.get(codec) is not None for point in report["points"])


def _has_baseline(report: dict) -> bool:
    return _is_everywhere(report, "baseline")


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


def _finding(report: dict) -> str:
    value = report["bd_rate_psnr"]
    if not _is_everywhere(report, "quant") or not _is_everywhere(report, "fp32"):
        return ""
    on = f"On {report['dataset']} ({report['images']} image{'s' if report['images'] != 1 else ''})"
    if value is None:
        reason = report["bd_rate_notes"].get("bd_rate_psnr", "see below").removeprefix("BD-rate: ")
        return f"{on} no BD-rate can be given: {reason}."
    change = "more" if value >= 0 else "less"
    return (f"{on}, at equal PSNR, the quantized codec needs **{abs(value):.2f}% {change} rate** than the float one "
            f"(BD-rate, PCHIP, {len(report['points'])} points).")


def _points_table(report: dict) -> str:
    header = ["quality", "lambda", "codec", "bpp", "PSNR [dB]", "MS-SSIM", "delta bpp", "delta PSNR [dB]", "delta J"]
    names = [("fp32", "float"), ("quant", codec_label(report)), ("baseline", baseline_label(report))]
    codecs = [(codec, name) for codec, name in names if any(point.get(codec) is not None for point in report["points"])]
    rows = []
    for point in report["points"]:
        for codec, name in codecs:
            means, reference = point.get(codec), point["fp32"]
            if means is None:
                continue
            delta_j = {"quant": point["delta_j_percent"], "baseline": point.get("baseline_delta_j_percent")}.get(codec)
            similarity = "n/a" if means["ms_ssim"] is None else f"{means['ms_ssim']:.5f}"
            row = [point["quality"], _number(point["lambda"], 1, "g"), name, f"{means['bpp']:.4f}", f"{means['psnr']:.3f}", similarity]
            if codec != "fp32" and reference is not None:
                row += [percent(100 * (means["bpp"] / reference["bpp"] - 1)), f"{means['psnr'] - reference['psnr']:+.3f}",
                        percent(delta_j)]
            rows.append(row + [""] * (len(header) - len(row)))
    return _table(header, rows, text_columns=(2,))


def _explanation(report: dict) -> str:
    rate = ("bpp is estimated from the entropy model's likelihoods; no bitstream was written."
            if report["bpp_source"] == "estimate" else "bpp counts the bytes of bitstreams that were written and decoded.")
    return (f"{rate} PSNR is on clamped and rounded 8-bit RGB pixels, the mean of the images' dB. MS-SSIM is the mean over "
            "the images with more than 160 pixels on each side. J = bpp + lambda * D is the codec's training objective, "
            "per image, then averaged." + (f" {baseline_label(report)}: {report['baseline']}." if report.get("baseline") else ""))


def _bd_table(report: dict) -> str:
    rows = []
    if _is_everywhere(report, "quant") and _is_everywhere(report, "fp32"):
        rows.append([f"{codec_label(report)} against float", *_bd_cells(report, "")])
    if _has_baseline(report):
        rows.append([f"{baseline_label(report)} against float", *_bd_cells(report, "_baseline")])
    if report.get("bd_rate_psnr_files") is not None:
        rows.append(["files against the estimate", f"{report['bd_rate_psnr_files']:+.3f}%", "", ""])
    for name, values in (report.get("anchor_bd_rate_psnr") or {}).items():
        for codec, label in (("fp32", "float"), ("quant", codec_label(report))):
            if _is_everywhere(report, codec):
                rows.append([f"{label} against {name}", percent(values[codec]), "", ""])
    return _table(["BD-rate", "PSNR, PCHIP", "PSNR, cubic", "MS-SSIM (dB), PCHIP"], rows, text_columns=(0,))


def _bd_cells(report: dict, ending: str) -> list[str]:
    return [percent(report[key + ending]) for key in ("bd_rate_psnr", "bd_rate_psnr_cubic", "bd_rate_ms_ssim")]


def _notes(report: dict) -> list[str]:
    lines = []
    if report["bd_rate_psnr"] is not None and len(report["points"]) < 4:
        lines.append(f"Only {len(report['points'])} points: the usual BD-rate is taken over four or more, so compare with care.")
    missing = {}
    for key, reason in report["bd_rate_notes"].items():
        missing.setdefault(reason, []).append(f"`{key}`")
    lines += [f"No {', '.join(keys)}: {reason}." for reason, keys in missing.items()]
    return ["\n".join(f"- {line}" for line in lines)] if lines else []


def _cost_table(report: dict) -> str:
    rows = [[point["quality"], _number(point["calibration_seconds"], 1, ".0f"), _number(point["peak_memory_mb"], 1, ".0f"),
             _number(point["fp32_model_bytes"], 1e-6, ".2f"), _number(point["model_bytes"], 1e-6, ".2f")]
            for point in report["points"]]
    return _table(["quality", "calibration [s]", "peak memory [MB]", "float model [MB]", "quantized model [MB]"], rows)


def _number(value: float | None, factor: float, style: str) -> str:
    return "n/a" if value is None else format(value * factor, style)


def _settings(report: dict) -> str:
    settings = {key: report[key] for key in ("arch", "preset", "loss", "unit", "w_bits", "a_bits", "dataset", "images")}
    for key, value in (report.get("config") or {}).items():
        if key not in settings:
            settings[key] = value
    settings["versions"] = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return _table(["setting", "value"], [[key, _cell(value)] for key, value in settings.items()], text_columns=(0, 1))


def _cell(value) -> str:
    if isinstance(value, dict):
        value = ", ".join(f"{key} {item}" for key, item in value.items())
    elif isinstance(value, (list, tuple)):
        value = ", ".join(map(str, value))
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")


def _lines(value) -> list[str]:
    return [f"{key}: {reason}" for key, reason in value.items()] if isinstance(value, dict) else [str(item) for item in value]


def _table(header: list[str], rows: list[list], text_columns: tuple[int, ...] = ()) -> str:
    align = ["left" if index in text_columns else "right" for index in range(len(header))]
    return tabulate(rows, headers=header, tablefmt="github", disable_numparse=True, colalign=align)
