"""The loss comparison runs, keeps what is finished, and prints a table."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_loss_table_keeps_finished_runs(tmp_path):
    out = tmp_path / "table.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "loss_table.py"), "--quality", "1", "--bits", "4,8", "--losses", "rd", "mse",
               "--seeds", "0", "--calib", "photos-calib", "--num_calib", "2", "--crop", "64", "--eval", "photos",
               "--set", "joint_iters=1", "--set", "round_init=nearest", "--out", str(out)]  # fmt: skip
    first = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    stored = json.loads(out.read_text())
    assert len(stored) == 3 and "| W4A8 | rd " in " ".join(first.stdout.split())
    again = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert again.stdout == first.stdout and json.loads(out.read_text()) == stored
