"""Whole-number densities against SciPy's normal distribution, and through CompressAI's coder."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from licq.codec.rans import CompressaiDecoder, CompressaiEncoder
from licq.codec.tables import (
    PRECISION,
    STEP_OF_Z_BITS,
    GaussianRows,
    MixtureRows,
    Rows,
    RowTable,
    SteppedRows,
    frequencies,
    phi,
)
from licq.models.vbr import VariableBottleneck
from licq.quant.density import LARGEST, density_tables, factorized_table
from licq.quant.density_units import INVERSE_BITS, LEVELS, NORMAL_BITS
from licq.support.errors import InputError

BITS = 12
TABLES = density_tables(BITS)


def whole(x) -> np.ndarray:
    return np.round(np.asarray(x) * 2**BITS).astype(np.int64)


def bits_of(rows: Rows, symbols: np.ndarray) -> float:
    """What an ideal coder spends with these rows; no symbol may be outside."""
    total = 0.0
    bases = np.zeros(len(rows.rows), dtype=int) if rows.base is None else rows.base
    for row, base, symbol in zip(rows.rows, bases, symbols):
        cdf, index = rows.table.row(row), int(symbol - base - rows.table.offsets[row])
        assert 0 <= index < len(cdf) - 2
        total -= np.log2((cdf[index + 1] - cdf[index]) / 2**16)
    return total


def test_table_of_the_normal_distribution():
    normal = TABLES.normal.numpy()
    t = np.linspace(-9, 9, 4001)
    for bits in (1, 5, 12):
        distance = np.round(t * 2 ** (INVERSE_BITS + bits)).astype(np.int64)
        values = phi(distance, bits, normal) / 2**NORMAL_BITS
        np.testing.assert_allclose(values, norm.cdf(distance / 2.0 ** (INVERSE_BITS + bits)), atol=1e-6)
        assert (np.diff(values) >= 0).all()


@pytest.mark.parametrize("with_means", [False, True])
def test_every_row_is_a_distribution_in_which_nothing_is_impossible(with_means):
    rows = GaussianRows(TABLES, BITS)
    table, counts = rows.without_means, [1] * LEVELS
    if with_means:
        table, counts = rows.with_means, [1 << steps for steps in rows.steps]
    levels = np.repeat(np.arange(LEVELS), counts)
    assert len(table.offsets) == len(levels)
    for number, level in enumerate(levels):
        cdf = table.row(number)
        assert cdf[0] == 0 and cdf[-1] == 2**16 and (np.diff(cdf) >= 1).all()
        assert len(cdf) == 2 * rows.reach[level] + 4 and table.offsets[number] == -rows.reach[level]


@pytest.mark.parametrize(
    ("rows", "bad"),
    [
        ([[0, 5, 2**16], [0, 0, 2**16]], 1),  # a bin without a frequency
        ([[0, 5, 2**16], [0, 7, 5, 2**16], [0, 1, 2**16]], 1),
        ([[0, 5, 2**16], [0, 5, 9]], 1),  # does not reach 2^16
        ([[1, 5, 2**16]], 0),
        ([[0, 1, 2**16], []], 1),  # empty
        ([[0, 2**16]], 0),  # one bin, whose frequency needs 17 bits
    ],
)
def test_what_is_no_distribution_is_no_table(rows, bad):
    with pytest.raises(InputError, match=f"row {bad} .* no distribution"):
        RowTable.of([np.asarray(row, dtype=np.int64) for row in rows], [0] * len(rows))


def test_frequencies_by_hand():
    assert frequencies(np.array([0, 2**29, 2**30])).tolist() == [
        0,
        1 + (2**29 * (2**16 - 3) >> 30),
        2 + (2**16 - 3),
        2**16,
    ]


@pytest.mark.parametrize("whole_numbers", [False, True])
@pytest.mark.parametrize("scale", [0.05, 0.11, 0.3, 1.0, 7.0, 90.0])
def test_cost_is_that_of_the_exact_density(scale, whole_numbers):
    """Levels of the scale, steps of the mean and 16-bit frequencies together cost less than 1e-3 bits a
    symbol and 0.1 %."""
    random = np.random.default_rng(0)
    scales = np.maximum(scale * np.exp(random.normal(0, 0.2, 6000)), 2.0**-BITS)
    means = random.normal(0, 5, len(scales))
    bounded = np.maximum(scales, 0.11)
    latent = means + np.clip(random.normal(0, 1, len(scales)), -4, 4) * bounded
    symbols = np.round(latent if whole_numbers else latent - means)
    rows = GaussianRows(TABLES, BITS).of(whole(scales), whole(means) if whole_numbers else None)
    centre = means if whole_numbers else 0
    exact = -np.log2(
        norm.cdf((symbols + 0.5 - centre) / bounded) - norm.cdf((symbols - 0.5 - centre) / bounded)
    ).sum()
    spent = bits_of(rows, symbols)
    assert -1e-3 * len(symbols) < spent - exact < 1e-3 * len(symbols) + 1e-3 * exact


def test_mixture_costs_what_scipy_says():
    random = np.random.default_rng(1)
    count = 4000
    scales, means = np.exp(random.normal(0, 1, (3, count))), random.normal(0, 3, (3, count))
    weights = random.dirichlet([1, 1, 1], count).T
    chosen = np.array([random.choice(3, p=w / w.sum()) for w in weights.T])
    pick = np.arange(count)
    symbols = np.round(
        means[chosen, pick] + np.clip(random.normal(0, 1, count), -3, 3) * scales[chosen, pick]
    )
    tables = density_tables(BITS, 1e-6)
    rows = MixtureRows(tables, BITS, 3).of(*(whole(part) for part in (scales, means, weights)))
    upper, lower = ((weights * norm.cdf((symbols + side - means) / scales)).sum(0) for side in (0.5, -0.5))
    exact = -np.log2(upper - lower).sum()
    assert abs(bits_of(rows, symbols) - exact) < 2e-3 * count


def test_thresholds_choose_the_nearest_level():
    levels = 2.0**INVERSE_BITS / TABLES.inverses.numpy()
    assert levels[0] == pytest.approx(0.11, rel=1e-4) and levels[-1] == pytest.approx(LARGEST, rel=1e-3)
    scales = np.exp(np.linspace(np.log(0.12), np.log(250), 999))
    chosen = np.searchsorted(TABLES.thresholds.numpy(), np.round(scales * 2**BITS), side="right")
    ratio = np.abs(np.log(scales / levels[chosen]))
    assert (
        ratio.max() < 0.5 * np.log(levels[1] / levels[0]) * 1.1
    )  # the grid of 2^-12 is coarse where scales are small


@pytest.mark.parametrize("whole_numbers", [False, True])
def test_through_the_coder_and_back_with_outliers(whole_numbers):
    random = np.random.default_rng(2)
    scales, means = np.exp(random.normal(0, 1.5, 3000)), random.normal(0, 40, 3000)
    symbols = (
        np.round(random.standard_cauchy(3000) * scales * 3 + (means if whole_numbers else 0))
        .clip(-30000, 30000)
        .astype(np.int64)
    )
    rows = GaussianRows(TABLES, BITS).of(whole(scales), whole(means) if whole_numbers else None)
    encoder = CompressaiEncoder()
    encoder.push(symbols, rows)
    np.testing.assert_array_equal(CompressaiDecoder(encoder.flush(), len(symbols)).pull(rows), symbols)


@pytest.mark.parametrize("step", [0.5, 0.83, 1.0, 2.7])
def test_cost_of_z_in_steps_is_that_of_its_density(step):
    """Beside CompressAI's factorized density, integrated over intervals as wide as the step."""
    torch.manual_seed(0)
    bottleneck = VariableBottleneck(4, init_scale=2).eval()
    with torch.no_grad():
        for parameter in bottleneck.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        bottleneck.quantiles[:, 0] = torch.tensor(
            [[-9.0, 0.37, 9.0], [-9.0, -2.2, 9.0], [-9.0, 0.0, 9.0], [-9.0, 5.5, 9.0]]
        )
    medians = bottleneck._get_medians().detach().flatten()
    table = SteppedRows(factorized_table(bottleneck, medians)).of(round(step * 2**STEP_OF_Z_BITS))
    cdfs, offsets = [table.row(number).tolist() for number in range(4)], table.offsets.tolist()
    most = int(100 / step)
    symbols = torch.arange(-most, most + 1)
    z_hat = (symbols * step + medians[:, None])[None, :, :, None]
    with torch.no_grad():
        exact = bottleneck.step_likelihood(z_hat, torch.full((1, 1, 1, 1), step))[0, :, :, 0].double().numpy()
    for cdf, offset, p in zip(cdfs, offsets, exact):
        assert cdf[0] == 0 and cdf[-1] == 2**PRECISION and all(b > a for a, b in zip(cdf, cdf[1:]))
        share = np.diff(cdf)[:-1] / 2**PRECISION
        there = p[offset + most :][: len(share)]
        assert p.sum() - there.sum() < 1e-4  # what an escape is for
        assert (there * (np.log2(there) - np.log2(share))).sum() < 2e-3  # bits a symbol
