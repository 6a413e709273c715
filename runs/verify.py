"""The command verify: the same images under changed conditions; every hash must be the same.

Conditions that a process must have from its start on (another processor's instructions, another PyTorch,
CUDA) have a process of their own. The others share one.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from licq.support import options
from licq.support.checkout import licq_alone
from licq.support.cli import ArgumentParser
from licq.support.errors import InputError
from licq.support.parallel import MIN_PIECES, default_jobs

_DIFFERENT = 1  # exit status
_PROGRAM = """
import sys
from licq.support.imports import uncollected
with uncollected():
    from licq.codec import fingerprint
fingerprint.main(*sys.argv[1:])
"""
_TILE = 64  # the smallest: then every image that can be cut is


@dataclass(frozen=True)
class Condition:
    """What is other than in the first condition.

    environment: from the start of the process on. reference: the reference runs and not the compiled kernels.
    only_integer: it says nothing about the float codec.
    """

    name: str
    threads: int = 1
    batch: int = 1
    device: str = "cpu"
    environment: dict[str, str] = field(default_factory=dict)
    python: str = sys.executable
    tile: int | None = None
    reference: bool = False
    only_integer: bool = False

    @property
    def process(self) -> tuple:
        """The same for conditions that share a process."""
        return self.python, self.device, tuple(self.environment.items())


def conditions(python: Sequence[str], cuda: bool) -> list[Condition]:
    """All that this machine can be put in; the first is what the others are compared with."""
    flags = _processor_flags()
    chosen = [
        Condition("1 thread"),
        Condition("2 threads", threads=2),
        Condition("batch of 4", batch=4),
        Condition("in tiles", tile=_TILE, only_integer=True),
        Condition("reference kernels", reference=True, only_integer=True),
    ]
    for capability, needs in (("default", None), ("avx2", "avx2"), ("avx512", "avx512f")):
        if needs is None or needs in flags:
            chosen.append(
                Condition(
                    f"ATEN_CPU_CAPABILITY={capability}", environment={"ATEN_CPU_CAPABILITY": capability}
                )
            )
    for isa, needs in (
        ("SSE41", None),
        ("AVX", "avx"),
        ("AVX2", "avx2"),
        ("AVX512_CORE", "avx512bw"),
        ("AVX512_CORE_VNNI", "avx512_vnni"),
    ):
        if needs is None or needs in flags:
            chosen.append(Condition(f"ONEDNN_MAX_CPU_ISA={isa}", environment={"ONEDNN_MAX_CPU_ISA": isa}))
            chosen.append(
                Condition(
                    f"ONEDNN_MAX_CPU_ISA={isa}, reference kernels",
                    only_integer=True,
                    environment={"ONEDNN_MAX_CPU_ISA": isa},
                    reference=True,
                )
            )
    chosen += [Condition(f"PyTorch of {path}", python=path) for path in python]
    if cuda:
        chosen.append(Condition("CUDA", device="cuda"))
    return chosen


def _processor_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), ()))


def build_verify_parser(prog: str = "main_eval.py verify") -> ArgumentParser:
    """The flags of `verify`."""
    parser = ArgumentParser(
        prog=prog,
        allow_abbrev=False,
        description="Encode and decode images under changed conditions and compare hashes of symbols, "
        "densities, files and pixels; the same for the float codec.",
    )
    parser.add_argument(
        "--model",
        metavar="RUN",
        required=True,
        help="a model.safetensors, or the folder of a main_ptq.py run",
    )
    options.add_plugin(parser)
    parser.add_argument(
        "--quality", metavar="Q", type=options.positive, help="which model of the folder (default: the first)"
    )
    parser.add_argument(
        "--data", metavar="SET", help="images: a folder or a data set's name (default: as in evaluation)"
    )
    parser.add_argument("--images", metavar="N", type=options.positive, help="so many of them (default: all)")
    parser.add_argument(
        "--python",
        metavar="PATH",
        action="append",
        default=[],
        help="another environment's Python, with another PyTorch; repeatable",
    )
    parser.add_argument(
        "--no-float", dest="with_float", action="store_false", help="leave the float codec out"
    )
    parser.add_argument(
        "--out", metavar="FILE", help="write the table as Markdown, and all hashes as JSON beside it"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    return parser


def main(argv: Sequence[str], prog: str = "main_eval.py verify") -> int:
    """The command line `argv`; returns 0 where everything is the same in the integer codec, else 1."""
    args = build_verify_parser(prog).parse_args(argv)
    import torch

    from licq.runs.coding import models_of
    from licq.runs.inputs import evaluation_set
    from licq.support.files import write_json, write_text

    model, level = model_at(models_of(args.model), args.quality)
    for path in args.python:
        if not os.access(path, os.X_OK):
            raise InputError(f"--python {path} is no program; give the path of an environment's python")
    images = [str(path) for path in evaluation_set(args.data)[0].paths][: args.images]
    source = float_of(model, level) if args.with_float else None
    tried = conditions(args.python, torch.cuda.is_available())
    plugin = str(Path(args.arch).resolve()) if args.arch and args.arch.endswith(".py") else None
    results = measure(model, source, images, tried, level, progress=not args.quiet, plugin=plugin)
    text = table(results, tried, model, len(images))
    print(text)
    if args.out:
        write_text(args.out, text + "\n")
        write_json(
            Path(args.out).with_suffix(".json"),
            {condition.name: result for condition, result in zip(tried, results)},
        )
    return (
        _DIFFERENT
        if any(count for result in compared(results, "integer") if result for count in result.values())
        else 0
    )


def model_at(files: Sequence[Path], quality: int | None) -> tuple[Path, int | None]:
    """(the model of a quality, None: the first; the rate that a variable-rate codec is to be set to, None for
    the others).

    Raises:
        InputError: there is no such quality.
    """
    rates = _extra(files[0]).get("rates")
    if rates:
        if quality is not None and str(quality) not in rates:
            raise InputError(
                f"{files[0]} was quantized for the rates {', '.join(rates)}; choose one of them with "
                "--quality"
            )
        return files[0], int(next(iter(rates))) if quality is None else quality
    matching = files if quality is None else [file for file in files if file.parent.name == f"q{quality}"]
    if not matching:
        raise InputError(
            f"no quality {quality} among {', '.join(map(str, files))}; choose another with --quality"
        )
    return matching[0], None


def _extra(file: Path) -> dict[str, Any]:
    from licq.quant.serialization import read_quantized

    return read_quantized(file)[0].get("extra") or {}


def float_of(file: Path, level: int | None = None) -> list | None:
    """[file, architecture, quality or level] of the float codec that a model was made from, None where it is
    not there."""
    extra = _extra(file)
    path = Path((extra.get("checkpoint") or {}).get("path", ""))
    quality = extra.get("quality") if level is None else level
    return [str(path), extra["arch"], quality] if path.is_file() and isinstance(quality, int) else None


def measure(
    model: Path,
    source: list | None,
    images: list[str],
    tried: list[Condition],
    level: int | None = None,
    progress: bool = True,
    plugin: str | None = None,
) -> list[dict[str, Any]]:
    """What `codec.fingerprint` says under each condition.

    The process of the first condition runs alone. The others run at the same time, one a processor.

    Args:
        plugin: the Python file that registers the model's codec, absolute.

    Raises:
        InputError: a process failed; its last line is told.
    """
    from licq.support.progress import progress as progress_bar

    by_process: dict[tuple, list[int]] = {}
    for position, condition in enumerate(tried):
        by_process.setdefault(condition.process, []).append(position)
    results: list[dict[str, Any]] = [{}] * len(tried)
    with tempfile.TemporaryDirectory() as folder:
        path = licq_alone(Path(folder))

        def job(position: int) -> dict[str, Any]:
            condition = tried[position]
            return {
                "model": str(model.resolve()),
                "level": level,
                "plugin": plugin,
                "float": None if condition.only_integer else source,
                "images": [str(Path(image).resolve()) for image in images],
                "threads": condition.threads,
                "batch": condition.batch,
                "tile": condition.tile,
                "device": condition.device,
                "reference": condition.reference,
                "keep": folder,
                "base": position == 0,
                "number": position,
            }

        def work(positions: list[int]) -> None:
            jobs = [job(position) for position in positions]
            made = _in_process(tried[positions[0]], jobs, Path(folder), str(path))
            for position, result in zip(positions, made, strict=True):
                results[position] = result

        first, *others = by_process.values()
        with progress_bar(total=len(by_process), desc="conditions", unit="process", enabled=progress) as bar:
            work(first)
            bar.update()
            executor = ThreadPoolExecutor(default_jobs(MIN_PIECES * len(others), 1))
            try:
                for _ in executor.map(work, others):
                    bar.update()
            finally:
                executor.shutdown(cancel_futures=True)
    return results


def _in_process(
    condition: Condition, jobs: list[dict[str, Any]], folder: Path, path: str
) -> list[dict[str, Any]]:
    """The results of jobs in a new process, started with what the condition asks for."""
    number = jobs[0]["number"]
    job_file, result_file = folder / f"{number}.jobs.json", folder / f"{number}.results.json"
    job_file.write_text(json.dumps(jobs))
    process = subprocess.run(
        [condition.python, "-W", "ignore", "-c", _PROGRAM, str(job_file), str(result_file)],
        cwd=folder,
        env={**os.environ, **condition.environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode or not result_file.is_file():
        last = (process.stderr.strip().splitlines() or [f"status {process.returncode}"])[-1]
        raise InputError(f"the process of condition {condition.name!r} failed: {last}")
    return json.loads(result_file.read_text())


def compared(results: list[dict[str, Any]], kind: str) -> list[dict[str, int] | None]:
    """For each condition, how many images differ from the first condition's in each hash; None where it was
    not measured."""
    base = results[0][kind]
    differences = []
    for result in results:
        if not result[kind]:
            differences.append(None)
            continue
        names = result[kind][0].keys()
        differences.append(
            {
                name: sum(
                    image[name] != first[name if name in first else "pixels"]
                    for image, first in zip(result[kind], base, strict=True)
                )
                for name in names
            }
        )
    for image, first in zip(base, base):  # what a file decodes to is what the network says
        if "decoded" in image and image["decoded"] != first["pixels"]:
            differences[0]["decoded"] += 1
    return differences


def table(results: list[dict[str, Any]], tried: list[Condition], model: Path, count: int) -> str:
    """Markdown."""
    integer, floats = compared(results, "integer"), compared(results, "float")
    lines = [
        f"{model}, {count} images; each figure counts images that differ from the first line's",
        "",
        "| condition | integer: symbols | densities | file | decoded from the first file | float: scale "
        "indexes (cannot be decoded) | pixels |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for condition, ours, theirs in zip(tried, integer, floats):
        cells = [str(ours.get(name, "-")) if ours else "-" for name in ("symbols", "indexes", "file")]
        cells.append(str(ours.get("decoded", ours["pixels"])) if ours else "-")
        cells += [str(theirs[name]) if theirs else "-" for name in ("indexes", "pixels")]
        lines.append(f"| {condition.name} | {' | '.join(cells)} |")
    return "\n".join(lines)
