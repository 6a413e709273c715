"""R-D curves of classical codecs, from the bytes that Pillow writes."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, features

from data.images import load_pixels
from evaluation.metrics import ms_ssim, psnr
from support.errors import InputError
from support.progress import progress as progress_bar

QUALITIES = {"jpeg": (5, 10, 20, 30, 45, 60, 75, 85, 92), "webp": (1, 10, 25, 45, 65, 80, 90)}


def anchor_curve(paths: Sequence[Path], codec: str = "jpeg", qualities: Sequence[int] | None = None,
                 with_ms_ssim: bool = False, progress: bool = False, **options) -> list[dict]:
    """R-D points of Pillow's `codec` ("jpeg" or "webp"), means over the images, one a quality setting.

    Bytes are those of the whole file, headers included, metadata left out. Pillow's defaults otherwise: JPEG is
    baseline 4:2:0 with the standard Huffman tables; `options` (e.g. subsampling="4:4:4", optimize=True) go to
    Pillow's `save`.

    Returns:
        [{"quality", "bpp", "psnr", "ms_ssim"}] by rising quality; ms_ssim is None unless asked for (it takes most of
        the time).

    Raises:
        InputError: no images, or a Pillow without that codec.
    """
    if codec not in QUALITIES:
        raise ValueError(f"codec is {codec!r}; choose jpeg or webp")
    if not features.check("jpg" if codec == "jpeg" else codec):
        raise InputError(f"this Pillow has no {codec}; install a Pillow wheel from PyPI")
    if not paths:
        raise InputError(f"no images for the {codec} curve")
    qualities = sorted(qualities or QUALITIES[codec])
    points = np.zeros((len(qualities), len(paths), 3))
    for column, path in enumerate(progress_bar(paths, desc=codec.upper(), unit="image", enabled=progress, leave=False)):
        pixels = load_pixels(path)
        image = Image.fromarray(pixels)
        original = _tensor(pixels)
        for row, quality in enumerate(qualities):
            coded = io.BytesIO()
            image.save(coded, format=codec, quality=quality, **options)
            decoded = _tensor(np.array(Image.open(coded).convert("RGB")))
            similarity = ms_ssim(original, decoded) if with_ms_ssim else None
            points[row, column] = (8 * coded.tell() / (image.width * image.height), psnr(original, decoded),
                                   np.nan if similarity is None else similarity)
    return [{"quality": int(quality), "bpp": float(row[:, 0].mean()), "psnr": float(row[:, 1].mean()),
             "ms_ssim": _mean_of_known(row[:, 2])} for quality, row in zip(qualities, points)]


def _mean_of_known(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None


def _tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1).to(torch.float32).div_(255.0)
