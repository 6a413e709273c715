"""Results of the plan's cells: docs/results/cells/CODEC/NAME.json, a file of 1 to 3 KB for each.

A record holds the command, what the method's fields were, commit, machine, date, and every rate point. It is
old when numbers.json has a later change that affects it, or when the plan's command or method is another one
now.
"""

import datetime
import functools
import hashlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout, whatever is installed

from benchmarks import stored
from benchmarks.plan import Cell, Table
from licq.report.changes import predicted_rises
from licq.runs.folder import read_json
from licq.support.errors import InputError
from licq.support.files import write_text
from licq.support.version import __version__

CODE = (
    "codec data evaluation examples integer models quant reconstruction report runs support workers"
).split()
RATES = ("bd_rate_psnr", "bd_rate_psnr_real", "bd_rate_psnr_cubic", "bd_rate_ms_ssim")
_LAYERS = 4  # with most of the predicted loss, of each rate
_DIGITS = {"bpp": 6, "bpp_estimated": 6, "psnr": 4, "ms_ssim": 6}


class Records:
    """The records of a folder, by their cells.

    Args:
        folder: default docs/results/cells.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder or stored.RESULTS / "cells"
        self.changes = stored.load("numbers")["changes"]
        self._read: dict[str, dict | None] = {}

    def path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.key}.json"

    def get(self, cell: Cell) -> dict | None:
        """The record of a cell; None where it has not been measured.

        Raises:
            InputError: the file is damaged.
        """
        if cell.key not in self._read:
            self._read[cell.key] = _read(self.path(cell))
        return self._read[cell.key]

    def put(self, cell: Cell, record: dict) -> None:
        write_text(self.path(cell), dump(record))
        self._read[cell.key] = record

    def why_old(self, cell: Cell) -> list[str]:
        """What has changed since the cell was measured, in words; nothing where there is no record."""
        record = self.get(cell)
        if record is None:
            return []
        later = [
            f"{change['change']} ({change['date']})"
            for change in self.changes
            if change["number"] > record["numbers"] and cell.depends & set(change["affects"])
        ]
        if record["command"] != " ".join(cell.words):
            later.append("the plan has another command now")
        elif record["config"] != cell.config:
            names = sorted({*record["config"], *cell.config})
            changed = [name for name in names if record["config"].get(name) != cell.config.get(name)]
            later.append(f"the preset {cell.config['preset']} has other fields now ({', '.join(changed)})")
        return later

    def state(self, cell: Cell) -> str:
        """open | old | current."""
        if self.get(cell) is None:
            return "open"
        return "old" if self.why_old(cell) else "current"

    def value(self, cells: list[Cell], measure: Callable[[dict], float | None]) -> list[float]:
        """What is measured of the cells, one a seed."""
        records = [record for cell in cells if (record := self.get(cell))]
        return [value for record in records if (value := measure(record)) is not None]

    def ranked(self, table: Table, axis: str) -> list[str]:
        """The labels of an axis with the least mean change of J over the table's cells first.

        Labels that lack a codec which others have come behind them.
        """
        means: dict[str, list[float]] = {label: [] for label in table.axes.get(axis, ())}
        for labels, cells in table.cells.items():
            means[dict(labels)[axis]] += self.value(cells, delta_j)
        known = {label: values for label, values in means.items() if values}
        return sorted(known, key=lambda label: (-len(known[label]), statistics.mean(known[label])))

    def minutes(self, cell: Cell) -> float:
        """How long a cell takes: as before, or as the plan expects, corrected by what cells of the
        same method and codec took."""
        record = self.get(cell)
        if record is not None and record.get("minutes"):
            return record["minutes"]
        expected = took = 0.0
        for other in (one for one in self._read.values() if one and one.get("minutes")):
            if other["codec"] == cell.codec and other["method"] == cell.method:
                took, expected = took + other["minutes"], expected + other["expected_minutes"]
        return cell.minutes * (took / expected if expected else 1.0)


def delta_j(record: dict) -> float | None:
    """Mean change of J over the rates, in percent."""
    rises = [point["delta_j_percent"] for point in record.get("points", ())]
    return statistics.mean(rises) if rises and None not in rises else None


def _read(path: Path) -> dict | None:
    if not path.is_file():
        return None
    record = read_json(path)
    if record is None or not {"command", "config", "numbers", "commit"} <= record.keys():
        raise InputError(
            f"{path}: not a readable record; remove it, and benchmarks/tables.py measures the cell again"
        )
    return record


def dump(record: dict) -> str:
    """JSON with one line for each rate point, and for every other value."""
    points = record.get("points", [])
    lines = [
        f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}"
        for key, value in record.items()
        if key != "points"
    ]
    if points:
        lines.append('  "points": [\n    ' + ",\n    ".join(json.dumps(point) for point in points) + "\n  ]")
    return "{\n" + ",\n".join(lines) + "\n}\n"


# ------------------------------------------------------------------------------------------- what a run gave


def stamp() -> dict[str, Any]:
    """When, by which code and on which machine something is measured that begins now."""
    dirty = _git("status", "--porcelain", "--", *CODE, "main_ptq.py")
    return {
        "date": datetime.date.today().isoformat(),
        "version": __version__,
        "numbers": max((change["number"] for change in stored.load("numbers")["changes"]), default=0),
        "commit": _git("rev-parse", "--short=10", "HEAD") or "unknown",
        "dirty": bool(dirty),
        "code": code_digest(),
        "machine": machine(),
    }


@functools.cache
def machine() -> dict[str, Any]:
    """The processor, its 8-bit instructions and PyTorch."""
    import torch

    about = Path("/proc/cpuinfo")
    text = about.read_text(encoding="utf-8", errors="replace") if about.is_file() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    vnni = sorted(set(re.findall(r"\bavx\w*_vnni\b", text)))
    return {
        "cpu": name[1] if name else platform.processor() or platform.machine(),
        "instructions": " ".join([torch.backends.cpu.get_cpu_capability(), *vnni]),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }


def code_digest() -> str:
    """Eight digits for the code that a run's numbers come from. A run is only continued with the same."""
    digest = hashlib.sha256()
    for room in CODE:
        for path in sorted((ROOT / room).rglob("*")):
            if path.suffix in (".py", ".yaml", ".c", ".h") and "zoo" not in path.parts:
                digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def make_record(cell: Cell, folder: Path, measured: dict[str, Any], minutes: float) -> dict[str, Any]:
    """The record of a finished run of main_ptq.py.

    Args:
        folder: the run's.
        measured: `stamp()` of its beginning.
        minutes: that it took.

    Raises:
        InputError: the folder holds no report.
    """
    record = {
        "codec": cell.codec,
        "method": cell.method,
        "command": " ".join(cell.words),
        "config": cell.config,
        **measured,
        "minutes": round(minutes, 2),
        "expected_minutes": round(cell.minutes, 2),
    }
    if "--analyze" in cell.words:
        return record | _analyzed(folder)
    report = read_json(folder / "report.json")
    if report is None:
        raise InputError(f"{folder} holds no report.json")
    calibration = report["config"]["calibration"]
    seconds = sum(point["calibration_seconds"] for point in report["points"])
    record["minutes"] = round(
        max(minutes, seconds / 60), 2
    )  # of a run that went on, minutes are the last part
    return record | {
        "images": report["images"],
        "calibration": {name: calibration[name] for name in ("dataset", "images", "crop", "crops_per_image")}
        | {"sha256": calibration["sha256"][:16]},
        "bpp_source": report["bpp_source"],
        "no_files": report["points"][0].get("no_files"),
        **{key: _rounded(report.get(key), 4) for key in RATES},
        "bd_rate_notes": report["bd_rate_notes"],
        "kept_in_float": report["kept_in_float"],
        "points": [_point(point) for point in report["points"]],
    }


