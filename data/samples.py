"""Images that a caller has in memory, as tensors of samples in 0..1."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from licq.data.images import rgb_pixels
from licq.support.errors import InputError

_SLOP = 0.1  # what resizing and rounding may overshoot 0..1 by


def is_image(value: Any) -> bool:
    """Whether a value holds samples: a tensor, a numpy array of numbers or a Pillow image."""
    if isinstance(value, np.ndarray):
        return value.dtype.kind not in "USO"
    return isinstance(value, (Tensor, Image.Image))


def samples_of(image: Any, what: str, channels: int = 3) -> Tensor:
    """Samples in 0..1 of images in memory.

    Args:
        image: a tensor (..., channels, H, W), float in 0..1 or uint8 in 0..255; a numpy array like it or
            (..., H, W, 3); or a Pillow image.
        what: the images in a message.
        channels: 3; 5 of a variable-rate codec, in float. The channels behind the third have any range.

    Returns:
        float32 (..., channels, H, W) without a history, on the device of the tensor.

    Raises:
        InputError: another shape or type, samples that are not finite or reach beyond 0..1.
    """
    if isinstance(image, Image.Image):
        image = rgb_pixels(image, what)
    if isinstance(image, np.ndarray):
        image = _tensor_of(image, what, channels)
    samples = image.detach()
    kind = str(samples.dtype).removeprefix("torch.")
    shape = tuple(samples.shape)
    if samples.ndim not in (3, 4) or shape[-3] != channels or not samples.numel():
        planes = (
            ", with the gain and the lambda of each from `with_planes` of the codec" if channels > 3 else ""
        )
        raise InputError(f"{what} of shape {shape}; (n, {channels}, H, W) is needed{planes}")
    if samples.dtype == torch.uint8 and channels == 3:
        return samples.to(torch.float32) / 255
    if not samples.is_floating_point():
        raise InputError(f"{what} of type {kind}; give float samples in 0..1 or uint8 in 0..255")
    if not torch.isfinite(samples).all():
        raise InputError(f"{what} hold numbers that are not finite (nan or inf); leave those images out")
    colours = samples.narrow(-3, 0, 3)
    low, high = float(colours.min()), float(colours.max())
    if low < 0 or high > 1:
        raise InputError(
            f"{what} of type {kind} that reach from {low:g} to {high:g}; give float samples in 0..1"
            + _remedy(low, high)
        )
    return samples.to(torch.float32)


def _tensor_of(array: np.ndarray, what: str, channels: int) -> Tensor:
    if array.ndim >= 3 and array.shape[-1] == channels == 3 and array.shape[-3] != channels:
        array = np.moveaxis(array, -1, -3)
    try:
        # a copy: torch takes neither negative strides nor another order of bytes
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C", copy=True))
    except TypeError as error:
        raise InputError(
            f"{what} of type {array.dtype}; give float samples in 0..1 or uint8 in 0..255"
        ) from error


def _remedy(low: float, high: float) -> str:
    if -_SLOP <= low and high <= 1 + _SLOP:
        return ": images.clip(0, 1)"
    if -1 <= low and high <= 1:
        return ": (images + 1) / 2 where they are of -1..1"
    if 0 <= low and high <= 255:
        return ": images / 255"
    if 0 <= low:
        return ", divided by the largest value that they can have"
    return ", without a normalization by mean and deviation"
