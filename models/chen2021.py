"""Chen2021 (NLAIC): Chen, Liu, Ma, Shen, Cao, Wang, "End-to-End Learnt Image Compression via Non-Local
Attention Optimization and Improved Context Modeling" (TIP 2021), arXiv 1910.06244.

The network of the public code (NJUVISION/NIC), which differs from the paper's in two ways its documentation
names: the context model is an 11x11x11 masked convolution, and a symbol has a mixture of three Gaussians.
Parameters have the names and shapes of that code. It stores the context model in a second file; here it is
`context.`, and for a checkpoint NAME.pkl the file NAMEp.pkl beside it is read too. Two attention branches
that the public network has and never runs are left out.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from compressai.entropy_models import EntropyBottleneck, GaussianMixtureConditional
from compressai.models import CompressionModel
from torch import Tensor, nn

from licq.models.layers import MaskedConv3d
from licq.models.registry import register_model

_COMPONENTS = 3  # of the mixture
_FILTERS = (3, 3, 3)  # of the entropy bottleneck
_MIN = 1e-6  # of scales and likelihoods
_SIDE = 11  # of the context model's kernel
# The names of the public models say the weight of the distortion: of the squared error on 0..1 against bits
# per pixel, and of 1 - MS-SSIM.
_MSE_NAMES = (200, 400, 800, 1600, 3200, 6400, 12800, 25600)
_MS_SSIM_NAMES = (4, 8, 16, 32, 64, 128, 320, 640)


def infer_sizes(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of `NLAIC` that fit a state_dict; KeyError where it is none."""
    return {
        "M": state_dict["encoder.down1.weight"].shape[0],
        "N2": state_dict["encoder.conv2.weight"].shape[0],
    }


