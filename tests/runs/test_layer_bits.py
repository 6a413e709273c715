"""Bits of single layers in a model and in files, down to the integer program."""

import json

import pytest
import torch

from licq.quant.bits import read_bits
from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.reconstruction.api import quantize
from licq.reconstruction.config import PtqConfig
from licq.support.errors import InputError
from tests.integer.test_lowering import assert_program_equals_model
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
    "name, strict",
    [
        ("balle2018", False),
        pytest.param("minnen2018", False, marks=pytest.mark.slow),
        pytest.param("cheng2020", False, marks=pytest.mark.slow),
        ("minnen2018", True),
    ],
)
def test_the_program_of_mixed_bits_equals_the_model(name, strict, tmp_path):
    model = tiny_codec(name)
    bits = varied_bits(QuantModel(model, QuantConfig()))
    config = PtqConfig.from_preset(
        joint_iters=0, stress=False, measured=2, observed=2, balance=0.0, strict_int8=strict
    )
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
    config = PtqConfig.from_preset(joint_iters=2, stress=False, balance=0.0, w_bits=6, a_bits=7)
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
