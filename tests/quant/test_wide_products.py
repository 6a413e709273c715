import pytest
import torch
from torch import nn

from licq.quant.config import QuantConfig
from licq.quant.fixedpoint import EXACT_FLOAT32
from licq.quant.layers import QuantConv2d, QuantConvTranspose2d, QuantLinear
from licq.quant.wide_products import exact_sums, sums_reach

LAYERS = {
    "conv": (lambda: QuantConv2d(nn.Conv2d(40, 6, 5, 2, 2), QuantConfig()), (2, 40, 17, 15)),
    "deconv": (
        lambda: QuantConvTranspose2d(nn.ConvTranspose2d(40, 6, 5, 2, 2, 1), QuantConfig()),
        (2, 40, 9, 8),
    ),
    "linear": (lambda: QuantLinear(nn.Linear(400, 6), QuantConfig()), (3, 50, 400)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("largest, split", [(20, False), (255, False), (4000, False), (508, True)])
def test_sums_beyond_float32_are_exact_and_have_the_gradient_of_one_product(kind, largest, split):
    make, shape = LAYERS[kind]
    node, generator = make(), torch.Generator().manual_seed(1)
    x = torch.randint(-largest, largest + 1, shape, generator=generator).float()
    if split:  # multiples of 16, but for the split channels
        channels = torch.arange(shape[node.channel_dim]) % 5 == 0
        node.input_grid.split(channels)
        axes = [-1 if axis == node.channel_dim % x.ndim else 1 for axis in range(x.ndim)]
        steps = torch.where(channels, 1, 16).reshape(axes)
        x = torch.where(steps == 1, x * 16 + 3, x // 8 * 16)
    x.requires_grad_()
    weight = torch.randint(-127, 128, node.float_weight().shape, generator=generator).float().requires_grad_()
    bias = torch.randint(-(2**29), 2**29, (6,), generator=generator).double()
    expected = node.product_with_bias(x.double(), weight.double(), bias)
    sums = exact_sums(node, x, weight, bias)
    assert sums is not None and torch.equal(sums.double(), expected)
    gradient = torch.randn(sums.shape, generator=generator)
    ours = torch.autograd.grad(sums, (x, weight), gradient.to(sums.dtype))
    theirs = torch.autograd.grad(expected, (x, weight), gradient.double())
    for mine, other in zip(ours, theirs):
        assert torch.allclose(mine, other.float(), rtol=1e-3, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("kind", LAYERS)
def test_no_sum_of_magnitudes_passes_the_reach(kind):
    make, shape = LAYERS[kind]
    node, generator = make(), torch.Generator().manual_seed(2)
    x = torch.randint(0, 256, shape, generator=generator).float()
    weight = torch.randint(-127, 128, node.float_weight().shape, generator=generator).float()
    largest = float(node.product(x.double(), weight.double().abs()).max())
    assert largest <= sums_reach(node, x, weight) < 30 * EXACT_FLOAT32
