"""Quantized models in files: bit-exact, small, independent of the weights they are loaded over, and
sealed."""

import copy
import json
import lzma

import pytest
import safetensors
import safetensors.torch
import torch
from compressai.entropy_models import EntropyBottleneck
from torch import nn

from licq.models.checkpoint_files import read_tensors, write_tensors
from licq.models.checkpoints import load_checkpoint, save_checkpoint
from licq.models.registry import create_model
from licq.quant import serialization
from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.quant.serialization import read_quantized
from licq.support.errors import InputError
from tests.frozen_codecs import frozen

SMALL = {
    "balle2018": {"N": 24, "M": 32},
    "minnen2018": {"N": 24, "M": 32},
    "cheng2020": {"N": 16},
    "lu2022": {"N": 16, "M": 32, "depths": (1,) * 6, "num_heads": (1,) * 6},
    "tic": {"N": 16, "M": 16, "depths": (2, 1, 1, 1, 1), "num_heads": (2,) * 5, "causal_heads": 2},
}


class Own(nn.Module):
    """A codec of the user's own: a layer in float, a parameter of its own, a function in a table."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.g_a = nn.Sequential(
            nn.Conv2d(3, width, 5, 4, 2),
            nn.BatchNorm2d(width, track_running_stats=False),
            nn.Conv2d(width, width, 5, 4, 2),
        )
        self.gain = nn.Parameter(torch.rand(1, width, 1, 1) + 0.5)
        self.register_buffer("offset", torch.rand(1, width, 1, 1))
        self.entropy_bottleneck = EntropyBottleneck(width)
        self.g_s = nn.Sequential(
            nn.ConvTranspose2d(width, width, 4, 4),
            nn.Sigmoid(),
            nn.ConvTranspose2d(width, 3, 4, 4),
            nn.Conv2d(3, 3, 1),
        )
        self.unused = nn.Conv2d(3, width, 1)

    def forward(self, x):
        y = self.g_a(x) * self.gain + self.offset
        y_hat, likelihoods = self.entropy_bottleneck(y)
        return {"x_hat": self.g_s(y_hat), "likelihoods": {"y": likelihoods}}

    def update(self):
        self.entropy_bottleneck.update()


def images(seed: int = 0, size: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (1, 3, size, size), generator=torch.Generator().manual_seed(seed)) / 255


def quantized(network: nn.Module, **settings) -> QuantModel:
    model = QuantModel(network, QuantConfig(**settings))
    model.observe([images(1)])
    model.freeze()
    return model


def network(arch: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return create_model(arch, configuration="reference", **SMALL[arch]).eval()


def own(seed: int, **sizes) -> nn.Module:
    torch.manual_seed(seed)
    return Own(**sizes).eval()


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_weights_of_few_bits_take_few_bits(tmp_path, bits):
    model = quantized(network("balle2018", 1), w_bits=bits)
    path = tmp_path / "model.safetensors"
    model.save(path)
    stored = read_tensors(path)[0]
    weights = {
        name: node.weight_int
        for name, node in model.nodes.items()
        if getattr(node, "weight_int", None) is not None
    }
    packed = [name for name, weight in weights.items() if weight.numel() > 64]
    assert packed and all(
        stored[f"{key(model, name)}.weight_int"].numel() <= -(-weights[name].numel() * bits // 8)
        for name in packed
    )
    loaded = QuantModel.load(path)
    with torch.no_grad():
        ours, theirs = model(images(2)), loaded(images(2))
    assert torch.equal(ours["x_hat"], theirs["x_hat"])
    assert all(
        torch.equal(ours["likelihoods"][name], theirs["likelihoods"][name]) for name in ours["likelihoods"]
    )


def test_tables_are_stored_as_steps_and_older_files_are_read(tmp_path, monkeypatch):
    model = quantized(network("tic", 1))
    model.save(tmp_path / "new.safetensors")
    monkeypatch.setattr(serialization, "_TABLES", ())
    monkeypatch.setattr(serialization, "VERSION", 3)
    model.save(tmp_path / "old.safetensors")
    tables = {
        f"{path}.table": module.table
        for path, module in model.named_modules()
        if getattr(module, "table", None) is not None
    }
    new, old = (read_quantized(tmp_path / f"{name}.safetensors")[1] for name in ("new", "old"))
    stored = [name for name in tables if name in new]
    assert len(stored) > 1 and all(
        torch.equal(new[name], tables[name]) and new[name].dtype == tables[name].dtype for name in stored
    )
    assert new.keys() == old.keys() and all(
        torch.equal(new[name], old[name]) and new[name].dtype == old[name].dtype for name in new
    )
    steps = read_tensors(tmp_path / "new.safetensors")[0]
    assert all(int(steps[name][1:].abs().max()) < int(tables[name].abs().max()) for name in stored)
    assert (tmp_path / "new.safetensors").stat().st_size < (tmp_path / "old.safetensors").stat().st_size


def test_a_loaded_model_is_saved_as_it_was(tmp_path):
    model = quantized(network("minnen2018", 1))
    model.save(tmp_path / "a.safetensors", {"quality": 1})
    loaded = QuantModel.load(tmp_path / "a.safetensors")
    loaded.save(tmp_path / "b.safetensors", loaded.extra)
    again = QuantModel.load(tmp_path / "b.safetensors")
    with torch.no_grad():
        ours, theirs = loaded(images(2)), again(images(2))
    assert torch.equal(ours["x_hat"], theirs["x_hat"]) and again.extra == {"quality": 1}
    assert all(
        torch.equal(ours["likelihoods"][name], theirs["likelihoods"][name]) for name in ours["likelihoods"]
    )


def key(model: QuantModel, name: str) -> str:
    """Where a node is in the state dictionary."""
    return next(path for path, module in model.named_modules() if module is model.nodes[name])


@pytest.fixture(scope="module")
def own_file(tmp_path_factory):
    model = quantized(own(0))
    path = tmp_path_factory.mktemp("own") / "own.safetensors"
    model.save(path, {"quality": 3, "history": [1.5, 0.5], "by_step": {10: 1, 9: 2}})
    return model, path


def assert_same_output(a: QuantModel, b: QuantModel) -> None:
    with torch.no_grad():
        for x in (images(2), images(3)):
            left, right = a(x), b(x)
            assert torch.equal(left["x_hat"], right["x_hat"])
            assert left["likelihoods"].keys() == right["likelihoods"].keys()
            for key in left["likelihoods"]:
                assert torch.equal(left["likelihoods"][key], right["likelihoods"][key])


@pytest.mark.parametrize(
    "arch", [arch if arch != "cheng2020" else pytest.param(arch, marks=pytest.mark.slow) for arch in SMALL]
)
def test_loaded_codec_gives_the_same_bits_whatever_the_seed(arch, tmp_path):
    saved = quantized(network(arch, 0))
    size = saved.save(tmp_path / "m.safetensors")
    assert size == (tmp_path / "m.safetensors").stat().st_size
    torch.manual_seed(1)
    loaded = QuantModel.load(tmp_path / "m.safetensors")
    assert loaded.frozen
    assert loaded.coverage() == saved.coverage()
    assert list(loaded.nodes) == list(saved.nodes)
    assert_same_output(saved, loaded)


@pytest.mark.parametrize("arch", ["balle2018", "tic"])
def test_loading_reads_nothing_of_the_network_it_is_given(arch, tmp_path):
    saved = quantized(network(arch, 0))
    saved.save(tmp_path / "m.safetensors")
    wild = network(arch, 2)
    with torch.no_grad():
        for parameter in wild.parameters():
            parameter.fill_(torch.nan)
    assert_same_output(saved, QuantModel.load(tmp_path / "m.safetensors", model=wild))


def test_own_module_needs_a_new_object_and_gives_the_same_bits(own_file):
    saved, path = own_file
    with pytest.raises(InputError, match=r"Own.*model=Own\(") as caught:
        QuantModel.load(path)
    assert "\n" not in str(caught.value)
    fresh = own(5)
    before = copy.deepcopy(fresh.state_dict())
    loaded = QuantModel.load(path, model=fresh)
    assert_same_output(saved, loaded)
    assert loaded.extra == {"quality": 3, "history": [1.5, 0.5], "by_step": {"10": 1, "9": 2}}
    assert all(torch.equal(before[name], value) for name, value in fresh.state_dict().items())
    assert loaded.coverage()["left_alone"] == {
        "g_a.1": saved.coverage()["left_alone"]["g_a.1"],
        "unused": "never ran in calibration",
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"w_bits": 4, "a_bits": 6, "bias_bits": 8},
        {"w_bits": 10},
        {"a_granularity": "tensor", "w_granularity": "tensor", "strict_int8": True},
        {"w_bits": 32},
        {"a_bits": 32},
        {"a_bits": 32, "rounding": "adaround"},
    ],
    ids=str,
)
def test_every_kind_of_setting_survives(settings, tmp_path):
    saved = quantized(own(0), **settings)
    saved.save(tmp_path / "m.safetensors")
    assert_same_output(saved, QuantModel.load(tmp_path / "m.safetensors", model=own(1)))


def test_save_of_a_loaded_model_is_the_same_file(own_file, tmp_path):
    _, path = own_file
    loaded = QuantModel.load(path, model=own(1))
    loaded.save(tmp_path / "again.safetensors", loaded.extra)
    header, tensors = read_quantized(path)
    header_again, tensors_again = read_quantized(tmp_path / "again.safetensors")
    assert header == header_again
    assert tensors.keys() == tensors_again.keys()
    assert all(torch.equal(tensors[name], tensors_again[name]) for name in tensors)


def test_no_float_weight_of_a_quantized_layer_is_in_the_file(tmp_path):
    saved = quantized(create_model("balle2018", N=64, M=96).eval())
    size = saved.save(tmp_path / "m.safetensors")
    types = {name: tensor.dtype for name, tensor in read_tensors(tmp_path / "m.safetensors")[0].items()}
    names = types.keys()
    weights = {name for name in names if name.endswith("weight_int")}
    assert len(weights) == len(saved.rewrite.nodes) - 2  # all but the two entropy models
    assert {types[name] for name in weights} <= {
        torch.int8,
        torch.uint8,
    }  # a byte each, or packed where fewer bits hold them
    assert not [
        name for name in names if ".module.weight" in name or ".module.gamma" in name or "bias_change" in name
    ]
    save_checkpoint(
        saved_float := create_model("balle2018", N=64, M=96), tmp_path / "f.safetensors", {}, torch.float32
    )
    parameters = sum(parameter.numel() for parameter in saved_float.parameters())
    assert size < 0.26 * (tmp_path / "f.safetensors").stat().st_size
    assert size < 1.04 * parameters


def test_loaded_model_holds_no_float_weights_in_memory_and_is_final(own_file):
    loaded = QuantModel.load(own_file[1], model=own(1))
    weight = loaded.model.g_a[0].module.weight
    assert weight.untyped_storage().nbytes() <= 4
    assert weight.shape == (8, 3, 5, 5) and bool(weight.isnan().all())
    for change in (loaded.thaw, lambda: loaded.observe([images()])):
        with pytest.raises(InputError, match="final"):
            change()
    loaded.freeze()
    assert_same_output(own_file[0], loaded)


def test_coder_tables_are_in_the_file_to_the_last_entry(own_file):
    saved, path = own_file
    loaded = QuantModel.load(path, model=own(1))
    for name in ("_quantized_cdf", "_offset", "_cdf_length"):
        expected = getattr(saved.model.entropy_bottleneck.module, name)
        assert expected.numel() and torch.equal(
            getattr(loaded.model.entropy_bottleneck.module, name), expected
        )


def test_model_that_is_not_frozen_is_refused(tmp_path):
    model = QuantModel(own(0), QuantConfig())
    model.observe([images()])
    with pytest.raises(InputError, match="frozen"):
        model.save(tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_failing_write_leaves_the_old_file(own_file, tmp_path):
    path = tmp_path / "m.safetensors"
    own_file[0].save(path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        own_file[0].save(path, {"quality": object()})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# -------------------------------------------------------------------------------------------------- bad files


def rewritten(path, target, change) -> None:
    """The file with `change(header, tensors)` done to it and the tensors' hash made anew, as a forger
    would."""
    tensors, header = read_tensors(path)
    change(header, tensors)
    write_tensors(target, tensors, header)


def _flip(position):
    def change(content: bytes) -> bytes:
        at = position % len(content)
        return content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda content: b"", "empty"),
        (lambda content: content[:5], "damaged"),
        (lambda content: content[:400], "damaged"),
        (lambda content: content[:-1], "damaged"),
        (lambda content: content + b"\0", "damaged"),
        (_flip(-1), "SHA-256"),
        (_flip(-3000), "SHA-256"),
        (lambda content: b"<html>" + content, "web page"),
        (lambda content: b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
        (lambda content: b"hello", "damaged"),
    ],
)
def test_damaged_files_are_one_line(own_file, tmp_path, change, expected):
    content = change(own_file[1].read_bytes())
    assert content != own_file[1].read_bytes()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=expected) as caught:
        QuantModel.load(path, model=own(1))
    assert "\n" not in str(caught.value)


def test_every_byte_of_the_header_counts(own_file, tmp_path):
    content = own_file[1].read_bytes()
    length = int.from_bytes(content[:8], "little")
    path = tmp_path / "bad.safetensors"
    for at in range(8, 8 + length):
        path.write_bytes(_flip(at)(content))
        with pytest.raises(InputError) as caught:
            read_quantized(path)
        assert "\n" not in str(caught.value)


def _compressed_as(tensor: bytes, size: object):
    """A file whose one tensor is `tensor`, with its right hash: what a forger would make."""
    return {"xz": torch.frombuffer(bytearray(tensor), dtype=torch.uint8)}, {"size": size}


@pytest.mark.parametrize(
    "content",
    [
        _compressed_as(lzma.compress(bytes(2**26)), 2**26),  # would grow to 7000 times its size
        _compressed_as(lzma.compress(bytes(1000)), 1000),  # not of safetensors' form
        _compressed_as(lzma.compress(safetensors.torch.save({"a": torch.zeros(3)})), 72),  # without a header
        _compressed_as(b"not of xz's form", 100),
        _compressed_as(lzma.compress(bytes(1000)), None),
    ],
)
def test_hostile_compressed_files_are_one_line(tmp_path, content):
    write_tensors(tmp_path / "bad.safetensors", *content)
    with pytest.raises(InputError, match="damaged") as caught:
        read_quantized(tmp_path / "bad.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda header, tensors: header.update(version=99), "version 99"),
        (lambda header, tensors: header.update(format="other"), "no quantized model"),
        (lambda header, tensors: header.pop("sha256_header"), "SHA-256"),
        (lambda header, tensors: header["order"].reverse(), "SHA-256"),
        (lambda header, tensors: header["config"].update(a_bits=7), "header.*SHA-256"),
    ],
)
def test_foreign_headers_are_one_line(own_file, tmp_path, change, expected):
    rewritten(own_file[1], tmp_path / "bad.safetensors", change)
    with pytest.raises(InputError, match=expected) as caught:
        QuantModel.load(tmp_path / "bad.safetensors", model=own(1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda tensors: tensors.pop("model.gain"), "model.gain is missing"),
        (lambda tensors: tensors.update({"model.extra_gain": torch.ones(2)}), "model.extra_gain is unknown"),
        (lambda tensors: tensors.update({"model.nowhere.gain": torch.ones(2)}), "model.nowhere is unknown"),
    ],
)
def test_tensors_of_another_network_are_one_line(own_file, tmp_path, change, expected):
    rewritten(own_file[1], tmp_path / "bad.safetensors", lambda header, tensors: change(tensors))
    with pytest.raises(InputError, match=expected):
        QuantModel.load(tmp_path / "bad.safetensors", model=own(1))


def test_networks_that_do_not_fit_are_one_line(own_file):
    for other, expected in (
        (own(1, width=12), "other layers or sizes"),
        (nn.Conv2d(3, 3, 1), "not a Conv2d"),
    ):
        with pytest.raises(InputError, match=expected) as caught:
            QuantModel.load(own_file[1], model=other)
        assert "\n" not in str(caught.value)


def test_float_checkpoint_and_quantized_model_are_not_taken_for_each_other(own_file, tmp_path):
    save_checkpoint(network("balle2018", 0), tmp_path / "float.safetensors", {"arch": "balle2018"})
    with pytest.raises(InputError, match="float checkpoint.*main_ptq.py takes it as `checkpoint`"):
        QuantModel.load(tmp_path / "float.safetensors")
    torch.save(network("balle2018", 0).state_dict(), tmp_path / "float.pt")
    with pytest.raises(InputError, match="float.pt"):
        QuantModel.load(tmp_path / "float.pt")
    with pytest.raises(InputError, match="quantized model.*main_eval.py"):
        load_checkpoint(own_file[1])


def test_missing_file_and_folder_are_one_line(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(InputError, match="no quantized model at"):
            QuantModel.load(path)


def test_a_certificate_that_does_not_hold_is_refused(tmp_path):
    """Overflow bounds are in the file and are proved again when it is opened."""
    codec = frozen("balle2018")
    name, node = next((name, node) for name, node in codec.nodes.items() if node.kind == "conv")
    stated = node.bound
    try:
        node.bound = stated - 1
        codec.save(tmp_path / "model.safetensors")
    finally:
        node.bound = stated
    with pytest.raises(
        InputError, match=f"sums in {name} can reach {int(stated)}, and the file certifies {int(stated) - 1}"
    ):
        QuantModel.load(tmp_path / "model.safetensors")
    codec.save(tmp_path / "model.safetensors")
    loaded = QuantModel.load(tmp_path / "model.safetensors")
    assert all(
        torch.equal(loaded.nodes[n].bound, codec.nodes[n].bound)
        for n in codec.nodes
        if getattr(codec.nodes[n], "bound", None) is not None
    )


def reforged(path, target, change) -> None:
    """The file with `change(header, tensors)` done to what it stores, and every seal made anew."""
    with safetensors.safe_open(path, "pt") as stream:
        inside = safetensors.torch.load(lzma.decompress(stream.get_tensor("xz").numpy().tobytes()))
    header = json.loads(inside.pop("header").numpy().tobytes())
    for seal in ("sha256", "sha256_header"):
        header.pop(seal)
    change(header, inside)
    write_tensors(target, inside, {**header, "sha256_header": serialization.seal(header)}, compress=True)


def _changed(end: str, make):
    """The first tensor whose name ends so becomes `make` of it."""

    def change(header, tensors):
        name = next(name for name in tensors if name.endswith(end))
        header["types"].pop(name, None)
        tensors[name] = make(tensors[name])

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            _changed("_cdf_steps", lambda steps: (steps.to(torch.int32) * 0).to(torch.uint16)),
            "do not rise from 0 to 65536",
        ),
        (_changed("inverses", lambda table: table * 0), "densities"),
        (_changed("thresholds", lambda table: table.flip(0)), "densities"),
        (_changed("normal", lambda table: table[1:]), "other sizes"),
        (_changed(".out_scale", lambda scale: scale * float("nan")), "not one positive number"),
        (_changed(".out_scale", lambda scale: torch.cat([scale, scale[:1]])), "not one positive number"),
        (_changed("bias_int", lambda bias: torch.cat([bias, bias[:1]])), "its bias"),
        (_changed("input_grid.scale", lambda scale: scale * 0), "not positive"),
        (_changed("mantissa", lambda mantissa: torch.cat([mantissa, mantissa], 1)), "each channel"),
        (lambda header, tensors: header.pop("packed"), "packed"),
        (lambda header, tensors: header.pop("types"), "types"),
        (lambda header, tensors: header.pop("extra"), "extra"),
        (
            lambda header, tensors: header["types"].update(dict.fromkeys(header["types"], "load")),
            "load is no type",
        ),
        (lambda header, tensors: header["kwargs"].update(N=-1), "negative dimension"),
    ],
)
def test_forged_models_are_one_line(tmp_path, change, expected):
    frozen("balle2018").save(tmp_path / "good.safetensors")
    reforged(tmp_path / "good.safetensors", tmp_path / "bad.safetensors", change)
    with pytest.raises(InputError, match=expected) as caught:
        QuantModel.load(tmp_path / "bad.safetensors")
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------- inputs in float


@pytest.mark.parametrize(
    ("settings", "bits"),
    [
        ({"a_bits": 32}, {"g_a.0": {"w_bits": 3}}),
        ({}, {"g_a.2": {"w_bits": 4, "a_bits": 32}}),
        ({"a_bits": 32, "w_bits": 4, "w_granularity": "groups3"}, {}),
        ({"a_bits": 32, "w_bits": 4, "rounding": "adaround"}, {}),
        ({"w_bits": 32}, {}),
    ],
)
def test_a_model_whose_inputs_or_weights_are_float_comes_back_as_it_was(settings, bits, tmp_path):
    saved = QuantModel(own(0), QuantConfig(**settings), bits)
    saved.observe([images(1)])
    if settings.get("rounding"):  # a scale that was learned, away from the one whose floors AdaRound keeps
        for node in saved.layers.values():
            node.weight_quantizer.log_n.data -= 0.3
    saved.freeze()
    saved.save(tmp_path / "m.safetensors")
    loaded = QuantModel.load(tmp_path / "m.safetensors", model=own(5))
    assert_same_output(saved, loaded)
    assert loaded.coverage() == saved.coverage()


def without(path, last: str) -> None:
    """The file as it was written before tensors of this name were in it."""
    tensors, header = read_tensors(path)
    gone = {name for name in tensors if name.endswith(last)}
    assert gone
    header["types"] = {name: stated for name, stated in header["types"].items() if name not in gone}
    header["packed"] = {name: stated for name, stated in header["packed"].items() if name not in gone}
    del header["sha256_header"]
    kept = {name: tensor for name, tensor in tensors.items() if name not in gone}
    write_tensors(path, kept, {**header, "sha256_header": serialization.seal(header)})


def test_older_files_of_float_inputs_load_with_adaround_and_are_refused_with_groups(tmp_path):
    path = tmp_path / "m.safetensors"
    saved = quantized(own(0), a_bits=32, rounding="adaround")
    saved.save(path)
    without(path, ".base")
    assert_same_output(saved, QuantModel.load(path, model=own(5)))
    quantized(own(0), a_bits=32, w_granularity="groups2").save(path)
    without(path, ".group")
    with pytest.raises(InputError, match="g_a.0 share a scale; quantize the codec again"):
        QuantModel.load(path, model=own(5))


def test_a_probe_of_a_hostile_size_is_not_run(tmp_path):
    path = tmp_path / "m.safetensors"
    model = quantized(own(0))
    model.checked["repeatable"] = {"height": 2**30, "width": 2**30, "exact": True, "pixels": "0"}
    model.save(path)
    with pytest.raises(InputError, match="is damaged"):
        QuantModel.load(path, model=own(1))


def test_many_short_cdf_tables_are_read_back(tmp_path):
    """Their lengths, 80 numbers below 64, were packed and could not be read."""
    bottleneck = EntropyBottleneck(80, init_scale=2)
    bottleneck.update(force=True)
    assert len(bottleneck._cdf_length) >= serialization._MIN_PACKED and bottleneck._cdf_length.max() < 64
    names = ("_quantized_cdf", "_cdf_length", "_offset")
    tensors = {f"z.{name}": getattr(bottleneck, name) for name in names}
    stored, storage = serialization._stored(tensors)
    write_tensors(tmp_path / "m.safetensors", stored, {})
    read = serialization._restored(storage, read_tensors(tmp_path / "m.safetensors")[0])
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
