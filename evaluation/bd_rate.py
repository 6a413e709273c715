"""The Bjontegaard delta rate (VCEG-M33), cubic and piecewise cubic."""

from collections.abc import Sequence

import numpy as np
from scipy.interpolate import PchipInterpolator

from licq.support.errors import InputError

MIN_POINTS = {"cubic": 4, "pchip": 2}


def bd_rate(
    rate_a: Sequence[float],
    psnr_a: Sequence[float],
    rate_b: Sequence[float],
    psnr_b: Sequence[float],
    method: str = "pchip",
) -> float:
    """Average extra rate of curve b against the anchor a at equal quality, in percent; negative when b is
    better.

    log10(rate) as a function of quality is interpolated, integrated over the range of quality that both
    curves cover, and the mean difference d becomes (10^d - 1) * 100.

    Args:
        rate_a, rate_b: rates of the two curves (bpp or any common unit), in any order.
        psnr_a, psnr_b: their qualities in dB (also MS-SSIM in dB).
        method: "cubic", one third-order polynomial a curve as in VCEG-M33 (least squares beyond four points),
            or "pchip", the monotone piecewise cubic of VCEG-AE07, which does not swing between points.

    Raises:
        InputError: fewer points than the method needs (4; 2 for pchip), values that are not finite or
            positive, quality that does not rise with rate, or curves without a common range of quality.
        ValueError: an unknown method.
    """
    if method not in MIN_POINTS:
        raise ValueError(f"`method` is {method!r}; choose cubic or pchip")
    curves = [_curve(rate_a, psnr_a, method), _curve(rate_b, psnr_b, method)]
    low = max(quality[0] for quality, _ in curves)
    high = min(quality[-1] for quality, _ in curves)
    if low >= high:
        spans = " and ".join(f"{quality[0]:.2f}..{quality[-1]:.2f} dB" for quality, _ in curves)
        raise InputError(
            f"BD-rate: the curves ({spans}) have no common range of quality; measure overlapping points"
        )
    integral = _integral_cubic if method == "cubic" else _integral_pchip
    area_a, area_b = (integral(quality, log_rate, low, high) for quality, log_rate in curves)
    return float((10.0 ** ((area_b - area_a) / (high - low)) - 1.0) * 100.0)


def _curve(rates: Sequence[float], qualities: Sequence[float], method: str) -> tuple[np.ndarray, np.ndarray]:
    """Quality and log10 rate, sorted by rate, checked."""
    rate, psnr = np.asarray(rates, dtype=np.float64), np.asarray(qualities, dtype=np.float64)
    if rate.shape != psnr.shape or rate.ndim != 1:
        raise InputError(
            f"BD-rate: {rate.size} rates and {psnr.size} qualities do not pair up; give one of each a point"
        )
    if rate.size < MIN_POINTS[method]:
        raise InputError(
            f"BD-rate: too few points ({rate.size}), {method} needs {MIN_POINTS[method]}; "
            "measure more qualities"
        )
    if not (np.isfinite(rate).all() and np.isfinite(psnr).all() and (rate > 0).all()):
        raise InputError(
            "BD-rate: rates must be finite and positive and qualities finite; leave such points out"
        )
    order = np.argsort(rate, kind="stable")
    rate, psnr = rate[order], psnr[order]
    if (np.diff(rate) <= 0).any() or (np.diff(psnr) <= 0).any():
        raise InputError(
            "BD-rate: quality does not rise with rate along the curve; check the order of the models"
        )
    return psnr, np.log10(rate)


def _integral_cubic(quality: np.ndarray, log_rate: np.ndarray, low: float, high: float) -> float:
    # Centred: the powers of 30..45 dB would cost seven digits of the fit.
    centre = quality.mean()
    primitive = np.polyint(np.polyfit(quality - centre, log_rate, 3))
    return float(np.polyval(primitive, high - centre) - np.polyval(primitive, low - centre))


def _integral_pchip(quality: np.ndarray, log_rate: np.ndarray, low: float, high: float) -> float:
    return float(PchipInterpolator(quality, log_rate).integrate(low, high))
