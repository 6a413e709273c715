"""TIC against the public code (lumingzzz/TIC): names, shapes, and outputs on weights made by a formula.

The golden numbers were printed by the public code itself on the same weights; there ours agreed with it bit
for bit.
"""

import math

import pytest
import torch

from licq.models.registry import create_model
from licq.models.swin import (
    CausalAttentionModule,
    SwinTransformerBlock,
    merge_windows,
    partition_windows,
    relative_position_index,
    window_mask,
)
from licq.models.tic import TIC, infer_sizes
from tests.formula import as_published, fill_by_formula, image_by_formula

TINY = {"N": 4, "M": 4, "depths": (2, 2, 2, 2, 2), "num_heads": (2, 2, 2, 2, 2), "causal_heads": 2}


@pytest.fixture(scope="module")
def narrow() -> TIC:
    """Official depths and windows at 16 channels, weights by formula."""
    return fill_by_formula(TIC(N=16, M=16))


def test_outputs_equal_the_public_code(narrow):
    x = image_by_formula(128, 256)
    with torch.no_grad():
        y = narrow.g_a(x)
        z = narrow.h_a(y)
        out = as_published(narrow)(x)
        narrow.gaussian_conditional.of_residual = False
    close = {"rtol": 1e-4, "atol": 1e-4}
    expected_y = [-0.655105, 0.754267, 0.588657, 0.465509, 0.365317, -0.057109]
    expected_z = [-1.724181, -0.456966, 0.761362, 1.160285, 1.743658]
    expected_x_hat = [1.033401, 0.143547, 4.135505, 0.186987, -4.888086, -0.021751, 1.368014, 0.182236]
    torch.testing.assert_close(y.flatten()[::401], torch.tensor(expected_y), **close)
    torch.testing.assert_close(z.flatten()[::29], torch.tensor(expected_z), **close)
    torch.testing.assert_close(out["x_hat"].flatten()[::14033], torch.tensor(expected_x_hat), **close)
    likelihoods = out["likelihoods"]
    torch.testing.assert_close(
        likelihoods["y"].flatten()[1604::401], torch.tensor([0.238998, 0.269173]), **close
    )
    assert float(likelihoods["y"].log2().sum()) == pytest.approx(-25847.125, rel=1e-4)
    assert float(likelihoods["z"].log2().sum()) == pytest.approx(-1130.00415, rel=1e-4)


def test_official_state_dict_has_the_public_names_and_shapes():
    state_dict = create_model("tic", quality=3).state_dict()
    assert len(state_dict) == 539
    block = "g_a3.residual_group.blocks.1"
    golden = {
        "g_a0.weight": (128, 3, 5, 5),
        "g_s6.weight": (128, 3, 5, 5),
        "h_s4.weight": (384, 128, 3, 3),
        f"{block}.attn_mask": (64, 64, 64),
        f"{block}.attn.relative_position_bias_table": (225, 8),
        f"{block}.attn.relative_position_index": (64, 64),
        f"{block}.attn.qkv.weight": (384, 128),
        f"{block}.mlp.fc1.weight": (512, 128),
        "g_a1.residual_group.blocks.1.attn_mask": (256, 64, 64),
        "h_s3.residual_group.blocks.1.attn_mask": (16, 16, 16),
        "h_a1.residual_group.blocks.0.attn.relative_position_bias_table": (49, 16),
        "context_prediction.relative_position_bias_table": (81, 16),
        "context_prediction.proj.weight": (384, 192),
        "entropy_parameters.0.weight": (640, 768, 1, 1),
        "entropy_parameters.4.weight": (384, 512, 1, 1),
        "entropy_bottleneck.quantiles": (128, 1, 3),
    }
    assert {name: tuple(state_dict[name].shape) for name in golden} == golden
    assert "g_a1.residual_group.blocks.0.attn_mask" not in state_dict
    assert "context_prediction.mask" not in state_dict


