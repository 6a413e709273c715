"""benchmarks/tables.py: what it runs, in which order, and what it stores."""

import json

import pytest
import yaml

from benchmarks import plan as plans
from benchmarks import records, stored, tables
from licq.reconstruction.preset_files import list_presets
from licq.workers.task import Outcome, run_here
from tests.benchmarks.trial import PLAN, command, made


@pytest.fixture
def folder(trial_folder):
    return trial_folder


def test_cells_run_once_cheap_ones_first_and_the_best_of_a_table_after_it(
    folder, runner, monkeypatch, capsys
):
    assert command(folder, monkeypatch) == 0
    assert runner.names == [
        "small/nearest_w8a8",
        "small/rdo-ptq_w8a8",  # simulated
        "large/nearest_w8a8",
        "large/rdo-ptq_w8a8",
        "small/licq_w8a8",
        "large/licq_w8a8",
        "small/nearest_w8a8_seed=1",
        "small/licq_w6a6",
    ]
    assert all("--resume" in words for words in runner.commands)
    assert "| low" in capsys.readouterr().out
    kept = json.loads((folder / "cells/small/nearest_w8a8.json").read_text())
    assert kept["commit"] == "abcdef0123" and kept["numbers"] == 1 and kept["machine"]["cpu"] == "a CPU"
    assert kept["config"]["joint_iters"] == 0 and "--preset nearest" in kept["command"]
    assert [point["delta_j_percent"] for point in kept["points"]] == [2.0, 3.0]
    assert (folder / "cells/small/nearest_w8a8.json").stat().st_size < 2500
    runner.names.clear()
    assert command(folder, monkeypatch) == 0 and runner.names == []


def test_an_interrupted_command_goes_on_with_the_cell_it_was_in(folder, runner, monkeypatch):
    runner.ends = {"small/rdo-ptq_w8a8": KeyboardInterrupt()}
    assert command(folder, monkeypatch, "--only", "first/small") == 130
    interrupted = runner.commands[-1]
    assert command(folder, monkeypatch, "--only", "first/small") == 0
    assert runner.names.count("small/nearest_w8a8") == 1 and runner.commands[2] == interrupted


def test_a_cell_that_fails_is_named_and_the_others_run(folder, runner, monkeypatch, capsys):
    runner.ends = {"small/nearest_w8a8": "no memory"}
    assert command(folder, monkeypatch, "--only", "first/*/nearest", "--only", "first/*/rdo-ptq") == 2
    assert len(runner.names) == 4 and not (folder / "cells/small/nearest_w8a8.json").exists()
    assert "failed: small/nearest_w8a8: no memory" in capsys.readouterr().err
    assert command(folder, monkeypatch, "--list") == 0
    listed = capsys.readouterr().out
    assert "failed: small/nearest_w8a8: no memory" in listed and "other: current\n      python x.py" in listed
    assert command(folder, monkeypatch, "--only", "first/small/nearest") == 0


def test_no_cell_is_begun_that_does_not_fit_into_the_hours(folder, runner, monkeypatch):
    assert command(folder, monkeypatch, "--hours", "0.09") == 0  # 5.4 minutes
    assert runner.names == [
        "small/nearest_w8a8",
        "small/rdo-ptq_w8a8",
        "large/nearest_w8a8",
        "small/nearest_w8a8_seed=1",
        "small/nearest_w6a6",
    ]


