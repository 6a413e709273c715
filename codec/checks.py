"""What a decoder checks before any work. No torch is needed."""

from licq.codec.container import MAX_PIXELS, Container
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


def check_content(content: Container, digest: bytes, variable: bool, multiple: int) -> tuple[int, int]:
    """(height, width) of the image with its padding.

    Args:
        digest: of the model. variable: whether it has many rates. multiple: of the sides.

    Raises:
        InputError: the file is of another model, or does not fit it.
    """
    if content.model != digest:
        raise InputError(
            f"the file is of another model ({content.model.hex()}, this one is {digest.hex()}); "
            "give that one as `model`"
        )
    if bool(content.gain) != variable or len(content.streams) != 1:
        raise InputError("the file does not fit this model, though it names it; encode the image again")
    return check_size(content.height, content.width, multiple)
