import pytest
import torch

from licq.quant.fixedpoint import round_half_away
from licq.quant.rounding import ROUNDINGS, AdaRound, make_rounding, temperature
from licq.support.errors import InputError

NAMES = ["nearest", "adaround", "ste", "learned_offset"]


def weight(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 20


def causal_mask():
    mask = torch.ones(5, 5)
    mask[2, 2:] = 0
    mask[3:] = 0
    return mask


def test_the_registry_has_the_documented_names_and_refuses_others():
    assert list(ROUNDINGS) == NAMES
    with pytest.raises(InputError):
        make_rounding("stochastic", weight(2, 2))


@pytest.mark.parametrize("name", NAMES)
def test_an_untrained_hardened_scheme_is_nearest_rounding(name):
    w = weight(6, 3, 5, 5)
    rounding = make_rounding(name, w)
    rounding.harden()
    assert torch.equal(rounding(w), round_half_away(w))
    assert not any(p.requires_grad for p in rounding.parameters())


@pytest.mark.parametrize("name", ["nearest", "ste", "learned_offset"])
def test_schemes_other_than_adaround_return_whole_numbers_while_learning(name):
    w = weight(6, 3)
    rounding = make_rounding(name, w)
    with torch.no_grad():
        for p in rounding.parameters():
            p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(rounding(w), rounding(w).round())
    assert rounding.regularizer(20.0) == 0


@pytest.mark.parametrize("name", NAMES)
def test_masked_weights_are_exactly_zero_under_every_scheme_before_and_after_hardening(name):
    w = weight(4, 3, 5, 5) + 7
    mask = causal_mask()
    rounding = make_rounding(name, w, mask)
    for _ in range(3):
        rounding.zero_grad()
        loss = (rounding(w) - 100).square().sum() + rounding.regularizer(8.0)
        if loss.requires_grad:
            loss.backward()
            for p in rounding.parameters():
                assert (p.grad[..., mask == 0] == 0).all()
                with torch.no_grad():
                    p -= 0.01 * p.grad.sign()
        out = rounding(w)
        assert (out[..., mask == 0] == 0).all() and not torch.signbit(out[..., mask == 0]).any()
    rounding.harden()
    assert (rounding(w)[..., mask == 0] == 0).all()
    assert (rounding(w)[..., mask == 1] != 0).any()


def test_adaround_starts_at_the_unrounded_weight():
    w = weight(50, 40).double()
    rounding = AdaRound(w)
    assert torch.allclose(rounding.h(), w - w.floor(), atol=1e-12)
    assert torch.allclose(rounding(w), w, atol=1e-12)
    whole = torch.tensor([-3.0, 0.0, 5.0])
    assert torch.allclose(AdaRound(whole)(whole), whole, atol=1e-6)


def test_hardened_adaround_takes_the_floor_or_the_next_number_as_h_says():
    w = weight(30, 30)
    rounding = AdaRound(w)
    with torch.no_grad():
        rounding.V += torch.randn(rounding.V.shape, generator=torch.Generator().manual_seed(2))
    up = rounding.h() >= 0.5
    rounding.harden()
    out = rounding(w)
    assert torch.equal(out, w.floor() + up)
    assert not torch.equal(out, round_half_away(w))


def test_adaround_gradients_are_those_of_the_rectified_sigmoid():
    w = weight(8, 8).double()
    rounding = AdaRound(w)
    with torch.no_grad():
        rounding.V[0, 0], rounding.V[0, 1] = 10.0, -10.0
    rounding(w).sum().backward()
    sigmoid = torch.sigmoid(rounding.V.detach())
    expected = 1.2 * sigmoid * (1 - sigmoid)
    expected[0, 0] = expected[0, 1] = 0
    assert torch.allclose(rounding.V.grad, expected, atol=1e-12)


def test_adaround_stays_on_its_floor_when_the_scale_moves():
    w = weight(8, 8)
    rounding = AdaRound(w)
    assert torch.equal(
        rounding(w * 1.3), rounding(w)
    )  # with integers that follow, a weight would jump a step


def test_adaround_regularizer_counts_undecided_weights_and_leaves_masked_ones_out():
    w = torch.tensor([[0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)
    rounding = AdaRound(w, torch.tensor([1, 1, 1, 0]))
    assert rounding.regularizer(2.0).item() == pytest.approx(3.0)
    with torch.no_grad():
        rounding.V[0, 0] = 20.0
        rounding.V[0, 1] = -20.0
    assert rounding.regularizer(2.0).item() == pytest.approx(1.0)
    quarter = AdaRound(torch.tensor([0.25], dtype=torch.float64))
    assert quarter.regularizer(3.0).item() == pytest.approx(1 - 0.5**3)


def test_adaround_beats_nearest_rounding_on_correlated_inputs():
    draw = torch.Generator().manual_seed(4)
    w = 0.25 + 0.24 * torch.rand(16, generator=draw)
    inputs = 1 + 0.3 * torch.randn(64, 16, generator=draw)

    def loss(rounded):
        return (inputs @ (rounded - w)).square().mean()

    rounding = AdaRound(w)
    for step in range(1000):
        rounding.zero_grad()
        objective = loss(rounding(w))
        if step >= 200:
            objective = objective + 0.3 * rounding.regularizer(temperature(step, 1000))
        objective.backward()
        with torch.no_grad():
            rounding.V -= 0.1 * rounding.V.grad
    rounding.harden()
    nearest = make_rounding("nearest", w)(w)
    assert (nearest == 0).all()
    assert loss(rounding(w)) < 0.1 * loss(nearest)


def test_straight_through_learns_its_own_copy_and_learned_offset_adds_to_the_weight():
    w = weight(5, 5)
    ste, offset = make_rounding("ste", w), make_rounding("learned_offset", w)
    scaled = w.clone().requires_grad_()
    factor = weight(5, 5, seed=9)
    (ste(scaled) * factor).sum().backward()
    assert torch.equal(ste.v.grad, factor) and scaled.grad is None
    (offset(scaled) * factor).sum().backward()
    assert torch.equal(offset.v.grad, factor) and torch.equal(scaled.grad, factor)
    with torch.no_grad():
        ste.v += 1
        offset.v += 2
    assert torch.equal(ste(w), round_half_away(w + 1))
    assert torch.equal(offset(w), round_half_away(w + 2))


def test_the_temperature_holds_then_falls_linearly_to_its_end():
    values = [temperature(i, 101) for i in range(101)]
    assert values[:20] == [20.0] * 20
    assert values[-1] == pytest.approx(2.0)
    falls = [a - b for a, b in zip(values[21:], values[22:])]
    assert max(falls) - min(falls) < 1e-9 and min(falls) > 0
    assert temperature(500, 101) == pytest.approx(2.0)
