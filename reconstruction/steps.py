"""The steps from a float codec to a quantized one, in their order: `STEPS` at the end of this file."""

import time

from licq.quant.config import QuantConfig
from licq.quant.rounding import ROUNDINGS
from licq.reconstruction.balance import balance_scales
from licq.reconstruction.calibration import Calibration, Step
from licq.reconstruction.config import PtqConfig
from licq.reconstruction.driver import reconstruct
from licq.reconstruction.engine import Engine
from licq.reconstruction.gptq import compensate_rounding, turned
from licq.reconstruction.objective import mean_cost
from licq.reconstruction.search import best_norm, search_ranges
from licq.reconstruction.sensitivity import measure_sensitivities, predicted_losses
from licq.reconstruction.split import split_channels
from licq.reconstruction.state import learned, restore
from licq.reconstruction.stress import flat, stressed
from licq.reconstruction.tighten import tighten_ranges
from licq.support.progress import progress as progress_bar

TIGHTENED_BATCHES = 3
"""Ranges are tightened on the first so many measured batches."""

SMOOTH = 3
"""And on so many smooth pictures, beside the harder crops of one crop."""


def search_norm(calibration: Calibration) -> None:
    """Take the Lp norm whose ranges give the lowest J (LAPQ, Nahshan et al. 2021, first part)."""

    def cost_of(quant: QuantConfig) -> float:
        qmodel = calibration.observed_model(quant)
        qmodel.quantize_nodes(True)
        return mean_cost(qmodel, calibration.measured_batches, calibration.objective)

    calibration.quant, calibration.history["search"] = best_norm(
        calibration.quant, cost_of, calibration.state, calibration.progress
    )


def observe(calibration: Calibration) -> None:
    """Build the quantized codec and set its first ranges."""
    calibration.qmodel = calibration.observed_model(calibration.quant)


def measure(calibration: Calibration) -> None:
    """Measure how much J, and the loss where that does not know J, rise with noise at each layer's output."""
    qmodel, batches, knobs = calibration.qmodel, calibration.measured_batches, calibration.knobs
    calibration.sensitivities = calibration.guide = measure_sensitivities(
        qmodel, batches, calibration.objective, knobs.seed, calibration.progress
    )
    if not knobs.knows_j:
        calibration.guide = measure_sensitivities(qmodel, batches, None, knobs.seed, calibration.progress)


def split(calibration: Calibration) -> None:
    """Carry the input channels whose rounding costs most by two digits."""
    knobs, min_gain = calibration.knobs, 0.0
    if knobs.split and knobs.split_gain and knobs.knows_j:
        calibration.qmodel.quantize_nodes(False)
        j = mean_cost(calibration.qmodel, calibration.measured_batches, calibration.objective)
        min_gain = knobs.split_gain * j
    calibration.history["splitting"] = split_channels(
        calibration.qmodel, calibration.guide, knobs.split, min_gain
    )


def balance(calibration: Calibration) -> None:
    """Share rounding noise between a layer's inputs and its weights."""
    if calibration.knobs.balance:
        balance_scales(calibration.qmodel, calibration.guide, calibration.knobs.balance, calibration.progress)


def search(calibration: Calibration) -> None:
    """Move the ranges on J by Powell's method (LAPQ, second part)."""
    calibration.history["search"] |= search_ranges(
        calibration.qmodel,
        calibration.measured_batches,
        calibration.objective,
        calibration.knobs.search_evals,
        calibration.state,
        calibration.progress,
    )


def compensate(calibration: Calibration) -> None:
    """Start learned rounding where GPTQ leaves it, or where a killed process has left it."""
    qmodel, knobs, state = calibration.qmodel, calibration.knobs, calibration.state
    if knobs.round_init != "gptq" or not ROUNDINGS[calibration.config.quant.rounding].starts_anywhere:
        return
    parameters = learned(qmodel.nodes)
    stored = state.load("start")
    if stored is not None:
        restore(parameters, stored[1])
        calibration.resumed_seconds += stored[0]["seconds"]
        return
    started = time.monotonic()
    batches = calibration.observed_batches
    if len(calibration.crops) < knobs.observed:
        batches = turned(batches)
    compensate_rounding(qmodel, batches, calibration.flat_batches, knobs.seed, calibration.progress)
    state.save("start", {"seconds": time.monotonic() - started}, parameters)


def tighten(calibration: Calibration) -> None:
    """Make ranges of inputs, and under `strict_int8` of all stored tensors, smaller where that lowers J."""
    crops = calibration.crops
    harder = [*stressed(crops[-1:]).split(2), *flat(crops)[-SMOOTH:].split(2)]
    is_resumed = calibration.state.load("tightened") is not None
    calibration.history["tightened"] = tighten_ranges(
        calibration.qmodel,
        calibration.measured_batches[:TIGHTENED_BATCHES],
        harder,
        calibration.objective,
        calibration.sensitivities,
        calibration.state,
        calibration.progress,
    )
    if is_resumed:
        calibration.resumed_seconds += calibration.history["tightened"]["seconds"]


def measure_start(calibration: Calibration) -> None:
    """Measure J of the quantized codec before anything is learned."""
    calibration.qmodel.quantize_nodes(True)
    batches = progress_bar(
        calibration.measured_batches,
        desc="measuring J",
        unit="batch",
        enabled=calibration.progress,
        leave=False,
    )
    calibration.history["j_start"] = mean_cost(calibration.qmodel, batches, calibration.objective)


def learn(calibration: Calibration) -> None:
    """Learn ranges, rounding and biases, unit by unit and together: `reconstruction.driver`."""
    engine = Engine(
        calibration.qmodel,
        calibration.batches,
        calibration.measured,
        calibration.knobs,
        calibration.objective,
        calibration.state,
        calibration.progress,
    )
    calibration.history |= reconstruct(engine)
    calibration.history.setdefault("j_start", calibration.history["j_units"])
    calibration.resumed_seconds += engine.resumed_seconds


def predict(calibration: Calibration) -> None:
    """Predict the rise of J that rounding noise still makes in each layer."""
    calibration.history["predicted"] = predicted_losses(calibration.qmodel, calibration.sensitivities)


def _by_powell(config: PtqConfig) -> bool:
    return config.reconstruction.range_search == "powell"


def _tightens(config: PtqConfig) -> bool:
    """Ranges shrink on J, so the loss must know it."""
    knobs = config.reconstruction
    return knobs.tighten and knobs.knows_j


def _differs_from_units(config: PtqConfig) -> bool:
    """Whether J before learning is another one than J behind the units, which is measured anyway."""
    knobs = config.reconstruction
    return bool(knobs.iters and knobs.learn)


PREPARATION = (
    Step("observing", search_norm, _by_powell),
    Step("observing", observe),
    Step("measuring sensitivities", measure),
    Step("splitting and balancing", split),
    Step("splitting and balancing", balance),
    Step("searching ranges", search, _by_powell),
    Step("compensating rounding", compensate),
    Step("tightening ranges", tighten, _tightens),
)
LEARNING = (
    Step("learning", measure_start, _differs_from_units),
    Step("learning", learn),
    Step("learning", predict),
)
STEPS = (*PREPARATION, *LEARNING)
