"""Mechanisms that single presets use: learned rounding borders, QDrop, losses of stage and output, blended
losses, searched ranges."""

import dataclasses

import pytest
import torch

from licq.integer.lowering import lower
from licq.integer.reference import run
from licq.quant.config import QuantConfig
from licq.quant.mac import QuantMAC
from licq.quant.model import QuantModel
from licq.quant.qtensor import QTensor
from licq.reconstruction import search, unit_pass
from licq.reconstruction.api import quantize
from licq.reconstruction.config import PtqConfig, list_presets
from licq.reconstruction.engine import Engine
from licq.reconstruction.objective import Objective
from licq.reconstruction.search import NORMS, vertex
from licq.reconstruction.state import StateFolder
from licq.support.errors import InputError
from tests.reconstruction.test_driver import codec, images, method, outcome

FEW = {"iters": 2, "search_evals": 12}


# their rounding, losses and ranges are those of brecq, aquant, hamp-lic and rdo-ptq, which stay
LIKE_OTHERS = ("adaround", "mse-layer", "pd-quant", "qdrop", "rdo-ptq-public")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in LIKE_OTHERS else name for name in list_presets()],
)
def test_every_preset_makes_a_model_that_files_keep(name, tmp_path):
    few = {
        key: value
        for key, value in FEW.items()
        if key != "iters" or PtqConfig.from_preset(name).reconstruction.iters
    }
    qmodel = quantize(
        codec("balle2018"),
        images(2),
        PtqConfig.from_preset(name, joint_iters=0, **few),
        lmbda=0.01,
        progress=False,
    )
    qmodel.save(tmp_path / "m.safetensors")
    x = images(1)
    assert all(map(torch.equal, outcome(qmodel, x), outcome(QuantModel.load(tmp_path / "m.safetensors"), x)))


def test_a_preset_may_build_on_another(tmp_path):
    (tmp_path / "own.yaml").write_text("base: qdrop\niters: 3\n")
    own, base = PtqConfig.from_preset(str(tmp_path / "own.yaml")), PtqConfig.from_preset("qdrop")
    assert own.preset == "own" and own.reconstruction.iters == 3 and own.quant == base.quant
    assert own.reconstruction.act_drop == base.reconstruction.act_drop == 0.5
    (tmp_path / "own.yaml").write_text(f"base: {tmp_path / 'own.yaml'}\n")
    with pytest.raises(InputError, match="itself"):
        PtqConfig.from_preset(str(tmp_path / "own.yaml"))


def test_few_bits_may_have_knobs_of_their_own():
    eight, four = (PtqConfig.from_preset("licq", w_bits=bits) for bits in (8, 4))
    assert (eight.quant.w_range, four.quant.w_range) == (
        "max",
        "mse",
    ) and four.reconstruction.joint_iters > eight.reconstruction.joint_iters
    assert PtqConfig.from_preset("licq", w_bits=4, joint_iters=7).reconstruction.joint_iters == 7


def test_few_bits_know_the_knobs_of_the_preset_below(tmp_path):
    (tmp_path / "own.yaml").write_text("base: licq\nseed: 1\n")
    own, base = (PtqConfig.from_preset(name, w_bits=4) for name in (str(tmp_path / "own.yaml"), "licq"))
    assert own.quant == base.quant and own.reconstruction == dataclasses.replace(base.reconstruction, seed=1)


def test_strict_int8_may_have_knobs_of_its_own(tmp_path):
    (tmp_path / "own.yaml").write_text("base: licq\nseed: 1\n")
    (tmp_path / "strict.yaml").write_text("base: licq\nstrict_int8: true\njoint_iters: 7\n")

    def joint(preset="licq", **knobs):
        knobs = PtqConfig.from_preset(preset, **knobs).reconstruction
        return knobs.joint_iters, knobs.joint_lr

    assert joint() == (40, 0.2) and joint(strict_int8=True) == (300, 0.6)
    assert joint(strict_int8=True, w_bits=6) == joint(w_bits=6) == (300, 0.1)
    assert joint(strict_int8=True, joint_iters=7) == (7, 0.6)
    assert joint(str(tmp_path / "own.yaml"), strict_int8=True) == (300, 0.6)
    assert joint(str(tmp_path / "strict.yaml"))[0] == 7


