"""The best PSNR of a linear transform of image blocks to a few numbers, without any rounding.

    python benchmarks/linear_bound.py --data kodak --channels 36,64,80,96

The transform is the principal components of the images' own 16x16 blocks. It is a bound for linear block
transforms, and a measure for small codecs, whose latents have one position for each such block.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, whatever is installed

import numpy as np
from tabulate import tabulate

from licq.data.images import load_pixels
from licq.runs.inputs import evaluation_set
from licq.support import options
from licq.support.cli import ArgumentParser, main_guard

SIDE = 16


def blocks(pixels: np.ndarray) -> np.ndarray:
    """The blocks (count, 768) of an image (H, W, 3); pixels that fill no block are left out."""
    rows, columns = (side // SIDE for side in pixels.shape[:2])
    cut = pixels[: rows * SIDE, : columns * SIDE].astype(float)
    return cut.reshape(rows, SIDE, columns, SIDE, 3).swapaxes(1, 2).reshape(rows * columns, -1)


def bound(images: list[np.ndarray], channels: int) -> float:
    """The mean PSNR in dB, from the blocks of each image."""
    together = np.concatenate(images)
    mean = together.mean(0)
    basis = np.linalg.eigh(np.cov((together - mean).T))[1][:, -channels:]
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
