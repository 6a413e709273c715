"""Where a quantized codec loses: each part quantized alone, ranges of channels, and the landscape of J at one
layer.

Everything is measured by running the codec, on the codec as learning would find it
(`reconstruction.api.prepare`). What comes before a part is float, so its outputs are computed once for each
batch (`PrefixCache`) and a measurement runs the rest only.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from licq.quant.model import QuantModel
from licq.quant.modules import PLAIN_LAYERS, QuantMAC
from licq.quant.qtensor import QTensor
from licq.quant.runtime import Call
from licq.reconstruction.cache import PrefixCache
from licq.reconstruction.objective import Objective, rate
from licq.reconstruction.sensitivity import Sensitivity, predicted_losses
from licq.reconstruction.targets import tensor_of
from licq.reconstruction.units import Trace, Unit, find_units
from licq.support.errors import InputError
from licq.support.progress import progress as progress_bar

SIDES = ("weights", "inputs", "both")
PERCENTILE = 0.999
_SAMPLES = 4096  # values kept of each channel for the percentile
FACTORS = tuple(n / 50 for n in range(20, 61))  # N of a curve of the landscape: 0.4 to 1.2
COARSE = tuple(n / 20 for n in range(10, 25))  # N of its plane: 0.5 to 1.2

def measure_units(
    probe: Probe, sensitivities: dict[str, Sensitivity], kind: str, remember: Remember, progress: bool = True
) -> dict:
    """What each unit of a kind costs alone, beside what `reconstruction.sensitivity` predicts for its
    rounding noise.

    Returns:
        {unit: {"weights" | "inputs" | "both": {"j", "bpp", "weighted_distortion"}, "predicted": {"weights",
        "inputs"}}}, rises of the means over the crops against the float codec. The prediction knows
        convolutions and linear layers, as rounded to nearest and without clipping; None where a unit has
        none.
    """
    predicted = predicted_losses(probe.qmodel, sensitivities)
    found: dict = {}
    for unit in progress_bar(
        probe.units(kind), desc=f"quantizing each {kind} alone", unit=kind, enabled=progress
    ):
        name = (
            unit.name if unit.name not in found else f"{unit.name} from {unit.start[0]}"
        )  # a stage may come in two parts
        known = [predicted[node] for node in unit.nodes if node in predicted]
        rises = remember(f"{kind} {name}", lambda: {side: asdict(probe.change(unit, side)) for side in SIDES})
        found[name] = rises | {
            "predicted": {side: sum(part[side] for part in known) for side in ("weights", "inputs")}
            if known
            else None
        }
    return found


# ----------------------------------------------------------------------------------------- ranges of channels


def channel_facts(values: Tensor) -> dict[str, list[float]]:
    """Of rows (channels, values): the largest magnitude "max", the 99.9th percentile of magnitudes "p999",
    "rms"."""
    tail = torch.quantile(values.abs().double(), PERCENTILE, dim=1)
    return {
        "max": values.abs().amax(1).tolist(),
        "p999": tail.tolist(),
        "rms": values.double().square().mean(1).sqrt().tolist(),
    }


@torch.no_grad()
def measure_channels(probe: Probe, progress: bool = True) -> dict:
    """Of every layer, on the float codec: {layer: {"weights": facts of each output channel, "inputs": of each
    input channel}}.

    Facts: see `channel_facts`. Inputs are those that the layer multiplies: magnitudes at a GDN, before they
    are squared.
    """
    qmodel = probe.qmodel
    layers = {unit.name: qmodel.nodes[unit.name] for unit in probe.layers()}
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
        self.dim, self.most = node.channel_dim, samples
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
        self.samples.append(rows[:, :: -(-rows.shape[1] // self.most)].clone())

    def facts(self) -> dict[str, list[float]]:
        tail = torch.quantile(torch.cat(self.samples, 1).double(), PERCENTILE, dim=1)
        return {
            "max": self.largest.tolist(),
            "p999": tail.tolist(),
            "rms": (self.squares / self.count).sqrt().tolist(),
        }


# ---------------------------------------------------------------------------------------------- the landscape


@torch.no_grad()
def measure_landscape(probe: Probe, layer: str, remember: Remember, progress: bool = True) -> dict:
    """J, R, D and the layer's own error over the factor N of its ranges (eqs. 15 and 16), everything else in
    float.

    With the error of the weights as abscissa this is the paper's Fig. 2 (arXiv 2211.02854): where the error
    is least, J need not be. Weights are rounded to nearest here, so that N is all that changes. N = 1 is the
    range that the method starts from.

    Returns:
        {"layer", "weights": [point, ...], "inputs": [point, ...] or [], "plane": {"factors": [N, ...], "j":
        rows over N of the weights, columns over N of the inputs, "output_error": the same} or None}; a point
        is {"n", "j", "bpp", "weighted_distortion" (rises against float), "output_error": squared error of the
        layer's output over its mean square, "error": mean magnitude of the error of the weights over that of
        the weights (of "weights" alone)}.

    Raises:
        InputError: no such layer.
    """
    unit, node = probe.layer(layer), probe.qmodel.nodes[layer]
    weight, reference = node.folded_weight()
    node.weight_quantizer.set_rounding("nearest", weight, node.least_scale(reference))
    sides = ["weights"] + ([] if node.input_grid.exact else ["inputs"])
    real = probe.outputs(unit)

    def point(side: str) -> dict:
        with quantized_alone(probe.qmodel, unit, side):
            ours = probe.outputs(unit)
        error = sum(float((a - b).double().square().sum()) for a, b in zip(ours, real)) / sum(
            float(b.double().square().sum()) for b in real
        )
        return asdict(probe.change(unit, side)) | {"output_error": error}

    def curve(side: str, n: float) -> dict:
        with stretched(node, **{side: n}):
            own = {"error": _weight_error(node)} if side == "weights" else {}
            return {"n": n} | point(side) | own

    def row(n: float) -> list[dict]:
        found = []
        for other in COARSE:
            with stretched(node, n, other):
                found.append(point("both"))
        return found

    total = len(FACTORS) * len(sides) + (len(COARSE) ** 2 if len(sides) == 2 else 0)
    with progress_bar(total=total, desc=f"landscape of {layer}", unit="point", enabled=progress) as bar:

        def step(name: str, compute: Callable[[], Any]) -> Any:
            value = remember(f"landscape {layer} {name}", compute)
            bar.update(len(value) if isinstance(value, list) else 1)
            return value

        curves = {side: [step(f"{side} {n}", lambda: curve(side, n)) for n in FACTORS] for side in sides}
        rows = [step(f"plane {n}", lambda: row(n)) for n in COARSE] if len(sides) == 2 else None
    plane = rows and {
        "factors": list(COARSE),
        **{key: [[p[key] for p in line] for line in rows] for key in ("j", "output_error")},
    }
    return {"layer": layer, "weights": curves["weights"], "inputs": curves.get("inputs", []), "plane": plane}


@contextmanager
def stretched(node: QuantMAC, weights: float = 1.0, inputs: float = 1.0) -> Iterator[None]:
    """The ranges of a layer's weights and inputs times these factors."""
    parameters = [(node.weight_quantizer.log_n, weights), (node.input_grid.log_n, inputs)]
    before = [parameter.data.clone() for parameter, _ in parameters]
    try:
        for parameter, factor in parameters:
            parameter.data.add_(torch.log(torch.as_tensor(factor, dtype=torch.float64)).to(parameter))
        yield
    finally:
        for (parameter, _), value in zip(parameters, before):
            parameter.data.copy_(value)


