"""How long a calibration takes and how much memory it needs, and how both grow with a codec's width.

    python benchmarks/calibration.py --arch lu2022 --width 1 1.5 2

For each width, a complete calibration with the default settings runs in a new process. Widths multiply the
channels of the reference configuration. Weights and images are random; time and memory do not depend on them.
"""

import multiprocessing
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, whatever is installed

import torch
from tabulate import tabulate

from licq.models.registry import create_model, get_architecture
from licq.reconstruction.api import quantize
from licq.reconstruction.config import PtqConfig, parse_knobs
from licq.support import options
from licq.support.cli import ArgumentParser, main_guard
from licq.support.determinism import seed_everything, set_threads


def calibrate(arch: str, width: float, crops: int, crop: int, threads: int, knobs: dict) -> dict:
    """The history of a calibration, the number of the codec's parameters, and its sizes."""
    set_threads(threads)
    seed_everything(0)
    sizes = get_architecture(arch).sizes(None, "reference")
    wider = {name: round(width * size) for name, size in sizes.items() if name in ("N", "M")}
    model = create_model(arch, configuration="reference", **wider).eval()
    images = torch.nn.functional.interpolate(
        torch.rand(crops, 3, 16, 16), size=(crop, crop), mode="bicubic"
    ).clamp(0, 1)
    history = quantize(
        model, (images * 255).round() / 255, PtqConfig.from_preset(**knobs), lmbda=0.01
    ).history
    return history | {"parameters": sum(p.numel() for p in model.parameters()), "sizes": wider}


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--arch", default="lu2022")
    parser.add_argument(
        "--width",
        nargs="+",
        type=float,
        default=[1.0, 1.5, 2.0],
        help="factors on the channels (default: 1 1.5 2)",
    )
    parser.add_argument(
        "--crops", type=options.positive, default=80, help="(default: 80, ten images with eight crops each)"
    )
    parser.add_argument("--crop", type=options.positive, default=256)
    parser.add_argument(
        "--set", dest="knobs", metavar="KNOB=VALUE", type=options.assignment, action="append", default=[]
    )
    parser.add_argument("--threads", type=options.threads, default=1)
    arguments = parser.parse_args()
    knobs = parse_knobs(arguments.knobs, {})
    PtqConfig.from_preset(**knobs)
    rows = []
    # a new process each, because the peak of memory is that of a process
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for width in arguments.width:
            result = pool.apply(
                calibrate, (arguments.arch, width, arguments.crops, arguments.crop, arguments.threads, knobs)
            )
            seconds_of_steps = result["seconds_by_step"]
            rows.append(
                [
                    ", ".join(f"{name}={size}" for name, size in result["sizes"].items()),
                    f"{result['parameters'] / 1e6:.2f} M",
                    *(f"{seconds:.0f} s" for seconds in seconds_of_steps.values()),
                    f"{result['seconds'] / 60:.1f} min",
                    f"{result['peak_memory_mb']:.0f} MB",
                ]
            )
            print(f"{rows[-1][0]}: {rows[-1][-2]}, {rows[-1][-1]}", file=sys.stderr, flush=True)
    header = ["channels", "parameters", *seconds_of_steps, "in all", "peak memory"]
    size = f"{arguments.crops} crops of {arguments.crop} pixels, {arguments.threads} thread(s)"
    print(f"{arguments.arch}, {size}\n")
    print(tabulate(rows, headers=header, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    sys.exit(main_guard(main))
