"""Scales that methods of the literature choose: powers of two, groups, SmoothQuant's, FQ-ViT's; bounded
accumulators; levels of softmax."""

import itertools
import math

import pytest
import torch
from torch import nn

from licq.quant.config import QuantConfig
from licq.quant.fixedpoint import power_of_two_scale
from licq.quant.integer_functions import LEVEL_UNIT, SOFTMAX_UNIT, level_table
from licq.quant.mac import QuantMAC
from licq.quant.model import QuantModel
from licq.quant.qtensor import QTensor
from licq.quant.quantizer import Quantizer
from licq.quant.transforms import range_groups
from licq.support.errors import InputError


class Codec(nn.Module):
    """Two layers whose inputs and outputs have channels of very different ranges."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        with torch.no_grad():
            self.first.weight *= torch.logspace(-1.5, 1, 12).reshape(-1, 1, 1, 1)
            self.second.weight *= torch.logspace(-1, 1, 8).reshape(-1, 1, 1, 1) * torch.linspace(
                0.2, 3, 12
            ).reshape(1, -1, 1, 1)

    def forward(self, x):
        return {"x_hat": self.second(torch.relu(self.first(x)))[:, :3], "likelihoods": {}}


def observed(**config) -> tuple[QuantModel, QuantMAC]:
    model = QuantModel(Codec(), QuantConfig(a_headroom=1.0, **config))
    generator = torch.Generator().manual_seed(1)
    model.observe([torch.randint(0, 256, (2, 3, 24, 24), generator=generator) / 255])
    return model, model.nodes["second"]


def test_powers_of_two_are_the_least_above():
    s = torch.tensor(
        [1.0, 1.0 + 2.0**-30, 1.01, 0.75, 3.0, 2.0**-40, 0.5], dtype=torch.float64, requires_grad=True
    )
    found = power_of_two_scale(s)
    assert found.tolist() == [1, 1, 2, 1, 4, 2.0**-24, 0.5]
    found.sum().backward()
    assert s.grad.tolist() == [1] * 7


def test_all_scales_are_powers_of_two_and_requantization_is_a_shift():
    model, node = observed(scales="power_of_two")
    model.freeze()
    scale = node.input_grid.parameters_of_grid()[0]
    for found in (scale, node.out_scale / scale.max()):
        assert torch.equal(torch.exp2(torch.log2(found).round()), found) and len(set(found.tolist())) > 2


def test_powers_of_two_of_weights_leave_the_scales_of_inputs_alone():
    both, weights, neither = (
        observed(scales=scales)[1] for scales in ("power_of_two", "power_of_two_weights", "fixed_point")
    )
    inputs = [node.input_grid.parameters_of_grid()[0] for node in (both, weights, neither)]
    assert torch.equal(inputs[1], inputs[2]) and not torch.equal(inputs[0], inputs[1])
    scale = weights.weight_quantizer.scale(weights.folded_weight()[0])
    assert torch.equal(torch.exp2(torch.log2(scale).round()), scale)


@pytest.mark.parametrize("granularity", ["channel", "groups3", "tensor"])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_take_the_power_of_two_with_the_smaller_error(granularity, bits):
    model, node = observed(scales="power_of_two", w_range="mse", w_bits=bits, w_granularity=granularity)
    weight, _ = node.folded_weight()
    quantizer = node.weight_quantizer
    group = quantizer.group if quantizer.group is not None else torch.arange(8) * (granularity == "channel")

    def errors(factor: float) -> torch.Tensor:
        scale = (quantizer.scale(weight) * factor).expand(8).reshape(-1, 1, 1, 1)
        largest = 2 ** (bits - 1) - 1
        each = ((weight / scale).round().clamp(-largest, largest) * scale - weight).square().flatten(1).sum(1)
        return torch.zeros(8, dtype=each.dtype).index_add_(0, group, each)

    assert bool((errors(1) <= errors(2)).all()) and bool((errors(1) <= errors(0.5)).all())


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_groups_lose_the_fewest_bits(count):
    ranges = torch.rand(8, generator=torch.Generator().manual_seed(count)) ** 3 + 0.01
    groups = range_groups(ranges, count)

    def lost(cut: torch.Tensor) -> float:
        return sum(
            float(torch.log2(ranges[cut == g].max() / ranges[cut == g]).sum()) for g in set(cut.tolist())
        )

    order = ranges.argsort()
    least = math.inf
    for ends in itertools.combinations(range(1, 8), count - 1):
        cut = torch.empty(8, dtype=torch.int64)
        for number, (start, end) in enumerate(zip((0, *ends), (*ends, 8))):
            cut[order[start:end]] = number
        least = min(least, lost(cut))
    assert lost(groups) == pytest.approx(least, abs=1e-5) and len(set(groups.tolist())) <= count


def test_channels_of_a_group_share_a_scale():
    model, node = observed(w_granularity="groups3")
    model.freeze()
    assert len(set(node.out_scale.tolist())) == 3
    with pytest.raises(InputError, match="w_granularity"):
        QuantConfig(w_granularity="groups0")


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_smooth_is_the_formula(alpha):
    plain, smooth = observed(transform="fold")[1], observed(transform="smooth", smooth_alpha=alpha)[1]
    own, found = (node.input_grid.parameters_of_grid()[0] for node in (plain, smooth))
    factor = own**alpha / plain.float_weight().abs().amax((0, 2, 3)).double() ** (1 - alpha)
    tensor = (own / factor).max()  # the one scale of x over its factor
    assert torch.allclose(found, factor * tensor, rtol=1e-3)
    assert bool((found >= own * (1 - 1e-3)).all())


def test_factors_are_powers_of_two_of_one_scale():
    own, found = (observed(transform=name)[1].input_grid.parameters_of_grid()[0] for name in ("fold", "ptf"))
    ratio = torch.log2(found.max() / found)
    assert torch.allclose(ratio, ratio.round(), atol=1e-3) and set(ratio.round().tolist()) <= {0, 1, 2, 3}
    assert bool((found >= own * (1 - 1e-3)).all()) and len(set(ratio.round().tolist())) > 1


@pytest.mark.parametrize("bits", [24, 32])
def test_sums_fit_the_accumulator(bits):
    wide = observed(w_bits=16, a_bits=16)[0]
    wide.freeze()
    assert max(float(node.bound) for node in wide.nodes.values() if isinstance(node, QuantMAC)) >= 2**31
    model, _ = observed(w_bits=16, a_bits=16, accumulator_bits=bits)
    model.freeze()
    bounds = [float(node.bound) for node in model.nodes.values() if isinstance(node, QuantMAC)]
    assert max(bounds) < 2 ** (bits - 1) and (bits > 24 or max(bounds) > 2 ** (bits - 2))


def test_an_accumulator_too_small_is_one_line():
    with pytest.raises(InputError, match="accumulator_bits"):
        observed(w_bits=16, a_bits=16, accumulator_bits=18)


@pytest.mark.parametrize(("kind", "base"), [("log2", 2.0), ("log_sqrt2", 2**0.5)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_levels_are_the_nearest_powers(kind, base, bits):
    table = level_table(kind, bits)
    assert len(table) == 2**16 + 1 and table[0] == 0 and table[-1] == round(1 / LEVEL_UNIT)
    for p in (1, 3, 5, 100, 777, 20000, 40000, 60000, 2**16):
        k = math.floor(-math.log(p * SOFTMAX_UNIT, base) + 0.5)
        level = base**-k if k < 2**bits and base**-k >= 2**-14 - 1e-9 else 0.0
        assert abs(int(table[p]) * LEVEL_UNIT - level) <= LEVEL_UNIT / 2


def test_ranges_are_estimated_from_values_of_which_a_thousandth_matters():
    """Far values that are rare: an estimator that sees too few of them clips them all, and the error is
    theirs."""
    generator = torch.Generator().manual_seed(2)
    grid = Quantizer(8, 24, channel_dim=1, spec="mse", symmetry="symmetric")
    model = QuantModel(Codec(), QuantConfig())
    batches = [torch.randn(2, 4, 96, 96, generator=generator) for _ in range(6)]
    for batch in batches:
        batch[torch.rand(batch.shape, generator=generator) < 5e-4] *= 25
    for batch in batches:
        grid.observe(batch)
    assert grid.observer.samples().numel() <= 2**21
    grid.initialize()

    def error(grid: Quantizer) -> float:
        with torch.no_grad():
            return sum(
                float((grid(QTensor(batch, None, model.runtime)).real() - batch).square().mean())
                for batch in batches
            )

    found = error(grid)
    for factor in (0.5, 0.7, 1.4, 2.0):
        grid.log_n.data += math.log(factor)
        assert found < 1.1 * error(grid)
        grid.log_n.data -= math.log(factor)


def test_a_range_of_k_sigma_is_that_of_the_values():
    x = 1.5 * torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3)) + torch.tensor(
        [0.0, 1.0, -2.0]
    ).reshape(1, 3, 1, 1)
    grid = Quantizer(8, 24, channel_dim=1, spec="sigma2", symmetry="symmetric")
    grid.observe(x)
    grid.initialize()
    expected = x.mean((0, 2, 3)).abs() + 2 * x.std((0, 2, 3), correction=0)
    assert torch.allclose(grid.parameters_of_grid()[0].float() * 127, expected, rtol=2e-3)
