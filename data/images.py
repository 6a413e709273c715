"""Image files in, tensors out: 8-bit RGB, grey, or a palette of RGB.

Everything else is refused, with the way to mend it.
"""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError

from licq.support.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

_ORIENTATION = 0x0112  # EXIF tag

# A silent conversion would change what is measured, so the user converts, and sees what is lost.
_TO_RGB = "convert it to 8-bit RGB with ImageMagick: convert IN -alpha remove -colorspace sRGB PNG24:OUT.png"
_TAKEN = {"RGB": "RGB", "L": "grey", "1": "black and white", "P": "a palette image"}
_MODES = {
    "LA": "grey with alpha",
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
    """The pixels of an 8-bit image file, float32 (3, H, W) in 0..1.

    Grey and black-and-white images have three equal channels; a palette's colours are looked up.

    Pixels are taken as stored: an EXIF orientation is not applied and an ICC profile is ignored, as in every
    published number on these data sets.

    Raises:
        InputError: missing, not an image, truncated, 16-bit, CMYK, alpha or a transparent colour, more than
            one frame, or too large to be decoded safely.
    """
    import torch  # here: who wants pixels alone needs none

    pixels = load_pixels(path)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().to(torch.float32).div_(255.0)


def load_pixels(path: str | Path) -> np.ndarray:
    """The pixels of an 8-bit image file, uint8 (H, W, 3); what `load_image` says is true of them."""
    return _three(stored_pixels(path))


def stored_pixels(path: str | Path) -> np.ndarray:
    """The pixels of an 8-bit image file, uint8 (H, W, 3), or (H, W, 1) of a grey or black-and-white one.

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
                return _pixels_of(image, path)
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


def rgb_pixels(image: Image.Image, name: str | Path) -> np.ndarray:
    """The pixels of an open image, uint8 (H, W, 3).

    Raises:
        InputError: another kind of image, as `load_image` says; the message begins with `name`.
    """
    return _three(_pixels_of(image, name))


def _three(pixels: np.ndarray) -> np.ndarray:
    return pixels if pixels.shape[2] == 3 else np.repeat(pixels, 3, axis=2)


def _pixels_of(image: Image.Image, name: str | Path) -> np.ndarray:
    """uint8 (H, W, 3) or (H, W, 1); exact: 1 bit is 0 or 255, a palette's entries are 8-bit RGB."""
    _refuse_unless_8_bit(name, image)
    image.load()
    if image.mode in ("1", "P"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    pixels = np.array(image, dtype=np.uint8)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _refuse_unless_8_bit(path: str | Path, image: Image.Image) -> None:
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        raise InputError(
            f"{path}: is animated or holds {frames} pictures; extract one with ImageMagick: "
            "convert 'IN[0]' PNG24:OUT.png"
        )
    if _is_16_bit(image):
        raise InputError(f"{path}: has 16 bits per channel; {_TO_RGB}")
    if image.mode not in _TAKEN:
        kind = _MODES.get(image.mode, f"of mode {image.mode}")
        raise InputError(f"{path}: is {kind}; {_TO_RGB}")
    see_through = image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A")
    if "transparency" in image.info or see_through:
        raise InputError(f"{path}: is {_TAKEN[image.mode]} with a transparent colour; {_TO_RGB}")


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
