"""`whole_images`: every pixel of the images that crops are drawn from, in tiles that codecs take."""

import pytest
import torch

from licq.data.calibration import TILE, sample_crops, whole_images
from licq.data.images import load_image


@pytest.mark.parametrize(
    "width, height, count", [(160, 96, 1), (100, 70, 1), (64, TILE + 1, 2), (1600, 64, 3)]
)
def test_tiles_hold_every_pixel_and_have_sides_of_the_multiple(width, height, count, make_image):
    path = make_image(width=width, height=height)
    tiles = whole_images([path], multiple=32)
    assert len(tiles) == count
    assert all(side % 32 == 0 and side <= TILE for tile in tiles for side in tile.shape[1:])
    pixels = (load_image(path) * 255).round().to(torch.uint8)
    columns = {tuple(column) for tile in tiles for column in tile.flatten(1).T.tolist()}
    assert {tuple(column) for column in pixels.flatten(1).T.tolist()} <= columns


def test_they_are_the_images_of_the_crops_at_each_reduction_once(tmp_path, make_image):
    paths = [make_image(f"{seed}.png", 80, 64, seed, tmp_path) for seed in range(5)]
    whole = whole_images(paths, 2, 3, 16, (1, 2, 1))
    assert [tuple(image.shape[1:]) for image in whole] == [(64, 80), (32, 48)] * 2
    full = [image.float() / 255 for image in whole[::2]]
    for crop, image in zip(sample_crops(paths, 2, 16, 3), full, strict=True):
        windows = image.unfold(1, 16, 1).unfold(2, 16, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, 16, 16)
        assert any(torch.equal(window, crop) for window in windows)
