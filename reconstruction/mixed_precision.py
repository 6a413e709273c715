"""Bits for each layer: the rise of J with one layer alone quantized, at every candidate number of bits.

`reconstruction.allocation` chooses among the candidates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from licq.quant.bits import Bits
from licq.quant.mac import QuantMAC
from licq.quant.model import QuantModel
from licq.quant.norms import SQUARED_BITS
from licq.reconstruction.allocation import Budget, Layer, allocate, allocate_by_threshold, totals
from licq.reconstruction.api import prepare_calibration
from licq.reconstruction.calibration import Calibration
from licq.reconstruction.config import PtqConfig
from licq.reconstruction.objective import Objective
from licq.reconstruction.probe import Probe, Remember
from licq.reconstruction.sensitivity import operations
from licq.support.progress import progress as progress_bar

__all__ = [  # with what `allocation` does with the measured layers
    "Budget",
    "Layer",
    "allocate",
    "allocate_by_threshold",
    "describe",
    "falling",
    "input_width",
    "macs_of_a_pixel",
    "measure_layers",
    "start_loss",
    "totals",
    "with_bits",
]

_BELIEF = 0.1  # see `falling`
_SMALLEST = 1e-9  # bits per pixel


def measure_layers(
    model: nn.Module,
    images: Tensor,
    config: PtqConfig,
    objective: Objective,
    w_choices: Sequence[int],
    a_choices: Sequence[int],
    remember: Remember,
    device: Any = None,
    whole: Sequence[Tensor] = (),
    progress: bool = True,
) -> list[Layer]:
    """The losses of every layer at every candidate.

    The codec is prepared as for learning (`reconstruction.api.prepare_calibration`: ranges, splitting,
    balance, GPTQ) with one number of bits of the weights in all layers, and the most of the inputs. Each
    layer's weights alone are then integers, and J is measured with all else in float. Inputs likewise.
    `falling` says what is made of them.

    Args:
        images: crops (n, 3, H, W) in 0..1.
        whole: their images, as `quantize` takes them.
        w_choices, a_choices: candidates, numbers of bits of weights and of inputs.
        remember: keeps every measurement, for a process that is repeated.
    """
    top = max(w_choices), max(a_choices)
    latest: dict[tuple[int, int], Probe] = {}

    def probe(w_bits: int, a_bits: int) -> Probe:
        if (w_bits, a_bits) not in latest:
            latest.clear()
            prepared = prepare_calibration(
                model,
                images,
                with_bits(config, w_bits, a_bits),
                objective,
                device=device,
                whole=whole,
                progress=progress,
            )
            latest[w_bits, a_bits] = probe_of(prepared)
        return latest[w_bits, a_bits]

    def rise(name: str, side: str, w_bits: int, a_bits: int) -> float:
        prepared = probe(w_bits, a_bits)
        return prepared.change(prepared.layer(name), side).j

    sizes = remember("layers", lambda: _sizes(probe(*top), a_choices))
    states = [
        (side, *pair)
        for side, choices in (("weights", w_choices), ("inputs", a_choices))
        for pair in [(b, top[1]) if side == "weights" else (top[0], b) for b in choices]
    ]
    states.sort(key=lambda state: (state[1:] != top, state))  # what is shared comes first
    losses: dict[str, dict[str, dict[int, float]]] = {name: {"weights": {}, "inputs": {}} for name in sizes}
    jobs = [
        (side, w, a, name)
        for side, w, a in states
        for name in sizes
        if side == "weights" or a in _input_widths(sizes[name])
    ]
    for side, w, a, name in progress_bar(
        jobs, desc="measuring bits of layers", unit="layer", enabled=progress
    ):
        bits = w if side == "weights" else a
        losses[name][side][bits] = remember(f"{side} {bits} {name}", partial(rise, name, side, w, a))
    return [
        Layer(
            name,
            size["weights"],
            size["macs"],
            falling(losses[name]["weights"]),
            falling(losses[name]["inputs"]),
            _input_widths(size),
            size["width_8"],
        )
        for name, size in sizes.items()
    ]


def with_bits(config: PtqConfig, w_bits: int, a_bits: int) -> PtqConfig:
    """The same method with other bits."""
    return replace(config, quant=replace(config.quant, w_bits=w_bits, a_bits=a_bits))


def probe_of(calibration: Calibration) -> Probe:
    """A probe of the prepared codec, on the crops that J is measured on."""
    return Probe(calibration.qmodel, calibration.measured_batches, calibration.objective)


def _sizes(probe: Probe, a_choices: Sequence[int]) -> dict:
    """{layer: {"weights", "macs", "a_width", "width_8"}}, the fields of `Layer`.

    Where the candidates of the inputs make no difference, the largest stands for all.
    """
    macs, sizes = macs_of_a_pixel(probe.qmodel, probe.batches[0]), {}
    nodes = probe.qmodel.layers
    for name, layer_macs in macs.items():
        node = nodes[name]
        widths = {bits: input_width(node, bits) for bits in a_choices}
        if len(set(widths.values())) == 1:
            widths = {max(widths): widths[max(widths)]}
        sizes[name] = {
            "weights": node.float_weight().numel(),
            "macs": layer_macs,
            "a_width": widths,
            "width_8": input_width(node, 8),
        }
    return sizes


def _input_widths(size: dict) -> dict[int, int]:
    """`Layer.a_width` of an entry of `_sizes`; JSON has made text of its keys."""
    return {int(bits): width for bits, width in size["a_width"].items()}


@torch.no_grad()
def macs_of_a_pixel(qmodel: QuantModel, batch: Tensor) -> dict[str, float]:
    """Multiply-accumulate operations of each layer for a pixel of the image."""
    nodes = {name: node for name, node in qmodel.nodes.items() if isinstance(node, QuantMAC)}
    calls = [(name, call) for name, node in nodes.items() for call in range(node.calls)]
    with qmodel.runtime.recording(calls) as record:
        qmodel(batch)
    macs: dict[str, float] = {}
    for (name, _), output in record.items():
        macs[name] = macs.get(name, 0.0) + operations(nodes[name], output.q) / (
            batch.shape[-1] * batch.shape[-2]
        )
    return macs


def describe(qmodel: QuantModel, batch: Tensor) -> dict:
    """What the layers of a quantized codec have and cost.

    Returns:
        {"layers": `Bits` of every layer, "mean_bits", "megabytes", "relative_bops", "bops"}; the last four as
        in `allocation.Budget`.
    """
    macs = macs_of_a_pixel(qmodel, batch)
    nodes = {name: qmodel.layers[name] for name in macs}
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
    costs = asdict(totals(layers, bits))
    del costs["loss"]
    return {"layers": bits} | costs


def input_width(node: QuantMAC, a_bits: int) -> int:
    """Bits of what the weights of an observed layer multiply when its inputs have a_bits."""
    bits = max(a_bits, node.config.latent_bits) if node.input_grid.latent else a_bits
    return 2 * min(bits, SQUARED_BITS) if node.input_power == 2 else bits


def falling(losses: Mapping[int, float]) -> dict[int, float]:
    """Measured losses by number of bits, made to fall with the bits and to stay above zero.

    A loss is at least that of every larger number of bits. It is also at least a tenth (`_BELIEF`) of what
    the noise model, 4^-b, makes of the loss at the fewest bits: a rise of J that is lost in the noise of the
    measurement is small, but more bits still buy something.
    """
    fewest, lowered, highest = min(losses), {}, 0.0
    for bits in sorted(losses, reverse=True):
        lowered[bits] = highest = max(highest, losses[bits])
    worst = max(lowered[fewest], _SMALLEST)
    return {
        bits: max(lowered[bits], worst * (1.0 if bits == fewest else _BELIEF * 4.0 ** (fewest - bits)))
        for bits in sorted(losses)
    }


def start_loss(
    model: nn.Module,
    images: Tensor,
    config: PtqConfig,
    objective: Objective,
    bits: Bits,
    device: Any = None,
    whole: Sequence[Tensor] = (),
    progress: bool = True,
) -> dict[str, float]:
    """Rate and J before learning, means over the measured crops, in bits per pixel.

    Returns:
        {"bpp": of the float codec, "j": its J, "loss": rise of J of the prepared codec with these bits}.
    """
    prepared = prepare_calibration(
        model, images, config, objective, bits=bits, device=device, whole=whole, progress=progress
    )
    probe = probe_of(prepared)
    return {"bpp": probe.real.bpp, "j": probe.real.j, "loss": probe.all_units().j}
