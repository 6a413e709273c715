"""Channel splitting: a second digit for the input channels whose rounding costs most J.

Zhao et al. 2019 (Outlier Channel Splitting, arXiv 1901.09504) carry an outlier channel by two channels with half its values
each, which halves the step. Here the two are a high and a low digit, and their accumulators are added with a shift, so that
the same operations make the step sixteen times smaller and the range four times larger. Which channels, is decided by
the predicted rise of J (`reconstruction.sensitivity`) for each operation that is added; those are also the ones whose
clipping would cost most.
"""

import torch

from quant.config import FLOAT_BITS
from quant.model import QuantModel
from quant.modules import LARGEST_ACCUMULATOR
from reconstruction.sensitivity import Sensitivity, input_noise

MOST_BITS = 8  # inputs of more bits have two digits as it is


@torch.no_grad()
def split_channels(qmodel: QuantModel, sensitivities: dict[str, Sensitivity], share: float) -> dict:
    """Split input channels of an observed model, best gain for each operation first, until `share` more are needed.

    Exact inputs (pixels, whole symbols) and wide ones (latents) are left alone, so are layers with one scale for all inputs,
    layers whose accumulators might pass 32 bits, and everything under `strict_int8`.

    Returns:
        {"extra_macs": share of operations added, "layers": {name: share of the channels split}}.
    """
    total = sum(sensitivity.macs for sensitivity in sensitivities.values())
    budget = share * total
    chosen, queue = {}, []
    for name, sensitivity in sensitivities.items():
        node = qmodel.nodes[name]
        grid = node.input_grid
        if grid.channel_dim is None or grid.exact or grid.bits > MOST_BITS or node.config.w_bits == FLOAT_BITS or node.config.strict_int8:
            continue
        noise = input_noise(node, sensitivity)
        price = sensitivity.macs / len(noise)
        chosen[name] = torch.zeros(len(noise), dtype=torch.bool)
        queue += [(-gain / price, name, channel, price) for channel, gain in enumerate(noise.tolist())]
    for _, name, channel, price in sorted(queue):
        if price <= budget:
            budget -= price
            chosen[name][channel] = True
    facts = {"extra_macs": 0.0, "layers": {}}
    for name, channels in chosen.items():
        if not channels.any():
            continue
        node = qmodel.nodes[name]
        node.input_grid.split(channels)
        node.start_weights()
        w_int, out_scale = node.integer_weight()
        if node.accumulator_bound(w_int, node.integer_bias(out_scale)) > LARGEST_ACCUMULATOR:
            node.input_grid.split(torch.zeros_like(channels))
            node.start_weights()
            continue
        facts["layers"][name] = float(channels.float().mean())
        facts["extra_macs"] += facts["layers"][name] * sensitivities[name].macs / total
    return facts
