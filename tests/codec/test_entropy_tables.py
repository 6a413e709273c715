"""The tables of z are those of its densities, whatever the checkpoint holds; a bad row never reaches the
coder."""

import copy
import warnings

import numpy as np
import pytest
import torch
from compressai.entropy_models import EntropyBottleneck
from torch import nn

from licq.codec.api import Codec
from licq.codec.tables import RowTable, checked_rows
from licq.models.checkpoint_files import CDF_STATE, read_tensors, write_tensors
from licq.models.checkpoints import load_checkpoint, save_checkpoint
from licq.models.embedded import embedded_checkpoint, embedded_qualities
from licq.models.registry import list_models
from licq.quant import serialization
from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.support.errors import InputError, InputWarning
from tests.tiny_codecs import images, tiny_codec


class TwoLatents(nn.Module):
    """A codec of the user's own with two bottlenecks and no `update()`."""

    def __init__(self):
        super().__init__()
        self.g_a, self.more = nn.Conv2d(3, 4, 8, 8), nn.Conv2d(4, 3, 4, 4)
        self.y, self.z = EntropyBottleneck(4), EntropyBottleneck(3)
        self.back, self.g_s = nn.ConvTranspose2d(3, 4, 4, 4), nn.ConvTranspose2d(4, 3, 8, 8)

    def forward(self, x):
        y = self.g_a(x)
        z_hat, of_z = self.z(self.more(y))
        y_hat, of_y = self.y(y)
        return {"x_hat": self.g_s(y_hat + self.back(z_hat)), "likelihoods": {"y": of_y, "z": of_z}}


class ForgetsOne(TwoLatents):
    def update(self, force: bool = False) -> None:
        self.y.update(force=force)


def network(kind: type[nn.Module] = TwoLatents) -> nn.Module:
    torch.manual_seed(0)
    model = kind().eval()
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, (nn.Conv2d, nn.ConvTranspose2d)):
                part.weight.mul_(3)
    return model


def quantized(model: nn.Module) -> QuantModel:
    codec = QuantModel(model, QuantConfig())
    codec.observe([images(2)])
    codec.freeze()
    return codec


def image(seed: int = 9) -> torch.Tensor:
    return (images(1, 64, 128, seed)[0] * 255).round().to(torch.uint8)


def expected(bottleneck: nn.Module) -> EntropyBottleneck:
    made = copy.deepcopy(bottleneck)
    assert isinstance(made, EntropyBottleneck)
    made.update(force=True)
    return made


def assert_tables(codec: QuantModel, model: nn.Module, *names: str) -> None:
    for name in names:
        made = expected(model.get_submodule(name))
        node = codec.nodes[name]
        assert all(torch.equal(node.module.get_buffer(key), made.get_buffer(key)) for key in CDF_STATE)


@pytest.mark.parametrize("kind", [TwoLatents, ForgetsOne])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_codec_whose_update_makes_no_tables_has_files(kind, wrapped, tmp_path):
    """Encoding was a segmentation fault."""
    model = network(kind)
    codec = quantized(nn.DataParallel(model) if wrapped else model)
    assert_tables(codec, model, "y", "z")
    pixels = image()
    data = Codec(codec, multiple=64).encode(pixels)
    codec.save(tmp_path / "m.safetensors")
    loaded = QuantModel.load(tmp_path / "m.safetensors", model=kind())
    decoded = Codec(loaded, multiple=64).decode(data)
    with torch.no_grad():
        out = codec(pixels[None] / 255)["x_hat"][0]
    assert torch.equal(decoded, (out * 255).round().to(torch.uint8))


def spoiled(name: str):
    def change(bottleneck: EntropyBottleneck) -> None:
        bottleneck.update(force=True)
        cdf, lengths, offsets = bottleneck._quantized_cdf, bottleneck._cdf_length, bottleneck._offset
        if name == "stale":
            with torch.no_grad():
                bottleneck.quantiles[:, 0, 1] += 0.4
        elif name == "zeros":
            cdf.zero_()
        elif name == "rows":
            bottleneck._quantized_cdf = cdf[:1]
        elif name == "lengths":
            bottleneck._cdf_length = torch.full_like(lengths, 2)
        elif name == "fewer lengths":
            bottleneck._cdf_length = lengths[:-1]
        elif name == "shape":
            bottleneck._quantized_cdf = cdf.flatten()
        elif name == "offsets":
            bottleneck._offset = offsets + 1

    return change


