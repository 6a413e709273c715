"""Tasks on a Ray cluster, whose nodes need not share files.

A task works in a temporary folder of its node. A `Mirror` sends every change of that folder to the `Store`,
an actor on the node of the command, which writes it into the task's folder there. A task that is begun again,
perhaps on another node, starts from the files that have arrived.
"""

import contextlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from licq.support.cli import explain
from licq.support.errors import InputError
from licq.support.files import atomic_path
from licq.support.version import __version__
from licq.workers.task import RETRIES, Outcome, Task, has_begun, run_here, worker_died

try:
    import ray
    from ray.exceptions import OutOfMemoryError, RayError, WorkerCrashedError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError as error:
    raise InputError("`ray` needs the package ray; install it with pip install 'licq[ray]'") from error

_PULSE = 0.5  # seconds between two looks at the running tasks
_INTERVAL = 1.0  # seconds between two looks at a task's folder
_SHARED = "shared"  # the prefix under which files of Task.shared travel


class Store:
    """The tasks' folders on the node of the command. Only the last attempt at a task may write.

    Args:
        tasks: by name.
    """

    def __init__(self, tasks: dict[str, Task]):
        self.tasks = tasks
        self.since = time.time()
        self.attempts = dict.fromkeys(tasks, 0)

    def begin(self, name: str) -> tuple[int, bool, dict[str, bytes]]:
        """Begin an attempt at a task.

        Returns:
            The number of the attempt, from 1; whether it continues from what is there; and the files that it
            starts with, by relative path.
        """
        task = self.tasks[name]
        self.attempts[name] += 1
        resume = task.resume or has_begun(task, self.since)
        files = _read(Path(task.folder), _stamps(Path(task.folder))) if resume else {}
        if task.shared:
            files |= {
                f"{_SHARED}/{key}": data
                for key, data in _read(Path(task.shared), _stamps(Path(task.shared))).items()
            }
        return self.attempts[name], resume, files

    def put(self, name: str, attempt: int, files: dict[str, bytes], removed: list[str]) -> None:
        """Write the files that have changed, in their order, and delete those that are gone."""
        if attempt != self.attempts[name]:
            return
        for key, data in files.items():
            with atomic_path(self._path(name, key)) as temporary:
                temporary.write_bytes(data)
        for key in removed:
            path = self._path(name, key)
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it holds other files
                path.parent.rmdir()

    def attempts_of(self, name: str) -> int:
        """How often a task was begun."""
        return self.attempts[name]

    def _path(self, name: str, key: str) -> Path:
        task = self.tasks[name]
        if task.shared and key.startswith(f"{_SHARED}/"):
            return Path(task.shared) / key.removeprefix(f"{_SHARED}/")
        return Path(task.folder) / key


class Mirror:
    """Sends what changes in the folder `root` to the store: every second, from a thread, and at the end."""

    def __init__(self, root: Path, name: str, attempt: int, store: Any):
        self.root, self.name, self.attempt, self.store = root, name, attempt, store
        self.known = _stamps(root)
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "Mirror":
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()
        self.thread.join()
        self._send()

    def _follow(self) -> None:
        while not self.ended.wait(_INTERVAL):
            self._send()

    def _send(self) -> None:
        now = _stamps(self.root)
        # By age: a file that refers to another, as partial.json to a model, arrives after it.
        changed = sorted(
            (key for key, stamp in now.items() if self.known.get(key) != stamp), key=lambda key: now[key]
        )
        removed = [key for key in self.known if key not in now]
        if changed or removed:
            ray.get(self.store.put.remote(self.name, self.attempt, _read(self.root, changed), removed))
        self.known = now


