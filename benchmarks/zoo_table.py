"""The tables of models/zoo/README.md: every embedded checkpoint, with its rate and distortion.

    python benchmarks/zoo_table.py --data kodak

main_eval.py measures them. Its reports go to --out, a folder for each architecture; reports that are there
are not made again.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, whatever is installed

from tabulate import tabulate

import main_eval
from licq.models.checkpoints import embedded_checkpoint, embedded_qualities, read_checkpoint
from licq.models.registry import get_architecture, list_models
from licq.support import options
from licq.support.cli import ArgumentParser, main_guard


def report_of(arch: str, data: str, out: Path, threads: int | None) -> dict:
    """The report of main_eval.py on the float codecs of an architecture."""
    path = out / arch / "report.json"
    if not path.is_file():
        words = ["--model", "float", "--arch", arch, "--data", data, "--out", str(path.parent)]
        main_eval.main(words + (["--threads", str(threads)] if threads else []))
    return json.loads(path.read_text(encoding="utf-8"))


def point_row(arch: str, point: dict, repeats: bool) -> list:
    """The line of a rate point; repeats: an earlier line is about the same checkpoint."""
    known = read_checkpoint(embedded_checkpoint(arch, int(point["quality"]))).metadata
    width = ", ".join(f"{name} {known['kwargs'][name]}" for name in ("N", "M") if name in known["kwargs"])
    trained = (
        ["the same file"] * 3
        if repeats
        else [known.get("init") or "scratch", f"{known['steps']} x {known['batch']}", known["seconds"]]
    )
    return [
        arch,
        width,
        point["quality"],
        point["lambda"],
        *trained,
        f"{point['fp32']['bpp']:.4f}",
        f"{point['fp32']['psnr']:.3f}",
    ]


def curve_row(arch: str, report: dict) -> list:
    """The BD-rates of an architecture."""
    bd_rates = {
        "published" if name.startswith("published") else name: value["fp32"]
        for name, value in report["anchor_bd_rate_psnr"].items()
    }
    return [
        arch,
        *(
            "-" if bd_rates.get(name) is None else f"{bd_rates[name]:+.1f} %"
            for name in ("JPEG", "WebP", "published")
        ),
    ]


def tables(reports: dict[str, dict]) -> str:
    """Two tables in Markdown: a line for each rate point, and a line for each architecture."""
    points = [
        point_row(arch, point, get_architecture(arch).variable and index > 0)
        for arch, report in reports.items()
        for index, point in enumerate(report["points"])
    ]
    heads = ["codec", "width", "quality", "lambda", "start", "steps x batch", "seconds", "bpp", "PSNR [dB]"]
    curves = [curve_row(arch, report) for arch, report in reports.items()]
    return "\n\n".join(
        (
            tabulate(points, heads, tablefmt="github", disable_numparse=True),
            tabulate(
                curves,
                ["codec", "BD-rate against JPEG", "WebP", "published"],
                tablefmt="github",
                disable_numparse=True,
            ),
        )
    )


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", metavar="SET", default="kodak", help="images (default: kodak)")
    parser.add_argument(
        "--out", metavar="FOLDER", type=Path, default=Path("runs/zoo_table"), help="default: runs/zoo_table"
    )
    parser.add_argument(
        "--threads", metavar="N", type=options.threads, help="CPU threads (default: PyTorch's choice)"
    )
    args = parser.parse_args()
    archs = [arch for arch in list_models() if embedded_qualities(arch)]
    print(tables({arch: report_of(arch, args.data, args.out, args.threads) for arch in archs}))


if __name__ == "__main__":
    sys.exit(main_guard(main))
