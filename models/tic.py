"""TIC: Lu, Guo, Shi, Cao, Ma, "Transformer-based Image Compression" (DCC 2022), arXiv 2111.06707.

Parameters and buffers carry the names and shapes of the public code (lumingzzz/TIC), so its checkpoints load.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from compressai.entropy_models import EntropyBottleneck
from compressai.models import CompressionModel
from compressai.models.utils import conv, deconv
from torch import Tensor, nn

from licq.models.layers import WholeGaussianConditional
from licq.models.registry import register_model
from licq.models.swin import RSTB, CausalAttentionModule

# The public code is trained on 256x256 crops; its checkpoints hold the window masks of that size.
TRAIN_SIDE = 256
_STAGES = ("g_a1", "g_a3", "g_a5", "h_a1", "h_a3")


def infer_sizes(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of `TIC` that fit a state_dict, read off its shapes; KeyError where it is no TIC."""

    def blocks(stage: str) -> str:
        return f"{stage}.residual_group.blocks."

    def depth(stage: str) -> int:
        return 1 + max(
            (
                int(key[len(blocks(stage)) :].split(".")[0])
                for key in state_dict
                if key.startswith(blocks(stage))
            ),
            default=0,
        )

    tables = [state_dict[f"{blocks(stage)}0.attn.relative_position_bias_table"].shape for stage in _STAGES]
    width = state_dict["g_a0.weight"].shape[0]
    return {
        "N": width,
        "M": state_dict["g_a6.weight"].shape[0],
        "depths": tuple(depth(stage) for stage in _STAGES),
        "num_heads": tuple(heads for _, heads in tables),
        "window_size": (round(tables[0][0] ** 0.5) + 1) // 2,
        "mlp_ratio": state_dict[f"{blocks('g_a1')}0.mlp.fc1.weight"].shape[0] / width,
        "causal_heads": state_dict["context_prediction.relative_position_bias_table"].shape[1],
    }


