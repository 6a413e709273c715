"""The joint pass: all quantization parameters of the network together, with the loss at network level."""

import math
import random
import time
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from licq.quant import unchanged
from licq.quant.modules import QuantModule
from licq.quant.rounding import AdaRound
from licq.reconstruction.engine import Engine
from licq.reconstruction.expected import JOINT
from licq.reconstruction.optimizers import CosineSchedule, make_optimizer
from licq.reconstruction.state import knob_of, learned, restore, snapshot
from licq.reconstruction.targets import Targets
from licq.reconstruction.units import find_units
from licq.support.progress import progress as progress_bar

_PARTS = 6  # the pass compares with the best parameters so far, and stores its state, this often


class JointPass:
    """The parameters of a settled codec, thawed, while they are learned together.

    With rd, rd_direct and output the loss is that of the whole codec. With the others it is summed over the
    outputs of the stages. Weights that AdaRound has rounded stay as they are, and so do their ranges.
    """

    def __init__(self, engine: Engine):
        self.engine, self.config = engine, engine.config
        self.started = time.monotonic()
        self.earlier_seconds = 0.0  # of a process that was killed
        for node in engine.qmodel.nodes.values():
            node.thaw()
        self.nodes = {
            name: node for name, node in engine.qmodel.nodes.items() if any(node.learnable().values())
        }
        self.parameters = learned(self.nodes)
        is_rounded = any(isinstance(m, AdaRound) for node in self.nodes.values() for m in node.modules())
        knobs = set(self.config.learn) - ({"range_w", "rounding"} if is_rounded else set())
        self.active = {key: p for key, p in self.parameters.items() if knob_of(key) in knobs}

    def run(self, before: tuple[float, float] | None = None) -> dict:
        """Learn, restore the best parameters that were met, and settle the codec.

        Args:
            before: `Engine.measure` of the codec as it is, where that is known.

        Returns:
            {"j_before", "j_after", "seconds"}: what the history says.
        """
        engine = self.engine
        if not self.active:
            engine.settle_all()
            j = (before or engine.measure())[0]
            return {"j_before": j, "j_after": j, "seconds": time.monotonic() - self.started}
        stored = engine.state.load("joint")
        if stored is not None and stored[0]["done"]:
            entry, tensors = stored[0]["fact"], stored[1]
            restore(self.parameters, {key: tensors[f"now|{key}"] for key in self.parameters})
            engine.settle_all()
            engine.resumed_seconds += entry["seconds"]
            return entry
        j_before, j_after = self._learn(stored, before)
        engine.settle_all()
        if j_after is None:
            j_after = engine.measure()[0]
        entry = {"j_before": j_before, "j_after": j_after, "seconds": self._seconds()}
        values = {f"now|{key}": parameter for key, parameter in self.parameters.items()}
        engine.state.save("joint", {"done": True, "fact": entry}, values)
        return entry

    def _learn(
        self, stored: tuple[dict, dict[str, Tensor]] | None, before: tuple[float, float] | None
    ) -> tuple[float, float | None]:
        """All steps, behind the stored ones, and the best parameters restored.

        Returns:
            (J before the first step, J with the best parameters; None where it was not measured).
        """
        engine, config, parameters, active = self.engine, self.config, self.parameters, self.active
        loss = self._loss()
        optimizer = make_optimizer(active, self.nodes, config, self._factor)
        schedule = CosineSchedule(optimizer, config.joint_iters)
        before = before or engine.measure()
        j_before = before[0]
        first, j_best = self._score(loss, before)
        unit = max(before[1] if config.loss == "rd" else first, 1e-12)  # losses are relative to the first
        best, best_values, step = first, snapshot(parameters), 0
        if stored is not None:
            record, tensors = stored
            step, best, j_before = record["step"], record["best"], record["j_before"]
            j_best = record.get("j_best")
            self.earlier_seconds = record["seconds"]
            engine.resumed_seconds += self.earlier_seconds
            restore(parameters, {key: tensors[f"now|{key}"] for key in parameters})
            best_values = {key: tensors[f"best|{key}"] for key in parameters}
            _restore_adam(optimizer, active, tensors)
        order = self._order()
        part = max(1, math.ceil(config.joint_iters / _PARTS))
        bar = progress_bar(
            total=config.joint_iters,
            desc=f"joint pass ({config.loss})",
            unit="step",
            enabled=engine.progress,
            initial=step,
            kind=JOINT,
        )
        for parameter in active.values():
            parameter.requires_grad_(True)
        with bar, unchanged.constants():
            while step < config.joint_iters:
                schedule.set(step)
                optimizer.zero_grad()
                (loss(order[step]) / unit).backward()
                optimizer.step()
                step += 1
                bar.update()
                if step % part == 0 or step == config.joint_iters:
                    now, j_now = self._score(loss)
                    if now < best:
                        best, best_values, j_best = now, snapshot(parameters), j_now
                    bar.set_postfix_str(f"{best:.5g} after {first:.5g}")
                    if step < config.joint_iters:
                        record = {
                            "done": False,
                            "step": step,
                            "best": best,
                            "j_before": j_before,
                            "j_best": j_best,
                            "seconds": self._seconds(),
                        }
                        engine.state.save(
                            "joint", record, _tensors(parameters, best_values, optimizer, active)
                        )
        for parameter in active.values():
            parameter.requires_grad_(False)
        restore(parameters, best_values)
        return j_before, j_best

    def _factor(self, node: QuantModule) -> float:
        """On the step sizes of a node: `joint_lr`, tenfold for each four bits of the weights below eight."""
        return self.config.joint_lr * 10 ** (max(8 - node.config.w_bits, 0) / 4)

    def _order(self) -> list[int]:
        """The batch of each step: all in turn, each round in another order.

        Measured batches are held out where at least as many others are there: what is best on them is then
        best on images that nothing was learned from.
        """
        measured, batches = len(self.engine.measured), range(len(self.engine.batches))
        if len(batches) >= 2 * measured:
            batches = batches[measured:]
        generator = random.Random(f"{self.config.seed} joint")
        rounds = math.ceil(self.config.joint_iters / len(batches))
        return [index for _ in range(rounds) for index in generator.sample(batches, len(batches))]

    def _seconds(self) -> float:
        return self.earlier_seconds + time.monotonic() - self.started

    def _loss(self) -> Callable[[int], Tensor]:
        """The loss on the batch of a number."""
        if self.config.is_global:
            return self.engine.global_loss
        engine, kind = self.engine, self.config.loss
        stages = find_units(engine.qmodel, engine.trace, "stage")
        calls = [call for stage in stages for call in stage.outputs]
        # of the measured batches, which are met again and again; of all batches they could be gigabytes
        stored: dict[int, Targets] = {}

        def targets_of(index: int) -> Targets:
            if index in stored:
                return stored[index]
            batches = [engine.batches[index]]
            targets = Targets(
                engine.qmodel, batches, stages, engine.objective, kind == "fisher", together=True
            )
            with engine.in_float():
                targets.prepare(stages[0])
            if index in engine.measured:
                stored[index] = targets
            return targets

        def loss(index: int) -> Tensor:
            targets = targets_of(index)
            with engine.qmodel.runtime.recording(calls) as record:
                engine.qmodel(engine.batches[index])
            return cast(Tensor, sum(targets.loss(kind, stage, 0, record) for stage in stages))

        return loss

    @torch.no_grad()
    def _score(
        self, loss: Callable[[int], Tensor], known: tuple[float, float] | None = None
    ) -> tuple[float, float | None]:
        """(what the best parameters have least of, mean J of the measured crops; None where it is not known).

        That is J with "rd" and "rd_direct": eq. 12 squares the rise of each crop, and the crop that loses
        most would decide. With the others it is the mean loss of the measured crops.

        Args:
            known: `Engine.measure` of the present parameters.
        """
        if self.config.loss in ("rd", "rd_direct"):
            j = (known or self.engine.measure())[0]
            return j, j
        measured = self.engine.measured
        crops = [len(self.engine.batches[index]) for index in measured]
        return sum(float(loss(index)) * count for index, count in zip(measured, crops)) / sum(crops), None


def _tensors(
    parameters: Mapping[str, nn.Parameter],
    best: Mapping[str, Tensor],
    optimizer: torch.optim.Adam,
    active: Mapping[str, nn.Parameter],
) -> dict[str, Tensor]:
    """What a killed joint pass goes on from: the parameters now, the best ones, Adam's moments."""
    tensors: dict[str, Tensor] = {f"now|{key}": parameter for key, parameter in parameters.items()}
    tensors |= {f"best|{key}": value for key, value in best.items()}
    for key, parameter in active.items():
        tensors |= {
            f"adam|{key}|{field}": value for field, value in optimizer.state.get(parameter, {}).items()
        }
    return tensors


def _restore_adam(
    optimizer: torch.optim.Adam, active: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    for key, parameter in active.items():
        prefix = f"adam|{key}|"
        state = {
            name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)
        }
        if state:
            optimizer.state[parameter] = {
                field: value if field == "step" else value.to(parameter.device)
                for field, value in state.items()
            }
