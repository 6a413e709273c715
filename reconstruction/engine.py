"""A codec while it learns: which of its nodes are final, and what its losses are now."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from licq.quant import unchanged
from licq.quant.model import QuantModel
from licq.quant.rounding import Rounding
from licq.reconstruction.cache import PrefixCache
from licq.reconstruction.config import ReconstructionConfig
from licq.reconstruction.objective import Objective, rate
from licq.reconstruction.state import StateFolder, knob_of, learned
from licq.reconstruction.units import Trace, Unit, find_units
from licq.support.progress import progress as progress_bar


class Engine:
    """The state that the passes of `reconstruction.driver` share. It changes `qmodel` in place.

    Args:
        qmodel: observed, not frozen.
        batches: calibration crops, (B, 3, H, W) each, in 0..1.
        measured: J is measured on the first so many batches.
        config: the knobs.
        objective: J.
        state: where finished units are stored.
        progress: show bars.

    Attributes:
        units: in execution order.
        target_of: for each unit, the unit whose output its local loss compares: itself, or with the loss
            "stage" its stage.
        j_float: J_0 of each crop of a batch, (B,), for each batch.
        float_outputs: x_hat and R of the float codec for each batch, with the loss "output".
        settled: names of the nodes that are final.
        costs_behind: J of each crop of a measured batch behind the units so far, as it was last measured.
        resumed_seconds: that earlier processes have spent on what was read from `state`.
    """

    def __init__(
        self,
        qmodel: QuantModel,
        batches: Sequence[Tensor],
        measured: int,
        config: ReconstructionConfig,
        objective: Objective,
        state: StateFolder,
        progress: bool = True,
    ):
        self.qmodel, self.batches, self.config, self.objective = qmodel, batches, config, objective
        self.state, self.progress, self.measured = state, progress, range(measured)
        qmodel.quantize_nodes(False)
        self.trace = Trace(qmodel, batches[0])
        self.units = find_units(qmodel, self.trace, config.unit)
        self.target_of = self._target_of()
        if "border" in config.learn:
            for node in qmodel.nodes.values():
                if "border" in node.learnable():
                    node.start_rounding_border()
        self.j_float: list[Tensor] = []
        self.float_outputs: list[tuple[Tensor, Tensor]] = []
        self._measure_float()
        self.settled: set[str] = set()
        self.resumed_seconds = 0.0
        self.costs_behind = [self.j_float[index] for index in self.measured]

    def _target_of(self) -> dict[Unit, Unit]:
        if self.config.loss != "stage" or self.config.unit not in ("layer", "block"):
            return {unit: unit for unit in self.units}
        stages = {
            name: stage for stage in find_units(self.qmodel, self.trace, "stage") for name in stage.nodes
        }
        return {unit: stages[unit.nodes[0]] for unit in self.units}

    @torch.no_grad()
    def _measure_float(self) -> None:
        """J_0 of each crop, and the outputs that the loss "output" compares with."""
        needed = self.batches if self.config.loss in ("rd", "output") else self.batches[: len(self.measured)]
        for batch in progress_bar(
            needed, desc="measuring J in float", unit="batch", enabled=self.progress, leave=False
        ):
            output = self.qmodel(batch)
            self.j_float.append(self.objective(output, batch))
            if self.config.loss == "output":
                self.float_outputs.append((output["x_hat"], rate(output, batch)))

    # ------------------------------------------------------------------------------------------ final nodes

    def settle(self, names: Iterable[str]) -> None:
        """Make nodes final: integers, frozen, quantized from now on."""
        new = [name for name in names if name not in self.settled]
        for name in new:
            node = self.qmodel.nodes[name]
            for module in node.modules():
                if isinstance(module, Rounding):
                    module.harden()
            node.requires_grad_(False)
            node.freeze()
        self.qmodel.quantize_nodes(True, new)
        self.settled.update(new)

    def settle_all(self) -> None:
        """Make every node final, also those that were final before and have been thawed."""
        self.settled.clear()
        self.settle(list(self.qmodel.nodes))

    def learns(self, unit: Unit) -> bool:
        """Whether the unit has anything that `ReconstructionConfig.learn` names. With simulated scales, GDN
        and LayerNorm stay in float."""
        parameters = learned({name: self.qmodel.nodes[name] for name in unit.nodes})
        return any(knob_of(key) in self.config.learn for key in parameters)

    def nodes_before(self, unit: Unit) -> list[str]:
        """Nodes whose first call comes before the unit."""
        begin = self.trace.begin
        return [
            name for name, call in self.trace.leaves if call == 0 and begin[(name, 0)] < begin[unit.start]
        ]

    @contextmanager
    def in_float(self) -> Iterator[None]:
        """While it lasts every node is in float; then the final nodes are quantized again."""
        self.qmodel.quantize_nodes(False)
        yield
        self.qmodel.quantize_nodes(True, self.settled)

    # --------------------------------------------------------------------------------------------- measuring

    def measure(self, cache: PrefixCache | None = None) -> tuple[float, float]:
        """(mean J, mean of (J_hat - J_0)^2 as in eq. 12) over the measured crops.

        Args:
            cache: of the prefix behind which forwards start; None runs whole forwards.
        """
        return self.means(self.costs(self.measured, cache))

    def costs(self, indexes: Iterable[int], cache: PrefixCache | None = None) -> list[Tensor]:
        """J of each crop of batches, (B,) each."""
        with torch.no_grad(), unchanged.everything():
            return [self._cost(index, cache) for index in indexes]

    def means(self, costs: Sequence[Tensor]) -> tuple[float, float]:
        """(mean J, mean of eq. 12) of the first so many batches, from J of each crop."""
        return mean(costs), mean((cost - j).square() for cost, j in zip(costs, self.j_float))

    def mean_j_float(self) -> float:
        """Mean J_0 over the measured crops."""
        return mean(self.j_float[i] for i in self.measured)

    def global_loss(self, index: int, cache: PrefixCache | None = None) -> Tensor:
        """The loss of the whole codec on batch number `index`, a scalar with gradients.

        rd: mean of (J_hat - J_0)^2, eq. 12; output: mean of lambda D(x_hat, x_hat_0) + |R - R_0|; every other
        loss: mean of J_hat.
        """
        if self.config.loss == "output":
            output, batch = self._output(index, cache), self.batches[index]
            x_hat, bits = self.float_outputs[index]
            reference = torch.cat([x_hat, batch[:, 3:]], 1)
            return (
                self.objective.unclipped_distortion(output["x_hat"], reference)
                + (rate(output, batch) - bits).abs()
            ).mean()
        cost = self._cost(index, cache)
        if self.config.loss == "rd":
            return (cost - self.j_float[index]).square().mean()
        return cost.mean()

    def _output(self, index: int, cache: PrefixCache | None) -> dict:
        batch = self.batches[index]
        if cache is None:
            return self.qmodel(batch)
        with cache.replaying(index):
            return self.qmodel(batch)

    def _cost(self, index: int, cache: PrefixCache | None) -> Tensor:
        return self.objective(self._output(index, cache), self.batches[index])


def mean(costs: Iterable[Tensor]) -> float:
    """Mean over the crops of all batches, in double precision."""
    return float(torch.cat([cost.double() for cost in costs]).mean())
