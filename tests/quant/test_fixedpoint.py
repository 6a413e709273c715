import random

import pytest
import torch

from licq.quant.fixedpoint import (
    fixed_point_scale,
    int_range,
    multiplier_value,
    quantize_multiplier,
    requantize,
    requantize_ste,
    round_half_away,
    round_ste,
    straight_through,
)


def requantize_by_hand(acc: int, mantissa: int, shift: int) -> int:
    """The definition, in Python's unbounded integers."""
    product = abs(acc) * mantissa
    magnitude = product << -shift if shift <= 0 else (2 * product + (1 << shift)) // (2 << shift)
    return magnitude if acc >= 0 else -magnitude


def hard_cases(count: int, seed: int):
    """Accumulators, mantissas and shifts with many ties, extremes and every kind of shift."""
    draw = random.Random(seed)
    cases = []
    for _ in range(count):
        mantissa = draw.choice(
            [draw.randrange(2**21, 2**22), 2**22 - 1 - draw.randrange(4), 2**21, 3 * 2**20]
        )
        acc = draw.choice(
            [
                draw.randint(-(2**31), 2**31 - 1),
                2**31 - 1 - draw.randrange(4),
                -(2**31) + draw.randrange(4),
                draw.randint(-40, 40),
                draw.choice([-1, 1]) << draw.randrange(31),
            ]
        )
        shift = draw.choice([draw.randint(-5, 75), draw.randint(18, 54), 0, 62, 63])
        cases.append((acc, mantissa, shift))
    return cases


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_halves_round_away_from_zero(dtype):
    x = torch.tensor([0.5, -0.5, 1.5, -1.5, 2.5, -2.5, 0.25, -0.75, 0.0], dtype=dtype)
    assert round_half_away(x).tolist() == [1, -1, 2, -2, 3, -3, 0, -1, 0]
    assert round_half_away(x).dtype == dtype


def test_rounding_is_exact_just_below_one_half_and_above_2_to_52():
    x = torch.tensor(
        [0.49999999999999994, -0.49999999999999994, 2.0**52 + 1, -(2.0**52) - 3, 2.0**53 - 1, 2.0**51 + 0.5],
        dtype=torch.float64,
    )
    assert round_half_away(x).tolist() == [0, 0, 2.0**52 + 1, -(2.0**52) - 3, 2.0**53 - 1, 2.0**51 + 1]
    y = torch.tensor([0.49999997, 2.0**23 + 1, 2.0**24 - 1], dtype=torch.float32)
    assert round_half_away(y).tolist() == [0, 2.0**23 + 1, 2.0**24 - 1]


def test_rounding_never_returns_negative_zero_and_leaves_its_input_alone():
    x = torch.tensor([-0.3, -0.0, 0.3])
    assert not torch.signbit(round_half_away(x)).any()
    assert torch.equal(x, torch.tensor([-0.3, -0.0, 0.3]))


def test_straight_through_rounding_passes_the_gradient_unchanged():
    x = torch.tensor([0.7, -1.6], requires_grad=True)
    y = round_ste(x)
    (y * torch.tensor([3.0, 5.0])).sum().backward()
    assert y.tolist() == [1.0, -2.0]
    assert x.grad.tolist() == [3.0, 5.0]


def test_straight_through_keeps_exact_values_to_the_bit_where_adding_and_subtracting_would_not():
    exact = torch.tensor([1.0, 3.0])
    smooth = torch.tensor([1e9, 0.1], requires_grad=True)
    y = straight_through(exact, smooth * 2)
    y.sum().backward()
    assert torch.equal(y.detach(), exact) and not exact.requires_grad
    assert smooth.grad.tolist() == [2.0, 2.0]
    with pytest.raises(ValueError):
        straight_through(torch.zeros(2), torch.zeros(3))


def test_fixed_point_scale_rounds_to_the_grid_and_is_never_zero():
    s = torch.tensor([0.1, 1e-12, 0.0, -1.0, 1e6, 1.5 * 2**-8], dtype=torch.float64, requires_grad=True)
    gamma = fixed_point_scale(s, frac_bits=8, scale_bits=16)
    assert (gamma * 256).tolist() == [26, 1, 1, 1, 2**15 - 1, 2]
    gamma.sum().backward()
    assert s.grad.tolist() == [1.0] * 6
    default = fixed_point_scale(torch.tensor([0.1]))
    assert default.dtype == torch.float64
    assert abs(default.item() - 0.1) <= 2**-25 + 1e-8


def test_multiplier_is_a_22_bit_mantissa_and_a_shift():
    draw = torch.Generator().manual_seed(0)
    m = torch.exp(torch.rand(5000, generator=draw, dtype=torch.float64) * 60 - 40)
    mantissa, shift = quantize_multiplier(m)
    assert mantissa.min() >= 2**21 and mantissa.max() < 2**22
    relative = (multiplier_value(mantissa, shift) / m - 1).abs().max().item()
    assert relative <= 2**-22


