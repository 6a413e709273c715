"""The calibration crops of `quantize`, from whatever the user has."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from licq.data.calibration import draw_levels, sample_crops, whole_images
from licq.data.datasets import Dataset, open_dataset
from licq.data.samples import is_image, samples_of
from licq.models.qvrf import VariableRate
from licq.models.registry import architecture_of, get_architecture
from licq.quant.outputs import codec_output
from licq.quant.rewriter import fixed_weights
from licq.reconstruction.objective import MS_SSIM_SIDE
from licq.support.cli import explain
from licq.support.errors import InputError

Images = Tensor | np.ndarray | str | Path | Dataset | Iterable[str | Path | Tensor | np.ndarray | Image]

_WHAT = "calibration images"


def calibration_crops(
    model: nn.Module,
    images: Images,
    metric: str,
    seed: int,
    num_images: int,
    crop: int,
    crops_per_image: int,
    crop_reductions: Sequence[int],
) -> Tensor:
    """Crops (n, 3, H, W) in 0..1, or (n, 5, H, W) of a variable-rate codec; the arguments of `quantize`.

    Raises:
        InputError: images that are none, or that the codec or the metric cannot take.
    """
    given = listed(images)
    if is_image(given) or isinstance(given, list) and is_image(given[0]):
        return given_crops(model, given, metric)
    _check_side(model, crop, metric)
    crops = sample_crops(
        _files(given), num_images, crop, seed, crops_per_image=crops_per_image, reductions=crop_reductions
    )
    if isinstance(model, VariableRate):
        crops = _with_rates(model, crops, metric, seed)
    _check_taken(model, crops)
    return crops


def listed(images: Images) -> Any:
    """Images in memory, a folder or a data set as they are; files and images one by one as a list.

    Raises:
        InputError: a list that is empty, or that holds something else or both.
    """
    given: Any = images.tolist() if isinstance(images, np.ndarray) and not is_image(images) else images
    if not is_image(given) and not isinstance(given, (str, Path, Dataset)):
        given = list(given) if isinstance(given, Iterable) else [given]
        _check_kinds(given)
    return given


def calibration_images(
    model: nn.Module, images: Images, seed: int, num_images: int, crop_reductions: Sequence[int]
) -> list[Tensor]:
    """The images behind `calibration_crops`, as `quantize` takes them; none where they are in memory."""
    given = listed(images)
    if is_image(given) or isinstance(given, list) and is_image(given[0]):
        return []
    made = architecture_of(model)
    multiple = get_architecture(made[0]).multiple if made else 64
    return whole_images(_files(given), num_images, seed, multiple, crop_reductions)


def given_images(images: Sequence[Tensor]) -> Sequence[Tensor]:
    """Whole images that the user has in memory, as `quantize` takes them.

    Raises:
        InputError: one of them is none.
    """
    for image in images:
        if not (isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3):
            what = (
                f"{tuple(image.shape)} in {image.dtype}"
                if isinstance(image, Tensor)
                else f"an object of type {type(image).__name__}"
            )
            raise InputError(f"`whole` holds {what}; give images (3, H, W) in torch.uint8")
        if len(image) != 3:
            raise InputError(f"`whole` holds an image of {len(image)} channels; give images (3, H, W)")
    return images


def given_crops(model: nn.Module, images: Any, metric: str) -> Tensor:
    """Crops that the user has in memory, float32 (n, 3, H, W) or (n, 5, H, W), in 0..1.

    Args:
        images: what `samples_of` takes, with a dimension for the images; or a list of images and batches of
            one size.

    Raises:
        InputError: they are none, or the codec or the metric cannot take them.
    """
    channels = 5 if isinstance(model, VariableRate) else 3
    if isinstance(images, list):
        parts = [samples_of(image, _WHAT, channels) for image in images]
        sizes = list(dict.fromkeys(f"{part.shape[-1]}x{part.shape[-2]}" for part in parts))
        if len(sizes) > 1:
            raise InputError(
                f"{_WHAT} of different sizes ({sizes[0]}, {sizes[1]}); cut them to one size, or give "
                "files, of which licq draws crops"
            )
        crops = torch.cat([part.reshape(-1, *part.shape[-3:]) for part in parts])
    else:
        crops = samples_of(images, _WHAT, channels)
        if crops.ndim == 3:
            raise InputError(f"{_WHAT} of shape {tuple(crops.shape)}; (n, {channels}, H, W) is needed")
    if metric == "ms-ssim" and min(crops.shape[-2:]) < MS_SSIM_SIDE:
        raise InputError(
            f"{_WHAT} of {crops.shape[-1]}x{crops.shape[-2]} pixels are too small for MS-SSIM; "
            f"{MS_SSIM_SIDE} pixels a side are needed"
        )
    _check_taken(model, crops)
    return crops


def _check_kinds(images: list) -> None:
    """Raises InputError where a list is empty or does not hold files alone or images alone."""
    files = [isinstance(image, (str, Path)) for image in images]
    strangers = [image for image, is_file in zip(images, files) if not is_file and not is_image(image)]
    if strangers or not images:
        content = f"an object of type {type(strangers[0]).__name__}" if strangers else "no files"
        raise InputError(
            f"`images` holds {content}; give a tensor (n, 3, H, W), a list of images (3, H, W), a folder, a "
            "data set's name or files"
        )
    if any(files) and not all(files):
        raise InputError("`images` holds files and tensors; give the ones or the others")


def _files(images: str | Path | Dataset | list[str | Path]) -> Sequence[Path]:
    """The files of a data set, of a folder, or of a list."""
    if isinstance(images, Dataset):
        return images.paths
    if isinstance(images, (str, Path)):
        return open_dataset(images).paths
    return [Path(file).expanduser() for file in images]


def _with_rates(model: VariableRate, crops: Tensor, metric: str, seed: int) -> Tensor:
    """The crops, each with the gain and the lambda of one of the codec's levels; all levels in turn."""
    made = architecture_of(cast(nn.Module, model))  # every class with these gains is a codec
    if made is None:
        raise InputError(
            "the lambdas of this variable-rate codec are not known; give `images` as a tensor that "
            "`with_planes` of the codec has made"
        )
    architecture = get_architecture(made[0])
    lambdas = {level: architecture.lambda_for(level, metric) for level in range(1, model.levels + 1)}
    levels = draw_levels(len(crops), list(lambdas), seed)
    with torch.no_grad():
        return model.with_planes(
            crops.to(model.Gain.device),
            torch.tensor(levels),
            torch.tensor([lambdas[level] for level in levels]),
        )


