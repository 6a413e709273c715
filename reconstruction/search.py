"""Ranges searched on the codec's own J, without gradients: LAPQ (Nahshan et al. 2021, arXiv 1911.07190).

First the norm: for each of a few p, every range is the one with the smallest mean |x - x_hat|^p, and J is
measured. A parabola through these says which p to start from. Then Powell's method moves one factor for each
layer's weights and one for its inputs, all on J.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.optimize import OptimizeResult, minimize
from torch import Tensor

from licq.quant.config import QuantConfig
from licq.quant.mac import QuantMAC
from licq.quant.model import QuantModel
from licq.reconstruction.objective import Objective, mean_cost
from licq.reconstruction.state import StateFolder
from licq.support.progress import progress as progress_bar

NORMS = (2.0, 2.5, 3.0, 3.5, 4.0)
_WIDEST, _NARROWEST = 0.3, -1.6  # of ln of a factor
_SAVE_EVERY = 20  # measurements


def best_norm(
    config: QuantConfig, cost_of: Callable[[QuantConfig], float], state: StateFolder, progress: bool = True
) -> tuple[QuantConfig, dict]:
    """The norm whose ranges give the lowest J.

    Args:
        config: the settings; their ranges are replaced.
        cost_of: J of a codec that was observed with a config.
        state: where every J is stored, and taken from when a killed search is repeated.

    Returns:
        (config with the ranges of the best norm, {"costs": {p: J}, "p": the one taken}).
    """
    stored = state.load("norms")
    costs = dict(stored[0]["costs"]) if stored else {}
    for p in progress_bar(
        NORMS, desc="searching the norm of ranges", unit="norm", enabled=progress, leave=False
    ):
        if f"{p:g}" not in costs:
            costs[f"{p:g}"] = cost_of(_with_norm(config, p))
            state.save("norms", {"costs": costs}, {})
    p = vertex(NORMS, [costs[f"{p:g}"] for p in NORMS])
    return _with_norm(config, p), {"costs": costs, "p": p}


def _with_norm(config: QuantConfig, p: float) -> QuantConfig:
    return dataclasses.replace(config, w_range=f"lp{p:.4f}", a_range=f"lp{p:.4f}")


def vertex(positions: Sequence[float], values: Sequence[float]) -> float:
    """The position of the minimum of a parabola fitted to the values.

    The position of the smallest value, where the parabola opens downwards or its minimum lies outside.
    """
    a, b, _ = np.polyfit(positions, values, 2)
    minimum = -b / (2 * a) if a > 0 else float("nan")
    if min(positions) <= minimum <= max(positions):
        return float(minimum)
    return float(positions[int(np.argmin(values))])


class _Exhausted(Exception):
    """J has been measured as often as it may be."""


@torch.no_grad()
def search_ranges(
    qmodel: QuantModel,
    batches: Sequence[Tensor],
    objective: Objective,
    evaluations: int,
    state: StateFolder,
    progress: bool = True,
) -> dict:
    """Powell's method over ln of one factor for the weights and one for the inputs of every layer.

    The ranges end at the best point that was met. Every measurement is written to `state`, and read from
    there when a killed search is repeated.

    Args:
        batches: crops, (B, 3, H, W) each, that J is measured on.
        evaluations: how often J may be measured.

    Returns:
        {"j_before", "j_after", "factors": how many, "evaluations", "finished": whether the method ended by
        itself}.
    """
    layers = [node for node in qmodel.nodes.values() if isinstance(node, QuantMAC)]
    parameters = [node.weight_quantizer.log_n for node in layers]
    parameters += [node.input_grid.log_n for node in layers if not node.input_grid.exact]
    start = [parameter.detach().clone() for parameter in parameters]
    qmodel.quantize_nodes(True)
    stored = state.load("search")
    stored_costs: list[float] = stored[0]["costs"] if stored else []
    costs: list[float] = []
    best, best_at = np.inf, np.zeros(len(parameters))

    def set_factors(factors: np.ndarray) -> None:
        for parameter, value, factor in zip(parameters, start, factors):
            parameter.copy_(value + float(factor))

    def cost(factors: np.ndarray) -> float:
        nonlocal best, best_at
        if len(costs) >= evaluations:
            raise _Exhausted
        if len(costs) < len(stored_costs):
            value = stored_costs[len(costs)]
        else:
            set_factors(factors)
            value = mean_cost(qmodel, batches, objective)
        costs.append(value)
        if value < best:
            best, best_at = value, factors.copy()
        if len(costs) > len(stored_costs) and len(costs) % _SAVE_EVERY == 0:
            state.save("search", {"costs": costs}, {})
        bar.update()
        return value

    with progress_bar(
        total=evaluations, desc="searching ranges", unit="measurement", enabled=progress, leave=False
    ) as bar:
        try:
            result: OptimizeResult | None = minimize(
                cost,
                np.zeros(len(parameters)),
                method="Powell",
                bounds=[(_NARROWEST, _WIDEST)] * len(parameters),
                options={"xtol": 0.02, "ftol": 1e-5, "maxfev": evaluations},
            )
        except _Exhausted:
            result = None
    set_factors(best_at)
    state.save("search", {"costs": costs}, {})
    return {
        "j_before": costs[0],
        "j_after": best,
        "factors": len(parameters),
        "evaluations": len(costs),
        "finished": result is not None and bool(result.success),
    }
