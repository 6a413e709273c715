"""Input scales that share rounding noise between a layer's inputs and its weights where J rises least.

An input channel's scale may be larger than its range asks. Its values are then rounded more coarsely, but the
weights that take over the scale fill their codes better. Channels with large values stop setting the step of
all others' weights (Cross-Layer Equalization, Nagel et al. 2019; SmoothQuant, Xiao et al. 2022). Here this
happens within one layer, so the layer before stays as it is. Each channel's scale is found by descent on the
noise that `reconstruction.sensitivity` predicts.

Symbols without means (y_hat of codecs whose entropy model has no means) are exact in steps 2^-k with any k
from 0 on. Their channels have no noise to share, and k is free for the weights: see `_Terms.limit`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from licq.quant.config import FLOAT_BITS
from licq.quant.fixedpoint import INT32, int_range
from licq.quant.mac import QuantMAC
from licq.quant.model import QuantModel
from licq.reconstruction.sensitivity import Sensitivity, input_noise, kernel_power, taps, weight_noise
from licq.support.progress import progress as progress_bar

STEPS = 200
_BETAS = (0.9, 0.999)  # of Adam


@torch.no_grad()
def balance_scales(
    qmodel: QuantModel, sensitivities: dict[str, Sensitivity], share: float, progress: bool = True
) -> None:
    """Raise the scales of input channels of an observed model where that lowers the predicted rise of J.

    The accumulators still fit into int32. No scale becomes smaller: what `QuantConfig.transform` gave is also
    a layer's room for images that reach further than the calibration crops. Steps of symbols stay powers of
    two, at most 1. Layers with groups, pixels or one scale for all inputs are left alone.

    Args:
        sensitivities: of J, or of another loss, for each layer.
        share: of the noise of weights rounded to nearest that their rounding will leave, 0 to 1.
    """
    nodes = qmodel.layers
    layers = {name: nodes[name] for name in sensitivities if _can_be_balanced(nodes[name])}
    balanced = _balanced(list(layers.values()), [sensitivities[name] for name in layers], share)
    for (name, node), best in progress_bar(
        zip(layers.items(), balanced),
        total=len(layers),
        desc="balancing scales",
        unit="layer",
        enabled=progress,
        leave=False,
    ):
        sensitivity = sensitivities[name]
        before, start = _noise(node, sensitivity, share), _ranges(node)
        _set_ranges(node, _raised(node, best))
        if _noise(node, sensitivity, share) > before or node.learned_bound() > INT32:
            _set_ranges(node, start)


def _can_be_balanced(node: QuantMAC) -> bool:
    grid, config = node.input_grid, node.config
    return (
        FLOAT_BITS not in (config.a_bits, config.w_bits)
        and grid.channel_dim is not None
        and not grid.pixels
        and node.groups == 1
    )


def _noise(node: QuantMAC, sensitivity: Sensitivity, share: float) -> float:
    inputs = 0.0 if node.input_grid.exact else float(input_noise(node, sensitivity).sum())
    return inputs + share * float(weight_noise(node, sensitivity).sum())


def _ranges(node: QuantMAC) -> tuple[Tensor, Tensor, Tensor]:
    """ln N and both ends of the range of the input channels."""
    grid = node.input_grid
    return grid.log_n.data.clone(), grid.low.clone(), grid.high.clone()


def _set_ranges(node: QuantMAC, ranges: tuple[Tensor, Tensor, Tensor]) -> None:
    grid = node.input_grid
    grid.log_n.data, grid.low, grid.high = ranges
    node.start_weights()


def _raised(node: QuantMAC, rise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`_ranges` with the scales raised by a rise in ln N; steps of symbols by whole powers of two."""
    log_n, low, high = _ranges(node)
    if not node.input_grid.exact:
        return log_n + rise.to(log_n), low, high
    factor = torch.exp2(torch.round(rise / math.log(2))).to(low)
    return log_n, low * factor, high * factor


