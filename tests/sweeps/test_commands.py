"""main_ptq.py --sweep and main_eval.py in parts, end to end on tiny codecs."""

import csv
import json
from pathlib import Path

import pytest
import torch

import licq.evaluation.evaluate
import main_eval
from licq.support.cli import main_guard
from licq.support.files import write_json
from tests.main_jobs import contents, one_line, report_of, run, without_times

SWEEP = "title: Trial\nflags: {no-baseline: true}\ngrid:\n  w_bits: [8, 4]\n"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "trial.yaml"
    path.write_text(SWEEP)
    return path


def result(folder: Path, name: str) -> dict:
    return without_times(json.loads((folder / "runs" / name / "report.json").read_text()))


@pytest.mark.parametrize("older", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_sweep_stopped_and_resumed_gives_the_runs_of_single_commands(
    job, file, tmp_path, capsys, monkeypatch, older
):
    original, calls = licq.evaluation.evaluate.evaluate, []

    def stopping(*args, **kwargs):
        calls.append(1)
        # the float and the quantized codec of the first run, then the quantized one of the second
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(licq.evaluation.evaluate, "evaluate", stopping)
    out = tmp_path / "out"
    assert run(job, sweep=file) == 130
    assert "--resume" in capsys.readouterr().err and not (out / "summary.md").exists()
    assert set(json.loads((out / "finished.json").read_text())) == {"w_bits8"}
    before = contents(out / "runs" / "w_bits8")
    settings = json.loads((out / "sweep.json").read_text())["settings"]
    assert settings["threads"] == torch.get_num_threads()
    if older:  # it left the number unnamed
        settings |= {"threads": None, "runs": {name: words[:-2] for name, words in settings["runs"].items()}}
        write_json(out / "sweep.json", {"settings": settings})
    assert run(job, sweep=file, w_bits=None, resume=True) == 0
    assert len(calls) == 4 and contents(out / "runs" / "w_bits8") == before
    printed = capsys.readouterr()
    assert printed.err == "" and "mean change of J" in printed.out and "| 4 " in printed.out
    assert run(job, w_bits=4, out=tmp_path / "single", **{"no-baseline": True}) == 0
    assert result(out, "w_bits4") == without_times(report_of({"--out": tmp_path / "single"}))
    assert (out / "summary.csv").is_file() and "[w_bits4](runs/w_bits4)" in (out / "summary.md").read_text()
    capsys.readouterr()
    before = contents(out)
    assert run(job, sweep=file, resume=True, seed=3) == 2
    one_line(capsys, "other settings", "--resume")
    assert contents(out) == before


def test_a_sweep_started_anew_and_stopped_meets_nothing_of_the_one_before(job, file, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert run(job, sweep=file, w_bits=None, seed=1, shared=tmp_path / "elsewhere") == 0
    assert list((tmp_path / "elsewhere").glob("*.json")) and not (out / "shared").exists()
    original, calls = licq.evaluation.evaluate.evaluate, []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:  # the float codec, then the quantized one of the first run
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(licq.evaluation.evaluate, "evaluate", stopping)
    assert run(job, sweep=file, w_bits=None, seed=2) == 130
    assert (out / "runs" / "w_bits4" / "report.json").is_file() and not list(
        out.glob("runs/w_bits4/**/run.json")
    )
    assert run(job, sweep=file, w_bits=None, seed=2, resume=True) == 0
    assert len(calls) == 4
    for name in ("w_bits8", "w_bits4"):
        assert (
            json.loads((out / "runs" / name / "run.json").read_text())["settings"]["calibration"]["seed"] == 2
        )


def test_a_run_that_fails_is_recorded_and_the_others_go_on(job, file, tmp_path, capsys):
    file.write_text(SWEEP + f"  eval: ['{tmp_path / 'eval'}', tecnick]\n")
    assert run(job, sweep=file, eval=None, w_bits=8) == 2
    printed = capsys.readouterr()
    assert (
        printed.err.startswith("error: 1 of 2 runs failed: tecnick (")
        and printed.err.count("\n") == 1
        and "LICQ_DATA" in printed.err
    )
    with open(tmp_path / "out" / "summary.csv") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["run"], row["status"]) for row in rows] == [
        ("eval", "done"),
        ("tecnick", "failed"),
    ] and "testimages.org" in rows[1]["error"]
    assert not (tmp_path / "out" / "runs" / "tecnick" / "run.json").exists()


@pytest.mark.parametrize(
    "content, changes, expected",
    [
        ("grid: {w_bits: [8, 1]}", {}, ["run w_bits1", "2 to 16"]),
        ("grid: {preset: [licq, magic]}", {}, ["run magic", "'magic'"]),
        ("grid: {set.speed: [1, 2]}", {}, ["speed", "known are"]),
        ("grid: {w_bit: [8]}", {}, ["w_bit is not a flag"]),
        (SWEEP, {"colour": "red"}, ["--colour"]),
        (SWEEP, {"workers": 0}, ["--workers"]),
        (SWEEP, {"workers": 2, "ray": True}, ["exclude each other"]),
        (SWEEP, {"gpu_share": 2}, ["--gpu_share"]),
    ],
)
def test_what_no_run_can_mean_is_refused_before_anything_runs(
    job, file, tmp_path, capsys, content, changes, expected
):
    file.write_text(content)
    job["--set"] = None
    assert run(job, sweep=file, **changes) == 2
    one_line(capsys, *expected)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_worker_processes_give_the_numbers_of_this_process(job, file, tmp_path):
    assert run(job, sweep=file, threads=1, out=tmp_path / "here") == 0
    assert run(job, sweep=file, threads=1, workers=2, out=tmp_path / "there") == 0
    for name in ("w_bits8", "w_bits4"):
        assert result(tmp_path / "here", name) == result(tmp_path / "there", name)


