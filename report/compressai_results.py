"""The curves of a report as CompressAI's result files, one a curve, for `python -m compressai.utils.plot -f
OUT/compressai/*.json`."""

from pathlib import Path

from licq.report.labels import baseline_label, codec_label, is_everywhere
from licq.support.files import write_json

_FILES = {"fp32": "float", "quant": "quantized", "baseline": "baseline"}


def write_compressai(folder: Path, report: dict) -> None:
    """Write `folder`/float.json, quantized.json and baseline.json, as far as every point has them; files of
    others are removed.

    Raises:
        InputError: the folder cannot be written.
    """
    labels = {"fp32": "float", "quant": codec_label(report), "baseline": baseline_label(report)}
    for codec, name in _FILES.items():
        path = folder / f"{name}.json"
        if is_everywhere(report, codec):
            write_json(path, compressai_results(report, codec, f"{report['arch']} {labels[codec]}"))
        else:
            path.unlink(missing_ok=True)


def compressai_results(report: dict, codec: str, name: str) -> dict:
    """{"name", "description", "results": {"bpp", "psnr-rgb", "ms-ssim-rgb"}} by rising rate; a measure that a
    point lacks is left out."""
    points = sorted((point[codec] for point in report["points"]), key=lambda means: means["bpp"])
    results = {
        key: [means[measure] for means in points]
        for key, measure in (("bpp", "bpp"), ("psnr-rgb", "psnr"), ("ms-ssim-rgb", "ms_ssim"))
        if all(means[measure] is not None for means in points)
    }
    source = "files" if codec != "fp32" and report["bpp_source"] == "bitstream" else "estimates"
    return {
        "name": name,
        "description": f"licq, {report['dataset']}, {report['images']} images, bpp of {source}",
        "results": results,
    }
