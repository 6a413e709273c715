"""What a reader sees of report.json in words: report.md, and the summary on a terminal."""

from tabulate import tabulate

from licq.report.labels import (
    baseline_label,
    codec_label,
    has_baseline,
    is_everywhere,
    measured_codecs,
    percent,
    title,
)
from licq.report.tables import (
    CLIPPED,
    REMAINING,
    bd_table,
    clipped_table,
    cost_table,
    layer_bits_tables,
    points_table,
    remaining_table,
    settings_table,
)


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
        *_layer_bits_section(report),
        *_remaining_section(report),
        *_clipped_section(report),
    ]
    if "kept_in_float" in report:
        parts += ["## Left in float", _bullets(left_in_float(report)) or "Nothing."]
    if report.get("warnings"):
        parts += ["## Warnings", _bullets(report["warnings"])]
    parts += ["## Settings", settings_table(report).markdown()]
    return "\n\n".join(part for part in parts if part) + "\n"


def left_in_float(report: dict) -> list[str]:
    """What was not quantized, a line each."""
    return _lines(report.get("kept_in_float") or []) + _lines(report.get("left_alone") or {})


def _layer_bits_section(report: dict) -> list[str]:
    tables = layer_bits_tables(report)
    if tables is None:
        return []
    parts = [tables.origin, tables.totals.markdown(), tables.note, tables.layers.markdown()]
    return ["## Bits of the layers", *parts]


def _remaining_section(report: dict) -> list[str]:
    table = remaining_table(report)
    return ["## Where the loss remains", table.markdown(), REMAINING] if table.rows else []


def _clipped_section(report: dict) -> list[str]:
    table = clipped_table(report)
    return ["## Values clipped", table.markdown(), CLIPPED] if table.rows else []


def render_summary(report: dict) -> str:
    """What a terminal shows at the end of a run: a compact table and the BD-rates, in plain text."""
    label, plain = codec_label(report), baseline_label(report)
    codecs = measured_codecs(report)
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
        f"{report['arch']} on {report['dataset']} ({report['images']} images), bpp {_source(report)}",
        "",
        tabulate(rows, headers=header, tablefmt="simple", disable_numparse=True, stralign="right"),
        "",
    ]
    if is_everywhere(report, "fp32") and is_everywhere(report, "quant"):
        line = f"BD-rate against float: {percent(report['bd_rate_psnr'])} ({label})"
        line += f", {percent(report['bd_rate_psnr_baseline'])} ({plain})" if has_baseline(report) else ""
        reason = report["bd_rate_notes"].get("bd_rate_psnr")
        lines.append(line + (f"; {reason.removeprefix('BD-rate: ')}" if reason else ""))
    if report.get("bd_rate_psnr_files") is not None:
        line = f"BD-rate of files against the estimate: {report['bd_rate_psnr_files']:+.3f}%"
        if report.get("bd_rate_psnr_real") is not None:
            line += f", against float's estimate: {percent(report['bd_rate_psnr_real'])}"
        lines.append(line)
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
    return [f"{function['function']} in {function['in']}" for function in coverage["kept_in_float"]]


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


def explanation(report: dict) -> str:
    rate = (
        "bpp is estimated from the entropy model's likelihoods; no bitstream was written."
        if report["bpp_source"] == "estimate"
        else "bpp counts the bytes of bitstreams that were written and decoded; that of the float codec is "
        "estimated from likelihoods. Changes of bpp, delta J and BD-rates against the float codec compare "
        "the estimates of both, unless they name files."
    )
    if reason := _no_files(report):
        rate += f" The quantized codec has no files: {reason}."
    return (
        f"{rate} PSNR is on clamped and rounded 8-bit RGB pixels, the mean of the images' dB. MS-SSIM is the "
        "mean over the images with more than 160 pixels on each side. J = bpp + lambda * D is the codec's "
        "training objective, per image, then averaged."
        + (f" {baseline_label(report)}: {report['baseline']}." if report.get("baseline") else "")
    )


def _source(report: dict) -> str:
    if report["bpp_source"] != "estimate":
        return "of written and decoded bitstreams" + (
            " (float: estimated)" if is_everywhere(report, "fp32") else ""
        )
    reason = _no_files(report)
    return "estimated from likelihoods" + (f"; no files: {reason}" if reason else "")


def _no_files(report: dict) -> str | None:
    """Why the quantized codec has no files; None where it has, or nobody asked."""
    return next((point["no_files"] for point in report["points"] if "no_files" in point), None)


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


def _lines(value: list | dict) -> list[str]:
    if isinstance(value, dict):
        return [f"{key}: {reason}" for key, reason in value.items()]
    return [str(line) for line in value]


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