def on_ray(
    tasks: Sequence[Task], address: str, threads: int, gpu_share: float | None
) -> Generator[Outcome | None, None, None]:
    """Run tasks on a Ray cluster. A task whose worker dies is begun again, `RETRIES` times.

    Args:
        address: HOST:PORT; "auto": of the cluster that this machine belongs to, else of one started here.
        threads: processors that a task is counted with.
        gpu_share: of a GPU, 0 to 1; None: 1 where the cluster has GPUs and the tasks may use them.

    Yields:
        The outcome of each task as it ends, in any order, and None about twice a second while none ends.

    Raises:
        InputError: no cluster at that address, or none of its nodes has what a task takes.
    """
    ours = not ray.is_initialized()
    if ours:
        _connect(address)
    pending: dict[Any, Task] = {}
    try:
        resources = _resources(tasks, threads, gpu_share)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        store = (
            ray.remote(Store)
            .options(num_cpus=0, scheduling_strategy=here)
            .remote({task.name: task for task in tasks})
        )
        remote = ray.remote(_run).options(max_retries=RETRIES, scheduling_strategy="SPREAD", **resources)
        environment = {name: value for name, value in os.environ.items() if name.startswith("LICQ_")}
        began = time.monotonic()
        pending = {remote.remote(task, store, os.getcwd(), environment, __version__): task for task in tasks}
        while pending:
            done, _ = ray.wait(list(pending), timeout=_PULSE)
            if not done:
                yield None
            for reference in done:
                task = pending.pop(reference)
                attempts = _value(store.attempts_of.remote(task.name))
                try:
                    error, seconds = _value(reference)
                except (WorkerCrashedError, OutOfMemoryError):
                    error, seconds = worker_died(attempts), time.monotonic() - began
                except RayError as failure:
                    error, seconds = f"Ray: {str(failure).strip().splitlines()[-1]}", time.monotonic() - began
                yield Outcome(task, error, attempts, seconds)
    finally:
        for reference in pending:
            with contextlib.suppress(RayError):
                ray.cancel(reference, force=True)
        if ours:
            ray.shutdown()


def _value(reference: Any) -> Any:
    """The value of one reference, for which Ray's own type is a list."""
    return ray.get(reference)


def _run(
    task: Task, store: Any, cwd: str, environment: dict[str, str], version: str
) -> tuple[str | None, float]:
    """On a node: one attempt at a task. Returns the line that says what went wrong, or None, and seconds."""
    began = time.monotonic()
    if version != __version__:
        return f"this node has licq {__version__}, the driver {version}; install the same on every node", 0.0
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    if Path(cwd).is_dir():  # paths on the command line are the driver's
        os.chdir(cwd)
    with tempfile.TemporaryDirectory(prefix="licq-") as folder:
        root = Path(folder)
        attempt, resume, files = _value(store.begin.remote(task.name))
        for key, data in files.items():
            (root / key).parent.mkdir(parents=True, exist_ok=True)
            (root / key).write_bytes(data)
        local = replace(task, folder=str(root), shared=str(root / _SHARED) if task.shared else None)
        with Mirror(root, task.name, attempt, store):
            error = run_here(local, resume, silent=True)
    return error and error.replace(str(root), task.folder), time.monotonic() - began


def _connect(address: str) -> None:
    """Connect this process to the cluster at that address; see `on_ray`."""
    if address.startswith("ray://"):
        raise InputError(
            f"{address} is a client's address; start the command on a node of the cluster and give HOST:PORT "
            "as `ray`"
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        # Without an address Ray takes RAY_ADDRESS, then a cluster that was started on this machine, then
        # starts one.
        ray.init(
            address=None if address == "auto" else address,
            include_dashboard=False if address == "auto" else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = explain(error) or str(error).splitlines()[0]
        raise InputError(
            f"no Ray cluster can be reached at {address} ({reason}); start one with the command ray start "
            "--head, or leave the address out"
        ) from error


def _resources(tasks: Sequence[Task], threads: int, gpu_share: float | None) -> dict[str, float]:
    """What Ray counts a task with, as options of a remote function.

    Raises:
        InputError: no node has as much; the task would wait forever.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if gpu_share is None:
        has_gpus = any(node.get("GPU") for node in nodes)
        gpu_share = 1.0 if has_gpus and not all("cpu" in task.words for task in tasks) else 0.0
    if not any(node.get("CPU", 0) >= threads and node.get("GPU", 0) >= gpu_share for node in nodes):
        largest = max(int(node.get("CPU", 0)) for node in nodes)
        raise InputError(
            f"no node of the Ray cluster has {threads} processors and {gpu_share:g} of a GPU for a run; the "
            f"largest has {largest} processors; choose other `threads` or `gpu_share`"
        )
    return {"num_cpus": threads, "num_gpus": gpu_share}


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Relative path -> (time of change in ns, size in bytes) of every complete file.

    The name of an unfinished file begins with a dot; see `support.files.atomic_path`.
    """
    stamps = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and not path.name.startswith("."):
                status = path.stat()
                stamps[path.relative_to(folder).as_posix()] = (status.st_mtime_ns, status.st_size)
    return stamps


def _read(folder: Path, keys: Iterable[str]) -> dict[str, bytes]:
    """Relative path -> content of those files that are still there."""
    files = {}
    for key in keys:
        with contextlib.suppress(FileNotFoundError):
            files[key] = (folder / key).read_bytes()
    return files
