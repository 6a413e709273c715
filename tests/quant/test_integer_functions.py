import math
import random

import pytest
import torch

from licq.quant.fixedpoint import quantize_multiplier, requantize
from licq.quant.integer_functions import (
    divide_round,
    integer_gdn,
    integer_layer_norm,
    isqrt,
    table_lookup,
)


def divide_by_hand(a: int, b: int) -> int:
    magnitude = (2 * abs(a) + b) // (2 * b)
    return magnitude if a >= 0 else -magnitude


def shift_by_hand(value: int, exponent: int) -> int:
    """value * 2^exponent, halves away from zero."""
    return value << exponent if exponent >= 0 else divide_by_hand(value, 1 << -exponent)


def whole(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------- elementary


def test_isqrt_equals_pythons_integer_root_at_and_around_squares():
    draw = random.Random(0)
    numbers = list(range(300)) + [2**52 - 1, 2**51, (2**26 - 1) ** 2]
    for _ in range(4000):
        root = draw.randrange(1, 2**26 - 1)
        numbers += [root * root - 1, root * root, root * root + 1, draw.randrange(2 ** draw.randrange(1, 53))]
    assert isqrt(whole(*numbers)).tolist() == [math.isqrt(n) for n in numbers]


def test_divide_round_equals_unbounded_integers_with_ties_and_extremes():
    draw = random.Random(1)
    pairs = [
        (2**52 - 1, 1),
        (-(2**52) + 1, 2),
        (2**52 - 1, 2**52 - 1),
        (1, 2**52 - 1),
        (2**51, 2**52 - 2),
        (0, 7),
    ]
    for _ in range(8000):
        b = draw.randrange(1, 2 ** draw.randrange(1, 52))
        odd = 2 * draw.randrange(2 ** draw.randrange(0, 51)) + 1
        tie = odd * b // 2
        for a in (tie - 1, tie, tie + 1, draw.randrange(2 ** draw.randrange(1, 53))):
            if a < 2**52:
                pairs.append((draw.choice([-1, 1]) * a, b))
    a, b = zip(*pairs)
    assert divide_round(whole(*a), whole(*b)).tolist() == [divide_by_hand(*pair) for pair in pairs]
    assert not torch.signbit(divide_round(whole(-1), whole(3))).any()


def test_divide_round_broadcasts():
    assert divide_round(whole(3, -3, 5), whole(2).reshape(1, 1)).tolist() == [[2, -2, 3]]


def test_a_lookup_clips_its_index_to_the_table():
    table = torch.tensor([-7.0, 0.0, 3.0, 9.0])
    assert table_lookup(whole(-2, -1, 0, 1), table, offset=-2).tolist() == table.tolist()
    assert table_lookup(whole(-500, 500), table, offset=-2).tolist() == [-7, 9]


# ------------------------------------------------------------------------------------------------- layer norm


def layer_norm_by_hand(q, eps_q):
    count, total = len(q), sum(q)
    spread = count * sum(v * v for v in q) - total * total
    k = (52 - (spread + math.ceil(count**2 * eps_q)).bit_length()) // 2
    variance = (spread << 2 * k) + math.floor(count**2 * eps_q * 4**k + 0.5)
    root = math.isqrt(min(max(variance, 1), 2**52 - 1))
    return [divide_by_hand((count * v - total) << (k + 12), root) for v in q]


def layer_norm_rows(count: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(count)
    rows = [torch.randint(-b, b + 1, (12, count), generator=draw) for b in (1, 20, 1000, 2**15 - 1)]
    rows.append(torch.randint(-1, 2, (12, count), generator=draw) + 32766)
    spike = torch.zeros(2, count, dtype=torch.int64)
    spike[0, 0], spike[1, -1] = 32767, 1
    extreme = torch.full((1, count), -32767)
    extreme[0, : count // 2] = 32767
    return torch.cat([*rows, spike, extreme, torch.full((1, count), 123)])


@pytest.mark.parametrize("count", [1, 2, 7, 192, 1024])
@pytest.mark.parametrize("eps_q", [0.0, 0.37, 1000.0, 2.0**30])
def test_integer_layer_norm_is_within_half_a_unit_of_the_real_one(count, eps_q):
    q = layer_norm_rows(count)
    n = integer_layer_norm(q, eps_q)
    wide = q.double()
    centred = wide - wide.mean(-1, keepdim=True)
    real = centred / (centred.square().mean(-1, keepdim=True) + max(eps_q, 1e-18)).sqrt()
    real[centred.abs().amax(-1) < 1e-9] = 0
    assert (n - real * 4096).abs().max() <= 0.51
    assert n.isfinite().all()


def test_integer_layer_norm_agrees_with_torch_over_any_dimension():
    q = torch.randint(-2000, 2001, (3, 48, 5), generator=torch.Generator().manual_seed(0))
    scale = 0.01
    real = torch.nn.functional.layer_norm(q.double().transpose(1, 2) * scale, (48,), eps=1e-5).transpose(1, 2)
    n = integer_layer_norm(q.float(), 1e-5 / scale**2, dim=1)
    assert (n - real * 4096).abs().max() <= 0.501


@pytest.mark.parametrize("eps_q", [0.0, 0.37, 12345.678])
def test_integer_layer_norm_equals_unbounded_integers(eps_q):
    for count in (1, 3, 32):
        q = layer_norm_rows(count)
        assert integer_layer_norm(q, eps_q).tolist() == [layer_norm_by_hand(row, eps_q) for row in q.tolist()]


def test_integer_layer_norm_refuses_what_would_overflow():
    with pytest.raises(ValueError):
        integer_layer_norm(torch.zeros(1, 1025), 0.0)
    with pytest.raises(ValueError):
        integer_layer_norm(torch.zeros(1, 4), -1.0)
    with pytest.raises(ValueError):
        integer_layer_norm(torch.zeros(1, 4), 2.0**31)


# -------------------------------------------------------------------------------------------------------- GDN


def gdn_by_hand(x, n, mantissa, shift, inverse, kind):
    if kind == "gdn":
        k = (52 - n.bit_length()) // 2
        d = math.isqrt(n << 2 * k)
    else:
        k = 26 - n.bit_length()
        d = shift_by_hand(n, k)
    if inverse:
        return shift_by_hand(x * divide_by_hand(d * mantissa, 2**11), 11 - k - shift)
    e = k - shift
    return divide_by_hand(x * mantissa << max(e, 0), d << max(-e, 0))


def gdn_cases(inverse: bool, kind: str, count: int = 20000):
    """x, norm and a multiplier that brings the result near a drawn size, from far below 1 to 16 bits."""
    draw = random.Random(f"{inverse}{kind}")
    xs, norms, factors = [], [], []
    for _ in range(count):
        x = draw.choice(
            [draw.randint(-32767, 32767), draw.choice([-1, 1]) * draw.choice([1, 2, 3, 32767]), 0]
        )
        special = draw.choice([1, 2, 3, 2**40 - 1, 2**26, 2**39])
        n = draw.choice([draw.randrange(1, 2 ** draw.randrange(1, 41)), special])
        gain = {"gdn": n**0.5, "gdn1": n}[kind]
        size = 2.0 ** draw.uniform(-8, 15)
        factors.append(size / max(abs(x), 1) * (1 / gain if inverse else gain))
        xs.append(x)
        norms.append(n)
    mantissa, shift = quantize_multiplier(whole(*factors))
    return whole(*xs), whole(*norms), mantissa, shift


@pytest.mark.parametrize("kind", ["gdn", "gdn1"])
@pytest.mark.parametrize("inverse", [False, True])
def test_integer_gdn_is_within_half_a_unit_of_the_real_one_and_equals_unbounded_integers(inverse, kind):
    x, norm, mantissa, shift = gdn_cases(inverse, kind)
    y = integer_gdn(x, norm, mantissa, shift, inverse, kind)
    gain = norm.sqrt() if kind == "gdn" else norm
    real = x * mantissa * torch.pow(2.0, -shift.double()) * (gain if inverse else 1 / gain)
    assert real.abs().max() > 30000
    assert (y - real).abs().max() <= 0.501
    rows = [[int(v) for v in column.tolist()] for column in (x, norm, mantissa, shift)]
    assert y.tolist() == [gdn_by_hand(*row, inverse, kind) for row in zip(*rows)]


@pytest.mark.parametrize("kind", ["gdn", "gdn1"])
@pytest.mark.parametrize("inverse", [False, True])
def test_integer_gdn_saturates_or_vanishes_with_extreme_multipliers_and_never_wraps(inverse, kind):
    x = whole(-32767, -1, 0, 1, 32767)
    for norm in (1.0, 2.0**40 - 1):
        for exponent in (-200, 200):
            m = quantize_multiplier(torch.tensor(2.0**exponent, dtype=torch.float64))
            y = integer_gdn(x, torch.full_like(x, norm), *m, inverse, kind).clamp(-32767, 32767)
            assert y.tolist() == ([-32767, -32767, 0, 32767, 32767] if exponent > 0 else [0] * 5)


def test_integer_gdn_takes_one_multiplier_per_channel_and_refuses_an_unknown_kind():
    x = torch.randint(-500, 501, (2, 3, 4, 5), generator=torch.Generator().manual_seed(0)).float()
    norm = torch.randint(1, 2**30, (2, 3, 4, 5), generator=torch.Generator().manual_seed(1)).float()
    m = torch.tensor([1e3, 2e4, 5e5], dtype=torch.float64).reshape(3, 1, 1)
    y = integer_gdn(x, norm, *quantize_multiplier(m))
    for c in range(3):
        alone = integer_gdn(x[:, c], norm[:, c], *quantize_multiplier(m[c, 0, 0]))
        assert torch.equal(y[:, c], alone)
    with pytest.raises(ValueError):
        integer_gdn(x, norm, *quantize_multiplier(m), kind="gdn2")


def test_requantizing_by_a_power_of_two_is_division_with_rounding():
    acc = torch.arange(-33, 34)
    assert torch.equal(
        requantize(acc, *quantize_multiplier(torch.tensor(0.125))).double(), divide_round(acc, whole(8))
    )
