"""Tasks in this process and in worker processes end alike, whatever happens to one of them."""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

import licq
from licq.support.errors import InputError
from licq.workers.engine import Engine
from licq.workers.task import Task

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _entry(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def tasks(folder: Path, *kinds: str, **changes) -> list[Task]:
    return [
        Task(f"{kind}{number}", "tests.sweep_entry", (kind,), str(folder / f"{kind}{number}"), **changes)
        for number, kind in enumerate(kinds)
    ]


def outcomes(engine: Engine, given: list[Task]) -> dict:
    return {outcome.task.name: outcome for outcome in engine.run(given, "test", "run", quiet=True)}


@pytest.mark.parametrize("workers", [None, 2])
def test_a_bad_task_does_not_stop_the_others(tmp_path, workers):
    ended = outcomes(Engine(workers), tasks(tmp_path, "good", "refused", "defect", "good"))
    assert {name: outcome.error for name, outcome in ended.items() if outcome.error is None} == {
        "good0": None,
        "good3": None,
    }
    assert ended["refused1"].error == "this run is bad; mend it" and ended["refused1"].attempts == 1
    assert ended["defect2"].error.startswith("KeyError: 'oops' (a defect")
    assert "Traceback" in (tmp_path / "defect2" / "log.txt").read_text()
    assert json.loads((tmp_path / "good0" / "report.json").read_text()) == {
        "units": [{"unit": 0}, {"unit": 1}, {"unit": 2}]
    }
    assert "unit 2 of 3" in (tmp_path / "good0" / "log.txt").read_text()


def test_a_killed_worker_costs_its_last_unit(tmp_path):
    ended = outcomes(Engine(2), tasks(tmp_path, "killed", "good"))
    assert (ended["killed0"].error, ended["killed0"].attempts, ended["good1"].attempts) == (None, 2, 1)
    assert (tmp_path / "killed0" / "computed.txt").read_text() == "[2]"
    assert (tmp_path / "killed0" / "report.json").read_bytes() == (
        tmp_path / "good1" / "report.json"
    ).read_bytes()


def test_what_an_older_run_left_is_not_taken_up_after_a_kill(tmp_path):
    (task,) = tasks(tmp_path, "killed")
    folder = Path(task.folder)
    (folder / "units").mkdir(parents=True)
    (folder / "units" / "1.json").write_text('{"unit": "old"}')
    (folder / "run.json").write_text("{}")
    os.utime(folder / "run.json", (1, 1))
    assert outcomes(Engine(1), [task])["killed0"].error is None
    assert "old" not in (folder / "report.json").read_text()


def test_a_task_whose_worker_always_dies_is_one_line(tmp_path):
    ended = outcomes(Engine(2), tasks(tmp_path, "mortal", "good"))
    assert (
        "died 3 times" in ended["mortal0"].error
        and ended["mortal0"].attempts == 3
        and ended["good1"].error is None
    )


@pytest.mark.parametrize("ended", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_command(tmp_path, ended):
    a_worker_ends_with_its_command("Engine(1)", tmp_path, ended)


def a_worker_ends_with_its_command(engine: str, tmp_path: Path, ended: signal.Signals) -> None:
    code = (
        "from licq.workers.engine import Engine; from licq.workers.task import Task\n"
        f"task = Task('slow', 'tests.sweep_entry', ('slow',), {str(tmp_path / 'slow')!r})\n"
        f"for _ in {engine}.run([task], 'test', 'run'): pass"
    )
    # in the background of a shell, where these tests may run, interrupts are ignored, and children inherit
    # that
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    log = tmp_path / "slow" / "log.txt"
    until(lambda: log.is_file() and log.read_text(), 60)
    worker = int(log.read_text().split()[1])
    process.send_signal(ended)
    assert process.wait(20) != 0
    until(lambda: not alive(worker))


def until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_worker_imports_what_its_command_would(tmp_path, monkeypatch):
    """The same licq, and the models/ of the user's own folder, whatever the folder it is started in."""
    folder = tmp_path / "own"
    (folder / "models").mkdir(parents=True)
    (folder / "models" / "__init__.py").touch()
    (folder / "own_entry.py").write_text(
        "from pathlib import Path\nimport licq, models\n"
        "def main(words): Path(words[-1], 'found.txt').write_text(f'{licq.__file__} {models.__file__}')\n"
    )
    (tmp_path / "elsewhere" / "licq").mkdir(parents=True)
    (tmp_path / "elsewhere" / "licq" / "__init__.py").write_text("raise ImportError('of the wrong folder')")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.chdir(tmp_path / "elsewhere")
    (outcome,) = Engine(1).run([Task("one", "own_entry", (), str(tmp_path / "out"))], "test", "run", True)
    assert outcome.error is None
    ended = (tmp_path / "out" / "found.txt").read_text()
    assert ended == f"{licq.__file__} {folder / 'models' / '__init__.py'}"


def test_local_workers_share_the_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    started = []
    original = subprocess.Popen
    monkeypatch.setattr(
        subprocess,
        "Popen",
        lambda *words, **more: (
            started.append(more["env"]["CUDA_VISIBLE_DEVICES"]) or original(*words, **more)
        ),
    )
    outcomes(Engine(2), tasks(tmp_path, "good", "good"))
    assert sorted(started) == ["4", "7"]


def test_flags_that_contradict_each_other_are_refused():
    given = Namespace(workers=2, ray=None, gpu_share=None, threads=None)
    assert Engine.from_args(given).threads == max(1, len(os.sched_getaffinity(0)) // 2)
    for changes, expected in (({"ray": "auto"}, "exclude each other"), ({"gpu_share": 0.5}, "`gpu_share`")):
        with pytest.raises(InputError, match=expected):
            Engine.from_args(Namespace(**{**vars(given), **changes}))
