"""What a reader sees of report.json in words and tables: report.md, and the parts of it that report.html
shows too."""

from typing import NamedTuple

from tabulate import tabulate

from licq.evaluation.evaluate import ImageResult


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


def percent(value: float | None) -> str:
    """A change in percent for a reader, with its sign; "n/a" for None."""
    return "n/a" if value is None else f"{value:+.2f}%"


DEFAULT_PRESET = "licq"  # its runs are told apart by their loss


def codec_label(report: dict) -> str:
    """What the quantized codec is called in the table and the plot, e.g. W8A8 rd; "float" where there is
    none."""
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
    parts = [
        f"# {title(report)}",
        finding(report),
        "![R-D curves](rd.png)",
        "## Rate and distortion",
        points_table(report).markdown(),
        explanation(report),
        "## BD-rate",
        bd_table(report).markdown(),
        _bullets(bd_notes(report)),
        "## Cost",
        cost_table(report).markdown(),
        *_bits(report),
        *_remaining(report),
    ]
    if "kept_in_float" in report:
        parts += ["## Left in float", _bullets(left_in_float(report)) or "Nothing."]
    if report.get("warnings"):
        parts += ["## Warnings", _bullets(report["warnings"])]
    parts += ["## Settings", settings_table(report).markdown()]
    return "\n\n".join(part for part in parts if part) + "\n"


def title(report: dict) -> str:
    return f"{report['arch']}, {codec_label(report)}, on {report['dataset']}"


def left_in_float(report: dict) -> list[str]:
    """What was not quantized, a line each."""
    return _lines(report.get("kept_in_float") or []) + _lines(report.get("left_alone") or {})


def predicted_rises(point: dict) -> dict[str, tuple[float, float]]:
    """layer -> rise of J in percent that rounding noise of its inputs and of its weights makes, largest sum
    first.

    Empty where a point has no history, as main_eval.py's have not.
    """
    history = point.get("history") or {}
    parts = {
        name: (100 / history["j_float"] * both["inputs"], 100 / history["j_float"] * both["weights"])
        for name, both in history.get("predicted", {}).items()
    }
    return dict(sorted(parts.items(), key=lambda item: -sum(item[1])))


class LayerBits(NamedTuple):
    """How the bits of single layers were found, what they come to, what that says, and each layer's."""

    how: str
    totals: Table
    note: str
    layers: Table


