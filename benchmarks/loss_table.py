"""Reconstruction losses at equal budget, as a Markdown table: bits x losses x seeds of one codec.

    LICQ_DATA=... python benchmarks/loss_table.py --arch lu2022 --quality 3 --bits 8,8 6,6 4,8 --losses rd mse

The measure is the rise of J = R + lambda * D against the float codec, in percent of its mean, on the middle
256 x 256 pixels of each image: much faster than complete images, and enough to rank losses. Finished runs are
stored in --out and not repeated. --set changes further settings, as in main_ptq.py.
"""

import argparse
import hashlib
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, whatever is installed

import torch
from tabulate import tabulate
from torch import Tensor

from licq.data.datasets import Dataset
from licq.data.images import load_image
from licq.models.registry import get_architecture
from licq.reconstruction.api import quantize
from licq.reconstruction.config import PtqConfig, parse_knobs
from licq.reconstruction.objective import Objective, rate
from licq.runs.float_models import find_float_models
from licq.runs.inputs import calibration_images, evaluation_set
from licq.support import options
from licq.support.cli import ArgumentParser, main_guard
from licq.support.determinism import seed_everything, set_threads
from licq.support.errors import InputError
from licq.support.files import write_json
from licq.support.version import __version__

SIDE = 256


def centres(dataset: Dataset) -> list[Tensor]:
    """The middle of each image of a data set, (1, 3, SIDE, SIDE)."""
    crops = []
    for path in dataset.paths:
        image = load_image(path)
        if min(image.shape[1:]) < SIDE:
            raise InputError(f"{path}: smaller than {SIDE} x {SIDE} pixels; choose other images with --eval")
        top, left = ((size - SIDE) // 2 for size in image.shape[1:])
        crops.append(image[None, :, top : top + SIDE, left : left + SIDE])
    return crops


@torch.no_grad()
def measure(model: torch.nn.Module, crops: list[Tensor], objective: Objective) -> dict[str, float]:
    """Means over the crops: J, bits per pixel, PSNR in dB on 8-bit pixels."""
    rates, distortions, psnr = [], [], []
    for x in crops:
        output = model(x)
        pixels = {"x_hat": (output["x_hat"].clamp(0, 1) * 255).round() / 255}
        rates.append(float(rate(output, x)))
        distortions.append(float(objective.distortion(pixels, x)))
        psnr.append(float(-10 * torch.log10((pixels["x_hat"] - x).square().mean())))
    return {
        "j": statistics.mean(rates) + statistics.mean(distortions),
        "bpp": statistics.mean(rates),
        "psnr": statistics.mean(psnr),
    }


def bit_pair(text: str) -> tuple[int, int]:
    """w_bits,a_bits."""
    words = text.split(",")
    if len(words) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form w_bits,a_bits, e.g. 4,8")
    return options.bits(words[0]), options.bits(words[1])


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--arch", default="lu2022")
    parser.add_argument("--checkpoint", type=options.existing_or_pattern)
    parser.add_argument("--quality", type=int, default=3)
    parser.add_argument(
        "--bits",
        nargs="+",
        type=bit_pair,
        default=[(8, 8), (6, 6), (4, 8)],
        help="w_bits,a_bits (default: 8,8 6,6 4,8)",
    )
    parser.add_argument(
        "--losses", nargs="+", choices=options.LOSSES, default=["rd", "mse"], help="(default: rd mse)"
    )
    parser.add_argument("--seeds", nargs="+", type=options.seed, default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--calib", default="clic")
    parser.add_argument("--num_calib", type=options.positive, default=10)
    parser.add_argument("--crop", type=options.positive, default=256)
    parser.add_argument("--crops_per_image", type=options.positive, default=8)
    parser.add_argument("--crop_reductions", type=options.reductions, default=[1, 2])
    parser.add_argument("--eval", dest="data", default="kodak")
    parser.add_argument(
        "--set", dest="knobs", metavar="KNOB=VALUE", type=options.assignment, action="append", default=[]
    )
    parser.add_argument("--threads", type=options.threads, default=1)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/loss_table.json"), help="finished runs (default: %(default)s)"
    )
    arguments = parser.parse_args()
    knobs = parse_knobs(arguments.knobs, {})
    taken = sorted({"w_bits", "a_bits", "loss", "seed"} & knobs.keys())
    if taken:
        raise InputError(f"--set {taken[0]} is a column of the table; use its own option")
    PtqConfig.from_preset("licq", **knobs)
    set_threads(arguments.threads)
    source = find_float_models(arguments.arch, [arguments.quality], arguments.checkpoint)[0]
    multiple = get_architecture(source.arch).multiple
    dataset, _ = evaluation_set(arguments.data)
    objective, crops = Objective(source.lmbda), centres(dataset)
    model = source.load()
    done = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    budget = (
        f"{arguments.calib} {arguments.num_calib}x{arguments.crops_per_image}x{arguments.crop} "
        f"{arguments.crop_reductions} {sorted(arguments.knobs)}"
    )
    prefix = f"{source.arch} q{source.quality} {source.sha256[:8]} {arguments.data} | {budget}"
    if prefix not in done:
        done[prefix] = measure(model, crops, objective)
    reference = done[prefix]
    rows = []
    for w_bits, a_bits in arguments.bits:
        for loss in arguments.losses:
            rises, results = [], []
            for seed in arguments.seeds:
                config = PtqConfig.from_preset(
                    "licq", **{**knobs, "w_bits": w_bits, "a_bits": a_bits, "loss": loss, "seed": seed}
                )
                settings = hashlib.sha256(
                    json.dumps([__version__, config.to_dict()], sort_keys=True).encode()
                ).hexdigest()[:8]
                key = f"{prefix} {settings} | W{w_bits}A{a_bits} {loss} {seed}"
                if key not in done:
                    seed_everything(seed)
                    calibration, whole, _, _ = calibration_images(
                        arguments.calib,
                        arguments.num_calib,
                        arguments.crop,
                        arguments.crops_per_image,
                        arguments.crop_reductions,
                        seed,
                        multiple,
                        "mse",
                        dataset,
                        config.reconstruction.whole,
                    )
                    codec = quantize(model, calibration, config, lmbda=source.lmbda, whole=whole)
                    history = codec.history
                    done[key] = measure(codec, crops, objective) | {
                        "seconds": history["seconds"],
                        "calibration": {
                            name: history[name] / history["j_float"] - 1 for name in ("j_start", "j_end")
                        },
                    }
                    write_json(arguments.out, done)
                results.append(done[key])
                rises.append(100 * (results[-1]["j"] / reference["j"] - 1))
                print(f"{key.rpartition('| ')[2]}: J {rises[-1]:+.2f}%", flush=True)
            spread = statistics.stdev(rises) if len(rises) > 1 else 0.0
            rate_change = 100 * (statistics.mean(result["bpp"] for result in results) / reference["bpp"] - 1)
            rows.append(
                [
                    f"W{w_bits}A{a_bits}",
                    loss,
                    f"{statistics.mean(rises):+.2f} ± {spread:.2f} %",
                    f"{rate_change:+.2f} %",
                    f"{statistics.mean(result['psnr'] for result in results) - reference['psnr']:+.3f} dB",
                    f"{100 * statistics.mean(result['calibration']['j_start'] for result in results):+.2f} %",
                    f"{100 * statistics.mean(result['calibration']['j_end'] for result in results):+.2f} %",
                    f"{statistics.mean(result['seconds'] for result in results):.0f} s",
                ]
            )
    header = [
        "bits",
        "loss",
        f"delta J, {len(arguments.seeds)} seeds",
        "rate",
        "PSNR",
        "calibration: delta J at start",
        "at end",
        "time",
    ]
    print(f"\n{prefix}\nfloat: {reference['bpp']:.4f} bpp, {reference['psnr']:.3f} dB\n")
    print(tabulate(rows, headers=header, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    sys.exit(main_guard(main, "the same command continues after the last finished run"))
