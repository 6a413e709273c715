"""The engine: objective, units, prefix caches, targets, learning, resume."""

import itertools
import math

import pytest
import torch
from torch import nn

from licq.models import create_model
from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.quant.rounding import ROUNDINGS
from licq.reconstruction import engine as engine_module
from licq.reconstruction import state as state_module
from licq.reconstruction import unit_pass
from licq.reconstruction.api import quantize
from licq.reconstruction.cache import PrefixCache
from licq.reconstruction.config import (
    KNOBS,
    LOSSES,
    UNITS,
    PtqConfig,
    ReconstructionConfig,
    list_presets,
    parse_knobs,
)
from licq.reconstruction.objective import Objective, rate
from licq.reconstruction.stress import stressed
from licq.reconstruction.targets import Targets, divergence, tensor_of
from licq.reconstruction.units import Trace, find_units
from licq.support.errors import InputError

SIZES = {
    "balle2018": {"N": 6, "M": 8},
    "minnen2018": {"N": 6, "M": 8},
    "cheng2020-anchor": {"N": 6},
}


def images(count: int = 4, size: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)
    return (smooth * 255).round() / 255


def codec(arch: str = "minnen2018") -> nn.Module:
    torch.manual_seed(0)
    return create_model(arch, **SIZES[arch]).eval()


def method(rounding: str = "learned_offset", quant: dict | None = None, **knobs) -> PtqConfig:
    # balancing, harder crops and GPTQ take as long as everything else, and have tests of their own
    brief = {"balance": 0.0, "stress": False, "round_init": "nearest"}
    knobs = {"iters": 4, "joint_iters": 4, "batch": 2, **brief, **knobs}
    return PtqConfig("test", QuantConfig(rounding=rounding, **(quant or {})), ReconstructionConfig(**knobs))


def observed(model: nn.Module, batches, **quant) -> QuantModel:
    qmodel = QuantModel(model, QuantConfig(**quant))
    qmodel.observe(batches)
    qmodel.quantize_nodes(False)
    return qmodel


