"""The search for bits of single layers, against brute force."""

import dataclasses
import itertools
import json
import random

import pytest
import torch

from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.reconstruction.api import prepare_calibration
from licq.reconstruction.config import PtqConfig
from licq.reconstruction.mixed_precision import (
    Budget,
    Layer,
    allocate,
    allocate_by_threshold,
    falling,
    measure_layers,
    totals,
)
from licq.reconstruction.objective import Objective
from licq.runs.bit_search import ROUNDS, BdRateSearch, chosen
from licq.support.errors import InputError
from tests.tiny_codecs import images, tiny_codec

LAMBDA = 0.01


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


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("mean_bits", [4.5, 5.5, 7.0, 8.0])
def test_a_tolerance_gives_each_layer_the_fewest_bits_below_it(mean_bits, seed):
    layers = [dataclasses.replace(layer, a_loss={8: 0.0}) for layer in drawn_layers(6, seed)]
    bits, tolerance = allocate_by_threshold(layers, Budget(mean_bits=mean_bits))

    def fewest(tolerance: float) -> dict:
        return {
            layer.name: {
                "w_bits": min([b for b in (4, 5, 8) if layer.w_loss[b] <= tolerance] or [8]),
                "a_bits": 8,
            }
            for layer in layers
        }

    assert bits == fewest(tolerance) and totals(layers, bits).mean_bits <= mean_bits
    smaller = [loss for layer in layers for loss in layer.w_loss.values() if loss < tolerance]
    assert all(totals(layers, fewest(other)).mean_bits > mean_bits for other in smaller)


def test_a_tolerance_bounds_the_size_alone_and_says_so():
    layers = drawn_layers(4, 0)
    with pytest.raises(InputError, match="budget_size alone"):
        allocate_by_threshold(layers, Budget(mean_bits=6))  # inputs have candidates
    with pytest.raises(InputError, match="4 bits a weight"):
        one = [dataclasses.replace(layer, a_loss={8: 0.0}) for layer in layers]
        allocate_by_threshold(one, Budget(mean_bits=3))


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
    start = prepare_calibration(
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
