"""The picture of README.md: R-D curves of a run, and a crop of one image before and after quantization.

    make demo
    python benchmarks/readme_picture.py runs/demo --quality 3 --out docs/images/demo.png

Everything that is drawn comes from the run's folder: report.json and q<quality>/crops.png.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from licq.report.crops import PANELS, split_panels
from licq.report.figures import BASELINE_STYLE, FLOAT_STYLE, QUANT_STYLE
from licq.support.cli import ArgumentParser, main_guard
from licq.support.errors import InputError

COLOURS = 224  # of the PNG's palette: a third of the bytes of full colour


def draw(folder: Path, quality: float) -> Figure:
    """The figure of a finished run; see the top of this file.

    Raises:
        InputError: the folder holds no finished run, or no such quality.
    """
    path = folder / "report.json"
    if not path.is_file():
        raise InputError(
            f"{folder} holds no report.json; give the folder of a run that main_ptq.py has finished"
        )
    report = json.loads(path.read_text(encoding="utf-8"))
    points = {point["quality"]: point for point in report["points"]}
    if quality not in points:
        raise InputError(f"{folder} has no quality {quality:g}; choose from {', '.join(map(str, points))}")
    point = points[quality]
    bits = f"W{report['w_bits']}A{report['a_bits']}"

    def rate(codec: str) -> float:
        """Of the image that the crop is from."""
        return point["images_per"][codec][point["crops"]["index"]]["bpp"]

    def bd_rate(key: str) -> str:
        return "no BD-rate" if report.get(key) is None else f"BD-rate {report[key]:+.2f} %"

    figure = Figure(figsize=(9.6, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subfigures(1, 2, width_ratios=(1.12, 1))
    axis = left.subplots()
    curves = {
        "fp32": ("float", FLOAT_STYLE),
        "quant": (f"{bits}, licq: {bd_rate('bd_rate_psnr')}", QUANT_STYLE),
        "baseline": (
            f"{bits}, plain: {bd_rate('bd_rate_psnr_baseline')}",
            BASELINE_STYLE,
        ),
    }
    for codec, (label, style) in curves.items():
        if all(codec in each for each in points.values()):
            rates, psnrs = ([each[codec][key] for each in points.values()] for key in ("bpp", "psnr"))
            axis.plot(rates, psnrs, label=label, **style)
    axis.set_xlabel("rate [bit per pixel]")
    axis.set_ylabel("PSNR [dB]")
    axis.set_title(f"{report['arch']} on {report['images']} photographs", fontsize=11)
    axis.grid(True, linewidth=0.4, alpha=0.5)
    axis.legend(fontsize=9, frameon=False, loc="lower right")

    labels = dict(
        zip(
            PANELS,
            (
                "original",
                f"float: {rate('fp32'):.3f} bpp",
                f"{bits}: {rate('quant'):.3f} bpp",
                f"difference, {point['crops']['amplified']} times",
            ),
            strict=True,
        )
    )
    panels = split_panels(folder / point["crops"]["file"])
    for cell, panel, label in zip(right.subplots(2, 2).flat, panels, labels.values(), strict=True):
        cell.imshow(panel, interpolation="nearest")
        cell.set_title(label, fontsize=10)
        cell.set_axis_off()
    return figure


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of main_ptq.py, finished")
    parser.add_argument("--quality", type=int, default=3, help="of the crops (default: 3)")
    parser.add_argument("--out", type=Path, required=True, help="the PNG to write")
    args = parser.parse_args()
    figure = draw(args.run, args.quality)
    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(args.out, optimize=True)
    print(f"{args.out}: {args.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    sys.exit(main_guard(main))
