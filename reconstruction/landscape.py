"""The landscape of J over the ranges of one layer: Fig. 2 of RDO-PTQ (arXiv 2211.02854)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from licq.quant.mac import QuantMAC
from licq.reconstruction.probe import Probe, Remember, quantized_alone
from licq.support.progress import progress as progress_bar

FACTORS = tuple(n / 50 for n in range(20, 61))  # N of a curve: 0.4 to 1.2
COARSE = tuple(n / 20 for n in range(10, 25))  # N of the plane: 0.5 to 1.2


@torch.no_grad()
def measure_landscape(probe: Probe, layer: str, remember: Remember, progress: bool = True) -> dict:
    """J, R, D and the layer's own error over the factor N of its ranges (eqs. 15 and 16), everything else in
    float.

    With the error of the weights as abscissa this is the paper's Fig. 2: where the error is least, J need not
    be. Weights are rounded to nearest here, so that N is all that changes. N = 1 is the range that the method
    starts from.

    Returns:
        {"layer", "weights": [point, ...], "inputs": [point, ...] or [], "plane": {"factors": [N, ...], "j":
        rows over N of the weights, columns over N of the inputs, "output_error": the same} or None}; a point
        is {"n", "j", "bpp", "weighted_distortion" (rises against float), "output_error": squared error of the
        layer's output over its mean square, "error": mean magnitude of the error of the weights over that of
        the weights (of "weights" alone)}.

    Raises:
        InputError: no such layer.
    """
    unit, node = probe.layer(layer), probe.qmodel.layers[layer]
    weight, reference = node.folded_weight()
    node.weight_quantizer.set_rounding("nearest", weight, node.min_scale(reference))
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
            error = {"error": _weight_error(node)} if side == "weights" else {}
            return {"n": n} | point(side) | error

    def row(n: float) -> list[dict]:
        points = []
        for other in COARSE:
            with stretched(node, n, other):
                points.append(point("both"))
        return points

    total = len(FACTORS) * len(sides) + (len(COARSE) ** 2 if len(sides) == 2 else 0)
    with progress_bar(total=total, desc=f"landscape of {layer}", unit="point", enabled=progress) as bar:

        def step(name: str, compute: Callable[[], Any]) -> Any:
            value = remember(f"landscape {layer} {name}", compute)
            bar.update(len(value) if isinstance(value, list) else 1)
            return value

        curves = {side: [step(f"{side} {n}", partial(curve, side, n)) for n in FACTORS] for side in sides}
        rows = [step(f"plane {n}", partial(row, n)) for n in COARSE] if len(sides) == 2 else None
    plane = rows and {
        "factors": list(COARSE),
        **{key: [[p[key] for p in line] for line in rows] for key in ("j", "output_error")},
    }
    return {"layer": layer, "weights": curves["weights"], "inputs": curves.get("inputs", []), "plane": plane}


@contextmanager
def stretched(node: QuantMAC, weights: float = 1.0, inputs: float = 1.0) -> Iterator[None]:
    """While it lasts the ranges of a layer's weights and inputs are multiplied with these factors."""
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
