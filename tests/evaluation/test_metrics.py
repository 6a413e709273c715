import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from licq.data.images import load_image
from licq.data.padding import crop_back, pad_to_multiple
from licq.evaluation.anchors import anchor_points
from licq.evaluation.metrics import bpp_from_likelihoods, ms_ssim, ms_ssim_db, mse, psnr


def test_psnr_of_a_known_error():
    x = torch.full((3, 8, 8), 100 / 255)
    assert psnr(x, torch.full((3, 8, 8), 110 / 255)) == pytest.approx(20 * math.log10(255 / 10))
    assert psnr(x, x) == math.inf


def test_psnr_sees_clamped_and_rounded_pixels():
    x = torch.tensor([0.0, 1.0, 100 / 255]).reshape(3, 1, 1)
    assert mse(x, torch.tensor([-5.0, 7.0, 100.4 / 255]).reshape(3, 1, 1)) == 0
    assert mse(x, torch.tensor([0.0, 1.0, 100.6 / 255]).reshape(3, 1, 1)) == pytest.approx(1 / 3)


def test_psnr_matches_numpy_on_8_bit_images():
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 256, (2, 3, 33, 21), dtype=np.uint8)
    expected = 10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2))
    x, x_hat = (torch.from_numpy(image).float()[None] / 255 for image in (a, b))
    assert psnr(x, x_hat) == pytest.approx(expected, abs=1e-12)


def reference_ms_ssim(a, b):
    """Wang, Simoncelli and Bovik 2003 in float64, written down again: 11-tap Gaussian of 1.5, five scales."""
    tap = torch.exp(-((torch.arange(11.0, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = (torch.outer(tap, tap) / tap.sum() ** 2).expand(3, 1, 11, 11)

    def blur(image):
        return F.conv2d(image, window, groups=3)

    value = torch.ones(1, 3, dtype=torch.float64)
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        mean_a, mean_b = blur(a), blur(b)
        var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
        contrast = (2 * cov + (0.03 * 255) ** 2) / (var_a + var_b + (0.03 * 255) ** 2)
        luminance = (2 * mean_a * mean_b + (0.01 * 255) ** 2) / (mean_a**2 + mean_b**2 + (0.01 * 255) ** 2)
        term = contrast * luminance if scale == 4 else contrast
        value = value * term.mean((2, 3)).clamp(min=0) ** weight
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return value.mean().item()


def test_ms_ssim_matches_the_paper_written_down_again(make_image):
    x = load_image(make_image(width=192, height=176))
    x_hat = (x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    pixels = [(image * 255).round().double()[None] for image in (x, x_hat)]
    assert ms_ssim(x, x_hat) == pytest.approx(reference_ms_ssim(*pixels), abs=1e-5)
    assert ms_ssim(x, x) == pytest.approx(1.0, abs=1e-6)


def test_ms_ssim_is_none_where_five_scales_do_not_fit():
    assert ms_ssim(torch.zeros(3, 160, 300), torch.zeros(3, 160, 300)) is None
    assert ms_ssim(torch.zeros(3, 161, 161), torch.zeros(3, 161, 161)) is not None


def test_decibels_of_ms_ssim():
    assert ms_ssim_db(0.99) == pytest.approx(20.0)
    assert ms_ssim_db(1.0) == math.inf


def test_rate_of_known_likelihoods():
    likelihoods = {"y": torch.full((1, 2, 4, 4), 0.25), "z": torch.full((1, 1, 2, 2), 0.5)}
    assert bpp_from_likelihoods(likelihoods, 100) == pytest.approx((32 * 2 + 4) / 100)
    assert bpp_from_likelihoods(list(likelihoods.values()), 100) == pytest.approx(0.68)


@pytest.mark.parametrize("height, width", [(64, 128), (65, 1), (50, 70), (9, 191)])
def test_padding_is_centred_zero_and_undone(height, width):
    x = torch.rand(1, 3, height, width) + 0.1
    padded, unpad = pad_to_multiple(x, 64)
    rows, columns = -(-height // 64) * 64, -(-width // 64) * 64
    assert padded.shape == (1, 3, rows, columns)
    top, left = (rows - height) // 2, (columns - width) // 2
    assert torch.equal(padded[..., top : top + height, left : left + width], x)
    assert padded.sum().item() == pytest.approx(x.sum().item(), rel=1e-4)
    assert torch.equal(crop_back(padded, unpad), x)


def test_anchor_points_count_pillows_bytes(make_image):
    paths = [make_image("a.png", 64, 48, seed=1), make_image("b.png", 40, 56, seed=2)]
    low, high = anchor_points(paths, "jpeg", qualities=(80, 10))
    assert (low[:, :2] < high[:, :2]).all()
    for path, (bpp, quality, similarity) in zip(paths, high):
        image = Image.open(path)
        coded = io.BytesIO()
        image.save(coded, "JPEG", quality=80)
        error = np.asarray(image, dtype=float) - np.asarray(Image.open(coded), dtype=float)
        assert bpp == 8 * len(coded.getvalue()) / (image.width * image.height)
        assert quality == pytest.approx(10 * np.log10(255**2 / np.mean(error**2))) and np.isnan(similarity)
    assert len(anchor_points(paths[:1], "webp")) >= 4
