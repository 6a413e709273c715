"""Three roundings of the latent of an autoregressive codec: what each costs in bits, and what image it gives.

python benchmarks/latent_rounding.py --arch minnen2018 --quality 1,5 --data kodak --every 5 --images 4

estimate   CompressAI's: the bits are those of round(y - means), the image is made of round(y)
whole      the bits are those of round(y), and the image is made of it
serial     y_hat is round(y - means) + means, where means depend on the y_hat before, as in CompressAI's
           coder; computed by iteration
"""

import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, whatever is installed

import torch
from tabulate import tabulate
from torch import Tensor

from licq.data.images import load_image
from licq.runs.float_models import find_float_models
from licq.runs.inputs import evaluation_set
from licq.support import options
from licq.support.cli import ArgumentParser, main_guard
from licq.support.determinism import set_threads
from licq.support.errors import InputError
from licq.support.progress import progress

_MAX_ITERATIONS = 200


def psnr(a: Tensor, b: Tensor) -> float:
    """In dB, of images in 0..1."""
    return -10 * math.log10(float((a.clamp(0, 1) - b).square().mean()))


@torch.no_grad()
def measure(model: Any, x: Tensor) -> list[float]:
    """[bits per pixel of y: estimate, whole, serial; PSNR: whole, serial] of an image (1, 3, H, W)."""
    y = model.g_a(x)
    params = model.h_s(model.entropy_bottleneck(model.h_a(y))[0])
    gaussian = model.gaussian_conditional

    def parameters(y_hat: Tensor) -> tuple[Tensor, Tensor]:
        scales, means = model.entropy_parameters(
            torch.cat((params, model.context_prediction(y_hat)), 1)
        ).chunk(2, 1)
        return scales, means

    def bits(symbols: Tensor, scales: Tensor, means: Tensor | None = None) -> float:
        likelihood = gaussian.likelihood_lower_bound(gaussian._likelihood(symbols, scales, means))
        return float(-likelihood.log2().sum()) / (x.shape[2] * x.shape[3])

    rounded = y.round()
    scales, means = parameters(rounded)
    serial = rounded
    for _ in range(_MAX_ITERATIONS):
        serial_scales, serial_means = parameters(serial)
        following = (y - serial_means).round() + serial_means
        if torch.equal(following, serial):
            break
        serial = following
    return [
        bits((y - means).round(), scales),
        bits(rounded, scales, means),
        bits((y - serial_means).round(), serial_scales),
        psnr(model.g_s(rounded), x),
        psnr(model.g_s(serial), x),
    ]


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--arch", default="minnen2018", help="default: minnen2018")
    parser.add_argument("--quality", metavar="Q", type=options.qualities, default=None, help="default: all")
    parser.add_argument("--data", metavar="SET", help="images (default: as in evaluation)")
    parser.add_argument(
        "--every", metavar="N", type=options.positive, default=1, help="take every Nth of them (default: 1)"
    )
    parser.add_argument("--images", metavar="N", type=options.positive, help="so many (default: all)")
    parser.add_argument(
        "--side",
        metavar="PX",
        type=options.positive,
        default=512,
        help="at most so much of each side, a multiple of 64 (default: 512)",
    )
    parser.add_argument(
        "--threads", metavar="N", type=options.threads, help="CPU threads (default: PyTorch's choice)"
    )
    args = parser.parse_args()
    set_threads(args.threads)
    paths = evaluation_set(args.data)[0].paths[:: args.every][: args.images]
    rows = []
    for source in find_float_models(args.arch, args.quality):
        model = source.load()
        if not hasattr(model, "context_prediction") or hasattr(model, "Gain"):
            raise InputError(
                f"`arch` {args.arch} has no context model of this kind; choose minnen2018, cheng2020 or one "
                "like them"
            )
        measures = []
        for path in progress(paths, desc=f"{args.arch} quality {source.quality}", unit="image"):
            x = load_image(path)[None]
            height, width = (min(side, args.side) // 64 * 64 for side in x.shape[2:])
            measures.append(torch.tensor(measure(model, x[:, :, :height, :width])))
        estimate, whole, serial, first, second = torch.stack(measures).mean(0).tolist()
        rows.append(
            [
                args.arch,
                source.quality,
                f"{estimate:.4f}, {first:.3f} dB",
                f"{whole:.4f}, {first:.3f} dB",
                f"{serial:.4f}, {second:.3f} dB",
            ]
        )
    print(
        tabulate(
            rows,
            ["codec", "quality", "estimate", "whole", "serial"],
            tablefmt="github",
            disable_numparse=True,
        )
    )


if __name__ == "__main__":
    sys.exit(main_guard(main))
