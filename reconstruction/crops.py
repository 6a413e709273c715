"""The calibration crops of `quantize`, from whatever the user has."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from licq.data.calibration import draw_levels, sample_crops
from licq.data.datasets import open_dataset
from licq.models.qvrf import VariableRate
from licq.models.registry import architecture_of, get_architecture
from licq.reconstruction.objective import MS_SSIM_SIDE
from licq.support.errors import InputError

Images = Tensor | str | Path | Iterable[str | Path]


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
    if isinstance(images, Tensor):
        _check(model, images, metric)
        return images
    _check_side(model, crop, metric)
    crops = sample_crops(
        _files(images), num_images, crop, seed, crops_per_image=crops_per_image, reductions=crop_reductions
    )
    return _with_rates(model, crops, metric, seed) if isinstance(model, VariableRate) else crops


def _files(images: str | Path | Iterable[str | Path]) -> Sequence[Path]:
    """The files of a data set, of a folder, or of a list."""
    if isinstance(images, (str, Path)):
        return open_dataset(images).paths
    files = list(images) if isinstance(images, Iterable) else [images]
    strangers = [file for file in files if not isinstance(file, (str, Path))]
    if strangers or not files:
        content = f"an object of type {type(strangers[0]).__name__}" if strangers else "no files"
        raise InputError(
            f"`images` holds {content}; give a tensor (n, 3, H, W), a folder, a data set's name or files"
        )
    return [Path(file).expanduser() for file in files]


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


def _check(model: nn.Module, images: Tensor, metric: str) -> None:
    """Raises InputError where a tensor holds no crops for this codec and metric."""
    channels, planes = 3, ""
    if isinstance(model, VariableRate):
        channels, planes = 5, ", with the gain and the lambda of each crop from `with_planes` of the codec"
    if images.ndim != 4 or images.shape[1] != channels or not images.numel():
        raise InputError(
            f"calibration images of shape {tuple(images.shape)}; (n, {channels}, H, W) is needed{planes}"
        )
    samples = images[:, :3]
    if not images.is_floating_point() or not (samples.amin() >= 0 and samples.amax() <= 1):
        raise InputError(
            f"calibration images of type {str(images.dtype).removeprefix('torch.')} that reach from "
            f"{samples.amin().item():g} to {samples.amax().item():g}; give float samples in 0..1"
        )
    if metric == "ms-ssim" and min(images.shape[-2:]) < MS_SSIM_SIDE:
        raise InputError(
            f"calibration images of {images.shape[-1]}x{images.shape[-2]} pixels are too small for MS-SSIM; "
            f"{MS_SSIM_SIDE} pixels a side are needed"
        )
