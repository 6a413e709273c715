"""TinyLIC: Lu and Ma, "High-Efficiency Lossy Image Coding Through Adaptive Neighborhood Information
Aggregation".

arXiv 2204.11448. Parameters carry the names and shapes of the public code (lumingzzz/TinyLIC), so its
checkpoints load.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from compressai.models import CompressionModel
from compressai.models.utils import conv, deconv
from torch import Tensor, nn

from licq.models.attention import NeighborhoodAttention
from licq.models.layers import MultistageMaskedConv2d, RoundAboutMeans
from licq.models.registry import register_model

STEPS = 4


def slice_sizes(channels: int) -> list[int]:
    """The channels of y that each of the four stages decodes: few first, many last.

    The paper's cosine schedule.
    """
    left = (
        [channels] + [math.ceil(math.cos(t / STEPS * math.pi / 2) * channels) for t in range(1, STEPS)] + [0]
    )
    return [a - b for a, b in zip(left, left[1:])]


class Mlp(nn.Module):
    """Two-layer perceptron on the last dimension."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class NSABlock(nn.Module):
    """Neighborhood self-attention and perceptron, each behind a LayerNorm and a shortcut; (B, H, W, dim)."""

    def __init__(self, dim: int, num_heads: int, kernel_size: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = NeighborhoodAttention(dim, kernel_size, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Blocks(nn.Module):
    def __init__(self, dim: int, depth: int, num_heads: int, kernel_size: int, mlp_ratio: float):
        super().__init__()
        self.blocks = nn.ModuleList(NSABlock(dim, num_heads, kernel_size, mlp_ratio) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class ResViTBlock(nn.Module):
    """A run of neighborhood attention blocks with a shortcut around it; (B, dim, H, W)."""

    def __init__(self, dim: int, depth: int, num_heads: int, kernel_size: int, mlp_ratio: float):
        super().__init__()
        self.residual_group = _Blocks(dim, depth, num_heads, kernel_size, mlp_ratio)

    def forward(self, x: Tensor) -> Tensor:
        return self.residual_group(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) + x


def _pointwise_stack(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths, widths[1:]):
        layers += [conv(inputs, outputs, kernel_size=1, stride=1), nn.GELU()]
    return nn.Sequential(*layers[:-1])


class PassSum(nn.Module):
    """The sum of the context of all passes; that of passes to come is zero.

    All passes add in the same way. So a position has the same sum after its own pass, which the decoder sees,
    and after the last one, from which the rate is estimated, even when the sums are quantized.
    """

    def forward(self, *contexts: Tensor) -> Tensor:
        """The sum of tensors of one shape."""
        total = contexts[0]
        for context in contexts[1:]:
            total = total + context
        return total


class TinyLIC(CompressionModel):
    """Convolutions and neighborhood attention with a four-stage context model.

    Args:
        N: channels after the first convolution; the stages of g_a have N, 3N/2, 2N, M.
        M: channels of the latent y.
        depths: attention blocks in the four stages of g_a and the two of h_a; g_s and h_s mirror them.
        num_heads: attention heads of the same six stages.
        kernel_size: side of the attention window in g_a and g_s; h_a and h_s use half of it, rounded down.
        mlp_ratio: hidden width of the perceptrons over their width.
    """

    def __init__(
        self,
        N: int = 128,
        M: int = 320,
        depths: tuple[int, ...] = (2, 2, 6, 2, 2, 2),
        num_heads: tuple[int, ...] = (8, 12, 16, 20, 12, 12),
        kernel_size: int = 7,
        mlp_ratio: float = 2.0,
    ):
        super().__init__()
        self.N, self.M = N, M
        hyper = N * 3 // 2

        def stage(dim: int, index: int, kernel: int = kernel_size) -> ResViTBlock:
            return ResViTBlock(dim, depths[index], num_heads[index], kernel, mlp_ratio)

        small = kernel_size // 2
        self.g_a0 = conv(3, N, kernel_size=5, stride=2)
        self.g_a1 = stage(N, 0)
        self.g_a2 = conv(N, N * 3 // 2, kernel_size=3, stride=2)
        self.g_a3 = stage(N * 3 // 2, 1)
        self.g_a4 = conv(N * 3 // 2, N * 2, kernel_size=3, stride=2)
        self.g_a5 = stage(N * 2, 2)
        self.g_a6 = conv(N * 2, M, kernel_size=3, stride=2)
        self.g_a7 = stage(M, 3)

        self.h_a0 = conv(M, hyper, kernel_size=3, stride=2)
        self.h_a1 = stage(hyper, 4, small)
        self.h_a2 = conv(hyper, hyper, kernel_size=3, stride=2)
        self.h_a3 = stage(hyper, 5, small)

        self.h_s0 = stage(hyper, 5, small)
        self.h_s1 = deconv(hyper, hyper, kernel_size=3, stride=2)
        self.h_s2 = stage(hyper, 4, small)
        self.h_s3 = deconv(hyper, M * 2, kernel_size=3, stride=2)

        self.g_s0 = stage(M, 3)
        self.g_s1 = deconv(M, N * 2, kernel_size=3, stride=2)
        self.g_s2 = stage(N * 2, 2)
        self.g_s3 = deconv(N * 2, N * 3 // 2, kernel_size=3, stride=2)
        self.g_s4 = stage(N * 3 // 2, 1)
        self.g_s5 = deconv(N * 3 // 2, N, kernel_size=3, stride=2)
        self.g_s6 = stage(N, 0)
        self.g_s7 = deconv(N, 3, kernel_size=5, stride=2)

        self.entropy_bottleneck = EntropyBottleneck(hyper)
        self.gaussian_conditional = GaussianConditional(None)
        self.round_z = RoundAboutMeans()
        self.round_y = RoundAboutMeans()

        s1, s2, s3, s4 = self.slices = slice_sizes(M)
        # spatial context: the first slice in four passes (one pixel of each 2x2), the next two as a
        # checkerboard
        self.sc_transform_1 = MultistageMaskedConv2d(s1, s1 * 2, kernel_size=3, padding=1, mask_type="A")
        self.sc_transform_2 = MultistageMaskedConv2d(s1, s1 * 2, kernel_size=5, padding=2, mask_type="B")
        self.sc_transform_3 = MultistageMaskedConv2d(s1, s1 * 2, kernel_size=5, padding=2, mask_type="C")
        self.sc_transform_4 = MultistageMaskedConv2d(s2, s2 * 2, kernel_size=5, padding=2, mask_type="B")
        self.sc_transform_5 = MultistageMaskedConv2d(s3, s3 * 2, kernel_size=5, padding=2, mask_type="B")

        self.entropy_parameters_1 = _pointwise_stack(M * 2 + s1 * 4, s1 * 10 // 3, s1 * 8 // 3, s1 * 2)
        self.entropy_parameters_2 = _pointwise_stack(M * 2 + s2 * 4, s2 * 10 // 3, s2 * 8 // 3, s2 * 2)
        self.entropy_parameters_3 = _pointwise_stack(M * 2 + s3 * 4, s3 * 10 // 3, s3 * 8 // 3, s3 * 2)
        self.entropy_parameters_4 = _pointwise_stack(M * 2 + s4 * 2, s4 * 2, s4 * 2, s4 * 2)

        # channel context: from the hyperprior and the slices before
        self.cc_transforms = nn.ModuleList(
            nn.Sequential(
                conv(M * 2 + sum(self.slices[:i]), size, stride=1, kernel_size=5),
                nn.GELU(),
                conv(size, size, stride=1, kernel_size=5),
                nn.GELU(),
                conv(size, size * 2, stride=1, kernel_size=3),
            )
            for i, size in enumerate(self.slices)
        )
        self.pass_sums = nn.ModuleList(PassSum() for _ in self.slices)
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def g_a(self, x: Tensor) -> Tensor:
        """Analysis transform: image (B, 3, H, W) in 0..1 -> y (B, M, H/16, W/16)."""
        for i in range(8):
            x = getattr(self, f"g_a{i}")(x)
        return x

    def g_s(self, y_hat: Tensor) -> Tensor:
        """Synthesis transform: y_hat (B, M, H/16, W/16) -> x_hat (B, 3, H, W)."""
        for i in range(8):
            y_hat = getattr(self, f"g_s{i}")(y_hat)
        return y_hat

    def h_a(self, y: Tensor) -> Tensor:
        """Hyper analysis: y -> z (B, 3N/2, H/64, W/64)."""
        for i in range(4):
            y = getattr(self, f"h_a{i}")(y)
        return y

    def h_s(self, z_hat: Tensor) -> Tensor:
        """Hyper synthesis: z_hat -> parameters (B, 2M, H/16, W/16)."""
        for i in range(4):
            z_hat = getattr(self, f"h_s{i}")(z_hat)
        return z_hat

    def _slice(self, index: int, y: Tensor, params: Tensor, previous: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(y_hat, likelihoods) of one slice of channels, each (B, slices[index], H/16, W/16).

        Args:
            index: of the slice.
            y: the slice.
            params: from the hyperprior.
            previous: y_hat of the slices before.
        """
        cc_params = self.cc_transforms[index](torch.cat([params, *previous], dim=1))
        entropy_parameters = getattr(self, f"entropy_parameters_{index + 1}")

        def gaussian(sc_params: Tensor | None) -> tuple[Tensor, Tensor]:
            parts = (params, cc_params) if sc_params is None else (params, sc_params, cc_params)
            scales_hat, means_hat = entropy_parameters(torch.cat(parts, dim=1)).chunk(2, 1)
            return scales_hat, means_hat

        # the passes: positions whose context the transform may read, the transform, positions it serves
        even_even, odd_odd, even_odd, odd_even = phase_masks(y.shape[-2], y.shape[-1], y.device)
        passes = {
            0: [
                (even_even, self.sc_transform_1, odd_odd),
                (even_even + odd_odd, self.sc_transform_2, even_odd),
                (even_even + odd_odd + even_odd, self.sc_transform_3, odd_even),
            ],
            1: [(even_odd + odd_even, self.sc_transform_4, even_even + odd_odd)],
            2: [(even_even + odd_odd, self.sc_transform_5, even_odd + odd_even)],
            3: [],
        }[index]
        none = torch.zeros_like(cc_params)
        contexts = [none] * len(passes)
        scales_hat, means_hat = gaussian(none if passes else None)
        for number, (known, transform, served) in enumerate(passes):
            y_known = self.round_y(y, means_hat) * known
            contexts[number] = transform(y_known) * served
            scales_hat, means_hat = gaussian(self.pass_sums[index](*contexts))
        _, likelihoods = self.gaussian_conditional(y, scales_hat, means=means_hat)
        return self.round_y(y, means_hat), likelihoods

    def forward(self, x: Tensor) -> dict:
        """x: (B, 3, H, W) in 0..1, H and W multiples of 64 -> {"x_hat", "likelihoods": {"y", "z"}}."""
        y = self.g_a(x)
        z = self.h_a(y)
        _, z_likelihoods = self.entropy_bottleneck(z)
        z_hat = self.round_z(z, self.entropy_bottleneck._get_medians())
        params = self.h_s(z_hat)

        y_hats: list[Tensor] = []
        y_likelihoods = []
        for index, y_slice in enumerate(y.split(self.slices, 1)):
            y_hat, likelihoods = self._slice(index, y_slice, params, y_hats)
            y_hats.append(y_hat)
            y_likelihoods.append(likelihoods)
        return {
            "x_hat": self.g_s(torch.cat(y_hats, dim=1)),
            "likelihoods": {"y": torch.cat(y_likelihoods, dim=1), "z": z_likelihoods},
        }


def phase_masks(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """0/1 masks (height, width) of the four pixels of each 2x2.

    Returns:
        Those of (even row, even column), (odd, odd), (even, odd) and (odd, even).
    """
    even_row = (torch.arange(height, device=device) % 2 == 0)[:, None]
    even_column = (torch.arange(width, device=device) % 2 == 0)[None, :]
    return (
        (even_row & even_column).float(),
        (~even_row & ~even_column).float(),
        (even_row & ~even_column).float(),
        (~even_row & even_column).float(),
    )


def infer_sizes(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of `TinyLIC` for a state_dict, read off its shapes."""
    depths, heads = [], []
    for name in ("g_a1", "g_a3", "g_a5", "g_a7", "h_a1", "h_a3"):
        prefix = f"{name}.residual_group.blocks."
        depths.append(
            1 + max(int(key[len(prefix) :].split(".")[0]) for key in state_dict if key.startswith(prefix))
        )
        heads.append(state_dict[f"{prefix}0.attn.rpb"].shape[0])
    N = state_dict["g_a0.weight"].shape[0]
    return {
        "N": N,
        "M": state_dict["g_a6.weight"].shape[0],
        "depths": tuple(depths),
        "num_heads": tuple(heads),
        "kernel_size": (state_dict["g_a1.residual_group.blocks.0.attn.rpb"].shape[1] + 1) // 2,
        "mlp_ratio": state_dict["g_a1.residual_group.blocks.0.mlp.fc1.weight"].shape[0] / N,
    }


register_model(
    "lu2022",
    TinyLIC,
    title="High-Efficiency Lossy Image Coding Through Adaptive Neighborhood Information Aggregation",
    paper="arXiv 2204.11448",
    infer=infer_sizes,
    official={quality: dict(N=128, M=320) for quality in range(1, 9)},
    configurations={
        "reference": dict(N=32, M=96, depths=(1, 1, 2, 1, 1, 1), num_heads=(2, 3, 4, 6, 3, 3)),
    },
)