def outcome(qmodel: QuantModel, x: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        output = qmodel(x)
    return [output["x_hat"], *output["likelihoods"].values()]


# -------------------------------------------------------------------------------------------------- objective


def test_objective_is_bits_plus_weighted_squared_error_on_255():
    x = torch.zeros(2, 3, 4, 8)
    output = {
        "x_hat": torch.stack([torch.full((3, 4, 8), 0.5), torch.full((3, 4, 8), 2.0)]),
        "likelihoods": {"y": torch.full((2, 4, 1, 2), 0.25), "z": torch.full((2, 1, 1, 1), 0.5)},
    }
    bits = (4 * 2 * 2 + 1) / 32
    assert torch.allclose(rate(output, x), torch.tensor([bits, bits]))
    expected = [bits + 0.01 * 127.5**2, bits + 0.01 * 255**2]  # the second is clipped to 1
    assert torch.allclose(Objective(0.01)(output, x), torch.tensor(expected))


def test_objective_with_ms_ssim_of_equal_images_is_the_rate():
    x = images(1, 192)
    output = {"x_hat": x.clone(), "likelihoods": {"y": torch.full((1, 2, 3, 3), 0.5)}}
    assert torch.allclose(Objective(5.0, "ms-ssim")(output, x), rate(output, x), atol=1e-5)


@pytest.mark.parametrize("arguments", [(0.0, "mse"), (-1.0, "mse"), (math.nan, "mse"), (1.0, "psnr")])
def test_objective_refuses(arguments):
    with pytest.raises(InputError):
        Objective(*arguments)


# ------------------------------------------------------------------------------------------- units and caches


def watch_learning(monkeypatch) -> list[torch.Tensor]:
    """The batches that steps learn from, in a list that fills while they do."""
    taught = []
    loss = engine_module.Engine.global_loss

    def watched(self, index, cache=None):
        taught.append(self.batches[index])
        return loss(self, index, cache)

    monkeypatch.setattr(engine_module.Engine, "global_loss", watched)
    return taught


def test_j_is_measured_on_the_first_crops_and_all_teach(monkeypatch):
    model, crops, objective = codec("balle2018"), images(5), Objective(0.01)
    taught = watch_learning(monkeypatch)
    config = method(iters=0, joint_iters=3, measured=3, loss="rd_direct")
    history = quantize(model, crops, config, lmbda=0.01, progress=False).history
    with torch.no_grad():
        expected = torch.cat([objective(model(x), x) for x in crops[:3].split(2)]).double().mean()
    assert history["j_float"] == pytest.approx(float(expected), rel=1e-6)
    assert {float(x.sum()) for batch in taught for x in batch} == {float(x.sum()) for x in crops}


def test_many_crops_hold_out_those_that_j_is_measured_on_and_j_does_not_rise(monkeypatch):
    model, crops = codec("balle2018"), images(8)
    taught = watch_learning(monkeypatch)
    config = method(iters=0, joint_iters=4, measured=2, joint_lr=100.0)  # steps that are much too large
    history = quantize(model, crops, config, lmbda=0.01, progress=False).history
    assert {float(x.sum()) for batch in taught for x in batch} == {float(x.sum()) for x in crops[2:]}
    assert history["j_end"] == history["joint"]["j_after"] <= history["joint"]["j_before"]


@pytest.mark.parametrize("arch", SIZES)
@pytest.mark.parametrize("kind", UNITS)
def test_units_hold_every_learning_node_once_and_in_order(arch, kind):
    batch = images(1)
    qmodel = observed(codec(arch), [batch])
    trace = Trace(qmodel, batch)
    units = find_units(qmodel, trace, kind)
    nodes = [name for unit in units for name in unit.nodes]
    assert len(nodes) == len(set(nodes))
    assert {name for name, node in qmodel.nodes.items() if any(node.learnable().values())} <= set(nodes)
    starts = [trace.begin[unit.start] for unit in units]
    assert starts == sorted(starts)
    assert kind != "network" or len(units) == 1


def test_a_block_and_the_gdn_behind_a_convolution_are_one_unit():
    batch = images(1)
    qmodel = observed(codec("minnen2018"), [batch])
    names = {unit.name: unit.nodes for unit in find_units(qmodel, Trace(qmodel, batch), "block")}
    assert names["g_a.0"] == ("g_a.0", "g_a.1")
    qmodel = observed(codec("cheng2020-anchor"), [batch])
    names = {unit.name: unit for unit in find_units(qmodel, Trace(qmodel, batch), "block")}
    assert len(names["g_a.0"].nodes) > 3
    assert names["g_a.0"].outputs == (("g_a.0", 0),)


@pytest.mark.parametrize("arch", SIZES)
@pytest.mark.parametrize("kind", [pytest.param("layer", marks=pytest.mark.slow), "block"])
def test_a_forward_behind_the_cached_prefix_is_the_whole_forward(arch, kind):
    batches = list(images(2).split(1))
    qmodel = observed(codec(arch), batches)
    trace = Trace(qmodel, batches[0])
    qmodel.quantize_nodes(True)
    whole = [outcome(qmodel, batch) for batch in batches]
    cache = PrefixCache(qmodel, trace, batches)
    for unit in find_units(qmodel, trace, kind):
        cache.advance(unit.start)
        for index, batch in enumerate(batches):
            with cache.replaying(index):
                for ours, expected in zip(outcome(qmodel, batch), whole[index]):
                    assert torch.equal(ours, expected), unit.name


# ---------------------------------------------------------------------------------------------------- targets


def test_fisher_weights_are_squared_gradients_of_j_by_finite_differences():
    model = _OneLayer()
    batch = images(1, 16)
    qmodel = observed(model, [batch])
    units = find_units(qmodel, Trace(qmodel, batch), "layer")
    objective = Objective(0.01)
    targets = Targets(qmodel, [batch], units, objective, True)
    targets.prepare(units[0])
    call = units[0].outputs[0]
    weights, real = targets.weights[0][call], targets.outputs[0][call]
    gradients = []
    for index in ((0, 0, 0, 0), (0, 1, 5, 7), (0, 2, 15, 3)):
        costs = []
        for step in (1e-2, -1e-2):
            moved = real.clone()
            moved[index] += step
            costs.append(float(objective(model.rest(moved), batch).detach().double()))
        gradients.append((costs[0] - costs[1]) / 2e-2)
    ratios = [
        (2 * float(weights[index]) - 1) / g**2
        for index, g in zip(((0, 0, 0, 0), (0, 1, 5, 7), (0, 2, 15, 3)), gradients)
    ]
    assert max(ratios) / min(ratios) == pytest.approx(1, rel=0.05)
    assert float(weights.mean()) == pytest.approx(1, rel=1e-4)


class _OneLayer(nn.Module):
    """A codec of one layer whose rate falls off smoothly: J has a closed form."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Conv2d(3, 3, 3, padding=1)
        self.last = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.rest(self.layer(x))

    def rest(self, y):
        x_hat = self.last(y) * 0.1 + 0.5
        return {"x_hat": x_hat, "likelihoods": {"y": torch.exp(-y * y)}}


def test_divergence_is_that_of_the_distributions():
    a, b = torch.randn(2, 5, 3, 3), torch.randn(2, 5, 3, 3)
    p, q = a.softmax(1), b.softmax(1)
    assert torch.allclose(divergence(b, a), (p * (p / q).log()).sum(1).mean(), atol=1e-6)
    assert float(divergence(a, a)) == pytest.approx(0, abs=1e-6)


# --------------------------------------------------------------------------------------------------- learning


QUICK_LOSSES = [("rd", "stage"), ("rd_direct", "network"), ("stage", "block"), ("kl", "layer")]


@pytest.mark.parametrize(
    ("loss", "unit"),
    [
        pair if pair in QUICK_LOSSES else pytest.param(*pair, marks=pytest.mark.slow)
        for pair in [*zip(LOSSES, itertools.cycle(UNITS)), ("rd", "network"), ("mse", "block")]
    ],
)
def test_every_loss_and_unit_runs_and_does_not_worsen_its_own_measure(loss, unit):
    config = method(loss=loss, unit=unit, quant={"w_bits": 6, "a_bits": 6})
    qmodel = quantize(codec("balle2018"), images(), config, lmbda=0.01, progress=False)
    history = qmodel.history
    assert len(history["units"]) >= 1
    if loss == "rd_direct":
        assert all(unit["j_after"] <= unit["j_before"] for unit in history["units"])
        assert history["joint"] is None or history["j_end"] <= history["j_units"] + 1e-9
    assert qmodel.frozen and math.isfinite(history["j_end"])
    assert history["seconds"] > 0 and history["peak_memory_mb"] > 0


@pytest.mark.parametrize(
    "learn, steps",
    [
        (("bias", "range_a"), [2, 3]),
        *(pytest.param((knob,), [5], marks=pytest.mark.slow) for knob in ("bias", "range_a")),
    ],
)
def test_phases_with_something_to_learn_share_the_steps(monkeypatch, learn, steps):
    taken: list[int] = []
    learning = unit_pass.UnitPass.learn
    monkeypatch.setattr(
        unit_pass.UnitPass,
        "learn",
        lambda unit, active, count: (taken.append(count), learning(unit, active, count)),
    )
    config = method(iters=5, joint_iters=0, unit="network", learn=learn)
    quantize(codec("balle2018"), images(), config, lmbda=0.01, progress=False)
    assert taken == steps


def test_without_units_the_network_still_learns_jointly():
    config = method(iters=0, joint_iters=2, unit="network")
    history = quantize(codec("balle2018"), images(), config, lmbda=0.01, progress=False).history
    assert history["units"] == [] and history["joint"] is not None
    history = quantize(
        codec("balle2018"), images(), method(iters=2, unit="network"), lmbda=0.01, progress=False
    ).history
    assert len(history["units"]) == 1 and history["joint"] is None


@pytest.mark.parametrize(
    "rounding",
    [
        name if name in ("learned_offset", "adaround") else pytest.param(name, marks=pytest.mark.slow)
        for name in ROUNDINGS
    ],
)
def test_every_rounding_ends_in_integers_and_keeps_the_mask(rounding):
    config = method(rounding, iters=2, joint_iters=2)
    qmodel = quantize(codec("minnen2018"), images(2), config, lmbda=0.01, progress=False)
    node = qmodel.nodes["context_prediction"]
    mask = node.weight_quantizer.mask.bool().expand(node.weight_int.shape)
    assert int(node.weight_int[~mask].abs().max()) == 0
    assert node.weight_int.dtype == torch.int8


def test_learning_lowers_j_on_the_calibration_images_at_low_bits():
    config = method(loss="rd_direct", iters=10, joint_iters=30, quant={"w_bits": 4, "a_bits": 6})
    history = quantize(codec("balle2018"), images(), config, lmbda=0.05, progress=False).history
    assert history["j_end"] < history["j_start"]


def test_input_mix_draws_on_the_float_prefix():
    config = method(loss="mse", input_mix=0.5, unit="layer", joint_iters=0)
    plain = method(loss="mse", unit="layer", joint_iters=0)
    model, x = codec("balle2018"), images()
    a, b = (quantize(model, x, c, lmbda=0.01, progress=False) for c in (config, plain))
    assert any(not torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


def test_steps_too_large_are_taken_back():
    config = method(loss="rd_direct", lr_range=5.0, lr_bias=100.0, lr_rounding=10.0)
    history = quantize(codec("balle2018"), images(), config, lmbda=0.01, progress=False).history
    assert not all(unit["kept"] for unit in history["units"])
    assert history["j_end"] <= history["j_start"] * 1.01


def test_the_float_codec_is_not_changed():
    model = codec("minnen2018")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    quantize(model, images(2), method(iters=2, joint_iters=2), lmbda=0.01, progress=False)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


# ----------------------------------------------------------------------------------------------------- resume


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others():
    model, x = codec("balle2018"), images(2)  # two batches, whose order is the seed's
    runs = [quantize(model, x, method(seed=seed, batch=1), lmbda=0.01, progress=False) for seed in (0, 0, 1)]
    first, second, third = ([*run.state_dict().values()] for run in runs)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert any(not torch.equal(a, b) for a, b in zip(first, third))


@pytest.fixture(scope="module")
def uninterrupted():
    config = method(unit="stage", joint_iters=12, round_init="gptq")
    return config, quantize(codec("balle2018"), images(), config, lmbda=0.01, progress=False)


@pytest.mark.parametrize("survive", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 6, 10))])
def test_a_killed_calibration_goes_on_to_the_same_numbers(tmp_path, monkeypatch, uninterrupted, survive):
    config, whole = uninterrupted
    saves = []
    save = state_module.StateFolder.save

    def dying(self, *arguments):
        save(self, *arguments)
        saves.append(arguments[0])
        if len(saves) == survive:
            raise KeyboardInterrupt

    monkeypatch.setattr(state_module.StateFolder, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        quantize(codec("balle2018"), images(), config, lmbda=0.01, folder=tmp_path, progress=False)
    again = quantize(
        codec("balle2018"), images(), config, lmbda=0.01, folder=tmp_path, resume=True, progress=False
    )
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))
    for key in ("j_start", "j_units", "j_end"):
        assert whole.history[key] == again.history[key]
    strip = [
        [{k: v for k, v in unit.items() if k != "seconds"} for unit in run.history["units"]]
        for run in (whole, again)
    ]
    assert strip[0] == strip[1]


def test_resume_with_other_settings_is_refused(tmp_path):
    first, other = (
        method(iters=1, unit="network", joint_iters=1, round_init="nearest", seed=seed) for seed in (0, 5)
    )
    given = {"model": codec("balle2018"), "images": images(2), "lmbda": 0.01, "folder": tmp_path}
    quantize(config=first, progress=False, **given)
    with pytest.raises(InputError, match="other settings"):
        quantize(config=other, resume=True, progress=False, **given)
    quantize(config=other, progress=False, **given)


# ---------------------------------------------------------------------------------------------------- presets


def test_every_preset_loads_and_knobs_are_checked(tmp_path):
    for name in list_presets():
        assert PtqConfig.from_preset(name).preset == name
    assert PtqConfig.from_preset("licq", w_bits=4).quant.w_bits == 4
    bad = tmp_path / "bad.yaml"
    bad.write_text("no_such_knob: 3\n")
    for arguments in (("nowhere",), (str(bad),), (str(tmp_path / "absent.yaml"),)):
        with pytest.raises(InputError):
            PtqConfig.from_preset(*arguments)
    for knobs in (
        {"loss": "l1"},
        {"unit": "atom"},
        {"iters": -1},
        {"batch": 0},
        {"input_mix": 2},
        {"learn": ["luck"]},
    ):
        with pytest.raises(InputError):
            ReconstructionConfig(**knobs)
    assert set(ReconstructionConfig().learn) <= set(KNOBS)


def test_offsets_and_weights_are_learned_by_the_rounding_schemes_that_do_so():
    for knob, scheme in (("offset", "learned_offset"), ("weight", "ste")):
        knobs = parse_knobs([("learn", f"range_w,{knob}"), ("rounding", scheme)], {})
        assert PtqConfig.from_preset("licq", **knobs).reconstruction.learn == ("range_w", "rounding")
        with pytest.raises(
            InputError,
            match=f"`learn={knob}` needs `rounding={scheme}`, not adaround",
        ):
            PtqConfig.from_preset("licq", **{**knobs, "rounding": "adaround"})
    with pytest.raises(InputError, match="`split=0.1`"):
        PtqConfig.from_preset("licq", transform="split")


def test_images_of_a_wrong_shape_are_refused():
    with pytest.raises(InputError, match="shape"):
        quantize(codec("balle2018"), torch.zeros(3, 64, 64), lmbda=0.01)
    assert tensor_of((torch.ones(1), None)).item() == 1


def test_ranges_hold_colours_that_the_crops_do_not_show():
    grey = images().mean(1, keepdim=True).expand(-1, 3, -1, -1) * 0.9
    crops = ((grey + torch.tensor([0.02, 0.0, -0.02]).reshape(1, 3, 1, 1)).clamp(0, 1) * 255).round() / 255
    harder = stressed(crops)
    assert harder.shape == (16, 3, 64, 64) and torch.equal(harder * 255, (harder * 255).round())
    colourful, sharp = harder[:12], harder[12:]
    assert float((colourful.amax(1) - colourful.amin(1)).mean()) > 2 * float(
        (crops.amax(1) - crops.amin(1)).mean()
    )
    assert float(sharp.diff(dim=-1).abs().mean()) > 3 * float(crops.diff(dim=-1).abs().mean())
    assert stressed(crops[:, :, :33, :31]).shape == (16, 3, 33, 31)
    spans = []
    for stress in (False, True):
        qmodel = quantize(
            codec(), crops, method(iters=0, joint_iters=0, stress=stress), lmbda=0.01, progress=False
        )
        grid = qmodel.nodes["g_a.2"].input_grid
        spans.append(float((grid.high - grid.low).sum()))
    assert spans[1] > spans[0]
