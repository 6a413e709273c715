"""Time of the integer codec beside the float one's: transforms, whole encoding, whole decoding.

    python benchmarks/codec_speed.py --arch minnen2018 --configuration official --size 768x512 --threads 1

Weights are random and calibration is two crops: neither changes what is computed. Every line is the median of
several runs, the float and the integer one in turns. compressai: its own compress and decompress, of the
float codec, where it has them.
"""

import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tabulate import tabulate
from torch import Tensor, nn

from licq.codec.coder import Coder
from licq.codec.latents import cut
from licq.codec.plan import Plan
from licq.codec.sizes import Sizes
from licq.integer.execution import executable
from licq.integer.lowering import lower
from licq.integer.program import Program
from licq.models.registry import create_model, get_architecture
from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.support import options
from licq.support.cli import ArgumentParser, main_guard
from licq.support.determinism import seed_everything, set_threads
from licq.support.errors import InputError

_LATENTS_LIKE = 2.0  # standard deviation that random latents are brought to


def random_codec(arch: str, configuration: str | None, quality: int) -> nn.Module:
    """A codec whose latents have about the spread of a trained one's."""
    seed_everything(0)
    model = create_model(arch, quality, configuration).eval()
    seen: list[Tensor] = []
    hook = model.gaussian_conditional.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(smooth(256, 256))
        last = [
            module
            for module in (model.g_a.modules() if isinstance(model.g_a, nn.Module) else model.modules())
            if isinstance(module, nn.Conv2d)
        ]
        if isinstance(model.g_a, nn.Module):
            last[-1].weight *= _LATENTS_LIKE / float(torch.cat([part.flatten() for part in seen]).std())
    hook.remove()
    model.update()
    return model


def smooth(height: int, width: int, seed: int = 1) -> Tensor:
    coarse = torch.rand(1, 3, height // 16, width // 16, generator=torch.Generator().manual_seed(seed))
    return (
        torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1) * 255
    ).round() / 255


def times(tasks: dict[str, Callable], repeats: int, cpu: bool = False) -> dict[str, float]:
    """Median seconds of each task, run in turns; once before it counts. cpu: of the process's threads
    together, not of the clock."""
    spent: dict[str, list[float]] = {name: [] for name in tasks}
    clock = time.process_time if cpu else time.perf_counter
    for turn in range(repeats + 1):
        for name, task in tasks.items():
            started = clock()
            task()
            if turn:
                spent[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in spent.items()}


@dataclass
class Pair:
    """A float codec and its integer program for images of one size, with the image x that both are timed on.

    lowering: seconds that making the program took.
    """

    model: nn.Module
    quantized: QuantModel
    plan: Plan
    x: Tensor
    lowering: float

    @property
    def pixels(self) -> Tensor:
        return (self.x * 255).round().to(torch.uint8)


@torch.no_grad()
def make_pair(
    arch: str, configuration: str | None, quality: int, size: tuple[int, int], threads: int
) -> Pair:
    """size: width, height."""
    width, height = size
    quantized = QuantModel(random_codec(arch, configuration, quality), QuantConfig())
    quantized.observe([smooth(256, 256), smooth(128, 256)])
    quantized.freeze()
    started = time.perf_counter()
    plan = Plan(lower(quantized, height, width), Sizes(lambda *size: lower(quantized, *size)), threads)
    lowering = time.perf_counter() - started
    return Pair(random_codec(arch, configuration, quality), quantized, plan, smooth(height, width), lowering)


