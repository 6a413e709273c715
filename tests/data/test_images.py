import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from licq.data.images import is_turned, load_image, load_pixels, stored_pixels
from licq.support.errors import InputError


def write_png(path, width=16, height=16, depth=16, colour=2):
    """A PNG by hand: Pillow cannot write 16-bit RGB."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    channels = {0: 1, 2: 3, 6: 4}[colour]
    rows = (b"\0" + bytes(width * channels * depth // 8)) * height
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def test_pixels_arrive_unchanged(make_image):
    path = make_image(width=20, height=12)
    expected = np.asarray(Image.open(path))
    tensor = load_image(path)
    assert tensor.shape == (3, 12, 20) and tensor.dtype == torch.float32
    assert np.array_equal((tensor * 255).round().byte().permute(1, 2, 0).numpy(), expected)
    assert np.array_equal(load_pixels(path), expected)


def test_exif_orientation_is_not_applied(tmp_path, make_image):
    image = Image.open(make_image(width=24, height=16))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert is_turned(tmp_path / "turned.jpg") and not is_turned(image.filename)
    assert load_image(tmp_path / "turned.jpg").shape == (3, 16, 24)


def save(path, mode, size=(16, 16), **options):
    Image.new(mode, size).save(path, **options)


BAD = {
    "missing.png": (lambda path: None, "no such file"),
    "folder.png": (lambda path: path.mkdir(), "is a folder"),
    "text.png": (lambda path: path.write_text("not an image"), "not an image"),
    "empty.png": (lambda path: path.write_bytes(b""), "not an image"),
    "deep.png": (write_png, "16 bits"),
    "deepgrey.png": (lambda path: write_png(path, colour=0), "16 bits"),
    "plain.ppm": (lambda path: path.write_bytes(b"P3 16 16 65535\n" + b"300 " * 16 * 16 * 3), "16 bits"),
    "deep.rgb": (
        lambda path: path.write_bytes(
            struct.pack(">HBBHHHH", 474, 0, 2, 3, 16, 16, 3).ljust(512, b"\0") + bytes(16 * 16 * 6)
        ),
        "16 bits",
    ),
    "deep.ppm": (lambda path: path.write_bytes(b"P6 16 16 65535\n" + bytes(16 * 16 * 6)), "16 bits"),
    "cmyk.jpg": (lambda path: save(path, "CMYK"), "is CMYK"),
    "palette.png": (lambda path: save(path, "P", transparency=0), "palette image with a transparent colour"),
    "grey-key.png": (lambda path: save(path, "L", transparency=0), "grey with a transparent colour"),
    "bits-key.png": (lambda path: save(path, "1", transparency=0), "white with a transparent colour"),
    "see-through.gif": (lambda path: save(path, "P", transparency=0), "transparent"),
    "alpha.png": (lambda path: save(path, "RGBA"), "RGB with alpha"),
    "greyalpha.png": (lambda path: save(path, "LA"), "grey with alpha"),
    "key.png": (lambda path: save(path, "RGB", transparency=(0, 0, 0)), "transparent"),
    "film.webp": (
        lambda path: save(path, "RGB", save_all=True, append_images=[Image.new("RGB", (16, 16), "red")]),
        "2 pictures",
    ),
    "film.gif": (
        lambda path: save(path, "P", save_all=True, append_images=[Image.new("RGB", (16, 16), "red")]),
        "2 pictures",
    ),
    "book.tiff": (
        lambda path: save(path, "RGB", save_all=True, append_images=[Image.new("RGB", (16, 16))]),
        "2 pictures",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_unusable_image_is_refused_in_one_line(name, tmp_path):
    make, words = BAD[name]
    make(tmp_path / name)
    with pytest.raises(InputError) as caught:
        load_image(tmp_path / name)
    message = str(caught.value)
    assert words in message and name in message and "\n" not in message and ";" in message


def drawn(mode, size=(20, 12)):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    return noise.quantize(7) if mode == "P" else noise.convert(mode)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "gif"])
@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_grey_and_palette_arrive_as_their_exact_colours(mode, suffix, tmp_path):
    image = drawn(mode)
    image.save(tmp_path / f"image.{suffix}")
    expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(load_pixels(tmp_path / f"image.{suffix}"), expected)
    assert load_image(tmp_path / f"image.{suffix}").shape == (3, 12, 20)
    stored = stored_pixels(tmp_path / f"image.{suffix}")
    # a GIF has a palette, which may be one of greys
    assert stored.shape == (12, 20, 3 if mode == "P" else 1) or suffix == "gif"
    assert np.array_equal(np.broadcast_to(stored, expected.shape), expected)


@pytest.mark.parametrize("size", [(1, 1), (7, 3), (1, 64)])
def test_small_images_are_taken(size, tmp_path):
    drawn("RGB", size).save(tmp_path / "small.png")
    assert load_pixels(tmp_path / "small.png").shape == (size[1], size[0], 3)


@pytest.mark.parametrize("name", ["cut.png", "cut.jpg", "cut.webp"])
def test_truncated_image_is_refused(name, tmp_path, make_image):
    Image.effect_noise((64, 64), 80).convert("RGB").save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="truncated or damaged|not an image"):
        load_image(tmp_path / name)


def test_decompression_bomb_is_refused_without_decoding(tmp_path, make_image, monkeypatch):
    path = make_image(width=64, height=64)
    for limit in (3000, 1000):  # Pillow warns above the limit and raises above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(InputError, match="million pixels"):
            load_image(path)
