"""Kinds of layers on integers: near the float network, and equal to the bit in the integer program."""

import pytest
import torch
import torch.nn.functional as F
from compressai.models import FactorizedPrior
from torch import nn

from benchmarks.layer_forwards import Apply
from benchmarks.layer_kinds import CHANNELS, KINDS, REFUSED
from licq.integer.lowering import lower
from licq.integer.reference import run
from licq.quant import reductions
from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.quant.qtensor import QTensor
from licq.support.errors import InputError

ROWS, COLUMNS = 48, 80
"""Of the images: not square, no powers of two. The kind sees 12 rows of 20 columns."""

LIMIT = 0.02
"""Of the distance between integers of 16 bits and float, over the deviation of the pixels."""

COARSE = 0.12
"""The same of 8 bits."""


class Around(FactorizedPrior):
    """A small codec whose synthesis holds the kind."""

    def __init__(self, kind: nn.Module):
        super().__init__(CHANNELS, CHANNELS)
        c = CHANNELS
        self.g_a = nn.Sequential(nn.Conv2d(3, c, 9, 8, 4))
        self.g_s = nn.Sequential(nn.ConvTranspose2d(c, c, 4, 2, 1), nn.ReLU(), kind, nn.Conv2d(c, 3 * 16, 1))
        self.g_s.append(nn.PixelShuffle(4))
        with torch.no_grad():
            self.g_a[0].weight.mul_(20)
            self.g_s[0].weight.mul_(0.5)
        self.update()


