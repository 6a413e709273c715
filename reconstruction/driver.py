"""The reconstruction engine (design, section 5): one driver for every unit, loss and set of knobs.

Algorithm 1 of RDO-PTQ (Shi, Lu, Ma, arXiv 2211.02854; preset "rdo-ptq": unit = "layer", loss = "rd"):

    j_float = J of each crop, all in float                                  # J_0
    for unit in engine.units:                                               # line 1, in execution order
        engine.settle(engine.nodes_before(unit))                            # integers, frozen
        prefix.advance(engine, unit)                                        # their outputs, once
        if eq. 12 rises by less than config.min_rise: the unit takes no steps   # on ten crops
        for round in range(config.rounds):                                  # line 2, until it has converged
            for knobs in (WEIGHT_KNOBS, ACTIVATION_KNOBS):                  # lines 3 to 7, then 8 to 11
                active = parameters of these knobs                          # N_w, N_b, offsets; then N_x
                for step in range(config.iters / 2):
                    loss = engine.global_loss(index, prefix.quantized)      # (J_hat - J_0)^2, eq. 12, through
                    loss.backward()                                         # the float layers behind the unit
                    optimizer.step()                                        # Adam, step sizes of a cosine
            if the mean of eq. 12 over the measured crops is not a hundredth lower: break
        restore the parameters of the round with the lowest, or of none
        engine.settle(unit.nodes)
    engine.settle_all()

The default (preset "licq"; iters = 0 leaves the units out, the joint pass takes their place):

    observe ranges; measure sensitivities of J; split and balance           # steps.PREPARATION
    compensate rounding (GPTQ): where the offsets of rounding start         # steps.PREPARATION
    tighten ranges of inputs where that lowers J                            # steps.PREPARATION
    engine.settle_all(); thaw every node
    active = N_w, N_b, offsets and biases of all layers                     # config.learn
    for step in range(config.joint_iters):
        loss = engine.global_loss(order[step])                              # eq. 12 at the codec's output
        (loss / first_loss).backward(); optimizer.step()
        six times: if J of the measured crops is the lowest so far, best_values = parameters
    restore(parameters, best_values)
    engine.settle_all()

Other presets change the loss (the unit's own error in place of `global_loss`, for all steps or for the first
ones), the unit, the knobs that are learned, or what is drawn at random (`input_mix`, `act_drop`).
"""

import torch

from licq.reconstruction.engine import Engine
from licq.reconstruction.expected import UNITS
from licq.reconstruction.joint_pass import JointPass
from licq.reconstruction.state import learned, restore, stored_records
from licq.reconstruction.unit_pass import Prefix, UnitPass
from licq.reconstruction.units import Unit
from licq.support.progress import progress as progress_bar


def reconstruct(engine: Engine) -> dict:
    """Learn the quantization parameters of the engine's codec, in place: units first, then all together.

    Returns:
        What the history says: {"units": one entry each, see `UnitPass.run`; "joint": see `JointPass.run`, or
        None; "j_float", "j_units", "j_end": mean J of the float codec, behind the units and at the end}.
    """
    config = engine.config
    has_units = bool(config.iters and any(config.learn))
    # the reconstruction of the unit "network" is a joint pass already
    has_joint = bool(config.joint_iters and not (has_units and config.unit == "network"))
    history: dict = {"units": [], "joint": None, "j_float": engine.mean_j_float()}
    if has_units:
        history["units"] = reconstruct_units(engine)
    engine.settle(list(engine.qmodel.nodes))
    before = engine.measure()
    history["j_units"] = history["j_end"] = before[0]
    if has_joint:
        history["joint"] = JointPass(engine).run(before)
        history["j_end"] = history["joint"]["j_after"]
    return history


def reconstruct_units(engine: Engine) -> list[dict]:
    """Reconstruct every unit in execution order; those that an earlier process has finished are restored."""
    config = engine.config
    prefix = Prefix.start(engine)
    entries = []
    bar = progress_bar(
        total=len(engine.units),
        desc=f"reconstructing {config.unit}s ({config.loss})",
        unit="unit",
        enabled=engine.progress,
        initial=sum(name.isdigit() for name in stored_records(engine.state.folder)),
        kind=UNITS,
    )
    with bar:
        for number, unit in enumerate(engine.units):
            engine.settle(engine.nodes_before(unit))
            if not engine.learns(unit):
                bar.update()
                continue
            entry = _restored(engine, unit, number)
            if entry is None:
                prefix.advance(engine, unit)
                unit_pass = UnitPass(engine, unit, number, prefix)
                entry = unit_pass.run()
                behind = {"costs": torch.cat(engine.costs_behind)}
                engine.state.save(f"{number:03d}", entry, unit_pass.parameters | behind)
                bar.update()
            engine.settle(unit.nodes)
            entries.append(entry)
            bar.set_postfix_str(f"{unit.name}: J {entry['j_before']:.4f} -> {entry['j_after']:.4f}")
    return entries


def _restored(engine: Engine, unit: Unit, number: int) -> dict | None:
    """The history's entry of a unit that an earlier process has finished, parameters restored; or None."""
    stored = engine.state.load(f"{number:03d}")
    if stored is None:
        return None
    entry, values = stored
    engine.resumed_seconds += entry["seconds"]
    sizes = [len(costs) for costs in engine.costs_behind]
    engine.costs_behind = list(values["costs"].to(engine.costs_behind[0]).split(sizes))
    restore(learned({name: engine.qmodel.nodes[name] for name in unit.nodes}), values)
    return entry
