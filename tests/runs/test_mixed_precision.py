"""Bits of single layers, and the search for them: against brute force, through files and down to the integer
program."""

import dataclasses
import itertools
import json
import random

import pytest
import torch

from licq.evaluation import anchors
from licq.quant.bits import read_bits
from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.reconstruction.api import prepare, quantize
from licq.reconstruction.config import PtqConfig
from licq.reconstruction.mixed_precision import Budget, Layer, allocate, falling, measure_layers, totals
from licq.reconstruction.objective import Objective
from licq.runs import bd_rate_limit, layer_search
from licq.runs.bit_search import ROUNDS, BdRateSearch, chosen
from licq.support.errors import InputError
from licq.support.files import write_json
from tests.integer.test_lowering import assert_program_equals_model
from tests.main_jobs import contents, refused, report_of, run
from tests.tiny_codecs import images, tiny_codec

LAMBDA = 0.01


def varied_bits(codec: QuantModel) -> dict:
    """Other bits for every layer, 4 to 10 of weights and 5 to 9 of inputs; the second layer as the model."""
    return {
        name: {"w_bits": 4 + number % 7, "a_bits": 5 + number % 5}
        for number, name in enumerate(codec.layers)
        if number != 1
    }


@pytest.mark.parametrize(
    "name, strict", [("balle2018", False), ("minnen2018", False), ("cheng2020", False), ("minnen2018", True)]
)
def test_the_program_of_mixed_bits_equals_the_model(name, strict, tmp_path):
    model = tiny_codec(name)
    bits = varied_bits(QuantModel(model, QuantConfig()))
    config = PtqConfig.from_preset(joint_iters=0, stress=False, measured=2, observed=2, strict_int8=strict)
    codec = quantize(model, images(2), config, lmbda=LAMBDA, bits=bits, progress=False)
    for layer, node in codec.layers.items():
        own = {"w_bits": 8, "a_bits": 8} | bits.get(layer, {})
        assert {side: getattr(node.config, side) for side in own} == own
        assert int(node.weight_int.abs().max()) < 2 ** (own["w_bits"] - 1)
        grid = node.input_grid
        assert node.weight_int.dtype == (torch.int8 if own["w_bits"] <= 8 else torch.int16)
        if not grid.latent and node.kind != "gdn":
            assert grid.bits == own["a_bits"] and bool(
                ((grid.qmax - grid.qmin) * 1 < 2**grid.bits)[grid.fine == 1].all()
            )
        assert float(node.bound) < 2**53
    assert_program_equals_model(codec, images(1, seed=5))
    codec.save(tmp_path / "model.safetensors")
    loaded = QuantModel.load(tmp_path / "model.safetensors")
    assert {name: node.config for name, node in loaded.layers.items()} == {
        name: node.config for name, node in codec.layers.items()
    }
    assert_program_equals_model(loaded, images(1, seed=5))
    x = images(1, seed=9)
    with torch.no_grad():
        assert torch.equal(codec(x)["x_hat"], loaded(x)["x_hat"])


def test_the_bits_of_the_model_named_for_every_layer_change_nothing():
    model = tiny_codec("balle2018")
    config = PtqConfig.from_preset(joint_iters=2, stress=False, w_bits=6, a_bits=7)
    same = {name: {"w_bits": 6, "a_bits": 7} for name in QuantModel(model, QuantConfig()).layers}
    one, other = (
        quantize(model, images(2), config, lmbda=LAMBDA, bits=bits, progress=False) for bits in (None, same)
    )
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize(
    "text, words",
    [
        ("[1, 2]", ["no allocation"]),
        ("{'a': 3}", ["no allocation"]),
        ("{", ["cannot be read"]),
        ("g_a.0: {bits: 4}", ["'bits'", "w_bits"]),
        ("g_a.0: {w_bits: 1}", ["w_bits 1", "2 to 16"]),
        ("g_a.0: {a_bits: 17}", ["17"]),
        ("g_a.0: {w_bits: 4.5}", ["4.5"]),
        ("g_a.0: {w_bits: true}", ["True"]),
    ],
)
def test_a_bad_file_of_bits_is_refused(tmp_path, text, words):
    (tmp_path / "bits.yaml").write_text(text)
    with pytest.raises(InputError) as refusal:
        read_bits(tmp_path / "bits.yaml")
    assert all(word in str(refusal.value) for word in words)
    with pytest.raises(InputError, match="cannot be read"):
        read_bits(tmp_path / "nothing.json")


