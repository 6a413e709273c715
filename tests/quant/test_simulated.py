"""Simulated scales: PyTorch's own fake quantization, float between layers, no files."""

import pytest
import torch
from torch import nn

from licq.codec.api import Codec
from licq.quant.config import SIMULATED, QuantConfig
from licq.quant.model import QuantModel
from licq.reconstruction.config import PtqConfig
from licq.reconstruction.gptq import compensate_rounding
from licq.support.errors import InputError
from tests.tiny_codecs import images, tiny_codec


class TwoLayers(nn.Module):
    """A convolution, an activation and a transposed convolution, whose inputs differ in range by channel."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 6, 5, 2, 2), nn.ConvTranspose2d(6, 3, 4, 2, 1)
        with torch.no_grad():
            self.first.weight.mul_(torch.logspace(-2, 0, 6).reshape(-1, 1, 1, 1))

    def forward(self, x):
        y = nn.functional.gelu(self.first(x))
        return {"x_hat": self.last(y), "likelihoods": {"y": torch.ones_like(y)}}


def simulated(model: nn.Module, x: torch.Tensor, **knobs) -> QuantModel:
    given = {"a_symmetry": "symmetric", "a_headroom": 1.0, "frac_bits": 30, "transform": "fold"}
    config = QuantConfig(a_scales="simulated", **given | knobs)
    qmodel = QuantModel(model, config)
    qmodel.observe([x])
    qmodel.freeze()
    return qmodel


def rounded(x: torch.Tensor, dim: int | None, bits: int = 8) -> torch.Tensor:
    """x with one symmetric scale for each index of a dimension, by PyTorch's fake quantization."""
    qmax = 2 ** (bits - 1) - 1
    if dim is None:
        return torch.fake_quantize_per_tensor_affine(x, float(x.abs().max()) / qmax, 0, -qmax, qmax)
    scale = x.abs().movedim(dim, 0).flatten(1).amax(1) / qmax
    zeros = torch.zeros(len(scale), dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(x, scale, zeros, dim, -qmax, qmax)


@pytest.mark.parametrize("bias_bits", [8, 32])
def test_a_layer_is_float_on_rounded_inputs_weights_and_biases(bias_bits):
    model, x = TwoLayers().eval(), images(2)
    qmodel = simulated(model, x, bias_bits=bias_bits)
    first, last = model.first, model.last
    with torch.no_grad():

        def bias(layer):
            return rounded(layer.bias, None) if bias_bits == 8 else layer.bias

        y = nn.functional.gelu(
            nn.functional.conv2d(x, rounded(first.weight, 0), bias(first), stride=2, padding=2)
        )
        float_y = nn.functional.gelu(first(x))  # sets the range of y
        scale = float_y.abs().amax((0, 2, 3)) / 127
        zeros = torch.zeros(6, dtype=torch.int32)
        y = torch.fake_quantize_per_channel_affine(y, scale, zeros, 1, -127, 127)
        expected = nn.functional.conv_transpose2d(y, rounded(last.weight, 1), bias(last), 2, 1)
        ours = qmodel(x)["x_hat"]
    # a number next to a tie may go the other way: one step of an input
    assert (ours - expected).abs().median() < 1e-5
    assert (ours - expected).abs().max() < 0.05 * expected.std()


@pytest.mark.parametrize("name", ["minnen2018", "lu2022", "tic"])
def test_with_many_bits_it_is_the_float_codec(name):
    model, x = tiny_codec(name), images(1)
    qmodel = simulated(model, x, w_bits=16, a_bits=16)
    with torch.no_grad():
        ours, theirs = qmodel(x), model(x)
    assert (ours["x_hat"] - theirs["x_hat"]).abs().median() < 1e-3 * theirs["x_hat"].std()


def test_it_is_saved_and_loaded_and_has_no_files(tmp_path):
    x = images(1)
    qmodel = simulated(tiny_codec("lu2022"), x, rounding="learned_offset")
    qmodel.save(tmp_path / "m.safetensors")
    loaded = QuantModel.load(tmp_path / "m.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(x)["x_hat"], qmodel(x)["x_hat"])
    assert qmodel.coverage()["quantized"] == {} and SIMULATED in qmodel.coverage()["left_alone"].values()
    with pytest.raises(InputError, match=SIMULATED):
        Codec(loaded).encode((x[0] * 255).round().to(torch.uint8))


def test_what_needs_integers_is_refused_beside_it():
    with pytest.raises(InputError, match="split=0 and balance=0"):
        PtqConfig.from_preset("licq", a_scales="simulated")
    with pytest.raises(InputError, match="a_scales"):
        QuantConfig(a_scales="none")
    assert PtqConfig.from_preset("licq", a_scales="simulated", split=0, balance=0).quant.is_simulated
    paper, integers = (PtqConfig.from_preset(name) for name in ("rdo-ptq", "rdo-ptq-integer"))
    assert paper.quant.is_simulated and not integers.quant.is_simulated
    assert paper.reconstruction == integers.reconstruction


def test_compensated_rounding_sees_the_numbers_that_weights_are_multiplied_with():
    """Not their integers, whose channels have different scales; on flat pictures too."""
    model, x = TwoLayers().eval(), images(4)
    flat = torch.ones_like(x[:1]) * torch.tensor([0.0, 0.5, 1.0]).reshape(3, 1, 1, 1)
    outputs = {}
    for compensated in (False, True):
        config = QuantConfig(w_bits=4, a_scales="simulated", rounding="learned_offset")
        qmodel = QuantModel(model, config)
        qmodel.observe([x], [flat])
        if compensated:
            compensate_rounding(qmodel, [x], [flat], progress=False)
        qmodel.freeze()
        with torch.no_grad():
            outputs[compensated] = [qmodel(part)["x_hat"] - model(part)["x_hat"] for part in (x, flat)]
    for before, after in zip(outputs[False], outputs[True]):
        assert after.square().mean() < 0.7 * before.square().mean()