def _weight_error(node: QuantMAC) -> float:
    real = node.float_weight()
    return float((node.rounded_weight() - real).abs().mean() / real.abs().mean().clamp(min=1e-12))


def analyze(
    probe: Probe,
    sensitivities: dict[str, Sensitivity],
    kind: str,
    landscape: str | None,
    remember: Remember,
    progress: bool = True,
) -> dict:
    """All of it. `landscape`: the layer; None: the plain layer that costs most by itself.

    Returns:
        {"float": Cost, "all": rise with everything quantized, "unit": kind, "layers": `measure_units` of
        layers, "units": of `kind`, "channels": `measure_channels`, "landscape": `measure_landscape`}.
    """
    if landscape is not None:
        probe.layer(landscape)
    channels = measure_channels(probe, progress)
    every = remember("all", lambda: asdict(probe.all_units()))
    layers = measure_units(probe, sensitivities, "layer", remember, progress)
    units = layers if kind == "layer" else measure_units(probe, sensitivities, kind, remember, progress)
    if landscape is None:
        plain = [name for name in layers if isinstance(probe.qmodel.nodes[name], PLAIN_LAYERS)]
        landscape = max(plain, key=lambda name: layers[name]["both"]["j"])
    return {
        "float": asdict(probe.real),
        "all": every,
        "unit": kind,
        "layers": layers,
        "units": units,
        "channels": channels,
        "landscape": measure_landscape(probe, landscape, remember, progress),
    }