def test_json_and_yaml_are_read_and_unknown_layers_refused(tmp_path):
    bits = {"g_a.0": {"w_bits": 6, "a_bits": 8}, "g_s.0": {"w_bits": 4}}
    (tmp_path / "bits.json").write_text(json.dumps(bits))
    (tmp_path / "bits.yaml").write_text("g_a.0: {w_bits: 6, a_bits: 8}\ng_s.0:\n  w_bits: 4\n")
    assert read_bits(tmp_path / "bits.json") == read_bits(tmp_path / "bits.yaml") == bits
    (tmp_path / "bits.json").write_text(json.dumps(bits, indent="\t"))
    assert read_bits(tmp_path / "bits.json") == bits
    (tmp_path / "bits.yaml").write_text("g_a.0: {w_bits: 2024-13-45}")
    with pytest.raises(InputError, match="cannot be read"):
        read_bits(tmp_path / "bits.yaml")
    with pytest.raises(InputError, match="no layer 'g_x'.*g_a.0"):
        QuantModel(tiny_codec("balle2018"), QuantConfig(), {"g_x": {"w_bits": 4}})


@pytest.mark.parametrize(
    "only, config", [("weights", {"w_bits": 4, "a_bits": 16}), ("inputs", {"w_bits": 16, "a_bits": 4})]
)
def test_one_side_alone_is_a_layer_whose_other_side_is_nearly_exact(only, config):
    codec = QuantModel(tiny_codec("balle2018"), QuantConfig(**config))
    codec.observe(images(2).split(2))

    def output(layer: str) -> torch.Tensor:
        with torch.no_grad(), codec.runtime.recording([(layer, 0)], stop_after=(layer, 0)) as record:
            codec(images(2))
        return record[(layer, 0)].real()

    for layer, node in codec.layers.items():
        codec.quantize_nodes(False)
        real = output(layer)
        codec.quantize_nodes(True, [layer])
        both = output(layer)
        node.only = only
        alone = output(layer)
        node.only = None
        error = (both - real).square().mean()
        # exact here
        assert (alone - both).square().mean() < 0.02 * error or error < 1e-6 * real.square().mean(), layer


# ------------------------------------------------------------------------------------------------- the search


def drawn_layers(count: int, seed: int) -> list[Layer]:
    """Layers of drawn sizes and losses; the last one's inputs have one width whatever the candidates."""
    draw = random.Random(seed)

    def falling(choices: tuple) -> dict:
        return dict(zip(choices, sorted((draw.random() * 4 ** -choices[0] for _ in choices), reverse=True)))

    layers = [
        Layer(
            f"layer{n}",
            draw.randint(50, 5000),
            draw.uniform(1, 900),
            falling((4, 5, 8)),
            falling((4, 8)),
            {4: 4, 8: 8},
            8,
        )
        for n in range(count - 1)
    ]
    return [*layers, Layer("latent", 700, 30.0, falling((4, 5, 8)), {8: 1e-5}, {8: 14}, 14)]


def every_allocation(layers: list[Layer]):
    pairs = [[(w, a) for w in layer.w_loss for a in layer.a_loss] for layer in layers]
    for combination in itertools.product(*pairs):
        yield {layer.name: {"w_bits": w, "a_bits": a} for layer, (w, a) in zip(layers, combination)}


