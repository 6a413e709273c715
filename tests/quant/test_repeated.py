"""Integers that a gather repeats are quantized before it, with the same bits and gradients."""

import pytest
import torch

from licq.quant import layout
from licq.quant.config import QuantConfig
from licq.quant.qtensor import QTensor
from licq.quant.quantizer import Quantizer
from licq.quant.runtime import Runtime


def windows(x):
    """(2, 6, 12) at 15 positions -> (2, 3 windows, 2 heads, 5 keys, 6) and its transpose."""
    positions = torch.tensor([0, 1, 2, 3, 4, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1])
    x = x.index_select(1, positions).reshape(2, 3, -1, 2, 6).permute(0, 1, 3, 2, 4)
    return x.transpose(-2, -1)


@pytest.mark.parametrize("scales", ["one", "heads"])
def test_numbers_are_requantized_before_they_are_repeated(scales, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-4000, 4000, (2, 6, 12), generator=generator).float()
    step = (torch.rand(1, 1, 12, generator=generator, dtype=torch.float64) + 0.5) * 2.0**-12
    grid = Quantizer(8, 24, -3 if scales == "heads" else None)
    grid.observe(windows(q * step).float())
    grid.initialize()
    gradient = torch.randn(2, 3, 2, 6, 5, generator=generator)
    calls = []

    def run(deferred: bool):
        if not deferred:
            monkeypatch.setattr(layout, "_worth_deferring", lambda *_: False)
        numbers, scale = q.clone().requires_grad_(), step.clone().requires_grad_()
        x = windows(QTensor(numbers, scale, Runtime(QuantConfig())))
        calls.append(x.repeated is not None)
        out = grid(x)
        return [out.q.detach(), out.scale, *torch.autograd.grad(out.q, (numbers, scale), gradient)]

    first, second = run(True), run(False)
    assert calls == [True, False]
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert torch.allclose(first[2], second[2]) and torch.allclose(first[3], second[3])


def test_repeated_numbers_can_be_read_as_any_others():
    q = torch.arange(24.0).reshape(1, 4, 6)
    scale = torch.ones(1, 1, 6, dtype=torch.float64)
    x = QTensor(q, scale, Runtime(QuantConfig())).index_select(1, torch.tensor([0, 0, 1, 2, 3, 3]))
    assert x.repeated is not None and x.shape == (1, 6, 6) and x.ndim == 3 and x.numel() == 36
    assert torch.equal(x[:, 1:3].q, q[:, :2])
    assert x.repeated is None


@pytest.mark.parametrize("change", ["add", "multiply"])
def test_an_operation_in_place_reaches_the_next_quantizer(change):
    """It was lost: the quantizer took the numbers from before the gather."""
    grid = Quantizer(8, 24)
    grid.observe(torch.tensor([-4.0, 4.0]))
    grid.initialize()
    q, scale = torch.arange(24.0).reshape(1, 4, 6), torch.full((), 2.0**-3, dtype=torch.float64)
    x = QTensor(q, scale, Runtime(QuantConfig())).index_select(1, torch.tensor([0, 1, 1, 2, 3, 3]))
    other = QTensor(q.index_select(1, torch.tensor([0, 1, 1, 2, 3, 3])), scale, x.runtime)
    x.overwrite(x.like(x.q + 5 if change == "add" else x.q * 2, scale), change)
    assert x.repeated is None
    expected = grid(other.like(other.q + 5 if change == "add" else other.q * 2, scale))
    assert torch.equal(grid(x).q, expected.q)


def test_a_reshape_over_the_gathered_dimension_and_an_index_without_dimensions():
    runtime, grid = Runtime(QuantConfig()), Quantizer(8, 24, 1)
    q = torch.arange(48.0).reshape(2, 4, 6)
    scale = torch.rand(1, 1, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    x = QTensor(q, scale, runtime).index_select(1, torch.tensor([0, 1, 1, 2, 3, 3])).flatten(1)
    grid.observe(x.real())
    grid.initialize()
    assert torch.equal(grid(x).q, grid(QTensor(x.q, x.scale, runtime)).q)
    assert QTensor(q, scale, runtime).index_select(1, torch.tensor(2)).shape == (2, 1, 6)
