"""Time and memory of a codec's transforms in other inference engines, beside licq's integer program.

    pip install .[bench]
    python benchmarks/peers.py --arch minnen2018 --size 768x512 --threads 1
    python benchmarks/peers.py --size 2048x1408 --memory

Every engine gets the same float codec of random weights, calibrated on a smooth random image of that size.
ONNX Runtime INT8 is static, in QDQ format, with a scale for each output channel of weights. OpenVINO INT8 is
NNCF's post-training quantization. Engines take turns, transform by transform, and are in memory together;
each takes 4 GB for lu2022 of official width at 768x512, so choose some with --peers. The line below a table
is the distance of their outputs from PyTorch's, which shows a fast engine that is wrong. --memory measures
what an encoding from g_a to g_s adds to a process in which the codec is loaded.
"""

import contextlib
import ctypes
import gc
import io
import logging
import multiprocessing
import re
import resource
import sys
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, whatever is installed

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor, nn

from benchmarks.codec_speed import (
    add_codec,
    codec_of,
    inputs_of,
    make_pair,
    networks,
    size,
    smooth,
    times,
    title,
    transforms,
)
from benchmarks.engines import PEERS, Inputs, Peer, Run, require_packages
from licq.support.cli import ArgumentParser, main_guard
from licq.support.determinism import set_threads
from licq.support.errors import InputError

PARTS = {"g_a": ("g_a",), "h_a + h_s": ("h_a", "h_s"), "g_s": ("g_s",)}
# Seeds of the calibration images. They are as large as the timed one, and ONNX Runtime has the features of
# all of them in memory at once.
_CALIBRATION = (2,)


class Part(nn.Module):
    """Transforms of a codec, one after the other, as a module for exporters; those of lu2022 are methods."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = getattr(self.model, name)(x)
        return x


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' progress bars and warnings: standard output is for the tables."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _attempt(where: str, work: Callable[[], Any]) -> Any:
    """The result of `work`; None where it fails, with a line on standard error that says why.

    An engine that fails is a dash in the table, and the others go on.
    """
    try:
        with _quiet():
            return work()
    except Exception as error:
        print(f"{where}: {' '.join(f'{type(error).__name__}: {error}'.split())[:300]}", file=sys.stderr)
        return None


def _export(module: nn.Module, x: Tensor, path: Path) -> Path:
    module(x)  # lu2022 caches index tables of a size; they must not be made while it is traced
    torch.onnx.export(module, (x,), path, input_names=["x"], dynamo=True, external_data=False, verbose=False)
    return path


def _started(peer: Peer, path: Path, inputs: Inputs, threads: int) -> Run:
    run = peer.prepare(path, inputs[1:], threads)
    run(inputs[0])
    return run


def peer_runs(
    module: nn.Module, inputs: Inputs, peers: list[Peer], threads: int, where: str
) -> dict[str, Run]:
    """The engines that can run a module, by their headings.

    Args:
        inputs: the one that is timed, then those of the calibration.
        where: how a message calls the module.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = (
            _attempt(
                f"{where}, ONNX export",
                lambda: _export(module, torch.from_numpy(inputs[0]), Path(folder) / "part.onnx"),
            )
            if peers
            else None
        )
        runs = {
            peer.head: _attempt(
                f"{where}, {peer.head}", lambda peer=peer: _started(peer, path, inputs, threads)
            )
            for peer in peers
            if path
        }
    return {head: run for head, run in runs.items() if run is not None}


def limit_memory() -> None:
    """Limit this process to nine tenths of the free memory.

    So an engine that needs more gets an error, and the system does not end the process.
    """
    memory = Path("/proc/meminfo")
    if memory.exists():
        limit = int((_status("VmData") + 0.9 * _number(memory, "MemAvailable")) * 2**20)
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(
            resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
        )


def _ratio(reference: np.ndarray, output: np.ndarray) -> float:
    """The ratio of a signal to the difference from it, in dB."""
    return 10 * float(np.log10((reference**2).mean() / max(((reference - output) ** 2).mean(), 1e-30)))


