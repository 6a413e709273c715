"""The reconstruction engine (design, section 5): one driver for every unit, target and set of knobs."""

import functools
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from licq.quant.model import QuantModel
from licq.quant.rounding import AdaRound, Rounding, temperature
from licq.reconstruction.cache import PrefixCache, mixed
from licq.reconstruction.config import ReconstructionConfig
from licq.reconstruction.objective import Objective, rate
from licq.reconstruction.state import StateFolder, learned, restore, snapshot
from licq.reconstruction.targets import Targets
from licq.reconstruction.units import Trace, Unit, find_units
from licq.support.progress import progress as progress_bar

WEIGHT_KNOBS = ("range_w", "range_b", "rounding", "bias")
ACTIVATION_KNOBS = ("range_a", "border")
GLOBAL = ("rd", "rd_direct", "output")  # losses that need the whole codec
_JOINT_PARTS = 6  # the joint pass looks back at the best state, and writes its own, this often


class Reconstruction:
    """Learns the quantization parameters of an observed `QuantModel`, in place.

    Args:
        qmodel: observed, not frozen.
        batches: calibration crops, (B, 3, H, W) each.
        measured: J is measured on the first so many batches.
        config: the knobs.
        objective: J.
        state: where finished units are kept.
        progress: show a bar.
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
        self.aims = {unit: unit for unit in self.units}  # whose output a unit's local loss looks at
        if config.loss == "stage" and config.unit in ("layer", "block"):
            stages = {
                name: stage for stage in find_units(qmodel, self.trace, "stage") for name in stage.nodes
            }
            self.aims = {unit: stages[unit.nodes[0]] for unit in self.units}
        if "border" in config.learn:
            for node in qmodel.nodes.values():
                if "border" in node.learnable():
                    node.start_border()
        self.j_float: list[Tensor] = []
        self.float_outputs: list[tuple[Tensor, Tensor]] = []  # x_hat and R of each crop
        with torch.no_grad():  # eq. 12 compares with J of each crop
            needed = batches if config.loss in ("rd", "output") else batches[:measured]
            for batch in progress_bar(
                needed, desc="measuring J in float", unit="batch", enabled=progress, leave=False
            ):
                output = qmodel(batch)
                self.j_float.append(objective(output, batch))
                if config.loss == "output":
                    self.float_outputs.append((output["x_hat"], rate(output, batch)))
        self.settled: set[str] = set()  # nodes in their final state

    # --------------------------------------------------------------------------------------------- the passes

    def run(self) -> dict:
        """Reconstruct every unit, then all together. Returns the history: J before and after each,
        seconds."""
        j_float = self._mean(self.j_float[i] for i in self.measured)
        history: dict = {"units": [], "joint": None, "j_float": j_float, "resumed_seconds": 0.0}
        units = self.config.iters and any(self.config.learn)
        if units:
            self._run_units(history)
        self._settle(list(self.qmodel.nodes))
        history["j_units"] = self._measure()[0]
        if self.config.joint_iters and not (units and self.config.unit == "network"):  # that was a joint pass
            history["joint"] = self._run_joint(history)
        history["j_end"] = self._measure()[0]
        return history

    def _run_units(self, history: dict) -> None:
        config = self.config
        weighted = _local_kind(config) == "fisher"
        batches = self.batches[: len(self.measured)]
        targets = Targets(
            self.qmodel, batches, list(dict.fromkeys(self.aims.values())), self.objective, weighted
        )
        own = (
            Targets(self.qmodel, batches, self.units, self.objective, False)
            if config.loss == "stage" and config.blend
            else None
        )
        quantized = PrefixCache(self.qmodel, self.trace, batches, True)
        real = PrefixCache(self.qmodel, self.trace, batches, False) if config.input_mix else None
        bar = progress_bar(
            total=len(self.units),
            desc=f"reconstructing {config.unit}s ({config.loss})",
            unit="unit",
            enabled=self.progress,
        )
        with bar:
            for number, unit in enumerate(self.units):
                self._settle(self._nodes_before(unit))
                nodes = {name: self.qmodel.nodes[name] for name in unit.nodes}
                stored = self.state.load(f"{number:03d}")
                if stored is None:
                    for kept, wanted in ((targets, self.aims[unit]), (own, unit)):
                        if kept is not None and not kept.is_ready(wanted):
                            self._in_float(functools.partial(kept.prepare, wanted))
                    if real is not None:
                        self._in_float(lambda: real.advance(unit.start))
                    quantized.advance(unit.start)
                    fact = _UnitRun(self, unit, number, targets, own, quantized, real).run()
                    self.state.save(f"{number:03d}", fact, learned(nodes))
                else:
                    fact, values = stored
                    fact.pop("identity")
                    history["resumed_seconds"] += fact["seconds"]
                    restore(learned(nodes), values)
                self._settle(unit.nodes)
                history["units"].append(fact)
                bar.set_postfix_str(f"{unit.name}: J {fact['j_before']:.4f} -> {fact['j_after']:.4f}")
                bar.update()

    def _nodes_before(self, unit: Unit) -> list[str]:
        """Nodes whose first call comes before the unit."""
        begin = self.trace.begin
        return [
            name for name, call in self.trace.leaves if call == 0 and begin[(name, 0)] < begin[unit.start]
        ]

    def _settle(self, names: Sequence[str]) -> None:
        """Make nodes final: whole numbers, frozen."""
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

    def _in_float(self, work: Callable[[], None]) -> None:
        """Run something on the float codec, then put the finished part back."""
        self.qmodel.quantize_nodes(False)
        work()
        self.qmodel.quantize_nodes(True, self.settled)

    # -------------------------------------------------------------------------------------------- measuring J

    def _measure(self, cache: PrefixCache | None = None) -> tuple[float, float]:
        """Means over the crops of J, and of (J_hat - J_0)^2 (eq. 12)."""
        costs, squares = [], []
        with torch.no_grad():
            for index in self.measured:
                cost = self._cost(index, cache)
                costs.append(cost)
                squares.append((cost - self.j_float[index]).square())
        return self._mean(costs), self._mean(squares)

    def _output(self, index: int, cache: PrefixCache | None = None) -> dict:
        batch = self.batches[index]
        if cache is None:
            return self.qmodel(batch)
        with cache.replaying(index):
            return self.qmodel(batch)

    def _cost(self, index: int, cache: PrefixCache | None = None) -> Tensor:
        return self.objective(self._output(index, cache), self.batches[index])

    @staticmethod
    def _mean(costs: Iterable[Tensor]) -> float:
        return float(torch.cat([cost.double() for cost in costs]).mean())

    def global_loss(self, index: int, cache: PrefixCache | None = None) -> Tensor:
        """rd: mean of (J_hat - J_0)^2, eq. 12; rd_direct: mean of J_hat; output: mean of lambda D(x_hat,
        x_hat_0) + |R - R_0|."""
        if self.config.loss == "output":
            output, batch = self._output(index, cache), self.batches[index]
            x_hat, bits = self.float_outputs[index]
            like = torch.cat([x_hat, batch[:, 3:]], 1)
            return (
                self.objective.unclipped_distortion(output["x_hat"], like)
                + (rate(output, batch) - bits).abs()
            ).mean()
        cost = self._cost(index, cache)
        if self.config.loss == "rd":
            return (cost - self.j_float[index]).square().mean()
        return cost.mean()

    # --------------------------------------------------------------------------------------------- joint pass

    def _run_joint(self, history: dict) -> dict:
        """All quantization parameters of the network together, with the loss at network level.

        rd and rd_direct: J of the quantized codec. The local targets: theirs, summed over the outputs of the
        stages. Weights that AdaRound has rounded stay as they are, and so do their ranges.
        """
        config, qmodel = self.config, self.qmodel
        started = time.monotonic()
        for node in qmodel.nodes.values():
            node.thaw()
        nodes = {name: node for name, node in qmodel.nodes.items() if any(node.learnable().values())}
        parameters = learned(nodes)
        fixed = (
            {"range_w", "rounding"}
            if any(isinstance(m, AdaRound) for n in nodes.values() for m in n.modules())
            else set()
        )
        active = {k: p for k, p in parameters.items() if k.split("|")[1] in set(config.learn) - fixed}
        if not active:
            self._settle_all()
            j = self._measure()[0]
            return {"j_before": j, "j_after": j, "seconds": time.monotonic() - started}
        stored = self.state.load("joint")
        if stored is not None and stored[0]["done"]:
            fact = stored[0]["fact"]
            restore(parameters, {key: stored[1][f"now|{key}"] for key in parameters})
            self._settle_all()
            history["resumed_seconds"] += fact["seconds"]
            return fact
        loss = self._joint_loss()
        optimizer = _optimizer(
            active, nodes, config, lambda node: config.joint_lr * 10 ** (max(8 - node.config.w_bits, 0) / 4)
        )
        schedule = _Schedule(optimizer, config.joint_iters)
        score = self._joint_score(loss)
        j_before = self._measure()[0]
        best, best_values, step, spent = score, snapshot(parameters), 0, 0.0
        if stored is not None:
            facts, tensors = stored
            step, best, spent, j_before = facts["step"], facts["best"], facts["seconds"], facts["j_before"]
            history["resumed_seconds"] += spent
            restore(parameters, {key: tensors[f"now|{key}"] for key in parameters})
            best_values = {key: tensors[f"best|{key}"] for key in parameters}
            _restore_adam(optimizer, active, tensors)
        generator = random.Random(f"{config.seed} joint")
        order = [
            index
            for _ in range(math.ceil(config.joint_iters / len(self.batches)))
            for index in generator.sample(range(len(self.batches)), len(self.batches))
        ]
        part = max(1, math.ceil(config.joint_iters / _JOINT_PARTS))
        bar = progress_bar(
            total=config.joint_iters, desc=f"joint pass ({config.loss})", unit="step", enabled=self.progress
        )
        bar.update(step)
        for parameter in active.values():
            parameter.requires_grad_(True)
        with bar:
            while step < config.joint_iters:
                schedule.set(step)
                optimizer.zero_grad()
                (loss(order[step]) / max(score, 1e-12)).backward()
                optimizer.step()
                step += 1
                bar.update()
                if step % part == 0 or step == config.joint_iters:
                    now = self._joint_score(loss)
                    if now < best:
                        best, best_values = now, snapshot(parameters)
                    bar.set_postfix_str(f"target {best / max(score, 1e-12):.3f} of its start")
                    if step < config.joint_iters:
                        facts = {
                            "done": False,
                            "step": step,
                            "best": best,
                            "j_before": j_before,
                            "seconds": spent + time.monotonic() - started,
                        }
                        self.state.save(
                            "joint", facts, _joint_tensors(parameters, best_values, optimizer, active)
                        )
        for parameter in active.values():
            parameter.requires_grad_(False)
        restore(parameters, best_values)
        self._settle_all()
        fact = {
            "j_before": j_before,
            "j_after": self._measure()[0],
            "seconds": spent + time.monotonic() - started,
        }
        self.state.save("joint", {"done": True, "fact": fact}, {f"now|{k}": p for k, p in parameters.items()})
        return fact

    def _settle_all(self) -> None:
        self.settled.clear()
        self._settle(list(self.qmodel.nodes))

    def _joint_loss(self) -> Callable[[int], Tensor]:
        if self.config.loss in GLOBAL:
            return self.global_loss
        stages = find_units(self.qmodel, self.trace, "stage")
        calls = [call for stage in stages for call in stage.outputs]
        kept: dict[
            int, Targets
        ] = {}  # of the batches that are met again and again; of all they could be gigabytes

        def targets_of(index: int) -> Targets:
            if index in kept:
                return kept[index]
            targets = Targets(
                self.qmodel,
                [self.batches[index]],
                stages,
                self.objective,
                self.config.loss == "fisher",
                together=True,
            )
            self._in_float(lambda: targets.prepare(stages[0]))
            if index in self.measured:
                kept[index] = targets
            return targets

        def loss(index: int) -> Tensor:
            targets = targets_of(index)
            with self.qmodel.runtime.recording(calls) as record:
                self.qmodel(self.batches[index])
            return sum(targets.loss(self.config.loss, stage, 0, record) for stage in stages)

        return loss

    @torch.no_grad()
    def _joint_score(self, loss: Callable[[int], Tensor]) -> float:
        crops = [len(self.batches[index]) for index in self.measured]
        return sum(float(loss(index)) * count for index, count in zip(self.measured, crops)) / sum(crops)


class _UnitRun:
    """The reconstruction of one unit."""

    def __init__(
        self,
        engine: Reconstruction,
        unit: Unit,
        number: int,
        targets: Targets,
        own: Targets | None,
        cache: PrefixCache,
        real: PrefixCache | None,
    ):
        self.engine, self.unit, self.targets, self.own, self.cache, self.real = (
            engine,
            unit,
            targets,
            own,
            cache,
            real,
        )
        self.aim = engine.aims[unit]
        self.config, self.qmodel = engine.config, engine.qmodel
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

    def run(self) -> dict:
        started = time.monotonic()
        config, engine = self.config, self.engine
        self.qmodel.quantize_nodes(True, self.unit.nodes)
        before_values = snapshot(self.parameters)
        self._hard(True)
        j_before, eq12 = engine._measure(self.cache)
        before = self._score(j_before, eq12)
        self.scale = {
            "local": self._local_score(),
            "global": max(before, 1e-12),
        }  # both as the weights would be rounded now
        self._hard(False)
        phases = [WEIGHT_KNOBS, ACTIVATION_KNOBS] if config.alternate else [WEIGHT_KNOBS + ACTIVATION_KNOBS]
        chosen = [
            {
                k: p
                for k, p in self.parameters.items()
                if (knob := k.split("|")[1]) in phase and knob in config.learn
            }
            for phase in phases
        ]
        chosen = [active for active in chosen if active]  # a phase with nothing to learn takes no steps
        for number, active in enumerate(chosen):
            self._learn(active, (config.iters + number) // len(chosen))
            if any(key.split("|")[1] == "rounding" for key in active):
                self._hard(True)  # what is learned after the rounding meets weights that are whole
        self._hard(True)
        j_after, eq12 = engine._measure(self.cache)
        after = self._score(j_after, eq12)
        kept = after <= before
        if not kept:  # learning on a few crops may lose; then the unit stays as it was
            restore(self.parameters, before_values)
        return {
            "name": self.unit.name,
            "nodes": len(self.nodes),
            "j_before": j_before,
            "j_after": j_after if kept else j_before,
            "kept": kept,
            "seconds": time.monotonic() - started,
        }

    def _hard(self, hardened: bool) -> None:
        """Measure weights as they would be rounded now."""
        for rounding in self.roundings:
            rounding.hardened = hardened

    def _score(self, j: float, eq12: float) -> float:
        """The loss's own measure on all crops, by which a unit's learning is kept or not."""
        if self.config.loss == "output":
            with torch.no_grad():
                return sum(float(self.engine.global_loss(i, self.cache)) for i in self.engine.measured) / len(
                    self.engine.measured
                )
        if self.config.loss in GLOBAL:
            return eq12 if self.config.loss == "rd" else j
        return self._local_score()

    @torch.no_grad()
    def _local_score(self) -> float:
        kind = _local_kind(self.config)
        return max(
            sum(float(self._local(kind, i)) for i in self.engine.measured) / len(self.engine.measured), 1e-12
        )

    def _local(self, kind: str, index: int, mix: bool = False) -> Tensor:
        outputs = self.cache.outputs[index]
        if mix and self.real is not None:
            outputs = {
                call: mixed(output, self.real.outputs[index][call], self.config.input_mix, self.noise)
                for call, output in outputs.items()
            }
        runtime = self.qmodel.runtime
        calls = {*self.aim.outputs, *(self.unit.outputs if self.own else ())}
        with runtime.replaying(outputs), runtime.recording(calls, stop_after=self.aim.end) as record:
            self.qmodel(self.engine.batches[index])
        loss = self.targets.loss(kind, self.aim, index, record)
        return (
            loss
            if self.own is None
            else loss + self.config.blend * self.own.loss(kind, self.unit, index, record)
        )

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        """Some inputs of the unit's layers stay as they are (QDrop, Wei 2022); what is before them is
        replayed, what follows in float."""
        runtime, share = self.qmodel.runtime, self.config.act_drop
        if share:
            runtime.dropping = lambda q, exact: torch.where(
                torch.rand(q.shape, generator=self.noise).to(q.device) < share, exact, q
            )
        try:
            yield
        finally:
            runtime.dropping = None

    def _learn(self, active: dict[str, nn.Parameter], steps: int) -> None:
        config = self.config
        optimizer = _optimizer(active, self.nodes, config)
        schedule = _Schedule(optimizer, steps)
        tail = round(config.tail_share * steps) if config.loss in GLOBAL else 0
        tail = steps if config.unit == "network" and config.loss in GLOBAL else tail
        adaptive = [
            r for r in self.roundings if isinstance(r, AdaRound) and any(p is r.V for p in active.values())
        ]
        for parameter in active.values():
            parameter.requires_grad_(True)
        for step in range(steps):
            if not self.queue:
                self.queue = self.order.sample(self.engine.measured, len(self.engine.measured))
            index = self.queue.pop()
            schedule.set(step)
            optimizer.zero_grad()
            true = step >= steps - tail
            with self._dropping():
                loss = self.engine.global_loss(index, self.cache) / self.scale["global"] if true else 0.0
                if config.blend or not true:
                    loss = (
                        loss
                        + (config.blend if true else 1.0)
                        * self._local(_local_kind(config), index, mix=True)
                        / self.scale["local"]
                    )
            if adaptive and step >= config.warmup * steps:
                beta = temperature(step, steps, warmup=config.warmup)
                loss = loss + config.regularizer * sum(r.regularizer(beta) for r in adaptive)
            loss.backward()
            optimizer.step()
        for parameter in active.values():
            parameter.requires_grad_(False)


def _local_kind(config: ReconstructionConfig) -> str:
    """The error of a unit's own output that the loss uses, for steps or beside it."""
    if config.loss in GLOBAL:
        return "mse" if config.blend else "fisher"
    return config.loss


