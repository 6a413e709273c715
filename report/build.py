"""report.json: the R-D points of a float and a quantized codec, and the BD-rates between their curves.

Everything a reader may see is in one plain dictionary; `text`, `tables`, `figures` and `html` make the
files from it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from licq.evaluation.bd_rate import bd_rate
from licq.evaluation.evaluate import Report, delta_j_percent
from licq.evaluation.metrics import ms_ssim_db
from licq.report.compressai_results import write_compressai
from licq.report.figures import draw_rd
from licq.report.html import render_html
from licq.report.text import render_markdown
from licq.support.determinism import versions
from licq.support.errors import InputError
from licq.support.files import atomic_path, write_json, write_text


def make_point(
    *,
    quality: float,
    lmbda: float | None,
    fp32: Report | None,
    quant: Report | None,
    metric: str = "mse",
    baseline: Report | None = None,
    calibration_seconds: float | None = None,
    peak_memory_mb: float | None = None,
    model_bytes: int | None = None,
    fp32_model_bytes: int | None = None,
    **extra,
) -> dict:
    """One rate point of report.json (design section 7) from the evaluations of its codecs.

    Args:
        lmbda, metric: the trade-off and the distortion the codec was trained with, for delta_j_percent
            (None where lmbda is).
        fp32, quant: the evaluations; at most one may be None, where only the other codec was measured.
        baseline: an optional third codec, e.g. nearest rounding without reconstruction.
        extra: further keys, written as they are.
    """
    measured = {"fp32": fp32, "quant": quant}
    last = quant or fp32
    if last is None:
        raise ValueError("`fp32` or `quant` is needed")
    point = {
        "quality": quality,
        "lambda": lmbda,
        **{codec: report and report.mean() for codec, report in measured.items()},
        "delta_j_percent": _delta_j(fp32, quant, lmbda, metric),
        "bpp_source": last.bpp_source,
        **({} if quant is None or quant.no_files is None else {"no_files": quant.no_files}),
        "calibration_seconds": calibration_seconds,
        "peak_memory_mb": peak_memory_mb,
        "model_bytes": model_bytes,
        "fp32_model_bytes": fp32_model_bytes,
        **({} if quant is None or quant.clipped is None else {"clipped": quant.clipped}),
        "images_per": {
            codec: report.images_as_dicts() for codec, report in measured.items() if report is not None
        },
    }
    if baseline is not None:
        point["baseline"] = baseline.mean()
        point["baseline_delta_j_percent"] = _delta_j(fp32, baseline, lmbda, metric)
        point["images_per"]["baseline"] = baseline.images_as_dicts()
    return point | extra


def build_report(
    *,
    arch: str,
    preset: str | None,
    loss: str,
    unit: str,
    w_bits: int,
    a_bits: int,
    dataset: str,
    images: int,
    points: Sequence[dict],
    anchors: Mapping[str, Sequence[dict]] | None = None,
    warnings: Sequence[str] = (),
    **extra,
) -> dict:
    """The dictionary of report.json: the keys of design section 7 and some more.

    `bd_rate_psnr` and `bd_rate_ms_ssim` (on the dB scale) are percent of rate of the quantized against the
    float codec, PCHIP, from two points on; `bd_rate_psnr_cubic` needs four. They compare like with like: the
    estimates of both codecs, since a float codec has no others. One that cannot be had is None,
    and `bd_rate_notes` says why under the same key. With a baseline in every point there are the same three
    with the ending `_baseline`. Where files were written, `bd_rate_psnr_files` holds their rates against the
    quantized codec's estimates, and `bd_rate_psnr_real` against the float codec's. With anchors
    `anchor_bd_rate_psnr` holds {anchor's name: {"fp32", "quant"}}, of the float and of the quantized codec
    against each, by their `bpp`.

    Args:
        points: from `make_point`; sorted by rate here.
        anchors: curves to compare with, by name, e.g. from `evaluation.anchors.anchors_of`.
        extra: further keys, written as they are (config, kept_in_float, ...).
    """
    points = sorted(points, key=lambda point: (point["fp32"] or point["quant"])["bpp"])
    rates, notes = {}, {}
    for ending, codec in (("", "quant"), ("_baseline", "baseline")):
        if codec == "baseline" and not (points and all(codec in point for point in points)):
            continue
        for key, measure, method in (
            ("bd_rate_psnr", "psnr", "pchip"),
            ("bd_rate_ms_ssim", "ms_ssim", "pchip"),
            ("bd_rate_psnr_cubic", "psnr", "cubic"),
        ):
            rates[key + ending], note = _bd_rate(
                [_estimated(point["fp32"]) for point in points],
                [_estimated(point[codec]) for point in points],
                measure,
                method,
            )
            if note:
                notes[key + ending] = note
    sources = sorted({point["bpp_source"] for point in points})
    if sources == ["bitstream"]:
        files = [point["quant"] for point in points]
        for key, codec in (("bd_rate_psnr_files", "quant"), ("bd_rate_psnr_real", "fp32")):
            estimates = [_estimated(point[codec]) for point in points]
            rates[key], note = _bd_rate(estimates, files, "psnr", "pchip")
            if note:
                notes[key] = note
    report = {
        "arch": arch,
        "preset": preset,
        "loss": loss,
        "unit": unit,
        "w_bits": w_bits,
        "a_bits": a_bits,
        "dataset": dataset,
        "images": images,
        "points": list(points),
    } | rates
    report |= {
        "bd_rate_notes": notes,
        "bpp_source": sources[0] if len(sources) == 1 else sources,
        "warnings": list(warnings),
        "versions": versions(),
    }
    if anchors:
        report["anchors"] = {name: list(curve) for name, curve in anchors.items()}
        report["anchor_bd_rate_psnr"] = {
            name: {
                codec: _bd_rate(curve, [point[codec] for point in points], "psnr", "pchip")[0]
                for codec in ("fp32", "quant")
            }
            for name, curve in anchors.items()
        }
    return report | extra


def write_report(folder: str | Path, report: dict) -> None:
    """Write report.json, report.md, report.html, rd.png and compressai/*.json into `folder`, each whole or
    not at all.

    report.html holds the crops that the points name, as far as `folder` has them.

    Raises:
        InputError: the folder cannot be written.
    """
    folder = Path(folder)
    write_json(folder / "report.json", report)
    with atomic_path(folder / "rd.png") as temporary:
        draw_rd(report, temporary)
    write_text(folder / "report.md", render_markdown(report))
    write_text(folder / "report.html", render_html(report, folder))
    write_compressai(folder / "compressai", report)


def _delta_j(fp32: Report | None, other: Report | None, lmbda: float | None, metric: str) -> float | None:
    if lmbda is None or fp32 is None or other is None:
        return None
    return delta_j_percent(fp32, other, lmbda, metric)


def _estimated(means: dict | None) -> dict | None:
    """The means with the estimated rate."""
    return means and means | {"bpp": means["bpp_estimated"]}


def _bd_rate(
    anchor: Sequence[dict | None], curve: Sequence[dict | None], measure: str, method: str
) -> tuple[float | None, str | None]:
    """BD-rate between two lists of means, or the reason why there is none."""
    try:
        return bd_rate(*_columns(anchor, measure), *_columns(curve, measure), method=method), None
    except InputError as error:
        return None, str(error)


def _columns(points: Sequence[dict | None], measure: str) -> tuple[list[float], list[float]]:
    known = [point for point in points if point is not None]
    if len(known) < len(points):
        raise InputError("the float and the quantized codec were not both evaluated")
    if any(point[measure] is None for point in known):
        raise InputError(
            f"{measure} is not known at every point (images of 160 pixels or less have no MS-SSIM)"
        )
    quality = [ms_ssim_db(point[measure]) if measure == "ms_ssim" else point[measure] for point in known]
    return [point["bpp"] for point in known], quality
