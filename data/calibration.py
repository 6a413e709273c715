"""Calibration crops: seeded, and never from an image that is evaluated."""

import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from licq.data.images import load_image
from licq.support.errors import InputError
from licq.support.files import sha256

_TRIES = 64  # draws of another position before a repeated crop of the same image is accepted


def sample_crops(
    paths: Sequence[Path],
    num: int = 10,
    crop: int = 256,
    seed: int = 0,
    exclude: Iterable[Path] = (),
    crops_per_image: int = 1,
    reductions: Sequence[int] = (1,),
) -> Tensor:
    """Random crops, float32 (num * crops_per_image, 3, crop, crop) in 0..1, from `num` images drawn without
    repeat.

    First one crop of each image, then another of each, and so on. With fewer images than `num`, images are
    drawn again, at different positions where there are any. An image smaller than the crop is continued by
    reflection. The same arguments give the same crops on every machine, and more crops per image begin with
    the same ones.

    Args:
        exclude: the images of the evaluation set; see `refuse_overlap`.
        reductions: by how much an image is made smaller (means of so many by so many pixels) before its
        first, second ... crop
            is taken, over and over. Large photographs are softer, pixel by pixel, than the images codecs are
            measured on. An image too small for that and the crop stays as it is.

    Raises:
        InputError: no images, a bad number, an unreadable image, or one that is in the evaluation set.
    """
    paths = [Path(path) for path in paths]
    if not paths:
        raise InputError("no calibration images; give a folder of images or a data set with --calib")
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
        (order[index % len(order)], reductions[again % len(reductions)])
        for again in range(crops_per_image)
        for index in range(num)
    ]
    images: dict[int, Tensor] = {}
    reduced: dict[tuple[int, int], Tensor] = {}
    for index, reduction in sorted(set(chosen)):
        image = images.setdefault(index, load_image(paths[index]))
        reduced[index, reduction] = _at_least(_reduce(image, reduction, crop), crop)
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


def draw_levels(count: int, levels: Sequence[int], seed: int = 0) -> list[int]:
    """A level for each of `count` calibration crops of a variable-rate codec: all in turn, each round in
    another order."""
    draw = random.Random(f"{seed} levels")
    drawn: list[int] = []
    while len(drawn) < count:
        drawn += draw.sample(list(levels), len(levels))
    return drawn[:count]


def refuse_overlap(paths: Iterable[Path], exclude: Iterable[Path]) -> None:
    """Refuse calibration images whose file content (SHA-256) is that of an evaluation image, whatever their
    names.

    A re-encoded or resized copy of an evaluation image is another file and is not found out.

    Raises:
        InputError: names the first such pair.
    """
    evaluated: dict[int, list[Path]] = {}
    for path in exclude:
        evaluated.setdefault(_size(path), []).append(Path(path))
    digests: dict[str, Path] = {}
    hashed_sizes: set[int] = set()
    for path in paths:
        size = _size(path)
        if size not in evaluated:  # files of different sizes differ; hashing hundreds of photos takes a while
            continue
        if size not in hashed_sizes:
            hashed_sizes.add(size)
            digests.update((sha256(other), other) for other in evaluated[size])
        same = digests.get(sha256(path))
        if same is not None:
            raise InputError(
                f"the calibration image {path} is the evaluation image {same}; calibrate on other images "
                "(--calib) or evaluate on others (--eval)"
            )


def _size(path: str | Path) -> int:
    try:
        return Path(path).stat().st_size
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; check the path") from error


def _reduce(image: Tensor, reduction: int, crop: int) -> Tensor:
    """`image` (3, H, W) with the mean of reduction x reduction pixels, of 8 bits again, for each; not to less
    than `crop`."""
    if reduction == 1 or min(image.shape[1:]) // reduction < crop:
        return image
    return (avg_pool2d(image, reduction) * 255).round() / 255


def _at_least(image: Tensor, side: int) -> Tensor:
    """`image` (3, H, W) continued by reflection to at least `side` pixels each way (numpy reflects
    repeatedly)."""
    missing = [max(0, side - length) for length in image.shape[1:]]
    if not any(missing):
        return image
    padded = np.pad(image.numpy(), ((0, 0), (0, missing[0]), (0, missing[1])), mode="reflect")
    return torch.from_numpy(padded)
