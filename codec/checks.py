"""What a decoder checks before any work, and the image that it gives. No torch is needed."""

import numpy as np

from licq.codec.container import MAX_PIXELS, Container
from licq.data.margins import without_margins
from licq.support.errors import InputError


def check_size(height: int, width: int, multiple: int) -> tuple[int, int]:
    """(height, width) with the sides rounded up to multiples.

    Raises:
        InputError: the image has too many pixels with its padding.
    """
    padded = -(-height // multiple) * multiple, -(-width // multiple) * multiple
    if padded[0] * padded[1] > MAX_PIXELS:
        raise InputError(
            f"an image of {width}x{height}, with its sides rounded up to multiples of {multiple}, "
            f"is too large for one file; cut it into parts of at most {MAX_PIXELS} pixels"
        )
    return padded


def check_content(
    content: Container, names: tuple[bytes, ...], variable: bool, multiple: int
) -> tuple[int, int]:
    """(height, width) of the image with its padding.

    Args:
        names: what files may name the model by, its identity first.
        variable: whether it has many rates.
        multiple: of the sides.

    Raises:
        InputError: the file is of another model, or does not fit it.
    """
    if content.model not in names:
        raise InputError(
            f"the file is of another model ({content.model.hex()}, this one is {names[0].hex()}); "
            "give that one as `model`"
        )
    if bool(content.gain) != variable or len(content.streams) != 1:
        raise InputError("the file does not fit this model, though it names it; encode the image again")
    return check_size(content.height, content.width, multiple)


def image_of(content: Container, decoded: np.ndarray, multiple: int) -> np.ndarray:
    """uint8 (3, H, W), or (1, H, W) of a grey image, of what was decoded with its padding, (1, 3, H, W)."""
    pixels = without_margins(decoded[0], content.height, content.width, multiple)
    if content.grey:
        pixels = ((pixels.sum(0, keepdims=True, dtype=np.int16) + 1) // 3).astype(np.uint8)
    return np.ascontiguousarray(pixels)
