"""Tasks on a real Ray cluster: two nodes on this machine, and workers that are killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import main_eval
import main_ptq
from licq.support.errors import InputError
from licq.workers.engine import Engine
from tests.main_jobs import contents, run, without_times, words
from tests.workers.test_engine import a_worker_ends_with_its_command, outcomes, tasks, until

ray = pytest.importorskip("ray")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster of two nodes; the second says that it has a GPU, which Ray believes."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        small = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
        nodes = Cluster(initialize_head=True, head_node_args=small | {"num_gpus": 0})
        nodes.add_node(**small | {"num_cpus": 2, "num_gpus": 1})
        yield nodes.address
        nodes.shutdown()


@pytest.mark.slow
def test_a_killed_worker_costs_its_last_unit(cluster, tmp_path):
    ended = outcomes(
        Engine(ray=cluster, threads=1, gpu_share=0), tasks(tmp_path, "killed", "good", "refused", "defect")
    )
    assert (ended["killed0"].error, ended["killed0"].attempts, ended["good1"].attempts) == (None, 2, 1)
    assert ended["refused2"].error == "this run is bad; mend it" and "KeyError" in ended["defect3"].error
    killed, good = tmp_path / "killed0", tmp_path / "good1"
    assert (killed / "computed.txt").read_text() == "[2]" and (
        good / "computed.txt"
    ).read_text() == "[0, 1, 2]"
    assert (killed / "report.json").read_bytes() == (good / "report.json").read_bytes()
    assert not list(killed.glob("units/*"))  # what a task removes is removed here too
    assert (killed / "log.txt").read_text().count("process ") == 2


@pytest.mark.slow
def test_a_task_that_no_node_can_run_is_refused(cluster, tmp_path):
    with pytest.raises(InputError, match="no node of the Ray cluster has 64 processors"):
        outcomes(Engine(ray=cluster, threads=64), tasks(tmp_path, "good"))


def test_an_address_of_rays_client_is_refused(tmp_path):
    with pytest.raises(InputError, match="client's address"):
        outcomes(Engine(ray="ray://head:10001", threads=1), tasks(tmp_path, "good"))


@pytest.mark.slow
def test_two_tasks_share_a_gpu(cluster, tmp_path):
    ended = outcomes(Engine(ray=cluster, threads=1, gpu_share=0.5), tasks(tmp_path, "gpu", "gpu"))
    written = [tmp_path / name / "gpu.txt" for name in ended]
    assert [path.read_text() for path in written] == ["0", "0"]
    assert abs(written[0].stat().st_mtime - written[1].stat().st_mtime) < 3  # at the same time


@pytest.mark.slow
@pytest.mark.parametrize("ended", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_command(cluster, tmp_path, ended):
    a_worker_ends_with_its_command(f"Engine(ray={cluster!r}, threads=1, gpu_share=0)", tmp_path, ended)


@pytest.mark.slow
def test_an_evaluation_on_a_cluster_writes_the_report_of_one_process(cluster, job, tmp_path):
    assert run(job, **{"no-baseline": True}) == 0
    given = [
        "--model",
        tmp_path / "out",
        "--data",
        tmp_path / "eval",
        "--device",
        "cpu",
        "--threads",
        1,
        "--quiet",
        "--out",
    ]
    for out, more in (("here", []), ("there", ["--ray", cluster])):
        assert main_eval.main([str(word) for word in [*given, tmp_path / out, *more]]) == 0
    assert contents(tmp_path / "here") == contents(tmp_path / "there")


@pytest.mark.slow
def test_a_sweep_whose_worker_is_killed_gives_the_numbers_of_this_process(cluster, job, tmp_path):
    """Two runs on two nodes; the first is killed behind a finished unit, and goes on elsewhere from what has
    arrived."""
    (tmp_path / "sweep.yaml").write_text("flags: {no-baseline: true}\ngrid:\n  w_bits: [8, 4]\n")
    changes = {
        "sweep": tmp_path / "sweep.yaml",
        "unit": "stage",
        "iters": 60,
        "set": "joint_iters=4",
        "threads": 1,
    }
    line = words(job, **changes, out=tmp_path / "ray", ray=cluster)
    process = subprocess.Popen(
        [sys.executable, "main_ptq.py", *line], cwd=Path(main_ptq.__file__).parent, stdout=subprocess.DEVNULL
    )
    folder = tmp_path / "ray" / "runs" / "w_bits8"
    until(lambda: list(folder.glob("q1/units/*.safetensors")) or process.poll() is not None, 180)
    os.kill(int((folder / "log.txt").read_text().split()[1]), signal.SIGKILL)
    assert process.wait(400) == 0
    ended = json.loads((tmp_path / "ray" / "finished.json").read_text())
    assert {name: (outcome["attempts"], outcome["error"]) for name, outcome in ended.items()} == {
        "w_bits8": (2, None),
        "w_bits4": (1, None),
    }
    assert run(job, **changes, out=tmp_path / "here") == 0
    for name in ended:
        here, there = (
            json.loads((tmp_path / where / "runs" / name / "report.json").read_text())
            for where in ("here", "ray")
        )
        assert without_times(here) == without_times(there)
    assert (folder / "log.txt").read_text().count("process ") == 2  # a run that starts anew has a new log
    assert not list(folder.rglob("units")) and not list(folder.rglob("partial.json"))
