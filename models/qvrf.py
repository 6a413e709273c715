"""QVRF: Tong, Wu, Xu, Wang, Ding, "QVRF: A Quantization-error-aware Variable Rate Framework for Learned Image
Compression" (ICIP 2023), arXiv 2303.05744.

One network and a gain a: y * a is rounded and coded, and y_hat is the result divided by a. So 1 / a is the
width of a quantization step. The network has a list of gains for as many lambdas; every positive number
between them is a rate too. Parameters have the names of the public code (bytedance/QRAF): those of
CompressAI's class, and `Gain`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
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
    """The gains of a variable-rate codec; this class precedes CompressAI's among the bases.

    A level is a number from 1. `rate` is the gain a of the next forward, (1, 1, 1, 1). Images may have gains
    of their own: an input (B, 5, H, W) has the gain of each image in its fourth channel and the lambda of its
    J in its fifth, both as constant planes.
    """

    Gain: nn.Parameter
    levels: int
    rate: Tensor

    def _init_rate(self, levels: int) -> None:
        lambdas = torch.tensor(LEVEL_LAMBDAS[:levels], dtype=torch.float64)
        self.Gain = nn.Parameter((lambdas / lambdas[0]).sqrt().float())
        self.levels = levels
        self.rate = torch.ones(1, 1, 1, 1)

    def gain(self, level: float) -> float:
        """The gain of a level; between two levels its logarithm is interpolated linearly."""
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
        """Images with planes of their gains and lambdas, (B, 5, H, W); gradients reach `Gain`.

        Args:
            x: (B, 3, H, W).
            levels: integers (B,), from 1.
            lambdas: (B,).
        """
        values = torch.stack((self.Gain.abs()[levels - 1], lambdas.to(x)), 1)
        return torch.cat((x, values[:, :, None, None].expand(-1, -1, *x.shape[2:])), 1)

    def compress(self, *_: Any, **__: Any) -> Any:
        """Not there: CompressAI's method would code at another gain than this class's forward.

        Raises:
            NotImplementedError: always, as `decompress` does. Quantized, the codec has files (`licq.Codec`).
        """
        raise NotImplementedError(
            "the float codec of variable rate has no bitstreams; its rate is estimated from likelihoods"
        )

    decompress = compress

    def _image_and_gain(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[1] > 3:
            return x[:, :3], x[:, 3:4, :1, :1]
        return x, self.rate.to(x.device, x.dtype)


def _interpolate(at: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """The value at `at` on the straight lines through points; xs rise, and the outer lines go on."""
    if len(xs) == 1:
        return ys[0]
    after = min(max(sum(x <= at for x in xs), 1), len(xs) - 1)
    share = (at - xs[after - 1]) / (xs[after] - xs[after - 1])
    return ys[after - 1] + share * (ys[after] - ys[after - 1])


class _AutoregressiveQVRF(WholeLatent, VariableRate):
    """The forward of the codecs with a context model; this class precedes CompressAI's among the bases."""

    training: bool
    g_a: Any
    g_s: Any
    h_a: Any
    h_s: Any
    context_prediction: Any
    entropy_parameters: Any
    entropy_bottleneck: Any

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


def _infer(
    sizes: Callable[[Mapping[str, Tensor]], dict[str, int]],
) -> Callable[[Mapping[str, Tensor]], dict[str, Any]]:
    """`infer` of an architecture: the sizes of the codec of fixed rate, and the number of gains."""

    def infer(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        return {**sizes(state_dict), "levels": state_dict["Gain"].shape[0]}

    return infer


_FIELDS = {
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
    **_FIELDS,
)
class QVRFBalle2018(VariableRate, ScaleHyperprior):
    """The scale hyperprior of Balle et al. 2018 with a variable rate.

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
    **_FIELDS,
)
class QVRFMinnen2018(_AutoregressiveQVRF, JointAutoregressiveHierarchicalPriors):
    """The joint autoregressive and hierarchical priors of Minnen et al. 2018 with a variable rate.

    Args:
        N, M: as CompressAI's.
        levels: gains, at most 11.
    """

    def __init__(self, N: int = 192, M: int = 320, levels: int = 8):
        super().__init__(N, M)
        self._init_rate(levels)


@register_model(
    "qvrf-cheng2020",
    official={level: {"N": 192} for level in _LEVELS},
    configurations={"reference": {"N": 36}},
    infer=_infer(infer_n),
    **_FIELDS,
)
class QVRFCheng2020(_AutoregressiveQVRF, Cheng2020Attention):
    """The codec of Cheng et al. 2020, with attention and a variable rate.

    Args:
        N: as CompressAI's.
        levels: gains, at most 11.
    """

    def __init__(self, N: int = 192, levels: int = 8):
        super().__init__(N)
        self._init_rate(levels)
