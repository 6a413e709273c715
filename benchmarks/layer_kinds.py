"""Kinds of layers and functions as networks write them, each for a small codec that is built around it.

A kind is made with the number of its channels and maps (B, C, H, W) to (B, C, h, w). Most keep the size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from benchmarks import layer_forwards as forwards
from benchmarks.layer_forwards import Apply

CHANNELS = 8


def _kinds(c: int) -> dict[str, Callable[[], nn.Module]]:
    def by(function: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
        return lambda: Apply(lambda self, x: function(x))

    def own(function: Callable[..., Tensor], **parts: Callable[[], nn.Module | Tensor]):
        return lambda: Apply(function, **{name: make() for name, make in parts.items()})

    def conv(**options) -> Callable[[], nn.Module]:
        return lambda: nn.Conv2d(c, c, 3, padding=1, **options)

    def matrix() -> Tensor:
        return torch.randn(c, c) * c**-0.5

    def kernel() -> Tensor:
        return torch.randn(c, c, 3, 3) * (9 * c) ** -0.5

    def vector() -> Tensor:
        return torch.rand(c) + 0.5

    order = torch.randperm(c, generator=torch.Generator().manual_seed(1))
    return {
        # normalization
        "BatchNorm2d": lambda: forwards.batch_norm(c),
        "Conv2d, BatchNorm2d": lambda: nn.Sequential(nn.Conv2d(c, c, 3, padding=1), forwards.batch_norm(c)),
        "GroupNorm": lambda: forwards.affine(nn.GroupNorm(2, c)),
        "InstanceNorm2d": lambda: forwards.affine(nn.InstanceNorm2d(c, affine=True)),
        "LayerNorm on (H, W, C)": own(
            lambda self, x: self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
            norm=lambda: forwards.affine(nn.LayerNorm(c)),
        ),
        "LayerNorm, channels first": own(forwards.channels_first, weight=vector, bias=vector),
        "LayerNorm without bias": own(forwards.bias_free, weight=vector),
        "F.layer_norm": own(
            lambda self, x: F.layer_norm(x.permute(0, 2, 3, 1), (c,), self.weight).permute(0, 3, 1, 2),
            weight=vector,
        ),
        "RMSNorm": own(
            lambda self, x: self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
            norm=lambda: forwards.affine(nn.RMSNorm(c)),
        ),
        "RMSNorm by rsqrt": own(forwards.rms, weight=vector),
        "RMSNorm by a norm": own(
            lambda self, x: (
                x / (x.norm(2, dim=1, keepdim=True) * c**-0.5 + 1e-6) * self.weight[:, None, None]
            ),
            weight=vector,
        ),
        "F.normalize": by(lambda x: F.normalize(x, dim=1)),
        "GRN": own(forwards.response_norm, weight=vector),
        # activations
        "PReLU": lambda: nn.PReLU(c),
        "LeakyReLU": lambda: nn.LeakyReLU(0.2),
        "ReLU6": lambda: nn.ReLU6(),
        "Hardtanh": lambda: nn.Hardtanh(-0.7, 0.9),
        "GELU": lambda: nn.GELU(),
        "SiLU": lambda: nn.SiLU(),
        "Hardswish": lambda: nn.Hardswish(),
        "CELU": lambda: nn.CELU(0.5),
        "SELU": lambda: nn.SELU(),
        "LogSigmoid": lambda: nn.LogSigmoid(),
        "Tanhshrink": lambda: nn.Tanhshrink(),
        "Softshrink": lambda: nn.Softshrink(0.1),
        "Threshold": lambda: nn.Threshold(0.1, 0.05),
        "GLU": lambda: nn.Sequential(nn.Conv2d(c, 2 * c, 1), nn.GLU(1)),
        "Softmax2d": lambda: nn.Softmax2d(),
        "sin": by(lambda x: x + torch.sin(3 * x) ** 2 / 3),
        "exp": by(lambda x: torch.exp(-x)),
        "log": by(lambda x: torch.log(x + 1)),
        "sqrt": by(lambda x: torch.sqrt(x + 0.01)),
        "reciprocal": by(lambda x: 1 / (x + 0.5)),
        "erf": by(lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5))),
        "power": by(lambda x: (x + 0.1) ** 0.75),
        "where on a comparison": by(lambda x: torch.where(x > 0.3, x, 0.1 * x + 0.27)),
        "where of two tensors": own(
            lambda self, x: torch.where(x < self.conv(x), x, x.flip(3)), conv=lambda: nn.Conv2d(c, c, 1)
        ),
        "product with a comparison": by(lambda x: x * (x >= 0.2) + 0.1 * x * (x < 0.2).float()),
        "minimum and maximum": own(
            lambda self, x: torch.minimum(x, self.conv(x)) + 0.5 * torch.max(x, self.conv(x)),
            conv=lambda: nn.Conv2d(c, c, 1),
        ),
        "division": by(lambda x: (x - 0.3) / (1 + (x - 0.3).abs())),
        "Softsign": lambda: nn.Softsign(),
        # over positions
        "mean over axes": by(lambda x: x - x.mean((2, 3), keepdim=True)),
        "sum over an axis": by(lambda x: x + 0.1 * x.sum(1, keepdim=True)),
        "standard deviation": by(lambda x: x / (x.std((2, 3), keepdim=True) + 0.01)),
        "squeeze and excite": own(
            forwards.squeeze_excite,
            pool=lambda: nn.AdaptiveAvgPool2d(1),
            down=lambda: nn.Conv2d(c, 4, 1),
            up=lambda: nn.Conv2d(4, c, 1),
        ),
        "channel attention by Conv1d": own(
            forwards.efficient_attention, conv=lambda: nn.Conv1d(1, 1, 3, padding=1, bias=False)
        ),
        "spatial attention": own(forwards.spatial_attention, conv=lambda: nn.Conv2d(2, 1, 7, padding=3)),
        "AvgPool2d": by(lambda x: F.interpolate(F.avg_pool2d(x, 2), scale_factor=2)),
        "AvgPool2d, overlapping": lambda: nn.AvgPool2d(3, 1, 1),
        "AdaptiveAvgPool2d": own(
            lambda self, x: F.interpolate(self.pool(x), size=x.shape[2:], mode="bilinear"),
            pool=lambda: nn.AdaptiveAvgPool2d(4),
        ),
        "MaxPool2d": lambda: nn.MaxPool2d(3, 1, 1),
        "AdaptiveMaxPool2d": own(
            lambda self, x: x * torch.sigmoid(self.pool(x)), pool=lambda: nn.AdaptiveMaxPool2d(1)
        ),
        "amax and amin": by(lambda x: x - 0.5 * x.amax((2, 3), keepdim=True) - x.amin(1, keepdim=True)),
        "nearest interpolation": lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(c, c, 3, 2, 1)),
        "bilinear interpolation": lambda: nn.Sequential(
            nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(c, c, 3, 2, 1)
        ),
        "bilinear, corners aligned": lambda: nn.Sequential(
            nn.UpsamplingBilinear2d(scale_factor=2), nn.Conv2d(c, c, 3, 2, 1)
        ),
        "bicubic interpolation": lambda: nn.Sequential(
            nn.Upsample(scale_factor=2, mode="bicubic"), nn.Conv2d(c, c, 3, 2, 1)
        ),
        "ReflectionPad2d": lambda: nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(c, c, 3)),
        "Conv2d, reflect": conv(padding_mode="reflect"),
        "Conv2d, replicate": conv(padding_mode="replicate"),
        "Conv2d, circular": conv(padding_mode="circular"),
        "cumsum": by(lambda x: 0.1 * torch.cumsum(x, 3)),
        "flip": by(lambda x: x + x.flip(2)),
        "roll": by(lambda x: torch.roll(x, (1, 2), (2, 3))),
        "gather": own(
            lambda self, x: x.gather(1, self.order.view(1, -1, 1, 1).expand(x.shape)), order=lambda: order
        ),
        "constant indexes": own(lambda self, x: x[:, self.order], order=lambda: order),
        "channel shuffle": by(lambda x: x.unflatten(1, (2, -1)).transpose(1, 2).reshape(x.shape)),
        "pixel unshuffle and shuffle": lambda: nn.Sequential(
            nn.PixelUnshuffle(2), nn.Conv2d(4 * c, 4 * c, 1), nn.PixelShuffle(2)
        ),
        "Haar wavelet": by(
            lambda x: F.pixel_shuffle(
                torch.cat(
                    [
                        x[:, :, 0::2, 0::2] + x[:, :, 1::2, 1::2],
                        x[:, :, 0::2, 1::2] - x[:, :, 1::2, 0::2],
                        x[:, :, 1::2, 0::2],
                        x[:, :, 0::2, 0::2] - x[:, :, 0::2, 1::2],
                    ],
                    1,
                ),
                2,
            )
        ),
        # weights
        "depthwise convolution": conv(groups=c),
        "dilated convolution": lambda: nn.Conv2d(c, c, 3, padding=2, dilation=2),
        "Linear": own(
            lambda self, x: self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
            linear=lambda: nn.Linear(c, c),
        ),
        "layer scale": own(
            lambda self, x: x + self.weight[:, None, None] * self.conv(x),
            weight=vector,
            conv=lambda: nn.Conv2d(c, c, 1),
        ),
        "simple gate": own(
            lambda self, x: torch.mul(*self.conv(x).chunk(2, 1)), conv=lambda: nn.Conv2d(c, 2 * c, 1)
        ),
        "F.conv2d": own(
            forwards.masked,
            weight=kernel,
            bias=vector,
            mask=lambda: torch.tensor([1, 1, 1, 1, 1, 0, 0, 0, 0]).reshape(3, 3),
        ),
        "F.conv_transpose2d": own(
            lambda self, x: F.conv_transpose2d(
                F.conv2d(x, self.down, stride=2, padding=1), self.weight, stride=2
            ),
            down=kernel,
            weight=lambda: torch.randn(c, c, 2, 2) * c**-0.5,
        ),
        "F.linear": own(
            lambda self, x: F.linear(x.permute(0, 2, 3, 1), self.weight, self.bias).permute(0, 3, 1, 2),
            weight=matrix,
            bias=vector,
        ),
        "product with a matrix": own(
            lambda self, x: (x.permute(0, 2, 3, 1) @ self.weight).permute(0, 3, 1, 2), weight=matrix
        ),
        "matrix times values": own(
            lambda self, x: (self.weight @ x.flatten(2)).reshape(x.shape), weight=matrix
        ),
        "einsum with a parameter": own(
            lambda self, x: torch.einsum("bchw,cd->bdhw", x, self.weight), weight=matrix
        ),
        # attention
        **forwards.attention_kinds(c),
        "scores of minus infinity": by(forwards.masked_attention),
        "attention between channels": by(forwards.channel_attention),
        "weight_norm": lambda: parametrizations.weight_norm(nn.Conv2d(c, c, 3, padding=1)),
        "spectral_norm": lambda: parametrizations.spectral_norm(nn.Conv2d(c, c, 3, padding=1)).eval(),
        "orthogonal": lambda: parametrizations.orthogonal(nn.Conv2d(c, c, 1)),
        "Dropout": lambda: nn.Dropout(0.1),
    }


KINDS = _kinds(CHANNELS)
"""By name: makes the kind, with random weights."""

REFUSED: dict[str, Callable[[], nn.Module]] = {
    "fft": lambda: Apply(lambda self, x: torch.fft.ifft2(torch.fft.fft2(x) * 0.9).real),
    "sort": lambda: Apply(lambda self, x: x.sort(1).values),
    "statistics of the batch": lambda: nn.BatchNorm2d(CHANNELS, track_running_stats=False),
    "a branch on values": lambda: Apply(lambda self, x: x * (2 if float(x.mean()) > 0.1 else 1)),
    "random numbers": lambda: Apply(lambda self, x: x + 0.1 * torch.rand_like(x)),
    "convolution with weights made of values": lambda: Apply(
        lambda self, x: F.conv2d(x, x.mean((0, 2, 3))[:, None, None, None].expand(-1, CHANNELS, 1, 1))
    ),
}
"""What has no integer form here: it stays in float and is named, or is refused."""