def _check_side(model: nn.Module, crop: int, metric: str) -> None:
    made = architecture_of(model)
    multiple = get_architecture(made[0]).multiple if made else 1
    if crop % multiple:
        near = max(multiple, crop // multiple * multiple)
        raise InputError(
            f"`crop` {crop} is no multiple of {multiple}, as the codec's inputs are; choose {near} or "
            "another multiple"
        )
    if metric == "ms-ssim" and crop < MS_SSIM_SIDE:
        large_enough = -(-MS_SSIM_SIDE // multiple) * multiple
        raise InputError(f"`crop` {crop} is too small for MS-SSIM; choose {large_enough} or more")


@torch.no_grad()
def _check_taken(model: nn.Module, crops: Tensor) -> None:
    """Raises InputError where the codec cannot take images of this size, or returns none of it.

    A copy of it runs on the first crop; the state of the random numbers is restored.
    """
    network: Any = fixed_weights(model)
    parameter = next(network.parameters(), None)
    image = crops[:1, :3].to(crops.device if parameter is None else parameter.device)
    size = f"{_WHAT} of {image.shape[-1]}x{image.shape[-2]} pixels"
    known = architecture_of(model)
    multiple = get_architecture(known[0]).multiple if known else 64
    remedy = (
        f"give images whose sides are multiples of {multiple if known else 'its total stride, mostly 64'}"
    )
    try:
        with torch.random.fork_rng([image.device] if image.is_cuda else []):
            output = codec_output(network(image.clone()))
    except Exception as error:
        if explain(error) is not None:
            raise
        said = " ".join(str(error).split())[:200]
        raise InputError(
            f"the network does not run on {size} ({type(error).__name__}: {said}); {remedy}"
        ) from error
    if output["x_hat"].shape != image.shape:
        raise InputError(
            f"the network turns {size} into x_hat of shape {tuple(output['x_hat'].shape)}; {remedy}"
        )
