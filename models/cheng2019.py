"""Cheng2019: Cheng, Sun, Takeuchi, Katto, "Deep Residual Learning for Image Compression" (CVPRW 2019), arXiv
1906.09731.

The authors published no code or weights of it. This is the network of their later public code (TensorFlow,
ZhengxueCheng/Learned-Image-Compression-with-GMM-and-Attention) without what the later paper added, attention
and the mixture
of Gaussians: residual units of 3x3 convolutions, GDN where the resolution changes, sub-pixel convolutions in
the synthesis, and the joint autoregressive and hierarchical prior with one Gaussian. Built from CompressAI's
layers and named as its classes name theirs.
"""

from collections.abc import Mapping
from typing import Any

from compressai.layers import (
    ResidualBlock,
    ResidualBlockUpsample,
    ResidualBlockWithStride,
    conv1x1,
    conv3x3,
    subpel_conv3x3,
)
from compressai.models import JointAutoregressiveHierarchicalPriors
from compressai.models.utils import deconv
from torch import Tensor, nn

from licq.models.layers import WholeLatent
from licq.models.registry import register_model

_SLOPE = 0.2  # of LeakyReLU, TensorFlow's default


def infer_sizes(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """N of a state_dict; KeyError where it is no Cheng2019."""
    return {"N": state_dict["g_a.0.conv1.weight"].shape[0]}


def _upsample_unit(channels: int) -> ResidualBlockUpsample:
    """CompressAI's unit with the authors' shortcut: a 1x1 sub-pixel convolution instead of a 3x3 one."""
    unit = ResidualBlockUpsample(channels, channels, 2)
    unit.upsample = nn.Sequential(conv1x1(channels, 4 * channels), nn.PixelShuffle(2))
    return unit


@register_model(
    "cheng2019",
    title="Deep Residual Learning for Image Compression",
    paper="arXiv 1906.09731",
    official={quality: {"N": 128 if quality < 4 else 192} for quality in range(1, 9)},
    configurations={"reference": {"N": 40}},
    infer=infer_sizes,
)
class Cheng2019(WholeLatent, JointAutoregressiveHierarchicalPriors):
    """Residual units, GDN, sub-pixel convolutions, joint autoregressive and hierarchical prior.

    Args:
        N: channels of every stage and of the latents.
    """

    def __init__(self, N: int = 128, **kwargs: Any):
        super().__init__(N=N, M=N, **kwargs)
        self.g_a = nn.Sequential(
            ResidualBlockWithStride(3, N),
            ResidualBlock(N, N),
            ResidualBlockWithStride(N, N),
            ResidualBlock(N, N),
            ResidualBlockWithStride(N, N),
            ResidualBlock(N, N),
            nn.Conv2d(N, N, 3, stride=2, padding=1, bias=False),
        )
        self.g_s = nn.Sequential(
            ResidualBlock(N, N),
            _upsample_unit(N),
            ResidualBlock(N, N),
            _upsample_unit(N),
            ResidualBlock(N, N),
            _upsample_unit(N),
            ResidualBlock(N, N),
            subpel_conv3x3(N, 3, 2),
        )
        wide = 3 * N // 2
        self.h_a = _activated(
            conv3x3(N, N), conv3x3(N, N), conv3x3(N, N, stride=2), conv3x3(N, N), conv3x3(N, N, stride=2)
        )
        self.h_s = _activated(
            conv3x3(N, N),
            deconv(N, N, kernel_size=3),
            conv3x3(N, wide),
            deconv(wide, wide, kernel_size=3),
            conv3x3(wide, 2 * N),
        )
        self.entropy_parameters = _activated(
            nn.Conv2d(4 * N, 5 * N, 1), nn.Conv2d(5 * N, 5 * N, 1), nn.Conv2d(5 * N, 2 * N, 1, bias=False)
        )
        for module in self.modules():
            if isinstance(module, nn.LeakyReLU):
                module.negative_slope = _SLOPE

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor]) -> "Cheng2019":
        """A network with these weights, as CompressAI's classes make theirs."""
        model = cls(**infer_sizes(state_dict))
        model.load_state_dict(state_dict)
        return model


def _activated(*layers: nn.Module) -> nn.Sequential:
    """The layers with a LeakyReLU between each two."""
    mixed: list[nn.Module] = []
    for layer in layers:
        mixed += [layer, nn.LeakyReLU(inplace=True)]
    return nn.Sequential(*mixed[:-1])