def adapt(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The public code's tensors as `NLAIC` has them.

    What never runs is left out: `encoder.mask1`, `decoder.mask2`, and the second copy of the bottleneck's
    last layer. The public bottleneck has no quantiles; its z_hat is round(z), so the median is 0.
    """
    unused = ("encoder.mask1.", "decoder.mask2.")
    twice = tuple(f"factorized_entropy_func.{name}" for name in ("matrix", "bias", "factor"))
    adapted = {
        name: tensor
        for name, tensor in state_dict.items()
        if not name.startswith(unused) and name not in twice
    }
    first = adapted.get("factorized_entropy_func.matrices.0")
    if first is not None and "factorized_entropy_func.quantiles" not in adapted:
        bottleneck = EntropyBottleneck(first.shape[0], filters=_FILTERS)
        parameters = {
            name.rpartition("func.")[2]: tensor
            for name, tensor in adapted.items()
            if name.startswith("factorized_entropy_func.")
        }
        bottleneck.load_state_dict(parameters, strict=False)
        bottleneck._update_quantiles()
        quantiles = bottleneck.quantiles.detach().clone()
        quantiles[:, :, 1] = 0
        adapted["factorized_entropy_func.quantiles"] = quantiles
    return adapted


class ResBlock(nn.Module):
    """x + conv(relu(conv(x)))."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


class NonLocalBlock(nn.Module):
    """Attention of every position to all, with embedded Gaussians and half the channels inside.

    Wang et al. 2018, arXiv 1711.07971.
    """

    def __init__(self, channels: int):
        super().__init__()
        inner = channels // 2
        self.g = nn.Conv2d(channels, inner, 1)
        self.theta = nn.Conv2d(channels, inner, 1)
        self.phi = nn.Conv2d(channels, inner, 1)
        self.W = nn.Conv2d(inner, channels, 1)
        nn.init.zeros_(self.W.weight)
        if self.W.bias is not None:
            nn.init.zeros_(self.W.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> the same shape. The scores of an image are (H W)^2 numbers."""
        height, width = x.shape[2:]
        theta = self.theta(x).flatten(2).transpose(1, 2)
        scores = theta @ self.phi(x).flatten(2)
        y = F.softmax(scores, dim=-1) @ self.g(x).flatten(2).transpose(1, 2)
        return self.W(y.transpose(1, 2).unflatten(2, (height, width))) + x


def _blocks(channels: int, count: int, *then: nn.Module) -> nn.Sequential:
    return nn.Sequential(*(ResBlock(channels) for _ in range(count)), *then)


def _mask(channels: int) -> nn.Sequential:
    """The mask branch of an attention module, before its sigmoid."""
    return nn.Sequential(NonLocalBlock(channels), *_blocks(channels, 3), nn.Conv2d(channels, channels, 1))


def _down(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 5, stride=2, padding=2)


def _up(inputs: int, outputs: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(inputs, outputs, 5, stride=2, padding=2, output_padding=1)


class Encoder(nn.Module):
    """Analysis transform and hyper analysis: x -> (y at 1/16, z at 1/64)."""

    def __init__(self, M: int, N2: int):
        super().__init__()
        half = M // 2
        wide = 2 * half
        self.conv1 = nn.Conv2d(3, half, 5, padding=2)
        self.trunk1 = _blocks(half, 2, _down(half, wide))
        self.trunk2 = _blocks(wide, 3)
        self.down1 = _down(wide, M)
        self.trunk3 = _blocks(M, 3, _down(M, M))
        self.trunk4 = _blocks(M, 3, _down(M, M))
        self.trunk5 = _blocks(M, 3)
        self.mask2 = _mask(M)
        self.trunk6 = _blocks(M, 2, _down(M, M))
        self.trunk7 = _blocks(M, 2, _down(M, M))
        self.trunk8 = _blocks(M, 3)
        self.mask3 = _mask(M)
        self.conv2 = nn.Conv2d(M, N2, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.trunk1(self.conv1(x))
        x = self.down1(self.trunk2(x) + x)
        x = self.trunk4(self.trunk3(x))
        y = self.trunk5(x) * torch.sigmoid(self.mask2(x)) + x
        x = self.trunk7(self.trunk6(y))
        return y, self.conv2(self.trunk8(x) * torch.sigmoid(self.mask3(x)) + x)


class HyperDecoder(nn.Module):
    """z_hat at 1/64 -> M channels at 1/16."""

    def __init__(self, M: int, N2: int):
        super().__init__()
        self.conv1 = nn.Conv2d(N2, M, 3, padding=1)
        self.trunk1 = _blocks(M, 3)
        self.mask1 = _mask(M)
        self.trunk2 = _blocks(M, 2, _up(M, M))
        self.trunk3 = _blocks(M, 2, _up(M, M))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return self.trunk3(self.trunk2(self.trunk1(x) * torch.sigmoid(self.mask1(x)) + x))


class Parameters(nn.Module):
    """From the hyper decoder's M channels to the 2 M that the context model takes."""

    def __init__(self, M: int):
        super().__init__()
        self.context_p = _blocks(M, 3, nn.Conv2d(M, 2 * M, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.context_p(x)


class Decoder(nn.Module):
    """Synthesis transform: y_hat -> x_hat."""

    def __init__(self, M: int):
        super().__init__()
        half = M // 2
        wide = 2 * half
        self.trunk1 = _blocks(M, 3)
        self.mask1 = _mask(M)
        self.up1 = _up(M, M)
        self.trunk2 = _blocks(M, 3, _up(M, M))
        self.trunk3 = _blocks(M, 3, _up(M, wide))
        self.trunk4 = _blocks(wide, 3)
        self.trunk5 = nn.Sequential(_up(wide, half), *_blocks(half, 3))
        self.conv1 = nn.Conv2d(half, 3, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up1(self.trunk1(x) * torch.sigmoid(self.mask1(x)) + x)
        x = self.trunk3(self.trunk2(x))
        return self.conv1(self.trunk5(self.trunk4(x) + x))


class Context(nn.Module):
    """The mixture of each symbol, from the hyperprior and the symbols before it.

    Symbols are in the order channel, row, column. The latent is a volume (1, M, H, W), on which a masked
    convolution of 11x11x11 and convolutions of 1x1x1 run.
    """

    def __init__(self, M: int):
        super().__init__()
        self.conv1 = MaskedConv3d(1, 24, _SIDE, padding=_SIDE // 2)
        self.conv2 = nn.Sequential(
            nn.Conv3d(25, 48, 1),
            nn.ReLU(),
            nn.Conv3d(48, 96, 1),
            nn.ReLU(),
            nn.Conv3d(96, 3 * _COMPONENTS, 1),
        )
        self.conv3 = nn.Conv2d(2 * M, M, 3, padding=1)

    def forward(self, y_hat: Tensor, hyper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """y_hat: (B, M, H, W), hyper: (B, 2 M, H, W) -> scales, means, weights.

        Each is (B, 3 M, H, W), one component after the other.
        """
        before = self.conv1(y_hat.unsqueeze(1))
        out = self.conv2(torch.cat((before, self.conv3(hyper).unsqueeze(1)), dim=1))
        # channels of out: weight, mean, scale of each component
        weights = F.softmax(out[:, 0::3], dim=1)
        return out[:, 2::3].abs().flatten(1, 2), out[:, 1::3].flatten(1, 2), weights.flatten(1, 2)


@register_model(
    "chen2021",
    title="End-to-End Learnt Image Compression via Non-Local Attention Optimization and Improved Context "
    "Modeling",
    paper="arXiv 1910.06244",
    official={
        quality: {"M": 192, "N2": 128} if quality < 7 else {"M": 256, "N2": 192} for quality in range(1, 9)
    },
    configurations={"reference": {"M": 32, "N2": 24}},
    lambdas={
        "mse": {quality: name / 255**2 for quality, name in enumerate(_MSE_NAMES, 1)},
        "ms-ssim": {quality: float(name) for quality, name in enumerate(_MS_SSIM_NAMES, 1)},
    },
    infer=infer_sizes,
    adapt=adapt,
    companions={"context.": "{stem}p{suffix}"},
)
class NLAIC(CompressionModel):
    """Non-local attention in transforms and hyperprior, a 3-D context model, a mixture of three Gaussians.

    Args:
        M: channels of the latent y and of most stages; half of them at full resolution.
        N2: channels of the hyper latent z.
    """

    def __init__(self, M: int = 192, N2: int = 128):
        super().__init__()
        self.encoder = Encoder(M, N2)
        self.factorized_entropy_func = EntropyBottleneck(N2, filters=_FILTERS, likelihood_bound=_MIN)
        self.hyper_dec = HyperDecoder(M, N2)
        self.p = Parameters(M)
        self.context = Context(M)
        self.gaussian_conditional = GaussianMixtureConditional(
            _COMPONENTS, scale_bound=_MIN, likelihood_bound=_MIN
        )
        self.decoder = Decoder(M)
        self.M = M

    def forward(self, x: Tensor) -> dict[str, Any]:
        """x: (B, 3, H, W) in 0..1, H and W multiples of 64 -> {"x_hat", "likelihoods": {"y", "z"}}."""
        y, z = self.encoder(x)
        z_hat, z_likelihoods = self.factorized_entropy_func(z)
        hyper = self.p(self.hyper_dec(z_hat))
        y_hat = self.gaussian_conditional.quantize(y, "noise" if self.training else "dequantize")
        _, y_likelihoods = self.gaussian_conditional(y, *self.context(y_hat, hyper))
        return {"x_hat": self.decoder(y_hat), "likelihoods": {"y": y_likelihoods, "z": z_likelihoods}}

    def update(self, scale_table: Any = None, force: bool = False, update_quantiles: bool = False) -> bool:
        """Make the CDF tables of z. A mixture has none: each symbol has a distribution of its own."""
        return self.factorized_entropy_func.update(force, update_quantiles)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor]) -> "NLAIC":
        """A network with these weights, as CompressAI's classes make theirs."""
        model = cls(**infer_sizes(state_dict))
        model.load_state_dict(state_dict)
        return model
