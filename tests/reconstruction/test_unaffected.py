"""What does not depend on a unit is not computed again, and the numbers stay."""

import pytest
import torch

from licq.quant.latents import rounded, showing_dependence
from licq.quant.model import QuantModel
from licq.reconstruction.api import quantize
from licq.reconstruction.cache import PrefixCache
from licq.reconstruction.state import learned
from licq.reconstruction.units import Trace, find_units
from tests.reconstruction.test_driver import images, method
from tests.tiny_codecs import tiny_codec


def started(arch: str, unit_name: str):
    """(codec, cache before a unit, the unit, its parameters)."""
    batches = list(images(4).split(2))
    qmodel = QuantModel(tiny_codec(arch), method().quant)
    qmodel.observe(batches)
    qmodel.quantize_nodes(False)
    trace = Trace(qmodel, batches[0])
    unit = next(unit for unit in find_units(qmodel, trace, "layer") if unit.name == unit_name)
    cache = PrefixCache(qmodel, trace, batches)
    cache.advance(unit.start)
    qmodel.quantize_nodes(True, unit.nodes)
    return qmodel, cache, unit, learned({name: qmodel.nodes[name] for name in unit.nodes})


def outputs_and_gradients(qmodel, cache, parameters):
    """Of both batches, each forward made twice: the second meets what the first has kept."""
    found = []
    for index in (0, 1, 0, 1):
        with cache.replaying(index):
            output = qmodel(cache.batches[index])
        bits = sum(p.log2().sum() for p in output["likelihoods"].values())
        loss = bits + output["x_hat"].square().sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        found += [output["x_hat"], bits, *(g for g in gradients if g is not None)]
    return found


@pytest.mark.parametrize("unit_name", ["h_a.0", "h_s.4", "context_prediction", "entropy_parameters.2"])
def test_the_numbers_stay(monkeypatch, unit_name):
    qmodel, cache, unit, parameters = started("minnen2018", unit_name)
    active = [parameter.requires_grad_(True) for parameter in parameters.values()]
    before = outputs_and_gradients(qmodel, cache, active)
    cache.unaffected.find(unit, parameters.values(), cache.outputs[0])
    assert cache.unaffected.read
    for parameter in active:
        parameter.requires_grad_(True)
    runs = []
    node = qmodel.nodes["g_s.4"]
    real = node.real
    monkeypatch.setattr(node, "real", lambda *args: runs.append(1) or real(*args))
    after = outputs_and_gradients(qmodel, cache, active)
    assert len(runs) == 2  # once a batch
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("arch, unit_name", [("minnen2018-mean", "h_s.2"), ("minnen2018", "g_a.2")])
def test_what_depends_is_computed(arch, unit_name):
    """Of a mean-scale hyperprior, h_s moves y_hat."""
    qmodel, cache, unit, parameters = started(arch, unit_name)
    cache.unaffected.find(unit, parameters.values(), cache.outputs[0])
    assert not any(name.startswith("g_s") for name, _ in cache.unaffected.known(0))


def test_gradients_that_cancel_are_left_out():
    x, means = torch.randn(8), torch.randn(8, requires_grad=True)
    symbols, values = rounded(x, means)
    assert symbols.requires_grad and not values.requires_grad
    with showing_dependence():
        exact = rounded(x, means)[1]
    assert torch.equal(exact, values)
    (gradient,) = torch.autograd.grad(exact.square().sum(), means)
    assert not gradient.any()
    assert rounded(x.requires_grad_(), means)[1].requires_grad


@pytest.mark.parametrize("share, rounds", [(0.0, 1), (1.0, 0)])
def test_units_that_change_little_are_left_as_they_are(share, rounds):
    knobs = {"unit": "layer", "iters": 2, "joint_iters": 0, "tail_share": 1.0, "split": 0.0, "flat": False}
    config = method(min_rise=share, learn=("range_w",), **knobs)
    qmodel = quantize(tiny_codec("balle2018"), images(2), config, lmbda=0.01, progress=False)
    first, *others = qmodel.history["units"]
    assert first["rounds"] == 1  # nothing is lost before the first unit, so all of the loss is its own
    assert {entry["rounds"] for entry in others} <= {rounds}
