"""Kinds of layers and functions as networks write them, each for a small codec that is built around it.

A kind is made with the number of its channels and maps (B, C, H, W) to (B, C, h, w). Most keep the size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

CHANNELS = 8


class Apply(nn.Module):
    """A function of a tensor; modules and parameters of the function's own are attributes.

    Args:
        function: (this module, x) -> the result.
    """

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | Tensor):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            elif part.is_floating_point():
                self.register_parameter(name, nn.Parameter(part))
            else:
                self.register_buffer(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def _batch_norm(channels: int) -> nn.Module:
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        norm.running_mean.uniform_(-0.5, 0.5)
        norm.running_var.uniform_(0.3, 2)
        norm.weight.uniform_(-0.5, 1.5)
        norm.bias.uniform_(-0.3, 0.3)
    return norm


def _affine(norm: nn.Module) -> nn.Module:
    with torch.no_grad():
        norm.weight.uniform_(-0.5, 1.5)
        if getattr(norm, "bias", None) is not None:
            norm.bias.uniform_(-0.3, 0.3)
    return norm


def _channels_first(self: Apply, x: Tensor) -> Tensor:
    """LayerNorm of ConvNeXt."""
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).pow(2).mean(1, keepdim=True)
    x = (x - mean) / torch.sqrt(variance + 1e-6)
    return self.weight[:, None, None] * x + self.bias[:, None, None]


def _bias_free(self: Apply, x: Tensor) -> Tensor:
    """LayerNorm without bias of Restormer."""
    rows = x.flatten(2).transpose(1, 2)
    variance = rows.var(-1, keepdim=True, unbiased=False)
    return (rows / torch.sqrt(variance + 1e-5) * self.weight).transpose(1, 2).reshape(x.shape)


def _rms(self: Apply, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6) * self.weight[:, None, None]


def _response_norm(self: Apply, x: Tensor) -> Tensor:
    """GRN of ConvNeXt V2."""
    energy = torch.norm(x, p=2, dim=(2, 3), keepdim=True)
    share = energy / (energy.mean(1, keepdim=True) + 1e-6)
    return self.weight[:, None, None] * (x * share) + x


def _squeeze_excite(self: Apply, x: Tensor) -> Tensor:
    return x * torch.sigmoid(self.up(F.relu(self.down(self.pool(x)))))


def _efficient_attention(self: Apply, x: Tensor) -> Tensor:
    """ECA: a convolution along the channels."""
    mean = x.mean((2, 3)).unsqueeze(1)
    return x * torch.sigmoid(self.conv(mean)).transpose(1, 2).unsqueeze(-1)


def _spatial_attention(self: Apply, x: Tensor) -> Tensor:
    """CBAM's."""
    largest, _ = torch.max(x, dim=1, keepdim=True)
    maps = torch.cat([x.mean(1, keepdim=True), largest], 1)
    return x * torch.sigmoid(self.conv(maps))


def _masked(self: Apply, x: Tensor) -> Tensor:
    return F.conv2d(x, self.weight * self.mask, self.bias, padding=1)


def _rows(x: Tensor) -> Tensor:
    """(B, H * W, C): the positions of an image."""
    return x.flatten(2).transpose(1, 2)


def _image(rows: Tensor, like: Tensor) -> Tensor:
    return rows.transpose(1, 2).reshape(like.shape)


def _heads(self: Apply, x: Tensor) -> list[Tensor]:
    """Queries, keys and values (B, 2, H * W, C / 2)."""
    return [part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(_rows(x)).chunk(3, -1)]


def _dot_product(**options) -> Callable[[Apply, Tensor], Tensor]:
    def attend(self: Apply, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(*_heads(self, x), **options)
        return x + _image(y.transpose(1, 2).flatten(2), x)

    return attend


def _multi_head(masked: bool) -> Callable[[Apply, Tensor], Tensor]:
    def attend(self: Apply, x: Tensor) -> Tensor:
        rows, mask = _rows(x), None
        if masked:
            mask = torch.ones(rows.shape[1], rows.shape[1], dtype=torch.bool, device=x.device).triu(1)
        return x + _image(self.heads(rows, rows, rows, attn_mask=mask, need_weights=False)[0], x)

    return attend


def _einsum_attention(self: Apply, x: Tensor) -> Tensor:
    q, k, v = _heads(self, x)
    p = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
    return x + _image(torch.einsum("bhij,bhjd->bihd", p, v).flatten(2), x)


def _windows(self: Apply, x: Tensor) -> Tensor:
    """Swin's: windows of 4x4, a bias for each relative position."""
    b, c, h, w = x.shape
    windows = x.reshape(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)
    q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(windows).chunk(3, -1))
    bias = self.table[self.places.reshape(-1)].reshape(16, 16, 2).permute(2, 0, 1)
    y = ((q * 0.5) @ k.transpose(-2, -1) + bias).softmax(-1) @ v
    y = y.transpose(1, 2).reshape(b, h // 4, w // 4, 4, 4, c)
    return x + y.permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)


