"""Quantized layers and functions against integer arithmetic written out by hand, and against the float layer.

"By hand" is numpy int64 and Python's own integers and fractions on the stored integers; nothing of
quant/ computes.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compressai.layers import GDN, GDN1, MaskedConv2d
from torch import Tensor, nn

from licq.models.attention import MaskedSoftmax
from licq.models.layers import MultistageMaskedConv2d
from licq.quant.config import QuantConfig
from licq.quant.functions import make_function
from licq.quant.layers import QuantConv2d, QuantConvTranspose2d, QuantLinear
from licq.quant.modules import QuantModule
from licq.quant.norms import QuantGDN, QuantLayerNorm
from licq.quant.qtensor import QTensor
from licq.quant.quantizer import Quantizer, room
from licq.quant.runtime import Runtime

# ----------------------------------------------------------------------------------------- arithmetic by hand


def half_away(value: Fraction) -> int:
    magnitude = math.floor(abs(value) + Fraction(1, 2))
    return magnitude if value >= 0 else -magnitude


def multiplier_by_hand(ratio: float) -> Fraction:
    """The real multiplier rounded to 22 significant bits, halves away."""
    exact = Fraction(ratio)
    shift = 0
    while exact * Fraction(2) ** shift < 2**21:
        shift += 1
    while exact * Fraction(2) ** shift >= 2**22:
        shift -= 1
    return Fraction(half_away(exact * Fraction(2) ** shift)) / Fraction(2) ** shift


def fixed_by_hand(scale: float) -> float:
    """Eq. 4 with 24 fractional bits."""
    return max(half_away(Fraction(scale) * 2**24), 1) / 2**24


def whole_numbers(x: Tensor) -> np.ndarray:
    """The tensor as int64; fails where it is not whole."""
    array = x.detach().double().numpy()
    assert (array == np.round(array)).all()
    return array.astype(np.int64)


def conv_by_hand(x, w, stride=1, padding=0, dilation=1, groups=1) -> np.ndarray:
    """x: (B, C, H, W), w: (O, C / groups, kh, kw), int64."""
    x = np.pad(x, [(0, 0), (0, 0), (padding, padding), (padding, padding)])
    outputs, per_group, kh, kw = w.shape
    rows = (x.shape[2] - dilation * (kh - 1) - 1) // stride + 1
    columns = (x.shape[3] - dilation * (kw - 1) - 1) // stride + 1
    out = np.zeros((x.shape[0], outputs, rows, columns), dtype=np.int64)
    for o in range(outputs):
        first = o // (outputs // groups) * per_group
        for c in range(per_group):
            for a in range(kh):
                for b in range(kw):
                    top, left = a * dilation, b * dilation
                    window = x[
                        :,
                        first + c,
                        top : top + stride * rows : stride,
                        left : left + stride * columns : stride,
                    ]
                    out[:, o] += w[o, c, a, b] * window[:, :rows, :columns]
    return out


def deconv_by_hand(x, w, stride, padding, output_padding, groups=1) -> np.ndarray:
    """x: (B, C, H, W), w: (O, C / groups, kh, kw), int64: every input pixel scatters its kernel."""
    outputs, per_group, kh, kw = w.shape
    full_h, full_w = (
        (x.shape[2] - 1) * stride + kh + output_padding,
        (x.shape[3] - 1) * stride + kw + output_padding,
    )
    out = np.zeros((x.shape[0], outputs, full_h, full_w), dtype=np.int64)
    for o in range(outputs):
        first = o // (outputs // groups) * per_group
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                patch = np.einsum("bc,cde->bde", x[:, first : first + per_group, i, j], w[o])
                out[:, o, i * stride : i * stride + kh, j * stride : j * stride + kw] += patch
    return out[:, :, padding : full_h - padding, padding : full_w - padding]


# --------------------------------------------------------------------------------------------- standing nodes


def calibrated(node: QuantModule, *inputs, freeze: bool = True, **kwargs) -> QuantModule:
    """The node with static ranges from these inputs, quantized."""
    runtime = Runtime(node.config)
    node.bind(runtime, "node")
    runtime.observing = True
    runtime.begin()
    node(*inputs, **kwargs)
    runtime.observing = False
    runtime.begin()
    node.initialize()
    node.quantized = True
    if freeze:
        node.freeze()
    return node


def function(kind: str, config: QuantConfig, *inputs, options: dict | None = None) -> QuantModule:
    return calibrated(make_function(kind, options or {}, config), *inputs)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spread_channels(x: Tensor, dim: int = 1) -> Tensor:
    """Channels of very different size: what per-channel scales are for."""
    shape = [1] * x.ndim
    shape[dim] = -1
    return x * torch.logspace(-1, 1, x.shape[dim]).reshape(shape)


def randomized(module: nn.Module, seed: int = 1) -> nn.Module:
    for number, parameter in enumerate(module.parameters()):
        with torch.no_grad():
            parameter.copy_(0.3 * draw(*parameter.shape, seed=seed + number))
    return module


def input_codes(node: QuantModule, x: Tensor) -> np.ndarray:
    """The integers on the node's input grid, from its stored scale and limits."""
    grid = node.input_grid
    shape = grid.shape_for(x.ndim)
    scale, low, high = (t.reshape(shape).expand(x.shape).numpy() for t in (grid.scale, grid.qmin, grid.qmax))
    ratio = (x.double().numpy() / scale).astype(np.float32)
    codes = np.trunc(ratio.astype(np.float64) + np.copysign(0.5, ratio))
    return np.clip(codes, low, high).astype(np.int64)