def images(count: int = 2, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    return (torch.rand(count, 3, ROWS, COLUMNS, generator=draw) * 255).round() / 255


def quantized(make, bits: int = 8):
    """The float codec around a kind, and the frozen one on integers."""
    torch.manual_seed(0)
    network = Around(make()).eval()
    model = QuantModel(network, QuantConfig(w_bits=bits, a_bits=bits))
    model.observe([images()])
    model.freeze()
    return network, model


@torch.no_grad()
def compare(make) -> None:
    """Hold the program against the simulation, to the bit, and both against float. The noise of 8 bits could
    hide a wrong scale; with 16 bits nothing is left that could."""
    x = images(1, seed=1)
    for bits, limit in ((8, COARSE), (16, LIMIT)):
        network, model = quantized(make, bits)
        coverage = model.coverage()
        assert not coverage["kept_in_float"] and not coverage["left_alone"]
        made, expected = model(x)["x_hat"], network(x)["x_hat"].clamp(0, 1)
        if bits == 8:
            assert not coverage["beyond_int32"]
            program = lower(model, ROWS, COLUMNS)
            pixels = run(program, {"pixels": (x * 255).round().to(torch.uint8)})["pixels"]
            assert torch.equal(pixels.float() / 255, made)
        assert expected.std() > 0.01
        assert float((made - expected).square().mean().sqrt() / expected.std()) < limit


NAMES = [
    "BatchNorm2d",
    "GroupNorm",
    "LayerNorm without bias",
    "RMSNorm by a norm",
    "GRN",
    "where of two tensors",
    "product with a comparison",
    "minimum and maximum",
    "standard deviation",
    "amax and amin",
    "bilinear, corners aligned",
    "bicubic interpolation",
    "AvgPool2d, overlapping",
    "AdaptiveAvgPool2d",
    "Conv2d, circular",
    "cumsum",
    "gather",
    "F.conv_transpose2d",
    "matrix times values",
    "channel attention by Conv1d",
    "einsum with a parameter",
    "scaled_dot_product_attention",
    "MultiheadAttention",
    "windows, relative positions",
    "MultiheadAttention, masked",
    "scores of minus infinity",
    "unfold and fold, overlapping",
    "attention between channels",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_kind_is_near_its_float_form_and_equal_in_the_program(name):
    compare(KINDS[name])


def kind(function):
    return lambda: Apply(lambda self, x: function(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x / torch.where(torch.arange(20) % 2 == 0, x + 0.5, -x - 0.5),  # a divisor of both signs
        lambda x: x - 2 / (1.5 + x),
        lambda x: x.clamp(torch.tensor(0.1), 0.8) - x.clamp(max=x.flip(1)),
        lambda x: x * ((x > 0.1) & ~(x >= 0.6)) + 0.2 * (x == 0),
        lambda x: 0.01 * x.sum((2, 3), keepdim=True) + x,
        lambda x: F.group_norm(1e-3 * x, 1),  # eps is as large as the variance
        lambda x: F.group_norm(torch.exp(6 * x.clamp(max=1.5)), 1),  # few large values, many small ones
        lambda x: F.interpolate(F.interpolate(x, size=(7, 9), mode="area"), size=x.shape[2:]),
        lambda x: torch.softmax(torch.where(torch.arange(20) % 3 == 0, x, -torch.inf), 3),
        lambda x: x.clamp(0.1, float("inf")),
        lambda x: (
            F.scaled_dot_product_attention(*[x.flatten(2).transpose(1, 2)] * 3)
            .transpose(1, 2)
            .reshape(x.shape)
        ),
        lambda x: 0.1 * torch.einsum("bchw,bcvw->bchv", x, x) @ torch.ones(12, 20),
        lambda x: F.fold(F.unfold(x, 2, stride=2), x.shape[2:], 2, stride=2),
        lambda x: F.unfold(x, 3, padding=1).unflatten(1, (CHANNELS, 9)).mean(2).reshape(x.shape),
        lambda x: x.permute(0, 2, 3, 1).matmul(torch.eye(CHANNELS)[None, None] * 0.7).permute(0, 3, 1, 2),
    ],
)
def test_a_function_is_near_its_float_form_and_equal_in_the_program(function):
    compare(kind(function))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_has_no_integer_form_is_named(name):
    try:
        _, model = quantized(REFUSED[name])
    except InputError:
        return
    assert model.coverage()["kept_in_float"]


def test_the_indices_of_a_maximum_are_refused():
    with pytest.raises(InputError, match="indices of a minimum or maximum"):
        quantized(kind(lambda x: x + x.max(1, keepdim=True).indices))


def test_weights_that_depend_on_the_size_of_the_image_are_refused():
    _, model = quantized(
        lambda: Apply(
            lambda self, x: F.conv2d(x, self.w * x.shape[3]), w=torch.ones(CHANNELS, CHANNELS, 1, 1)
        )
    )
    model(images(1))
    with pytest.raises(InputError, match="weights of conv2d differ between calls"):
        model(images(1)[..., :64])


def test_a_root_does_not_change_with_its_moment():
    def normalized(x):
        moment = x.square().mean(1, keepdim=True) + 0.1
        spread = moment.sqrt()
        moment += 3
        return x / spread

    compare(kind(normalized))


def test_a_root_whose_view_is_written_in_place_is_refused():
    def overwritten(x):
        spread = (x.square().mean(1, keepdim=True) + 0.1).sqrt()
        spread[:, :, :2].mul_(3)
        return x / spread

    with pytest.raises(InputError, match="overwritten|in place"):
        quantized(kind(overwritten))


def test_comparisons_pass_no_gradient_and_sums_of_moments_do():
    _, model = quantized(KINDS["division"])
    q = torch.randint(0, 2**24, (3, 5000), generator=torch.Generator().manual_seed(0)).double()
    x = QTensor(q.requires_grad_(True), torch.tensor(0.5, dtype=torch.float64), model.runtime)
    assert not (x > 2.0**22).q.requires_grad
    x.bound = 2**24
    mean = reductions.mean(model.runtime, x, [1])
    assert mean.bound <= 2**30
    assert torch.allclose(mean.real().double(), x.real().double().mean(1, True), rtol=1e-5)
    mean.real().sum().backward()
    assert torch.allclose(q.grad, torch.full_like(q, 0.5 / 5000))


def test_a_mean_of_many_small_numbers_beside_a_large_one_keeps_them():
    _, model = quantized(KINDS["division"])
    q = torch.full((1, 2**20 + 37), 1500.0, dtype=torch.float64)
    q[0, 5] = 2**24
    x = QTensor(q, torch.ones((), dtype=torch.float64), model.runtime)
    x.bound = 2**24
    mean = reductions.mean(model.runtime, x, [1]).real()
    assert float(mean) == pytest.approx(float(q.mean()), rel=2e-3)
