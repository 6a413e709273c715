"""Tables that are made of records: what they show, and what they call open, simulated and old."""

import json
from pathlib import Path

import pytest
import yaml

from benchmarks import results, shown, tables
from licq.workers.task import Outcome
from tests.benchmarks.trial import CHANGE, PLAN, command, made


@pytest.fixture
def folder(trial_folder):
    return trial_folder


def test_a_table_says_what_is_open_simulated_and_old(folder, runner, monkeypatch):
    command(folder, monkeypatch, "--only", "first/small")
    known, kept = made(folder)
    text = results.plan_section(known["first"], kept)
    assert (
        "| method | small, BD-rate | small, paper | small, delta J | large, BD-rate | large, delta J |"
        in text
    )
    lines = [line for line in text.replace("\u00a0", " ").splitlines() if line.startswith("| ")][2:]
    assert lines == [  # by the mean change of J
        "| licq | +10.00 % |  | +1.50 % | not measured | not measured |",
        "| nearest | +20.00 % |  | +2.50 % | not measured | not measured |",
        "| rdo-ptq (simulated) | +30.00 % | +5.84 % | +3.50 % | not measured | not measured |",
    ]
    assert "**Open:** 3 of 6 cells (large/nearest_w8a8, large/rdo-ptq_w8a8, large/licq_w8a8)" in text
    assert "at commit abcdef0, version 0.2.0, torch 2.4, a CPU (AVX2)" in text and "†" not in text

    later = {"number": 2, "date": "2026-01-03", "change": "second", "affects": ["rdo-ptq"]}
    (folder / "numbers.json").write_text(json.dumps({"changes": [CHANGE, later]}))
    known, kept = made(folder)
    text = results.plan_section(known["first"], kept)
    assert "| +30.00\u00a0%\u00a0† |" in text and "+20.00\u00a0%\u00a0†" not in text
    assert "Old:** 1 of 6 cells (small/rdo-ptq_w8a8). Since then: second (2026-01-03)." in text
    runner.names.clear()
    command(folder, monkeypatch, "--only", "first/small", "--open")
    assert runner.names == []
    command(folder, monkeypatch, "--only", "first/small")
    assert runner.names == ["small/rdo-ptq_w8a8"]


def test_a_preset_or_a_plan_that_has_changed_makes_a_cell_old(folder, runner, monkeypatch):
    command(folder, monkeypatch, "--only", "first/small/nearest")
    path = folder / "cells/small/nearest_w8a8.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"config": record["config"] | {"a_headroom": 1.5}}))
    known, kept = made(folder)
    (cell,) = known["first"].at(codec="small", method="nearest")
    assert kept.why_old(cell) == ["the preset nearest has other fields now (a_headroom)"]
    path.write_text(json.dumps(record | {"command": "--preset nearest"}))
    known, kept = made(folder)
    assert kept.why_old(cell) == ["the plan has another command now"]


def test_several_seeds_have_a_mean_and_a_spread(folder, runner, monkeypatch):
    command(folder, monkeypatch, "--only", "again")
    path = folder / "cells/small/nearest_w8a8_seed=1.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"bd_rate_psnr": 22.0}))
    known, kept = made(folder)
    assert shown.Shown(known["again"], kept).rows == [["nearest", "+21.00 ± 1.41 %", "+2.50 ± 0.00 %"]]
    path.unlink()
    known, kept = made(folder)
    assert shown.Shown(known["again"], kept).rows[0][1] == "+20.00 % (1 of 2 seeds)"


def test_claims_points_and_learned_layers(folder, runner, monkeypatch):
    content = yaml.safe_load(PLAN)
    claim = {"claim": "licq first", "order": ["licq", "rdo-ptq"], "at": {"bits": "W8A8"}}
    grid = content["tables"]["first"]["grid"]
    content["tables"] = {
        "claims": {
            "title": "C",
            "grid": grid,
            "show": {
                "shape": "claims",
                "columns": "codec",
                "claims": [claim, claim | {"order": ["licq"], "most": 5}],
            },
        },
        "points": {
            "title": "P",
            "grid": grid,
            "show": {"shape": "points", "rows": "codec", "columns": "method"},
        },
        "layers": {
            "title": "L",
            "grid": grid | {"method": ["licq"]},
            "show": {"shape": "layers", "rows": "codec"},
        },
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump(content))
    command(folder, monkeypatch, "--only", "claims/small")
    path = folder / "cells/small/licq_w8a8.json"
    record = json.loads(path.read_text())
    learned = {
        "start": 0.5,
        "end": -0.25,
        "inputs": 0.1,
        "weights": 0.2,
        "layers": {"g_s.0": 0.05, "g_a.2": 0.04},
    }
    record["points"][0]["learned"] = learned
    path.write_text(json.dumps(record))
    known, kept = made(folder)
    assert shown.Shown(known["claims"], kept).rows == [
        ["licq first", "holds: +10.00 %, +30.00 %", "not measured"],
        ["licq first", "**does not hold**: +10.00 %", "not measured"],
    ]
    points = shown.Shown(known["points"], kept).rows
    assert points[0][:7] == ["small", "1", "0.4999", "30.000", "0.5000", "30.000", "+1.00 %"]
    assert points[2][:4] == ["large", "", "not measured", ""] and len({len(row) for row in points}) == 1
    assert shown.Shown(known["layers"], kept).rows[0] == [
        "small", "1", "+0.50 %", "-0.25 %", "0.10 %", "0.20 %", "g_s.0 0.05 %, g_a.2 0.04 %"
    ]  # fmt: skip


def test_an_analysis_becomes_a_record_of_fig_2(folder, monkeypatch):
    content = yaml.safe_load(PLAN)
    grid = {"codec": ["small"], "method": ["licq"], "bits": ["W8A8"]}
    show = {"shape": "landscape", "rows": ["codec", "bits"]}
    content["tables"] = {"fig2": {"title": "F", "flags": {"analyze": True}, "grid": grid, "show": show}}
    (folder / "plan.yaml").write_text(yaml.safe_dump(content))
    points = [(0.5, 0.04, 1.0, 9.0), (0.7, 0.01, 2.0, 8.0), (0.8, 0.02, 3.0, 7.0), (1.0, 0.005, 4.0, 6.0)]
    weights = [dict(zip(("n", "j", "error", "output_error"), point)) for point in points]
    analysis = {"float": {"j": 2.0}, "all": {"j": 0.1}, "landscape": {"layer": "g_s.0", "weights": weights}}

    def fake(tasks, workers):
        for task in tasks:
            path = Path(task.folder) / "q5" / "analysis.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(analysis))
            yield Outcome(task, None, 1, 1.0)

    monkeypatch.setattr(tables, "in_processes", fake)
    assert command(folder, monkeypatch) == 0
    known, kept = made(folder)
    assert shown.Shown(known["fig2"], kept).rows == [
        ["small", "W8A8", "g_s.0", "0.50, +2.000 %", "1.00, +0.250 %", "1.00, +0.250 %", "2"]
    ]
