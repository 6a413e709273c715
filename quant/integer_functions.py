"""Integer algorithms for the non-linear functions of a codec: tables, softmax, layer normalization, GDN.

Tensors of integers in, tensors of integers out (float64 unless said otherwise), the same bits on every
machine. Floating-point division and square root serve only as estimates, which are then corrected to the
exact integer; every other intermediate is an integer below 2^53. None of these is differentiable: the
simulator pairs them with a smooth function through `fixedpoint.straight_through`.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from licq.quant.fixedpoint import (
    MANTISSA_BITS,
    below_half,
    piece_size,
    pieces,
    power_of_two,
    round_half_away,
)

LAYER_NORM_FRAC_BITS = 12
"""`integer_layer_norm` returns normalized values in units of 2^-12."""

_ROOT_BITS = 26

_TIE_FREE = 1 + 2.0**-46
"""Factor on a multiplier after which rounding to even rounds halves away from zero; see
`integer_layer_norm`."""


# ---------------------------------------------------------------------------------------- roots and quotients


def isqrt(n: Tensor) -> Tensor:
    """floor(sqrt(n)), exact for integers 0 <= n < 2^52; float64 of n's shape. Intermediates stay below 2^52 +
    1."""
    n = n.to(torch.float64)
    root = n.sqrt().floor_()
    root = root - (root * root > n).to(torch.float64)
    return root + ((root + 1) ** 2 <= n)


def divide_round(a: Tensor, b: Tensor) -> Tensor:
    """a / b rounded to the nearest integer, halves away from zero; float64.

    Exact for integers |a| < 2^52 and 0 < b < 2^52, which broadcast. The estimate is off by at most one, so
    the remainder that corrects it is at most 1.5 b and estimate * b < 2^53.
    """
    a, b = a.to(torch.float64), b.to(torch.float64)
    magnitude = a.abs()
    quotient = (magnitude / b).add_(0.5).floor_()
    twice_rest = (magnitude - quotient * b).mul_(2)
    quotient = quotient + (twice_rest >= b) - (twice_rest < -b).to(torch.float64)
    return quotient.mul_(a.sign()).add_(0.0)  # no -0.0


def _bit_length(n: Tensor) -> Tensor:
    """Bits of integers n >= 0 (0 for 0), as int64."""
    return torch.frexp(n).exponent.to(torch.int64)


# ----------------------------------------------------------------------------------------------------- tables


def table_lookup(index: Tensor, table: Tensor, offset: int = 0) -> Tensor:
    """table[index - offset], of index's shape and the table's dtype; `offset` is the index of the first
    entry.

    `index` holds integers; what lies outside the table gets its first or last entry.
    """
    last = table.numel() - 1
    out = torch.empty(index.shape, dtype=table.dtype, device=index.device)
    for part, into in pieces(index, out):
        position = (part - offset).clamp_(0, last).to(torch.int32)
        # on a CPU index_select is several times faster than table[position]
        into.copy_(table.index_select(0, position.flatten()).view(position.shape))
    return out


# ------------------------------------------------------------------------------------------------- layer norm


def layer_norm_constants(count: int, eps_q: float) -> Tensor:
    """count^2 eps_q in units of 2^-2k, rounded, for k = 0 .. 26; float64."""
    eps = count**2 * eps_q
    return torch.tensor(
        [math.floor(min(eps * 4.0**k + 0.5, 2.0**52)) for k in range(27)], dtype=torch.float64
    )


def integer_layer_norm(q: Tensor, eps_q: float, dim: int = -1) -> Tensor:
    """(q - mean) / sqrt(var + eps_q) along `dim`, without affine, as integers in units of 2^-12;
    float64.

    `q`: integers, |q| < 2^15, C <= 1024 of them along `dim`. `eps_q`: LayerNorm's eps in units of q^2,
    that is eps / s^2, 0 <= eps_q <= 2^30. A row of equal values gives 0. Raises ValueError outside these
    bounds of C and eps_q.

        c = C q - sum q,  V = C sum q^2 - (sum q)^2 + C^2 eps_q  (= C^2 (var + eps_q)),  n = round(2^12 c /
                          sqrt V)

    V < 2^51 is shifted left by 2k to lie in [2^50, 2^52), where its root has 26 bits; C^2 eps_q is rounded
    after that shift (a table of 27 constants, one for each k). |c| <= sqrt(C V), so the dividend 2^(12+k) |c|
    is at most 2^(12+26+5). The root's relative error 2^-25 is 2^-8 units at the largest possible |n| =
    sqrt(C) = 32: the result is within 0.504 units of the real value.

    The division is a multiplication by 2^(12+k) / root, exact nevertheless: a quotient a / b of integers
    with b < 2^26 is a tie or at least 1 / 2b > 2^-27 from one. Three roundings move |n| <= 2^17 (and a bit)
    by a share of 3 * 2^-53, the tie-free factor by one of 2^-46: together away from zero, by less than 2^-28.
    So rounding to even rounds ties away from zero, and no other quotient crosses a tie.
    """
    count = q.shape[dim]
    eps_q = float(eps_q)
    if not 0 < count <= 1024:
        raise ValueError(f"integer layer norm takes 1 to 1024 values a row, not {count}")
    if not 0 <= eps_q <= 2**30:
        raise ValueError(f"eps_q must be from 0 to 2^30, not {eps_q}")
    eps_shifted = layer_norm_constants(count, eps_q).to(q.device)
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    for rows, into in pieces(q.movedim(dim, -1), out.movedim(dim, -1)):
        rows = rows.to(torch.float64, copy=True)
        total = rows.sum(-1, keepdim=True)
        spread = (rows * rows).sum(-1, keepdim=True) * count - total * total
        k = (52 - _bit_length(spread + math.ceil(count**2 * eps_q))) // 2
        variance = spread * power_of_two(2 * k) + eps_shifted[k]
        # min: rounding eps up must not reach 2^52, where isqrt's range ends.
        root = isqrt(variance.clamp(1, 2.0**52 - 1))
        factor = (power_of_two(k + LAYER_NORM_FRAC_BITS) / root).mul_(_TIE_FREE)
        into.copy_(rows.mul_(count).sub_(total).mul_(factor).round_().add_(0.0))
    return out


# -------------------------------------------------------------------------------------------------------- GDN


def integer_gdn(
    x: Tensor, norm: Tensor, mantissa: Tensor, shift: Tensor, inverse: bool = False, kind: str = "gdn"
) -> Tensor:
    """(Inverse) generalized divisive normalization on integers: float64 integers on the output's grid.

        kind "gdn":   round(M x / sqrt(norm)),  inverse: round(M x sqrt(norm))
        kind "gdn1":  round(M x / norm),        inverse: round(M x norm)

    `x`: integers, |x| < 2^15. `norm`: integers, 0 < norm < 2^40 (a 0 is taken as 1), broadcast to
    x. `mantissa, shift` = quantize_multiplier(M), M holding all scales: s_x / (s_y sqrt(s_norm)) for "gdn",
    s_x sqrt(s_norm) / s_y for its inverse, without the root for "gdn1". Raises ValueError for another kind.

    norm is shifted left until D = floor(sqrt(norm)) 2^k, or norm 2^k, has 26 bits: relative error below
    2^-25.
    Forward: x * mantissa (< 2^37) is divided by D in one rounding, each shifted left as far as the result
    needs and below 2^52. Inverse: W = round(D * mantissa / 2^11) has 37 bits, x * W < 2^52, one rounding
    after the shift. The result is within 0.5 + |result| * 2^-24.9 units of the real value with M = mantissa *
    2^-shift: 0.501 for 16-bit results. A forward result beyond 2^25 may come out smaller, never below 2^25;
    clip to the output's range.
    """
    if kind not in ("gdn", "gdn1"):
        raise ValueError(f'kind must be "gdn" or "gdn1", not {kind!r}')
    mantissa = torch.as_tensor(mantissa, device=x.device).to(torch.float64)
    shift = torch.as_tensor(shift, device=x.device).to(torch.int64)
    x, norm, mantissa, shift = torch.broadcast_tensors(x, norm, mantissa, shift)
    out = torch.empty(x.shape, dtype=torch.float64, device=x.device)
    for *operands, into in pieces(x, norm, mantissa, shift, out):
        x_part, norm_part, mantissa_part, shift_part = operands
        into.copy_(_gdn_piece(x_part, norm_part, mantissa_part, shift_part, inverse, kind))
    return out


def _gdn_piece(x: Tensor, norm: Tensor, mantissa: Tensor, shift: Tensor, inverse: bool, kind: str) -> Tensor:
    x, norm = x.to(torch.float64), norm.to(torch.float64).clamp(min=1)
    if kind == "gdn":
        k = (2 * _ROOT_BITS - _bit_length(norm)) // 2
        divisor = isqrt(norm * power_of_two(2 * k))
    else:
        k = _ROOT_BITS - _bit_length(norm)
        divisor = round_half_away(norm * power_of_two(k))
    if inverse:
        drop = _ROOT_BITS + MANTISSA_BITS - 37
        factor = round_half_away(divisor * mantissa * 2.0**-drop)
        return round_half_away(x * factor * power_of_two(drop - k - shift))
    dividend = x * mantissa
    exponent = k - shift
    up = torch.minimum(exponent.clamp(min=0), 2 * _ROOT_BITS - _bit_length(dividend))
    # Beyond 25 the quotient is below 2^(37 - 26 - 25), which rounds to 0 either way.
    down = (-exponent).clamp(0, _ROOT_BITS - 1)
    return divide_round(dividend * power_of_two(up), divisor * power_of_two(down))


# -------------------------------------------------------------------------- softmax in 24 bits, for attention

SOFTMAX_STEP = 2.0**-8
"""Unit of scores, in nats: a difference of two scores is an index into the table."""

SOFTMAX_UNIT = 2.0**-16
"""Probabilities are integers in this unit, 0..2^16."""

LEVEL_UNIT = 2.0**-14
"""Unit of probabilities on levels: 1 is the largest that 16 bits with a sign hold twice over."""

LEVELS = {"log2": 2.0, "log_sqrt2": math.sqrt(2)}
"""By which factor neighbouring levels differ."""

_EXP_BITS = 12


def level_table(kind: str, bits: int) -> Tensor:
    """For each integer p of `SOFTMAX_UNIT`, 0..2^16, the nearest level b^-k in units of `LEVEL_UNIT`;
    int32.

    k = round(-log_b p) below 2^bits, else the level is 0 (log-int-softmax of FQ-ViT, Lin et al. 2022; b the
    root of 2: RepQ-ViT, Li et al. 2023). In both a level of 2^-14 is followed by 0, however many bits there
    are. Levels of odd k with b = sqrt 2 are rounded to the unit.
    """
    base = LEVELS[kind]
    p = torch.arange(1, round(1 / SOFTMAX_UNIT) + 1, dtype=torch.float64) * SOFTMAX_UNIT
    k = round_half_away(-torch.log2(p) / math.log2(base))
    values = round_half_away(base**-k / LEVEL_UNIT)
    values[(k >= 2**bits) | (k * math.log2(base) > 14 + 1e-9)] = 0
    return torch.cat([torch.zeros(1, dtype=torch.float64), values]).to(torch.int32)


def softmax_table() -> Tensor:
    """round(2^12 exp(-i / 256)), float32, up to the first entry that is 0 (about 9 nats)."""
    entries = round_half_away(torch.exp(-torch.arange(2400, dtype=torch.float64) / 256) * 2**_EXP_BITS)
    return entries[: int((entries > 0).sum()) + 1].to(torch.float32)


_FLOAT32_KEYS = 4096  # of 2^12 each

MASKED = -(2.0**22)
"""Offset of a masked key: so far below every other that the table gives 0."""


def softmax_pieces(
    q: Tensor, offset: Tensor | None, kinds: Tensor | None, dim: int, *others: Tensor
) -> Iterator[tuple[Tensor, ...]]:
    """(q + offset, *others) in pieces that stay in cache, whole along `dim`; arguments as in
    `fixed_softmax`."""
    if kinds is not None:
        assert offset is not None
        size = q.numel() // q.shape[1]
        step = max(1, piece_size(q) // size)
        for start in range(0, q.shape[1], step):
            part = slice(start, start + step)
            yield q[:, part] + offset.index_select(0, kinds[part]), *(other[:, part] for other in others)
    elif dim % q.ndim != q.ndim - 1:
        yield q if offset is None else q + offset, *others
    elif offset is None:
        yield from pieces(q, *others)
    else:
        for part, part_offset, *rest in pieces(q, offset.expand(q.shape), *others):
            yield part + part_offset, *rest


def fixed_softmax(
    q: Tensor, table: Tensor, offset: Tensor | None = None, kinds: Tensor | None = None, dim: int = -1
) -> Tensor:
    """Softmax along `dim` of scores (q + offset) / 256, as integers in units of 2^-16; float32 of q's
    shape.

    `q`: integers. `table` = softmax_table(). `offset`: integers that broadcast to q, `MASKED` for a
    key that gets exactly 0 beside others that are not masked; |q + offset| < 2^23. With `kinds`, q is (B, T,
    ...) and row t has offset[kinds[t]].

        e = table[max q - q],  S = sum e,  m = round(2^k / S) with 2^11 < m <= 2^12,  p = round(e m / 2^(k -
                               16))

    Every intermediate is at most 2^24, so float32 is exact: e <= 2^12, S <= K 2^12 with up to 4096 keys (with
    more it is taken in float64), e m <= 2^24. The reciprocal's 12 bits are a relative error of 2^-12 for a
    whole row, the table's entries one of 2^-13 for the largest key; a key below 2^-13 of the largest gets 0.
    """
    last = table.numel() - 1
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    for part, into in softmax_pieces(q, offset, kinds, dim, out):
        index = (part.amax(dim, keepdim=True) - part).clamp_(max=last).to(torch.int32)
        # on a CPU index_select is several times faster than table[index]
        weight = table.index_select(0, index.flatten()).view(index.shape)
        many = weight.shape[dim] > _FLOAT32_KEYS
        total = weight.sum(dim, keepdim=True, dtype=torch.float64 if many else None).clamp_(min=1)
        _, exponent = torch.frexp(total)  # total in [2^(exponent-1), 2^exponent)
        k = (exponent + (_EXP_BITS - 1)).double()
        reciprocal = divide_round(power_of_two(k), total.double()).float()
        # at most 12 bits times a power of two: one multiplication by both is as exact as two
        factor = reciprocal.mul_(power_of_two(16 - k).float())
        into.copy_(weight.mul_(factor).add_(below_half(torch.float32)).floor_())
    return out
