"""Layers that several architectures share."""

from typing import Any

import torch
import torch.nn.functional as F
from compressai.entropy_models import GaussianConditional
from compressai.entropy_models.entropy_models import EntropyModel
from torch import Tensor, nn

from licq.models.checkpoint_files import CDF_STATE

_PRECISION = 16  # bits of a row's total
_REACH_BITS = 24  # of a symbol


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


class TabulatedBottleneck(EntropyModel):
    """A factorized prior of z that is given as the tables of an entropy coder, with no density behind them.

    Exported codecs have no more than these. The buffers are those of CompressAI's EntropyBottleneck after
    `update()`: `_quantized_cdf` (C, longest), `_cdf_length` (C,) and `_offset` (C,). Row c has cumulative
    frequencies from 0 to 2^16. Its bins are the integers from `_offset[c]` on, the last one is for all
    others. The symbols are round(z - medians), `medians` (C,). A new one has a distribution about zero.

    Symbols outside of a row share its last bin, half of it on either side, and each next one is half as
    probable. So every integer has a gradient that leads back into the row.
    """

    _quantized_cdf: Tensor
    _cdf_length: Tensor
    _offset: Tensor
    medians: Tensor

    def __init__(self, channels: int, **kwargs: Any):
        super().__init__(**kwargs)
        bins = torch.exp2(14.0 - torch.arange(-12, 13).abs()).clamp(min=1)
        bins[12] += 2**_PRECISION - 1 - bins.sum()
        row = torch.cat([torch.zeros(1), bins, torch.ones(1)]).cumsum(0)
        self.register_buffer("medians", torch.zeros(channels))
        self._quantized_cdf = row.int().repeat(channels, 1)
        self._cdf_length = torch.full((channels,), len(row), dtype=torch.int32)
        self._offset = torch.full((channels,), -12, dtype=torch.int32)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        errors = args[-1]
        for name in CDF_STATE:  # tables have the size that they have in the checkpoint
            if f"{prefix}{name}" in state_dict:
                table = state_dict[f"{prefix}{name}"]
                setattr(self, name, torch.zeros(table.shape, dtype=torch.int32, device=self.medians.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
        problem = wrong_rows(self._quantized_cdf, self._cdf_length, self._offset, len(self.medians))
        if problem is not None:
            errors.append(f"{prefix.rstrip('.')}: {problem}")

    def _get_medians(self) -> Tensor:
        return self.medians.reshape(-1, 1, 1)

    def forward(self, z: Tensor, training: bool | None = None) -> tuple[Tensor, Tensor]:
        """z: (B, C, ...) -> (z_hat, likelihoods), of the same shape."""
        noise = self.training if training is None else training
        z_hat = self.quantize(z, "noise" if noise else "dequantize", self._along(self.medians, z))
        return z_hat, self.likelihood(z_hat)

    def likelihood(self, z_hat: Tensor) -> Tensor:
        """The share of 2^16 that a row gives to each symbol of z_hat, (B, C, ...).

        Between integers its logarithm is the parabola through the three nearest ones.
        """
        residual = z_hat - self._along(self.medians, z_hat)
        symbols = residual.detach().round()
        before, here, after = (self._log2_of(symbols + step) for step in (-1, 0, 1))
        part = residual - symbols
        log2 = here + part * (after - before) / 2 + part.square() * (after + before - 2 * here) / 2
        likelihood = torch.exp2(log2)
        return self.likelihood_lower_bound(likelihood) if self.use_likelihood_bound else likelihood

    def _log2_of(self, symbols: Tensor) -> Tensor:
        logs = torch.log2(self._quantized_cdf.diff().clamp(min=1).float()) - _PRECISION
        channels = torch.arange(len(logs), device=logs.device)
        rest = self._along(logs[channels, self._cdf_length.long() - 2], symbols)
        last = self._along(self._cdf_length - 3, symbols)  # number of the last bin of one integer
        bins = symbols.long() - self._along(self._offset, symbols)
        outside = torch.maximum(-bins, bins - last)
        inside = logs[self._along(channels, symbols), bins.clamp(min=0).minimum(last)]
        return torch.where(outside > 0, rest - 1 - outside, inside)

    @staticmethod
    def _along(numbers: Tensor, z: Tensor) -> Tensor:
        """One number a channel, broadcastable to z."""
        return numbers.reshape(1, -1, *[1] * (z.ndim - 2))


def wrong_rows(cdf: Tensor, lengths: Tensor, offsets: Tensor, channels: int) -> str | None:
    """What is wrong with the tables of a bottleneck as CompressAI's coder takes them, in a few words; None:
    nothing."""
    lengths, offsets = lengths.flatten(), offsets.flatten()
    if not (
        cdf.ndim == 2
        and len(cdf) == len(lengths) == len(offsets) == channels
        and bool(((lengths >= 3) & (lengths <= cdf.shape[1])).all())
        and bool((offsets.abs() <= 2**_REACH_BITS).all())
    ):
        return "its tables of frequencies have other sizes"
    rows = (row[:length].long() for row, length in zip(cdf, lengths.tolist()))
    usable = all(row[0] == 0 and row[-1] == 2**_PRECISION and bool((row.diff() > 0).all()) for row in rows)
    return None if usable else "its cumulative frequencies do not rise from 0 to 65536"