@torch.no_grad()
def compare(args: Namespace, arch: str) -> str:
    """The table of an architecture, with a title and the distances from PyTorch."""
    peers = [PEERS[name] for name in args.peers]
    pair = make_pair(*codec_of(args, arch))
    ours = transforms(pair)
    width, height = size(args.size)
    images = [pair.x, *(smooth(height, width, seed) for seed in _CALIBRATION if peers)]
    given = [inputs_of(pair.model, image) for image in images]
    heads = ["PyTorch", *(peer.head for peer in peers), "licq"]
    rows, ratios = [], {peer.head: [] for peer in peers}
    for part, names in PARTS.items():
        inputs = [parts[part].numpy() for parts in given]
        runs = peer_runs(Part(pair.model, names).eval(), inputs, peers, args.threads, f"{arch}, {part}")
        tasks = {
            "PyTorch": ours[f"{part} float"],
            **{head: lambda run=run, x=inputs[0]: run(x) for head, run in runs.items()},
            "licq": ours[f"{part} integer"],
        }
        seconds = times(tasks, args.repeats, args.cpu_time)
        rows.append([part, *(f"{1000 * seconds[head]:.1f} ms" if head in seconds else "-" for head in heads)])
        reference = tasks["PyTorch"]().numpy()
        for head, values in ratios.items():
            values.append(f"{_ratio(reference, runs[head](inputs[0])):.0f}" if head in runs else "-")
        del runs, tasks  # the engines of all parts together would not fit into memory for large images
        gc.collect()
    distances = "\n\nSignal over difference from PyTorch in dB, line by line: " if peers else ""
    distances += "; ".join(f"{head} {', '.join(values)}" for head, values in ratios.items())
    return f"{title(args, arch)}\n\n{_table(rows, ['part', *heads])}{distances}\n"


def _table(rows: list[list[str]], heads: list[str]) -> str:
    return tabulate(rows, heads, tablefmt="github", disable_numparse=True)


def _number(file: Path, name: str) -> float:
    """The MB that a line of a file of /proc states."""
    line = re.search(rf"{name}:\s+(\d+)", file.read_text())
    assert line is not None, f"{file} has no {name}"
    return int(line[1]) / 1024


def _status(name: str) -> float:
    """MB of this process. Unlike ru_maxrss, VmHWM does not count what the parent process had."""
    return _number(Path("/proc/self/status"), name)


@torch.no_grad()
def encode_memory(codec: tuple, kind: str) -> tuple[float, float]:
    """(MB with the codec loaded, MB more at the peak of an encoding); to be called in a new process."""
    set_threads(codec[-1])
    pair = make_pair(*codec)
    task = networks(pair)[f"network {kind}"]
    del pair.quantized
    if kind == "float":
        del pair.plan
    else:
        del pair.model
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # the calibration's memory must neither count nor be used again
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS: loading had a peak, too
    before = _status("VmRSS")
    task()
    return before, _status("VmHWM") - before


def memory_table(args: Namespace, arch: str) -> str:
    rows = []
    for head, kind in {"PyTorch": "float", "licq": "integer"}.items():
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as one:
            loaded, more = one.submit(encode_memory, codec_of(args, arch), kind).result()
        rows.append([head, f"{loaded:.0f} MB", f"{more:.0f} MB"])
    return f"{title(args, arch)}\n\n{_table(rows, ['codec', 'loaded', 'a whole encode adds'])}\n"


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add_codec(parser, ["minnen2018", "cheng2020", "lu2022"])
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=list(PEERS),
        default=list(PEERS),
        help="engines beside PyTorch and licq (default: all)",
    )
    parser.add_argument(
        "--memory",
        action="store_true",
        help="peak memory of PyTorch's and licq's encode instead of times; Linux only",
    )
    args = parser.parse_args()
    codec_of(args, args.arch[0])  # refuses a bad --size
    if args.memory and not Path("/proc/self/clear_refs").exists():
        raise InputError("--memory reads /proc of Linux, which is not there; leave it out")
    if not args.memory:
        require_packages(args.peers)
        limit_memory()
    set_threads(args.threads)
    for arch in args.arch:
        try:
            print((memory_table if args.memory else compare)(args, arch), flush=True)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "alloc" not in str(error):
                raise
            raise InputError(
                f"{title(args, arch)}: out of memory; give fewer --peers at once or a smaller --size"
            ) from error


if __name__ == "__main__":
    sys.exit(main_guard(main))
