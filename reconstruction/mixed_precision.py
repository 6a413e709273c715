"""Bits for each layer: measured losses of J, and the allocation with the least of them under a budget, by
integer programming.

The rise of J is measured with one layer alone quantized, its weights or its inputs, at every candidate number
of bits, and taken as additive over layers and sides (HAWQ-V3, Yao et al. 2021, arXiv 2011.10680, whose losses
are predicted from the Hessian; fractional changes of the R-D loss of single layers also guide Hossain et al.
2025, arXiv 2506.01221). With that the choice is a multiple-choice knapsack problem, which a MILP solver
answers exactly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_array
from torch import Tensor, nn

from licq.quant.bits import Bits
from licq.quant.model import QuantModel
from licq.quant.modules import QuantMAC
from licq.quant.norms import SQUARED_BITS
from licq.reconstruction.analysis import Probe, Remember
from licq.reconstruction.api import Start, prepare
from licq.reconstruction.config import PtqConfig
from licq.reconstruction.objective import Objective
from licq.reconstruction.sensitivity import operations
from licq.support.errors import InputError
from licq.support.progress import progress as progress_bar

# -------------------------------------------------------------------------------------------------- measuring


def measure_layers(
    model: nn.Module,
    images: Tensor,
    config: PtqConfig,
    objective: Objective,
    w_choices: Sequence[int],
    a_choices: Sequence[int],
    remember: Remember,
    device: Any = None,
    progress: bool = True,
) -> list[Layer]:
    """The losses of every layer at every candidate.

    The codec is prepared as for learning (`reconstruction.api.prepare`: ranges, splitting, balance, GPTQ)
    with one number of bits of the weights in all layers, and the most of the inputs; each layer's weights
    alone are then whole numbers, and J is measured with all else in float. Inputs likewise. `falling` says
    what is made of them.
    """
    top = max(w_choices), max(a_choices)
    latest: dict[tuple[int, int], Probe] = {}

    def probe(w_bits: int, a_bits: int) -> Probe:
        if (w_bits, a_bits) not in latest:
            latest.clear()
            latest[w_bits, a_bits] = _probe(
                prepare(
                    model,
                    images,
                    with_bits(config, w_bits, a_bits),
                    objective,
                    device=device,
                    progress=progress,
                ),
                objective,
            )
        return latest[w_bits, a_bits]

    facts = remember("layers", lambda: _facts(probe(*top), a_choices))
    states = [
        (side, *pair)
        for side, choices in (("weights", w_choices), ("inputs", a_choices))
        for pair in [(b, top[1]) if side == "weights" else (top[0], b) for b in choices]
    ]
    states.sort(key=lambda state: (state[1:] != top, state))  # what is shared comes first
    found: dict[str, dict[str, dict[int, float]]] = {name: {"weights": {}, "inputs": {}} for name in facts}
    jobs = [
        (side, w, a, name)
        for side, w, a in states
        for name in facts
        if side == "weights" or a in _own(facts[name])
    ]
    for side, w, a, name in progress_bar(
        jobs, desc="measuring bits of layers", unit="layer", enabled=progress
    ):

        def rise() -> float:
            at = probe(w, a)
            return at.change(at.layer(name), side).j

        found[name][side][w if side == "weights" else a] = remember(
            f"{side} {w if side == 'weights' else a} {name}", rise
        )
    return [
        Layer(
            name,
            own["weights"],
            own["macs"],
            falling(found[name]["weights"]),
            falling(found[name]["inputs"]),
            _own(own),
            own["width_8"],
        )
        for name, own in facts.items()
    ]


def _own(facts: dict) -> dict[int, int]:
    """Candidates of the inputs and their widths; JSON makes text of keys."""
    return {int(bits): width for bits, width in facts["a_width"].items()}


def with_bits(config: PtqConfig, w_bits: int, a_bits: int) -> PtqConfig:
    return replace(config, quant=replace(config.quant, w_bits=w_bits, a_bits=a_bits))


def _probe(start: Start, objective: Objective) -> Probe:
    return Probe(start.qmodel, start.batches[: start.measured], objective)


def _facts(probe: Probe, a_choices: Sequence[int]) -> dict:
    """{layer: {"weights", "macs", "a_width", "width_8"}}; where the candidates make no difference the most
    stands for all."""
    macs, facts = macs_of_a_pixel(probe.qmodel, probe.batches[0]), {}
    for name, each in macs.items():
        node = probe.qmodel.nodes[name]
        widths = {bits: input_width(node, bits) for bits in a_choices}
        if len(set(widths.values())) == 1:
            widths = {max(widths): widths[max(widths)]}
        facts[name] = {
            "weights": node.float_weight().numel(),
            "macs": each,
            "a_width": widths,
            "width_8": input_width(node, 8),
        }
    return facts


@torch.no_grad()
def macs_of_a_pixel(qmodel: QuantModel, batch: Tensor) -> dict[str, float]:
    """Multiply-accumulate operations of each layer for a pixel of the image."""
    calls = [
        (name, call)
        for name, node in qmodel.nodes.items()
        if isinstance(node, QuantMAC)
        for call in range(node.calls)
    ]
    with qmodel.runtime.recording(calls) as record:
        qmodel(batch)
    macs: dict[str, float] = {}
    for (name, _), output in record.items():
        macs[name] = macs.get(name, 0.0) + operations(qmodel.nodes[name], output.q) / (
            batch.shape[-1] * batch.shape[-2]
        )
    return macs


def describe(qmodel: QuantModel, batch: Tensor) -> dict:
    """{"layers": `Bits` of every layer, "mean_bits", "megabytes", "relative_bops", "bops"} of a quantized
    codec."""
    macs = macs_of_a_pixel(qmodel, batch)
    nodes = {name: qmodel.nodes[name] for name in macs}
    bits = {
        name: {"w_bits": node.config.w_bits, "a_bits": node.config.a_bits} for name, node in nodes.items()
    }
    layers = [
        Layer(
            name,
            node.float_weight().numel(),
            macs[name],
            {node.config.w_bits: 0.0},
            {node.config.a_bits: 0.0},
            {node.config.a_bits: input_width(node, node.config.a_bits)},
            input_width(node, 8),
        )
        for name, node in nodes.items()
    ]
    facts = asdict(totals(layers, bits))
    del facts["loss"]
    return {"layers": bits} | facts


def input_width(node: QuantMAC, a_bits: int) -> int:
    """Bits of what the weights of an observed layer multiply when its inputs have a_bits."""
    bits = max(a_bits, node.config.latent_bits) if node.input_grid.latent else a_bits
    return 2 * min(bits, SQUARED_BITS) if node.input_power == 2 else bits


def falling(losses: Mapping[int, float]) -> dict[int, float]:
    """Measured losses by number of bits, made to fall with the bits and to stay above zero.

    A loss is at least that of every larger number of bits; and at least a tenth (`_BELIEF`) of what the noise
    model, 4^-b, makes of
    the loss at the fewest bits: a rise of J that is lost in the noise of the measurement is small, but more
    bits still buy something.
    """
    fewest, found, least = min(losses), {}, 0.0
    for bits in sorted(losses, reverse=True):
        found[bits] = least = max(least, losses[bits])
    worst = max(found[fewest], _SMALLEST)
    return {
        bits: max(found[bits], worst * (1.0 if bits == fewest else _BELIEF * 4.0 ** (fewest - bits)))
        for bits in sorted(losses)
    }


def start_loss(
    model: nn.Module,
    images: Tensor,
    config: PtqConfig,
    objective: Objective,
    bits: Bits,
    device: Any = None,
    progress: bool = True,
) -> dict[str, float]:
    """{"bpp": of the float codec, "j": its J, "loss": rise of J of the prepared codec with these bits}, on
    the measured crops."""
    probe = _probe(
        prepare(model, images, config, objective, bits=bits, device=device, progress=progress), objective
    )
    return {"bpp": probe.real.bpp, "j": probe.real.j, "loss": probe.all_units().j}
