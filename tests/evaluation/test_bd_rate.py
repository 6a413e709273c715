import bjontegaard
import numpy as np
import pytest

from licq.evaluation.bd_rate import bd_rate
from licq.support.errors import InputError

# The curves of VCEG-M33's usual spreadsheet example.
RATE_A, PSNR_A = [686.76, 309.58, 157.11, 85.95], [40.28, 37.18, 34.24, 31.42]
RATE_B, PSNR_B = [893.34, 407.8, 204.93, 112.75], [40.39, 37.21, 34.17, 31.24]


def random_curve(generator, points):
    psnr = np.sort(generator.uniform(28, 42, points)) + np.arange(points)
    return list(0.02 * np.exp(0.15 * (psnr - 28)) * np.sort(generator.uniform(1, 1.3, points))), list(psnr)


@pytest.mark.parametrize("method", ["cubic", "pchip"])
@pytest.mark.parametrize("points", [4, 5, 7])
def test_equals_the_bjontegaard_package(method, points):
    generator = np.random.default_rng(points)
    for _ in range(5):
        a, b = random_curve(generator, points), random_curve(generator, points)
        expected = bjontegaard.bd_rate(*a, *b, method=method, require_matching_points=False, min_overlap=0)
        assert bd_rate(*a, *b, method=method) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("method", ["cubic", "pchip"])
def test_constant_rate_factor_is_found_exactly(method):
    assert bd_rate(RATE_A, PSNR_A, [1.1 * rate for rate in RATE_A], PSNR_A, method) == pytest.approx(10.0)
    assert bd_rate(RATE_A, PSNR_A, RATE_A, PSNR_A, method) == pytest.approx(0.0, abs=1e-9)


def test_known_spreadsheet_curves_in_any_order():
    expected = bjontegaard.bd_rate(RATE_A[::-1], PSNR_A[::-1], RATE_B[::-1], PSNR_B[::-1], method="cubic")
    order = [2, 0, 3, 1]
    shuffled = [RATE_B[index] for index in order], [PSNR_B[index] for index in order]
    assert bd_rate(RATE_A, PSNR_A, *shuffled, method="cubic") == pytest.approx(expected)


def test_two_points_by_pchip_are_log_linear():
    # A straight line in log rate: shifting quality by 1 dB at 3 dB a doubling costs a factor 2^(1/3).
    assert bd_rate([1, 2], [30, 33], [1, 2], [29, 32]) == pytest.approx(100 * (2 ** (1 / 3) - 1))


@pytest.mark.parametrize(
    "curve_b, method, words",
    [
        (([1, 2, 3], [30, 31, 32]), "cubic", "cubic needs 4"),
        (([1], [30]), "pchip", "pchip needs 2"),
        (([1, 2, 3, 4], [50, 51, 52, 53]), "pchip", "no common range"),
        (([1, 2, 3, 4], [31, 33, 32, 35]), "cubic", "does not rise"),
        (([1, 1, 3, 4], [31, 32, 33, 35]), "pchip", "does not rise"),
        (([0, 1, 3, 4], [31, 32, 33, 35]), "pchip", "positive"),
        (([1, 2, 3, 4], [31, 32, 33, float("inf")]), "pchip", "finite"),
        (([1, 2, 3], [31, 32, 33, 34]), "pchip", "pair up"),
    ],
)
def test_curves_without_a_bd_rate_are_refused(curve_b, method, words):
    with pytest.raises(InputError, match=words) as caught:
        bd_rate([1, 2, 3, 4], [31, 33, 34, 35], *curve_b, method=method)
    assert "\n" not in str(caught.value)
