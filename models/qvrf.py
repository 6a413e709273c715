"""QVRF: Tong, Wu, Xu, Wang, Ding, "QVRF: A Quantization-error-aware Variable Rate Framework for Learned Image
Compression" (ICIP 2023), arXiv 2303.05744.

One network and a gain a: the latent is y * a where it is rounded and coded, and y_hat is the result over a,
so that 1 / a is the width of a quantization step. A list of gains, learned or not, belongs to as many
lambdas; every positive number in between is a rate too. Parameters carry the names of the public code
(bytedance/QRAF): those of CompressAI's class, and `Gain`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from compressai.models import Cheng2020Attention, JointAutoregressiveHierarchicalPriors, ScaleHyperprior
from torch import Tensor, nn

from licq.models.compressai_models import infer_n, infer_n_m
from licq.models.layers import WholeLatent
from licq.models.registry import LAMBDAS, register_model

# the public code's lambdas: CompressAI's, and three more of its second checkpoint
LEVEL_LAMBDAS = (*LAMBDAS["mse"].values(), 0.36, 0.72, 1.44)


class VariableRate:
    """The gains of a variable-rate codec; comes before CompressAI's class among the bases.

    A level is a number from 1; `rate` is the gain a of the next forward, (1, 1, 1, 1). An image may bring its
    own: a tensor (B, 5, H, W) has the gain of each image in its fourth channel and the lambda of its J in its
    fifth, both constant planes.
    """

    def _init_rate(self, levels: int) -> None:
        lambdas = torch.tensor(LEVEL_LAMBDAS[:levels], dtype=torch.float64)
        self.Gain = nn.Parameter((lambdas / lambdas[0]).sqrt().float())
        self.levels = levels
        self.rate = torch.ones(1, 1, 1, 1)

    def gain(self, level: float) -> float:
        """The gain of a level; between two levels on the straight line of its logarithm."""
        gains = [math.log(value) for value in self.Gain.detach().abs().double().tolist()]
        return math.exp(_interpolate(level, range(1, len(gains) + 1), gains))

    def level_of(self, factor: float) -> float:
        """The level, whole or not, that has this gain: the inverse of `gain`."""
        gains = [math.log(value) for value in self.Gain.detach().abs().double().tolist()]
        return _interpolate(math.log(factor), gains, range(1, len(gains) + 1))

    def set_level(self, level: float) -> None:
        """Code at the rate of this level from now on."""
        self.set_factor(self.gain(level))

    def set_factor(self, factor: float) -> None:
        """Code with this gain from now on."""
        self.rate = torch.full((1, 1, 1, 1), factor)

    def with_planes(self, x: Tensor, levels: Tensor, lambdas: Tensor) -> Tensor:
        """Images (B, 3, H, W) with the gain of their levels, (B,) whole numbers, and their lambdas; gradients
        reach `Gain`."""
        facts = torch.stack((self.Gain.abs()[levels - 1], lambdas.to(x)), 1)
        return torch.cat((x, facts[:, :, None, None].expand(-1, -1, *x.shape[2:])), 1)

    def compress(self, *_: Any, **__: Any) -> Any:
        """CompressAI's own would code at another gain than this class's forward.

        Raises:
            NotImplementedError: always; so does `decompress`.
        """
        raise NotImplementedError(
            "no bitstreams of variable-rate codecs yet; rates are estimated from likelihoods"
        )

    decompress = compress

    def _image_and_gain(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[1] > 3:
            return x[:, :3], x[:, 3:4, :1, :1]
        return x, self.rate.to(x.device, x.dtype)


def _interpolate(at: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """On straight lines through the points, the outer ones continued; xs rise."""
    if len(xs) == 1:
        return ys[0]
    after = min(max(sum(x <= at for x in xs), 1), len(xs) - 1)
    share = (at - xs[after - 1]) / (xs[after] - xs[after - 1])
    return ys[after - 1] + share * (ys[after] - ys[after - 1])


class _AutoregressiveQVRF(WholeLatent, VariableRate):
    def forward(self, x: Tensor) -> dict[str, Any]:
        """x: (B, 3, H, W) in 0..1, or (B, 5, H, W); see `VariableRate`."""
        x, gain = self._image_and_gain(x)
        y = self.g_a(x)
        z_hat, z_likelihoods = self.entropy_bottleneck(self.h_a(y))
        scaled = y * gain
        y_hat = (
            self.gaussian_conditional.quantize(scaled, "noise" if self.training else "dequantize")
            * (1 / gain).detach()
        )
        parameters = torch.cat((self.h_s(z_hat), self.context_prediction(y_hat)), dim=1)
        scales, means = self.entropy_parameters(parameters).chunk(2, 1)
        _, y_likelihoods = self.gaussian_conditional(scaled, scales * gain, means=means * gain)
        return {"x_hat": self.g_s(y_hat), "likelihoods": {"y": y_likelihoods, "z": z_likelihoods}}


def _infer(sizes):
    def infer(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        return {**sizes(state_dict), "levels": state_dict["Gain"].shape[0]}

    return infer


_FACTS = {
    "lambdas": {"mse": dict(enumerate(LEVEL_LAMBDAS, 1))},
    "title": "QVRF: A Quantization-error-aware Variable Rate Framework for Learned Image Compression",
    "paper": "arXiv 2303.05744",
    "variable": True,
}
_LEVELS = range(1, len(LEVEL_LAMBDAS) + 1)


@register_model(
    "qvrf-balle2018",
    official={level: {"N": 192, "M": 320} for level in _LEVELS},
    configurations={"reference": {"N": 56, "M": 80}},
    infer=_infer(infer_n_m),
    **_FACTS,
)
class QVRFBalle2018(VariableRate, ScaleHyperprior):
    """Scale hyperprior of variable rate.

    Args:
        N, M: as CompressAI's.
        levels: gains, at most 11.
    """

    def __init__(self, N: int = 192, M: int = 320, levels: int = 8):
        super().__init__(N, M)
        self._init_rate(levels)

    def forward(self, x: Tensor) -> dict[str, Any]:
        """x: (B, 3, H, W) in 0..1, or (B, 5, H, W); see `VariableRate`."""
        x, gain = self._image_and_gain(x)
        y = self.g_a(x)
        z_hat, z_likelihoods = self.entropy_bottleneck(self.h_a(torch.abs(y)))
        y_hat, y_likelihoods = self.gaussian_conditional(y * gain, self.h_s(z_hat) * gain)
        return {
            "x_hat": self.g_s(y_hat * (1 / gain).detach()),
            "likelihoods": {"y": y_likelihoods, "z": z_likelihoods},
        }


@register_model(
    "qvrf-minnen2018",
    official={level: {"N": 192, "M": 320} for level in _LEVELS},
    configurations={"reference": {"N": 48, "M": 64}},
    infer=_infer(infer_n_m),
    **_FACTS,
)
class QVRFMinnen2018(_AutoregressiveQVRF, JointAutoregressiveHierarchicalPriors):
    """Joint autoregressive and hierarchical priors of variable rate; arguments as `QVRFBalle2018`'s."""

    def __init__(self, N: int = 192, M: int = 320, levels: int = 8):
        super().__init__(N, M)
        self._init_rate(levels)


@register_model(
    "qvrf-cheng2020",
    official={level: {"N": 192} for level in _LEVELS},
    configurations={"reference": {"N": 36}},
    infer=_infer(infer_n),
    **_FACTS,
)
class QVRFCheng2020(_AutoregressiveQVRF, Cheng2020Attention):
    """Cheng2020 with attention of variable rate; arguments as `QVRFBalle2018`'s."""

    def __init__(self, N: int = 192, levels: int = 8):
        super().__init__(N)
        self._init_rate(levels)
