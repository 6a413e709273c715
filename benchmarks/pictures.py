"""Flat and drawn pictures through quantized codecs: rate and PSNR beside those of the float codec.

python main_ptq.py --arch minnen2018 --quality 5 --preset nearest --eval photos --out runs/nearest
python benchmarks/pictures.py runs/nearest [RUN ...] [--json FILE]
python benchmarks/pictures.py --draw FOLDER         # only write the pictures, as PNG files

Photographs are what codecs are calibrated on. Documents, slides and screenshots are what people also
compress: they are flat, saturated, and reach values that no photograph has. A picture is held where the rate
is at most 1.2 times that of the float codec and 0.002 bits per pixel, and its PSNR is within 0.5 dB, or above
50 dB.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, whatever is installed

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tabulate import tabulate

from licq.evaluation.evaluate import ImageResult, evaluate
from licq.models.checkpoints import load_checkpoint
from licq.quant.model import QuantModel
from licq.runs.saved_models import find_models, read_header
from licq.support import options
from licq.support.cli import ArgumentParser, main_guard
from licq.support.determinism import set_threads
from licq.support.errors import InputError

SIZE = 384, 512
"""Height and width of the pictures."""
MAX_FACTOR, MAX_BPP, MAX_DB, ENOUGH_DB = 1.2, 0.002, 0.5, 50.0

_WORDS = (
    "the rate of a codec is what remains of a picture when all that can be foretold is taken away "
    "quantization keeps integers where there were real numbers and asks how few of them are enough"
).split()
_COLOURS = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "grey": (128, 128, 128),
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
}


def _flat(colour: tuple[int, int, int]) -> np.ndarray:
    return np.full((*SIZE, 3), colour, dtype=np.uint8)


def _gradient(first: tuple[int, int, int], last: tuple[int, int, int], axis: int) -> np.ndarray:
    share = np.linspace(0, 1, SIZE[axis]).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
    ramp = np.asarray(first) + share * (np.asarray(last) - np.asarray(first))
    return np.broadcast_to(np.round(ramp), (*SIZE, 3)).astype(np.uint8)


def _scan(draw: np.random.Generator) -> np.ndarray:
    """Paper: nearly white, with the mild noise of a scanner."""
    noise = draw.normal(0, 1.5, (*SIZE, 1)) + draw.normal(0, 0.7, (*SIZE, 3))
    return np.clip(np.round(np.asarray((250, 249, 245)) + noise), 0, 255).astype(np.uint8)


def _lines(
    draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], size: int, ink: tuple, start: int
) -> None:
    """Lines of words in a box (left, top, right, bottom)."""
    left, top, right, bottom = box
    font, word = ImageFont.load_default(size), start
    for y in range(top, bottom - size, size + size // 2):
        x = left
        while True:
            text = _WORDS[word % len(_WORDS)] + " "
            length = draw.textlength(text, font)
            if x + length > right:
                break
            draw.text((x, y), text, ink, font)
            x, word = x + round(length), word + 1


def _page() -> np.ndarray:
    """A page: black text on white."""
    image = Image.new("RGB", SIZE[::-1], (255, 255, 255))
    draw = ImageDraw.Draw(image)
    _lines(draw, (40, 30, SIZE[1] - 40, 70), 22, (0, 0, 0), 3)
    _lines(draw, (40, 80, SIZE[1] - 40, SIZE[0] - 110), 12, (0, 0, 0), 0)
    return np.asarray(image)


def _slide() -> np.ndarray:
    """A slide: large white text and a chart on saturated blue."""
    image = Image.new("RGB", SIZE[::-1], (0, 40, 160))
    draw = ImageDraw.Draw(image)
    _lines(draw, (30, 30, SIZE[1] - 30, 120), 28, (255, 255, 255), 5)
    for index, colour in enumerate([(255, 200, 0), (230, 0, 0), (0, 200, 80), (255, 255, 255)]):
        draw.rectangle((60 + 100 * index, 330 - 45 * (index + 1), 120 + 100 * index, 330), colour)
    return np.asarray(image)


def _screenshot() -> np.ndarray:
    """A desktop: a dark bar, a window of text, a coloured side bar and buttons."""
    image = Image.new("RGB", SIZE[::-1], (236, 236, 240))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, SIZE[1], 24), (40, 44, 52))
    _lines(draw, (8, 4, 300, 26), 12, (255, 255, 255), 8)
    draw.rectangle((0, 24, 120, SIZE[0]), (0, 120, 215))
    _lines(draw, (10, 40, 118, 200), 11, (255, 255, 255), 2)
    draw.rectangle((140, 50, SIZE[1] - 20, SIZE[0] - 40), (255, 255, 255), (120, 120, 120))
    _lines(draw, (150, 60, SIZE[1] - 30, 250), 11, (20, 20, 20), 0)
    for index, colour in enumerate([(220, 0, 40), (0, 160, 60), (250, 200, 0)]):
        draw.rounded_rectangle((160 + 90 * index, 280, 235 + 90 * index, 310), 6, colour)
    return np.asarray(image)


def pictures() -> dict[str, np.ndarray]:
    """All pictures by name, uint8 (H, W, 3). The same numbers each time; the text is in Pillow's own font."""
    draw = np.random.default_rng(0)
    return {
        **{name: _flat(colour) for name, colour in _COLOURS.items()},
        "gradient": _gradient((0, 0, 0), (255, 255, 255), 1),
        "sky": _gradient((0, 60, 255), (255, 255, 255), 0),
        "sunset": _gradient((255, 0, 0), (255, 255, 0), 1),
        "scan": _scan(draw),
        "page": _page(),
        "slide": _slide(),
        "screenshot": _screenshot(),
    }


