"""R-D curves to compare with: classical codecs, from the bytes that Pillow writes, and what others
published."""

import contextlib
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, features
from PIL import __version__ as pillow

from licq.data.datasets import Dataset, cache_folder
from licq.data.images import load_pixels
from licq.evaluation.metrics import ms_ssim as similarity_of
from licq.evaluation.metrics import psnr
from licq.support.errors import InputError
from licq.support.files import sha256, write_text
from licq.support.progress import progress as progress_bar

# few for AVIF, which takes ten times as long as JPEG for an image
QUALITIES = {
    "jpeg": (5, 10, 20, 30, 45, 60, 75, 85, 92),
    "webp": (1, 10, 25, 45, 65, 80, 90),
    "avif": (10, 25, 40, 55, 70, 85),
}
NAMES = {"jpeg": "JPEG", "webp": "WebP", "avif": "AVIF"}
SECONDS = {
    "jpeg": 2.5,
    "webp": 2.2,
    "avif": 5.0,
}  # for a million pixels and all settings, about, for the time left
# Pillow's own default is speed 6 too; how many threads encode must not show in the bytes
_OPTIONS = {"avif": {"speed": 6, "max_threads": 1}}


def can_write(codec: str) -> bool:
    """Whether the installed Pillow has that codec."""
    return bool(features.check("jpg" if codec == "jpeg" else codec))


def anchor_points(
    paths: Sequence[Path],
    codec: str = "jpeg",
    qualities: Sequence[int] | None = None,
    with_ms_ssim: bool = False,
    progress: bool = False,
    **options,
) -> np.ndarray:
    """Rate and distortion of a classical codec at several quality settings.

    What was measured of an image is kept in the cache folder, by the image's file, the settings and the
    versions of Pillow and its libraries.

    Bytes are those of the whole file, headers included, metadata left out. Pillow's defaults otherwise: JPEG
    is baseline 4:2:0 with the standard Huffman tables, AVIF 4:2:0 at speed 6 (slower ones gain up to 0.4 dB);
    `options` (e.g. subsampling="4:4:4", optimize=True) go to Pillow's `save`.

    Args:
        codec: "jpeg", "webp" or "avif".
        qualities: Pillow's settings; default `QUALITIES`.
        with_ms_ssim: MS-SSIM takes most of the time.

    Returns:
        (qualities, images, 3) by rising quality: bpp, PSNR in dB, and MS-SSIM, NaN where it was not asked for
        or an image is too small.

    Raises:
        InputError: no images, or a Pillow without that codec.
    """
    if codec not in QUALITIES:
        raise ValueError(f"`codec` is {codec!r}; choose {', '.join(QUALITIES)}")
    if not can_write(codec):
        raise InputError(f"this Pillow has no {codec}; install a Pillow wheel from PyPI")
    if not paths:
        raise InputError(f"no images for the {codec} curve")
    qualities = sorted(qualities or QUALITIES[codec])
    points = np.zeros((len(qualities), len(paths), 3))
    for column, path in enumerate(
        progress_bar(paths, desc=NAMES[codec], unit="image", enabled=progress, leave=False)
    ):
        what = _settings(codec, qualities, with_ms_ssim, options)
        points[:, column] = _kept(path, what, lambda path=path, what=what: _points_of(path, **what))
    return points


def unmeasured(paths: Sequence[Path]) -> dict[str, list[Path]]:
    """{codec: the images that `classical_points` has still to measure} of the codecs that Pillow has."""
    missing = {}
    for codec in filter(can_write, QUALITIES):
        what = _settings(codec, sorted(QUALITIES[codec]), True, {})
        missing[codec] = [path for path in paths if not _entry(path, what).is_file()]
    return {codec: images for codec, images in missing.items() if images}


def _settings(codec: str, qualities: Sequence[int], with_ms_ssim: bool, options: dict) -> dict:
    """What the points of an image depend on, the arguments of `_points_of`."""
    options = _OPTIONS.get(codec, {}) | options
    return {"codec": codec, "qualities": qualities, "options": options, "ms_ssim": with_ms_ssim}


