"""Kernels for rows of calibration against PyTorch's forms."""

import pytest
import torch

from licq.quant import fused, fused_rows
from licq.quant.integer_functions import softmax_table
from licq.quant.sums import layer_norm, softmax
from tests.quant.test_fused import both

pytestmark = pytest.mark.skipif(fused.kernels() is None, reason="no compiled kernels")


def uniform(low: int, high: int, shape, seed: int) -> torch.Tensor:
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize(
    "shape, offsets",
    [
        ((2, 20, 3, 16, 100), (4, 3, 16, 100)),  # windows of four kinds
        ((2, 3, 7, 9), (3, 7, 9)),
        ((5, 4, 64), None),
        ((2, 3, 4, 4), (1, 1, 4, 4)),
        ((2, 3, 4, 1), (1, 3, 1, 1)),  # an offset that the kernel does not take
    ],
)
def test_softmax_is_alike_to_the_bit_and_its_gradient_nearly(shape, offsets):
    q = uniform(-3000, 3000, shape, 0).requires_grad_()
    bias = kinds = None
    if offsets is not None:
        generator = torch.Generator().manual_seed(1)
        bias = torch.randn(offsets, generator=generator)
        bias[torch.rand(offsets, generator=generator) < 0.3] = float("-inf")
        kinds = torch.randint(0, 4, (20,), generator=generator) if len(shape) == 5 else None
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(2))

    def run():
        p = softmax(q, softmax_table(), bias, kinds, -1)
        return [p.detach(), *torch.autograd.grad(p, q, gradient)]

    (p, grad), expected = both(run)
    assert torch.equal(p, expected[0])
    assert (grad - expected[1]).abs().max() <= 1e-6 * expected[1].abs().max()


def test_one_offset_for_all_scores_changes_nothing():
    q = uniform(-300, 300, (2, 3, 5), 0)
    expected = softmax(q, softmax_table(), None, None, -1)
    assert torch.equal(softmax(q, softmax_table(), torch.tensor(-0.5), None, -1), expected)


@pytest.mark.parametrize("shape", [(2, 5, 48), (3, 17), (2, 2, 320), (4, 1)])
@pytest.mark.parametrize("eps", [0.3, 1e-5, 1e5])
def test_layer_norm_is_alike_to_the_bit_and_its_gradient_nearly(shape, eps):
    x = uniform(-32000, 32000, shape, 0)
    x[0] = 7  # rows of equal values
    x.requires_grad_()
    channels = shape[-1:]
    multiplier = torch.randn(channels, generator=torch.Generator().manual_seed(1)).double() * 2
    offset = uniform(-100, 100, channels, 2).double()
    low, high = torch.full(channels, -5000.0), torch.full(channels, 6000.0)
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(3))

    def run():
        out = layer_norm(x, eps, multiplier, offset, low, high, 2.0**-12)
        return [out.detach(), *torch.autograd.grad(out, x, gradient)]

    (out, grad), expected = both(run)
    assert torch.equal(out, expected[0])
    assert (grad - expected[1]).abs().max() <= 1e-5 * expected[1].abs().max() + 1e-12


@pytest.mark.parametrize("masked", [False, True])
def test_a_block_is_rounded_as_column_by_column(masked):
    generator = torch.Generator().manual_seed(0)
    work = torch.randn(12, 70, generator=generator) * 9
    within = torch.randn(12, 12, generator=generator) * 0.3
    mask = torch.rand(12, 70, generator=generator) > 0.4 if masked else None
    target, expected = work.clone(), work.clone()
    w_int, error = torch.empty_like(work), torch.empty_like(work)
    assert fused_rows.compensated_block(target, work, within, (-7, 7), mask, w_int, error)
    for j in range(len(work)):
        column = (expected[j].abs() + 0.5).floor() * expected[j].sign()
        column = column.clamp(-7, 7) * (1 if mask is None else mask[j])
        assert torch.equal(w_int[j], column)
        expected[j + 1 :] += within[j, j + 1 :, None] * (work[j] - column)
    assert torch.allclose(error, work - w_int)
