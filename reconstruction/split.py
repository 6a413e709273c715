"""Channel splitting: more steps for the input channels whose rounding costs most J.

Zhao et al. 2019 (Outlier Channel Splitting) carry an outlier channel by two channels with the same weights and half the
values. Here any channel may be split, m copies of b bits count m (2^b - 1) steps, so its rounding noise falls by m^2; which
ones, is decided by the predicted rise of J (`reconstruction.sensitivity`) for each operation that is added.
"""

import heapq

import torch

from quant.config import FLOAT_BITS
from quant.model import QuantModel
from reconstruction.sensitivity import Sensitivity, input_noise

MOST_COPIES = 8


@torch.no_grad()
def split_channels(qmodel: QuantModel, sensitivities: dict[str, Sensitivity], share: float) -> dict:
    """Split input channels of an observed model, best gain for each operation first, until `share` more are needed.

    Exact inputs (pixels, whole symbols) and wide ones (latents) are left alone, so are layers with one scale for all inputs.

    Returns:
        {"extra_macs": share of operations added, "layers": {name: channels after / before}}.
    """
    total = sum(sensitivity.macs for sensitivity in sensitivities.values())
    budget = share * total
    copies, noise, price, queue = {}, {}, {}, []
    for name, sensitivity in sensitivities.items():
        node = qmodel.nodes[name]
        grid = node.input_grid
        if share <= 0 or grid.channel_dim is None or grid.exact or grid.latent or FLOAT_BITS in (node.config.w_bits, node.config.a_bits):
            continue
        noise[name] = input_noise(node, sensitivity).tolist()
        copies[name] = [1] * len(noise[name])
        price[name] = sensitivity.macs / len(noise[name])
        queue += [(-_gain(value, 1) / price[name], name, channel) for channel, value in enumerate(noise[name])]
    heapq.heapify(queue)
    while queue:
        _, name, channel = heapq.heappop(queue)
        if price[name] > budget:
            continue
        budget -= price[name]
        copies[name][channel] += 1
        if copies[name][channel] < MOST_COPIES:
            gain = _gain(noise[name][channel], copies[name][channel])
            heapq.heappush(queue, (-gain / price[name], name, channel))
    growth = {}
    for name, numbers in copies.items():
        if max(numbers) > 1:
            node = qmodel.nodes[name]
            node.input_grid.copies = torch.tensor(numbers).to(node.input_grid.low)
            node.initialize_weights()
            growth[name] = sum(numbers) / len(numbers)
    extra = sum((factor - 1) * sensitivities[name].macs for name, factor in growth.items())
    return {"extra_macs": extra / total if total else 0.0, "layers": growth}


def _gain(noise: float, copies: int) -> float:
    """How much the noise falls with one copy more, from `noise` at one copy."""
    return noise * (1 / copies**2 - 1 / (copies + 1) ** 2)