def _points_of(path: Path, codec: str, qualities: Sequence[int], options: dict, ms_ssim: bool) -> np.ndarray:
    """(qualities, 3) of one image, see `anchor_points`."""
    pixels = load_pixels(path)
    image = Image.fromarray(pixels)
    original = _tensor(pixels)
    rows = []
    for quality in qualities:
        coded = io.BytesIO()
        image.save(coded, format=codec, quality=quality, **options)
        decoded = _tensor(np.array(Image.open(coded).convert("RGB")))
        similarity = similarity_of(original, decoded) if ms_ssim else None
        rows.append(
            (
                8 * coded.tell() / (image.width * image.height),
                psnr(original, decoded),
                np.nan if similarity is None else similarity,
            )
        )
    return np.array(rows)


def _entry(path: Path, what: dict) -> Path:
    """The file of the cache folder that has an image's points."""
    library = features.version({"jpeg": "libjpeg_turbo"}.get(what["codec"], what["codec"]))
    key = {**what, "pillow": pillow, "library": library, "image": sha256(path), "form": 1}
    name = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:32]
    return cache_folder() / "anchors" / f"{name}.json"


def _kept(path: Path, what: dict, measure: Callable[[], np.ndarray]) -> np.ndarray:
    """The points of one image from the cache folder, else measured and kept there, if that is possible."""
    entry = _entry(path, what)
    try:
        stored = np.array(json.loads(entry.read_text(encoding="utf-8")), dtype=float)
        if stored.shape == (len(what["qualities"]), 3):
            return stored
    except (OSError, ValueError, TypeError):
        pass
    points = measure()
    with contextlib.suppress(OSError, InputError):
        write_text(entry, json.dumps(points.tolist()))  # with NaN and Infinity
    return points


def _curve(points: np.ndarray, qualities: Sequence[int]) -> list[dict]:
    """Means over the images: [{"quality", "bpp", "psnr", "ms_ssim"}] by rising quality."""
    return [
        {
            "quality": int(quality),
            "bpp": float(row[:, 0].mean()),
            "psnr": float(row[:, 1].mean()),
            "ms_ssim": _mean_of_known(row[:, 2]),
        }
        for quality, row in zip(qualities, points)
    ]


PUBLISHED = Path(__file__).parent / "published.json"
_IMAGES = {"kodak": 24}  # of the data sets that the published curves are of


def published_curve(arch: str, dataset: Dataset, metric: str = "mse") -> list[dict] | None:
    """The R-D points that were published for the official models of an architecture, from real bitstreams.

    published.json names the source of each curve.

    Returns:
        [{"bpp", "psnr", "ms_ssim"}] by rising rate; None without a curve for this data set and metric.
    """
    entry = json.loads(PUBLISHED.read_text(encoding="utf-8")).get(arch)
    if (
        entry is None
        or (entry["dataset"], entry["metric"]) != (dataset.name, metric)
        or len(dataset) != _IMAGES[dataset.name]
    ):
        return None
    return [
        {"bpp": bpp, "psnr": psnr, "ms_ssim": ms_ssim}
        for bpp, psnr, ms_ssim in zip(entry["bpp"], entry["psnr"], entry["ms_ssim"])
    ]


def classical_points(paths: Sequence[Path], progress: bool = False) -> dict[str, np.ndarray]:
    """{"jpeg", "webp", "avif": `anchor_points`} of the codecs that Pillow has, with MS-SSIM."""
    return {
        codec: anchor_points(paths, codec, with_ms_ssim=True, progress=progress)
        for codec in QUALITIES
        if can_write(codec)
    }


def anchors_of(
    arch: str,
    dataset: Dataset,
    metric: str = "mse",
    progress: bool = False,
    points: Mapping[str, np.ndarray] | None = None,
) -> dict[str, list[dict]]:
    """The curves that a report compares with.

    Args:
        arch: whose published curve is wanted. metric: that its models were trained for.
        points: `classical_points` of the data set if they are known; default measured here.

    Returns:
        {name: points by rising rate} of JPEG, WebP and AVIF where Pillow has them, and of what was published.
    """
    points = points or classical_points(dataset.paths, progress)
    curves = {NAMES[codec]: _curve(values, QUALITIES[codec]) for codec, values in points.items()}
    published = published_curve(arch, dataset, metric)
    return curves | ({f"published {arch}": published} if published else {})


def _mean_of_known(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None


def _tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1).to(torch.float32).div_(255.0)
