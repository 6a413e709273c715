"""Stages that stay in float: what computes, what is learned, what is refused."""

import argparse

import pytest
import torch

import licq
from licq.codec.api import Codec
from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.reconstruction.config import PtqConfig
from licq.runs.layer_bits import check_float_stages
from licq.support.errors import InputError
from tests.tiny_codecs import images, tiny_codec

TRANSFORMS = ("g_a", "h_a", "g_s")


def quantized(model: torch.nn.Module, x: torch.Tensor, **knobs) -> QuantModel:
    qmodel = QuantModel(model, QuantConfig(**knobs))
    qmodel.observe([x])
    qmodel.freeze()
    return qmodel


@pytest.mark.parametrize("a_scales", ["folded", "simulated"])
def test_only_the_prior_changes_when_the_transforms_stay_in_float(a_scales):
    model, x = tiny_codec("minnen2018"), images(2)
    whole = quantized(model, x, a_scales=a_scales)
    part = quantized(model, x, a_scales=a_scales, float_stages=TRANSFORMS)
    with torch.no_grad():
        expected, ours, all_layers = model(x), part(x), whole(x)
    assert torch.equal(ours["x_hat"], expected["x_hat"]) and not torch.equal(
        all_layers["x_hat"], ours["x_hat"]
    )
    assert torch.allclose(ours["likelihoods"]["z"], expected["likelihoods"]["z"], atol=1e-5)
    assert not torch.equal(ours["likelihoods"]["y"], expected["likelihoods"]["y"])


def test_they_have_no_files_and_every_report_names_them(tmp_path):
    model, x = tiny_codec("minnen2018"), images(1)
    qmodel = quantized(model, x, float_stages=TRANSFORMS)
    left_alone, counts = qmodel.coverage()["left_alone"], qmodel.coverage()["quantized"]
    assert {stage: "stays in float (float_stages)" for stage in TRANSFORMS} == left_alone
    prior = [name for name in qmodel.layers if not name.startswith(TRANSFORMS)]
    assert counts["conv"] + counts["deconv"] == len(prior)
    qmodel.save(tmp_path / "m.safetensors")
    loaded = QuantModel.load(tmp_path / "m.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(x)["likelihoods"]["y"], qmodel(x)["likelihoods"]["y"])
    with pytest.raises(InputError, match="g_a, h_a, g_s stay in float"):
        Codec(loaded)


def test_nothing_in_them_is_learned_or_searched():
    stages = {"float_stages": ("g_a", "h_a"), "iters": 2}
    for preset in ("rdo-ptq", "mse-layer", "licq"):
        config = PtqConfig.from_preset(preset, **stages, **({"joint_iters": 2} if preset == "licq" else {}))
        qmodel = licq.quantize(tiny_codec("balle2018"), images(2), config, lmbda=0.01, progress=False)
        nodes = [node for name, node in qmodel.layers.items() if name.startswith(("g_a", "h_a"))]
        assert all(not bool(node.bias_change.any()) for node in nodes)
        names = [entry["name"] for entry in qmodel.history["units"]]
        assert not any(name.startswith(("g_a", "h_a")) for name in names)


def test_a_codec_without_another_stage_is_refused():
    with pytest.raises(InputError, match="nothing is quantized"):
        QuantModel(tiny_codec("balle2018"), QuantConfig(float_stages=("g_a", "g_s", "h_a", "h_s")))


def test_a_text_is_no_list_of_stages():
    with pytest.raises(InputError, match="float_stages=g_a"):
        QuantConfig(float_stages="g_a")


def test_a_search_of_bits_refuses_stages_without_bits():
    args = argparse.Namespace(budget_size={"mean_bits": 6}, budget_bops=None, max_bd_rate=None)
    quant, model = QuantConfig(float_stages=("g_a",)), tiny_codec("balle2018")
    with pytest.raises(InputError, match="no bits to search"):
        check_float_stages(args, model, quant)
    args.budget_size = None
    check_float_stages(args, model, quant)
