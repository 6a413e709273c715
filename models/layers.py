"""Layers that several architectures share."""

from typing import Any

import torch
import torch.nn.functional as F
from compressai.entropy_models import GaussianConditional
from torch import Tensor, nn


class MultistageMaskedConv2d(nn.Conv2d):
    """A convolution that reads only what an earlier pass of a multistage context model has decoded.

    mask_type "A" (3x3) reads the four diagonal neighbours, "B" (5x5) a checkerboard without the centre, "C"
    (5x5) all but the pixels that share the centre's phase. The mask is applied to the weight at each forward;
    the parameter stays as it is. Names as in TinyLIC's public code: weight, bias, mask.
    """

    mask: Tensor

    def __init__(self, *args: Any, mask_type: str, **kwargs: Any):
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
    """A convolution over (channel, row, column) that reads only what precedes a position in that order.

    That is PixelCNN's mask A.

    The mask is applied to the weight at each forward; the parameter stays as it is. Names as in NLAIC's
    public code: weight, bias, mask.
    """

    mask: Tensor

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        taps = self.weight[0, 0].numel()
        before = torch.arange(taps).reshape(self.kernel_size) < taps // 2
        self.register_buffer("mask", before.to(self.weight.dtype).expand_as(self.weight).clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv3d(x, self.weight * self.mask, self.bias, self.stride, self.padding)


class RoundAboutMeans(nn.Module):
    """round(x - means) + means, which the decoder will have, with a straight-through gradient."""

    def forward(self, x: Tensor, means: Tensor) -> Tensor:
        """x: (B, C, H, W); means: broadcastable to x."""
        residual = x - means
        return residual + (torch.round(residual) - residual).detach() + means


class WholeGaussianConditional(GaussianConditional):
    """The GaussianConditional (Minnen 2018) of codecs whose y_hat is round(y).

    In evaluation the likelihood is that of round(y). CompressAI's is that of round(y - means), another number
    that costs 0.6 to 8 % fewer bits, and from which no decoder can compute this y_hat (CompressAI's coder
    computes another y_hat, symbol by symbol). In training, where y_hat is y with noise, the two are the same.
    """

    of_residual = False
    """True for CompressAI's estimate, to compare with it."""

    def forward(
        self, inputs: Tensor, scales: Tensor, means: Tensor | None = None, training: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        """inputs, scales, means: (B, C, H, W) -> (y_hat, likelihoods), of the same shape."""
        if self.of_residual or means is None or (self.training if training is None else training):
            return super().forward(inputs, scales, means, training)
        y_hat = inputs + (torch.round(inputs) - inputs).detach()
        likelihood = self._likelihood(y_hat, scales, means)
        return y_hat, self.likelihood_lower_bound(likelihood) if self.use_likelihood_bound else likelihood


class WholeLatent:
    """Precedes an autoregressive class of CompressAI among the bases of a class.

    The likelihood is then of the y_hat that the forward uses; see `WholeGaussianConditional`.
    """

    gaussian_conditional: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.gaussian_conditional = WholeGaussianConditional(None)
