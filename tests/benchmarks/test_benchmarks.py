"""The benchmarks run and print what they promise."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from licq.support.cli import main_guard

ROOT = Path(__file__).resolve().parents[2]


SCRIPTS = sorted(path.name for path in (ROOT / "benchmarks").glob("*.py") if path.name != "engines.py")


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_benchmark_runs_from_a_checkout(name, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    command = [sys.executable, str(ROOT / "benchmarks" / name), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.startswith("usage:")


@pytest.mark.slow
def test_loss_table_keeps_finished_runs(tmp_path):
    out = tmp_path / "table.json"
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "loss_table.py"),
        "--quality",
        "1",
        "--bits",
        "4,8",
        "--losses",
        "rd",
        "mse",
        "--seeds",
        "0",
        "--calib",
        "photos-calib",
        "--num_calib",
        "2",
        "--crop",
        "64",
        "--crops_per_image",
        "1",
        "--eval",
        "photos",
        "--set",
        "joint_iters=1",
        "--set",
        "round_init=nearest",
        "--out",
        str(out),
    ]
    first = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    stored = json.loads(out.read_text())
    assert len(stored) == 3 and "| W4A8 | rd " in " ".join(first.stdout.split())
    again = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert again.stdout == first.stdout and json.loads(out.read_text()) == stored


@pytest.mark.slow
def test_calibration_grows_with_width(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "calibration.py"),
        "--arch",
        "balle2018",
        "--width",
        "0.25",
        "0.5",
        "--crop",
        "64",
        "--crops",
        "2",
        "--set",
        "joint_iters=1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    rows = [line for line in done.stdout.splitlines() if line.startswith("| N=")]
    assert len(rows) == 2 and all("min" in row and "MB" in row for row in rows)


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["--bits", "8"], "w_bits,a_bits"),
        (["--set", "nonsense=1"], "nonsense"),
        (["--set", "loss=mse"], "its own option"),
        (["--losses", "best"], "best"),
    ],
)
def test_bad_arguments_of_the_loss_table_are_one_line(arguments, word, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("loss_table", ROOT / "benchmarks" / "loss_table.py")
    loss_table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loss_table)
    monkeypatch.setattr(sys, "argv", ["loss_table.py", *arguments])
    assert main_guard(loss_table.main) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and word in printed.err


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_zoo_table_names_every_rate_of_an_embedded_codec():
    points = [
        {"quality": quality, "lambda": 0.01, "fp32": {"bpp": 0.1234567, "psnr": 27.0}} for quality in (1, 2)
    ]
    anchors = {"JPEG": {"fp32": -20.0}, "published qvrf-minnen2018": {"fp32": 90.06}}
    printed = load("zoo_table").tables(
        {"qvrf-minnen2018": {"points": points, "anchor_bd_rate_psnr": anchors}}
    )
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert any(
        "N 48, M 64 | 1 | 0.01 | minnen2018-q5.safetensors | 3500 x 4 |" in line
        and line.endswith("| 0.1235 | 27.000 |")
        for line in lines
    )
    assert any("| 2 | 0.01 | the same file | the same file |" in line for line in lines)
    assert lines[-1] == "| qvrf-minnen2018 | -20.0 % | - | +90.1 % |"


def test_peers_without_their_packages_are_one_line(monkeypatch, capsys):
    peers = load("peers")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name in ("nncf", "openvino") else find("json"),
    )
    monkeypatch.setattr(sys, "argv", ["peers.py", "--size", "64x64"])
    assert main_guard(peers.main) == 2
    printed = capsys.readouterr()
    assert (
        printed.err.startswith("error: not installed: openvino, nncf; pip install .[bench]")
        and printed.err.count("\n") == 1
    )
    monkeypatch.setattr(sys, "argv", ["peers.py", "--size", "100x64"])
    assert main_guard(peers.main) == 2 and "multiples of 64" in capsys.readouterr().err


def test_an_engine_that_fails_is_left_out_and_named(monkeypatch, capsys):
    peers = load("peers")

    def refuse(path, calibration, threads):
        raise ValueError("no such\nlayer")

    monkeypatch.setattr(peers, "_export", lambda module, x, path: path)
    engines = [
        peers.Peer("good", (), lambda path, calibration, threads: lambda x: x + len(calibration)),
        peers.Peer("bad", (), refuse),
    ]
    runs = peers.peer_runs(None, [np.zeros(1), np.ones(1)], engines, 1, "codec, g_a")
    assert list(runs) == ["good"] and runs["good"](np.ones(1)) == 2
    assert capsys.readouterr().err == "codec, g_a, bad: ValueError: no such layer\n"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["minnen2018", "lu2022"])
def test_peers_table_of_pytorch_and_licq(arch, monkeypatch, capsys):
    threads = torch.get_num_threads()
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "peers.py",
            "--arch",
            arch,
            "--configuration",
            "reference",
            "--size",
            "64x64",
            "--repeats",
            "1",
            "--peers",
        ],
    )
    try:
        assert main_guard(load("peers").main) == 0
    finally:
        torch.set_num_threads(threads)
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("| ")
    ]
    assert lines[0] == ["part", "PyTorch", "licq"] and [line[0] for line in lines[1:]] == [
        "g_a",
        "h_a + h_s",
        "g_s",
    ]
    assert all(
        cell.endswith(" ms") and float(cell.removesuffix(" ms")) > 0
        for line in lines[1:]
        for cell in line[1:]
    )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_memory_of_an_encode_grows_with_the_image():
    def more(size):
        command = [
            sys.executable,
            str(ROOT / "benchmarks" / "peers.py"),
            "--arch",
            "minnen2018",
            "--configuration",
            "reference",
            "--memory",
            "--size",
            size,
        ]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return {
            cells[1].strip(): float(cells[3].split()[0])
            for line in printed.splitlines()
            if " MB" in line
            for cells in [line.split("|")]
        }

    small, large = more("128x128"), more("768x768")
    assert small.keys() == {"PyTorch", "licq"} and all(large[name] > small[name] + 5 for name in small)
