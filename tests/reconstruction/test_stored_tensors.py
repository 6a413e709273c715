"""What a tensor between layers costs alone, against a computation by hand."""

import pytest
import torch
from torch import nn

from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.reconstruction.objective import Objective
from licq.reconstruction.probe import Probe
from licq.reconstruction.stored_tensors import measure_stored, tensors_between_layers
from tests.tiny_codecs import images, tiny_codec

_SPREAD = torch.tensor([1.0, 512.0, 512.0]).reshape(-1, 1, 1, 1)


class _Skip(nn.Module):
    """A skip whose first channel is 512 times smaller than the others, and counts as much."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = (nn.Conv2d(3, 3, 1, bias=False) for _ in range(3))
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(3)[:, :, None, None] * _SPREAD)
            self.second.weight.copy_(torch.eye(3)[:, :, None, None] / 4)
            self.last.weight.copy_(torch.eye(3)[:, :, None, None] / _SPREAD / 1.25)

    def forward(self, x):
        x = self.first(x)
        return {"x_hat": self.last(x + self.second(x)), "likelihoods": {"y": torch.ones(len(x), 1)}}


def _measured(**config) -> tuple[Probe, dict]:
    batches = list(images(2).split(1))
    qmodel = QuantModel(_Skip().eval(), QuantConfig(**config))
    qmodel.observe(batches)
    probe = Probe(qmodel, batches, Objective(0.01))
    nothing = {"j": 0.0, "bpp": 0.0, "weighted_distortion": 0.0}
    layers = {unit.name: {"inputs": nothing} for unit in probe.layers()}
    return probe, measure_stored(probe, layers, lambda name, compute: compute(), progress=False)


def test_the_stored_operand_of_a_skip_costs_what_its_rounding_does():
    probe, stored = _measured(strict_int8=True)
    tensor = stored["add0 operand 0"]
    grid = probe.qmodel.functions["add0"].stored0
    costs = []
    for batch in probe.batches:
        x = batch * _SPREAD.reshape(1, -1, 1, 1)
        step = grid.parameters_of_grid()[0].reshape(1, -1, 1, 1)
        x_hat = (torch.round(x / step) * step + x / 4) / _SPREAD.reshape(1, -1, 1, 1) / 1.25
        costs.append(0.01 * 255**2 * float((x_hat - batch).square().mean()))
    assert tensor["j"] == pytest.approx(sum(costs) / 2, rel=1e-3) and tensor["bpp"] == 0
    assert (tensor["bits"], tensor["scales"]) == (8, 3)
    assert tensor["fewest_levels"] > 150 and tensor["below_step"] < 0.05


def test_one_scale_for_all_channels_shows_in_the_small_ones():
    _, stored = _measured(carrier_bits=8)
    tensor = stored["add0 output"]
    assert tensor["scales"] == 1 and tensor["fewest_levels"] <= 2
    assert tensor["below_step"] > 0.3
    _, strict = _measured(strict_int8=True)
    assert tensor["j"] > 20 * strict["add0 operand 0"]["j"]


class _Normalized(nn.Module):
    """A LayerNorm over the channels between two layers."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 4, 1), nn.LayerNorm(4), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        y = self.norm(self.first(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return {"x_hat": self.last(y), "likelihoods": {"y": torch.ones(len(x), 1)}}


def test_every_tensor_has_a_name_of_its_own():
    qmodel = QuantModel(_Normalized().eval(), QuantConfig(strict_int8=True))
    qmodel.observe([images(1)])
    tensors = {tensor.name: tensor for tensor in tensors_between_layers(qmodel)}
    assert len(tensors) == len(tensors_between_layers(qmodel))
    assert (tensors["norm stored input"].grid.bits, tensors["norm input"].grid.bits) == (8, 16)


@pytest.mark.parametrize("settings", [{"a_scales": "simulated"}, {"float_stages": ("g_a", "h_a", "g_s")}])
def test_what_stays_in_float_is_not_rounded(settings):
    qmodel = QuantModel(tiny_codec("minnen2018"), QuantConfig(**settings))
    qmodel.observe([images(1)])
    tensors = tensors_between_layers(qmodel)
    assert tensors and not any(tensor.node.stays_float for tensor in tensors)


def test_the_scale_of_an_offset_is_no_tensor_between_layers():
    """Its quantizer rounds neither the input nor the output of its node."""
    qmodel = QuantModel(tiny_codec("balle2018-vbr"), QuantConfig())
    qmodel.observe([images(1)])
    assert "offsets" in {node.kind for node in qmodel.nodes.values()}
    assert "offsets" not in {tensor.node.kind for tensor in tensors_between_layers(qmodel)}
