"""CompressAI's own variable-rate codecs: Kamisli, Racape, Choi, "Variable-Rate Learned Image Compression with
Multi-Objective Optimization and Quantization-Reconstruction Offsets" (DCC 2024), arXiv 2402.18930.

The latent is coded with a gain a <= 1, as in QVRF, and the decoder moves each symbol towards zero by an
offset that a small network reads off the scale and the gain; z may have a step size that depends on the gain,
too. CompressAI's classes with its parameters' names, and a forward that takes each image at its own gain.
"""

from collections.abc import Iterable, Mapping
from decimal import Decimal
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
"""The smallest scale of the Gaussian conditional model, and of the offsets."""


def in_order(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    """A network of linear layers, ReLU and softplus, with the same bits on every machine.

    A matrix product adds in an order of the machine's own, and exp and log differ in their last bits. So:
    float64 products and sums one by one, and softplus in decimal arithmetic, whose exp and ln are rounded
    correctly. x: (..., inputs); result as float64.
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
            x = x.clone().apply_(
                lambda value: float((1 + Decimal(value).exp()).ln()) if value < layer.threshold else value
            )
        else:
            x = F.relu(x)
    return x


class RateFunction:
    """Marks a module whose input is the gain alone: what it gives is a constant of each rate, computed
    `in_order` but in training."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return super().forward(x)
        return in_order(self if isinstance(self, nn.Sequential) else [self], x).to(x)


class RateSequential(RateFunction, nn.Sequential):
    pass


class RateLinear(RateFunction, nn.Linear):
    pass


class OffsetNet(nn.Sequential):
    """The network of the offsets, with what it is for: y_hat from y.

    y_hat = sign(s) (|s| + offset) / a + mean for s = round((y - mean) a), with no offset where s is 0.
    """

    def table(self, scales: Tensor, gain: float) -> Tensor:
        """`offsets` of scales (n,) at one gain, with the same bits on every machine; float64."""
        scales = scales.detach().cpu().double().clamp(min=SCALE_BOUND)
        return -in_order(self, torch.stack((scales, torch.full_like(scales, gain)), -1)).squeeze(-1)

    def offsets(self, scales: Tensor, gain: Tensor) -> Tensor:
        """scales: of the scaled symbols; gain: broadcastable to them. Computed in the type of the scales."""
        scales = scales.clamp(min=SCALE_BOUND)
        x = torch.stack((scales, gain.to(scales).expand_as(scales)), -1)
        for layer in self:
            x = (
                F.linear(x, layer.weight.to(x), layer.bias.to(x))
                if isinstance(layer, nn.Linear)
                else F.relu(x)
            )
        return -x.squeeze(-1)

    def forward(self, y: Tensor, scales: Tensor, means: Tensor | None, gain: Tensor) -> Tensor:
        """y, scales, means: (B, C, H, W); gain: (B, 1, 1, 1)."""
        residual = (y if means is None else y - means) * gain
        size = residual.abs()
        size = size + (size.round() - size).detach()
        moved = size + torch.where(size.detach() < 0.5, 0.0, self.offsets(scales * gain, gain))
        y_hat = residual.sign().detach() * moved * (1 / gain).detach()
        return y_hat if means is None else y_hat + means


class WholeOffsetNet(OffsetNet):
    """y_hat from s = round(y a), where a context model needs symbols before their means are known.

    y_hat = sign(r) (|r| + offset) / a + mean for r = s - mean a, and where |r| < 1/2, the mean lying in the
    symbol's interval, share r / a + mean.
    """

    @staticmethod
    def shares(scales: Tensor) -> Tensor:
        """How far the mean of a Gaussian within an interval of width 1 follows the interval's centre, at its
        own mean: the derivative there.

        1 / (1 + h^2 / 3 + h^4 / (3 5) + h^6 / (3 5 7) + ...), h = 1 / (2 scale), which is 2 h phi(h) / (2
        Phi(h) - 1): sums, products and quotients, number by number, with the same bits on every machine.
        scales: of the scaled symbols.
        """
        square = (0.5 / scales.clamp(min=SCALE_BOUND)).square()
        term = total = torch.ones_like(square)
        for factor in range(3, 121, 2):
            term = term * square / factor
            total = total + term
        return 1 / total

    def forward(self, symbols: Tensor, scales: Tensor, means: Tensor, gain: Tensor) -> Tensor:
        """symbols, scales, means: (B, C, H, W); gain: (B, 1, 1, 1)."""
        scales, residual = scales * gain, symbols - means * gain
        far = residual + residual.sign().detach() * self.offsets(scales, gain)
        moved = torch.where(residual.detach().abs() < 0.5, residual * self.shares(scales), far)
        return moved * (1 / gain).detach() + means


class VariableBottleneck(EntropyBottleneckVbr):
    """Factorized density of z in steps of each image's own size.

    CompressAI's forward estimates the likelihood of an interval of width 1 whatever the step (it hands the
    step over as another argument); its coder takes the step's width, and so does this.
    """

    def step_likelihood(self, z_hat: Tensor, step: Tensor) -> Tensor:
        """z_hat: (B, C, H, W), step: (B, 1, 1, 1), or (1, 1, 1, 1) for all images."""
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
    """What the three have in common; comes before CompressAI's class among the bases."""

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
        means = {} if means is None else {"means": means * gain}
        return y_hat, self.gaussian_conditional(y * gain, scales * gain, **means)[1]

    def aux_loss(self) -> Tensor:
        """Of the quantiles of z; CompressAI's own method overlooks its bottleneck of variable steps."""
        return self.entropy_bottleneck.loss()

    def update(self, scale_table: Any = None, force: bool = False, **_: Any) -> bool:
        """Make the CDF tables; of z for a step size of 1."""
        table = get_scale_table() if scale_table is None else scale_table
        return bool(self.gaussian_conditional.update_scale_table(table, force=force)) | bool(
            self.entropy_bottleneck.update(force=force)
        )


def infer_sizes(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments that fit a state_dict; KeyError where it is no variable-rate codec of CompressAI."""
    return {
        **infer_n_m(state_dict),
        "levels": state_dict["Gain"].shape[0],
        "vr_entbttlnck": "gayn2zqstep.0.weight" in state_dict,
    }


def adapt(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """EntropyBottleneckVbr has the names that EntropyBottleneck once had."""
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


_FACTS = {
    "official": {level: {"N": 192, "M": 320} for level in range(1, 9)},
    "lambdas": {"mse": dict(enumerate(LEVEL_LAMBDAS[:8], 1))},
    "title": "Variable-Rate Learned Image Compression with Multi-Objective Optimization and Quantization-Reconstruction Offsets",
    "paper": "arXiv 2402.18930",
    "variable": True,
    "infer": infer_sizes,
    "adapt": adapt,
}


@register_model(
    "balle2018-vbr",
    configurations={"reference": {"N": 56, "M": 80}},
    zoo="bmshj2018-hyperprior-vbr",
    **_FACTS,
)
class Balle2018Vbr(_Vbr, ScaleHyperpriorVbr):
    """Scale hyperprior.

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
    "minnen2018-mean-vbr", configurations={"reference": {"N": 48, "M": 64}}, zoo="mbt2018-mean-vbr", **_FACTS
)
class Minnen2018MeanVbr(_Vbr, MeanScaleHyperpriorVbr):
    """Mean and scale hyperprior; arguments as `Balle2018Vbr`'s."""

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
    **{**_FACTS, "infer": _infer_autoregressive},
)
class Minnen2018Vbr(_Vbr, WholeLatent, JointAutoregressiveHierarchicalPriorsVbr):
    """Joint autoregressive and hierarchical priors; N, M, levels as `Balle2018Vbr`'s.

    CompressAI's forward walks over the positions one by one, because its symbols round((y - mean) a) depend
    on the y_hat before them. Here all positions go at once, as in the class of fixed rate: the symbols are
    round(y a), the context is round(y a) / a, and the offsets move what is left of the symbols without their
    means.
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