@pytest.mark.parametrize("granularity", [pytest.param("channel", marks=pytest.mark.slow), "tensor"])
def test_a_learned_rounding_border_is_lowered_and_kept(tmp_path, granularity):
    quant = {"a_granularity": granularity}
    config = method(loss="mse", unit="layer", learn=("border",), lr_rounding=0.1, joint_iters=0, quant=quant)
    qmodel = quantize(codec("balle2018"), images(), config, lmbda=0.01, progress=False)
    borders = [
        node.input_grid.border
        for node in qmodel.nodes.values()
        if isinstance(node, QuantMAC) and node.input_grid.border is not None
    ]
    assert borders and any(float(border.abs().max()) > 0.05 for border in borders)
    assert any(
        len(set(border.tolist())) > 2 for border in borders
    )  # one a channel, also where a tensor has one scale
    qmodel.save(tmp_path / "m.safetensors")
    x = images(1)
    for model in (qmodel, QuantModel.load(tmp_path / "m.safetensors")):
        with torch.no_grad():
            expected = model(x)["x_hat"]
        found = run(lower(model, 64, 64), {"pixels": (x * 255).round().to(torch.uint8)})["pixels"]
        assert torch.equal(found.float() / 255, expected)


def test_a_rounding_border_moves_where_values_are_rounded_up():
    model = QuantModel(codec("balle2018"), QuantConfig(a_bits=6))
    model.observe([images(2)])
    grid = next(node.input_grid for name, node in model.nodes.items() if name == "g_a.2")
    values = (
        torch.linspace(-0.9, 0.9, 61).reshape(1, 1, -1, 1).expand(1, len(grid.log_n), -1, -1)
        * float(grid.parameters_of_grid()[0].min())
        * 3
    )
    fine = torch.tensor(2.0**-20, dtype=torch.float64)
    for x in (
        QTensor(values, None, model.runtime),
        QTensor((values.double() / fine).round(), fine, model.runtime),
    ):
        grid.border = None
        real = x.real() / grid.parameters_of_grid()[0].reshape(1, -1, 1, 1)
        grid.start_rounding_border(len(grid.log_n))
        grid.border.data += 0.25
        far = (real - torch.floor(real) - 0.75).abs() > 1e-3  # from the place where it turns
        found = grid(x).q
        _, low, high = (part.reshape(1, -1, 1, 1) for part in grid.parameters_of_grid())
        expected = torch.minimum(torch.maximum(torch.floor(real + 0.25), low), high)
        assert torch.equal(found[far].double(), expected[far].double())


def shares_undecided(**knobs) -> float:
    """Of the soft steps of AdaRound, when learning ends."""
    config = PtqConfig.from_preset(
        "adaround", unit="block", iters=24, lr_rounding=0.5, balance=0.0, stress=False, **knobs
    )
    qmodel = quantize(codec("balle2018"), images(), config, lmbda=0.01, progress=False)
    h = torch.cat(
        [
            node.weight_quantizer.rounding.h().flatten()
            for node in qmodel.nodes.values()
            if isinstance(node, QuantMAC)
        ]
    )
    return float(((h > 0.05) & (h < 0.95)).float().mean())


def test_adaround_decides_before_it_is_hardened():
    assert shares_undecided() < 0.6 * shares_undecided(regularizer=0.0)


def test_a_joint_pass_with_nothing_to_learn_leaves_the_codec_as_it_is():
    qmodel = quantize(
        codec("balle2018"),
        images(),
        PtqConfig.from_preset("adaround", iters=1, joint_iters=2),
        lmbda=0.01,
        progress=False,
    )
    assert (
        qmodel.history["joint"]["j_before"] == qmodel.history["joint"]["j_after"] == qmodel.history["j_end"]
    )