def _balanced(nodes: Sequence[QuantMAC], sensitivities: Sequence[Sensitivity], share: float) -> list[Tensor]:
    """(inputs,) for each layer: by how much ln N of each channel is to rise for the lowest predicted noise,
    with maximum ranges of weights.

    Adam on ln N, on all layers of one shape at once. Gradient and steps are written out: that takes 1.2 s
    where torch.optim.Adam takes 2.0 (embedded lu2022).
    """
    by_shape: dict[torch.Size, list[int]] = {}
    for number, node in enumerate(nodes):
        by_shape.setdefault(node.float_weight().shape[:2], []).append(number)
    found: dict[int, Tensor] = {}
    for numbers in by_shape.values():
        rises = _descend([_Terms.of(nodes[i], sensitivities[i]) for i in numbers], share)
        found |= dict(zip(numbers, rises))
    return [found[number] for number in range(len(nodes))]


class _Terms(NamedTuple):
    """What the predicted noise of a layer is made of; float64."""

    scale: Tensor
    """(inputs,), as they are now."""

    largest: Tensor
    """(outputs, inputs): magnitudes of weights; float32."""

    of_inputs: Tensor
    """(inputs,): noise of rounding them, for each square of their scale."""

    energy: Tensor
    """(inputs,): their mean squares."""

    of_weights: Tensor
    """(outputs,): noise of rounding weights, for each square of (their largest magnitude times energy)."""

    limit: Tensor
    """(inputs,): how much ln N may rise. Symbols are exact up to a step of 1."""

    @classmethod
    def of(cls, node: QuantMAC, sensitivity: Sensitivity) -> "_Terms":
        grid, weight, curvature = node.input_grid, node.float_weight(), sensitivity.curvature
        scale = grid.parameters_of_grid()[0]
        power = (curvature[:, None] * kernel_power(node)).sum(0)
        return cls(
            scale,
            weight.abs().flatten(2).amax(2) if weight.ndim > 2 else weight.abs(),
            (power / grid.fine.double().square()).expand_as(scale) * (not grid.exact),
            grid.energy.double().expand_as(scale),
            curvature * taps(node) / int_range(node.config.w_bits)[1] ** 2,
            -torch.log(scale) if grid.exact else torch.full_like(scale, torch.inf),
        )


def _descend(terms: Sequence[_Terms], share: float) -> Tensor:
    """(layers, inputs): how much ln N rises, for layers of one shape."""
    scale_now, largest, of_inputs, energy, of_weights, limit = (torch.stack(part) for part in zip(*terms))
    rise = torch.zeros_like(scale_now)
    mean, square = torch.zeros_like(rise), torch.zeros_like(rise)
    best, lowest = rise.clone(), rise.new_full((len(rise), 1), torch.inf)
    product = torch.empty_like(largest)
    for step in range(STEPS):
        scale = scale_now * torch.exp(rise)
        inputs = scale.square() * of_inputs
        torch.mul(largest, scale.float()[:, None], out=product)
        top, at = product.max(2)
        outputs = of_weights * top.double().square()
        shares = energy / scale.square()
        of_outputs, of_shares = outputs.sum(1, True), shares.sum(1, True)
        noise = inputs.sum(1, True) + share * of_outputs * of_shares
        better = noise < lowest
        best, lowest = torch.where(better, rise, best), torch.where(better, noise, lowest)
        at_top = torch.zeros_like(rise).scatter_add_(1, at, outputs)
        gradient = 2 * (inputs + share * (at_top * of_shares - of_outputs * shares)) / noise
        mean.lerp_(gradient, 1 - _BETAS[0])
        square.lerp_(gradient.square(), 1 - _BETAS[1])
        size = 0.1 * (1 - step / STEPS) + 1e-3
        corrected = mean / (1 - _BETAS[0] ** (step + 1))
        root = (square / (1 - _BETAS[1] ** (step + 1))).sqrt_().add_(1e-8)
        rise = torch.minimum((rise - size * corrected / root).clamp_(min=0), limit)
    return best
