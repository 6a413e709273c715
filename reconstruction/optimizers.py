"""Adam with a step size for each knob, and its decay."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

from licq.quant.modules import QuantModule
from licq.reconstruction.config import ReconstructionConfig
from licq.reconstruction.state import knob_of, node_of


def make_optimizer(
    active: Mapping[str, nn.Parameter],
    nodes: Mapping[str, QuantModule],
    config: ReconstructionConfig,
    factor: Callable[[QuantModule], float] = lambda node: 1.0,
) -> torch.optim.Adam:
    """Adam with one parameter group for each parameter.

    Args:
        active: the parameters, by their keys of `state.learned`.
        nodes: the nodes that these keys name.
        config: the step sizes of the knobs.
        factor: of a node, on the step sizes of its parameters.
    """
    groups = []
    for key, parameter in active.items():
        node = nodes[node_of(key)]
        size = _step_size(node, knob_of(key), config)
        groups.append({"params": [parameter], "lr": size * factor(node)})
    return torch.optim.Adam(groups, foreach=True)


def _step_size(node: QuantModule, knob: str, config: ReconstructionConfig) -> float:
    if knob == "bias":
        module = node.module
        bias = module.bias if getattr(module, "bias", None) is not None else module.beta
        return config.lr_bias * max(float(bias.detach().square().mean().sqrt()), 1e-3)
    return config.lr_rounding if knob in ("rounding", "border") else config.lr_range


class CosineSchedule:
    """Cosine decay of every step size to a tenth over so many steps."""

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int):
        self.optimizer, self.steps = optimizer, steps
        self.sizes = [group["lr"] for group in optimizer.param_groups]

    def set(self, step: int) -> None:
        """Give the optimizer the step sizes of step number `step`, from 0."""
        factor = 0.1 + 0.45 * (1 + math.cos(math.pi * step / max(self.steps, 1)))
        for group, size in zip(self.optimizer.param_groups, self.sizes):
            group["lr"] = size * factor
