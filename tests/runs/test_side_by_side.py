"""--workers: the qualities of one command in several processes, with the numbers of one after the other."""

import json
import os
import time
from pathlib import Path

import pytest
import torch

from licq.models.checkpoint_files import read_tensors
from licq.support.work import Work
from licq.workers.task import Task, has_begun
from tests.main_jobs import one_line, refused, report_of, run, without_times

ROOT = Path(__file__).parents[2]
TWO = {"quality": "1,3", "threads": 1, "no-anchors": True}


@pytest.fixture(autouse=True)
def _threads(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def tensors(folder: Path, quality: int) -> dict:
    return read_tensors(folder / f"q{quality}" / "model.safetensors")[0]


def test_a_quality_that_fails_leaves_the_others_and_a_resumption_gives_the_numbers_of_one_process(
    job, tmp_path, capsys
):
    out = tmp_path / "out"
    (out / "q3" / "model.safetensors").mkdir(parents=True)  # where a file is to be written
    assert run(job, workers=2, **TWO) == 2
    one_line(capsys, "quality 3: ", "model.safetensors", "--resume")
    assert (out / "q1" / "result.json").is_file() and not (out / "report.json").exists()
    assert "error: " in (out / "q3" / "log.txt").read_text()
    assert json.loads((out / "run.json").read_text())["threads"] == 1
    torch.set_num_threads(2)
    (out / "q3" / "model.safetensors").rmdir()
    assert run(job, workers=2, resume=True, **TWO | {"threads": None}) == 0
    assert torch.get_num_threads() == 1  # as before
    assert run(job, out=tmp_path / "serial", **TWO) == 0
    assert without_times(report_of(job)) == without_times(report_of({"--out": tmp_path / "serial"}))
    for quality in (1, 3):
        ours, theirs = (tensors(folder, quality) for folder in (out, tmp_path / "serial"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_part_does_one_quality_of_a_run_that_has_been_begun(job, tmp_path, capsys, monkeypatch):
    out, states = tmp_path / "out", []
    refused(capsys, job, "--part", "--workers", part=3, **TWO)
    refused(capsys, job, "--part 2", "--quality", part=2, **TWO)
    assert run(job, **TWO) == 0
    (out / "q3" / "result.json").unlink()
    before = (out / "run.json").read_bytes(), (out / "q1" / "result.json").read_bytes()
    monkeypatch.setattr("licq.support.work._LOG_INTERVAL", 0.0)
    original = Work.end
    monkeypatch.setattr(Work, "end", lambda work, part: (original(work, part), states.append(work.state())))
    capsys.readouterr()
    assert run(job, out=out / "q3", part=3, resume=True, quiet=None, **TWO) == 0
    assert (out / "q3" / "result.json").is_file() and not list(out.rglob("report.json")) == []
    assert before == ((out / "run.json").read_bytes(), (out / "q1" / "result.json").read_bytes())
    # every planned loop has come
    assert len(states) > 5 and all(share == 1 for _, _, _, share, _, _ in states[-1]["items"])
    assert all(seconds > 0 for _, _, _, _, seconds, _ in states[-1]["items"])
    lines = capsys.readouterr().err.splitlines()
    assert any("quality 3 (2 of 2): " in line and line.endswith(" left") for line in lines)


def test_a_worker_that_was_killed_goes_on(tmp_path):
    task = Task("quality 1", "main_ptq", (), str(tmp_path))
    assert not has_begun(task, 0)
    (tmp_path / "partial.json").write_text("{}")
    assert has_begun(task, time.time() - 60)
    os.utime(tmp_path / "partial.json", (1, 1))  # an older run's
    assert not has_begun(task, time.time() - 60)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"analyze": True}, ["--analyze", "--workers"]),
        ({"max_bd_rate": 2, "quality": "1,3"}, ["--max_bd_rate", "--workers"]),
        ({"ray": True}, ["--ray", "--sweep"]),
    ],
)
def test_what_cannot_run_side_by_side_is_refused(job, capsys, changes, expected):
    refused(capsys, job, *expected, workers=2, **changes)
