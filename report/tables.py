"""The tables of a report, for report.md and report.html."""

from typing import NamedTuple

from tabulate import tabulate

from licq.report.changes import predicted_rises
from licq.report.labels import (
    baseline_label,
    codec_label,
    has_baseline,
    is_everywhere,
    measured_codecs,
    percent,
)

_LAYERS_SHOWN = 8  # with most of the loss that remains


class Table(NamedTuple):
    """Cells of text under a header; columns whose indexes are not in `text` hold numbers and are aligned
    right."""

    header: list[str]
    rows: list[list]
    text: tuple[int, ...] = ()

    def markdown(self) -> str:
        align = ["left" if index in self.text else "right" for index in range(len(self.header))]
        rows = [[str(cell).replace("|", "\\|") for cell in row] for row in self.rows]
        return tabulate(rows, headers=self.header, tablefmt="github", disable_numparse=True, colalign=align)


def points_table(report: dict) -> Table:
    header = [
        "quality",
        "lambda",
        "codec",
        "bpp",
        "estimated",
        "PSNR [dB]",
        "MS-SSIM",
        "delta bpp",
        "delta PSNR [dB]",
        "delta J",
    ]
    codecs = measured_codecs(report)
    rows = []
    for point in report["points"]:
        for codec, name in codecs:
            means, reference = point.get(codec), point["fp32"]
            if means is None:
                continue
            delta_j = {
                "quant": point["delta_j_percent"],
                "baseline": point.get("baseline_delta_j_percent"),
            }.get(codec)
            similarity = "n/a" if means["ms_ssim"] is None else f"{means['ms_ssim']:.5f}"
            row = [
                point["quality"],
                _number(point["lambda"], 1, "g"),
                name,
                f"{means['bpp']:.4f}",
                f"{means['bpp_estimated']:.4f}",
                f"{means['psnr']:.3f}",
                similarity,
            ]
            if codec != "fp32" and reference is not None:
                row += [
                    percent(100 * (means["bpp_estimated"] / reference["bpp_estimated"] - 1)),
                    f"{means['psnr'] - reference['psnr']:+.3f}",
                    percent(delta_j),
                ]
            rows.append(row + [""] * (len(header) - len(row)))
    return Table(header, rows, text=(2,))


def bd_table(report: dict) -> Table:
    rows = []
    if is_everywhere(report, "quant") and is_everywhere(report, "fp32"):
        rows.append([f"{codec_label(report)} against float", *_bd_cells(report, "")])
    if has_baseline(report):
        rows.append([f"{baseline_label(report)} against float", *_bd_cells(report, "_baseline")])
    if report.get("bd_rate_psnr_files") is not None:
        rows.append(["files against the estimate", f"{report['bd_rate_psnr_files']:+.3f}%", "", ""])
    if report.get("bd_rate_psnr_real") is not None:
        rows.append(["files against float's estimate", percent(report["bd_rate_psnr_real"]), "", ""])
    for name, values in (report.get("anchor_bd_rate_psnr") or {}).items():
        for codec, label in (("fp32", "float"), ("quant", codec_label(report))):
            if is_everywhere(report, codec):
                rows.append([f"{label} against {name}", percent(values[codec]), "", ""])
    return Table(["BD-rate", "PSNR, PCHIP", "PSNR, cubic", "MS-SSIM (dB), PCHIP"], rows, text=(0,))


def _bd_cells(report: dict, ending: str) -> list[str]:
    return [
        percent(report[key + ending]) for key in ("bd_rate_psnr", "bd_rate_psnr_cubic", "bd_rate_ms_ssim")
    ]


def cost_table(report: dict) -> Table:
    rows = [
        [
            point["quality"],
            _number(point["calibration_seconds"], 1, ".0f"),
            _number(point["peak_memory_mb"], 1, ".0f"),
            _number(point["fp32_model_bytes"], 1e-6, ".2f"),
            _number(point["model_bytes"], 1e-6, ".2f"),
        ]
        for point in report["points"]
    ]
    return Table(
        ["quality", "calibration [s]", "peak memory [MB]", "float model [MB]", "quantized model [MB]"], rows
    )


def _number(value: float | None, factor: float, style: str) -> str:
    return "n/a" if value is None else format(value * factor, style)