@pytest.mark.parametrize(
    "budget, least",
    [
        (Budget(mean_bits=5.5), "loss"),
        (Budget(megabytes=0.004), "loss"),
        (Budget(relative_bops=0.5), "loss"),
        (Budget(bops=60e3), "loss"),
        (Budget(mean_bits=6, relative_bops=0.6), "loss"),
        (Budget(loss=1e-3), "mean_bits"),
        (Budget(loss=2e-3), "bops"),
        (Budget(), "loss"),
    ],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_search_finds_what_brute_force_finds(budget, least, seed):
    layers = drawn_layers(5, seed)
    limits = {name: value for name, value in dataclasses.asdict(budget).items() if value is not None}
    every = [totals(layers, bits) for bits in every_allocation(layers)]
    inside = [
        found for found in every if all(getattr(found, name) <= limit for name, limit in limits.items())
    ]
    assert len(every) == 3888
    if not inside:
        with pytest.raises(InputError, match="least"):
            allocate(layers, budget, least)
        return
    found = totals(layers, allocate(layers, budget, least))
    assert all(getattr(found, name) <= limit * (1 + 1e-6) for name, limit in limits.items())
    assert getattr(found, least) == pytest.approx(min(getattr(other, least) for other in inside), rel=1e-6)


def test_totals_are_those_of_the_definition():
    layers = [
        Layer("a", 1000, 10.0, {4: 0.5, 8: 0.1}, {8: 0.2}, {8: 8}, 8),
        Layer("b", 3000, 2.0, {4: 0.3, 8: 0.0}, {4: 0.4, 8: 0.1}, {4: 4, 8: 8}, 8),
    ]
    found = totals(layers, {"a": {"w_bits": 8, "a_bits": 8}, "b": {"w_bits": 4, "a_bits": 4}})
    assert (found.mean_bits, found.megabytes, found.loss) == pytest.approx((5.0, 0.0025, 1.0))
    assert found.bops == 10 * 64 + 2 * 16 and found.relative_bops == pytest.approx(672 / 768)


@pytest.mark.parametrize(
    "budget, words",
    [
        (Budget(mean_bits=3.9), "4 bits a weight"),
        (Budget(megabytes=1e-5), "MB"),
        (Budget(relative_bops=0.1), "of the operations"),
        (Budget(loss=1e-9), "predicted loss"),
    ],
)
def test_a_budget_that_nothing_meets_is_refused(budget, words):
    with pytest.raises(InputError, match=words):
        allocate(drawn_layers(4, 0), budget)


def test_many_layers_take_no_time():
    layers = drawn_layers(200, 3)
    found = totals(layers, allocate(layers, Budget(mean_bits=5.5, relative_bops=0.5)))
    assert found.mean_bits <= 5.5 * (1 + 1e-6) and found.relative_bops <= 0.5 * (1 + 1e-6)
    uniform = totals(
        layers,
        {
            layer.name: {"w_bits": 5, "a_bits": max(layer.a_loss) if len(layer.a_loss) == 1 else 4}
            for layer in layers
        },
    )
    assert found.loss < uniform.loss


def test_losses_fall_with_the_bits_and_are_never_nothing():
    assert falling({4: 0.5, 6: 0.1, 8: 0.02}) == {4: 0.5, 6: 0.1, 8: 0.02}
    assert falling({4: 0.1, 6: 0.3, 8: -1.0}) == {4: 0.3, 6: 0.3, 8: pytest.approx(0.1 * 0.3 / 256)}
    nothing = falling({8: -0.1, 4: -0.2, 5: 0.0})
    assert list(nothing) == [4, 5, 8] and nothing[4] > nothing[5] > nothing[8] > 0


def test_losses_of_layers_are_measured_and_remembered():
    model, crops, kept = tiny_codec("balle2018"), images(2), {}

    def remember(name, compute):
        if name not in kept:
            kept[name] = json.loads(json.dumps(compute()))
        return kept[name]

    config = PtqConfig.from_preset(
        joint_iters=0, stress=False, measured=2, observed=2, balance=0, round_init="nearest"
    )
    objective = Objective(LAMBDA)
    layers = {
        layer.name: layer
        for layer in measure_layers(model, crops, config, objective, (4, 8), (4, 8), remember, progress=False)
    }
    assert set(layers) == set(QuantModel(model, QuantConfig()).layers)
    first, latent, gdn = layers["g_a.0"], layers["g_s.0"], layers["g_a.1"]
    assert (first.weights, first.macs) == (6 * 3 * 25, 6 * 3 * 25 / 4) and first.a_width == {4: 4, 8: 8}
    assert latent.a_width == {8: 14} and latent.width_8 == 14 and gdn.a_width == {4: 8, 8: 16}
    assert all(layer.w_loss[4] >= layer.w_loss[8] >= 0 for layer in layers.values())
    assert sum(layer.w_loss[4] for layer in layers.values()) > 4 * sum(
        layer.w_loss[8] for layer in layers.values()
    )
    # by hand: the codec prepared with 4 bits of weights, the weights of one layer alone
    start = prepare(
        model,
        crops,
        dataclasses.replace(config, quant=dataclasses.replace(config.quant, w_bits=4)),
        objective,
        progress=False,
    )
    node = start.qmodel.nodes["g_a.2"]
    with torch.no_grad():
        real = objective(start.qmodel(crops), crops).double().mean()
        node.quantized, node.only = True, "weights"
        by_hand = float(objective(start.qmodel(crops), crops).double().mean() - real)
    assert kept["weights 4 g_a.2"] == pytest.approx(by_hand, rel=1e-3, abs=1e-6)
    # without a model: all is there
    again = measure_layers(None, crops, config, objective, (4, 8), (4, 8), remember, progress=False)
    assert {layer.name: layer for layer in again} == layers


class Curve:
    """Two codecs whose prepared loss is `ratio` times what is predicted, and whose BD-rate is `learned` times
    that."""

    def __init__(self, ratio: float, learned: float, seed: int = 0):
        self.layers = [drawn_layers(6, seed), drawn_layers(6, seed + 10)]
        self.ratio, self.learned = ratio, learned
        self.search = BdRateSearch(self.layers, [0.5, 1.0], self.start, self.quantize, "mean_bits")

    def start(self, number, bits):
        return self.ratio * totals(self.layers[number], bits).loss

    def quantize(self, number, bits):
        return (
            self.learned
            * sum(100 * self.start(q, own) / bpp for q, (own, bpp) in enumerate(zip(bits, (0.5, 1.0))))
            / 2
        )


@pytest.mark.parametrize("ratio, learned", [(1.0, 1.0), (0.3, 1.0), (2.0, 0.5), (1.0, 0.1), (1.0, 3.0)])
def test_bits_are_given_up_until_the_bd_rate_is_near_its_limit(ratio, learned):
    curve = Curve(ratio, learned)
    most = [
        {layer.name: {"w_bits": 8, "a_bits": max(layer.a_loss)} for layer in layers}
        for layers in curve.layers
    ]
    least = [
        {layer.name: {"w_bits": 4, "a_bits": min(layer.a_loss)} for layer in layers}
        for layers in curve.layers
    ]
    low, high = curve.quantize(0, most), curve.quantize(0, least)
    limit = (low * high) ** 0.5
    attempts = curve.search.run(limit)
    best = chosen(attempts, limit)
    assert best.stays_below(limit) and best.bd_rate > 0.4 * limit and len(attempts) <= ROUNDS
    assert best.cost == min(attempt.cost for attempt in attempts if attempt.stays_below(limit))
    assert best.cost < sum(totals(layers, bits).mean_bits for layers, bits in zip(curve.layers, most))
    hopeless = curve.search.run(low / 3)
    assert not chosen(hopeless, low / 3).stays_below(low / 3)
    generous = Curve(ratio, learned)
    attempts = generous.search.run(100 * ratio * high)
    # 4 bits a weight for both codecs; nothing is left to try
    assert attempts[0].cost == 8 and len(attempts) == 1


@pytest.mark.parametrize("first, cheaper", [(0.1, True), (5.0, False)])
def test_a_prepared_loss_below_nothing_is_corrected_towards_the_limit(first, cheaper):
    """Few crops measure -0.48 % by chance up to a knee, and 5 % beyond it."""
    layers = drawn_layers(6, 0)
    losses = [
        totals(layers, {layer.name: {"w_bits": w, "a_bits": max(layer.a_loss)} for layer in layers}).loss
        for w in (8, 4)
    ]
    knee, tried = (losses[0] * losses[1]) ** 0.5, []
    search = BdRateSearch(
        [layers],
        [0.5],
        lambda _, bits: 0.5 * (-0.0048 if totals(layers, bits).loss <= knee else 0.05),
        lambda number, bits: tried.append(bits[0]) or (first if number == 1 else 0.9),
        "mean_bits",
    )
    attempts = search.run(1.0)
    assert attempts[0].start_percent == pytest.approx(-0.48) and len(tried) == 2
    before, after = (totals(layers, bits).mean_bits for bits in tried)
    assert after < before if cheaper else after > before


# ----------------------------------------------------------------------------------------------- command line

NARROW = {"set": "balance=0", "bits_choices": "4,8", "no-baseline": True}


def test_a_budget_is_met_written_and_read_again(job, capsys, tmp_path):
    assert run(job, budget_size=6, bits_file=tmp_path / "bits.json", **NARROW) == 0
    capsys.readouterr()
    bits = json.loads((tmp_path / "bits.json").read_text())
    assert json.loads((tmp_path / "out" / "q1" / "bits.json").read_text()) == bits
    assert {side["w_bits"] for side in bits.values()} == {4, 8} and {
        side["a_bits"] for side in bits.values()
    } == {8}
    point = report_of(job)["points"][0]
    found = point["bits"]
    codec = QuantModel.load(tmp_path / "out" / "q1" / "model.safetensors")
    sizes = {name: (node.weight_int.numel(), node.config.w_bits) for name, node in codec.layers.items()}
    mean = sum(n * b for n, b in sizes.values()) / sum(n for n, _ in sizes.values())
    assert (
        found["mean_bits"] == pytest.approx(mean)
        and 5.5 < mean <= 6
        and found["layers"] == bits
        and found["loss"] > 0
    )
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## Bits of the layers" in text and "mean bits at most 6" in text and "mixed bits rd" in text
    before = contents(tmp_path / "out")
    assert run(job, budget_size=6, bits_file=tmp_path / "later" / "bits.json", resume=True, **NARROW) == 0
    assert (
        contents(tmp_path / "out") == before
        and json.loads((tmp_path / "later" / "bits.json").read_text()) == bits
    )
    capsys.readouterr()
    refused(
        capsys, job, "bits.budget_size", "--resume", untouched=False, resume=True, budget_size=5, **NARROW
    )
    job["--out"] = tmp_path / "again"
    assert run(job, bits_file=tmp_path / "bits.json", **{"set": "balance=0", "no-baseline": True}) == 0
    again = report_of(job)["points"][0]
    assert again["quant"] == point["quant"] and again["bits"]["layers"] == bits
    capsys.readouterr()
    bits["g_a.0"]["w_bits"] = 5
    (tmp_path / "bits.json").write_text(json.dumps(bits))
    refused(
        capsys,
        job,
        "bits.1.g_a.0.w_bits",
        untouched=False,
        resume=True,
        bits_file=tmp_path / "bits.json",
        **{"set": "balance=0", "no-baseline": True},
    )


def test_a_budget_of_bit_operations_searches_the_inputs_too(job, tmp_path):
    assert run(job, budget_bops=0.6, **NARROW) == 0
    found = report_of(job)["points"][0]["bits"]
    assert 0.4 < found["relative_bops"] <= 0.6 and {
        sides["a_bits"] for sides in found["layers"].values()
    } == {4, 8}
    codec = QuantModel.load(tmp_path / "out" / "q1" / "model.safetensors")
    assert {name: node.config.a_bits for name, node in codec.layers.items()} == {
        name: sides["a_bits"] for name, sides in found["layers"].items()
    }


def test_the_bd_rate_is_kept_below_its_limit(job, tmp_path, monkeypatch, capsys):
    made, starts, curves = [], [], []
    monkeypatch.setattr(
        anchors,
        "classical_points",
        lambda *args, whole=anchors.classical_points: curves.append(1) or whole(*args),
    )
    monkeypatch.setattr(layer_search, "measure_layers", lambda model, *_, **__: drawn_for(model))
    monkeypatch.setattr(
        bd_rate_limit,
        "start_loss",
        lambda model, crops, config, objective, bits, *_: (
            starts.append(objective.lmbda)
            or {"bpp": 1.0, "j": 2.0, "loss": totals(drawn_for(model), bits).loss}
        ),
    )
    write_json(tmp_path / "out" / "round3" / "run.json", {"settings": {"bits": "another run's"}})
    monkeypatch.setattr(
        bd_rate_limit,
        "summarize",
        lambda attempt, points, whole=bd_rate_limit.summarize: (
            made.append(attempt) or {**whole(attempt, points), "bd_rate_psnr": mean_loss(attempt)}
        ),
    )
    assert run(job, quality="1,3", max_bd_rate=0.5, bits_file=tmp_path / "bits-{quality}.json", **NARROW) == 0
    assert len(curves) == 1 and not (tmp_path / "out" / "measured").exists()
    rounds = list(made)
    below = [attempt for attempt in rounds if mean_loss(attempt) <= 0.5]
    assert rounds and below
    report = report_of(job)
    for point in report["points"]:
        quality = point["quality"]
        bits = json.loads((tmp_path / f"bits-{quality}.json").read_text())
        assert point["bits"]["layers"] == bits and any(
            attempt.layer_bits[quality] == bits for attempt in below
        )
        codec = QuantModel.load(tmp_path / "out" / f"q{quality}" / "model.safetensors")
        assert {name: node.config.w_bits for name, node in codec.layers.items()} == {
            name: sides["w_bits"] for name, sides in bits.items()
        }
        assert "below a BD-rate of 0.5 %" in point["bits"]["how"]
    before = contents(tmp_path / "out")
    assert not (tmp_path / "out" / "round3" / "run.json").exists() or len(rounds) == 3
    starts.clear()
    assert (
        run(
            job,
            quality="1,3",
            max_bd_rate=0.5,
            bits_file=tmp_path / "bits-{quality}.json",
            resume=True,
            **NARROW,
        )
        == 0
    )
    assert contents(tmp_path / "out") == before and not starts
    # what was measured at another lambda, or of another checkpoint, is not taken over
    with monkeypatch.context() as patch:
        patch.setattr(bd_rate_limit, "BdRateSearch", stopping)
        assert (
            run(
                job,
                quality="1,3",
                max_bd_rate=0.5,
                bits_file=tmp_path / "bits-{quality}.json",
                resume=True,
                **{"lambda": "0.1,0.2"},
                **NARROW,
            )
            == 130
        )
    assert starts == [0.1, 0.2]


def stopping(*_) -> None:
    raise KeyboardInterrupt


def drawn_for(model) -> list[Layer]:
    names = list(QuantModel(model, QuantConfig()).layers)
    return [
        dataclasses.replace(
            layer, name=name, w_loss={4: 0.004 * (n % 5), 8: 0.0}, a_loss={8: 1e-6}, a_width={8: 8}
        )
        for n, (name, layer) in enumerate(zip(names, drawn_layers(len(names), 1)))
    ]


def mean_loss(attempt) -> float:
    losses = [
        100 * sum(0.004 * (n % 5) for n, sides in enumerate(bits.values()) if sides["w_bits"] == 4)
        for bits in attempt.layer_bits.values()
    ]
    return sum(losses) / len(losses)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"bits_file": "/nowhere.json"}, ["--bits_file", "cannot be read"]),
        ({"budget_size": 0}, ["--budget_size", "positive"]),
        ({"budget_size": "2GB"}, ["--budget_size"]),
        ({"budget_size": "1,5MB"}, ["--budget_size", "more than one number"]),
        ({"budget_bops": "0,5"}, ["--budget_bops", "more than one number"]),
        ({"max_bd_rate": "1,5"}, ["--max_bd_rate", "more than one number"]),
        ({"budget_bops": "x"}, ["--budget_bops"]),
        ({"max_bd_rate": 1}, ["two qualities"]),
        ({"max_bd_rate": 1, "budget_size": 5}, ["exclude each other"]),
        ({"bits_choices": "4,8"}, ["--bits_choices is for a search"]),
        ({"bits_choices": "1,8", "budget_size": 6}, ["--bits_choices", "2 to 16"]),
        ({"cost": "size", "budget_size": 6}, ["--cost belongs"]),
        ({"quality": "1,3", "budget_size": 6, "bits_file": "bits.json"}, ["{quality}"]),
        (
            {"budget_size": 6, "bits_file": "/dev/null/bits.json"},
            ["cannot write to /dev/null", "--bits_file"],
        ),
        ({"budget_size": 6, "bits_file": "/tmp"}, ["--bits_file /tmp is a folder"]),
    ],
)
def test_bad_flags_are_one_line(job, capsys, changes, expected):
    refused(capsys, job, *expected, **changes)


def test_an_unknown_layer_is_one_line(job, capsys, tmp_path):
    (tmp_path / "bits.json").write_text('{"g_q.0": {"w_bits": 4}}')
    refused(
        capsys, job, "--bits_file", "bits.json", "no layer 'g_q.0'", "g_a.0", bits_file=tmp_path / "bits.json"
    )
