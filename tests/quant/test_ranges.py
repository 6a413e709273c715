import dataclasses

import pytest
import torch

from licq.quant.fixedpoint import int_range
from licq.quant.ranges import RangeSpec, lp_range, max_range, mse_range, percentile_range, sigma_range
from licq.support.errors import InputError

ALL = ["max", "mse", "lp2.4", "percentile99.99", "sigma3"]


def samples(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(x, r, bits, signed, p=2.0):
    qmin, qmax = int_range(bits, signed)
    x, scale = x.double(), r / qmax
    return ((x / scale).round().clamp(qmin, qmax) * scale - x).abs().pow(p).mean().item()


@pytest.mark.parametrize("text", ALL)
def test_shapes_follow_the_granularity_and_channels_do_not_mix(text):
    x = samples(3, 4, 6, 5) * torch.tensor([1.0, 10.0, 0.1, 3.0]).reshape(4, 1, 1)
    spec = RangeSpec.parse(text)
    whole = spec.estimate(x, None)
    assert whole.shape == () and whole.dtype == torch.float64
    for axis in (1, -3):
        by_channel = spec.estimate(x, axis)
        assert by_channel.shape == (4,)
        for c in range(4):
            assert by_channel[c].item() == pytest.approx(spec.estimate(x[:, c], None).item(), rel=1e-6)


def test_max_is_the_largest_magnitude_and_unsigned_ignores_negatives():
    x = torch.tensor([[-5.0, 2.0], [1.0, -0.5]])
    assert max_range(x, 0).tolist() == [5.0, 1.0]
    assert max_range(x, 0, signed=False).tolist() == [2.0, 1.0]
    assert max_range(x, None).item() == 5.0


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("p", [1.0, 2.0, 2.4])
def test_lp_is_as_good_as_an_exhaustive_search(bits, signed, p):
    x = samples(4000, seed=bits).pow(3)
    x = x if signed else x.abs()
    r = lp_range(x, None, bits, signed, p)
    largest = x.abs().max().double()
    best = min(error(x, largest * i / 400, bits, signed, p) for i in range(2, 401))
    assert error(x, r, bits, signed, p) <= best * 1.01
    assert r <= largest


def test_mse_is_lp2_and_clips_an_outlier_that_max_keeps():
    x = torch.cat([samples(20000), torch.tensor([40.0])])
    r = mse_range(x, None, 4)
    assert torch.equal(r, lp_range(x, None, 4, p=2.0))
    assert r < 10 and max_range(x, None, 4) == 40
    assert error(x, r, 4, True) < 0.2 * error(x, torch.tensor(40.0).double(), 4, True)


def test_mse_of_values_on_the_grid_keeps_the_maximum():
    assert mse_range(torch.arange(-127.0, 128.0), None, 8).item() == 127.0


def test_percentile_is_the_order_statistic_and_falls_back_to_the_maximum_where_it_is_zero():
    x = torch.arange(1.0, 10001.0)[torch.randperm(10000, generator=torch.Generator().manual_seed(0))]
    assert percentile_range(-x, None, percent=99.99).item() == 9999.0
    assert percentile_range(x, None, percent=50).item() == 5000.0
    assert percentile_range(x, None, percent=100).item() == 10000.0
    sparse = torch.zeros(1000)
    sparse[7] = 3.0
    assert percentile_range(sparse, None, percent=99).item() == 3.0


def test_sigma_is_mean_plus_k_deviations_but_never_above_the_maximum():
    x = samples(50000) - 2
    expected = x.double().mean().abs() + 2 * x.double().std(correction=0)
    assert sigma_range(x, None, k=2).item() == pytest.approx(expected.item(), rel=1e-5)
    assert sigma_range(x, None, k=50).item() == x.abs().max().item()


@pytest.mark.parametrize("text", ALL)
def test_a_channel_of_zeros_gets_a_small_positive_range(text):
    spec = RangeSpec.parse(text)
    x = torch.stack([torch.zeros(64), samples(64), 4 * samples(64)])
    r = spec.estimate(x, 0)
    assert r[0] == r.max() * 2**-8
    assert spec.estimate(torch.zeros(5), None) == 2**-8
    assert spec.estimate(-torch.ones(5), None, signed=False) > 0


@pytest.mark.parametrize("text", ALL)
def test_one_element_is_its_own_range(text):
    assert RangeSpec.parse(text).estimate(torch.tensor([[-0.3]]), 0).item() == pytest.approx(0.3, rel=1e-6)


@pytest.mark.parametrize("text", ALL)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), None])
def test_empty_tensors_and_values_that_are_not_finite_are_refused(text, bad):
    x = torch.zeros(0, 3) if bad is None else torch.tensor([[1.0, bad, 2.0]])
    with pytest.raises(ValueError):
        RangeSpec.parse(text).estimate(x, 0)


@pytest.mark.parametrize("text", ["mse", "percentile99.9"])
def test_a_large_tensor_is_sampled_the_same_way_every_time_and_hardly_worse_than_all_of_it(text, monkeypatch):
    x = samples(1, 2, 512, 512, seed=3)
    x[..., ::4] *= 5
    spec = RangeSpec.parse(text)
    everything = spec.estimate(x, 1)
    monkeypatch.setattr("licq.quant.ranges._SAMPLES", 2**18)
    sampled = spec.estimate(x, 1)
    assert torch.equal(sampled, spec.estimate(x, 1)) and not torch.equal(sampled, everything)
    for c in range(2):
        if text == "mse":
            assert error(x[:, c], sampled[c], 8, True) <= error(x[:, c], everything[c], 8, True) * 1.02
        else:
            assert sampled[c].item() == pytest.approx(everything[c].item(), rel=0.03)


def test_specs_are_written_as_they_are_read_and_cannot_change():
    for text in [*ALL, "lp1", "percentile100", "sigma2.5"]:
        assert str(RangeSpec.parse(text)) == text
    assert RangeSpec.parse("lp2.4") == RangeSpec("lp", 2.4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        RangeSpec("max").method = "mse"


@pytest.mark.parametrize(
    "text", ["", "median", "lp", "lp0", "max3", "percentile", "percentile101", "sigma-1", "MSE", "lp2.4x"]
)
def test_a_spec_that_makes_no_sense_is_refused_in_one_line(text):
    with pytest.raises(InputError) as caught:
        RangeSpec.parse(text)
    assert "\n" not in str(caught.value)
