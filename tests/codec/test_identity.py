"""A file names what decodes it: the program and its tables, not the model's own file."""

import pytest
import torch
from torch import nn

from licq.codec.api import Codec
from licq.codec.container import Container
from licq.quant.model import QuantModel
from licq.quant.saving import model_identity
from licq.quant.serialization import read_identity, read_quantized
from licq.reconstruction.api import quantize
from licq.reconstruction.config import PtqConfig
from licq.runs.coding import main_decode, main_info
from licq.support.errors import InputError
from licq.support.files import sha256
from tests.frozen_codecs import frozen, make_frozen
from tests.quant.test_serialization import reforged
from tests.tiny_codecs import SIZES, images, tiny_codec

QUICK = ("balle2018", "minnen2018", "balle2018-vbr")


def image() -> torch.Tensor:
    return (images(1, 64, 64, 7)[0] * 255).round().to(torch.uint8)


def learned(model: nn.Module, folder=None, **options) -> QuantModel:
    config = PtqConfig.from_preset("nearest", iters=2, learn=["range_a"], unit="stage")
    return quantize(model, images(2), config, lmbda=0.01, folder=folder, progress=False, **options)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SIZES]
)
def test_saving_and_loading_keep_it(name, tmp_path):
    model, path = make_frozen(name), tmp_path / "m.safetensors"
    early = Codec(model).encode(image())
    before = model.identity
    model.save(path, {"calibration_seconds": 12.5})
    assert model.identity == before == read_identity(path) == read_quantized(path)[0]["identity"]
    loaded = QuantModel.load(path)
    assert loaded.identity == before
    loaded.identity = None
    assert model_identity(loaded) == before  # not only because the file says so
    assert torch.equal(Codec.load(path).decode(early), Codec(model).decode(early))
    loaded.save(tmp_path / "again.safetensors", {"other": 1})
    assert read_identity(tmp_path / "again.safetensors") == before


def test_the_same_calibration_again_or_resumed_is_the_same_model(tmp_path):
    """The files differ by the seconds that they state; each decodes what the other has written."""
    models = [
        learned(tiny_codec("balle2018"), tmp_path / "state"),
        learned(tiny_codec("balle2018")),
        learned(tiny_codec("balle2018"), tmp_path / "state", resume=True),
        learned(nn.DataParallel(tiny_codec("balle2018"))),
    ]
    paths = [tmp_path / f"{index}.safetensors" for index in range(4)]
    for path, model in zip(paths, models):
        model.save(path, {"seconds": model.history["seconds"]})
    assert len({sha256(path) for path in paths}) > 1
    assert len({read_identity(path) for path in paths}) == 1
    files = [Codec.load(path).encode(image()) for path in paths]
    assert len(set(files)) == 1
    for path in paths:
        assert torch.equal(Codec.load(path).decode(files[0]), Codec(models[0]).decode(files[0]))


def test_it_changes_with_every_part_of_the_program():
    """With a bit of a weight, with a table, with what is quantized how."""
    model = make_frozen("balle2018")
    known = {model_identity(model)}

    def changed() -> None:
        model.identity = None
        assert model_identity(model) not in known
        known.add(model.identity)

    node = next(node for node in model.nodes.values() if getattr(node, "weight_int", None) is not None)
    node.weight_int.view(-1)[0] += 1
    changed()
    model.nodes["entropy_bottleneck"].module._quantized_cdf[0, 1] += 1
    changed()
    node.input_grid.channel_dim += 1
    changed()
    model.runtime.kept_in_float[("erf", "g_a")] += 1
    changed()
    model.runtime.kept_in_float[("erf", "g_a")] += 1  # how often a function ran is no part of the program
    model.identity = None
    assert model_identity(model) in known


def test_files_of_earlier_versions_decode_with_the_model_that_they_name(tmp_path):
    """Their models state no identity, and they name the SHA-256 of the model's file."""
    frozen("minnen2018").save(tmp_path / "new.safetensors")
    old = tmp_path / "old.safetensors"
    reforged(tmp_path / "new.safetensors", old, lambda header, tensors: header.pop("identity"))
    assert read_identity(old) == QuantModel.load(old).identity == read_identity(tmp_path / "new.safetensors")
    written = Codec(QuantModel.load(old), bytes.fromhex(sha256(old))).encode(image())
    assert Container.from_bytes(written).model.hex() == sha256(old)[:8]
    assert torch.equal(
        Codec.load(old).decode(written), Codec.load(old).decode(Codec.load(old).encode(image()))
    )
    with pytest.raises(InputError, match="another model"):
        Codec.load(tmp_path / "new.safetensors").decode(written)
    (tmp_path / "a.licq").write_bytes(written)
    assert main_decode([str(tmp_path / "a.licq"), "--model", str(old), "--quiet"]) == 0


def test_info_says_it(tmp_path, capsys):
    path = tmp_path / "m.safetensors"
    frozen("balle2018").save(path, {"quality": 3})
    assert main_info([str(path)]) == 0
    line = capsys.readouterr().out
    assert "balle2018 quality 3, W8A8" in line and read_identity(path) in line and sha256(path) in line