# ------------------------------------------------------------------------------------------------------ grids


def grid_for(x: Tensor, bits: int, freeze: bool = True, **options) -> Quantizer:
    grid = Quantizer(bits, 24, **options)
    grid.observe(x)
    grid.initialize()
    if freeze:
        grid.freeze()
    return grid


@pytest.mark.parametrize("bits", range(2, 17))
def test_symmetric_grid_reaches_the_largest_value_and_uses_every_code(bits):
    x = torch.linspace(-3, 3, 4001)
    grid = grid_for(x, bits)
    qmax = 2 ** (bits - 1) - 1
    assert float(grid.scale) == fixed_by_hand(3.0 / qmax)
    q = grid(QTensor(x, None, Runtime(QuantConfig())))
    assert (q.q.min(), q.q.max()) == (-qmax, qmax)
    assert float((q.real() - x).abs().max()) <= float(grid.scale) * 0.5001 + qmax * 2**-24


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("sign", [1, -1])
def test_one_sided_grid_spends_all_codes_on_one_side(bits, sign):
    x = sign * torch.linspace(-0.1, 5, 3001)
    grid = grid_for(x, bits)
    assert float(grid.qmax - grid.qmin) == 2**bits - 1
    assert float(grid.scale) == pytest.approx(5.1 / (2**bits - 1), rel=1e-3)
    assert float(grid.qmin) <= 0 <= float(grid.qmax)
    q = grid(QTensor(x, None, Runtime(QuantConfig())))
    # the zero point is whole, so the ends may lie half a step outside
    assert float((q.real() - x).abs().max()) <= float(grid.scale) * 1.001


