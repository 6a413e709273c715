"""What the tests of benchmarks/tables.py share: a small plan, its runs without their work, the command."""

import json
import sys
from pathlib import Path

from benchmarks import plan as plans
from benchmarks import records, tables
from licq.support.cli import main_guard
from licq.workers.task import Outcome

PLAN = """
flags: {calib: clic, eval: kodak, no-baseline: true}
axes:
  codec:
    small: {arch: minnen2018, minutes: {files: 1, simulated: 2, licq: 30}, depends: [autoregressive]}
    large: {arch: lu2022, minutes: {files: 5, simulated: 6, licq: 60}}
  method: {licq: {preset: licq, learning: 1}, nearest: {preset: nearest}, rdo-ptq: {preset: rdo-ptq}}
  bits: {W8A8: {w_bits: 8, a_bits: 8}, W6A6: {w_bits: 6, a_bits: 6}}
tables:
  first:
    title: First
    grid: {method: [licq, nearest, rdo-ptq], codec: [small, large], bits: [W8A8]}
    show: {rows: method, columns: codec, values: [bd_rate, paper, delta_j], sort: true}
    paper: {rdo-ptq: {small: 5.84}}
  again:
    title: Again
    grid: {method: [nearest], codec: [small], bits: [W8A8]}
    seeds: [0, 1]
    show: {rows: method, columns: codec}
  low:
    title: Low
    grid: {method: {best: 1, of: first}, codec: [small], bits: [W6A6]}
    show: {rows: method, columns: [codec, bits]}
"""
CHANGE = {"number": 1, "date": "2026-01-01", "change": "first", "affects": ["calibration"]}
RISE = {"licq": 1.0, "nearest": 2.0, "rdo-ptq": 3.0}


def report(preset: str) -> dict:
    means = {"bpp": 0.5, "bpp_estimated": 0.4999, "psnr": 30.0, "ms_ssim": 0.95}
    point = {"quality": 1, "lambda": 0.01, "fp32": means, "quant": means, "delta_j_percent": RISE[preset]}
    point |= {"calibration_seconds": 7.0, "peak_memory_mb": 100.0, "model_bytes": 25, "fp32_model_bytes": 100}
    point |= {"checkpoint": {"sha256": "ab" * 32}}
    calibration = {"dataset": "clic", "images": 10, "crop": 256, "crops_per_image": 8, "sha256": "cd" * 32}
    return {
        "images": 24,
        "points": [point, point | {"quality": 3, "delta_j_percent": RISE[preset] + 1}],
        "config": {"calibration": calibration},
        "bpp_source": "bitstream",
        "bd_rate_psnr": 10 * RISE[preset],
        "bd_rate_psnr_cubic": None,
        "bd_rate_ms_ssim": None,
        "bd_rate_notes": {},
        "kept_in_float": [],
    }


class Runner:
    """Stands for worker processes: writes a report for every task. `ends` may make a task end otherwise."""

    def __init__(self):
        self.names, self.commands, self.ends = [], [], {}

    def __call__(self, tasks, workers):
        for task in tasks:
            self.names.append(task.name)
            self.commands.append(task.command(resume=task.resume))
            end = self.ends.pop(task.name, None)
            if isinstance(end, BaseException):
                raise end
            if end is None:
                preset = task.words[task.words.index("--preset") + 1]
                Path(task.folder).mkdir(parents=True, exist_ok=True)
                (Path(task.folder) / "report.json").write_text(json.dumps(report(preset)))
            yield Outcome(task, end, 1, 1.0)


STAMP = {
    "date": "2026-01-02",
    "version": "0.2.0",
    "numbers": 1,
    "commit": "abcdef0123",
    "dirty": False,
    "code": "00000000",
    "machine": {"cpu": "a CPU", "instructions": "AVX2", "cores": 2, "torch": "2.4"},
}


def command(folder: Path, monkeypatch, *words: str) -> int:
    where = ["--plan", folder / "plan.yaml", "--out", folder / "runs", "--cells", folder / "cells", "--quiet"]
    monkeypatch.setattr(sys, "argv", ["tables.py", *map(str, where), *words])
    return main_guard(tables.main)


def made(folder: Path) -> tuple[dict[str, plans.Table], records.Records]:
    kept = records.Records(folder / "cells")
    plan = plans.Plan(folder / "plan.yaml", tables.main_ptq.build_parser())
    return {table.name: table for table in plan.tables(kept.ranked)}, kept