@torch.no_grad()
def inputs_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What each transform is given for an image."""
    y = model.g_a(x)
    return {"g_a": x, "h_a + h_s": y, "g_s": y.round()}


def transforms(pair: Pair) -> dict[str, Callable]:
    """By part and kind, float and integer: a transform alone."""
    model, plan, pixels = pair.model, pair.plan, pair.pixels
    given, program = inputs_of(model, pair.x), plan.program
    analysis = executable(
        program.part({"pixels": program.inputs["pixels"]}, {"y": plan.latents[-1].latent}), plan.threads
    )
    hyper_part = hyper(plan)
    features = {
        name: torch.zeros(program.values[int(name)].shape, dtype=program.values[int(name)].dtype)
        for name in hyper_part.inputs
    }
    run_hyper = executable(hyper_part, plan.threads)
    run, needs = plan.synthesis
    symbols = {
        name: torch.zeros(program.values[number].shape, dtype=program.values[number].dtype)
        for name, number in needs.items()
    }
    return {
        "g_a float": lambda: model.g_a(given["g_a"]),
        "g_a integer": lambda: analysis({"pixels": pixels}),
        "h_a + h_s float": lambda: model.h_s(model.h_a(given["h_a + h_s"])),
        "h_a + h_s integer": lambda: run_hyper(features),
        "g_s float": lambda: model.g_s(given["g_s"]),
        "g_s integer": lambda: run(symbols),
    }


def networks(pair: Pair) -> dict[str, Callable]:
    """By kind: everything from pixels to pixels but the coding of symbols."""
    whole = executable(pair.plan.program, pair.plan.threads)
    pixels = pair.pixels
    return {"network float": lambda: pair.model(pair.x), "network integer": lambda: whole({"pixels": pixels})}


@torch.no_grad()
def measure(
    arch: str,
    configuration: str | None,
    quality: int,
    size: tuple[int, int],
    threads: int,
    repeats: int,
    compressai: bool,
    cpu: bool = False,
) -> dict:
    """Seconds by (part, kind), and facts."""
    pair = make_pair(arch, configuration, quality, size, threads)
    started = time.perf_counter()
    coder = Coder(pair.quantized)
    stream = coder.encode(pair.plan, pair.pixels)
    coder.decode(pair.plan, stream)
    prepared = pair.lowering + time.perf_counter() - started
    model, pixels = pair.model, pair.pixels
    tasks: dict[str, Callable] = {
        **transforms(pair),
        **networks(pair),
        "encode integer": lambda: coder.encode(pair.plan, pixels),
        "decode integer": lambda: coder.decode(pair.plan, stream),
    }
    found = times(tasks, repeats, cpu)
    if compressai and hasattr(model, "compress") and not get_architecture(arch).variable:
        clock = time.process_time if cpu else time.perf_counter
        started = clock()
        coded = model.compress(pair.x)
        found["encode compressai"] = clock() - started
        started = clock()
        model.decompress(coded["strings"], coded["shape"])
        found["decode compressai"] = clock() - started
    return {
        "seconds": found,
        "prepared": prepared,
        "bits per pixel": 8 * len(stream) / (size[0] * size[1]),
        "share": file_share(pair),
    }


def file_share(pair: Pair) -> float:
    """Bytes of the quantized model's file, of those that the float codec's parameters take."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        pair.quantized.save(path)
        return path.stat().st_size / (4 * sum(parameter.numel() for parameter in pair.model.parameters()))


def hyper(plan: Plan) -> Program:
    """h_a and h_s: from what the first layers of h_a read to what the last ones of h_s give."""
    program = plan.program
    producers = program.producers()
    read = {
        number
        for op in program.operations
        if op.node.startswith("h_a")
        for number in op.inputs
        if not producers[number].node.startswith("h_a")
    }
    inside = [op for op in program.operations if op.node.startswith("h_s")]
    used = {number for op in inside for number in op.inputs}
    given = {f"out{number}": number for op in inside for number in op.outputs if number not in used}
    return cut(program, {number for number in read if producers[number].kind != "constant"}, given)


def size(text: str) -> tuple[int, int]:
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        width = height = 0
    if min(width, height) < 64 or width % 64 or height % 64:
        raise InputError(
            f"--size {text} is not possible; give WIDTHxHEIGHT, multiples of 64, such as 768x512"
        )
    return width, height


def add_codec(parser: ArgumentParser, archs: list[str]) -> None:
    """--arch --configuration --quality --size --threads --repeats: what is timed, and how."""
    parser.add_argument("--arch", nargs="+", default=archs, help=f"default: {' '.join(archs)}")
    parser.add_argument(
        "--configuration", default="official", help="official or reference (default: official)"
    )
    parser.add_argument("--quality", type=int, default=1, help="whose official width (default: 1)")
    parser.add_argument("--size", default="768x512", help="WIDTHxHEIGHT (default: 768x512)")
    parser.add_argument("--threads", metavar="N", type=options.threads, default=1, help="default: 1")
    parser.add_argument("--repeats", metavar="N", type=options.positive, default=3, help="default: 3")
    parser.add_argument(
        "--cpu_time",
        action="store_true",
        help="seconds of the processor, not of the clock: for one thread on a machine that is busy with other work",
    )


def codec_of(args: Namespace, arch: str) -> tuple[str, str | None, int, tuple[int, int], int]:
    """The arguments of `make_pair`."""
    return (
        arch,
        None if args.configuration == "official" else args.configuration,
        args.quality,
        size(args.size),
        args.threads,
    )


def title(args: Namespace, arch: str) -> str:
    return f"{arch}, {args.configuration} width, {args.size}, {args.threads} thread(s), random weights{', processor time' if args.cpu_time else ''}"


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add_codec(parser, ["minnen2018"])
    parser.add_argument(
        "--no-compressai", dest="compressai", action="store_false", help="leave out its serial coder"
    )
    args = parser.parse_args()
    set_threads(args.threads)
    for arch in args.arch:
        found = measure(*codec_of(args, arch), args.repeats, args.compressai, args.cpu_time)
        seconds = found["seconds"]
        parts = dict.fromkeys(name.rpartition(" ")[0] for name in seconds)
        kinds = ("float", "integer", "compressai")
        rows = [
            [
                part,
                *(
                    f"{seconds[f'{part} {kind}']:.3f} s" if f"{part} {kind}" in seconds else "-"
                    for kind in kinds
                ),
            ]
            for part in parts
        ]
        print(
            f"{title(args, arch)}, {found['bits per pixel']:.2f} bits per pixel; made ready in {found['prepared']:.1f} s; "
            f"the model's file is {100 * found['share']:.1f} % of the float codec's\n"
        )
        print(tabulate(rows, ["part", *kinds], tablefmt="github", disable_numparse=True), "\n")


if __name__ == "__main__":
    sys.exit(main_guard(main))
