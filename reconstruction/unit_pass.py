"""The reconstruction of one unit: its weights, then its activations, on the loss behind a cached prefix."""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from licq.quant import unchanged
from licq.quant.rounding import AdaRound, Rounding, temperature
from licq.reconstruction.cache import PrefixCache, mixed
from licq.reconstruction.config import SCREENED
from licq.reconstruction.engine import Engine
from licq.reconstruction.optimizers import CosineSchedule, make_optimizer
from licq.reconstruction.state import knob_of, learned, restore, snapshot
from licq.reconstruction.targets import Targets
from licq.reconstruction.units import Unit

WEIGHT_KNOBS = ("range_w", "range_b", "rounding", "bias")
ACTIVATION_KNOBS = ("range_a", "border")
CONVERGED = 0.01
"""A unit is finished where a round lowers its loss by less than this share."""


@dataclass
class Prefix:
    """What units are reconstructed from and compared with; it moves on with the units."""

    targets: Targets | None
    """Float outputs of the units that `Engine.target_of` names, where steps use the units' own error."""

    unit_targets: Targets | None
    """Float outputs of the units themselves, where the loss "stage" is blended with their own error."""

    quantized: PrefixCache
    """Outputs of the quantized prefix."""

    real: PrefixCache | None
    """Outputs of the float prefix, where `input_mix` takes elements from it."""

    @classmethod
    def start(cls, engine: Engine) -> "Prefix":
        """The prefix of the first unit."""
        config, qmodel = engine.config, engine.qmodel
        batches = engine.batches[: len(engine.measured)]
        targets = None
        if config.uses_own_error:
            targets = Targets(
                qmodel,
                batches,
                list(dict.fromkeys(engine.target_of.values())),
                engine.objective,
                config.local_loss == "fisher",
            )
        unit_targets = None
        if config.loss == "stage" and config.blend:
            unit_targets = Targets(qmodel, batches, engine.units, engine.objective, False)
        quantized = PrefixCache(qmodel, engine.trace, batches)
        real = PrefixCache(qmodel, engine.trace, batches) if config.input_mix else None
        return cls(targets, unit_targets, quantized, real)

    def advance(self, engine: Engine, unit: Unit) -> None:
        """Have all that the unit needs; the nodes before it are final."""
        for targets, target in ((self.targets, engine.target_of[unit]), (self.unit_targets, unit)):
            if targets is not None and not targets.is_ready(target):
                with engine.in_float():
                    targets.prepare(target)
        if self.real is not None:
            with engine.in_float():
                self.real.advance(unit.start)
        self.quantized.advance(unit.start)


