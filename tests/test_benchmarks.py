"""The benchmarks run and print what they promise."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.cli import main_guard

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_loss_table_keeps_finished_runs(tmp_path):
    out = tmp_path / "table.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "loss_table.py"), "--quality", "1", "--bits", "4,8", "--losses", "rd", "mse",
               "--seeds", "0", "--calib", "photos-calib", "--num_calib", "2", "--crop", "64", "--crops_per_image", "1",
               "--eval", "photos", "--set", "joint_iters=1", "--set", "round_init=nearest", "--out", str(out)]  # fmt: skip
    first = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    stored = json.loads(out.read_text())
    assert len(stored) == 3 and "| W4A8 | rd " in " ".join(first.stdout.split())
    again = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert again.stdout == first.stdout and json.loads(out.read_text()) == stored


@pytest.mark.slow
def test_calibration_grows_with_width(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "calibration.py"), "--arch", "balle2018", "--width", "0.25", "0.5",
               "--crop", "64", "--crops", "2", "--set", "joint_iters=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    rows = [line for line in done.stdout.splitlines() if line.startswith("| N=")]
    assert len(rows) == 2 and all("min" in row and "MB" in row for row in rows)


@pytest.mark.parametrize("arguments, word", [(["--bits", "8"], "w_bits,a_bits"), (["--set", "nonsense=1"], "nonsense"),
                                             (["--set", "loss=mse"], "its own option"), (["--losses", "best"], "best")])
def test_bad_arguments_of_the_loss_table_are_one_line(arguments, word, monkeypatch, capsys):
    found = importlib.util.spec_from_file_location("loss_table", ROOT / "benchmarks" / "loss_table.py")
    loss_table = importlib.util.module_from_spec(found)
    found.loader.exec_module(loss_table)
    monkeypatch.setattr(sys, "argv", ["loss_table.py", *arguments])
    assert main_guard(loss_table.main) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and word in printed.err
