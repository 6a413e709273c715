"""Forwards of kinds of layers that are more than a line, as networks write them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


def batch_norm(channels: int) -> nn.Module:
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        norm.running_mean.uniform_(-0.5, 0.5)
        norm.running_var.uniform_(0.3, 2)
        norm.weight.uniform_(-0.5, 1.5)
        norm.bias.uniform_(-0.3, 0.3)
    return norm


def affine(norm: nn.Module) -> nn.Module:
    with torch.no_grad():
        norm.weight.uniform_(-0.5, 1.5)
        if getattr(norm, "bias", None) is not None:
            norm.bias.uniform_(-0.3, 0.3)
    return norm


def channels_first(self: Apply, x: Tensor) -> Tensor:
    """LayerNorm of ConvNeXt."""
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).pow(2).mean(1, keepdim=True)
    x = (x - mean) / torch.sqrt(variance + 1e-6)
    return self.weight[:, None, None] * x + self.bias[:, None, None]


def bias_free(self: Apply, x: Tensor) -> Tensor:
    """LayerNorm without bias of Restormer."""
    rows = x.flatten(2).transpose(1, 2)
    variance = rows.var(-1, keepdim=True, unbiased=False)
    return (rows / torch.sqrt(variance + 1e-5) * self.weight).transpose(1, 2).reshape(x.shape)


def rms(self: Apply, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6) * self.weight[:, None, None]


def response_norm(self: Apply, x: Tensor) -> Tensor:
    """GRN of ConvNeXt V2."""
    energy = torch.norm(x, p=2, dim=(2, 3), keepdim=True)
    share = energy / (energy.mean(1, keepdim=True) + 1e-6)
    return self.weight[:, None, None] * (x * share) + x


def squeeze_excite(self: Apply, x: Tensor) -> Tensor:
    return x * torch.sigmoid(self.up(F.relu(self.down(self.pool(x)))))


def efficient_attention(self: Apply, x: Tensor) -> Tensor:
    """ECA: a convolution along the channels."""
    mean = x.mean((2, 3)).unsqueeze(1)
    return x * torch.sigmoid(self.conv(mean)).transpose(1, 2).unsqueeze(-1)


def spatial_attention(self: Apply, x: Tensor) -> Tensor:
    """CBAM's."""
    largest, _ = torch.max(x, dim=1, keepdim=True)
    maps = torch.cat([x.mean(1, keepdim=True), largest], 1)
    return x * torch.sigmoid(self.conv(maps))


def masked(self: Apply, x: Tensor) -> Tensor:
    return F.conv2d(x, self.weight * self.mask, self.bias, padding=1)


def positions(x: Tensor) -> Tensor:
    """(B, H * W, C): the positions of an image."""
    return x.flatten(2).transpose(1, 2)


def image(rows: Tensor, like: Tensor) -> Tensor:
    return rows.transpose(1, 2).reshape(like.shape)


def heads(self: Apply, x: Tensor) -> list[Tensor]:
    """Queries, keys and values (B, 2, H * W, C / 2)."""
    return [part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(positions(x)).chunk(3, -1)]


def dot_product(**options) -> Callable[[Apply, Tensor], Tensor]:
    def attend(self: Apply, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(*heads(self, x), **options)
        return x + image(y.transpose(1, 2).flatten(2), x)

    return attend


def multi_head(masked: bool) -> Callable[[Apply, Tensor], Tensor]:
    def attend(self: Apply, x: Tensor) -> Tensor:
        rows, mask = positions(x), None
        if masked:
            mask = torch.ones(rows.shape[1], rows.shape[1], dtype=torch.bool, device=x.device).triu(1)
        return x + image(self.heads(rows, rows, rows, attn_mask=mask, need_weights=False)[0], x)

    return attend


def masked_attention(x: Tensor) -> Tensor:
    """Of the rows before each one, by scores of minus infinity."""
    rows = positions(x)
    count = rows.shape[1]
    scores = rows @ rows.transpose(1, 2)
    scores = torch.where(torch.ones(count, count).tril().bool(), scores, -torch.inf)
    return x + (scores.softmax(-1) @ rows).transpose(1, 2).reshape(x.shape)


def channel_attention(x: Tensor) -> Tensor:
    """XCA of Restormer."""
    rows = F.normalize(x.flatten(2), dim=-1)
    return x + ((rows @ rows.transpose(1, 2)).softmax(-1) @ x.flatten(2)).reshape(x.shape)


def einsum_attention(self: Apply, x: Tensor) -> Tensor:
    q, k, v = heads(self, x)
    p = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
    return x + image(torch.einsum("bhij,bhjd->bihd", p, v).flatten(2), x)


def windows(self: Apply, x: Tensor) -> Tensor:
    """Swin's: windows of 4x4, a bias for each relative position."""
    b, c, h, w = x.shape
    windows = x.reshape(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)
    q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(windows).chunk(3, -1))
    bias = self.table[self.places.reshape(-1)].reshape(16, 16, 2).permute(2, 0, 1)
    y = ((q * 0.5) @ k.transpose(-2, -1) + bias).softmax(-1) @ v
    y = y.transpose(1, 2).reshape(b, h // 4, w // 4, 4, 4, c)
    return x + y.permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)


def places() -> Tensor:
    at = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    between = at[:, None] - at[None] + 3
    return between[..., 0] * 7 + between[..., 1]


def attention_kinds(c: int) -> dict[str, Callable[[], nn.Module]]:
    def qkv() -> nn.Module:
        return nn.Linear(c, 3 * c)

    def heads() -> nn.Module:
        return nn.MultiheadAttention(c, 2, batch_first=True)

    return {
        "scaled_dot_product_attention": lambda: Apply(dot_product(), qkv=qkv()),
        "scaled_dot_product_attention, causal": lambda: Apply(
            dot_product(is_causal=True, scale=0.3), qkv=qkv()
        ),
        "MultiheadAttention": lambda: Apply(multi_head(False), heads=heads()),
        "MultiheadAttention, masked": lambda: Apply(multi_head(True), heads=heads()),
        "einsum of two activations": lambda: Apply(einsum_attention, qkv=qkv()),
        "windows, relative positions": lambda: Apply(
            windows, qkv=qkv(), table=torch.randn(49, 2), places=places()
        ),
        "unfold and fold": lambda: Apply(
            lambda self, x: F.fold(F.unfold(x, 4, stride=4) * 0.5, x.shape[2:], 4, stride=4)
        ),
        "unfold and fold, overlapping": lambda: Apply(
            lambda self, x: F.fold(F.unfold(x, 3, padding=1) * 0.1, x.shape[2:], 3, padding=1)
        ),
    }