class UnitPass:
    """The reconstruction of one unit.

    Args:
        number: of the unit; seeds its draws.
        prefix: advanced to the unit.
    """

    def __init__(self, engine: Engine, unit: Unit, number: int, prefix: Prefix):
        self.engine, self.unit, self.prefix = engine, unit, prefix
        self.config, self.qmodel = engine.config, engine.qmodel
        self.target = engine.target_of[unit]
        self.nodes = {name: self.qmodel.nodes[name] for name in unit.nodes}
        self.parameters = learned(self.nodes)
        self.roundings = [
            module
            for node in self.nodes.values()
            for module in node.modules()
            if isinstance(module, Rounding)
        ]
        self.order = random.Random(f"{self.config.seed} order {number}")
        self.noise = torch.Generator().manual_seed(self.config.seed * 100_003 + number)
        self.queue: list[int] = []
        self.local_scale = self.global_scale = 1.0  # of the losses, as weights are rounded before learning

    def run(self) -> dict:
        """Learn, until a round lowers the loss on the measured crops by less than `CONVERGED` of it, and keep
        the best round.

        Returns:
            {"name", "nodes": how many, "j_before", "j_after", "rounds": how many were begun, "kept": whether
            one of them is in the result, "seconds"}: what the history says.
        """
        started = time.monotonic()
        config, engine = self.config, self.engine
        self.qmodel.quantize_nodes(True, self.unit.nodes)
        best_values = snapshot(self.parameters)
        self._harden(True)
        rounds, is_learned = 0, False
        costs, is_worth = self._screened()
        if is_worth:
            costs = self._rest_measured(costs)
            engine.costs_behind = costs
        j_before, eq12 = engine.means(engine.costs_behind)
        j_after, best = j_before, self._score(j_before, eq12) if is_worth else 0.0
        while is_worth and rounds < config.rounds:
            if not rounds:
                self._set_scales(best)
            rounds += 1
            self._learn_round()
            costs = engine.costs(engine.measured, self.prefix.quantized) if config.is_global else costs
            j, eq12 = engine.means(costs)
            score, before = self._score(j, eq12), best
            if score <= best:
                j_after, best, best_values, is_learned = j, score, snapshot(self.parameters), True
                engine.costs_behind = costs
            if score >= before * (1 - CONVERGED):
                break
        restore(self.parameters, best_values)  # a round may lose; then the one before it counts
        if is_learned and not config.is_global:
            self._harden(True)
            engine.costs_behind = engine.costs(engine.measured, self.prefix.quantized)
            j_after, _ = engine.means(engine.costs_behind)
        return {
            "name": self.unit.name,
            "nodes": len(self.nodes),
            "j_before": j_before,
            "j_after": j_after,
            "rounds": rounds,
            "kept": is_learned,
            "seconds": time.monotonic() - started,
        }

    def _screened(self) -> tuple[list[Tensor], bool]:
        """(J of the crops of the first measured batches, whether the unit is to be learned): whether
        quantizing it raises eq. 12 there by `min_rise` of it or more."""
        engine, share = self.engine, self.config.min_rise
        if self.config.loss != "rd" or not share:
            return [], True
        first = engine.measured[: max(1, SCREENED // self.config.batch)]
        costs = engine.costs(first, self.prefix.quantized)
        before, now = engine.means(engine.costs_behind[: len(costs)])[1], engine.means(costs)[1]
        engine.costs_behind[: len(costs)] = costs
        return costs, now - before >= share * now

    def _rest_measured(self, costs: list[Tensor]) -> list[Tensor]:
        """J of the crops of all measured batches, of which these are known."""
        engine, quantized = self.engine, self.prefix.quantized
        if self.config.unit != "network":
            quantized.unaffected.find(self.unit, self.parameters.values(), quantized.outputs[0])
        return costs + engine.costs(engine.measured[len(costs) :], quantized)

    def _set_scales(self, score: float) -> None:
        """Make losses relative to what they are before the unit learns."""
        self.global_scale = max(score, 1e-12)
        if self.config.uses_own_error:
            self.local_scale = self._local_score()

    def _learn_round(self) -> None:
        """One round of Algorithm 1: first weights and biases, then activations; or all together."""
        config = self.config
        self._harden(False)
        phases = [WEIGHT_KNOBS, ACTIVATION_KNOBS] if config.alternate else [WEIGHT_KNOBS + ACTIVATION_KNOBS]
        chosen = [
            {
                key: parameter
                for key, parameter in self.parameters.items()
                if knob_of(key) in phase and knob_of(key) in config.learn
            }
            for phase in phases
        ]
        chosen = [active for active in chosen if active]  # a phase with nothing to learn takes no steps
        for number, active in enumerate(chosen):
            self.learn(active, (config.iters + number) // len(chosen))
            if any(knob_of(key) == "rounding" for key in active):
                self._harden(True)  # what is learned after the rounding meets integer weights
        self._harden(True)

    def learn(self, active: dict[str, nn.Parameter], steps: int) -> None:
        """So many optimizer steps for these parameters: first on the local loss, at the end on the global."""
        config = self.config
        optimizer = make_optimizer(active, self.nodes, config)
        schedule = CosineSchedule(optimizer, steps)
        tail = round(config.tail_share * steps) if config.is_global else 0
        tail = steps if config.unit == "network" and config.is_global else tail
        adaptive = [
            r for r in self.roundings if isinstance(r, AdaRound) and any(p is r.V for p in active.values())
        ]
        for parameter in active.values():
            parameter.requires_grad_(True)
        with unchanged.constants():
            for step in range(steps):
                if not self.queue:
                    self.queue = self.order.sample(self.engine.measured, len(self.engine.measured))
                index = self.queue.pop()
                schedule.set(step)
                optimizer.zero_grad()
                with self._act_drop():
                    loss = self._loss(index, in_tail=step >= steps - tail)
                if adaptive and step >= config.warmup * steps:
                    beta = temperature(step, steps, warmup=config.warmup)
                    loss = loss + config.regularizer * sum(r.regularizer(beta) for r in adaptive)
                loss.backward()
                optimizer.step()
        for parameter in active.values():
            parameter.requires_grad_(False)

    def _loss(self, index: int, in_tail: bool) -> Tensor:
        """The loss of a step on batch number `index`, each part relative to what it was before learning."""
        config = self.config
        if not in_tail:
            return self._local_loss(index, mix=True) / self.local_scale
        loss = self.engine.global_loss(index, self.prefix.quantized) / self.global_scale
        if config.blend:
            loss = loss + config.blend * self._local_loss(index, mix=True) / self.local_scale
        return loss

    def _local_loss(self, index: int, mix: bool = False) -> Tensor:
        """The error of the target's output on batch number `index`; `mix` draws inputs for `input_mix`."""
        outputs = self.prefix.quantized.outputs[index]
        if mix and self.prefix.real is not None:
            real = self.prefix.real.outputs[index]
            outputs = {
                call: mixed(output, real[call], self.config.input_mix, self.noise)
                for call, output in outputs.items()
            }
        runtime, unit_targets, kind = self.qmodel.runtime, self.prefix.unit_targets, self.config.local_loss
        calls = {*self.target.outputs, *(self.unit.outputs if unit_targets else ())}
        with runtime.replaying(outputs), runtime.recording(calls, stop_after=self.target.end) as record:
            self.qmodel(self.engine.batches[index])
        targets = self.prefix.targets
        assert targets is not None
        loss = targets.loss(kind, self.target, index, record)
        if unit_targets is None:
            return loss
        return loss + self.config.blend * unit_targets.loss(kind, self.unit, index, record)

    def _score(self, j: float, eq12: float) -> float:
        """The loss's own measure on the measured crops, by which a unit's learning is kept or not."""
        if self.config.loss == "output":
            measured = self.engine.measured
            with torch.no_grad():
                losses = [float(self.engine.global_loss(i, self.prefix.quantized)) for i in measured]
            return sum(losses) / len(measured)
        if self.config.is_global:
            return eq12 if self.config.loss == "rd" else j
        return self._local_score()

    @torch.no_grad()
    def _local_score(self) -> float:
        measured = self.engine.measured
        return max(sum(float(self._local_loss(i)) for i in measured) / len(measured), 1e-12)

    def _harden(self, hardened: bool) -> None:
        """Round weights as they would be rounded now (True), or as learning sees them."""
        for rounding in self.roundings:
            rounding.hardened = hardened

    @contextmanager
    def _act_drop(self) -> Iterator[None]:
        """QDrop inside the unit (Wei et al. 2022): elements of its layers' inputs are not quantized.

        The nodes before the unit are replayed and the nodes after it are float, so only the unit's are met.
        """
        runtime, share = self.qmodel.runtime, self.config.act_drop
        if share:
            runtime.act_drop = lambda q, exact: torch.where(
                torch.rand(q.shape, generator=self.noise).to(q.device) < share, exact, q
            )
        try:
            yield
        finally:
            runtime.act_drop = None
