"""Shifted-window attention (Swin) on feature maps, and the causal attention that TIC uses as its context
model.

Sources: Liu et al., "Swin Transformer", arXiv 2103.14030; Lu et al., "Transformer-based Image Compression",
arXiv 2111.06707. Parameters and buffers carry the names and shapes of the public code (lumingzzz/TIC).
Everything here works on channels-last maps (B, H, W, C). Each non-linear function is a module, so that a
quantizer recognizes it by its type.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from licq.models.attention import MaskedSoftmax

MASKED = -100.0


def relative_position_index(side: int) -> Tensor:
    """The row of the bias table for each query and key of a window of side x side positions.

    Returns:
        (side^2, side^2), integers in 0 .. (2 side - 1)^2 - 1.
    """
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    row_offset = rows[:, None] - rows[None, :] + side - 1
    column_offset = columns[:, None] - columns[None, :] + side - 1
    return row_offset * (2 * side - 1) + column_offset


def partition_windows(x: Tensor, window: int) -> Tensor:
    """(B, H, W, C) -> (B, H/window * W/window, window^2, C), windows in raster order."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // window, window, width // window, window, channels).permute(
        0, 1, 3, 2, 4, 5
    )
    return x.reshape(batch, (height // window) * (width // window), window * window, channels)


def merge_windows(windows: Tensor, window: int, height: int, width: int) -> Tensor:
    """The inverse of `partition_windows`: (B, windows, window^2, C) -> (B, H, W, C)."""
    batch, channels = windows.shape[0], windows.shape[-1]
    x = windows.reshape(batch, height // window, width // window, window, window, channels).permute(
        0, 1, 3, 2, 4, 5
    )
    return x.reshape(batch, height, width, channels)


@lru_cache(maxsize=16)
def window_mask(height: int, width: int, window: int, shift: int) -> Tensor | None:
    """What is added to the scores of each window, so that only neighbours in the image attend to each other.

    After the cyclic shift, a window at the border has pixels from opposite sides of the map. Where height or
    width is no multiple of the window, the last windows have padding. Pairs from different such regions get
    -100.

    Returns:
        (windows, window^2, window^2), 0 or -100; None where no pair is masked.
    """
    if shift == 0 and height % window == 0 and width % window == 0:
        return None

    def regions(length: int) -> Tensor:
        padded = -(-length // window) * window
        position = torch.arange(padded)
        region = (
            (position >= padded - window).int() + (position >= padded - shift).int()
            if shift
            else position * 0
        )
        is_padding = (position + shift) % padded >= length
        return torch.where(is_padding, 3, region)

    labels = 4 * regions(height)[:, None] + regions(width)[None, :]
    labels = partition_windows(labels[None, :, :, None], window)[0, :, :, 0]
    return (labels[:, :, None] != labels[:, None, :]).float() * MASKED


class Mlp(nn.Module):
    """Two-layer perceptron on the last dimension."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(..., tokens, 3 C) -> queries, keys and values, each (..., heads, tokens, C / heads)."""
    shape = (*qkv.shape[:-1], heads, qkv.shape[-1] // 3 // heads)
    q, k, v = (part.reshape(shape).transpose(-3, -2) for part in qkv.chunk(3, dim=-1))
    return q, k, v


def merge_heads(x: Tensor) -> Tensor:
    """(..., heads, tokens, C / heads) -> (..., tokens, C)."""
    x = x.transpose(-3, -2)
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def position_bias(table: Tensor, index: Tensor) -> Tensor:
    """table: ((2 side - 1)^2, heads), index: (tokens, tokens) -> (heads, tokens, tokens)."""
    return table[index.flatten()].reshape(*index.shape, -1).permute(2, 0, 1)


class WindowAttention(nn.Module):
    """Multi-head attention inside windows, with a learned bias for each relative position."""

    relative_position_index: Tensor

    def __init__(self, dim: int, window: int, heads: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of the number of heads {heads}")
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_position_index(window))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.softmax = MaskedSoftmax()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: (B, windows, tokens, C); mask: (windows, tokens, tokens) or None -> (B, windows, tokens, C)."""
        q, k, v = split_heads(self.qkv(x), self.heads)
        bias = position_bias(self.relative_position_bias_table, self.relative_position_index)
        if mask is not None:
            # The public code adds -100. With -inf no masked key comes through, whatever the scores are.
            bias = torch.where(mask[:, None] < 0, float("-inf"), bias)
        attention = self.softmax((q * self.scale) @ k.transpose(-2, -1), bias)
        return self.proj(merge_heads(attention @ v))


class SwinTransformerBlock(nn.Module):
    """Window attention and a perceptron, each behind a LayerNorm and inside a shortcut; (B, H, W, C).

    A map whose sides are no multiples of the window is padded below and on the right with tokens that nothing
    attends to, and cropped afterwards. (The public code demands multiples.)

    Args:
        resolution: the (H, W) that the buffer `attn_mask` is made for; for other sizes the mask is computed.
        shift: of the windows, in pixels, 0 .. window - 1.
    """

    attn_mask: Tensor | None

    def __init__(
        self, dim: int, resolution: tuple[int, int], heads: int, window: int, shift: int, mlp_ratio: float
    ):
        super().__init__()
        self.resolution, self.window, self.shift = resolution, window, shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        mask = window_mask(*resolution, window, shift) if shift else None
        # cloned: load_state_dict writes into the buffer, and the function's result is shared
        self.register_buffer("attn_mask", None if mask is None else mask.clone())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def _attend(self, x: Tensor) -> Tensor:
        height, width = x.shape[1], x.shape[2]
        below, right = -height % self.window, -width % self.window
        if below or right:
            x = F.pad(x, (0, 0, 0, right, 0, below))
        if self.shift:
            x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        windows = self.attn(partition_windows(x, self.window), self._mask(height, width))
        x = merge_windows(windows, self.window, height + below, width + right)
        if self.shift:
            x = torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2))
        return x[:, :height, :width] if below or right else x

    def _mask(self, height: int, width: int) -> Tensor | None:
        if (height, width) == self.resolution:
            return self.attn_mask
        mask = window_mask(height, width, self.window, self.shift)
        return None if mask is None else mask.to(self.attn.relative_position_bias_table.device)


class BlockSequence(nn.Module):
    """Swin blocks, every second one with windows shifted by half their side; (B, H, W, C)."""

    def __init__(
        self, dim: int, resolution: tuple[int, int], depth: int, heads: int, window: int, mlp_ratio: float
    ):
        super().__init__()
        self.blocks = nn.ModuleList(
            SwinTransformerBlock(dim, resolution, heads, window, (index % 2) * (window // 2), mlp_ratio)
            for index in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class RSTB(nn.Module):
    """Residual Swin Transformer Block: a sequence of Swin blocks inside a shortcut; (B, C, H, W)."""

    def __init__(
        self, dim: int, resolution: tuple[int, int], depth: int, heads: int, window: int, mlp_ratio: float
    ):
        super().__init__()
        self.residual_group = BlockSequence(dim, resolution, depth, heads, window, mlp_ratio)

    def forward(self, x: Tensor) -> Tensor:
        return self.residual_group(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) + x


class CausalAttentionModule(nn.Module):
    """A context model: attention among the 5x5 symbols around each position.

    The 13 symbols that are not yet decoded are set to zero, so the output depends on decoded symbols alone,
    whatever the weights are. The attended tokens are summed to one vector for each position.
    """

    mask: Tensor
    relative_position_index: Tensor

    def __init__(self, dim: int, out_dim: int, heads: int = 16, side: int = 5, mlp_ratio: float = 4.0):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of the number of heads {heads}")
        self.side, self.heads = side, heads
        self.scale = (dim // heads) ** -0.5
        causal = (torch.arange(side * side) < side * side // 2).float()
        self.register_buffer("mask", causal[:, None], persistent=False)
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * side - 1) ** 2, heads))
        self.register_buffer("relative_position_index", relative_position_index(side))
        self.softmax = MaskedSoftmax()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.proj = nn.Linear(dim, out_dim)

    def forward(self, y_hat: Tensor) -> Tensor:
        """y_hat: (B, dim, H, W) -> (B, out_dim, H, W)."""
        batch, dim, height, width = y_hat.shape
        tokens = F.unfold(y_hat, kernel_size=self.side, padding=self.side // 2)
        tokens = tokens.reshape(batch, dim, self.side**2, height * width).permute(0, 3, 2, 1) * self.mask
        q, k, v = split_heads(self.qkv(self.norm1(tokens)), self.heads)
        bias = position_bias(self.relative_position_bias_table, self.relative_position_index)
        attention = self.softmax((q * self.scale) @ k.transpose(-2, -1), bias)
        context = torch.sum(merge_heads(attention @ v) + tokens, dim=2)
        context = self.proj(self.mlp(self.norm2(context)) + context)
        return context.reshape(batch, height, width, -1).permute(0, 3, 1, 2)