@pytest.mark.slow
def test_a_sweep_begun_in_this_process_goes_on_in_workers(job, file, tmp_path):
    assert run(job, sweep=file, w_bits=None, only="w_bits=4") == 0
    assert run(job, sweep=file, w_bits=None, resume=True, workers=2) == 0
    assert {"w_bits8", "w_bits4"} == set(json.loads((tmp_path / "out" / "finished.json").read_text()))


def evaluate(*words) -> int:
    return main_guard(
        lambda: main_eval.main(["--quiet", "--device", "cpu", "--threads", "1", *map(str, words)])
    )


def seven_images_to_evaluate(job, tmp_path, make_image) -> list:
    """The words of an evaluation, but for the name of its results' folder."""
    for seed in range(3, 8):
        make_image(f"{seed}.png", 96, 64, seed, tmp_path / "eval")
    assert run(job, **{"no-baseline": True}) == 0
    return ["--model", tmp_path / "out", "--data", tmp_path / "eval", "--out"]


@pytest.mark.slow
def test_an_evaluation_in_worker_processes_writes_the_report_of_one(job, tmp_path, make_image):
    words = seven_images_to_evaluate(job, tmp_path, make_image)
    assert evaluate(*words, tmp_path / "whole") == 0
    assert evaluate(*words, tmp_path / "workers", "--workers", 2) == 0
    assert contents(tmp_path / "whole") == contents(tmp_path / "workers")


def test_an_evaluation_in_parts_writes_the_report_of_one(job, tmp_path, make_image, capsys, monkeypatch):
    words = seven_images_to_evaluate(job, tmp_path, make_image)
    assert evaluate(*words, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:  # stopped in the second of three parts, then resumed
        patch.setattr("licq.runs.shards._MAX_IMAGES", 3)
        original, calls = licq.evaluation.evaluate.evaluate, []

        def stopping(*args, **kwargs):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        patch.setattr(licq.evaluation.evaluate, "evaluate", stopping)
        assert evaluate(*words, tmp_path / "parts") == 130
        assert "--resume" in capsys.readouterr().err and not (tmp_path / "parts" / "report.json").exists()
        assert evaluate(*words, tmp_path / "parts", "--resume", "--no-float") == 2
        one_line(capsys, "other settings")
        assert evaluate(*words, tmp_path / "parts", "--resume") == 0
        assert len(calls) == 8
    whole = contents(tmp_path / "whole")
    assert {
        "report.json",
        "report.md",
        "report.html",
        "rd.png",
        "q1/crops.png",
        "compressai/quantized.json",
    } <= set(whole)
    assert whole == contents(tmp_path / "parts")


def test_an_evaluation_in_parts_fails_in_one_line(job, tmp_path, make_image, capsys):
    assert run(job, **{"no-baseline": True}) == 0
    capsys.readouterr()
    for words, expected in (
        (["--workers", 2, "--ray"], "exclude each other"),
        (["--shard", "3"], "FIRST:END"),
        (["--shard", "4:2"], "FIRST:END"),
        (["--shard", "7:9"], "no images"),
    ):
        assert (
            evaluate(
                "--model", tmp_path / "out", "--data", tmp_path / "eval", "--out", tmp_path / "e", *words
            )
            == 2
        )
        one_line(capsys, expected)
    assert not list(tmp_path.glob("e/*"))


@pytest.mark.slow
def test_fig6_compares_what_it_says(job, tmp_path):
    assert run(job, **{"arch": "minnen2018-mean", "iters": None, "set": None}, sweep="fig6") == 0
    here, there = (result(tmp_path / "out", f"bias_bits{bits}")["points"][0] for bits in (32, 8))
    assert here["fp32"] == there["fp32"] and here["quant"] != there["quant"]


def test_a_part_of_a_sweep_is_run_and_the_rest_added_later(job, file, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(job, sweep=file, w_bits=None, only="w_bits=4") == 0
    assert set(json.loads((out / "finished.json").read_text())) == {"w_bits4"}
    summary = (out / "summary.md").read_text()
    assert "1 others of the sweep have not been run" in summary and "w_bits8" not in summary
    with open(out / "summary.csv", newline="") as lines:
        assert [line["run"] for line in csv.DictReader(lines)] == ["w_bits4"]
    before = contents(out / "runs" / "w_bits4")
    assert run(job, sweep=file, w_bits=None, resume=True) == 0
    assert contents(out / "runs" / "w_bits4") == before
    assert (
        "have not been run" not in (out / "summary.md").read_text()
        and "w_bits8" in (out / "summary.md").read_text()
    )
    capsys.readouterr()
    for wrong in ("w_bits=5", "a_bits=8"):
        assert run(job, sweep=file, w_bits=None, only=wrong, out=tmp_path / "other") == 2
        one_line(capsys, "only", "is not one of")
    assert run(job, only="w_bits=4", out=tmp_path / "other") == 2
    one_line(capsys, "for --sweep")