def test_powers_of_two_are_exact_and_a_mantissa_that_rounds_up_to_the_next_power_carries():
    m = torch.tensor([1.0, 0.5, 2.0**-30, 8.0, 1 - 2.0**-30, 2.0**-1060, 1e300], dtype=torch.float64)
    mantissa, shift = quantize_multiplier(m)
    assert mantissa[:6].tolist() == [2**21] * 6
    assert shift[:6].tolist() == [21, 22, 51, 18, 21, 1081]
    assert multiplier_value(mantissa, shift)[-1].item() == pytest.approx(1e300, rel=2**-22)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_multiplier_that_is_not_positive_and_finite_is_refused(bad):
    with pytest.raises(ValueError):
        quantize_multiplier(torch.tensor([1.0, bad], dtype=torch.float64))


def test_requantize_equals_unbounded_integers_in_float_and_in_int64():
    cases = hard_cases(20000, seed=1)
    expected = torch.tensor([requantize_by_hand(*case) for case in cases])
    acc, mantissa, shift = (torch.tensor(column) for column in zip(*cases))
    assert torch.equal(requantize(acc, mantissa, shift), expected)
    assert torch.equal(requantize(acc.to(torch.float64), mantissa, shift), expected.to(torch.float64))
    assert torch.equal(
        requantize(acc.to(torch.float64), mantissa.double(), shift.double()), expected.to(torch.float64)
    )


def test_requantize_rounds_every_tie_away_from_zero():
    acc = torch.arange(-9, 10, 2, dtype=torch.float64)
    half = quantize_multiplier(torch.tensor(0.5))
    expected = torch.sign(acc) * torch.floor(acc.abs() / 2 + 0.5)
    assert torch.equal(requantize(acc, *half), expected)
    assert torch.equal(requantize(acc.float(), *half), expected.float())
    assert torch.equal(requantize(acc.to(torch.int32), *half), expected.to(torch.int64))


def test_requantize_broadcasts_one_multiplier_per_channel_over_odd_shapes_and_pieces():
    draw = torch.Generator().manual_seed(2)
    m = torch.rand(7, 1, 1, generator=draw, dtype=torch.float64) * 1e-3 + 1e-5
    mantissa, shift = quantize_multiplier(m)
    for shape in [(1, 7, 150, 111), (3, 7, 1, 5), (2, 7, 101, 99), (7, 3, 0)]:
        acc = torch.randint(-(2**23), 2**23, shape, generator=draw)
        whole = requantize(acc, mantissa, shift)
        assert torch.equal(requantize(acc.float(), mantissa, shift), whole.float())
        by_channel = (acc.double() * multiplier_value(mantissa, shift)).abs().add(0.5).floor() * acc.sign()
        assert torch.equal(whole.double(), by_channel)
    wide = torch.randint(-(2**23), 2**23, (2, 300000), generator=draw)
    wide_m = quantize_multiplier(torch.tensor([[1e-4], [2e-4]]))
    assert torch.equal(requantize(wide.double(), *wide_m), requantize(wide, *wide_m).double())


def test_requantize_does_not_mind_strides():
    acc = torch.arange(-3000, 3000).reshape(20, 3, 100).transpose(0, 2)
    multiplier = quantize_multiplier(torch.tensor([[0.1], [0.5], [0.25]]))
    assert torch.equal(requantize(acc.float(), *multiplier), requantize(acc, *multiplier).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_differentiable_requantization_has_the_same_values_and_the_smooth_gradient(dtype):
    draw = torch.Generator().manual_seed(3)
    acc = torch.randint(-(2**20), 2**20, (2, 5, 6, 3), generator=draw).to(dtype).requires_grad_()
    m = (torch.rand(5, 1, 1, generator=draw, dtype=torch.float64) * 1e-3).requires_grad_()
    weight = torch.randn(2, 5, 6, 3, generator=draw, dtype=dtype)
    y = requantize_ste(acc, m)
    (y * weight).sum().backward()
    assert y.dtype == dtype and torch.equal(y.detach(), requantize(acc, *quantize_multiplier(m)))
    assert torch.allclose(acc.grad, weight * m.detach().to(dtype))
    assert m.grad.dtype == torch.float64 and m.grad.shape == m.shape
    expected = (acc.detach() * weight).sum((0, 2, 3)).reshape(5, 1, 1).double()
    assert torch.allclose(m.grad, expected, rtol=1e-4, atol=1.0)


def test_differentiable_requantization_works_with_either_gradient_alone():
    acc = torch.tensor([3.0, -8.0])
    m = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    requantize_ste(acc, m).sum().backward()
    assert m.grad.item() == -5.0
    acc.requires_grad_()
    requantize_ste(acc, m.detach()).sum().backward()
    assert acc.grad.tolist() == [0.5, 0.5]
    with pytest.raises(ValueError):
        requantize_ste(torch.zeros(1, 4), torch.ones(3, 1))


def test_integer_ranges():
    assert int_range(8) == (-127, 127)
    assert int_range(8, signed=False) == (0, 255)
    assert int_range(2) == (-1, 1)
    assert int_range(16) == (-32767, 32767)
    for bits in (1, 17, 32, 2.5):
        with pytest.raises(ValueError):
            int_range(bits)
