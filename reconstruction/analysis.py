"""Where a quantized codec loses: each part quantized alone, and the ranges of channels.

Everything is measured by running the codec, prepared as for learning
(`reconstruction.api.prepare_calibration`).
"""

from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from licq.quant.layers import PLAIN_LAYERS
from licq.quant.mac import QuantMAC
from licq.quant.qtensor import QTensor
from licq.reconstruction.landscape import measure_landscape
from licq.reconstruction.probe import SIDES, Probe, Remember
from licq.reconstruction.sensitivity import Sensitivity, predicted_losses
from licq.reconstruction.stored_tensors import measure_stored
from licq.reconstruction.units import Unit
from licq.support.progress import progress as progress_bar

PERCENTILE = 0.999
_SAMPLES = 4096  # values of each channel for the percentile


def analyze(
    probe: Probe,
    sensitivities: dict[str, Sensitivity],
    kind: str,
    landscape: str | None,
    remember: Remember,
    progress: bool = True,
) -> dict:
    """All of it.

    Args:
        probe: of a prepared codec.
        sensitivities: of J.
        kind: of units, one of `config.UNITS`.
        landscape: the layer of `measure_landscape`; None: the plain layer that costs most by itself.
        remember: keeps every measurement, for a process that is repeated.

    Returns:
        {"float": Cost, "all": rise with everything quantized, "unit": kind, "layers": `measure_units` of
        layers, "units": of `kind`, "stored": `measure_stored`, "channels": `measure_channels`,
        "landscape": `measure_landscape`}.

    Raises:
        InputError: no such layer.
    """
    if landscape is not None:
        probe.layer(landscape)
    channels = measure_channels(probe, progress)
    every = remember("all", lambda: asdict(probe.all_units()))
    layers = measure_units(probe, sensitivities, "layer", remember, progress)
    units = layers if kind == "layer" else measure_units(probe, sensitivities, kind, remember, progress)
    if landscape is None:
        plain = (name for name in layers if isinstance(probe.qmodel.nodes[name], PLAIN_LAYERS))
        landscape = str(max(plain, key=lambda name: layers[name]["both"]["j"]))
    return {
        "float": asdict(probe.real),
        "all": every,
        "unit": kind,
        "layers": layers,
        "units": units,
        "stored": measure_stored(probe, layers, remember, progress),
        "channels": channels,
        "landscape": measure_landscape(probe, landscape, remember, progress),
    }


def measure_units(
    probe: Probe, sensitivities: dict[str, Sensitivity], kind: str, remember: Remember, progress: bool = True
) -> dict:
    """What each unit of a kind costs alone, beside what `reconstruction.sensitivity` predicts for its
    rounding noise.

    Returns:
        {unit: {"weights" | "inputs" | "both": {"j", "bpp", "weighted_distortion"}, "predicted": {"weights",
        "inputs"}}}, rises of the means over the crops against the float codec. The prediction knows
        convolutions and linear layers, as rounded to nearest and without clipping; it is None for a unit
        without such layers.
    """
    predicted = predicted_losses(probe.qmodel, sensitivities)
    costs: dict = {}
    for unit in progress_bar(
        probe.units(kind), desc=f"quantizing each {kind} alone", unit=kind, enabled=progress
    ):
        # a stage may come in two parts
        name = unit.name if unit.name not in costs else f"{unit.name} from {unit.start[0]}"
        noises = [predicted[node] for node in unit.nodes if node in predicted]
        rises = remember(f"{kind} {name}", partial(_rises, probe, unit))
        costs[name] = rises | {
            "predicted": {side: sum(noise[side] for noise in noises) for side in ("weights", "inputs")}
            if noises
            else None
        }
    return costs


def _rises(probe: Probe, unit: Unit) -> dict[str, dict[str, float]]:
    return {side: asdict(probe.change(unit, side)) for side in SIDES}


# ----------------------------------------------------------------------------------------- ranges of channels


def channel_facts(values: Tensor) -> dict[str, list[float]]:
    """Magnitudes in each row of (channels, values): largest "max", the 99.9th percentile "p999", "rms"."""
    tail = torch.quantile(values.abs().double(), PERCENTILE, dim=1)
    return {
        "max": values.abs().amax(1).tolist(),
        "p999": tail.tolist(),
        "rms": values.double().square().mean(1).sqrt().tolist(),
    }


@torch.no_grad()
def measure_channels(probe: Probe, progress: bool = True) -> dict:
    """Ranges of the channels of every layer, on the float codec.

    Returns:
        {layer: {"weights": `channel_facts` of the output channels, "inputs": of the input channels}}. Inputs
        are those that the layer multiplies: magnitudes at a GDN, before they are squared.
    """
    qmodel = probe.qmodel
    layers = {unit.name: qmodel.layers[unit.name] for unit in probe.layers()}
    watches = {name: _Watch(node, -(-_SAMPLES // len(probe.batches))) for name, node in layers.items()}
    hooks = [node.register_forward_pre_hook(watches[name]) for name, node in layers.items()]
    try:
        for batch in progress_bar(
            probe.batches, desc="watching channels", unit="batch", enabled=progress, leave=False
        ):
            qmodel(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        name: {"weights": channel_facts(node.float_weight().flatten(1)), "inputs": watches[name].facts()}
        for name, node in layers.items()
    }


class _Watch:
    """A forward pre-hook: per input channel the largest magnitude, the sum of squares, and samples at even
    distances."""

    def __init__(self, node: QuantMAC, samples: int):
        self.dim, self.limit = node.channel_dim, samples
        self.largest: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0
        self.count = 0
        self.samples: list[Tensor] = []

    def __call__(self, _, inputs: tuple) -> None:
        x = inputs[0].real() if isinstance(inputs[0], QTensor) else inputs[0]
        rows = x.movedim(self.dim, 0).reshape(x.shape[self.dim], -1).abs()
        self.largest = torch.maximum(rows.amax(1), torch.as_tensor(self.largest, device=rows.device))
        self.squares = self.squares + rows.double().square().sum(1)
        self.count += rows.shape[1]
        self.samples.append(rows[:, :: -(-rows.shape[1] // self.limit)].clone())

    def facts(self) -> dict[str, list[float]]:
        """As `channel_facts`; the percentile is that of the samples."""
        tail = torch.quantile(torch.cat(self.samples, 1).double(), PERCENTILE, dim=1)
        return {
            "max": torch.as_tensor(self.largest).tolist(),
            "p999": tail.tolist(),
            "rms": torch.as_tensor(self.squares / self.count).sqrt().tolist(),
        }
