"""Padding to the sizes a codec takes, as CompressAI does it."""

import torch.nn.functional as F
from compressai.ops import compute_padding
from torch import Tensor


def pad_to_multiple(x: Tensor, multiple: int = 64) -> tuple[Tensor, tuple[int, int, int, int]]:
    """x (..., H, W) with zeros around it, centred, so that H and W are multiples of `multiple` (a power of
    two).

    Returns the padded tensor and the argument that `crop_back` takes.
    """
    height, width = x.shape[-2:]
    pad, unpad = compute_padding(height, width, min_div=multiple)
    return F.pad(x, pad, mode="constant", value=0.0), unpad


def crop_back(x: Tensor, unpad: tuple[int, int, int, int]) -> Tensor:
    """The inverse of `pad_to_multiple`: (left, right, top, bottom), not positive, are cut off."""
    return F.pad(x, unpad)
