"""What the output of a unit is compared with: the float codec's output, weighted by how J depends on it."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from licq.quant.model import QuantModel
from licq.quant.qtensor import QTensor
from licq.quant.runtime import Call
from licq.reconstruction.objective import Objective
from licq.reconstruction.units import Unit

MEMORY = 1 << 30  # bytes of targets held at a time


class Targets:
    """Float outputs of units, and their Fisher weights; a group of units at a time, as memory allows.

    Args:
        batches: crops, (B, 3, H, W) each.
        weighted: also measure the squared gradient of J at the outputs (BRECQ, Li et al. 2021, eq. 10).
        together: all units are one group.
    """

    def __init__(
        self,
        qmodel: QuantModel,
        batches: Sequence[Tensor],
        units: Sequence[Unit],
        objective: Objective,
        weighted: bool,
        together: bool = False,
    ):
        self.qmodel, self.batches, self.objective, self.weighted = qmodel, batches, objective, weighted
        self.groups = [tuple(units)] if together else self._group(units)
        self.outputs: list[dict[Call, Tensor]] = []
        self.weights: list[dict[Call, Tensor]] = []
        self._ready: tuple[Unit, ...] = ()

    @torch.no_grad()
    def _group(self, units: Sequence[Unit]) -> list[tuple[Unit, ...]]:
        with self.qmodel.runtime.recording([call for unit in units for call in unit.outputs]) as record:
            self.qmodel(self.batches[0])
        copies = len(self.batches) * (2 if self.weighted else 1)
        groups: list[list[Unit]] = []
        total = 0
        for unit in units:
            size = sum(tensor_of(record[call]).numel() for call in unit.outputs) * 4 * copies
            if not groups or total + size > MEMORY:
                groups.append([])
                total = 0
            groups[-1].append(unit)
            total += size
        return [tuple(group) for group in groups]

    def prepare(self, unit: Unit) -> None:
        """Measure the targets of this unit's group unless they are ready; every node must be in float."""
        if unit in self._ready:
            return
        self._ready = next(group for group in self.groups if unit in group)
        calls = [call for other in self._ready for call in other.outputs]
        self.outputs, self.weights = [], []
        for batch in self.batches:
            x = batch.clone().requires_grad_(self.weighted)
            with torch.set_grad_enabled(self.weighted), self.qmodel.runtime.recording(calls) as record:
                output = self.qmodel(x)
            tensors = {call: tensor_of(record[call]) for call in calls}
            self.outputs.append({call: tensor.detach() for call, tensor in tensors.items()})
            if self.weighted:
                with torch.enable_grad():  # also where a score is taken without gradients
                    cost = self.objective(output, batch).sum()
                gradients = torch.autograd.grad(cost, list(tensors.values()), allow_unused=True)
                self.weights.append(
                    {call: fisher(g, tensor) for (call, tensor), g in zip(tensors.items(), gradients)}
                )

    def is_ready(self, unit: Unit) -> bool:
        """Whether the targets of this unit are held."""
        return unit in self._ready

    def loss(self, kind: str, unit: Unit, index: int, record: dict[Call, object]) -> Tensor:
        """The local target on batch number `index`: mse, fisher (weighted mse) or kl; a scalar."""
        total: Tensor | float = 0.0
        for call in unit.outputs:
            real, ours = self.outputs[index][call], tensor_of(record[call])
            if kind == "kl":
                total = total + divergence(ours, real)
            else:
                error = (ours - real).square()
                if kind == "fisher":
                    error = error * self.weights[index][call]
                total = total + error.mean() / real.square().mean().clamp(min=1e-12)
        return cast(Tensor, total)  # a unit has an output


def fisher(gradient: Tensor | None, like: Tensor) -> Tensor:
    """Weights of mean 1: half a squared gradient, half even, for one gradient of few crops is noisy."""
    if gradient is None:
        return torch.ones_like(like)
    squared = gradient.square()
    return 0.5 + 0.5 * squared / squared.mean().clamp(min=1e-30)


def divergence(ours: Tensor, real: Tensor) -> Tensor:
    """KL divergence of the softmax over the channels, a mean over positions.

    Channels are dimension 1 of four-dimensional outputs, else the last.
    """
    dim = 1 if real.ndim == 4 else -1
    log_p, log_q = F.log_softmax(real, dim), F.log_softmax(ours, dim)
    return (log_p.exp() * (log_p - log_q)).sum(dim).mean()


def tensor_of(output: object) -> Tensor:
    """The values of a unit's output; of several outputs, the first one's."""
    if isinstance(output, (list, tuple)):
        return tensor_of(output[0])
    return output.real() if isinstance(output, QTensor) else cast(Tensor, output)
