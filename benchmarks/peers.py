"""Time of a codec's transforms in the inference engines that it could run in, beside licq's integer program;
peak memory.

    pip install .[bench]
    python benchmarks/peers.py --arch minnen2018 --size 768x512 --threads 1
    python benchmarks/peers.py --size 2048x1408 --memory

Everything is exported from one float codec of random weights and calibrated on a smooth random image of the
same size. ONNX Runtime INT8: static, QDQ, a scale for each output channel of weights. OpenVINO INT8: NNCF's
post-training quantization. Engines take turns, transform
by transform, and are in memory together: for lu2022 of official width, 4 GB each at 768x512, name some with
--peers. A line under each table says how far their output is from PyTorch's, so that a fast wrong one is
seen. --memory: what a whole encode, g_a to g_s, adds to a process in which the codec is loaded.
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

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import numpy as np
import torch
from codec_speed import (
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
from engines import PEERS, Inputs, Peer, Run, require_packages
from tabulate import tabulate
from torch import Tensor, nn

from licq.support.cli import ArgumentParser, main_guard
from licq.support.determinism import set_threads
from licq.support.errors import InputError

PARTS = {"g_a": ("g_a",), "h_a + h_s": ("h_a", "h_s"), "g_s": ("g_s",)}
_CALIBRATION = (
    2,
    # seeds of the calibration images, as large as the timed one: ONNX Runtime holds the features of all at
    # once
)


class Part(nn.Module):
    """Transforms of a codec one after the other, as a module: what exporters take, where lu2022's are
    methods."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = getattr(self.model, name)(x)
        return x


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' progress bars and warnings: standard output is the tables'."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _attempt(where: str, work: Callable[[], Any]) -> Any:
    """What `work` gives; None where it fails, and one line on standard error that says why: a dash, not the
    end of the other engines."""
    try:
        with _quiet():
            return work()
    except Exception as error:
        print(f"{where}: {' '.join(f'{type(error).__name__}: {error}'.split())[:300]}", file=sys.stderr)
        return None


def _export(module: nn.Module, x: Tensor, path: Path) -> Path:
    module(x)  # lu2022 keeps the index tables of a size: real ones must be there before it is traced
    torch.onnx.export(module, (x,), path, input_names=["x"], dynamo=True, external_data=False, verbose=False)
    return path


def _started(peer: Peer, path: Path, inputs: Inputs, threads: int) -> Run:
    run = peer.prepare(path, inputs[1:], threads)
    run(inputs[0])
    return run


def peer_runs(
    module: nn.Module, inputs: Inputs, peers: list[Peer], threads: int, where: str
) -> dict[str, Run]:
    """By heading, the engines that can run this module. inputs: the one that it is timed on, then those of
    calibration."""
    with tempfile.TemporaryDirectory() as folder:
        path = (
            _attempt(
                f"{where}, ONNX export",
                lambda: _export(module, torch.from_numpy(inputs[0]), Path(folder) / "part.onnx"),
            )
            if peers
            else None
        )
        found = {
            peer.head: _attempt(
                f"{where}, {peer.head}", lambda peer=peer: _started(peer, path, inputs, threads)
            )
            for peer in peers
            if path
        }
    return {head: run for head, run in found.items() if run is not None}


def limit_memory() -> None:
    """Lets this process ask for nine tenths of the free memory: an engine that wants more gets an error,
    where the system would end us all."""
    free = Path("/proc/meminfo")
    if free.exists():
        most = int((_status("VmData") + 0.9 * _number(free, "MemAvailable")) * 2**20)
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(
            resource.RLIMIT_DATA, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard)
        )


def _ratio(wanted: np.ndarray, got: np.ndarray) -> float:
    """Signal over difference in dB."""
    return 10 * float(np.log10((wanted**2).mean() / max(((wanted - got) ** 2).mean(), 1e-30)))


@torch.no_grad()
def compare(args: Namespace, arch: str) -> str:
    """The table of an architecture, and the lines around it."""
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
            **{head: lambda run=run: run(inputs[0]) for head, run in runs.items()},
            "licq": ours[f"{part} integer"],
        }
        found = times(tasks, args.repeats, args.cpu_time)
        rows.append([part, *(f"{1000 * found[head]:.1f} ms" if head in found else "-" for head in heads)])
        wanted = tasks["PyTorch"]().numpy()
        for head, values in ratios.items():
            values.append(f"{_ratio(wanted, runs[head](inputs[0])):.0f}" if head in runs else "-")
        del runs, tasks  # with the engines' memory: that of all parts together would not fit for large images
        gc.collect()
    told = "\n\nSignal over difference from PyTorch in dB, line by line: " if peers else ""
    told += "; ".join(f"{head} {', '.join(values)}" for head, values in ratios.items())
    return f"{title(args, arch)}\n\n{tabulate(rows, ['part', *heads], tablefmt='github', disable_numparse=True)}{told}\n"


def _number(file: Path, name: str) -> float:
    """MB in a line of a file of /proc."""
    return int(re.search(rf"{name}:\s+(\d+)", file.read_text())[1]) / 1024


def _status(name: str) -> float:
    """MB of this process. VmHWM is getrusage's ru_maxrss without what the parent had when it started us."""
    return _number(Path("/proc/self/status"), name)


@torch.no_grad()
def encode_memory(codec: tuple, kind: str) -> tuple[float, float]:
    """(MB with the codec loaded, most MB more in a whole encode); in a process of its own."""
    set_threads(codec[-1])
    pair = make_pair(*codec)
    task = networks(pair)[f"network {kind}"]
    if kind == "float":
        pair.plan = pair.quantized = None
    else:
        pair.model = pair.quantized = None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # calibration's memory must neither count nor be there to be used again
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS: loading has had a peak of its own
    before = _status("VmRSS")
    task()
    return before, _status("VmHWM") - before


def memory_table(args: Namespace, arch: str) -> str:
    rows = []
    for head, kind in {"PyTorch": "float", "licq": "integer"}.items():
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as one:
            loaded, more = one.submit(encode_memory, codec_of(args, arch), kind).result()
        rows.append([head, f"{loaded:.0f} MB", f"{more:.0f} MB"])
    return f"{title(args, arch)}\n\n{tabulate(rows, ['codec', 'loaded', 'a whole encode adds'], tablefmt='github', disable_numparse=True)}\n"


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
