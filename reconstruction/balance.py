"""Input scales that share rounding noise between a layer's inputs and its weights where J rises least.

An input channel's scale may be larger than its range asks. Its values are then rounded more coarsely, but the
weights that take over the scale fill their codes better. Channels with large values stop setting the step of
all others' weights (Cross-Layer Equalization, Nagel et al. 2019; SmoothQuant, Xiao et al. 2022). Here this
happens within one layer, so the layer before stays as it is. Each channel's scale is found by descent on the
noise that `reconstruction.sensitivity` predicts.
"""

import torch
from torch import Tensor

from licq.quant.config import FLOAT_BITS
from licq.quant.fixedpoint import INT32, int_range
from licq.quant.mac import QuantMAC
from licq.quant.model import QuantModel
from licq.reconstruction.sensitivity import Sensitivity, input_noise, kernel_power, taps, weight_noise
from licq.support.progress import progress as progress_bar

STEPS = 200


@torch.no_grad()
def balance_scales(
    qmodel: QuantModel, sensitivities: dict[str, Sensitivity], share: float, progress: bool = True
) -> None:
    """Raise the scales of input channels of an observed model where that lowers the predicted rise of J.

    The accumulators still fit into int32. No scale becomes smaller: what `QuantConfig.transform` gave is also
    a layer's room for images that reach further than the calibration crops. Layers with groups, exact inputs
    or one scale for all inputs are left alone.

    Args:
        sensitivities: of J, or of another loss, for each layer.
        share: of the noise of weights rounded to nearest that their rounding will leave, 0 to 1.
    """
    nodes = qmodel.layers
    layers = {name: nodes[name] for name in sensitivities if _can_be_balanced(nodes[name])}
    for name, node in progress_bar(
        layers.items(), desc="balancing scales", unit="layer", enabled=progress, leave=False
    ):
        sensitivity, log_n = sensitivities[name], node.input_grid.log_n
        before, start = _noise(node, sensitivity, share), log_n.data.clone()
        log_n.data = _balanced(node, sensitivity, share).to(log_n)
        node.start_weights()
        if _noise(node, sensitivity, share) > before or node.learned_bound() > INT32:
            log_n.data = start
            node.start_weights()


def _can_be_balanced(node: QuantMAC) -> bool:
    grid, config = node.input_grid, node.config
    return (
        FLOAT_BITS not in (config.a_bits, config.w_bits)
        and grid.channel_dim is not None
        and not grid.exact
        and node.groups == 1
    )


def _noise(node: QuantMAC, sensitivity: Sensitivity, share: float) -> float:
    return float(input_noise(node, sensitivity).sum() + share * weight_noise(node, sensitivity).sum())


def _balanced(node: QuantMAC, sensitivity: Sensitivity, share: float) -> Tensor:
    """(inputs,): ln N of each channel with the lowest predicted noise, for maximum ranges of weights."""
    grid, weight, curvature = node.input_grid, node.float_weight(), sensitivity.curvature
    start = grid.log_n.double()
    scale_now = grid.parameters_of_grid()[0]
    largest = weight.abs().flatten(2).amax(2).double() if weight.ndim > 2 else weight.abs().double()
    of_inputs = (curvature[:, None] * kernel_power(node)).sum(0) / grid.fine.double().square()
    energy, qmax = grid.energy.double(), int_range(node.config.w_bits)[1]
    meeting = taps(node)
    rise = torch.zeros_like(start)
    best, lowest = rise.clone(), torch.inf
    optimizer = torch.optim.Adam([rise.requires_grad_(True)])
    with torch.enable_grad():
        for step in range(STEPS):
            scale = scale_now * torch.exp(rise)
            inputs = (scale.square() * of_inputs).sum()
            steps = (largest * scale).amax(1) / qmax
            weights = meeting * (curvature * steps.square()).sum() * (energy / scale.square()).sum()
            loss = torch.log(inputs + share * weights)
            if loss.item() < lowest:
                best, lowest = rise.detach().clone(), loss.item()
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / STEPS) + 1e-3
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rise.data.clamp_(min=0)
    return start + best
