"""Image files in, tensors out; anything that is not plain 8-bit RGB is refused, with the way to mend it."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError

from licq.support.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

MIN_SIDE = 8  # pixels; the smallest image that a codec with four stride-2 stages says anything about

_ORIENTATION = 0x0112  # EXIF tag

# A silent conversion would change what is measured, so the user converts, and sees what is lost.
_TO_RGB = "convert it to 8-bit RGB with ImageMagick: convert IN -alpha remove -colorspace sRGB PNG24:OUT.png"
_MODES = {
    "1": "black and white (1 bit)",
    "L": "grey",
    "LA": "grey with alpha",
    "P": "a palette image",
    "PA": "a palette image with alpha",
    "RGBA": "RGB with alpha",
    "RGBa": "RGB with alpha",
    "La": "grey with alpha",
    "CMYK": "CMYK",
    "YCbCr": "YCbCr",
    "LAB": "CIE Lab",
    "HSV": "HSV",
    "I": "32-bit integer grey",
    "F": "floating-point grey",
}


def load_image(path: str | Path) -> "Tensor":
    """The pixels of an 8-bit RGB image file, float32 (3, H, W) in 0..1.

    Pixels are taken as stored: an EXIF orientation is not applied and an ICC profile is ignored, as in every
    published number on these data sets.

    Raises:
        InputError: missing, not an image, truncated, 16-bit, grey, CMYK, palette, alpha, more than one frame,
            too large to be decoded safely, or smaller than 8 pixels on a side.
    """
    import torch  # here: who wants pixels alone needs none

    pixels = load_pixels(path)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().to(torch.float32).div_(255.0)


def load_pixels(path: str | Path) -> np.ndarray:
    """The pixels of an 8-bit RGB image file, uint8 (H, W, 3).

    Pixels are taken as stored, and other kinds of images are refused, as `load_image` says.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file; check the path")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give an image file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                _refuse_unless_rgb8(path, image)
                image.load()
                return np.array(image, dtype=np.uint8)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise InputError(
            f"{path}: has more than {limit} million pixels; cut it into smaller images"
        ) from error
    except UnidentifiedImageError as error:
        raise InputError(
            f"{path}: is not an image that Pillow can read; give a PNG, JPEG, WebP, PPM or TIFF"
        ) from error
    except PermissionError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, zlib.error ...
        raise InputError(f"{path}: is truncated or damaged ({error}); get an intact copy") from error


def _refuse_unless_rgb8(path: Path, image: Image.Image) -> None:
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        raise InputError(
            f"{path}: is animated or holds {frames} pictures; extract one with ImageMagick: "
            "convert 'IN[0]' PNG24:OUT.png"
        )
    if _is_16_bit(image):
        raise InputError(f"{path}: has 16 bits per channel; {_TO_RGB}")
    if image.mode != "RGB":
        kind = _MODES.get(image.mode, f"of mode {image.mode}")
        raise InputError(f"{path}: is {kind}; {_TO_RGB}")
    if "transparency" in image.info:
        raise InputError(f"{path}: is RGB with a transparent colour; {_TO_RGB}")
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise InputError(
            f"{path}: is {width}x{height}, smaller than {MIN_SIDE} pixels on a side; give a larger image"
        )


def _is_16_bit(image: Image.Image) -> bool:
    """Whether the image has 16 bits a channel.

    Pillow opens 16-bit RGB as mode RGB and drops the low bytes; only the decoder's arguments tell.
    """
    if image.mode.startswith("I;16"):
        return True
    for tile in getattr(image, "tile", ()):
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if any(isinstance(item, str) and ";16" in item for item in arguments):
            return True
        if tile[0] in ("ppm", "ppm_plain") and isinstance(arguments[-1], int) and arguments[-1] > 255:
            return True
        if tile[0] == "SGI16":
            return True
    return False


def is_turned(path: str | Path) -> bool:
    """Whether the file asks viewers to turn or mirror its pixels (EXIF orientation).

    `load_pixels` gives such pixels as they are stored.
    """
    try:
        with Image.open(path) as image:
            return image.getexif().get(_ORIENTATION, 1) not in (0, 1)
    except Exception:  # damaged metadata ask for nothing
        return False
