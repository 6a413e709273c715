"""CompressAI's own variable-rate codecs: Kamisli, Racape, Choi, "Variable-Rate Learned Image Compression with
Multi-Objective Optimization and Quantization-Reconstruction Offsets" (DCC 2024), arXiv 2402.18930.

The latent is coded with a gain a <= 1, as in QVRF. The decoder moves each symbol towards zero by an offset,
which a small network computes from the scale and the gain. The step size of z may depend on the gain too.
These are CompressAI's classes with the names of their parameters, and a forward that takes each image at its
own gain.
"""

from collections.abc import Iterable, Mapping
from decimal import Decimal
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from compressai.entropy_models import EntropyBottleneckVbr
from compressai.models import (
    JointAutoregressiveHierarchicalPriorsVbr,
    MeanScaleHyperpriorVbr,
    ScaleHyperpriorVbr,
)
from compressai.models.base import get_scale_table
from torch import Tensor, nn

from licq.models.compressai_models import infer_n_m
from licq.models.layers import WholeLatent
from licq.models.qvrf import LEVEL_LAMBDAS, VariableRate
from licq.models.registry import register_model

SCALE_BOUND = 0.11
"""The smallest scale of the Gaussian conditional model and of the network of the offsets."""


def in_order(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    """The result of linear layers, ReLU and softplus, with the same bits on every machine.

    The order in which a matrix product adds depends on the machine, and so do the last bits of exp and log.
    So products and sums are computed one by one in float64, and softplus in decimal arithmetic, whose exp and
    ln are rounded correctly.

    Args:
        layers: nn.Linear, nn.Softplus or nn.ReLU.
        x: (..., inputs of the first layer).

    Returns:
        float64 (..., outputs of the last layer), on the CPU.
    """
    x = x.detach().cpu().double()
    for layer in layers:
        if isinstance(layer, nn.Linear):
            weight, bias = layer.weight.detach().cpu().double(), layer.bias.detach().cpu().double()
            total = bias.expand(*x.shape[:-1], -1)
            for index in range(weight.shape[1]):
                total = total + x[..., index : index + 1] * weight[:, index]
            x = total
        elif isinstance(layer, nn.Softplus):
            x = x.clone().apply_(partial(_softplus, threshold=layer.threshold))
        else:
            x = F.relu(x)
    return x


def _softplus(value: float, threshold: float) -> float:
    """log(1 + exp(value)) up to the threshold of nn.Softplus, rounded correctly."""
    return float((1 + Decimal(value).exp()).ln()) if value < threshold else value


class RateFunction(nn.Module):
    """Marks a module whose only input is the gain.

    So its result is a constant of each rate. It is computed by `in_order`, except in training.
    """


class RateSequential(RateFunction, nn.Sequential):
    """Layers that compute a constant of each rate from the gain."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (n, inputs of the first layer)."""
        return nn.Sequential.forward(self, x) if self.training else in_order(self, x).to(x)


class RateLinear(RateFunction, nn.Linear):
    """A linear layer that computes a constant of each rate from the gain."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (n, in_features)."""
        return nn.Linear.forward(self, x) if self.training else in_order([self], x).to(x)


class OffsetNet(nn.Sequential):
    """y_hat from y, with offsets from a network of linear layers and ReLU: these are its submodules.

    y_hat = sign(s) (|s| + offset) / a + mean for s = round((y - mean) a), with no offset where s is 0.
    """

    def table(self, scales: Tensor, gain: float) -> Tensor:
        """The offsets of scales (n,) at one gain, with the same bits on every machine: float64 (n,)."""
        scales = scales.detach().cpu().double().clamp(min=SCALE_BOUND)
        return -in_order(self, torch.stack((scales, torch.full_like(scales, gain)), -1)).squeeze(-1)

    def offsets(self, scales: Tensor, gain: Tensor) -> Tensor:
        """The offsets of symbols, of the shape and type of their scales.

        Args:
            scales: of the symbols, with the gain in them.
            gain: broadcastable to them.
        """
        scales = scales.clamp(min=SCALE_BOUND)
        x = torch.stack((scales, gain.to(scales).expand_as(scales)), -1)
        for layer in self:
            if isinstance(layer, nn.Linear):
                x = F.linear(x, layer.weight.to(x), layer.bias.to(x))
            else:
                x = F.relu(x)
        return -x.squeeze(-1)

    def forward(self, y: Tensor, scales: Tensor, means: Tensor | None, gain: Tensor) -> Tensor:
        """y_hat; y, scales, means: (B, C, H, W); gain: (B, 1, 1, 1)."""
        residual = (y if means is None else y - means) * gain
        size = residual.abs()
        size = size + (size.round() - size).detach()
        moved = size + torch.where(size.detach() < 0.5, 0.0, self.offsets(scales * gain, gain))
        y_hat = residual.sign().detach() * moved * (1 / gain).detach()
        return y_hat if means is None else y_hat + means


class WholeOffsetNet(OffsetNet):
    """y_hat from s = round(y a), where a context model needs symbols whose means are not known yet.

    y_hat = sign(r) (|r| + offset) / a + mean for r = s - mean a, and where |r| < 1/2, the mean lying in the
    symbol's interval, share r / a + mean.
    """

    @staticmethod
    def shares(scales: Tensor) -> Tensor:
        """The share of an interval's shift by which the Gaussian's mean within the interval shifts.

        The interval has width 1, and the derivative is taken where its centre is the Gaussian's mean. It is
        2 h phi(h) / (2 Phi(h) - 1) = 1 / (1 + h^2 / 3 + h^4 / (3 5) + h^6 / (3 5 7) + ...) for h = 1 / (2
        scale). The series has the same bits on every machine.

        Args:
            scales: of the symbols, with the gain in them.
        """
        square = (0.5 / scales.clamp(min=SCALE_BOUND)).square()
        term = total = torch.ones_like(square)
        for factor in range(3, 121, 2):
            term = term * square / factor
            total = total + term
        return 1 / total

    def forward(self, symbols: Tensor, scales: Tensor, means: Tensor, gain: Tensor) -> Tensor:
        """y_hat; symbols, scales, means: (B, C, H, W); gain: (B, 1, 1, 1)."""
        scales, residual = scales * gain, symbols - means * gain
        far = residual + residual.sign().detach() * self.offsets(scales, gain)
        moved = torch.where(residual.detach().abs() < 0.5, residual * self.shares(scales), far)
        return moved * (1 / gain).detach() + means


class VariableBottleneck(EntropyBottleneckVbr):
    """The factorized density of z, which is rounded to steps of each image's own size.

    CompressAI's forward estimates the likelihood of an interval of width 1 whatever the step is (it passes
    the step as another argument). Its coder takes an interval of the width of the step, and so does this
    class.
    """

    def step_likelihood(self, z_hat: Tensor, step: Tensor) -> Tensor:
        """The likelihood of z_hat (B, C, H, W); step: (B, 1, 1, 1), or (1, 1, 1, 1) for all images."""
        half = (step / 2).expand(len(z_hat), 1, *z_hat.shape[2:]).reshape(1, 1, -1)
        rows = z_hat.transpose(0, 1).reshape(z_hat.shape[1], 1, -1)
        lower, upper = (self._logits_cumulative(rows + side * half, stop_gradient=False) for side in (-1, 1))
        likelihood = self.likelihood_lower_bound(torch.sigmoid(upper) - torch.sigmoid(lower))
        return likelihood.reshape(z_hat.shape[1], z_hat.shape[0], *z_hat.shape[2:]).transpose(0, 1)

    def forward(self, z: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """(z_hat, likelihoods) of z (B, C, H, W)."""
        medians = self._get_medians().detach().reshape(1, -1, 1, 1)
        z_hat = ((z - medians) / step).round() * step + medians
        if self.training:
            noisy = z + (torch.rand_like(z) - 0.5) * step
            return z + (z_hat - z).detach(), self.step_likelihood(noisy, step)
        return z_hat, self.step_likelihood(z_hat, step)


class _Vbr(VariableRate):
    """What the three classes below have in common; it precedes CompressAI's class among their bases."""

    vr_entbttlnck: bool
    QuantABCD: Any
    entropy_bottleneck: Any
    gaussian_conditional: Any
    gayn2zqstep: Any
    lower_bound_zqstep: Any

    def _init_vbr(self, N: int, levels: int) -> None:
        self._init_rate(levels)
        self.Gain.data /= self.Gain.data[-1].clone()
        self.QuantABCD = OffsetNet(*self.QuantABCD)
        if self.vr_entbttlnck:
            self.entropy_bottleneck = VariableBottleneck(N)
            self.gayn2zqstep = RateSequential(*self.gayn2zqstep)

    def _code_z(self, z: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        if not self.vr_entbttlnck:
            return self.entropy_bottleneck(z)
        step = self.lower_bound_zqstep(self.gayn2zqstep(1 / gain.detach().reshape(-1, 1)))
        return self.entropy_bottleneck(z, step.reshape(-1, 1, 1, 1))

    def _code_y(self, y: Tensor, scales: Tensor, means: Tensor | None, gain: Tensor) -> tuple[Tensor, Tensor]:
        y_hat = self.QuantABCD(y, scales, means, gain)
        given = {} if means is None else {"means": means * gain}
        return y_hat, self.gaussian_conditional(y * gain, scales * gain, **given)[1]

    def aux_loss(self) -> Tensor:
        """The loss of z's quantiles; CompressAI's own method misses its bottleneck of variable steps."""
        return self.entropy_bottleneck.loss()

    def update(self, scale_table: Any = None, force: bool = False, **_: Any) -> bool:
        """Make the CDF tables; those of z are for a step size of 1."""
        table = get_scale_table() if scale_table is None else scale_table
        return bool(self.gaussian_conditional.update_scale_table(table, force=force)) | bool(
            self.entropy_bottleneck.update(force=force)
        )


def infer_sizes(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """The factory's arguments for a state_dict; KeyError where it is no such codec."""
    return {
        **infer_n_m(state_dict),
        "levels": state_dict["Gain"].shape[0],
        "vr_entbttlnck": "gayn2zqstep.0.weight" in state_dict,
    }


def adapt(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict with the names of EntropyBottleneckVbr, which EntropyBottleneck once had."""
    if "gayn2zqstep.0.weight" not in state_dict:
        return dict(state_dict)
    old = {"matrices": "_matrix", "biases": "_bias", "factors": "_factor"}
    adapted = {}
    for name, tensor in state_dict.items():
        parts = name.split(".")
        if parts[0] == "entropy_bottleneck" and parts[1] in old:
            name = f"entropy_bottleneck.{old[parts[1]]}{parts[2]}"
        adapted[name] = tensor
    return adapted


_FIELDS = {
    "official": {level: {"N": 192, "M": 320} for level in range(1, 9)},
    "lambdas": {"mse": dict(enumerate(LEVEL_LAMBDAS[:8], 1))},
    "title": "Variable-Rate Learned Image Compression with Multi-Objective Optimization and "
    "Quantization-Reconstruction Offsets",
    "paper": "arXiv 2402.18930",
    "variable": True,
    "infer": infer_sizes,
    "adapt": adapt,
}


@register_model(
    "balle2018-vbr",
    configurations={"reference": {"N": 56, "M": 80}},
    zoo="bmshj2018-hyperprior-vbr",
    **_FIELDS,
)
class Balle2018Vbr(_Vbr, ScaleHyperpriorVbr):
    """The scale hyperprior of Balle et al. 2018 with a variable rate.

    Args:
        N, M: as CompressAI's.
        levels: gains, at most 8.
        vr_entbttlnck: whether z has a step size of its own; the published checkpoint has.
    """

    def __init__(self, N: int = 192, M: int = 320, levels: int = 8, vr_entbttlnck: bool = True):
        super().__init__(N, M, vr_entbttlnck)
        self._init_vbr(N, levels)

    def forward(self, x: Tensor) -> dict[str, Any]:
        """x: (B, 3, H, W) in 0..1, or (B, 5, H, W); see `VariableRate`."""
        x, gain = self._image_and_gain(x)
        y = self.g_a(x)
        z_hat, z_likelihoods = self._code_z(self.h_a(torch.abs(y)), gain)
        y_hat, y_likelihoods = self._code_y(y, self.h_s(z_hat), None, gain)
        return {"x_hat": self.g_s(y_hat), "likelihoods": {"y": y_likelihoods, "z": z_likelihoods}}


@register_model(
    "minnen2018-mean-vbr", configurations={"reference": {"N": 48, "M": 64}}, zoo="mbt2018-mean-vbr", **_FIELDS
)
class Minnen2018MeanVbr(_Vbr, MeanScaleHyperpriorVbr):
    """The mean and scale hyperprior of Minnen et al. 2018 with a variable rate.

    Args:
        N, M: as CompressAI's.
        levels: gains, at most 8.
        vr_entbttlnck: whether z has a step size of its own; the published checkpoint has.
    """

    def __init__(self, N: int = 192, M: int = 320, levels: int = 8, vr_entbttlnck: bool = True):
        super().__init__(N, M, vr_entbttlnck)
        self._init_vbr(N, levels)

    def forward(self, x: Tensor) -> dict[str, Any]:
        """x: (B, 3, H, W) in 0..1, or (B, 5, H, W); see `VariableRate`."""
        x, gain = self._image_and_gain(x)
        y = self.g_a(x)
        z_hat, z_likelihoods = self._code_z(self.h_a(y), gain)
        scales, means = self.h_s(z_hat).chunk(2, 1)
        y_hat, y_likelihoods = self._code_y(y, scales, means, gain)
        return {"x_hat": self.g_s(y_hat), "likelihoods": {"y": y_likelihoods, "z": z_likelihoods}}


def _infer_autoregressive(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    return {**infer_n_m(state_dict), "levels": state_dict["Gain"].shape[0]}


@register_model(
    "minnen2018-vbr",
    configurations={"reference": {"N": 56, "M": 64}},
    zoo="mbt2018-vbr",
    **{**_FIELDS, "infer": _infer_autoregressive},
)
class Minnen2018Vbr(_Vbr, WholeLatent, JointAutoregressiveHierarchicalPriorsVbr):
    """The joint autoregressive and hierarchical priors of Minnen et al. 2018 with a variable rate.

    CompressAI's forward computes the positions one by one, because its symbols round((y - mean) a) depend on
    the y_hat before them. Here all positions are computed at once, as in the class of fixed rate: the symbols
    are round(y a), the context is round(y a) / a, and the offsets move the symbols less their means.

    Args:
        N, M: as CompressAI's.
        levels: gains, at most 8.
    """

    def __init__(self, N: int = 192, M: int = 320, levels: int = 8):
        super().__init__(N, M)
        self._init_vbr(N, levels)
        self.QuantABCD = WholeOffsetNet(*self.QuantABCD)
        linear = RateLinear(1, 2 * M)
        linear.load_state_dict(self.scale_to_context.state_dict())
        self.scale_to_context = linear

    def forward(self, x: Tensor) -> dict[str, Any]:
        """x: (B, 3, H, W) in 0..1, or (B, 5, H, W); see `VariableRate`."""
        x, gain = self._image_and_gain(x)
        y = self.g_a(x)
        z_hat, z_likelihoods = self._code_z(self.h_a(y), gain)
        scaled = y * gain
        rounded = self.gaussian_conditional.quantize(scaled, "noise" if self.training else "dequantize")
        shift = self.scale_to_context(gain.reshape(-1, 1))[:, :, None, None]
        context = self.context_prediction(rounded * (1 / gain).detach()) + shift
        scales, means = self.entropy_parameters(torch.cat((self.h_s(z_hat), context), dim=1)).chunk(2, 1)
        symbols = scaled + (scaled.round() - scaled).detach() if self.training else rounded
        y_hat = self.QuantABCD(symbols, scales, means, gain)
        y_likelihoods = self.gaussian_conditional(scaled, scales * gain, means=means * gain)[1]
        return {"x_hat": self.g_s(y_hat), "likelihoods": {"y": y_likelihoods, "z": z_likelihoods}}