# ------------------------------------------------------------------------------------------------- optimizers


def _optimizer(
    active: dict[str, nn.Parameter],
    nodes: dict[str, nn.Module],
    config: ReconstructionConfig,
    factor: Callable[[nn.Module], float] = lambda node: 1.0,
) -> torch.optim.Adam:
    """Adam with a step size for each knob, times the factor of the node."""
    groups = []
    for key, parameter in active.items():
        name, knob, _ = key.split("|")
        if knob == "bias":
            module = nodes[name].module
            bias = module.bias if getattr(module, "bias", None) is not None else module.beta
            size = config.lr_bias * max(float(bias.detach().square().mean().sqrt()), 1e-3)
        else:
            size = config.lr_rounding if knob in ("rounding", "border") else config.lr_range
        groups.append({"params": [parameter], "lr": size * factor(nodes[name])})
    return torch.optim.Adam(groups, foreach=True)


class _Schedule:
    """Cosine decay of every step size to a tenth."""

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int):
        self.optimizer, self.steps = optimizer, steps
        self.sizes = [group["lr"] for group in optimizer.param_groups]

    def set(self, step: int) -> None:
        factor = 0.1 + 0.45 * (1 + math.cos(math.pi * step / max(self.steps, 1)))
        for group, size in zip(self.optimizer.param_groups, self.sizes):
            group["lr"] = size * factor


def _joint_tensors(
    parameters: dict, best: dict, optimizer: torch.optim.Adam, active: dict
) -> dict[str, Tensor]:
    tensors = {f"now|{key}": parameter for key, parameter in parameters.items()}
    tensors |= {f"best|{key}": value for key, value in best.items()}
    for key, parameter in active.items():
        tensors |= {
            f"adam|{key}|{field}": value for field, value in optimizer.state.get(parameter, {}).items()
        }
    return tensors


def _restore_adam(optimizer: torch.optim.Adam, active: dict, tensors: dict[str, Tensor]) -> None:
    for key, parameter in active.items():
        prefix = f"adam|{key}|"
        state = {
            name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)
        }
        if state:
            optimizer.state[parameter] = {
                k: v.to(parameter.device) if k != "step" else v for k, v in state.items()
            }
