"""Rate and distortion of one image."""

import math
from collections.abc import Iterable, Mapping

import torch
from pytorch_msssim import ms_ssim as _ms_ssim
from torch import Tensor

# Five scales with an 11-tap window: the smallest scale must still be wider than the window, (11 - 1) * 2^4 =
# 160.
_MS_SSIM_MIN_SIDE = 160


def to_pixels(x: Tensor) -> Tensor:
    """Pixel values as an 8-bit file would hold them, still floating point: x in 0..1, clamped, times 255,
    rounded."""
    return x.detach().to(torch.float32).clamp(0.0, 1.0).mul(255.0).round()


def mse(x: Tensor, x_hat: Tensor) -> float:
    """Mean squared error over all channels of the 8-bit pixels of x and x_hat (same shape, 0..1); in
    0..255^2."""
    if x.shape != x_hat.shape:
        raise ValueError(f"x is {tuple(x.shape)}, x_hat is {tuple(x_hat.shape)}")
    # Differences of 8-bit pixels are integers, so float64 sums them exactly, in any order.
    return (to_pixels(x) - to_pixels(x_hat)).to(torch.float64).square().mean().item()


def psnr_from_mse(value: float) -> float:
    """PSNR in dB of an MSE on 0..255; infinite for 0."""
    return math.inf if value == 0 else 10.0 * math.log10(255.0**2 / value)


def psnr(x: Tensor, x_hat: Tensor) -> float:
    """PSNR in dB of one image on its clamped and rounded 8-bit RGB pixels; infinite when they are equal.

    Args:
        x, x_hat: (3, H, W) or (1, 3, H, W), values in 0..1.
    """
    return psnr_from_mse(mse(x, x_hat))


def ms_ssim(x: Tensor, x_hat: Tensor) -> float | None:
    """MS-SSIM (Wang et al. 2003, five scales) of one image on its 8-bit RGB pixels, in 0..1.

    None when the smaller side is at most 160 pixels: five scales do not fit.

    Args:
        x, x_hat: (3, H, W) or (1, 3, H, W), values in 0..1.
    """
    if x.shape != x_hat.shape:
        raise ValueError(f"x is {tuple(x.shape)}, x_hat is {tuple(x_hat.shape)}")
    if min(x.shape[-2:]) <= _MS_SSIM_MIN_SIDE:
        return None
    batch = (1, *x.shape[-3:])
    return _ms_ssim(to_pixels(x).reshape(batch), to_pixels(x_hat).reshape(batch), data_range=255.0).item()


def ms_ssim_db(value: float) -> float:
    """MS-SSIM on a decibel scale, -10 log10(1 - value), on which R-D curves are drawn and compared."""
    return math.inf if value >= 1 else -10.0 * math.log10(1.0 - value)


def bpp_from_likelihoods(likelihoods: Mapping[str, Tensor] | Iterable[Tensor], num_pixels: int) -> float:
    """Estimated bits per pixel: the sum of -log2 of all likelihoods over `num_pixels`, those of the unpadded
    image."""
    tensors = likelihoods.values() if isinstance(likelihoods, Mapping) else likelihoods
    return sum(-torch.log2(t.detach().to(torch.float64)).sum().item() for t in tensors) / num_pixels
