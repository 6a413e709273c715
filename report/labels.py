"""How a report calls its codecs and writes its numbers."""

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


def title(report: dict) -> str:
    return f"{report['arch']}, {codec_label(report)}, on {report['dataset']}"


def measured_codecs(report: dict) -> list[tuple[str, str]]:
    """(key of a point, what the codec is called) of each codec that any point has."""
    names = [("fp32", "float"), ("quant", codec_label(report)), ("baseline", baseline_label(report))]
    return [
        (codec, name)
        for codec, name in names
        if any(point.get(codec) is not None for point in report["points"])
    ]


def is_everywhere(report: dict, codec: str) -> bool:
    return bool(report["points"]) and all(point.get(codec) is not None for point in report["points"])


def has_baseline(report: dict) -> bool:
    return is_everywhere(report, "baseline")


def percent(value: float | None) -> str:
    """A change in percent for a reader, with its sign; "n/a" for None."""
    return "n/a" if value is None else f"{value:+.2f}%"