@pytest.mark.parametrize("spec", ["mse", "lp2", "percentile99"])
@pytest.mark.parametrize("symmetry", ["symmetric", "one_sided", "asymmetric"])
def test_estimated_ranges_cut_outliers_on_both_sides(spec, symmetry):
    """Normal values around 1, and an outlier each way: less error on the others than with the whole range."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 40000, 2, 1, generator=draw) + 1.0
    x[0, 0], x[0, 1] = 12.0, -10.0
    grids = {}
    for name in ("max", spec):
        grids[name] = Quantizer(4, 24, 2, name, symmetry=symmetry)
        grids[name].observe(x)
        grids[name].initialize()
    inner = QTensor(x[:, 2:], None, None)
    errors = {name: float((grid(inner).real() - x[:, 2:]).square().mean()) for name, grid in grids.items()}
    assert errors[spec] < 0.7 * errors["max"]
    assert float(grids[spec].log_n.detach().exp().max()) < 0.7


def test_observing_in_parts_is_observing_at_once():
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    whole, parts = Quantizer(8, 24, 1), Quantizer(8, 24, 1)
    whole.observe(x)
    for part in x.split(2):
        parts.observe(part)
    whole.initialize()
    parts.initialize()
    assert torch.equal(whole.low, parts.low) and torch.equal(whole.high, parts.high)
    torch.testing.assert_close(whole.energy, parts.energy)


def test_a_grid_that_must_be_symmetric_stays_so_on_one_sided_values():
    grid = grid_for(torch.linspace(0, 5, 100), 8, symmetry="symmetric")
    assert (float(grid.qmin), float(grid.qmax)) == (-127, 127)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_every_channel_gets_its_own_scale(dim):
    x = spread_channels(draw(6, 6, 6), dim)
    grid = grid_for(x, 8, channel_dim=dim)
    largest = x.abs().movedim(dim, 0).flatten(1).amax(1)
    one_sided = torch.tensor([float(q) != 127 for q in grid.qmax])
    assert not bool(one_sided.any())
    assert grid.scale.tolist() == [fixed_by_hand(Fraction(float(v)) / 127) for v in largest]
    q = grid(QTensor(x, None, Runtime(QuantConfig())))
    assert q.scale.ndim == 3 and q.scale.shape[dim] == x.shape[dim]


def test_values_outside_the_range_are_clipped_not_followed():
    grid = grid_for(torch.tensor([-1.0, 1.0]), 8)
    q = grid(QTensor(torch.tensor([-50.0, 0.3, 50.0]), None, Runtime(QuantConfig())))
    assert q.q.tolist() == [-127, 38, 127]


@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0], [0.0], [2.5, 2.5], [-2.5]])
def test_constant_tensors_and_single_elements_have_a_grid(values):
    x = torch.tensor(values)
    q = grid_for(x, 8)(QTensor(x, None, Runtime(QuantConfig())))
    assert bool(torch.isfinite(q.scale).all()) and float(q.scale) > 0
    assert float((q.real() - x).abs().max()) <= float(q.scale)


def test_a_channel_silent_in_calibration_may_speak_later():
    x = draw(1, 3, 8, 8)
    x[:, 1] = 0
    grid = grid_for(x, 8, channel_dim=1)
    later = grid(QTensor(torch.full_like(x, 0.01), None, Runtime(QuantConfig())))
    assert float(later.real()[0, 1, 0, 0]) == pytest.approx(0.01, abs=1e-3)


def test_thirty_two_bits_pass_values_through():
    grid = Quantizer(32, 24)
    x = draw(5)
    out = grid(QTensor(x, None, Runtime(QuantConfig())))
    assert not out.is_integer and torch.equal(out.q, x)


def test_an_image_is_on_its_grid_as_it_is_whatever_the_headroom():
    x = torch.arange(256.0).reshape(1, 1, 16, 16) / 255
    for symmetry in ("asymmetric", "one_sided"):
        grid = Quantizer(8, 24, 1, headroom=1.1, symmetry=symmetry)
        grid.observe(x[..., :100], is_pixels=True)
        grid.initialize()
        assert float((grid(QTensor(x, None, None)).real() - x).abs().max()) < 2**-16


def test_a_grid_that_saw_nothing_says_so():
    with pytest.raises(RuntimeError, match="no value in calibration"):
        Quantizer(8, 24).initialize()


@pytest.mark.parametrize("dim", [None, 1])
def test_requantization_is_the_exact_product_with_a_22_bit_multiplier_rounded_half_away(dim):
    x = draw(2, 4, 30)
    grid = grid_for(spread_channels(x), 8, channel_dim=dim)
    scale_in = torch.tensor([0.0001, 0.00037, 0.002, 0.011], dtype=torch.float64).reshape(1, 4, 1)
    q_in = torch.randint(-20000, 20001, (2, 4, 30), generator=torch.Generator().manual_seed(2)).float()
    out = grid(QTensor(q_in, scale_in, Runtime(QuantConfig())))
    for b, c, i in np.ndindex(2, 4, 30):
        channel = c if dim else ()
        ratio = float(scale_in[0, c, 0] / grid.scale[channel])
        expected = half_away(int(q_in[b, c, i]) * multiplier_by_hand(ratio))
        expected = min(max(expected, int(grid.qmin[channel])), int(grid.qmax[channel]))
        assert int(out.q[b, c, i]) == expected


def test_requantization_between_powers_of_two_rounds_ties_away_from_zero():
    grid = Quantizer(24, 24, fixed=0.25)
    q = torch.tensor([-6.0, -5, -2, -1, 0, 1, 2, 3, 5, 6, 2**23 - 1])
    out = grid(QTensor(q, torch.tensor(0.0625, dtype=torch.float64), Runtime(QuantConfig())))
    assert out.q.tolist() == [half_away(Fraction(int(v), 4)) for v in q]
    assert not bool(torch.signbit(out.q[3:6]).any())


# --------------------------------------------------------------------------------- multiply-accumulate layers


def conv_case(name: str) -> tuple[type[QuantModule], nn.Module, Tensor]:
    x = spread_channels(draw(2, 4, 9, 7))
    cases = {
        "3x3": nn.Conv2d(4, 5, 3, padding=1),
        "5x5 stride 2": nn.Conv2d(4, 3, 5, stride=2, padding=2),
        "1x1 without bias": nn.Conv2d(4, 6, 1, bias=False),
        "dilated": nn.Conv2d(4, 3, 3, padding=2, dilation=2),
        "groups": nn.Conv2d(4, 6, 3, padding=1, groups=2),
        "depthwise": nn.Conv2d(4, 4, 3, padding=1, groups=4),
        "masked": MaskedConv2d(4, 8, kernel_size=5, padding=2),
        "multistage": MultistageMaskedConv2d(4, 8, kernel_size=5, padding=2, mask_type="C"),
    }
    return QuantConv2d, randomized(cases[name]), x


CONVS = ["3x3", "5x5 stride 2", "1x1 without bias", "dilated", "groups", "depthwise", "masked", "multistage"]


def stored(node: QuantModule) -> tuple[np.ndarray, np.ndarray]:
    """(weights, bias) as int64."""
    bias = node.bias_int
    return whole_numbers(node.weight_int), np.zeros(
        node.outputs, np.int64
    ) if bias is None else whole_numbers(bias)


def conv_output_by_hand(node: QuantConv2d, x: np.ndarray) -> np.ndarray:
    w, b = stored(node)
    m = node.module
    return conv_by_hand(x, w, m.stride[0], m.padding[0], m.dilation[0], m.groups) + b.reshape(1, -1, 1, 1)


@pytest.mark.parametrize("name", CONVS)
def test_convolution_equals_integers_by_hand_and_is_near_the_float_layer(name):
    quantizer, module, x = conv_case(name)
    with torch.no_grad():
        expected = module(x)
    node = calibrated(quantizer(module, QuantConfig()), x)
    out = node(x)
    assert np.array_equal(whole_numbers(out.q), conv_output_by_hand(node, input_codes(node, x)))
    error = (out.real() - expected).square().mean() / expected.square().mean()
    assert float(error) < 4e-4  # 34 dB: seven bits and a sign on both sides


@pytest.mark.parametrize(("w_bits", "a_bits"), [(b, b) for b in range(2, 17)] + [(4, 8), (16, 2), (3, 12)])
def test_every_width_from_2_to_16_is_exact_and_finer_is_better(w_bits, a_bits):
    quantizer, module, x = conv_case("3x3")
    node = calibrated(quantizer(module, QuantConfig(w_bits=w_bits, a_bits=a_bits)), x)
    out = node(x)
    assert int(node.weight_int.abs().max()) <= 2 ** (w_bits - 1) - 1
    codes = input_codes(node, x)
    assert np.array_equal(whole_numbers(out.q), conv_output_by_hand(node, codes))
    with torch.no_grad():
        expected = module(x)
    noise = float((out.real() - expected).square().mean() / expected.square().mean())
    # noise falls by 4 a bit, down to where a scale of 24 fractional bits that was rounded down clips the
    # largest value
    assert noise < 16 * (4.0**-w_bits + 4.0**-a_bits) + 1e-7


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_learning_and_frozen_layers_give_the_same_bits(bits):
    quantizer, module, x = conv_case("5x5 stride 2")
    node = calibrated(quantizer(module, QuantConfig(w_bits=bits, a_bits=bits)), x, freeze=False)
    learning = node(x)
    node.freeze()
    frozen = node(x)
    assert torch.equal(learning.q.double(), frozen.q.double()) and torch.equal(learning.scale, frozen.scale)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "output_padding"), [(5, 2, 2, 1), (3, 2, 1, 1), (3, 1, 1, 0)]
)
def test_transposed_convolution_equals_integers_by_hand(kernel, stride, padding, output_padding, groups):
    module = nn.ConvTranspose2d(4, 6, kernel, stride, padding, output_padding, groups=groups)
    x = spread_channels(draw(2, 4, 5, 6))
    with torch.no_grad():
        expected = randomized(module)(x)
    node = calibrated(QuantConvTranspose2d(module, QuantConfig()), x)
    w, b = stored(node)
    by_hand = deconv_by_hand(input_codes(node, x), w, stride, padding, output_padding, groups) + b.reshape(
        1, -1, 1, 1
    )
    out = node(x)
    assert np.array_equal(whole_numbers(out.q), by_hand)
    assert float((out.real() - expected).square().mean() / expected.square().mean()) < 4e-4


@pytest.mark.parametrize("shape", [(7, 4), (2, 3, 5, 4), (1, 4)])
def test_linear_equals_integers_by_hand(shape):
    module, x = randomized(nn.Linear(4, 6)), spread_channels(draw(*shape), -1)
    node = calibrated(QuantLinear(module, QuantConfig()), x)
    w, b = stored(node)
    out = node(x)
    assert np.array_equal(whole_numbers(out.q), input_codes(node, x) @ w.T + b)
    with torch.no_grad():
        torch.testing.assert_close(out.real(), module(x), rtol=0.05, atol=0.05 * float(module(x).abs().max()))


def test_folding_of_channel_scales_is_the_closed_form():
    quantizer, module, x = conv_case("3x3")
    node = calibrated(
        quantizer(module, QuantConfig(transform="fold", a_headroom=1.0, a_symmetry="one_sided")), x
    )
    low, high = x.amin((0, 2, 3)), x.amax((0, 2, 3))
    s_x = [fixed_by_hand(Fraction(float(max(-a, b))) / 127) for a, b in zip(low, high)]
    assert node.input_grid.scale.tolist() == s_x
    s_ref = max(s_x)
    weight = module.weight.detach().double().numpy()
    folded = (weight * (np.array(s_x) / s_ref).reshape(1, -1, 1, 1)).astype(np.float32)
    s_w = [fixed_by_hand(Fraction(float(np.abs(row).max())) / 127) for row in folded]
    assert node.out_scale.tolist() == pytest.approx([s * s_ref for s in s_w], rel=1e-12)
    codes = folded / np.array(s_w).reshape(-1, 1, 1, 1)
    assert np.abs(whole_numbers(node.weight_int) - codes).max() <= 0.5001
    bias = module.bias.detach().double().numpy() / node.out_scale.numpy()
    assert np.abs(whole_numbers(node.bias_int) - bias).max() <= 0.5001


def test_equalized_scales_stay_between_none_and_the_full_fold_and_predict_no_more_noise():
    quantizer, module, x = conv_case("3x3")
    scales = {}
    errors = {}
    with torch.no_grad():
        expected = module(x)
    for label, options in {
        "fold": {"transform": "fold"},
        "equalize": {},
        "tensor": {"a_granularity": "tensor"},
    }.items():
        node = calibrated(quantizer(module, QuantConfig(w_bits=6, a_bits=6, **options)), x)
        scales[label] = node.input_grid.scale
        errors[label] = float((node(x).real() - expected).square().mean())
    tolerance = 1e-6
    assert bool((scales["equalize"] >= scales["fold"] - tolerance).all())
    assert bool((scales["equalize"] <= scales["tensor"] + tolerance).all())
    assert errors["equalize"] <= 1.1 * min(errors["fold"], errors["tensor"])


def test_eight_bit_bias_is_rescaled_by_the_fixed_point_multiplier():
    """Eq. 19."""
    quantizer, module, x = conv_case("3x3")
    node = calibrated(quantizer(module, QuantConfig(bias_bits=8)), x)
    bias = module.bias.detach()
    s_b = fixed_by_hand(Fraction(float(bias.abs().max())) / 127)
    for b, scale, stored_bias in zip(bias.tolist(), node.out_scale.tolist(), whole_numbers(node.bias_int)):
        b_int8 = half_away(Fraction(b) / Fraction(s_b))
        assert abs(b_int8) <= 127
        assert stored_bias == half_away(b_int8 * multiplier_by_hand(s_b / scale))
    out = node(x)
    assert np.array_equal(whole_numbers(out.q), conv_output_by_hand(node, input_codes(node, x)))


@pytest.mark.parametrize("name", ["3x3", "1x1 without bias", "groups", "masked"])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_worst_case_input_reaches_the_accumulator_bound_and_none_exceeds_it(name, bits):
    quantizer, module, x = conv_case(name)
    node = calibrated(quantizer(module, QuantConfig(w_bits=bits, a_bits=bits)), x)
    w, b = stored(node)
    low, high = whole_numbers(node.input_grid.qmin), whole_numbers(node.input_grid.qmax)
    groups = module.groups
    reached = 0
    for o in range(w.shape[0]):
        first = o // (w.shape[0] // groups) * w.shape[1]
        span = slice(first, first + w.shape[1])
        top = np.where(w[o] > 0, high[span].reshape(-1, 1, 1), low[span].reshape(-1, 1, 1))
        bottom = np.where(w[o] > 0, low[span].reshape(-1, 1, 1), high[span].reshape(-1, 1, 1))
        reached = max(reached, int((w[o] * top).sum() + b[o]), -int((w[o] * bottom).sum() + b[o]))
    bound = float(node.bound)
    symmetric = bool((low == -high).all())
    assert reached <= bound
    assert not symmetric or reached == bound or reached >= bound - 2 * np.abs(b).max()


def test_accumulators_beyond_float32_are_exact():
    """16-bit codes on both sides of a long sum pass 2^24 by far."""
    module, x = randomized(nn.Conv2d(16, 2, 5)), 3 * torch.ones(1, 16, 5, 5) - 0.01 * draw(1, 16, 5, 5).abs()
    with torch.no_grad():
        module.weight.abs_()
    node = calibrated(QuantConv2d(module, QuantConfig(w_bits=16, a_bits=16)), x)
    out = node(x)
    by_hand = conv_output_by_hand(node, input_codes(node, x))
    assert int(np.abs(by_hand).max()) > 2**32
    assert np.array_equal(whole_numbers(out.q), by_hand)


@pytest.mark.parametrize("zero", ["weights", "one output channel", "input", "bias"])
def test_nothing_but_zeros_is_no_special_case(zero):
    module, x = randomized(nn.Conv2d(3, 4, 3)), draw(1, 3, 6, 6)
    with torch.no_grad():
        if zero == "weights":
            module.weight.zero_()
        elif zero == "one output channel":
            module.weight[2].zero_()
        elif zero == "bias":
            module.bias.zero_()
        else:
            x.zero_()
        expected = module(x)
    node = calibrated(QuantConv2d(module, QuantConfig()), x)
    out = node(x)
    assert bool(torch.isfinite(out.real()).all())
    assert np.array_equal(whole_numbers(out.q), conv_output_by_hand(node, input_codes(node, x)))
    torch.testing.assert_close(out.real(), expected, rtol=0.02, atol=0.06)


def test_one_pixel_and_one_channel_work():
    module, x = randomized(nn.Conv2d(1, 1, 1)), torch.tensor(0.7).reshape(1, 1, 1, 1)
    out = calibrated(QuantConv2d(module, QuantConfig()), x)(x)
    with torch.no_grad():
        torch.testing.assert_close(out.real(), module(x), rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("rounding", ["nearest", "adaround", "ste", "learned_offset"])
def test_untrained_rounding_schemes_freeze_to_the_nearest_whole_numbers(rounding):
    quantizer, module, x = conv_case("3x3")
    nearest = calibrated(quantizer(module, QuantConfig()), x)
    node = calibrated(quantizer(module, QuantConfig(rounding=rounding)), x)
    assert torch.equal(node.weight_int, nearest.weight_int)


@pytest.mark.parametrize(("w_bits", "a_bits"), [(8, 32), (32, 8), (32, 32)])
def test_thirty_two_bits_on_one_side_quantize_the_other_alone(w_bits, a_bits):
    quantizer, module, x = conv_case("3x3")
    with torch.no_grad():
        expected = module(x)
        node = calibrated(quantizer(module, QuantConfig(w_bits=w_bits, a_bits=a_bits)), x)
        out = node(x).real()
    error = float((out - expected).abs().max())
    if w_bits == a_bits == 32:
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    else:
        assert 1e-4 < error < 0.1 * float(expected.abs().max())


# --------------------------------------------------------------------------------------------- normalizations


def gdn(kind: type[GDN], inverse: bool, channels: int = 4) -> nn.Module:
    module = kind(channels, inverse=inverse)
    with torch.no_grad():
        module.beta.copy_(module.beta_reparam.init(1 + 0.5 * draw(channels).abs()))
        module.gamma.copy_(
            module.gamma_reparam.init(0.1 * torch.eye(channels) + 0.05 * draw(channels, channels).abs())
        )
    return module


@pytest.mark.parametrize("kind", [GDN, GDN1])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("bits", [8, 12])
def test_gdn_equals_big_integers_and_is_near_the_float_layer(kind, inverse, bits):
    module, x = gdn(kind, inverse), spread_channels(2 * draw(1, 4, 6, 5))
    node = calibrated(QuantGDN(module, QuantConfig(w_bits=bits, a_bits=bits)), x)
    # the input arrives as a 20-bit accumulator
    scale = torch.tensor(2.0**-15, dtype=torch.float64)
    accumulator = torch.round(x / float(scale))
    out = node(QTensor(accumulator, scale, node.runtime))
    codes = whole_numbers(out.q)

    def on_grid(grid: Quantizer, values: Tensor) -> np.ndarray:
        result = np.zeros(values.shape, dtype=np.int64)
        for place in np.ndindex(values.shape):
            c = place[1] if grid.scale.ndim else ()
            code = half_away(int(values[place]) * multiplier_by_hand(float(scale / grid.scale[c])))
            result[place] = min(max(code, int(grid.qmin[c])), int(grid.qmax[c]))
        return result

    magnitude, carried = on_grid(node.input_grid, accumulator.abs()), on_grid(node.x_grid, accumulator)
    w, beta = stored(node)
    power = 2 if kind is GDN else 1
    norm = np.maximum(conv_by_hand(magnitude**power, w) + beta.reshape(1, -1, 1, 1), 1)
    for place in np.ndindex(codes.shape):
        c = place[1]
        multiplier = Fraction(int(node.mantissa.flatten()[c])) / Fraction(2) ** int(node.shift.flatten()[c])
        value = float(int(carried[place]) * multiplier)
        root = math.sqrt(norm[place]) if power == 2 else float(norm[place])
        value = value * root if inverse else value / root
        value = min(max(value, float(node.out_grid.qmin[c])), float(node.out_grid.qmax[c]))
        assert abs(codes[place] - value) <= 0.502
    with torch.no_grad():
        expected = module(x)
    # channels differ tenfold, their squares hundredfold: what is left of gamma's 7 or 11 bits
    tolerance = (0.04 if bits == 8 else 0.004) * float(expected.abs().max())
    assert float((out.real() - expected).abs().max()) <= tolerance


@pytest.mark.parametrize("kind", [GDN, GDN1])
@pytest.mark.parametrize("channels", [4, 96])
def test_gdn_learns_and_freezes_to_the_same_bits(kind, channels):
    module, x = gdn(kind, False, channels), 2 * draw(1, channels, 16, 16)
    node = calibrated(QuantGDN(module, QuantConfig()), x, freeze=False)
    learning = node(x)
    node.freeze()
    assert torch.equal(learning.q.double(), node(x).q.double())


@pytest.mark.parametrize("width", [1, 7, 32])
@pytest.mark.parametrize("carrier_bits", [8, 16])
def test_layer_norm_is_whole_and_near_the_float_layer(width, carrier_bits):
    module = nn.LayerNorm(width)
    x = draw(3, 5, width) * 3 + 1
    with torch.no_grad():
        module.weight.copy_(draw(width, seed=1))
        module.bias.copy_(draw(width, seed=2))
        expected = module(x)
    node = calibrated(QuantLayerNorm(module, QuantConfig(carrier_bits=carrier_bits)), x)
    out = node(x)
    whole_numbers(out.q)
    step = float(x.abs().max()) / (2 ** (carrier_bits - 1) - 1)
    spread = x.std(-1, correction=0, keepdim=True).clamp(min=0.3)
    # an input moves by half a step (twice that with headroom), divided by the deviation; the output by half
    # of its own
    bound = (
        float((4 * step / spread * module.weight.detach().abs()).max())
        + float(node.grid_out.scale.max())
        + 2e-3
    )
    assert float((out.real() - expected).abs().max()) <= (
        bound if width > 1 else 1e-3 + float(node.grid_out.scale.max())
    )


def test_layer_norm_learns_and_freezes_to_the_same_bits():
    module, x = randomized(nn.LayerNorm(9)), draw(4, 9)
    node = calibrated(QuantLayerNorm(module, QuantConfig()), x, freeze=False)
    learning = node(x)
    node.freeze()
    assert torch.equal(learning.q, node(x).q)


# -------------------------------------------------------------------------------------------------- functions


@pytest.mark.parametrize("keys", [1, 3, 49, 196])
def test_softmax_is_whole_and_within_a_thousandth(keys):
    scores = 3 * draw(2, 2, 5, keys)
    bias = draw(2, 5, keys, seed=1)
    bias[:, :, 1::4] = float("-inf")
    node = make_function("softmax", {"dim": -1}, QuantConfig())
    node = calibrated(node, scores, bias)
    out = node(scores, bias)
    codes = whole_numbers(out.q)
    real = MaskedSoftmax()(scores, bias)
    # score and bias are each rounded to 1/256 nat, twice that between two keys
    assert float((out.real() - real).abs().max()) <= 2 / 256 + 1e-3
    assert (codes[torch.isinf(bias).expand(scores.shape).numpy()] == 0).all()
    assert float((out.real().sum(-1) - 1).abs().max()) <= 2e-3 + keys * 2.0**-17


@pytest.mark.parametrize("kind", ["gelu", "sigmoid", "tanh", "silu", "softplus"])
@pytest.mark.parametrize(("table_bits", "carrier_bits"), [(8, 8), (8, 16), (12, 16), (16, 16)])
def test_tables_hold_the_function_to_within_their_steps(kind, table_bits, carrier_bits):
    x = torch.linspace(-4, 6, 3001).reshape(1, -1)
    config = QuantConfig(table_bits=table_bits, carrier_bits=carrier_bits)
    node = function(kind, config, x)
    out = node(x)
    whole_numbers(out.q)
    real = getattr(F, kind)(x) if kind in ("gelu", "silu", "softplus") else getattr(torch, kind)(x)
    step_in, step_out = float(node.grid_in.scale), float(node.grid_out.scale)
    assert node.table.numel() <= 2**table_bits
    # no slope here exceeds 1.13; one-sided grids may clip half a step at the end
    assert float((out.real() - real).abs().max()) <= 1.13 * step_in + step_out
    assert float(out.real().std()) == pytest.approx(float(real.std()), rel=0.05)


def test_tables_clip_what_calibration_has_not_seen():
    node = function("gelu", QuantConfig(), torch.linspace(-1, 1, 50))
    out = node(torch.tensor([-100.0, 100.0])).real()
    assert float(out[1]) <= 1.3 and abs(float(out[0])) < 0.2


@pytest.mark.parametrize("slope", [0.01, 0.2])
def test_leaky_relu_requantizes_negative_numbers_by_the_slope(slope):
    node = function("leaky_relu", QuantConfig(), draw(5), options={"slope": slope})
    q = torch.tensor([-(2**23) + 1, -1000.0, -150, -50, -3, -1, 0, 1, 77, 2**23])
    out = node(QTensor(q, torch.tensor(0.5, dtype=torch.float64), node.runtime))
    by_hand = [int(v) if v >= 0 else half_away(int(v) * multiplier_by_hand(slope)) for v in q.tolist()]
    assert out.q.tolist() == by_hand and float(out.scale) == 0.5


@pytest.mark.parametrize("bits", [8, 16])
def test_add_and_mul_are_whole_and_within_their_steps(bits):
    a, b = draw(2, 3, 4, 4), 2 * draw(2, 3, 4, 4, seed=1)
    config = QuantConfig(carrier_bits=bits)
    add, mul = function("add", config, a, QTensor(b, None, Runtime(config))), function("mul", config, a, b)
    added = add(a, QTensor(b, None, add.runtime))
    whole_numbers(added.q)
    assert float((added.real() - (a + b)).abs().max()) <= float(add.grid.scale) * 1.001
    multiplied = mul(a, b)
    whole_numbers(multiplied.q)
    bound = (
        float(mul.grid_a.scale) / 2 * float(b.abs().max())
        + float(mul.grid_b.scale) / 2 * float(a.abs().max())
        + float(mul.grid_a.scale * mul.grid_b.scale) / 4
        + float(mul.grid_out.scale)
    )
    assert float((multiplied.real() - a * b).abs().max()) <= bound * 1.001


def test_mul_equals_big_integers():
    a, b = draw(1, 2, 3, 3), draw(1, 2, 3, 3, seed=1)
    node = function("mul", QuantConfig(), a, b)
    scale = torch.tensor(2.0**-18, dtype=torch.float64)
    qa, qb = (torch.round(v / float(scale)) for v in (a, b))
    out = node(QTensor(qa, scale, node.runtime), QTensor(qb, scale, node.runtime))
    for place in np.ndindex(a.shape):
        codes = [
            half_away(int(q[place]) * multiplier_by_hand(float(scale / grid.scale)))
            for q, grid in ((qa, node.grid_a), (qb, node.grid_b))
        ]
        ratio = float(node.grid_a.scale * node.grid_b.scale / node.grid_out.scale)
        assert int(out.q[place]) == half_away(codes[0] * codes[1] * multiplier_by_hand(ratio))


def test_adding_a_constant_puts_it_on_the_same_grid():
    x = draw(2, 3)
    for constant in (0.25, torch.tensor([0.1, -0.2, 0.3])):
        node = function("add", QuantConfig(), x, constant)
        out = node(x, constant)
        whole_numbers(out.q)
        assert float((out.real() - (x + constant)).abs().max()) <= float(node.grid.scale) * 1.001


@pytest.mark.parametrize("bits", [8, 16])
def test_matrix_products_have_a_scale_per_head_and_equal_integers(bits):
    a, b = spread_channels(draw(2, 3, 5, 4), 1), draw(2, 3, 4, 6, seed=1)
    node = function("matmul", QuantConfig(a_bits=bits), a, b)
    out = node(a, b)

    def codes(grid: Quantizer, x: Tensor) -> np.ndarray:
        ratio = (x.double() / grid.scale.reshape(1, -1, 1, 1)).float().double().numpy()
        return np.trunc(ratio + np.copysign(0.5, ratio)).astype(np.int64)

    assert node.grid_a.scale.shape == (3,)
    expected = codes(node.grid_a, a) @ codes(node.grid_b, b)
    if int(np.abs(expected).max()) < 2**24:
        assert np.array_equal(whole_numbers(out.q), expected)
    whole_numbers(out.q)
    error = (out.real() - a @ b).square().mean() / (a @ b).square().mean()
    assert float(error) < 10 * room(bits) ** 2 * 4.0**-bits


def test_merged_channels_are_one_channel_that_saw_it_all():
    first, second = draw(2, 3, 5), draw(2, 4, 5, seed=1)
    merged, plain = Quantizer(8, 24, 1, "percentile99"), Quantizer(8, 24, None, "percentile99")
    merged.observe(first)
    merged.merge_channels()
    merged.observe(second)
    for x in (first, second):
        plain.observe(x)
    for grid in (merged, plain):
        grid.initialize()
        grid.freeze()
    torch.testing.assert_close(merged.scale, plain.scale)
    torch.testing.assert_close(merged.energy, plain.energy)


def test_sixteen_bit_matrix_products_are_exact():
    """Products of 16-bit codes pass 2^24, where float32 sums would round."""
    a, b = 1 + 0.1 * draw(1, 2, 5, 64).abs(), 1 + 0.1 * draw(1, 2, 64, 5, seed=1).abs()
    node = function("matmul", QuantConfig(a_bits=16), a, b)
    out = node(a, b)

    def codes(grid: Quantizer, x: Tensor) -> np.ndarray:
        ratio = (x.double() / grid.scale.reshape(1, -1, 1, 1)).float().double().numpy()
        return np.trunc(ratio + np.copysign(0.5, ratio)).clip(-(2**31), int(grid.qmax.max())).astype(np.int64)

    assert np.array_equal(whole_numbers(out.q), codes(node.grid_a, a) @ codes(node.grid_b, b))
