"""Time and memory of `licq encode` and `licq decode` as whole commands, and of their parts.

    python benchmarks/codec_times.py --model runs/first/q3/model.safetensors --image photo.png --threads 1

A command is run with an empty cache of plans and then with a full one. The parts are those of the first run,
in one process. Seconds are of the clock and of the processor; memory is the largest of the process.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, whatever is installed

from tabulate import tabulate

from licq.support import options
from licq.support.cli import ArgumentParser, main_guard
from licq.support.errors import InputError

_ROOT = Path(__file__).resolve().parents[1]
_MIB = 1024  # ru_maxrss is in KiB


def run(words: list[str], environment: dict[str, str]) -> tuple[float, float, int]:
    """(seconds of the clock, seconds of the processor, MiB of memory) of a command.

    Raises:
        InputError: it failed.
    """
    started = time.perf_counter()
    with subprocess.Popen(words, env={**os.environ, **environment}, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise InputError(f"{' '.join(words)} ended with status {process.returncode}")
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss // _MIB


def commands(model: str, image: str, threads: int, folder: Path) -> list[list[str]]:
    """Rows of the table: encode and decode, with an empty cache and with a full one."""
    coded, decoded = str(folder / "image.licq"), str(folder / "image.png")
    common = ["--model", model, "--threads", str(threads), "--quiet"]
    licq = [sys.executable, "-m", "licq"]
    rows = []
    for name, words in (
        ("encode", [*licq, "encode", image, "-o", coded, *common]),
        ("decode", [*licq, "decode", coded, "-o", decoded, *common]),
    ):
        environment = {
            "PYTHONPATH": str(_ROOT),
            "LICQ_CACHE": str(folder / name),
            "OMP_NUM_THREADS": str(threads),
        }
        for cache in ("empty", "full"):
            wall, cpu, memory = run(words, environment)
            rows.append([name, cache, f"{wall:.2f}", f"{cpu:.2f}", str(memory)])
    return rows


def parts(model: str, image: str, threads: int) -> list[list[str]]:
    """[part, seconds of the processor] of a first encoding and decoding in this process."""
    rows: list[list[str]] = []

    def timed(name: str, task: Callable[[], Any]) -> Any:
        started = time.process_time()
        result = task()
        rows.append([name, f"{time.process_time() - started:.2f}"])
        return result

    def imports() -> Any:
        from licq.codec import api

        return api

    api = timed("import", imports)
    from licq.codec import rans
    from licq.data.images import load_pixels
    from licq.data.margins import with_margins
    from licq.integer.execution import usable

    codec = timed("load the model", lambda: api.Codec.load(model, threads))
    timed("check the kernels", usable)
    pixels = with_margins(load_pixels(image).transpose(2, 0, 1)[None], codec.multiple)
    size = (*pixels.shape[-2:], codec.gain(1 if codec.variable else None))
    plan = timed("encode: plan", lambda: codec.ready_plan("encode", *size))
    values = timed("encode: transforms", lambda: plan.encode(pixels))
    plan.encode = lambda _: values
    stream = timed("encode: symbols", lambda: plan.coder.encode(plan, pixels))
    plan = timed("decode: plan", lambda: codec.ready_plan("decode", *size))
    synthesis, needs = plan.synthesis
    spent = [0.0]

    def measured(inputs: Any) -> Any:
        started = time.process_time()
        result = synthesis(inputs)
        spent[0] = time.process_time() - started
        return result

    plan.pixels = (measured, needs)
    timed("decode: densities and symbols", lambda: plan.coder.decode(plan, stream))
    rows[-1][1] = f"{float(rows[-1][1]) - spent[0]:.2f}"
    rows.append(["decode: synthesis", f"{spent[0]:.2f}"])
    rows.append(["entropy coder", type(rans.encoder()).__name__])
    return rows


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, nargs="+", help="a model.safetensors; several are possible")
    parser.add_argument("--image", required=True, help="an image file")
    parser.add_argument("--threads", metavar="N", type=options.threads, default=1, help="default: 1")
    parser.add_argument("--parts", action="store_true", help="print the parts alone, as JSON")
    args = parser.parse_args()
    if args.parts:
        print(json.dumps(parts(args.model[0], args.image, args.threads)))
        return
    for model in args.model:
        with tempfile.TemporaryDirectory() as folder:
            rows = commands(model, args.image, args.threads, Path(folder))
        print(f"{model}, {args.image}, {args.threads} thread(s)\n")
        heads = ["command", "cache of plans", "s, clock", "s, processor", "MiB"]
        print(tabulate(rows, heads, tablefmt="github", disable_numparse=True), "\n")
        words = [sys.executable, __file__, "--parts", "--model", model, "--image", args.image]
        done = subprocess.run(
            [*words, "--threads", str(args.threads)],
            env={**os.environ, "OMP_NUM_THREADS": str(args.threads)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise InputError((done.stderr.strip().splitlines() or ["the parts cannot be measured"])[-1])
        table = json.loads(done.stdout)
        print(tabulate(table, ["part", "s, processor"], tablefmt="github", disable_numparse=True), "\n")


if __name__ == "__main__":
    sys.exit(main_guard(main))
