"""A model's first file is decoded and compared with its own forward; its own file says that it was."""

import pytest
import torch

from licq.codec.api import Codec
from licq.evaluation.evaluate import evaluate
from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.quant.serialization import read_quantized
from licq.runs.coding import main_info
from licq.support.errors import InputError
from tests.codec.test_files import TwoRoundings
from tests.frozen_codecs import make_frozen
from tests.quant.test_serialization import reforged
from tests.reconstruction.test_repeatability import codec, counter_attribute
from tests.tiny_codecs import images


def frozen_as_it_is(network) -> QuantModel:
    """A model as earlier versions made it, which did not look at what the codec does."""
    model = QuantModel(network, QuantConfig())
    model.observe([images(1)])
    model.freeze()
    return model


def last_image(middle, y):
    """Something of the image before, of the same image at first."""
    before, middle.cache = middle.cache, y
    return y + 0.1 * (y if before is None else before)[:1]


def image() -> torch.Tensor:
    return (images(1, 64, 192, 5)[0] * 255).round().to(torch.uint8)


@pytest.mark.parametrize("function", [lambda middle, y: y + 0.05 * torch.randn(y.shape), counter_attribute])
def test_a_model_of_an_earlier_version_whose_files_lie_does_not_encode(function):
    """Its files decoded to other pixels with each load of the model."""
    model = frozen_as_it_is(codec(function))
    with pytest.raises(InputError, match="does not decode to the pixels of its own forward") as caught:
        Codec(model).encode(image())
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="does not decode to the pixels of its own forward"):
        evaluate(model, images(1), progress=False)


def test_tensors_of_an_earlier_image_are_one_line():
    """They ended in "'Tensor' object has no attribute 'number'"."""
    model = frozen_as_it_is(codec(last_image))
    with pytest.raises(InputError, match="middle.* has kept from an earlier forward") as caught:
        Codec(model).encode(image())
    assert "\n" not in str(caught.value)


def test_the_check_is_made_once_and_stands_in_the_models_file(tmp_path, capsys, monkeypatch):
    path, old = tmp_path / "m.safetensors", tmp_path / "old.safetensors"
    model = make_frozen("balle2018")
    model.save(path)
    assert main_info([str(path)]) == 0 and "not checked yet" in capsys.readouterr().out
    data = Codec(model).encode(image())
    assert model.checked["files"].items() >= {"height": 64, "width": 128}.items()
    model.save(path)
    assert read_quantized(path)[0]["checked"] == model.checked
    assert main_info([str(path)]) == 0
    assert "a file of 128x64 pixels decodes to its own pixels" in capsys.readouterr().out
    loaded = QuantModel.load(path)
    monkeypatch.setattr(Codec, "check", lambda *_: pytest.fail("it is checked"))
    assert Codec(loaded).encode(image()) == data
    reforged(path, old, lambda header, tensors: header.pop("checked"))
    assert QuantModel.load(old).checked == {}


def test_what_has_no_files_says_so(tmp_path, capsys):
    torch.manual_seed(0)
    model = frozen_as_it_is(TwoRoundings(6, 8).eval())
    assert "no bitstream" in Codec(model).check(image())["none"]
    model.save(tmp_path / "m.safetensors")
    assert main_info([str(tmp_path / "m.safetensors")]) == 0
    line = capsys.readouterr().out
    assert "it has no files" in line and line.count("\n") == 1
    assert evaluate(model, images(1), progress=False).bpp_source == "estimate"
