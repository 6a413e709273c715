"""How long a calibration takes against the codec's own float forward, how much memory it needs, and how both
grow with the codec's width.

    python benchmarks/calibration.py --arch lu2022 --width 1 1.5 2
    python benchmarks/calibration.py --arch minnen2018 --configuration official --extrapolate --json FILE

For each width, in a process of its own: the float codec's forward and training step on two crops, the
quantized ones, and each step of the preparation on `--sample` crops, in seconds of processor time of all
threads. The ratios are of these. Then a complete calibration with the default settings runs; `--extrapolate`
computes its time from the measured parts instead. Widths multiply the channels of the configuration. Weights
and images are random; time and memory do not depend on them.
"""

import contextlib
import multiprocessing
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, whatever is installed

import torch
from tabulate import tabulate
from torch import Tensor, nn

from licq.models.registry import create_model, get_architecture
from licq.quant import unchanged
from licq.quant.model import QuantModel
from licq.reconstruction import gptq
from licq.reconstruction.api import peak_memory_mb, quantize
from licq.reconstruction.calibration import Calibration, run_steps
from licq.reconstruction.config import PtqConfig, parse_knobs
from licq.reconstruction.objective import Objective
from licq.reconstruction.state import knob_of, learned
from licq.reconstruction.steps import LEARNING, PREPARATION
from licq.support import options
from licq.support.cli import ArgumentParser, main_guard
from licq.support.determinism import seed_everything, set_threads
from licq.support.files import write_json

REPEAT = 3
RATIOS = (
    "forward_ratio",
    "step_ratio",
    "observing_ratio",
    "gptq_ratio",
    "factorization_forwards",
    "split_balance_seconds",
    "calibration_forwards",
)


def make_codec(arch: str, configuration: str | None, width: float) -> tuple[nn.Module, dict]:
    """(The float codec, its channels)."""
    sizes = get_architecture(arch).sizes(None, configuration)
    wider = {name: round(width * size) for name, size in sizes.items() if name in ("N", "M")}
    return create_model(arch, configuration=configuration, **wider).eval(), wider


def random_images(count: int, side: int) -> Tensor:
    smooth = nn.functional.interpolate(torch.rand(count, 3, 16, 16), size=(side, side), mode="bicubic")
    return (smooth.clamp(0, 1) * 255).round() / 255


def seconds(run: Callable[[], Any], repeat: int = 1) -> float:
    """Processor time of the run in the middle of `repeat`, after one that is not counted where there are
    several."""
    if repeat > 1:
        run()
    times = []
    for _ in range(repeat):
        started = time.process_time()
        run()
        times.append(time.process_time() - started)
    return statistics.median(times)


def measure_pass(qmodel: QuantModel, batch: Tensor, count: int) -> None:
    """`count` forwards between which no parameter changes."""
    with unchanged.everything():
        for _ in range(count):
            qmodel(batch)


def step_of(
    codec: Callable[[Tensor], dict], batch: Tensor, objective: Objective, parameters: list[nn.Parameter]
) -> Callable[[], None]:
    """A forward and a backward to these parameters."""

    def run() -> None:
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(True)
        objective(codec(batch), batch).mean().backward()
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(False)

    return run


@contextlib.contextmanager
def counted() -> Iterator[Counter]:
    """Count the images of forwards of quantized codecs: "float", "learned" with gradients, "measured"
    without."""
    images: Counter = Counter()

    def watch(module: nn.Module, inputs: tuple) -> None:
        if isinstance(module, QuantModel):
            quantized = all(node.quantized for node in module.nodes.values())
            kind = ("learned" if torch.is_grad_enabled() else "measured") if quantized else "float"
            images[kind] += len(inputs[0])

    hook = nn.modules.module.register_module_forward_pre_hook(watch)
    try:
        yield images
    finally:
        hook.remove()


@contextlib.contextmanager
def parts_of_gptq() -> Iterator[dict[str, float]]:
    """Collect the seconds of "products", whose positions are as many whatever the number of images, and of
    "factorization", all behind the moments."""
    times = {"products": 0.0, "factorization": 0.0}
    places = (gptq._Moment, "_add", "products"), (gptq, "_start_rounding", "factorization")
    functions = [getattr(place, name) for place, name, _ in places]

    def timed(function: Callable, part: str) -> Callable:
        def run(*args: Any) -> None:
            started = time.process_time()
            function(*args)
            times[part] += time.process_time() - started

        return run

    for (place, name, part), function in zip(places, functions):
        setattr(place, name, timed(function, part))
    try:
        yield times
    finally:
        for (place, name, _), function in zip(places, functions):
            setattr(place, name, function)