@register_model(
    "tic",
    title="Transformer-based Image Compression",
    paper="arXiv 2111.06707",
    official={quality: {"N": 128, "M": 192} for quality in range(1, 9)},
    configurations={
        "reference": {
            "N": 48,
            "M": 64,
            "depths": (1, 2, 2, 1, 1),
            "num_heads": (2, 2, 4, 4, 4),
            "mlp_ratio": 2.0,
            "causal_heads": 4,
        },
    },
    infer=infer_sizes,
)
class TIC(CompressionModel):
    """Convolutions and Swin blocks with a causal attention context model.

    Args:
        N: channels of every stage but the latent.
        M: channels of the latent y.
        depths: Swin blocks in the three stages of g_a and the two of h_a; g_s and h_s mirror them.
        num_heads: attention heads of the same five stages.
        window_size: side of the attention window in g_a and g_s; h_a and h_s use half of it.
        mlp_ratio: hidden width of the perceptrons over their width.
        causal_heads: attention heads of the context model.
    """

    def __init__(
        self,
        N: int = 128,
        M: int = 192,
        depths: Sequence[int] = (2, 4, 6, 2, 2),
        num_heads: Sequence[int] = (4, 8, 16, 16, 16),
        window_size: int = 8,
        mlp_ratio: float = 4.0,
        causal_heads: int = 16,
    ):
        super().__init__()
        self.N, self.M = N, M

        def swin(stage: int, downsampling: int) -> RSTB:
            window = window_size if stage < 3 else window_size // 2
            side = TRAIN_SIDE // downsampling
            return RSTB(N, (side, side), depths[stage], num_heads[stage], window, mlp_ratio)

        self.g_a0 = conv(3, N, kernel_size=5, stride=2)
        self.g_a1 = swin(0, downsampling=2)
        self.g_a2 = conv(N, N, kernel_size=3, stride=2)
        self.g_a3 = swin(1, downsampling=4)
        self.g_a4 = conv(N, N, kernel_size=3, stride=2)
        self.g_a5 = swin(2, downsampling=8)
        self.g_a6 = conv(N, M, kernel_size=3, stride=2)

        self.h_a0 = conv(M, N, kernel_size=3, stride=1)
        self.h_a1 = swin(3, downsampling=16)
        self.h_a2 = conv(N, N, kernel_size=3, stride=2)
        self.h_a3 = swin(4, downsampling=32)
        self.h_a4 = conv(N, N, kernel_size=3, stride=2)

        self.h_s0 = deconv(N, N, kernel_size=3, stride=2)
        self.h_s1 = swin(4, downsampling=32)
        self.h_s2 = deconv(N, N, kernel_size=3, stride=2)
        self.h_s3 = swin(3, downsampling=16)
        self.h_s4 = conv(N, M * 2, kernel_size=3, stride=1)

        self.g_s0 = deconv(M, N, kernel_size=3, stride=2)
        self.g_s1 = swin(2, downsampling=8)
        self.g_s2 = deconv(N, N, kernel_size=3, stride=2)
        self.g_s3 = swin(1, downsampling=4)
        self.g_s4 = deconv(N, N, kernel_size=3, stride=2)
        self.g_s5 = swin(0, downsampling=2)
        self.g_s6 = deconv(N, 3, kernel_size=5, stride=2)

        self.entropy_bottleneck = EntropyBottleneck(N)
        self.gaussian_conditional = WholeGaussianConditional(None)
        self.context_prediction = CausalAttentionModule(M, M * 2, heads=causal_heads)
        self.entropy_parameters = nn.Sequential(
            nn.Conv2d(M * 4, M * 10 // 3, 1),
            nn.GELU(),
            nn.Conv2d(M * 10 // 3, M * 8 // 3, 1),
            nn.GELU(),
            nn.Conv2d(M * 8 // 3, M * 2, 1),
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def g_a(self, x: Tensor) -> Tensor:
        """Analysis transform: image (B, 3, H, W) in 0..1 -> y (B, M, H/16, W/16)."""
        for index in range(7):
            x = getattr(self, f"g_a{index}")(x)
        return x

    def g_s(self, y_hat: Tensor) -> Tensor:
        """Synthesis transform: y_hat (B, M, H/16, W/16) -> x_hat (B, 3, H, W)."""
        for index in range(7):
            y_hat = getattr(self, f"g_s{index}")(y_hat)
        return y_hat

    def h_a(self, y: Tensor) -> Tensor:
        """Hyper analysis: y -> z (B, N, H/64, W/64)."""
        for index in range(5):
            y = getattr(self, f"h_a{index}")(y)
        return y

    def h_s(self, z_hat: Tensor) -> Tensor:
        """Hyper synthesis: z_hat -> parameters (B, 2M, H/16, W/16)."""
        for index in range(5):
            z_hat = getattr(self, f"h_s{index}")(z_hat)
        return z_hat

    def forward(self, x: Tensor) -> dict[str, Any]:
        """x: (B, 3, H, W) in 0..1, H and W multiples of 64 -> {"x_hat", "likelihoods": {"y", "z"}}."""
        y = self.g_a(x)
        z = self.h_a(y)
        z_hat, z_likelihoods = self.entropy_bottleneck(z)
        params = self.h_s(z_hat)
        y_hat = self.gaussian_conditional.quantize(y, "noise" if self.training else "dequantize")
        context = self.context_prediction(y_hat)
        scales_hat, means_hat = self.entropy_parameters(torch.cat((params, context), dim=1)).chunk(2, 1)
        _, y_likelihoods = self.gaussian_conditional(y, scales_hat, means=means_hat)
        return {"x_hat": self.g_s(y_hat), "likelihoods": {"y": y_likelihoods, "z": z_likelihoods}}

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Tensor]) -> "TIC":
        """A model whose widths, depths and heads are read off the tensors."""
        model = cls(**infer_sizes(state_dict))
        model.load_state_dict(state_dict)
        return model