def _places() -> Tensor:
    at = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    between = at[:, None] - at[None] + 3
    return between[..., 0] * 7 + between[..., 1]


def _attention_kinds(c: int) -> dict[str, Callable[[], nn.Module]]:
    def qkv() -> nn.Module:
        return nn.Linear(c, 3 * c)

    def heads() -> nn.Module:
        return nn.MultiheadAttention(c, 2, batch_first=True)

    return {
        "scaled_dot_product_attention": lambda: Apply(_dot_product(), qkv=qkv()),
        "scaled_dot_product_attention, causal": lambda: Apply(
            _dot_product(is_causal=True, scale=0.3), qkv=qkv()
        ),
        "MultiheadAttention": lambda: Apply(_multi_head(False), heads=heads()),
        "MultiheadAttention, masked": lambda: Apply(_multi_head(True), heads=heads()),
        "einsum of two activations": lambda: Apply(_einsum_attention, qkv=qkv()),
        "windows, relative positions": lambda: Apply(
            _windows, qkv=qkv(), table=torch.randn(49, 2), places=_places()
        ),
        "unfold and fold": lambda: Apply(
            lambda self, x: F.fold(F.unfold(x, 4, stride=4) * 0.5, x.shape[2:], 4, stride=4)
        ),
        "unfold and fold, overlapping": lambda: Apply(
            lambda self, x: F.fold(F.unfold(x, 3, padding=1) * 0.1, x.shape[2:], 3, padding=1)
        ),
    }


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
        "BatchNorm2d": lambda: _batch_norm(c),
        "Conv2d, BatchNorm2d": lambda: nn.Sequential(nn.Conv2d(c, c, 3, padding=1), _batch_norm(c)),
        "GroupNorm": lambda: _affine(nn.GroupNorm(2, c)),
        "InstanceNorm2d": lambda: _affine(nn.InstanceNorm2d(c, affine=True)),
        "LayerNorm on (H, W, C)": own(
            lambda self, x: self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
            norm=lambda: _affine(nn.LayerNorm(c)),
        ),
        "LayerNorm, channels first": own(_channels_first, weight=vector, bias=vector),
        "LayerNorm without bias": own(_bias_free, weight=vector),
        "F.layer_norm": own(
            lambda self, x: F.layer_norm(x.permute(0, 2, 3, 1), (c,), self.weight).permute(0, 3, 1, 2),
            weight=vector,
        ),
        "RMSNorm": own(
            lambda self, x: self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
            norm=lambda: _affine(nn.RMSNorm(c)),
        ),
        "RMSNorm by rsqrt": own(_rms, weight=vector),
        "RMSNorm by a norm": own(
            lambda self, x: (
                x / (x.norm(2, dim=1, keepdim=True) * c**-0.5 + 1e-6) * self.weight[:, None, None]
            ),
            weight=vector,
        ),
        "F.normalize": by(lambda x: F.normalize(x, dim=1)),
        "GRN": own(_response_norm, weight=vector),
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
            _squeeze_excite,
            pool=lambda: nn.AdaptiveAvgPool2d(1),
            down=lambda: nn.Conv2d(c, 4, 1),
            up=lambda: nn.Conv2d(4, c, 1),
        ),
        "channel attention by Conv1d": own(
            _efficient_attention, conv=lambda: nn.Conv1d(1, 1, 3, padding=1, bias=False)
        ),
        "spatial attention": own(_spatial_attention, conv=lambda: nn.Conv2d(2, 1, 7, padding=3)),
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
            _masked,
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
        **_attention_kinds(c),
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
