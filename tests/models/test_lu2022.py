"""lu2022 (TinyLIC) against the public code (lumingzzz/TinyLIC) and against neighborhood attention in plain
loops.

The golden numbers were printed by the public code on the same weights, its two CUDA kernels replaced by loops
over their border rule; ours agreed with it to 1e-6 of the largest value. Its padding of maps smaller than the
window names an attribute that does not exist there (`window_size`); `kernel_size` was put in its place.
"""

import hashlib
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from licq.models.attention import TILE, NeighborhoodAttention
from licq.models.layers import MultistageMaskedConv2d
from licq.models.lu2022 import NSABlock, TinyLIC, infer_sizes, phase_masks, slice_sizes
from licq.models.registry import create_model
from tests.formula import image_by_formula

TINY = {"N": 8, "M": 16, "depths": (1, 1, 1, 1, 1, 1), "num_heads": (2, 2, 2, 2, 2, 2)}


def fill_by_formula(model: nn.Module) -> nn.Module:
    """Every parameter from a sine of its indices: the same weights on every machine and PyTorch version."""
    for order, (name, parameter) in enumerate(sorted(model.named_parameters())):
        wave = torch.sin(1.9 * torch.arange(parameter.numel(), dtype=torch.float64) + order).reshape(
            parameter.shape
        )
        if name.endswith("quantiles"):
            wave = 0.4 * wave[:, :, 1:2] + torch.tensor([-10.0, 0.0, 10.0])
        elif ".norm" in name:
            wave = wave * 0.2 + (1 if name.endswith("weight") else 0)
        elif parameter.dim() > 1 and "entropy_bottleneck" not in name and not name.endswith("rpb"):
            wave = wave * (0.7 * parameter.shape[0] / parameter.numel()) ** 0.5
        else:
            wave = wave * 0.5
        with torch.no_grad():
            parameter.copy_(wave)
    return model.eval()


def wave_map(*shape: int) -> Tensor:
    return torch.sin(0.7 * torch.arange(math.prod(shape), dtype=torch.float64)).float().reshape(shape)


@pytest.fixture(scope="module")
def narrow() -> TinyLIC:
    """Official depths, heads and windows at 16 and 40 channels, weights by formula."""
    return fill_by_formula(TinyLIC(N=16, M=40))


