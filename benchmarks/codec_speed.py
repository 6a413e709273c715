"""Time of the integer codec beside the float one's: transforms, whole encoding, whole decoding.

    python benchmarks/codec_speed.py --arch minnen2018 --configuration official --size 768x512 --threads 1

Weights are random and the calibration is two crops; neither changes the time. Every line is the median of
several runs, the float and the integer one in turns. The column compressai is the float codec's own compress
and decompress, where it has them.
"""

import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, whatever is installed

import torch
from tabulate import tabulate
from torch import Tensor, nn

from licq.codec.latents import cut
from licq.codec.model_tables import coder_of
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

_LATENT_STD = 2.0  # standard deviation of the latents of a codec with random weights


def random_codec(arch: str, configuration: str | None, quality: int) -> nn.Module:
    """A codec with random weights, whose latents have about the spread of a trained one's."""
    seed_everything(0)
    model: Any = create_model(arch, quality, configuration).eval()
    latents: list[Tensor] = []
    hook = model.gaussian_conditional.register_forward_pre_hook(lambda _, inputs: latents.append(inputs[0]))
    with torch.no_grad():
        model(smooth(256, 256))
        if isinstance(model.g_a, nn.Module):
            last = [module for module in model.g_a.modules() if isinstance(module, nn.Conv2d)][-1]
            last.weight *= _LATENT_STD / float(torch.cat([part.flatten() for part in latents]).std())
    hook.remove()
    model.update()
    return model


def smooth(height: int, width: int, seed: int = 1) -> Tensor:
    """A smooth random image (1, 3, height, width) of 8-bit samples in 0..1."""
    coarse = torch.rand(1, 3, height // 16, width // 16, generator=torch.Generator().manual_seed(seed))
    return (
        torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1) * 255
    ).round() / 255


def times(tasks: dict[str, Callable], repeats: int, cpu: bool = False) -> dict[str, float]:
    """The median seconds of each task; tasks take turns, and a first turn does not count.

    Args:
        cpu: seconds of the process's threads together, not of the clock.
    """
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
    """A float codec and its integer program for images of one size.

    Args:
        model: the float codec.
        quantized: the quantized codec.
        plan: of the integer program.
        x: the image that both are timed on, (1, 3, H, W) in 0..1.
        lowering: seconds that making the program took.
    """

    model: Any
    quantized: QuantModel
    plan: Plan
    x: Tensor
    lowering: float

    @property
    def pixels(self) -> Tensor:
        """The image as uint8."""
        return (self.x * 255).round().to(torch.uint8)


@torch.no_grad()
def make_pair(
    arch: str, configuration: str | None, quality: int, size: tuple[int, int], threads: int
) -> Pair:
    """A codec with random weights, for images of `size` (width, height)."""
    width, height = size
    quantized = QuantModel(random_codec(arch, configuration, quality), QuantConfig())
    quantized.observe([smooth(256, 256), smooth(128, 256)])
    quantized.freeze()
    started = time.perf_counter()
    sizes = Sizes(lambda height, width, batch: lower(quantized, height, width, batch))
    plan = Plan(lower(quantized, height, width), sizes, threads)
    lowering = time.perf_counter() - started
    return Pair(random_codec(arch, configuration, quality), quantized, plan, smooth(height, width), lowering)


@torch.no_grad()
def inputs_of(model: Any, x: Tensor) -> dict[str, Tensor]:
    """The inputs of each transform for an image."""
    y = model.g_a(x)
    return {"g_a": x, "h_a + h_s": y, "g_s": y.round()}


def transforms(pair: Pair) -> dict[str, Callable]:
    """What computes one transform, by its name and "float" or "integer"."""
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
        name: torch.zeros(program.values[number].shape, dtype=program.values[number].dtype).numpy()
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
    """What computes everything from pixels to pixels, without the coding of symbols."""
    program = executable(pair.plan.program, pair.plan.threads)
    pixels = pair.pixels
    return {
        "network float": lambda: pair.model(pair.x),
        "network integer": lambda: program({"pixels": pixels}),
    }


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
    """Seconds by part and kind under "seconds", and further measurements."""
    pair = make_pair(arch, configuration, quality, size, threads)
    started = time.perf_counter()
    coder = coder_of(pair.quantized)
    pixels = pair.pixels.numpy()
    stream = coder.encode(pair.plan, pixels)
    coder.decode(pair.plan, stream)
    prepared = pair.lowering + time.perf_counter() - started
    model = pair.model
    tasks: dict[str, Callable] = {
        **transforms(pair),
        **networks(pair),
        "encode integer": lambda: coder.encode(pair.plan, pixels),
        "decode integer": lambda: coder.decode(pair.plan, stream),
    }
    seconds = times(tasks, repeats, cpu)
    if compressai and hasattr(model, "compress") and not get_architecture(arch).variable:
        clock = time.process_time if cpu else time.perf_counter
        started = clock()
        coded = model.compress(pair.x)
        seconds["encode compressai"] = clock() - started
        started = clock()
        model.decompress(coded["strings"], coded["shape"])
        seconds["decode compressai"] = clock() - started
    return {
        "seconds": seconds,
        "prepared": prepared,
        "bits per pixel": 8 * len(stream) / (size[0] * size[1]),
        "share": file_share(pair),
    }


def file_share(pair: Pair) -> float:
    """The size of the quantized model's file, as a share of the float codec's parameters in float32."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        pair.quantized.save(path)
        return path.stat().st_size / (4 * sum(parameter.numel() for parameter in pair.model.parameters()))


def hyper(plan: Plan) -> Program:
    """The part of the program from the inputs of h_a to the outputs of h_s."""
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
    """(width, height) of a text such as 768x512."""
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        width = height = 0
    if min(width, height) < 64 or width % 64 or height % 64:
        raise InputError(
            f"`size` {text} is not possible; give WIDTHxHEIGHT, multiples of 64, such as 768x512"
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
        help="seconds of the processor, not of the clock: for one thread on a machine that is busy with "
        "other work",
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
    """The line above a table."""
    clock = ", processor time" if args.cpu_time else ""
    threads = f"{args.threads} thread(s)"
    return f"{arch}, {args.configuration} width, {args.size}, {threads}, random weights{clock}"


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add_codec(parser, ["minnen2018"])
    parser.add_argument(
        "--no-compressai", dest="compressai", action="store_false", help="leave out its serial coder"
    )
    args = parser.parse_args()
    set_threads(args.threads)
    for arch in args.arch:
        result = measure(*codec_of(args, arch), args.repeats, args.compressai, args.cpu_time)
        seconds = result["seconds"]
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
            f"{title(args, arch)}, {result['bits per pixel']:.2f} bits per pixel; "
            f"made ready in {result['prepared']:.1f} s; "
            f"the model's file is {100 * result['share']:.1f} % of the float codec's\n"
        )
        print(tabulate(rows, ["part", *kinds], tablefmt="github", disable_numparse=True), "\n")


if __name__ == "__main__":
    sys.exit(main_guard(main))