def test_sizes_are_read_off_the_shapes():
    sizes = {"N": 8, "M": 12, "depths": (1, 2, 3, 1, 2), "num_heads": (2, 4, 8, 2, 1), "window_size": 4}
    sizes |= {"mlp_ratio": 2.0, "causal_heads": 3}
    model = TIC(**sizes)
    assert infer_sizes(model.state_dict()) == sizes
    assert TIC.from_state_dict(model.state_dict()).g_s5.residual_group.blocks[0].attn.heads == 2


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 192), (192, 320)])
def test_every_multiple_of_64_works(height, width):
    x = image_by_formula(height, width)
    with torch.no_grad():
        out = fill_by_formula(TIC(**TINY))(x)
    assert out["x_hat"].shape == x.shape
    assert out["likelihoods"]["y"].shape == (1, 4, height // 16, width // 16)
    assert bool(torch.isfinite(out["x_hat"]).all())


def test_window_mask_equals_brute_force():
    height, width, window, shift = 8, 12, 4, 2
    mask = window_mask(height, width, window, shift)
    rows = torch.roll(torch.arange(height), -shift)
    columns = torch.roll(torch.arange(width), -shift)
    for number in range(mask.shape[0]):
        top, left = number // 3 * window, number % 3 * window
        for a in range(window * window):
            for b in range(window * window):
                pixels = [(rows[top + i // window], columns[left + i % window]) for i in (a, b)]
                together = all(abs(int(p - q)) < window for p, q in zip(*pixels))
                assert (mask[number, a, b] == 0) == together


def test_no_mask_where_nothing_is_masked():
    assert window_mask(8, 16, 4, 0) is None
    assert window_mask(6, 8, 4, 0) is not None


@pytest.mark.parametrize(("side", "shift"), [(6, 0), (7, 2)])
def test_padding_reaches_no_real_token(side, shift):
    """A 6x6 or 7x7 map in windows of 4: what stands in the padded rows and columns must not matter."""
    block = fill_by_formula(SwinTransformerBlock(8, (16, 16), heads=2, window=4, shift=shift, mlp_ratio=2.0))
    x = torch.randn(1, side, side, 8, generator=torch.Generator().manual_seed(0))
    pads = []
    original = torch.nn.functional.pad

    def pad_with(value):
        def pad(tensor, amounts):
            pads.append(amounts)
            return original(tensor, amounts, value=value)

        return pad

    outputs = []
    for value in (0.0, 50.0):
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr("licq.models.swin.F.pad", pad_with(value))
            outputs.append(block(x))
    assert len(pads) == 2
    torch.testing.assert_close(*outputs)


def test_map_smaller_than_the_window_is_one_group():
    block = fill_by_formula(SwinTransformerBlock(8, (16, 16), heads=2, window=4, shift=2, mlp_ratio=2.0))
    x = torch.randn(1, 2, 2, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = block(x), block(x + torch.tensor([0.0, 1.0]).reshape(1, 1, 2, 1) * torch.arange(8))
    assert not torch.allclose(before[:, :, 0], after[:, :, 0])


def test_windows_merge_back():
    x = torch.arange(2 * 8 * 12 * 3).reshape(2, 8, 12, 3)
    windows = partition_windows(x, 4)
    assert torch.equal(windows[1, 4].reshape(4, 4, 3), x[1, 4:8, 4:8])
    assert torch.equal(merge_windows(windows, 4, 8, 12), x)


def test_relative_position_index_is_row_major_offset():
    index = relative_position_index(3)
    for query in range(9):
        for key in range(9):
            rows, columns = query // 3 - key // 3 + 2, query % 3 - key % 3 + 2
            assert index[query, key] == rows * 5 + columns


def test_context_model_sees_only_decoded_symbols():
    module = fill_by_formula(CausalAttentionModule(4, 8, heads=2))
    y_hat = torch.randn(1, 4, 6, 7, generator=torch.Generator().manual_seed(1))
    changed = y_hat.clone()
    changed[:, :, 3, 4] += 5
    with torch.no_grad():
        moved = (module(changed) - module(y_hat)).abs().amax(dim=(0, 1)) > 0
    decoded_later = torch.arange(6 * 7).reshape(6, 7) > 3 * 7 + 4
    assert not bool((moved & ~decoded_later).any())
    assert bool(moved[3, 5]) and bool(moved[4, 4]) and bool(moved[5, 2])


def test_gradient_reaches_every_parameter():
    model = TIC(**TINY).train()
    out = model(image_by_formula(64, 64))
    loss = out["x_hat"].square().mean() - sum(values.log().mean() for values in out["likelihoods"].values())
    (loss + model.aux_loss()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert math.isfinite(float(loss.detach()))
