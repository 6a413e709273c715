"""Bits of files beside the likelihood estimate, image by image, and the part of improbable symbols in it.

    python benchmarks/file_bits.py --model runs/tic --quality 5 --data kodak --images 4

A symbol in the tail of its density is estimated at up to 30 bits (CompressAI bounds likelihoods at 1e-9). In
a file it takes about 16 bits, the smallest frequency of a table, and a few more for the symbol itself. So an
image with many such symbols has a file that is smaller than its estimate.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, whatever is installed

import torch
from tabulate import tabulate

from licq.codec.api import Codec
from licq.data.images import load_pixels
from licq.data.padding import pad_to_multiple
from licq.runs.coding import models_of
from licq.runs.inputs import evaluation_set
from licq.runs.verify import model_at
from licq.support import options
from licq.support.cli import ArgumentParser, main_guard
from licq.support.determinism import set_threads
from licq.support.progress import progress

_IMPROBABLE = 16  # bits


@torch.no_grad()
def measure(codec: Codec, image: torch.Tensor) -> tuple[int, float, int, float]:
    """Bits of an image, uint8 (3, H, W).

    Returns:
        (bits of the file, estimated bits, symbols estimated at more than 16 bits, estimated bits of these).
    """
    file = 8 * len(codec.encode(image))
    padded, _ = pad_to_multiple(image[None].float() / 255, codec.multiple)
    bits = torch.cat(
        [-part.double().log2().flatten() for part in codec.model(padded)["likelihoods"].values()]
    )
    improbable = bits[bits > _IMPROBABLE]
    return file, float(bits.sum()), len(improbable), float(improbable.sum())


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--model",
        metavar="RUN",
        required=True,
        help="a model.safetensors, or the folder of a main_ptq.py run",
    )
    parser.add_argument(
        "--quality", metavar="Q", type=options.positive, help="which model of the folder (default: the first)"
    )
    parser.add_argument(
        "--data", metavar="SET", help="images: a folder or a data set's name (default: as in evaluation)"
    )
    parser.add_argument("--images", metavar="N", type=options.positive, help="so many of them (default: all)")
    parser.add_argument("--threads", metavar="N", type=options.threads, default=1, help="default: 1")
    args = parser.parse_args()
    set_threads(args.threads)
    path, level = model_at(models_of(args.model), args.quality)
    codec = Codec.load(path, args.threads)
    if level is not None:
        network: Any = codec.model.model
        network.set_level(level)
        codec.settle_rate()
    rows = []
    for file in progress(evaluation_set(args.data)[0].paths[: args.images], desc="images", unit="image"):
        bits, estimate, count, improbable = measure(
            codec, torch.from_numpy(load_pixels(file)).permute(2, 0, 1)
        )
        rows.append(
            [
                file.name,
                bits,
                f"{estimate:.0f}",
                f"{100 * (bits / estimate - 1):+.3f} %",
                count,
                f"{improbable:.0f}",
            ]
        )
    print(
        tabulate(
            rows,
            [
                "image",
                "bits of the file",
                "estimate",
                "difference",
                f"symbols above {_IMPROBABLE} bits",
                "their bits, estimated",
            ],
            tablefmt="github",
            disable_numparse=True,
        )
    )


if __name__ == "__main__":
    sys.exit(main_guard(main))