class LayerBits(NamedTuple):
    """The bits of single layers for a reader.

    origin: where they come from. totals: what they cost. note: what the totals mean. layers: those of each.
    """

    origin: str
    totals: Table
    note: str
    layers: Table


def layer_bits_tables(report: dict) -> LayerBits | None:
    """The bits of single layers; None where every layer has the same."""
    points = [point for point in report["points"] if point.get("bits")]
    if not points:
        return None
    rows = []
    for point in points:
        bits, history = point["bits"], point["history"]
        ratio = 100 / history["j_float"]
        rows.append(
            [
                point["quality"],
                f"{bits['mean_bits']:.3f}",
                f"{bits['megabytes']:.4f}",
                f"{bits['relative_bops']:.4f}",
                "" if bits.get("loss") is None else percent(ratio * bits["loss"]),
                *(percent(ratio * (history[key] - history["j_float"])) for key in ("j_start", "j_end")),
            ]
        )
    header = [
        "quality",
        "bits a weight",
        "weights [MB]",
        "bit operations, of 8 bits",
        "predicted",
        "before learning",
        "learned",
    ]
    note = (
        "The last three: rise of J on the calibration crops: as the sum of the layers' own rises, as "
        "measured with all layers quantized before and after learning. Operations leave out second digits of "
        "split channels and attention products. Each layer's bits:"
    )
    names = list(dict.fromkeys(name for point in points for name in point["bits"]["layers"]))
    cells = [[name, *(_sides(point["bits"]["layers"].get(name)) for point in points)] for name in names]
    return LayerBits(
        points[0]["bits"]["how"],
        Table(header, rows),
        note,
        Table(["layer", *(f"quality {point['quality']}" for point in points)], cells, text=(0,)),
    )


def _sides(bits: dict | None) -> str:
    return "" if bits is None else f"W{bits['w_bits']} A{bits['a_bits']}"


REMAINING = (
    "Rise of J on the calibration crops that rounding noise alone makes, predicted from the curvature of J "
    "at each layer's output (reconstruction/sensitivity.py): weights as if rounded to nearest, clipping left "
    "out."
)


def remaining_table(report: dict) -> Table:
    """Where rounding noise still raises J, as a run's history predicts it; no rows without one."""
    rows = []
    for point in report["points"]:
        if parts := predicted_rises(point):
            rows.append(
                [
                    point["quality"],
                    *(f"{sum(values):.2f}%" for values in zip(*parts.values())),
                    f"{100 * point['history']['splitting']['extra_macs']:.1f}%",
                    ", ".join(
                        f"{name} {inputs + weights:.2f}%"
                        for name, (inputs, weights) in list(parts.items())[:_LAYERS_SHOWN]
                    ),
                ]
            )
    header = ["quality", "inputs", "weights", "operations added by splitting", "layers with most of it"]
    return Table(header, rows, text=(4,))


CLIPPED = (
    "Values of the evaluation images that lie outside of a layer's static range, as a share of all values "
    "that the layer takes. They were counted because the method sets ranges that may clip."
)


def clipped_table(report: dict) -> Table:
    """The share of values that each layer clips; no rows where that was not counted."""
    rows = []
    for point in report["points"]:
        if (shares := point.get("clipped")) is not None:
            layers = ", ".join(f"{name} {100 * share:.3g}%" for name, share in shares.items())
            rows.append([point["quality"], len(shares), layers or "none"])
    return Table(["quality", "layers that clip", "share of their values"], rows, text=(2,))


def settings_table(report: dict) -> Table:
    settings = {
        key: report[key]
        for key in ("arch", "preset", "loss", "unit", "w_bits", "a_bits", "dataset", "images")
    }
    for key, value in (report.get("config") or {}).items():
        if key not in settings:
            settings[key] = value
    settings["versions"] = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return Table(["setting", "value"], [[key, _cell(value)] for key, value in settings.items()], text=(0, 1))


def _cell(value) -> str:
    if isinstance(value, dict):
        value = ", ".join(f"{key} {part}" for key, part in value.items())
    elif isinstance(value, (list, tuple)):
        value = ", ".join(map(str, value))
    return "" if value is None else str(value).replace("\n", " ")