def is_held(before: ImageResult, after: ImageResult) -> bool:
    """Whether the quantized codec holds a picture, as this file's first lines say."""
    rate = after.bpp_estimated <= MAX_FACTOR * before.bpp_estimated + MAX_BPP
    return rate and (after.psnr >= before.psnr - MAX_DB or after.psnr > ENOUGH_DB)


def measure(file: Path) -> dict:
    """The pictures through a quantized codec of main_ptq.py and through the float codec it was made from."""
    header = read_header(file)
    if "rates" in header:
        raise InputError(f"{file}: a variable-rate codec; give a codec of one rate")
    names, images = zip(*pictures().items())
    tensors = [torch.from_numpy(image.copy()).permute(2, 0, 1) / 255 for image in images]
    network = load_checkpoint(header["checkpoint"]["path"], header["arch"])
    before, after = (
        evaluate(model, tensors, name=f"{len(names)} pictures", real=False).per_image
        for model in (network, QuantModel.load(file))
    )
    return {
        "model": str(file),
        **{key: header[key] for key in ("arch", "quality", "preset")},
        "pictures": {
            name: {
                "bpp": [one.bpp_estimated, other.bpp_estimated],
                "psnr": [min(one.psnr, 99.0), min(other.psnr, 99.0)],
                "held": is_held(one, other),
            }
            for name, one, other in zip(names, before, after, strict=True)
        },
    }


def table(result: dict) -> str:
    """One codec's pictures."""
    rows = [
        [name, *(f"{bpp:.4f}" for bpp in one["bpp"]), *(f"{psnr:.1f}" for psnr in one["psnr"])]
        + ["yes" if one["held"] else "no"]
        for name, one in result["pictures"].items()
    ]
    header = ["picture", "float bpp", "quantized bpp", "float PSNR", "quantized PSNR", "held"]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("models", metavar="RUN", nargs="*", help="folders of main_ptq.py, or model files")
    parser.add_argument("--draw", metavar="FOLDER", type=Path, help="write the pictures as PNG files")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the numbers too")
    parser.add_argument("--threads", metavar="N", type=options.threads, default=1, help="default: 1")
    args = parser.parse_args()
    if not args.models and args.draw is None:
        raise InputError("nothing to do; give a folder of main_ptq.py, or --draw FOLDER")
    set_threads(args.threads)
    if args.draw is not None:
        args.draw.mkdir(parents=True, exist_ok=True)
        for name, image in pictures().items():
            Image.fromarray(image).save(args.draw / f"{name}.png")
    results = [measure(file) for file in find_models(args.models, None)]
    for result in results:
        held = sum(one["held"] for one in result["pictures"].values())
        worst = max(one["bpp"][1] / max(one["bpp"][0], 1e-3) for one in result["pictures"].values())
        drop = max(one["psnr"][0] - one["psnr"][1] for one in result["pictures"].values())
        print(
            f"{result['arch']} quality {result['quality']}, {result['preset']}: {held} of "
            f"{len(result['pictures'])} held; rate at most x{worst:.2f}, PSNR at most {drop:.1f} dB lower"
        )
        print(table(result), end="\n\n")
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main_guard(main))
