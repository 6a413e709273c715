"""The summary says what the reports say: means and spreads, failures, curves."""

import csv
import json
from statistics import stdev

import pytest
from PIL import Image

import licq.sweeps.summary as summary_of_sweeps
import main_ptq
from licq.sweeps.grid import load_sweep
from licq.sweeps.summary import Result, write_summary

SWEEP = """
title: Trial
grid:
  method: [{name: A, preset: licq}, {name: B, preset: nearest}]
  w_bits: [8, 4]
seeds: [0, 1, 2]
table: {rows: method, columns: w_bits, value: [bd_rate_psnr, calibration_seconds]}
plot:
  - {x: w_bits, y: bd_rate_psnr, lines: method}
  - {x: bpp, y: psnr, lines: method}
"""


def report(bd_rate: float) -> dict:
    """A report.json as far as the summary reads it."""

    def means(shift):
        return {"bpp": 0.5 + shift, "bpp_estimated": 0.5 + shift, "psnr": 30 - shift, "ms_ssim": 0.9}

    points = [
        {
            "quality": quality,
            "lambda": 0.01,
            "fp32": means(quality),
            "quant": means(quality + bd_rate / 100),
            "delta_j_percent": bd_rate,
            "calibration_seconds": 2.0,
            "peak_memory_mb": 10.0 * quality,
            "model_bytes": 100,
            "checkpoint": {"sha256": f"{quality}"},
        }
        for quality in (1, 2)
    ]
    return {"points": points, "bd_rate_psnr": bd_rate, "bd_rate_psnr_cubic": None, "bd_rate_ms_ssim": None}


@pytest.fixture
def summary(tmp_path):
    """Folder of a summary of 12 runs; of B at 4 bits one has failed, and at 8 bits all have."""
    (tmp_path / "trial.yaml").write_text(SWEEP)
    sweep = load_sweep(str(tmp_path / "trial.yaml"), main_ptq.build_parser())
    results = []
    for run in sweep.runs:
        folder = tmp_path / "runs" / run.name
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(
            json.dumps(report({"A": 1.0, "B": 3.0}[run.labels["method"]] + 0.1 * int(run.labels["seed"])))
        )
        bad = run.labels["method"] == "B" and (run.labels["w_bits"] == "8" or run.labels["seed"] == "2")
        results.append(Result.of(run, folder, "no images | of tecnick" if bad else None))
    printed = write_summary(tmp_path, sweep, results)
    return tmp_path, printed


def test_table_has_mean_and_spread_over_the_seeds(summary):
    folder, printed = summary
    text = (folder / "summary.md").read_text()
    assert printed in text and "12 runs, 8 of them finished" in text and "seeds 0, 1, 2" in text
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in printed.splitlines()
        if line.startswith("|")
    ]
    assert lines[0] == ["method", "w_bits 8", "w_bits 4"]
    assert lines[2] == ["A", *[f"+1.10 ± {stdev([1.0, 1.1, 1.2]):.2f}"] * 2]
    assert lines[3] == ["B", "failed", f"+3.05 ± {stdev([3.0, 3.1]):.2f} (2 of 3)"]
    assert "no images \\| of tecnick" in text


def test_csv_has_every_run_and_every_point(summary):
    folder, _ = summary
    with open(folder / "summary.csv") as stream:
        runs = list(csv.DictReader(stream))
    assert len(runs) == 12 and [run["status"] for run in runs].count("failed") == 4
    first = runs[0]
    assert (first["run"], first["method"], first["w_bits"], first["seed"]) == (
        "A_w_bits8_seed0",
        "A",
        "8",
        "0",
    )
    assert (
        float(first["bd_rate_psnr"]),
        float(first["calibration_seconds"]),
        float(first["peak_memory_mb"]),
    ) == (1.0, 4.0, 20.0)
    assert first["bd_rate_ms_ssim"] == "" and runs[-1]["error"] == "no images | of tecnick"
    with open(folder / "points.csv") as stream:
        points = list(csv.DictReader(stream))
    assert len(points) == 16 and float(points[1]["quant_bpp"]) == 2.51 and points[1]["baseline_bpp"] == ""


def test_plots_are_drawn(summary):
    folder, _ = summary
    sizes = [Image.open(folder / name).size for name in ("plot1.png", "plot2.png")]
    assert sizes[0] == (676, 520) and sizes[1][0] == 2 * 676  # R-D curves: a panel for each number of bits
    assert "![Trial](plot1.png)" in (folder / "summary.md").read_text()


def test_a_variable_rate_codec_is_one_model(tmp_path):
    one = report(1.0)
    for point in one["points"]:
        point["checkpoint"] = {"sha256": "same"}
    result = Result(None, tmp_path, one, None)
    assert (result.metric("calibration_seconds"), result.metric("model_bytes")) == (2.0, 100)


@pytest.mark.parametrize(
    "shift, expected", [(0.0, ["A", "B", "float"]), (0.5, ["A", "B", "float, A", "float, B"])]
)
def test_every_codec_has_its_own_float_curve(tmp_path, monkeypatch, shift, expected):
    (tmp_path / "trial.yaml").write_text(
        "grid: {codec: [{name: A, arch: tic}, {name: B, arch: lu2022}]}\n"
        "plot: {x: bpp, y: psnr, lines: codec}"
    )
    figures, canvas = [], summary_of_sweeps.FigureCanvasAgg
    monkeypatch.setattr(
        summary_of_sweeps, "FigureCanvasAgg", lambda figure: figures.append(figure) or canvas(figure)
    )
    sweep = load_sweep(str(tmp_path / "trial.yaml"), main_ptq.build_parser())
    results = [Result(run, tmp_path, report(1.0), None) for run in sweep.runs]
    for point in results[1].report["points"]:
        point["fp32"]["psnr"] += shift
    write_summary(tmp_path, sweep, results)
    (axis,) = figures[0].axes
    assert sorted(axis.get_legend_handles_labels()[1]) == expected
    curves = {line.get_label(): list(line.get_ydata()) for line in axis.lines}
    assert curves[expected[2]] == [29, 28] and curves[expected[-1]] == [29 + shift, 28 + shift]


def test_runs_that_only_analyze_are_listed(tmp_path):
    (tmp_path / "trial.yaml").write_text("grid: {w_bits: [8, 4]}")
    sweep = load_sweep(str(tmp_path / "trial.yaml"), main_ptq.build_parser())
    for run in sweep.runs:
        for quality in (3, 10):
            (tmp_path / "runs" / run.name / f"q{quality}").mkdir(parents=True)
            (tmp_path / "runs" / run.name / f"q{quality}" / "analysis.md").write_text("# found")
    assert (
        write_summary(
            tmp_path, sweep, [Result.of(run, tmp_path / "runs" / run.name, None) for run in sweep.runs]
        )
        == ""
    )
    lines = (tmp_path / "summary.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("- [w_bits4")] == [
        f"- [w_bits4, quality {quality}](runs/w_bits4/q{quality}/analysis.md)" for quality in (3, 10)
    ]
