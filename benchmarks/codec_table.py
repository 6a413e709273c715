"""One line for each run of main_ptq.py: what quantization costs a codec, beside the plain baseline.

for A in balle2018 minnen2018 ...; do
    python main_ptq.py --arch $A --loss rd --calib clic --eval kodak --out runs/table/$A
done
python benchmarks/codec_table.py runs/table/*
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, whatever is installed

from tabulate import tabulate

from licq.support.cli import ArgumentParser, main_guard
from licq.support.errors import InputError

HEADS = [
    "codec",
    "rates",
    "images",
    "BD-rate",
    "plain",
    "MS-SSIM BD-rate",
    "delta J",
    "plain",
    "calibration",
    "peak memory",
    "file, of float's",
    "kept in float",
]


def percent(value: float | None) -> str:
    return "n/a" if value is None else f"{value:+.2f} %"


def between(values: list[float], form: str) -> str:
    """The smallest and the largest value."""
    low, high = (format(end, form) for end in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def row(report: dict) -> list[str]:
    """The line of a run."""
    points = report["points"]
    plain = [point["baseline_delta_j_percent"] for point in points if "baseline" in point]
    float_parts = [str(part) for part in report["kept_in_float"]] + [
        f"{name} ({why})" for name, why in report["left_alone"].items()
    ]
    share = [100 * point["model_bytes"] / point["fp32_model_bytes"] for point in points]
    return [
        report["arch"],
        str(len(points)),
        str(report["images"]),
        percent(report["bd_rate_psnr"]),
        percent(report.get("bd_rate_psnr_baseline")),
        percent(report["bd_rate_ms_ssim"]),
        between([point["delta_j_percent"] for point in points], "+.2f") + " %",
        between(plain, "+.2f") + " %" if plain else "n/a",
        between([point["calibration_seconds"] for point in points], ".0f") + " s",
        between([point["peak_memory_mb"] for point in points], ".0f") + " MB",
        between(share, ".1f") + " %",
        "; ".join(float_parts) or "nothing",
    ]


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folders of main_ptq.py")
    rows = []
    for folder in parser.parse_args().runs:
        path = folder / "report.json"
        if not path.is_file():
            raise InputError(f"{folder} holds no report.json; give folders that main_ptq.py has finished")
        rows.append(row(json.loads(path.read_text(encoding="utf-8"))))
    print(tabulate(rows, HEADS, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    sys.exit(main_guard(main))
