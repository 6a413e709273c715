"""Padding to the sizes a codec takes, as CompressAI does it."""

import torch.nn.functional as F
from torch import Tensor

from licq.data.margins import margins


def pad_to_multiple(x: Tensor, multiple: int = 64) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Put zeros around images so that their sides are multiples of a number.

    Args:
        x: (..., H, W); it comes to lie in the middle.
        multiple: of the sides.

    Returns:
        The padded tensor, and the second argument of `crop_back`.
    """
    pad = margins(x.shape[-2], x.shape[-1], multiple)
    left, right, top, bottom = (-side for side in pad)
    return F.pad(x, pad, mode="constant", value=0.0), (left, right, top, bottom)


def crop_back(x: Tensor, unpad: tuple[int, int, int, int]) -> Tensor:
    """The inverse of `pad_to_multiple`.

    Args:
        x: (..., H, W).
        unpad: pixels to cut off (left, right, top, bottom), as negative numbers.
    """
    return F.pad(x, unpad)
