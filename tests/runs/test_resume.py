"""Runs of main_ptq.py that are stopped, resumed and repeated."""

import json

import pytest
import torch

from licq.models.checkpoint_files import read_tensors
from licq.reconstruction.state import StateFolder
from tests.main_jobs import contents, refused, report_of, run, without_times

LEARNING = {
    "quality": "1,3",
    "unit": "stage",
    "iters": 2,
    "set": ["joint_iters=2", "balance=0", "stress=false"],
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return tmp_path_factory.mktemp("reference") / "out"


@pytest.fixture
def finished(job, reference):
    """The report of a run that was never stopped; its folder is `reference`."""
    if not reference.exists():
        assert run(job, out=reference, **LEARNING) == 0
    return without_times(json.loads((reference / "report.json").read_text()))


def _stop_after(monkeypatch, owner, name: str, count: int):
    """Interrupt the `count`-th call of a function, counted from 1, after it has run."""
    original, calls = getattr(owner, name), []

    def stopping(*args, **kwargs):
        calls.append(1)
        value = original(*args, **kwargs)
        if len(calls) == count:
            raise KeyboardInterrupt
        return value

    monkeypatch.setattr(owner, name, stopping)


@pytest.mark.parametrize(
    "stops",
    [
        [("save", 2), ("evaluate", 2)],
        pytest.param(
            [("evaluate", 1), ("evaluate", 3), ("save", 1), ("save", 2), ("evaluate", 1)],
            marks=pytest.mark.slow,
        ),
    ],
    ids=len,
)
def test_run_stopped_anywhere_and_resumed_gives_the_same_report(
    job, finished, reference, monkeypatch, capsys, tmp_path, stops
):
    import licq.evaluation.evaluate

    owners = {"evaluate": licq.evaluation.evaluate, "save": StateFolder}
    for name, count in stops:  # every attempt goes on where the one before was stopped
        with monkeypatch.context() as patch:
            _stop_after(patch, owners[name], name, count)
            assert run(job, resume=True, **LEARNING) == 130
        assert "--resume" in capsys.readouterr().err and not (tmp_path / "out" / "report.json").exists()
    assert run(job, resume=True, **LEARNING) == 0
    assert without_times(report_of(job)) == finished
    assert not list((tmp_path / "out").rglob("units")) and not list((tmp_path / "out").rglob("partial.json"))
    for quality in (1, 3):
        ours, theirs = (
            read_tensors(folder / f"q{quality}" / "model.safetensors")[0]
            for folder in (tmp_path / "out", reference)
        )
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    before = contents(tmp_path / "out")
    assert run(job, resume=True, **LEARNING) == 0  # all finished: nothing is computed again
    assert contents(tmp_path / "out") == before


def test_same_seed_gives_the_same_report_and_another_does_not(job, finished):
    first, points = LEARNING | {"quality": 1}, []
    for seed in (0, 1):
        assert run(job, seed=seed, **first) == 0
        points += without_times(report_of(job))["points"]
    same, other = points
    assert same == next(point for point in finished["points"] if point["quality"] == 1)
    assert other["fp32"] == same["fp32"] and other["quant"] != same["quant"]


def test_resuming_with_other_settings_is_refused(job, capsys, tmp_path, make_image):
    assert run(job) == 0
    before = contents(tmp_path / "out")
    capsys.readouterr()
    for changes, expected in (
        ({"w_bits": 6}, "w_bits 8, now 6"),
        ({"seed": 4}, "seed 0, now 4"),
        ({"set": ["batch=1", *job["--set"]]}, "batch"),
        ({"num_calib": 3}, "num_calib 2, now 3"),
        ({"crops_per_image": 2}, "crops_per_image 1, now 2"),
    ):
        refused(capsys, job, expected, "--resume", "--out", untouched=False, resume=True, **changes)
    make_image("3.png", 64, 64, 3, tmp_path / "eval")
    refused(capsys, job, "evaluation.images 2, now 3", untouched=False, resume=True)
    assert contents(tmp_path / "out") == before


def test_new_run_in_a_used_folder_replaces_results_only_when_it_has_its_own(job, tmp_path, monkeypatch):
    import licq.evaluation.evaluate

    assert run(job, quality="1,3") == 0
    old = contents(tmp_path / "out")
    with monkeypatch.context() as patch:
        _stop_after(patch, licq.evaluation.evaluate, "evaluate", 5)  # the second quality's plain baseline
        assert run(job, quality="1,3", w_bits=6) == 130
    now = contents(tmp_path / "out")
    assert all(
        now[name] == old[name] for name in ("report.json", "rd.png", "q3/model.safetensors", "q3/result.json")
    )
    assert now["q1/result.json"] != old["q1/result.json"]
    assert run(job, quality="1,3", w_bits=6, resume=True) == 0
    assert report_of(job)["w_bits"] == 6
    assert all(
        json.loads((tmp_path / "out" / f"q{q}" / "result.json").read_text())["settings"]["config"]["quant"][
            "w_bits"
        ]
        == 6
        for q in (1, 3)
    )


def test_curves_of_other_codecs_are_measured_once(job, tmp_path, monkeypatch):
    from licq.evaluation import anchors
    from licq.runs import results

    curves, kept = [], tmp_path / "out" / "measured"
    monkeypatch.setattr(
        anchors,
        "classical_points",
        lambda *args, whole=anchors.classical_points: curves.append(1) or whole(*args),
    )
    with monkeypatch.context() as patch:
        patch.setattr(results, "write_report", _interrupt)
        assert run(job) == 130
    assert len(curves) == 1 and len(list(kept.iterdir())) == 2  # the float codec's evaluation, and the curves
    assert run(job, resume=True) == 0
    assert len(curves) == 1 and not kept.exists()


def _interrupt(*_) -> None:
    raise KeyboardInterrupt


def test_qualities_of_several_commands_come_together(job):
    assert run(job, quality=1) == 0 and run(job, quality=3, resume=True) == 0
    assert [point["quality"] for point in report_of(job)["points"]] == [3]
    assert run(job, quality="3,1", resume=True) == 0
    assert {point["quality"] for point in report_of(job)["points"]} == {1, 3}


def test_deleted_model_is_made_again(job, tmp_path):
    assert run(job) == 0
    model = tmp_path / "out" / "q1" / "model.safetensors"
    before = read_tensors(model)[0]
    model.unlink()
    assert run(job, resume=True) == 0
    after = read_tensors(model)[0]
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_deleted_crops_are_made_again(job, tmp_path):
    assert run(job) == 0
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "q1" / "crops.png").unlink()
    result = json.loads(before["q1/result.json"])
    del result["parts"]["crops"]  # as of a run by a version that made none
    (tmp_path / "out" / "q1" / "result.json").write_text(json.dumps(result))
    assert run(job, resume=True) == 0
    assert contents(tmp_path / "out") == before and b"What it looks like" in before["report.html"]
