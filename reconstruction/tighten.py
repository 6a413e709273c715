"""Ranges of layers' inputs, and of stored tensors, that are made smaller where that lowers J.

A range that holds the harder crops of `stress` leaves a photograph half of the codes or less. With 8 bits
on every stored tensor that costs more than anything else (docs/bits-and-methods.md). So each tensor's range
is tried at 0.8 of itself, again and again, on the whole quantized codec. A smaller one stays where J of the
photographs falls and J of the harder crops and of flat pictures is not above what it was with all ranges as
they were observed.
"""

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from licq.quant import unchanged
from licq.quant.mac import QuantMAC
from licq.quant.model import QuantModel
from licq.reconstruction.expected import TIGHTENING
from licq.reconstruction.objective import Objective, mean_cost
from licq.reconstruction.sensitivity import Sensitivity, input_noise
from licq.reconstruction.state import StateFolder
from licq.reconstruction.stored_tensors import BetweenLayers, tensors_between_layers
from licq.support.progress import progress as progress_bar

FACTOR = 0.8
_MOST = 4  # times the factor
_LEAST_GAIN = 1e-5  # of J
_LEAST_NOISE = 3e-4  # predicted, of J: an input that costs less is left alone


@torch.no_grad()
def tighten_ranges(
    qmodel: QuantModel,
    photographs: Sequence[Tensor],
    harder: Sequence[Tensor],
    objective: Objective,
    sensitivities: dict[str, Sensitivity],
    state: StateFolder,
    progress: bool = True,
) -> dict:
    """Make ranges of an observed model smaller, in place.

    Latents keep theirs: their tails are heavy, and other images reach further. Weights are left as they
    are, for all channels of a tensor shrink alike.

    Args:
        photographs, harder: batches (B, 3, H, W) of crops, and of harder crops and flat pictures.
        sensitivities: of J.
        state: where the result is stored, and taken from when a killed calibration is repeated.

    Returns:
        {"j_before", "j_after": of the photographs, "ranges": {tensor: factor on its range}, "seconds"}.
    """
    stored = state.load("tightened")
    if stored is not None:
        outcome = stored[0]
        for tensor in tensors_between_layers(qmodel):
            for _ in range(round(math.log(outcome["ranges"].get(tensor.name, 1.0), FACTOR))):
                _shrink(tensor)
        return outcome
    started = time.monotonic()
    qmodel.quantize_nodes(True)
    with unchanged.everything():
        j = [mean_cost(qmodel, batches, objective) for batches in (photographs, harder)]
    before, most = j
    ranges: dict[str, float] = {}
    tensors = [
        tensor
        for tensor in tensors_between_layers(qmodel)
        if _can_shrink(tensor, qmodel) and _costs_enough(tensor, qmodel, sensitivities, before)
    ]
    for tensor in progress_bar(tensors, desc=TIGHTENING, unit="tensor", enabled=progress, leave=False):
        for _ in range(_MOST):
            start = _shrink(tensor)
            tried = [mean_cost(qmodel, photographs, objective)]
            if tried[0] < j[0] * (1 - _LEAST_GAIN):
                tried.append(mean_cost(qmodel, harder, objective))
            if len(tried) < 2 or tried[1] > most:
                tensor.grid.log_n.data = start
                break
            j[0] = tried[0]
            ranges[tensor.name] = ranges.get(tensor.name, 1.0) * FACTOR
    outcome = {"j_before": before, "j_after": j[0], "ranges": ranges, "seconds": time.monotonic() - started}
    qmodel.quantize_nodes(False)
    state.save("tightened", outcome, {})
    return outcome


def _shrink(tensor: BetweenLayers) -> Tensor:
    """Make the tensor's range `FACTOR` of itself; returns ln N as it was."""
    start = tensor.grid.log_n.data.clone()
    tensor.grid.log_n.data = start + torch.log(torch.as_tensor(FACTOR)).to(start)
    return start


def _can_shrink(tensor: BetweenLayers, qmodel: QuantModel) -> bool:
    grid = tensor.grid
    # what a GDN squares sets its norm alone: there rounding costs next to nothing, and clipping does
    of_norm = tensor.is_input and tensor.node.kind == "gdn"
    config = qmodel.config
    few = grid.bits <= max(config.a_bits, 8)  # what has more bits has codes to spare
    is_meant = grid.widens or config.strict_int8  # wide activations have their room on purpose
    return few and is_meant and not (grid.exact or grid.latent or of_norm)


def _costs_enough(
    tensor: BetweenLayers, qmodel: QuantModel, sensitivities: dict[str, Sensitivity], j: float
) -> bool:
    """Whether rounding is predicted to cost so much that trials pay.

    Of operands of attention's products and of what is stored between layers nothing is predicted. These are
    tried under `strict_int8` alone.
    """
    node = tensor.node
    if not tensor.is_input or node.name not in sensitivities:
        return qmodel.config.strict_int8
    assert isinstance(node, QuantMAC)
    return float(input_noise(node, sensitivities[node.name]).sum()) >= _LEAST_NOISE * j