def layer_bits(report: dict) -> LayerBits | None:
    """The bits of single layers; None where every layer has the same."""
    points = [point for point in report["points"] if point.get("bits")]
    if not points:
        return None
    rows = []
    for point in points:
        found, history = point["bits"], point["history"]
        ratio = 100 / history["j_float"]
        rows.append(
            [
                point["quality"],
                f"{found['mean_bits']:.3f}",
                f"{found['megabytes']:.4f}",
                f"{found['relative_bops']:.4f}",
                "" if found.get("loss") is None else percent(ratio * found["loss"]),
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


def _bits(report: dict) -> list[str]:
    found = layer_bits(report)
    return (
        []
        if found is None
        else [
            "## Bits of the layers",
            found.how,
            found.totals.markdown(),
            found.note,
            found.layers.markdown(),
        ]
    )


REMAINING = (
    "Rise of J on the calibration crops that rounding noise alone makes, predicted from the curvature of J "
    "at each layer's output (reconstruction/sensitivity.py): weights as if rounded to nearest, clipping left "
    "out."
)
_LAYERS_SHOWN = 8


def _remaining(report: dict) -> list[str]:
    """Where rounding noise still raises J, by the history's prediction; nothing where there is none."""
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
    return ["## Where the loss remains", Table(header, rows, text=(4,)).markdown(), REMAINING] if rows else []


def render_summary(report: dict) -> str:
    """What a terminal shows at the end of a run: a compact table and the BD-rates, in plain text."""
    label, plain = codec_label(report), baseline_label(report)
    names = [("fp32", "float"), ("quant", label), ("baseline", plain)]
    codecs = [
        (codec, name)
        for codec, name in names
        if any(point.get(codec) is not None for point in report["points"])
    ]
    deltas = [("delta_j_percent", label), ("baseline_delta_j_percent", plain)]
    deltas = [
        (key, name) for key, name in deltas if any(point.get(key) is not None for point in report["points"])
    ]
    header = (
        ["quality"]
        + [text for _, name in codecs for text in (f"{name}\nbpp", "\nPSNR")]
        + [f"{name}\ndelta J" for _, name in deltas]
    )
    rows = [
        [point["quality"]]
        + [
            f"{point[codec][key]:{style}}"
            for codec, _ in codecs
            for key, style in (("bpp", ".4f"), ("psnr", ".3f"))
        ]
        + [percent(point.get(key)) for key, _ in deltas]
        for point in report["points"]
    ]
    lines = [
        f"{report['arch']} on {report['dataset']} ({report['images']} images), bpp "
        + (
            "estimated from likelihoods"
            if report["bpp_source"] == "estimate"
            else "of written and decoded bitstreams"
        ),
        "",
        tabulate(rows, headers=header, tablefmt="simple", disable_numparse=True, stralign="right"),
        "",
    ]
    if is_everywhere(report, "fp32") and is_everywhere(report, "quant"):
        line = f"BD-rate against float: {percent(report['bd_rate_psnr'])} ({label})"
        line += f", {percent(report['bd_rate_psnr_baseline'])} ({plain})" if _has_baseline(report) else ""
        reason = report["bd_rate_notes"].get("bd_rate_psnr")
        lines.append(line + (f"; {reason.removeprefix('BD-rate: ')}" if reason else ""))
    if report.get("bd_rate_psnr_files") is not None:
        lines.append(f"BD-rate of files against the estimate: {report['bd_rate_psnr_files']:+.3f}%")
    for name, values in (report.get("anchor_bd_rate_psnr") or {}).items():
        lines.append(
            f"BD-rate against {name}: "
            + ", ".join(f"{percent(values[codec])} ({text})" for codec, text in codecs if codec in values)
        )
    if report.get("baseline"):
        lines.append(f"{plain}: {report['baseline']}")
    return "\n".join(lines).rstrip()


def coverage_lines(coverage: dict) -> list[str]:
    """`QuantModel.coverage()["kept_in_float"]` as lines for a reader."""
    return [f"{item['function']} in {item['in']}" for item in coverage["kept_in_float"]]


def is_everywhere(report: dict, codec: str) -> bool:
    return bool(report["points"]) and all(point.get(codec) is not None for point in report["points"])


def _has_baseline(report: dict) -> bool:
    return is_everywhere(report, "baseline")


def finding(report: dict) -> str:
    """The BD-rates in a sentence, or why there are none; empty where one codec alone was measured."""
    value = report["bd_rate_psnr"]
    if not is_everywhere(report, "quant") or not is_everywhere(report, "fp32"):
        return ""
    on = f"On {report['dataset']} ({report['images']} image{'s' if report['images'] != 1 else ''})"
    if value is None:
        reason = report["bd_rate_notes"].get("bd_rate_psnr", "see below").removeprefix("BD-rate: ")
        return f"{on} no BD-rate can be given: {reason}."
    text = f"{on}, at equal PSNR, the quantized codec needs {_more(value)} than the float one"
    if (similar := report["bd_rate_ms_ssim"]) is not None:
        text += f", at equal MS-SSIM {_more(similar)}"
    if (plain := report.get("bd_rate_psnr_baseline")) is not None:
        text += f"; plain quantization needs {_more(plain)} at equal PSNR"
    return f"{text} (BD-rate, PCHIP, {len(report['points'])} points)."


def _more(value: float) -> str:
    return f"**{abs(value):.2f}% {'more' if value >= 0 else 'less'} rate**"


def image_deltas(report: dict) -> list[dict]:
    """What quantization does to every image: {quality, index, image, bpp [%], psnr [dB], j [%] or None},
    largest rise of J first.

    Images without a rate or without an error, which have no such change, are left out.
    """
    deltas = []
    for point in report["points"]:
        pairs = zip(point["images_per"].get("fp32", ()), point["images_per"].get("quant", ()))
        for index, (before, after) in enumerate(pairs):
            if not (before["bpp"] and before["mse"] and after["mse"]):
                continue
            rise = None
            if point["lambda"] is not None:
                float_j, j = (
                    ImageResult(**image).cost(point["lambda"], report.get("metric", "mse"))
                    for image in (before, after)
                )
                rise = 100 * (j / float_j - 1)
            deltas.append(
                {
                    "quality": point["quality"],
                    "index": index,
                    "image": before["name"],
                    "bpp": 100 * (after["bpp"] / before["bpp"] - 1),
                    "psnr": after["psnr"] - before["psnr"],
                    "j": rise,
                }
            )
    return sorted(deltas, key=lambda item: -item["psnr"] if item["j"] is None else -item["j"])


def points_table(report: dict) -> Table:
    header = [
        "quality",
        "lambda",
        "codec",
        "bpp",
        "PSNR [dB]",
        "MS-SSIM",
        "delta bpp",
        "delta PSNR [dB]",
        "delta J",
    ]
    names = [("fp32", "float"), ("quant", codec_label(report)), ("baseline", baseline_label(report))]
    codecs = [
        (codec, name)
        for codec, name in names
        if any(point.get(codec) is not None for point in report["points"])
    ]
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
                f"{means['psnr']:.3f}",
                similarity,
            ]
            if codec != "fp32" and reference is not None:
                row += [
                    percent(100 * (means["bpp"] / reference["bpp"] - 1)),
                    f"{means['psnr'] - reference['psnr']:+.3f}",
                    percent(delta_j),
                ]
            rows.append(row + [""] * (len(header) - len(row)))
    return Table(header, rows, text=(2,))


def explanation(report: dict) -> str:
    rate = (
        "bpp is estimated from the entropy model's likelihoods; no bitstream was written."
        if report["bpp_source"] == "estimate"
        else "bpp counts the bytes of bitstreams that were written and decoded."
    )
    return (
        f"{rate} PSNR is on clamped and rounded 8-bit RGB pixels, the mean of the images' dB. MS-SSIM is the "
        "mean over the images with more than 160 pixels on each side. J = bpp + lambda * D is the codec's "
        "training objective, per image, then averaged."
        + (f" {baseline_label(report)}: {report['baseline']}." if report.get("baseline") else "")
    )


def bd_table(report: dict) -> Table:
    rows = []
    if is_everywhere(report, "quant") and is_everywhere(report, "fp32"):
        rows.append([f"{codec_label(report)} against float", *_bd_cells(report, "")])
    if _has_baseline(report):
        rows.append([f"{baseline_label(report)} against float", *_bd_cells(report, "_baseline")])
    if report.get("bd_rate_psnr_files") is not None:
        rows.append(["files against the estimate", f"{report['bd_rate_psnr_files']:+.3f}%", "", ""])
    for name, values in (report.get("anchor_bd_rate_psnr") or {}).items():
        for codec, label in (("fp32", "float"), ("quant", codec_label(report))):
            if is_everywhere(report, codec):
                rows.append([f"{label} against {name}", percent(values[codec]), "", ""])
    return Table(["BD-rate", "PSNR, PCHIP", "PSNR, cubic", "MS-SSIM (dB), PCHIP"], rows, text=(0,))


def _bd_cells(report: dict, ending: str) -> list[str]:
    return [
        percent(report[key + ending]) for key in ("bd_rate_psnr", "bd_rate_psnr_cubic", "bd_rate_ms_ssim")
    ]


def bd_notes(report: dict) -> list[str]:
    lines = []
    if report["bd_rate_psnr"] is not None and len(report["points"]) < 4:
        lines.append(
            f"Only {len(report['points'])} points: the usual BD-rate is taken over four or more, so "
            "compare with care."
        )
    missing = {}
    for key, reason in report["bd_rate_notes"].items():
        missing.setdefault(reason, []).append(f"`{key}`")
    lines += [f"No {', '.join(keys)}: {reason}." for reason, keys in missing.items()]
    return lines


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
        value = ", ".join(f"{key} {item}" for key, item in value.items())
    elif isinstance(value, (list, tuple)):
        value = ", ".join(map(str, value))
    return "" if value is None else str(value).replace("\n", " ")


def _lines(value) -> list[str]:
    return (
        [f"{key}: {reason}" for key, reason in value.items()]
        if isinstance(value, dict)
        else [str(item) for item in value]
    )


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
