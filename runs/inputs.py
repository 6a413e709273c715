"""What a run reads, looked at before hours of work: the images, the calibration crops, the device."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from licq.data.calibration import sample_crops, whole_images
from licq.data.datasets import Dataset, is_local, open_dataset
from licq.data.images import load_pixels
from licq.support.errors import InputError
from licq.support.files import sha256
from licq.support.progress import progress as progress_bar

FALLBACK = "photos"
CALIBRATION = "photos-calib"
_MS_SSIM_SIDE = 161  # pixels, the smallest side that MS-SSIM's five scales fit into


def evaluation_set(
    name_or_folder: str | None, metric: str = "mse", progress: bool = False
) -> tuple[Dataset, str | None]:
    """The images to evaluate on, each of them readable, and a remark for the user; see `find_evaluation_set`
    and `check_images`."""
    dataset, remark = find_evaluation_set(name_or_folder)
    check_images(dataset, metric, progress)
    return dataset, remark


def find_evaluation_set(name_or_folder: str | None) -> tuple[Dataset, str | None]:
    """The images to evaluate on, not looked into, and a remark for the user where they are a second choice.

    None means kodak where it is found in LICQ_DATA or the cache, else photos.

    Raises:
        InputError: no such data set.
    """
    remark = None
    if name_or_folder is None:
        name_or_folder = "kodak" if is_local("kodak") else FALLBACK
        if name_or_folder == FALLBACK:
            remark = (
                "evaluated on photos, 3 images that installed packages ship, because kodak was not found; "
                "set LICQ_DATA to the folder that holds kodak/"
            )
    return open_dataset(name_or_folder), remark


def check_images(dataset: Dataset, metric: str = "mse", progress: bool = False) -> None:
    """Raises InputError for an image that `load_image` refuses, or that is too small for the metric."""
    for path in progress_bar(
        dataset.paths, desc="reading images", unit="image", enabled=progress, leave=False
    ):
        side = min(load_pixels(path).shape[:2])
        if metric == "ms-ssim" and side < _MS_SSIM_SIDE:
            raise InputError(
                f"{path}: {side} pixels are too few for MS-SSIM, which needs {_MS_SSIM_SIDE}; leave it out "
                "or use --metric mse"
            )


def calibration_images(
    name_or_folder: str | None,
    num: int,
    crop: int,
    crops_per_image: int,
    reductions: Sequence[int],
    seed: int,
    multiple: int,
    metric: str,
    exclude: Dataset,
    whole: bool,
) -> tuple[Tensor, list[Tensor], dict, str | None]:
    """Crops (num * crops_per_image, 3, crop, crop) in 0..1, their images where `whole` asks for them, what
    the crops are as a dictionary, and a remark where images repeat.

    None means photos-calib, images that installed packages ship.

    Raises:
        InputError: no such data set, a bad image, one that is evaluated too, or a crop that the codec cannot
        take.
    """
    if crop % multiple:
        near = max(multiple, crop // multiple * multiple)
        raise InputError(
            f"--crop {crop} is no multiple of {multiple}, as the codec's inputs are; choose {near} or "
            "another multiple"
        )
    if metric == "ms-ssim" and crop < _MS_SSIM_SIDE:
        raise InputError(
            f"--crop {crop} is too small for MS-SSIM; choose {-(-_MS_SSIM_SIDE // multiple) * multiple} or "
            "more"
        )
    dataset = open_dataset(name_or_folder or CALIBRATION)
    crops = sample_crops(dataset.paths, num, crop, seed, exclude.paths, crops_per_image, reductions)
    description = {
        "dataset": dataset.name,
        "images": min(num, len(dataset)),
        "num_calib": num,
        "crop": crop,
        "crops_per_image": crops_per_image,
        "crop_reductions": list(reductions),
        "seed": seed,
        "sha256": hashlib.sha256(crops.numpy().tobytes()).hexdigest(),
    }
    images = whole_images(dataset.paths, num, seed, multiple, reductions) if whole else []
    remark = None
    if len(dataset) < num:
        remark = (
            f"{num} calibration images were asked for, and there are {len(dataset)}: they are used again, at "
            "other places"
        )
    return crops, images, description, remark


def images_digest(paths: Sequence[Path], progress: bool = False) -> str:
    """One SHA-256 over the content of image files, in their order."""
    bar = progress_bar(paths, desc="hashing images", unit="image", enabled=progress, leave=False)
    return hashlib.sha256("".join(map(sha256, bar)).encode()).hexdigest()


def pick_device(name: str | None) -> torch.device:
    """The device of that name; None: CUDA where there is one, else the CPU.

    Raises:
        InputError: no device has this name, or this machine or this PyTorch lacks it.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).add_(1).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"--device {name} cannot be used here ({str(error).splitlines()[0][:120]}); choose cpu"
            + (" or cuda" if torch.cuda.is_available() else "")
        ) from error
    return device
