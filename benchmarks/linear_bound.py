"""How well a linear transform of image blocks to a few numbers can do: the PSNR that the number of latent
channels allows.

    python benchmarks/linear_bound.py --data kodak --channels 36,64,80,96

Principal components of the images' own 16x16 blocks, nothing rounded, no rate: a bound for linear block
transforms, and a yardstick for the latents of small codecs, of which one position stands for such a block.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from tabulate import tabulate

from licq.data.images import load_pixels
from licq.runs.inputs import evaluation_set
from licq.support import options
from licq.support.cli import ArgumentParser, main_guard

SIDE = 16


def blocks(pixels: np.ndarray) -> np.ndarray:
    """(count, 768) of an image (H, W, 3); what fills no block is left out."""
    rows, columns = (side // SIDE for side in pixels.shape[:2])
    cut = pixels[: rows * SIDE, : columns * SIDE].astype(float)
    return cut.reshape(rows, SIDE, columns, SIDE, 3).swapaxes(1, 2).reshape(rows * columns, -1)


def bound(images: list[np.ndarray], channels: int) -> float:
    """Mean PSNR in dB."""
    every = np.concatenate(images)
    mean = every.mean(0)
    basis = np.linalg.eigh(np.cov((every - mean).T))[1][:, -channels:]
    errors = [((part - mean) - (part - mean) @ basis @ basis.T) for part in images]
    return float(np.mean([10 * np.log10(255**2 / np.square(error).mean()) for error in errors]))


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", metavar="SET", help="images (default: as in evaluation)")
    parser.add_argument(
        "--channels",
        metavar="N",
        type=options.reductions,
        default=[36, 64, 80, 96],
        help="separated by commas (default: 36,64,80,96)",
    )
    args = parser.parse_args()
    images = [blocks(load_pixels(path)) for path in evaluation_set(args.data)[0].paths]
    print(
        tabulate(
            [[count, f"{bound(images, count):.2f} dB"] for count in args.channels],
            ["channels", "PSNR"],
            tablefmt="github",
            disable_numparse=True,
        )
    )


if __name__ == "__main__":
    sys.exit(main_guard(main))