def _point(point: dict) -> dict[str, Any]:
    means = {
        codec: {key: _rounded(point[codec][key], digits) for key, digits in _DIGITS.items()}
        for codec in ("fp32", "quant")
    }
    del means["fp32"]["bpp"]  # a float codec has estimates alone
    result = {
        "quality": point["quality"],
        "lambda": point["lambda"],
        **means,
        "delta_j_percent": _rounded(point["delta_j_percent"], 4),
        "calibration_seconds": round(point["calibration_seconds"], 1),
        "peak_memory_mb": _rounded(point["peak_memory_mb"], 0),
        "model_bytes": point["model_bytes"],
        "fp32_model_bytes": point["fp32_model_bytes"],
        "checkpoint": point["checkpoint"]["sha256"][:16],
    }
    history = point.get("history") or {}
    if history.get("joint"):
        rises = predicted_rises(point)
        result["learned"] = {
            "start": round(100 * (history["j_start"] / history["j_float"] - 1), 3),
            "end": round(100 * (history["j_end"] / history["j_float"] - 1), 3),
            "inputs": round(sum(one[0] for one in rises.values()), 3),
            "weights": round(sum(one[1] for one in rises.values()), 3),
            "layers": {name: round(sum(both), 3) for name, both in list(rises.items())[:_LAYERS]},
        }
    return result


def _analyzed(folder: Path) -> dict[str, Any]:
    """Fig. 2 of the paper: the rise of J and the errors over the range of one layer's weights."""
    files = sorted(folder.glob("q*/analysis.json"))
    analysis = read_json(files[0]) if files else None
    if analysis is None:
        raise InputError(f"{folder} holds no analysis.json")
    whole, landscape = analysis["float"]["j"], analysis["landscape"]
    return {
        "layer": landscape["layer"],
        "everything": round(100 * analysis["all"]["j"] / whole, 4),
        "landscape": [
            {
                "n": round(point["n"], 4),
                "rise": round(100 * point["j"] / whole, 4),
                **{key: float(f"{point[key]:.4g}") for key in ("error", "output_error") if key in point},
            }
            for point in landscape["weights"]
        ],
    }


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
