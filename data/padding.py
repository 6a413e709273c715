"""Padding to the sizes a codec takes, as CompressAI does it."""

import torch.nn.functional as F
from compressai.ops import compute_padding
from torch import Tensor


def pad_to_multiple(x: Tensor, multiple: int = 64) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Put zeros around images so that their sides are multiples of a number.

    Args:
        x: (..., H, W); it comes to lie in the middle.
        multiple: a power of two.

    Returns:
        The padded tensor, and the second argument of `crop_back`.
    """
    height, width = x.shape[-2:]
    pad, unpad = compute_padding(height, width, min_div=multiple)
    return F.pad(x, pad, mode="constant", value=0.0), unpad


def crop_back(x: Tensor, unpad: tuple[int, int, int, int]) -> Tensor:
    """The inverse of `pad_to_multiple`.

    Args:
        x: (..., H, W).
        unpad: pixels to cut off (left, right, top, bottom), as negative numbers.
    """
    return F.pad(x, unpad)