def test_ranges_that_are_learned_after_the_rounding_meet_integer_weights(monkeypatch):
    learn, seen = unit_pass.UnitPass.learn, []

    def spy(self, active, steps):
        seen.append((any("rounding" in key for key in active), all(r.hardened for r in self.roundings)))
        learn(self, active, steps)

    monkeypatch.setattr(unit_pass.UnitPass, "learn", spy)
    quantize(
        codec("balle2018"), images(), PtqConfig.from_preset("brecq", iters=2), lmbda=0.01, progress=False
    )
    assert (True, False) in seen and (False, True) in seen
    assert not any(rounding == hardened for rounding, hardened in seen)


def test_act_drop_changes_what_is_learned_and_ends_with_it():
    plain, dropped = (
        method(loss="mse", unit="layer", joint_iters=0, act_drop=share, quant={"w_bits": 4, "a_bits": 4})
        for share in (0.0, 0.5)
    )
    a, b = (quantize(codec("balle2018"), images(), c, lmbda=0.01, progress=False) for c in (plain, dropped))
    assert any(not torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))
    assert b.runtime.act_drop is None


def test_the_output_loss_is_the_distance_from_the_float_codec(monkeypatch):
    seen = []
    loss = Engine.global_loss
    monkeypatch.setattr(
        Engine,
        "global_loss",
        lambda self, *a: seen.append((self, a[0], loss(self, *a))) or seen[-1][2],
    )
    model = codec("balle2018")
    quantize(
        model,
        images(),
        method(loss="output", iters=0, joint_iters=1, quant={"w_bits": 16, "a_bits": 16}),
        lmbda=0.01,
        progress=False,
    )
    engine, index, value = seen[0]
    assert 0 < float(value) < 0.05  # 16 bits are nearly the float codec
    with torch.no_grad():
        real = model(engine.batches[index])
    x_hat, bits = engine.float_outputs[index]
    assert torch.allclose(x_hat, real["x_hat"], atol=1e-5)
    expected = sum(-torch.log2(p).flatten(1).sum(1) for p in real["likelihoods"].values()) / 64**2
    assert torch.allclose(bits, expected, rtol=1e-4)


def test_a_unit_is_judged_by_its_stage():
    config = method(loss="stage", unit="layer", joint_iters=0)
    qmodel = QuantModel(codec("balle2018"), config.quant)
    batches = list(images().split(2))
    qmodel.observe(batches)
    engine = Engine(
        qmodel, batches, 2, config.reconstruction, Objective(0.01), StateFolder(None, "", False), False
    )
    ends = {unit.name: target.end[0] for unit, target in engine.target_of.items()}
    assert (
        ends["g_a.0"] == ends["g_a.4"] == ends["g_a.6"] == "g_a.6"
        and ends["g_s.0"] == "g_s.6"
        and ends["h_a.0"] != ends["h_s.0"]
    )


def test_the_vertex_of_a_parabola():
    assert vertex(NORMS, [(p - 2.7) ** 2 + 1 for p in NORMS]) == pytest.approx(2.7)
    assert vertex(NORMS, [-((p - 2.7) ** 2) for p in NORMS]) == 4.0
    assert vertex(NORMS, [p for p in NORMS]) == 2.0


def test_a_search_lowers_j_and_a_killed_one_goes_on(tmp_path):
    config = PtqConfig.from_preset("lapq", search_evals=20, w_bits=4, a_bits=4, balance=0.0, stress=False)
    whole = quantize(codec("balle2018"), images(), config, lmbda=0.05, folder=tmp_path / "a", progress=False)
    found = whole.history["search"]
    assert found["j_after"] <= found["j_before"] and found["evaluations"] <= 20 and not found["finished"]
    assert min(found["costs"].values()) <= found["costs"]["2"] and 2 <= found["p"] <= 4

    measured, count = search.mean_cost, 0

    def counted(*args):
        nonlocal count
        count += 1
        if count == 16:
            raise KeyboardInterrupt
        return measured(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "mean_cost", counted)
        with pytest.raises(KeyboardInterrupt):
            quantize(codec("balle2018"), images(), config, lmbda=0.05, folder=tmp_path / "b", progress=False)
    resumed = quantize(
        codec("balle2018"), images(), config, lmbda=0.05, folder=tmp_path / "b", resume=True, progress=False
    )
    assert all(map(torch.equal, outcome(whole, images(1)), outcome(resumed, images(1))))
