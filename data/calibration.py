"""Calibration crops: `licq.sample_crops`, drawn from a seed, never from an image that is evaluated."""

import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from licq.data.images import load_image
from licq.support.determinism import plain_torch
from licq.support.errors import InputError
from licq.support.files import sha256

TILE = 768
"""Pixels: the longest side of what `whole_images` gives."""

_TRIES = 64  # draws of another position before a repeated crop of the same image is accepted


@plain_torch()
def sample_crops(
    files: Sequence[str | Path],
    num: int = 10,
    crop: int = 256,
    seed: int = 0,
    exclude: Iterable[str | Path] = (),
    crops_per_image: int = 1,
    reductions: Sequence[int] = (1,),
) -> Tensor:
    """Random square crops of image files, to calibrate with.

    `num` images are drawn without repetition. The crops come in rounds: one of each image, then another of
    each, and so on. With fewer files than `num`, images are drawn again, at other positions where there are
    any. An image that is smaller than the crop is continued by reflection. The same arguments give the same
    crops on every machine, and more crops per image begin with the same ones.

    Args:
        files: 8-bit images, see `data.images.load_image`.
        num: images to draw.
        crop: side of a crop, in pixels.
        seed: of the draws.
        exclude: the images of the evaluation; see `refuse_overlap`.
        crops_per_image: rounds.
        reductions: of the images of the first, second ... round, over and over: a reduction of n replaces n
            by n pixels by their mean. Large photographs are softer, pixel by pixel, than the images that
            codecs are measured on. An image that would become smaller than the crop stays as it is.

    Returns:
        float32 (num * crops_per_image, 3, crop, crop) in 0..1; every value is a multiple of 1 / 255.

    Raises:
        InputError: no files, a number below 1, an unreadable image, or one that is evaluated.
    """
    paths = [Path(path) for path in files]
    if not paths:
        raise InputError("no calibration images; give some as `files`")
    if min(num, crop, crops_per_image) < 1:
        raise InputError(
            f"{crops_per_image} crops of {crop} pixels from each of {num} images make no sense; "
            "choose 1 or more of each"
        )
    if not reductions or min(reductions) < 1:
        raise InputError(
            f"images reduced {list(reductions)} times make no sense; choose numbers of 1 or more"
        )
    refuse_overlap(paths, exclude)
    # Python's generator: its sequence for a seed is a promise of the language, numpy's and torch's are not.
    draw = random.Random(seed)
    order = draw.sample(range(len(paths)), len(paths))
    chosen = [
        (order[index % len(order)], reductions[turn % len(reductions)])
        for turn in range(crops_per_image)
        for index in range(num)
    ]
    images: dict[int, Tensor] = {}
    reduced: dict[tuple[int, int], Tensor] = {}
    for index, reduction in sorted(set(chosen)):
        image = images.setdefault(index, load_image(paths[index]))
        reduced[index, reduction] = _at_least(_reduce(image, reduction, crop), crop, crop)
    used: set[tuple[int, int, int, int]] = set()
    crops = []
    for index, reduction in chosen:
        image = reduced[index, reduction]
        for _ in range(_TRIES):
            top = draw.randint(0, image.shape[1] - crop)
            left = draw.randint(0, image.shape[2] - crop)
            if (index, reduction, top, left) not in used:
                break
        used.add((index, reduction, top, left))
        crops.append(image[:, top : top + crop, left : left + crop])
    return torch.stack(crops)


@plain_torch()
def whole_images(
    files: Sequence[str | Path],
    num: int = 10,
    seed: int = 0,
    multiple: int = 64,
    reductions: Sequence[int] = (1,),
) -> list[Tensor]:
    """All pixels of the images that `sample_crops` draws its crops from with the same arguments.

    A large image comes in tiles, so that a codec needs no more memory for it than for a Kodak image. They
    overlap where their sides do not divide the image's. A small image is continued by reflection to
    multiples.

    Args:
        files, num, seed: those of `sample_crops`.
        multiple: of which the sides of a codec's inputs are multiples, in pixels.
        reductions: each image comes at each of these, once.

    Returns:
        Tiles (3, H, W) in uint8, of at most `TILE` pixels a side.

    Raises:
        InputError: an unreadable image.
    """
    order = random.Random(seed).sample(range(len(files)), len(files))
    longest = max(TILE // multiple, 1) * multiple
    tiles = []
    for index in order[:num]:
        image = load_image(files[index])
        for reduction in sorted(set(reductions)):
            pixels = (_reduce(image, reduction, multiple) * 255).round().to(torch.uint8)
            (tops, height), (lefts, width) = (_cuts(side, longest, multiple) for side in pixels.shape[1:])
            pixels = _at_least(pixels, height, width)
            tiles += [
                pixels[:, top : top + height, left : left + width].clone() for top in tops for left in lefts
            ]
    return tiles


def _cuts(length: int, longest: int, multiple: int) -> tuple[list[int], int]:
    """(where tiles begin, their side), so that together they cover `length` pixels. A side is a multiple of
    `multiple`, and at most `longest`."""
    count = -(-length // longest)
    side = -(-length // (count * multiple)) * multiple
    return [round(number * (length - side) / max(count - 1, 1)) for number in range(count)], side


def draw_levels(count: int, levels: Sequence[int], seed: int = 0) -> list[int]:
    """Levels of a variable-rate codec for `count` calibration crops.

    Each level comes once before any comes again; the order of each round is drawn anew.
    """
    draw = random.Random(f"{seed} levels")
    drawn: list[int] = []
    while len(drawn) < count:
        drawn += draw.sample(list(levels), len(levels))
    return drawn[:count]


def refuse_overlap(files: Iterable[str | Path], exclude: Iterable[str | Path]) -> None:
    """Refuse calibration images that are evaluation images too.

    Files are compared by content (SHA-256), not by name. A re-encoded or resized copy of an evaluation image
    is another file and is not noticed.

    Args:
        files: the calibration images.
        exclude: the evaluation images.

    Raises:
        InputError: names the first such pair.
    """
    evaluated: dict[int, list[Path]] = {}
    for path in exclude:
        evaluated.setdefault(_size(path), []).append(Path(path))
    digests: dict[str, Path] = {}
    hashed_sizes: set[int] = set()
    for path in files:
        size = _size(path)
        if size not in evaluated:  # no hash is needed: files of different sizes differ
            continue
        if size not in hashed_sizes:
            hashed_sizes.add(size)
            digests.update((sha256(other), other) for other in evaluated[size])
        same = digests.get(sha256(path))
        if same is not None:
            raise InputError(
                f"the calibration image {path} is the evaluation image {same}; calibrate on other images "
                "(`files`) or evaluate on others (`exclude`)"
            )


def _size(path: str | Path) -> int:
    try:
        return Path(path).stat().st_size
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; check the path") from error


def _reduce(image: Tensor, reduction: int, crop: int) -> Tensor:
    """An image (3, H, W) in which each reduction x reduction pixels are their mean, rounded to 8 bits.

    The image itself where the result would be smaller than `crop`.
    """
    if reduction == 1 or min(image.shape[1:]) // reduction < crop:
        return image
    return (avg_pool2d(image, reduction) * 255).round() / 255


def _at_least(image: Tensor, height: int, width: int) -> Tensor:
    """An image (3, H, W) continued by reflection, again and again, to at least so many pixels."""
    missing = [max(0, side - length) for side, length in zip((height, width), image.shape[1:], strict=True)]
    if not any(missing):
        return image
    padded = np.pad(image.numpy(), ((0, 0), (0, missing[0]), (0, missing[1])), mode="reflect")
    return torch.from_numpy(padded)