def test_a_report_that_is_not_there_is_a_failure(folder, runner, monkeypatch, capsys):
    monkeypatch.setattr(
        tables, "in_processes", lambda tasks, _: (Outcome(task, None, 1, 1.0) for task in tasks)
    )
    assert command(folder, monkeypatch, "--only", "first/small/nearest") == 2
    assert "holds no report.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--only", "second"), "first, again, low"),
        (("--only", "first/small/brecq"), "no cell"),
        (("--show", "x"), "again"),
    ],
)
def test_an_unknown_table_is_one_line(folder, monkeypatch, capsys, words, named):
    assert command(folder, monkeypatch, *words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and named in said


@pytest.mark.parametrize("text", ["{", "[]", '{"command": "x"}'])
def test_a_damaged_record_is_one_line(folder, monkeypatch, capsys, text):
    path = folder / "cells" / "small" / "nearest_w8a8.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert command(folder, monkeypatch, "--list") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(path) in said and "remove it" in said


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("calib: clic", "calib: photos", "unknown key"),
        ("{preset: nearest}", "{preset: nearest, bits: 8}", "bits is not a flag"),
        ("{preset: nearest}", "{preset: nearest, set: {split: 2}}", "split"),
        ("codec: [small, large]", "codec: [small, huge]", "huge"),
        ("of: first", "of: none", "none"),
        ("rows: method", "rows: methods", "methods"),
    ],
)
def test_a_mistake_in_the_plan_is_one_line(folder, monkeypatch, capsys, old, new, word):
    text = PLAN.replace(old, new) if word != "unknown key" else PLAN.replace("title: First", "name: First")
    (folder / "plan.yaml").write_text(text)
    assert command(folder, monkeypatch, "--show", "first") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and word in said


def test_a_preset_that_there_is_not_cannot_run_and_stops_nothing(folder, runner, monkeypatch, capsys):
    (folder / "plan.yaml").write_text(PLAN.replace("{preset: nearest}", "{preset: tomorrow}"))
    assert command(folder, monkeypatch, "--only", "first/small") == 0
    assert runner.names == ["small/rdo-ptq_w8a8", "small/licq_w8a8"]
    assert "cannot run (unknown preset 'tomorrow'): 1 cells" in capsys.readouterr().out


def test_a_true_run_becomes_a_record(folder, job, monkeypatch):
    flags = {flag[2:]: str(value) for flag, value in job.items() if flag not in ("--set", "--out", "--quiet")}
    flags |= {"preset": "nearest", "no-anchors": True, "no-baseline": True}
    axes = {"codec": {"tiny": {"arch": "minnen2018-mean"}}}
    one = {"title": "One", "grid": {"codec": ["tiny"]}, "show": {"rows": "codec"}}
    (folder / "plan.yaml").write_text(yaml.safe_dump({"flags": flags, "axes": axes, "tables": {"one": one}}))

    def here(tasks, workers):
        for task in tasks:
            yield Outcome(task, run_here(task, resume=True, silent=True), 1, 1.0)

    monkeypatch.setattr(tables, "in_processes", here)
    assert command(folder, monkeypatch) == 0
    known, kept = made(folder)
    (cell,) = known["one"].distinct
    record = kept.get(cell)
    assert record["bpp_source"] == "bitstream" and record["images"] == 2 and record["no_files"] is None
    assert record["points"][0]["quant"]["psnr"] > 5 and record["calibration"]["crop"] == 64
    assert kept.state(cell) == "current" and record["bd_rate_psnr"] is None  # of one rate


def test_the_plan_of_the_repository_has_every_preset_and_only_methods_that_there_are():
    plan = plans.Plan(plans.PLAN, tables.main_ptq.build_parser())
    planned = {table.name: table for table in plan.tables(lambda table, axis: table.axes[axis])}
    every = {cell for table in planned.values() for cell in table.distinct}
    known = {cell.config["preset"] for cell in planned["presets"].distinct}
    assert known - {"fmpq"} == set(list_presets()) - {"fmpq"}
    unknown = {cell.problem for cell in every if cell.problem and "is not there" not in cell.problem}
    assert unknown <= {"unknown preset 'fmpq'"}
    assert len({cell.key.lower() for cell in every}) == len(every)
    named = {name for page in stored.load("pages") for name in page["tables"]}
    assert planned.keys() <= named
    for table in planned.values():
        for labels in table.cells:
            if (
                dict(labels).get("method") == "licq"
                and dict(labels)["bits"] == "W8A8"
                and table.name.startswith("p")
            ):
                assert table.at(**(dict(labels) | {"method": "licq strict"})), table.name


def test_machine_and_commit_are_stamped():
    now = records.stamp()
    assert now["numbers"] >= 17 and now["machine"]["torch"] and now["machine"]["cpu"]
    assert len(records.code_digest()) == 8
