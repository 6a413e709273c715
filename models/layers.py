"""Layers that several architectures share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultistageMaskedConv2d(nn.Conv2d):
    """Convolution that reads only what an earlier pass of a multistage context model has decoded.

    mask_type "A" (3x3) reads the four diagonal neighbours, "B" (5x5) a checkerboard without the centre, "C" (5x5) all
    but the pixels that share the centre's phase. The mask is applied to the weight at each forward; the parameter is
    left as it is. Names as in TinyLIC's public code: weight, bias, mask.
    """

    def __init__(self, *args, mask_type: str, **kwargs):
        super().__init__(*args, **kwargs)
        mask = torch.zeros_like(self.weight)
        if mask_type == "A":
            mask[:, :, 0::2, 0::2] = 1
        elif mask_type == "B":
            mask[:, :, 0::2, 1::2] = 1
            mask[:, :, 1::2, 0::2] = 1
        elif mask_type == "C":
            mask[:, :, 0::2, 1::2] = 1
            mask[:, :, 1::2, :] = 1
        else:
            raise ValueError(f"mask_type must be A, B or C, got {mask_type!r}")
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, self.stride, self.padding)


class MaskedConv3d(nn.Conv3d):
    """Convolution over (channel, row, column) that reads only what comes before a position in that order: PixelCNN's mask A.

    The mask is applied to the weight at each forward; the parameter is left as it is. Names as in NLAIC's public code:
    weight, bias, mask.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        taps = self.weight[0, 0].numel()
        before = torch.arange(taps).reshape(self.kernel_size) < taps // 2
        self.register_buffer("mask", before.to(self.weight.dtype).expand_as(self.weight).clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv3d(x, self.weight * self.mask, self.bias, self.stride, self.padding)


class RoundAboutMeans(nn.Module):
    """round(x - means) + means with a straight-through gradient: the values that the decoder will have."""

    def forward(self, x: Tensor, means: Tensor) -> Tensor:
        """x: (B, C, H, W); means: broadcastable to x."""
        residual = x - means
        return residual + (torch.round(residual) - residual).detach() + means
