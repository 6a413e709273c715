"""Where quantization shows most: a part of an image, of the float and of the quantized codec, and their
difference amplified."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from licq.data.images import load_pixels
from licq.evaluation.evaluate import Report, decoded_pixels
from licq.support.files import atomic_path

SIDE = 160  # pixels
PANELS = ("original", "float", "quantized", "difference")
_MOST = 64  # amplification


def save_crops(out: Path, quality: float, **what) -> dict:
    """`make_crops`, with the picture written below `out`."""
    where, picture = make_crops(quality, **what)
    save_picture(out / where["file"], picture)
    return where


def make_crops(
    quality: float,
    *,
    codecs: tuple[nn.Module, nn.Module],
    reports: tuple[Report, Report],
    paths: Sequence[Path],
    lmbda: float | None,
    metric: str,
    pad: int,
    device: torch.device,
) -> tuple[dict, Image.Image]:
    """`PANELS` side by side, of the image whose J (without lambda: squared error) rises most, and where they
    are from.

    Args:
        codecs, reports: the float codec and the quantized one, and what `evaluate` found for them on `paths`.
        pad, device: as for `evaluate`; both codecs are run once more, on that image.

    Returns:
        {"file": the picture's path in a run's folder, "index", "image": its name, "left", "top",
        "width", "height": where in it, in pixels, "amplified": the factor of the difference}, and the
        picture.
    """
    index = _most_changed(*reports, lmbda, metric)
    before, after = (decoded_pixels(codec, paths[index], pad, device).permute(1, 2, 0) for codec in codecs)
    difference = (after - before).abs()
    top, left, height, width = busiest_window(difference.square().sum(2), SIDE)
    part = (slice(top, top + height), slice(left, left + width))
    factor = _amplification(difference[part])
    original = torch.from_numpy(load_pixels(paths[index])).float()
    panels = [original[part], before[part], after[part], (factor * difference[part]).clamp(max=255)]
    where = {
        "file": f"q{quality}/crops.png",
        "index": index,
        "image": paths[index].name,
        "left": left,
        "top": top,
        "width": width,
        "height": height,
        "amplified": factor,
    }
    return where, Image.fromarray(torch.cat(panels, 1).to(torch.uint8).numpy())


def save_picture(path: Path, picture: Image.Image) -> None:
    with atomic_path(path) as temporary:
        picture.save(temporary)


def split_panels(path: Path) -> list[Image.Image]:
    """The pictures that `make_crops` put side by side, in the order of `PANELS`."""
    with Image.open(path) as strip:
        width = strip.width // len(PANELS)
        return [
            strip.crop((number * width, 0, (number + 1) * width, strip.height))
            for number in range(len(PANELS))
        ]


def busiest_window(energy: Tensor, side: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the square with the largest sum of `energy` (H, W), integers; cut
    where the image is smaller."""
    height, width = (min(side, length) for length in energy.shape)
    sums = np.pad(energy.numpy().astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    totals = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
    top, left = np.unravel_index(totals.argmax(), totals.shape)
    return int(top), int(left), height, width


def _most_changed(fp32: Report, quant: Report, lmbda: float | None, metric: str) -> int:
    def cost(image) -> float:
        return image.mse if lmbda is None else image.cost(lmbda, metric)

    rises = [
        cost(after) / (cost(before) or 1.0)
        for before, after in zip(fp32.per_image, quant.per_image, strict=True)
    ]
    return int(np.argmax(rises))


def _amplification(difference: Tensor) -> int:
    """The largest power of two, at most 64, that leaves all but a thousandth of the samples below white."""
    large = float(np.quantile(difference.numpy(), 0.999))
    factor = 1
    while 2 * factor * large <= 255 and factor < _MOST:
        factor *= 2
    return factor
