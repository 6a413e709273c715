"""Balanced input scales against the noise that they are meant to lower, predicted and measured."""

import dataclasses

import pytest
import torch
from torch import nn

from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.quant.qtensor import QTensor
from licq.reconstruction.balance import balance_scales
from licq.reconstruction.objective import Objective
from licq.reconstruction.sensitivity import measure_sensitivities, predicted_losses
from tests.tiny_codecs import images, tiny_codec

LAMBDA = 0.01


class Loud(nn.Module):
    """One convolution whose inputs differ much in range and whose weights differ the other way for a few."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(2)
        self.first, self.second = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 3, 3, padding=1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
            self.first.weight.mul_(torch.logspace(-1.5, 0, 32).reshape(-1, 1, 1, 1))
            self.second.weight[:, :4].mul_(20)

    def forward(self, x):
        return {"x_hat": self.second(self.first(x)), "likelihoods": {"y": torch.full_like(x[:, :1], 0.5)}}


def prepared(model: nn.Module, data: list, **config) -> tuple[QuantModel, dict]:
    qmodel = QuantModel(model.eval(), QuantConfig(**config))
    qmodel.observe(data)
    return qmodel, measure_sensitivities(qmodel, data, Objective(LAMBDA), progress=False)


def noise(qmodel: QuantModel, sensitivities: dict, share: float) -> float:
    return sum(p["inputs"] + share * p["weights"] for p in predicted_losses(qmodel, sensitivities).values())


@pytest.mark.parametrize("transform", ["fold", "equalize"])
def test_measured_loss_falls_as_predicted(transform):
    """Noise images, so that the noise model (uncorrelated inputs) holds."""
    model = Loud().eval()
    data = [torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    qmodel, sensitivities = prepared(model, data, w_bits=5, a_bits=6, transform=transform)

    def loss() -> float:
        qmodel.quantize_nodes(False)
        qmodel.quantize_nodes(True, ["second"])
        with torch.no_grad():
            errors = [(qmodel(x)["x_hat"] - model(x)["x_hat"]).square().mean() for x in data]
        return float(sum(errors)) / len(errors)

    start, predicted = loss(), noise(qmodel, sensitivities, 1.0)
    scales = qmodel.nodes["second"].input_grid.parameters_of_grid()[0]
    balance_scales(qmodel, sensitivities, 1.0, progress=False)
    assert bool((qmodel.nodes["second"].input_grid.parameters_of_grid()[0] >= scales * 0.999).all())
    assert noise(qmodel, sensitivities, 1.0) < 0.9 * predicted
    assert loss() < 0.9 * start


@pytest.mark.parametrize(
    "arch", ["minnen2018", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lu2022", "cheng2020"))]
)
def test_no_layer_of_a_codec_gets_worse(arch):
    data = list(images(2, 64, 64).split(1))
    qmodel, sensitivities = prepared(tiny_codec(arch), data)
    before = predicted_losses(qmodel, sensitivities)
    balance_scales(qmodel, sensitivities, 0.3, progress=False)
    after = predicted_losses(qmodel, sensitivities)
    ratios = [
        (after[n]["inputs"] + 0.3 * after[n]["weights"]) / (p["inputs"] + 0.3 * p["weights"])
        for n, p in before.items()
        if sum(p.values())
    ]
    assert max(ratios) <= 1 + 1e-9 and min(ratios) < 0.95


@pytest.mark.parametrize("config", [{"w_bits": 32}, {"a_bits": 32}, {"a_granularity": "tensor"}])
def test_nothing_happens_where_there_is_nothing_to_share(config):
    data = [images(1, 64, 64)]
    qmodel, sensitivities = prepared(tiny_codec("balle2018"), data, **config)
    before = [p.clone() for p in qmodel.parameters()]
    balance_scales(qmodel, sensitivities, 0.3, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before, qmodel.parameters()))


def test_symbols_stay_exact_in_steps_that_suit_the_weights():
    """y_hat of a codec without means, small in some channels: before, these had much finer steps, and weights
    smaller by as much."""
    model, data = tiny_codec("balle2018"), list(images(2, 64, 64).split(1))
    with torch.no_grad():
        last, y = model.g_a[-1], torch.cat([model.g_a(x) for x in data])
        wanted = torch.tensor([20.0, 2.0]).repeat(len(last.bias) // 2)
        last.weight.mul_((wanted / y.std((0, 2, 3))).reshape(-1, 1, 1, 1))
        last.bias.zero_()
    qmodel, sensitivities = prepared(model, data)
    node = qmodel.nodes["g_s.0"]
    grid, known = node.input_grid, sensitivities["g_s.0"]
    sensitivities["g_s.0"] = dataclasses.replace(known, curvature=torch.ones_like(known.curvature))
    steps, before = grid.parameters_of_grid()[0], predicted_losses(qmodel, sensitivities)["g_s.0"]["weights"]
    assert grid.exact and len(set(steps.tolist())) > 1
    balance_scales(qmodel, sensitivities, 0.3, progress=False)
    after = grid.parameters_of_grid()[0]
    assert predicted_losses(qmodel, sensitivities)["g_s.0"]["weights"] < 0.95 * before
    assert bool((after >= steps).all()) and float(after.max()) <= 1
    assert bool((torch.log2(after) == torch.log2(after).round()).all())
    y_hat = torch.arange(-20.0, 20.0).repeat(len(after), 1)[None, :, None]
    assert torch.equal(grid(QTensor(y_hat, None, node.runtime)).real(), y_hat)