def measure(arch: str, configuration: str | None, width: float, crop: int, sample: int, knobs: dict) -> dict:
    """The ratios, and the seconds behind them; `calibration_seconds` is extrapolated."""
    seed_everything(0)
    model, sizes = make_codec(arch, configuration, width)
    crops, objective = random_images(sample, crop), Objective(0.01)
    config = PtqConfig.from_preset(**knobs)
    run = Calibration(model, crops, config, objective, progress=False)
    batch = run.batches[0]

    with torch.no_grad():
        forward = seconds(lambda: model(batch), REPEAT) / len(batch)
        single = seconds(lambda: model(batch[:1]), REPEAT)
    step = seconds(step_of(model, batch, objective, list(model.parameters())), REPEAT) / len(batch)
    result: dict[str, Any] = {"arch": arch, "sizes": sizes, "crop": crop, "sample": sample}
    result |= {"float_forward": forward, "float_step": step, "float_forward_alone": single}

    times: dict[str, float] = {}
    images: dict[str, Counter] = {}
    with parts_of_gptq() as of_gptq:
        for part in PREPARATION:
            if part.applies(run.config):
                with counted() as seen:
                    times[part.name] = times.get(part.name, 0.0) + seconds(
                        lambda part=part: run_steps(run, [part])
                    )
                images.setdefault(part.name, Counter()).update(seen)
    result |= {"seconds_of_sample": times, "parts_of_gptq": of_gptq}

    qmodel = run.qmodel
    qmodel.quantize_nodes(True)
    knob = PtqConfig.from_preset(**knobs).reconstruction
    passes = -(-knob.measured // len(batch))
    # as learning measures J: parameters stay over all measured batches
    with torch.no_grad():
        quant_forward = seconds(lambda: measure_pass(qmodel, batch, passes), REPEAT) / (len(batch) * passes)
    parameters = [p for key, p in learned(qmodel.nodes).items() if knob_of(key) in run.knobs.learn]
    with unchanged.constants():
        quant_step = seconds(step_of(qmodel, batch, objective, parameters), REPEAT) / len(batch)
    with counted() as learning:
        run.config = PtqConfig.from_preset(**knobs | {"joint_iters": 6})  # measures as often as with 40
        run_steps(run, LEARNING)
    result |= {"quantized_forward": quant_forward, "quantized_step": quant_step}

    observed = images["observing"].total()
    result["forward_ratio"] = quant_forward / forward
    result["step_ratio"] = quant_step / step
    result["observing_ratio"] = times["observing"] / (observed * forward)
    # a default calibration: 80 crops
    whole = Calibration(model, crops[:1].expand(80, -1, -1, -1), config, objective, progress=False)
    flat = sum(map(len, whole.flat_batches))
    compensated = times.get("compensating rounding", 0.0)
    shown = images.get("compensating rounding", Counter()).total()
    turned = 4 if sample < knob.observed else 1
    shown_then = shown - turned * sum(map(len, run.observed_batches)) + knob.observed
    moments = of_gptq["products"]
    if shown:
        moments += (compensated - sum(of_gptq.values())) * shown_then / shown
        result["gptq_ratio"] = moments / (shown_then * forward)
    else:
        result["gptq_ratio"] = 0.0
    result["factorization_forwards"] = of_gptq["factorization"] / single
    result["split_balance_seconds"] = times["splitting and balancing"]
    extrapolated = {
        "observing": times["observing"] / observed * (knob.observed + 4 * knob.measured * knob.stress + flat),
        "measuring sensitivities": times["measuring sensitivities"] / sample * knob.measured,
        "splitting and balancing": times["splitting and balancing"],
        "compensating rounding": of_gptq["factorization"] + moments,
        # each crop in float once, and one batch for the order of the layers
        "learning": forward * (80 + learning["float"] - sample)
        + quant_forward * learning["measured"] / sample * knob.measured
        + quant_step * knob.joint_iters * knob.batch,
    }
    result |= {
        "seconds_by_step": extrapolated,
        "calibration_seconds": sum(extrapolated.values()),
        "calibration_forwards": sum(extrapolated.values()) / single,
        "whole": "extrapolated",
        "parameters": sum(p.numel() for p in model.parameters()),
        "peak_memory_mb": peak_memory_mb("cpu"),
        "images_of_learning": dict(learning),
    }
    return result


def calibrate(arch: str, configuration: str | None, width: float, crops: int, crop: int, knobs: dict) -> dict:
    """The times of a complete calibration, and its memory."""
    seed_everything(0)
    model, _ = make_codec(arch, configuration, width)
    images = random_images(crops, crop)
    started = time.process_time()
    history = quantize(model, images, PtqConfig.from_preset(**knobs), lmbda=0.01).history
    return {
        "seconds_by_step": history["seconds_by_step"],
        "calibration_seconds": time.process_time() - started,
        "whole": f"measured, {crops} crops",
        "peak_memory_mb": history["peak_memory_mb"],
    }


def one_width(arguments: Any, width: float, knobs: dict) -> dict:
    """What is measured of one width."""
    set_threads(arguments.threads)
    configuration = None if arguments.configuration == "official" else arguments.configuration
    result = measure(arguments.arch, configuration, width, arguments.crop, arguments.sample, knobs)
    if not arguments.extrapolate:
        result |= calibrate(arguments.arch, configuration, width, arguments.crops, arguments.crop, knobs)
        result["calibration_forwards"] = result["calibration_seconds"] / result["float_forward_alone"]
    return result


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--arch", default="lu2022")
    parser.add_argument(
        "--configuration",
        default="reference",
        help="channels: reference, the embedded ones, or official, the paper's of the lowest quality "
        "(default: reference)",
    )
    parser.add_argument(
        "--width", nargs="+", type=float, default=[1.0], help="factors on the channels (default: 1)"
    )
    parser.add_argument(
        "--crops", type=options.positive, default=80, help="(default: 80, ten images with eight crops each)"
    )
    parser.add_argument("--crop", type=options.positive, default=256)
    parser.add_argument(
        "--sample", type=options.positive, default=4, help="crops for the ratios (default: 4)"
    )
    parser.add_argument(
        "--extrapolate", action="store_true", help="no complete calibration: its time from the parts'"
    )
    parser.add_argument(
        "--set", dest="knobs", metavar="KNOB=VALUE", type=options.assignment, action="append", default=[]
    )
    parser.add_argument("--threads", type=options.threads, default=1)
    parser.add_argument("--json", metavar="FILE", help="write all figures to this file")
    arguments = parser.parse_args()
    knobs = parse_knobs(arguments.knobs, {})
    PtqConfig.from_preset(**knobs)
    results = []
    # a new process each, because the peak of memory is that of a process
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for width in arguments.width:
            results.append(pool.apply(one_width, (arguments, width, knobs)))
            print_result(results[-1])
    print(f"\n{arguments.arch}, crops of {arguments.crop} pixels, {arguments.threads} thread(s)\n")
    names = list(results[0]["seconds_by_step"])
    header = ["channels", "parameters", *names, "in all", "which is", "peak memory"]
    rows = [
        [
            ", ".join(f"{name}={size}" for name, size in result["sizes"].items()),
            f"{result['parameters'] / 1e6:.2f} M",
            *(f"{result['seconds_by_step'][name]:.0f} s" for name in names),
            f"{result['calibration_seconds'] / 60:.1f} min",
            result["whole"],
            f"{result['peak_memory_mb']:.0f} MB",
        ]
        for result in results
    ]
    print(tabulate(rows, headers=header, tablefmt="github", disable_numparse=True))
    if arguments.json:
        write_json(arguments.json, results)


def print_result(result: dict) -> None:
    sizes = ", ".join(f"{name}={size}" for name, size in result["sizes"].items())
    print(f"{result['arch']} {sizes}, seconds of processor time for one crop:")
    for kind in ("forward", "step"):
        pair = result[f"float_{kind}"], result[f"quantized_{kind}"]
        print(f"  {kind}: float {pair[0]:.2f}, quantized {pair[1]:.2f}")
    for name in RATIOS:
        print(f"  {name}: {result[name]:.2f}")
    print(f"  (the whole calibration is {result['whole']})", flush=True)


if __name__ == "__main__":
    sys.exit(main_guard(main))
