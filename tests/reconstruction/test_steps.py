"""The list of steps: its order, what each writes, and that it goes on behind what is finished."""

import pytest
import torch

from licq.reconstruction import calibration as calibration_module
from licq.reconstruction import steps
from licq.reconstruction.api import prepare_calibration, quantize
from licq.reconstruction.calibration import Calibration, Step, run_steps
from licq.reconstruction.config import PtqConfig, ReconstructionConfig
from licq.reconstruction.objective import Objective
from licq.reconstruction.state import StateFolder
from licq.support.errors import InputError
from tests.tiny_codecs import images, tiny_codec

ALWAYS = [
    "observing",
    "measuring sensitivities",
    "splitting and balancing",
    "compensating rounding",
    "learning",
]


def calibration(preset: str = "licq", crops: torch.Tensor | None = None, **knobs) -> Calibration:
    config = PtqConfig.from_preset(preset, **knobs)
    return Calibration(
        tiny_codec("balle2018"),
        images(5) if crops is None else crops,
        config,
        Objective(0.01),
        progress=False,
    )


def test_steps_run_in_the_order_of_the_list_and_their_times_add_up(monkeypatch):
    order = []
    clock = iter(range(100))
    monkeypatch.setattr(calibration_module.time, "monotonic", lambda: float(next(clock)))
    listed = [
        Step("a", lambda _: order.append(1)),
        Step("never", lambda _: order.append(2), lambda config: config.reconstruction.iters > 10**6),
        Step("b", lambda _: order.append(3)),
        Step("a", lambda _: order.append(4)),
    ]
    state = calibration()
    run_steps(state, listed)
    assert order == [1, 3, 4] and state.seconds_by_step == {"a": 2.0, "b": 1.0}


@pytest.mark.parametrize(
    "preset, search, tightens", [("licq", False, True), ("nearest", False, False), ("lapq", True, False)]
)
def test_the_history_names_every_step(preset, search, tightens):
    config = PtqConfig.from_preset(preset, joint_iters=0, search_evals=5, measured=2, observed=2)
    history = quantize(tiny_codec("balle2018"), images(2), config, lmbda=0.01, progress=False).history
    assert sorted(history["seconds_by_step"]) == sorted(
        ALWAYS + ["searching ranges"] * search + ["tightening ranges"] * tightens
    )
    assert set(history) == {
        *("search", "splitting", "j_start", "units", "joint", "j_float", "j_units", "j_end", "predicted"),
        *("seconds", "seconds_by_step", "peak_memory_mb"),
        *(["tightened"] if tightens else []),
    }
    assert (history["search"] is not None) == search
    assert {"j_start", "j_units", "j_end"} <= history.keys() and history["j_float"] > 0


def test_preparation_is_the_list_up_to_learning():
    assert steps.STEPS[: len(steps.PREPARATION)] == steps.PREPARATION
    assert [step.run for step in steps.PREPARATION] == [
        *(steps.search_norm, steps.observe, steps.measure, steps.split),
        *(steps.balance, steps.search, steps.compensate, steps.tighten),
    ]
    config = PtqConfig.from_preset(measured=3, observed=4)
    found = prepare_calibration(tiny_codec("balle2018"), images(5), config, Objective(0.01), progress=False)
    assert not found.qmodel.frozen and "learning" not in found.seconds_by_step
    assert set(found.sensitivities) <= set(found.qmodel.layers) and found.guide is found.sensitivities
    assert found.history["splitting"]["extra_macs"] <= config.reconstruction.split


def test_crops_are_measured_observed_and_learned_from_in_batches():
    crops = images(9)
    state = calibration(crops=crops, measured=3, observed=6, batch=2)
    assert [len(batch) for batch in state.batches] == [2, 1, 2, 1, 2, 1] and state.measured == 2
    assert torch.equal(torch.cat(state.batches), crops)
    assert torch.equal(torch.cat(state.measured_batches), crops[:3])
    assert torch.equal(torch.cat(state.observed_batches), crops[:6])
    few = calibration(crops=crops[:2], measured=3, observed=6, batch=2)
    assert len(few.batches) == len(few.observed_batches) == len(few.measured_batches) == 1


def test_losses_that_do_not_know_j_split_by_the_layers_own_error():
    guides = {}
    for loss in ("rd", "mse"):
        state = calibration(loss=loss, measured=2, observed=2)
        run_steps(state, steps.PREPARATION[1:3])
        guides[loss] = state
    assert guides["rd"].guide is guides["rd"].sensitivities
    assert guides["mse"].guide is not guides["mse"].sensitivities
    for name, of_j in guides["rd"].sensitivities.items():
        assert torch.equal(of_j.curvature, guides["mse"].sensitivities[name].curvature)


def test_a_compensated_start_is_taken_from_the_folder(tmp_path, monkeypatch):
    run_steps(first := stored(tmp_path, resume=False), steps.PREPARATION)
    monkeypatch.setattr(steps, "compensate_rounding", None)  # it is not called again
    run_steps(again := stored(tmp_path, resume=True), steps.PREPARATION)
    a, b = first.qmodel.state_dict(), again.qmodel.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert first.history["tightened"] == again.history["tightened"]
    assert first.resumed_seconds == 0 < again.history["tightened"]["seconds"] < again.resumed_seconds


def stored(folder, resume: bool) -> Calibration:
    state = calibration(measured=2, observed=2, stress=False, balance=0.0, tighten=True)
    state.state = StateFolder(folder, "the same", resume)
    return state


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("iters", 2.5, "no integer"),
        ("batch", True, "no integer"),
        ("joint_iters", -1, "negative"),
        ("lr_range", float("nan"), "negative"),
        ("observed", 0, "too small"),
        ("split", 1.5, "out of range"),
    ],
)
def test_a_bad_field_is_named(field, value, words):
    with pytest.raises(InputError, match=f"`{field}=.*` is .*{words}"):
        ReconstructionConfig(**{field: value})