SPOILED = ["stale", "zeros", "rows", "lengths", "fewer lengths", "shape", "offsets"]


@pytest.mark.parametrize("name", SPOILED)
def test_tables_of_a_checkpoint_do_not_matter(name):
    """One remark; the rest of the calibration is that of the same densities with tables of their own."""
    model = network()
    spoiled(name)(model.z)
    with pytest.warns(InputWarning, match="entropy tables of z are not those of its densities") as caught:
        codec = quantized(model)
        quantized(model)  # a baseline of the same network
    assert len(caught) == 1
    assert_tables(codec, model, "y", "z")
    Codec(codec).encode(image())


@pytest.mark.parametrize("name", ["empty", "made"])
def test_good_tables_are_no_remark(name):
    model = network()
    if name == "made":
        model.y.update()
        model.z.update()
        model.z._quantized_cdf[:, 1] += 1  # as another machine may round
    with warnings.catch_warnings():
        warnings.simplefilter("error", InputWarning)
        codec = quantized(model)
        codec.thaw()
        codec.freeze()
    assert_tables(codec, model, "y", "z")


@pytest.mark.parametrize("name", SPOILED)
def test_a_checkpoint_with_such_tables_loads(name, tmp_path):
    model = tiny_codec("balle2018")
    spoiled(name)(model.entropy_bottleneck)
    path = tmp_path / "m.safetensors"
    save_checkpoint(model, path, {"arch": "balle2018", "quality": 1, "lambda": 0.0018, "metric": "mse"})
    torch.save(model.state_dict(), tmp_path / "m.pth")
    for file in (path, tmp_path / "m.pth"):
        loaded = load_checkpoint(file, "balle2018")
        assert torch.equal(loaded.entropy_bottleneck.quantiles, model.entropy_bottleneck.quantiles)


def test_embedded_codecs_keep_the_tables_of_their_checkpoints():
    arch = "minnen2018"
    assert arch in list_models()
    for quality in embedded_qualities(arch):
        bottleneck = load_checkpoint(embedded_checkpoint(arch, quality)).entropy_bottleneck
        made = expected(bottleneck)
        assert all(torch.equal(bottleneck.get_buffer(key), made.get_buffer(key)) for key in CDF_STATE)


def test_a_file_without_tables_is_evaluated_and_does_not_code(tmp_path):
    """Earlier versions wrote such files for codecs without `update()`."""
    path = tmp_path / "m.safetensors"
    codec = quantized(network())
    codec.save(path)
    tensors, header = read_tensors(path)
    del header["sha256_header"]
    kept = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] not in CDF_STATE}
    header["types"] = {name: stated for name, stated in header["types"].items() if name in kept}
    write_tensors(path, kept, {**header, "sha256_header": serialization.seal(header)})
    loaded = QuantModel.load(path, model=network())
    with torch.no_grad():
        assert torch.equal(loaded(images(1))["x_hat"], codec(images(1))["x_hat"])
    with pytest.raises(InputError, match="z: the model has no tables .* quantize the codec again") as caught:
        Codec(loaded)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda z: z.biases[0].data.fill_(float("nan")), "z: .* not finite"),
        (lambda z: z.quantiles.data[:, 0, 2].fill_(1e6), "z: its quantiles are .* integers apart"),
    ],
)
def test_densities_without_tables_are_one_line(change, expected):
    model = network()
    codec = QuantModel(model, QuantConfig())
    codec.observe([images(2)])
    change(codec.nodes["z"].module)
    with pytest.raises(InputError, match=expected) as caught:
        codec.freeze()
    assert "\n" not in str(caught.value) and not codec.frozen


@pytest.mark.parametrize(
    "row", [[], [0], [0, 65536], [0, 5, 5, 65536], [0, 9, 5, 65536], [1, 5, 65536], [0, 5, 65535]]
)
def test_rows_that_are_no_distributions_are_refused(row):
    with pytest.raises(InputError, match="no symbols can be coded"):
        checked_rows(np.array(row, dtype=np.int64))


def test_more_channels_than_tables_are_refused():
    codec = Codec(quantized(network()))
    table = codec._coder.tables["z"]
    rows = [table.row(number) for number in range(len(table.offsets))]
    codec._coder.tables["z"] = RowTable.of(rows[:-1], table.offsets[:-1])
    with pytest.raises(InputError, match="z: it has 3 channels and 2 tables"):
        codec.encode(image())