def test_outputs_equal_the_public_code(narrow):
    x = image_by_formula(128, 192)
    outputs = {}
    for name in ("g_a6", "g_a7", "h_a3"):
        getattr(narrow, name).register_forward_hook(
            lambda _, __, out, name=name: outputs.__setitem__(name, out)
        )
    with torch.no_grad():
        out = narrow(x)
    golden = {
        "y": (outputs["g_a7"], 640, [-9.785778, 1.844221, 0.577816, -7.257552, 0.109384, -1.949119]),
        "z": (outputs["h_a3"], 28, [-0.032704, -1.589149, -0.804759, 0.049794, 1.457387, -0.886188]),
        "x_hat": (out["x_hat"], 14033, [-0.07994, 1.578365, 3.457897, -1.550572, -1.066474, -5.418109]),
        "likelihoods of y": (
            out["likelihoods"]["y"],
            401,
            [0.0, 0.0, 0.002723, 0.0, 0.197788, 0.0, 0.999859, 0.242158, 0.0, 3e-06],
        ),
        "likelihoods of z": (
            out["likelihoods"]["z"],
            13,
            [0.90665, 2e-06, 0.000212, 0.0, 0.0, 0.0, 0.0, 0.990288, 6e-06, 0.0, 0.984712, 0.760617],
        ),
    }
    for name, (tensor, step, expected) in golden.items():
        values = tensor.flatten()[::step]
        torch.testing.assert_close(
            values, torch.tensor(expected), rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert float(out["x_hat"].double().abs().sum()) == pytest.approx(480676.139, rel=1e-5)
    assert float(out["likelihoods"]["y"].double().log2().sum()) == pytest.approx(-83000.1647, rel=1e-5)
    assert float(out["likelihoods"]["z"].double().log2().sum()) == pytest.approx(-2714.9922, rel=1e-5)


def test_block_of_official_width_equals_the_public_code():
    block = fill_by_formula(NSABlock(320, num_heads=20, kernel_size=7, mlp_ratio=2.0))
    with torch.no_grad():
        out = block(wave_map(1, 11, 13, 320))
    expected = [
        -3.738194,
        0.767617,
        0.116504,
        -0.541356,
        5.874299,
        -4.93912,
        6.546647,
        -6.323802,
        -0.249691,
        -1.400212,
    ]
    torch.testing.assert_close(out.flatten()[::5003], torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert float(out.double().abs().sum()) == pytest.approx(126334.4256, rel=1e-5)


def test_official_state_dict_has_the_public_names_and_shapes():
    state_dict = create_model("lu2022", quality=3).state_dict()
    assert len(state_dict) == 530
    ours = {
        name: value
        for name, value in state_dict.items()
        if not name.startswith(("entropy_bottleneck", "gaussian"))
    }
    listing = "\n".join(f"{name} {tuple(ours[name].shape)}" for name in sorted(ours))
    public = "3d622adf7940ee0aba33fe14e38bebabf544bd1616e0cf8534e0f34e295bee0b"
    assert hashlib.sha256(listing.encode()).hexdigest() == public
    golden = {
        "g_a0.weight": (128, 3, 5, 5),
        "g_a5.residual_group.blocks.5.attn.rpb": (16, 13, 13),
        "g_a7.residual_group.blocks.1.attn.qkv.weight": (960, 320),
        "h_a3.residual_group.blocks.1.attn.rpb": (12, 5, 5),
        "h_s3.weight": (192, 640, 3, 3),
        "sc_transform_1.mask": (48, 24, 3, 3),
        "sc_transform_5.weight": (208, 104, 5, 5),
        "entropy_parameters_4.4.weight": (246, 246, 1, 1),
        "cc_transforms.3.0.weight": (123, 837, 5, 5),
        "entropy_bottleneck.quantiles": (192, 1, 3),
    }
    assert {name: tuple(state_dict[name].shape) for name in golden} == golden


def test_slices_follow_the_papers_cosine_schedule():
    assert slice_sizes(320) == [24, 69, 104, 123]
    for channels in (4, 16, 40, 96, 192, 320):
        sizes = slice_sizes(channels)
        left = [math.ceil(math.cos(t * math.pi / 8) * channels) for t in (1, 2, 3)]
        assert sizes == [channels - left[0], left[0] - left[1], left[1] - left[2], left[2]]


def test_sizes_are_read_off_the_shapes():
    sizes = {
        "N": 16,
        "M": 24,
        "depths": (1, 2, 1, 1, 2, 1),
        "num_heads": (2, 4, 8, 3, 2, 1),
        "kernel_size": 7,
    }
    sizes |= {"mlp_ratio": 1.5}
    assert infer_sizes(TinyLIC(**sizes).state_dict()) == sizes


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 192)])
def test_every_multiple_of_64_works(height, width):
    x = image_by_formula(height, width)
    with torch.no_grad():
        out = fill_by_formula(TinyLIC(**TINY))(x)
    assert out["x_hat"].shape == x.shape
    assert out["likelihoods"]["y"].shape == (1, 16, height // 16, width // 16)
    assert bool(torch.isfinite(out["x_hat"]).all())


def test_gradient_reaches_every_parameter():
    model = fill_by_formula(TinyLIC(**TINY)).train()
    out = model(image_by_formula(64, 64))
    loss = out["x_hat"].square().mean() - sum(values.log().mean() for values in out["likelihoods"].values())
    (loss + model.aux_loss()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    silent = {
        name for name, parameter in model.named_parameters() if not bool(parameter.grad.abs().sum() > 0)
    }
    assert silent == set()


# ------------------------------------------------------------------------------------- neighborhood attention


def attention_by_loops(module: NeighborhoodAttention, x: Tensor) -> Tensor:
    """Query by query: the window shifted inside the map, kernel_size^2 keys, bias at (key - query) +
    kernel_size - 1."""
    height, width = x.shape[1:3]
    kernel, heads = module.kernel_size, module.num_heads
    padded = torch.zeros(x.shape[0], max(height, kernel), max(width, kernel), x.shape[3])
    padded[:, :height, :width] = x
    rows, columns = padded.shape[1:3]
    q, k, v = module.qkv(padded).unflatten(-1, (3, heads, -1)).unbind(3)
    out = torch.zeros_like(q)
    for i, j in itertools.product(range(rows), range(columns)):
        top, left = (
            min(max(i - kernel // 2, 0), rows - kernel),
            min(max(j - kernel // 2, 0), columns - kernel),
        )
        keys = list(itertools.product(range(top, top + kernel), range(left, left + kernel)))
        scores = [
            (q[:, i, j] * k[:, a, b]).sum(-1) / math.sqrt(module.head_dim)
            + module.rpb[:, a - i + kernel - 1, b - j + kernel - 1]
            for a, b in keys
        ]
        share = torch.stack(scores, -1).softmax(-1)
        out[:, i, j] = sum(share[:, :, n, None] * v[:, a, b] for n, (a, b) in enumerate(keys))
    return module.proj(out.flatten(3))[:, :height, :width]


@pytest.mark.parametrize(
    ("kernel", "height", "width"),
    [
        (7, 7, 7),
        (7, 8, 8),
        (7, 9, 15),
        (7, 11, 7),
        (3, 3, 3),
        (3, 11, 5),
        (5, 6, 19),
        (9, 9, 10),
        (7, 5, 9),
        (3, 2, 2),
        (7, 1, 1),
    ],
)
def test_attention_equals_loops_over_queries_and_keys(kernel, height, width):
    """Multiples of the tile and not, the window's own size, and maps smaller than the window."""
    module = fill_by_formula(NeighborhoodAttention(6, kernel, 2))
    x = wave_map(2, height, width, 6)
    with torch.no_grad():
        torch.testing.assert_close(module(x), attention_by_loops(module, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(7, 7), (10, 21), (16, 8)])
def test_every_query_depends_on_exactly_49_keys(height, width):
    """Read off the gradient, query by query, on a map that crosses tiles and borders."""
    module = fill_by_formula(NeighborhoodAttention(4, 7, 2))
    x = wave_map(1, height, width, 4).requires_grad_()
    out = module(x)
    corners = itertools.product(
        {0, 3, height // 2, height - 1}, {0, 2, width // 2, min(TILE, width - 1), width - 1}
    )
    for i, j in corners:
        (grad,) = torch.autograd.grad(out[0, i, j].sum(), x, retain_graph=True)
        seen = grad[0].abs().sum(-1) > 0
        top, left = min(max(i - 3, 0), height - 7), min(max(j - 3, 0), width - 7)
        expected = torch.zeros(height, width, dtype=torch.bool)
        expected[top : top + 7, left : left + 7] = True
        assert torch.equal(seen, expected)


def test_gradients_of_the_tiled_product_equal_those_of_the_loops():
    module = fill_by_formula(NeighborhoodAttention(4, 3, 2))
    x = wave_map(1, 9, 5, 4).requires_grad_()
    inputs = [x, *module.parameters()]
    weights = wave_map(1, 9, 5, 4).flip(1)
    tiled = torch.autograd.grad((module(x) * weights).sum(), inputs)
    by_loops = torch.autograd.grad((attention_by_loops(module, x) * weights).sum(), inputs)
    for a, b in zip(tiled, by_loops):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_attention_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="multiple of num_heads"):
        NeighborhoodAttention(10, 7, 4)
    for kernel in (1, 4):
        with pytest.raises(ValueError, match="kernel_size must be odd and at least 3"):
            NeighborhoodAttention(8, kernel, 2)


# ---------------------------------------------------------------------------------------------- context model


def test_masks_let_through_what_the_passes_have_decoded():
    """For every position a pass serves, the mask keeps just the neighbours of phases that are decoded by
    then."""
    even_even, odd_odd, even_odd, odd_even = range(4)

    def phase(row: int, column: int) -> int:
        return {(0, 0): even_even, (1, 1): odd_odd, (0, 1): even_odd, (1, 0): odd_even}[row % 2, column % 2]

    served_after = {
        "A": [(odd_odd, {even_even})],
        "B": [(even_odd, {even_even, odd_odd})],
        "C": [(odd_even, {0, 1, 2})],
    }
    for mask_type, cases in served_after.items():
        side = 3 if mask_type == "A" else 5
        mask = MultistageMaskedConv2d(2, 2, side, padding=side // 2, mask_type=mask_type).mask
        for served, decoded in cases:
            row, column = {odd_odd: (1, 1), even_odd: (0, 1), odd_even: (1, 0)}[served]
            for a, b in itertools.product(range(side), repeat=2):
                known = phase(row + a - side // 2, column + b - side // 2) in decoded
                assert bool((mask[:, :, a, b] == known).all()), (mask_type, a, b)


def test_phase_masks_divide_the_latent():
    masks = phase_masks(5, 6, torch.device("cpu"))
    assert torch.equal(sum(masks), torch.ones(5, 6))
    for mask, (row, column) in zip(masks, [(0, 0), (1, 1), (0, 1), (1, 0)]):
        assert mask[row, column] == 1 and mask.sum() == mask[row::2, column::2].numel()
