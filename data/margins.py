"""What lies around an image whose sides are rounded up to multiples of a number. No torch is needed."""

import numpy as np


def margins(height: int, width: int, multiple: int) -> tuple[int, int, int, int]:
    """(left, right, top, bottom) in pixels; the image lies in the middle, as CompressAI puts it."""
    across, down = -width % multiple, -height % multiple
    return across // 2, across - across // 2, down // 2, down - down // 2


def with_margins(pixels: np.ndarray, multiple: int) -> np.ndarray:
    """(..., H, W) with zeros around it, so that its sides are multiples."""
    left, right, top, bottom = margins(pixels.shape[-2], pixels.shape[-1], multiple)
    return np.pad(pixels, [(0, 0)] * (pixels.ndim - 2) + [(top, bottom), (left, right)])


def without_margins(pixels: np.ndarray, height: int, width: int, multiple: int) -> np.ndarray:
    """The inverse of `with_margins`, of an image of height x width."""
    left, _, top, _ = margins(height, width, multiple)
    return pixels[..., top : top + height, left : left + width]
