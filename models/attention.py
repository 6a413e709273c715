"""Neighborhood attention, with NATTEN's rule at the edges of an image, computed tile by tile on any device.

Source: Hassani et al., "Neighborhood Attention Transformer", arXiv 2204.07143; the variant of TinyLIC, arXiv
2204.11448.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILE = 4
"""Side of a tile of queries. With a window of 7, 49 scores of a query count. A tile of 4 x 4 computes 100 of
them for each query, one of 8 x 8 would compute 196."""


class MaskedSoftmax(nn.Module):
    """Softmax over the last dimension of `scores + bias`; keys whose bias is -inf get probability 0.

    It is a module so that a quantizer recognizes it: bias and mask reach the integer softmax as constants.
    """

    def forward(self, scores: Tensor, bias: Tensor, kinds: Tensor | None = None) -> Tensor:
        """scores: (..., queries, keys); bias: broadcastable to scores, -inf where a key is masked.

        With `kinds`, scores are (B, tiles, ...) and bias has an entry for each kind of tile; tile t is of the
        kind kinds[t].
        """
        return F.softmax(scores + (bias if kinds is None else bias.index_select(0, kinds)), dim=-1)


@lru_cache(maxsize=64)
def _axis_tiles(length: int, kernel: int) -> tuple[Tensor, Tensor, Tensor]:
    """One axis, cut into tiles of `TILE` queries, each with consecutive keys that cover all its windows.

    Returns:
        keys: (tiles, K) positions of the keys of each tile, K = min(length, kernel + TILE - 1).
        kinds: (tiles,) the row of `offsets` that a tile uses; all tiles inside the image use the same.
        offsets: (kinds, TILE, K) the relative position key - query + kernel - 1 in 0 .. 2 kernel - 2, or -1
            where the key is outside the query's window. The window is shifted inside the image, so that
            every query has `kernel` keys.
    """
    tiles = -(-length // TILE)
    span = min(length, kernel + TILE - 1)
    first_query = torch.arange(tiles) * TILE
    first_key = (first_query - kernel // 2).clamp(0, length - span)
    keys = first_key[:, None] + torch.arange(span)
    # queries past the edge fill up the last tile; they repeat the last real one and are cut off afterwards
    queries = (first_query[:, None] + torch.arange(TILE)).clamp(max=length - 1)
    window = (queries - kernel // 2).clamp(0, length - kernel)
    inside = (keys[:, None, :] >= window[:, :, None]) & (keys[:, None, :] < window[:, :, None] + kernel)
    relative = torch.where(inside, keys[:, None, :] - queries[:, :, None] + kernel - 1, -1)
    offsets, kinds = torch.unique(relative, dim=0, return_inverse=True)
    return keys, kinds, offsets


class NeighborhoodAttention(nn.Module):
    """Multi-head attention of every position to the `kernel_size` x `kernel_size` positions around it.

    At the edges the window is shifted inside the image, so that every query has kernel_size^2 keys. An image
    smaller than the window is padded with zeros below and on the right, and the padding is attended to, as
    NATTEN does. Scores are computed for tiles of TILE^2 queries and (kernel_size + TILE - 1)^2 keys, with a
    mask.

    Parameters are named as in TinyLIC's public code: qkv (Linear, 3 dim), rpb (heads, 2k-1, 2k-1), proj
    (Linear).
    """

    def __init__(self, dim: int, kernel_size: int, num_heads: int):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")
        if kernel_size < 3 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and at least 3, got {kernel_size}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.kernel_size = kernel_size
        self.qkv = nn.Linear(dim, 3 * dim)
        self.rpb = nn.Parameter(torch.empty(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        nn.init.trunc_normal_(self.rpb, std=0.02)
        self.softmax = MaskedSoftmax()
        self.proj = nn.Linear(dim, dim)

    def _bias(self, height: int, width: int) -> Tensor:
        """Relative position bias and window mask of each kind of tile: (kinds, heads, TILE^2, keys), -inf is
        masked."""
        _, _, rows = _axis_tiles(height, self.kernel_size)
        _, _, columns = _axis_tiles(width, self.kernel_size)
        rows, columns = rows.to(self.rpb.device), columns.to(self.rpb.device)
        shape = (rows.shape[0], columns.shape[0], TILE, TILE, rows.shape[2], columns.shape[2])
        r = rows[:, None, :, None, :, None].expand(shape)
        c = columns[None, :, None, :, None, :].expand(shape)
        bias = self.rpb[:, r.clamp(min=0), c.clamp(min=0)]
        bias = bias.masked_fill((r < 0) | (c < 0), float("-inf"))
        return bias.permute(1, 2, 0, 3, 4, 5, 6).reshape(-1, self.num_heads, TILE * TILE, shape[4] * shape[5])

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, H, W, dim) -> (B, H, W, dim)."""
        batch, height, width, dim = x.shape
        pad_h, pad_w = max(0, self.kernel_size - height), max(0, self.kernel_size - width)
        if pad_h or pad_w:
            x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h))
        full_h, full_w = height + pad_h, width + pad_w
        key_rows, row_kinds, _ = _axis_tiles(full_h, self.kernel_size)
        key_columns, column_kinds, row_offsets = _axis_tiles(full_w, self.kernel_size)
        tiles_h, tiles_w = key_rows.shape[0], key_columns.shape[0]

        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q = F.pad(q, (0, 0, 0, tiles_w * TILE - full_w, 0, tiles_h * TILE - full_h))
        q = q.reshape(batch, tiles_h, TILE, tiles_w, TILE, self.num_heads, self.head_dim).permute(
            0, 1, 3, 5, 2, 4, 6
        )
        q = q.reshape(batch, tiles_h * tiles_w, self.num_heads, TILE * TILE, self.head_dim)
        positions = (
            (key_rows[:, None, :, None] * full_w + key_columns[None, :, None, :]).flatten().to(x.device)
        )
        k, v = (self._keys(part, positions, tiles_h * tiles_w) for part in (k, v))

        kinds = (row_kinds[:, None] * row_offsets.shape[0] + column_kinds).flatten().to(x.device)
        attention = self.softmax((q * self.scale) @ k.transpose(-2, -1), self._bias(full_h, full_w), kinds)
        out = (attention @ v).reshape(batch, tiles_h, tiles_w, self.num_heads, TILE, TILE, self.head_dim)
        out = out.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, tiles_h * TILE, tiles_w * TILE, dim)
        return self.proj(out[:, :height, :width])

    def _keys(self, x: Tensor, positions: Tensor, tiles: int) -> Tensor:
        """x (B, H, W, dim) at positions of H * W -> (B, tiles, heads, keys of a tile, head_dim)."""
        x = x.reshape(x.shape[0], -1, x.shape[3]).index_select(1, positions)
        return x.reshape(x.shape[0], tiles, -1, self.num_heads, self.head_dim).permute(0, 1, 3, 2, 4)
