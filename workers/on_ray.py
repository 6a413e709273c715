"""Tasks on a Ray cluster, whose nodes need not share files: a task's folder is copied to the driver's node
while it goes.

Every task works in a temporary folder of its node. Each finished unit is sent to a store, an actor on the
driver's node that writes it into the task's folder there; a task that is begun again, elsewhere perhaps,
starts from what has arrived.
"""

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from licq.support.cli import explain
from licq.support.errors import InputError
from licq.support.files import atomic_path
from licq.support.version import __version__
from licq.workers.engine import RETRIES, Engine, Outcome, Task, died, has_begun, run_here

try:
    import ray
    from ray.exceptions import OutOfMemoryError, RayError, WorkerCrashedError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError as error:
    raise InputError("--ray needs the package ray; install it with pip install 'licq[ray]'") from error

_PULSE = 0.5  # seconds between two looks at what runs
_INTERVAL = 1.0  # seconds between two looks at a task's folder
_SHARED = "shared"  # the prefix under which files of Task.shared travel


class Store:
    """On the driver's node: the folders of the tasks. `tasks` are by name; of each, only the attempt begun
    last may write."""

    def __init__(self, tasks: dict[str, Task]):
        self.tasks = tasks
        self.since = time.time()
        self.attempts = dict.fromkeys(tasks, 0)

    def begin(self, name: str) -> tuple[int, bool, dict[str, bytes]]:
        """The number of this attempt, whether it goes on with what is there, and the files that it starts
        with."""
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
        """Take over what has changed in a task's folder, in the order given."""
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
    """Sends what changes in a folder to the store, every second from a thread of its own and once more at the
    end."""

    def __init__(self, root: Path, name: str, attempt: int, store):
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


def on_ray(tasks: Sequence[Task], engine: Engine) -> Iterator[Outcome | None]:
    """Outcomes, and None now and then while nothing ends.

    Raises:
        InputError: no cluster at that address, or none of its nodes has what one task takes.
    """
    ours = not ray.is_initialized()
    if ours:
        _connect(engine.ray)
    pending: dict = {}
    try:
        resources = _resources(tasks, engine)
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
                attempts = ray.get(store.attempts_of.remote(task.name))
                try:
                    error, seconds = ray.get(reference)
                except (WorkerCrashedError, OutOfMemoryError):
                    error, seconds = died(attempts), time.monotonic() - began
                except RayError as failure:
                    error, seconds = f"Ray: {str(failure).strip().splitlines()[-1]}", time.monotonic() - began
                yield Outcome(task, error, attempts, seconds)
    finally:
        for reference in pending:
            with contextlib.suppress(RayError):
                ray.cancel(reference, force=True)
        if ours:
            ray.shutdown()


def _run(task: Task, store, cwd: str, environment: dict[str, str], version: str) -> tuple[str | None, float]:
    """On a node: one attempt at a task; returns its error's line, or None, and its seconds."""
    began = time.monotonic()
    if version != __version__:
        return f"this node has licq {__version__}, the driver {version}; install the same on every node", 0.0
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    if Path(cwd).is_dir():  # paths on the command line are the driver's
        os.chdir(cwd)
    with tempfile.TemporaryDirectory(prefix="licq-") as folder:
        root = Path(folder)
        attempt, resume, files = ray.get(store.begin.remote(task.name))
        for key, data in files.items():
            (root / key).parent.mkdir(parents=True, exist_ok=True)
            (root / key).write_bytes(data)
        local = replace(task, folder=str(root), shared=str(root / _SHARED) if task.shared else None)
        with Mirror(root, task.name, attempt, store):
            error = run_here(local, resume, silent=True)
    return error and error.replace(str(root), task.folder), time.monotonic() - began


def _connect(address: str) -> None:
    """Become a driver of the cluster at that address; "auto": of the one that this machine belongs to, else
    of one started here."""
    if address.startswith("ray://"):
        raise InputError(
            f"--ray {address} is a client's address; start the command on a node of the cluster, with --ray HOST:PORT"
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        # Without an address Ray takes RAY_ADDRESS, then a cluster that was started on this machine, then
        # starts one.
        ray.init(
            address=None if address == "auto" else address,
            include_dashboard=False if address == "auto" else None,
            log_to_driver=False,
            logging_level="ERROR",
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(
            f"no Ray cluster can be reached at {address} ({explain(error) or str(error).splitlines()[0]}); start one with "
            "`ray start --head`, or leave the address out"
        ) from error


def _resources(tasks: Sequence[Task], engine: Engine) -> dict[str, float]:
    """What Ray counts a task with.

    Raises:
        InputError: no node has as much; the task would wait forever.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    share = engine.gpu_share
    if share is None:
        share = (
            1.0
            if any(node.get("GPU") for node in nodes) and not all("cpu" in task.words for task in tasks)
            else 0.0
        )
    needed = {"num_cpus": engine.threads, "num_gpus": share}
    if not any(node.get("CPU", 0) >= engine.threads and node.get("GPU", 0) >= share for node in nodes):
        most = max(int(node.get("CPU", 0)) for node in nodes)
        raise InputError(
            f"no node of the Ray cluster has {engine.threads} processors and {share:g} of a GPU for a run; the largest has {most} "
            "processors; choose other --threads or --gpu_share"
        )
    return needed


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Relative path -> (time of change in ns, size) of every whole file; names of unfinished ones begin with
    a dot."""
    stamps = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and not path.name.startswith("."):
                facts = path.stat()
                stamps[path.relative_to(folder).as_posix()] = (facts.st_mtime_ns, facts.st_size)
    return stamps


def _read(folder: Path, keys) -> dict[str, bytes]:
    """The contents of files that are still there."""
    files = {}
    for key in keys:
        with contextlib.suppress(FileNotFoundError):
            files[key] = (folder / key).read_bytes()
    return files
