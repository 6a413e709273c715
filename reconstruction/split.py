"""Channel splitting: a second digit for the input channels whose rounding costs most J.

Zhao et al. 2019 (Outlier Channel Splitting, arXiv 1901.09504) carry an outlier channel by two channels with
half its values each, which halves the step. Here the two are a high and a low digit, and their accumulators
are added with a shift, so that from 6 bits on the same operations make the step sixteen times smaller and the
range four times larger. The predicted rise of J (`reconstruction.sensitivity`) for each operation that is
added decides which channels are split.
"""

import torch
from torch import Tensor

from licq.quant.config import FLOAT_BITS
from licq.quant.fixedpoint import INT32
from licq.quant.mac import QuantMAC
from licq.quant.model import QuantModel
from licq.reconstruction.sensitivity import Sensitivity, input_noise

MAX_BITS = 8  # inputs of more bits have two digits already


@torch.no_grad()
def split_channels(
    qmodel: QuantModel, sensitivities: dict[str, Sensitivity], share: float, min_gain: float = 0.0
) -> dict:
    """Split input channels of an observed model, best gain for each operation first, until `share` more are
    needed or nothing gains enough.

    Left alone are exact inputs (pixels, integer symbols) and wide ones (latents), layers with one scale for
    all inputs, layers whose accumulators might pass 32 bits, and everything under `strict_int8`.

    Args:
        sensitivities: of J, or of another loss, for each layer.
        share: of multiply-accumulate operations that may be added, 0 to 1.
        min_gain: by how much a channel would have to lower the predicted rise of J (or of the other loss) if
            it added as many operations as the codec has.

    Returns:
        {"extra_macs": share of operations added, "layers": {name: share of the channels split}, "refused":
        [names of layers whose accumulators might pass 32 bits]}.
    """
    nodes = qmodel.layers
    macs = {name: sensitivity.macs for name, sensitivity in sensitivities.items()}
    total = sum(macs.values())
    noise = {
        name: input_noise(nodes[name], sensitivities[name]).tolist()
        for name in macs
        if _can_be_split(nodes[name])
    }
    refused: list[str] = []
    while True:
        chosen = _choose(noise, macs, share * total, min_gain / total if total else 0.0)
        beyond = [name for name, channels in chosen.items() if not _fits(nodes[name], channels)]
        if not beyond:
            break
        refused += beyond
        for name in chosen:  # choose anew: what the refused layers leave is for the others
            _split(nodes[name], torch.zeros_like(chosen[name]))
        noise = {name: values for name, values in noise.items() if name not in refused}
    layers = {name: float(channels.float().mean()) for name, channels in chosen.items()}
    return {
        "extra_macs": sum(part * macs[name] for name, part in layers.items()) / total if total else 0.0,
        "layers": layers,
        "refused": refused,
    }


def _can_be_split(node: QuantMAC) -> bool:
    grid, config = node.input_grid, node.config
    return not (
        grid.channel_dim is None
        or grid.exact
        or grid.bits > MAX_BITS
        or config.w_bits == FLOAT_BITS
        or config.strict_int8
    )


def _choose(
    noise: dict[str, list[float]], macs: dict[str, float], budget: float, min_gain: float
) -> dict[str, Tensor]:
    """Layers with the channels (bool) to be split, from the noise of each channel.

    budget: of operations. min_gain: noise that has to go for each operation.
    """
    chosen = {name: torch.zeros(len(values), dtype=torch.bool) for name, values in noise.items()}
    price = {name: macs[name] / len(values) for name, values in noise.items()}
    queue = [
        (-gain / price[name], name, channel)
        for name, values in noise.items()
        for channel, gain in enumerate(values)
        if gain > min_gain * price[name]
    ]
    for _, name, channel in sorted(queue):
        if price[name] <= budget:
            budget -= price[name]
            chosen[name][channel] = True
    return {name: channels for name, channels in chosen.items() if channels.any()}


def _split(node: QuantMAC, channels: Tensor) -> None:
    node.input_grid.split(channels)
    node.start_weights()


def _fits(node: QuantMAC, channels: Tensor) -> bool:
    """Split these channels; whether the accumulator stays inside half of 32 bits.

    The other half is for what follows: it changes the weights a little.
    """
    _split(node, channels)
    return bool(node.learned_bound() <= INT32 / 2)
