"""Checkpoints: every format that is taken, what is refused, and in which words."""

import argparse
import json
import warnings

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from compressai.models import JointAutoregressiveHierarchicalPriors, MeanScaleHyperprior, ScaleHyperprior
from torch import nn

from licq.models import embedded, registry
from licq.models.checkpoint_files import pack_cdfs, rename_key, unpack_cdfs
from licq.models.checkpoints import (
    embedded_checkpoint,
    fill_network,
    identify,
    load_checkpoint,
    load_model,
    read_checkpoint,
    read_state_dict,
    save_checkpoint,
)
from licq.models.registry import create_model, get_architecture, list_models, register_model
from licq.support.errors import InputError, InputWarning
from licq.support.files import sha256
from tests.formula import as_published


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return JointAutoregressiveHierarchicalPriors(8, 12).eval()


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def refusal(path, *arguments, **options) -> str:
    """The message with which `load_checkpoint` refuses; it must be one line that names the file."""
    with pytest.raises(InputError) as caught:
        load_checkpoint(path, *arguments, **options)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and len(message) < 500
    return message


def old_style(state_dict: dict) -> dict:
    """Names of CompressAI 1.1: `entropy_bottleneck._matrix0` for today's `entropy_bottleneck.matrices.0`."""
    singular = {"matrices.": "_matrix", "biases.": "_bias", "factors.": "_factor"}
    return {
        next(
            (key.replace(new, old) for new, old in singular.items() if f"bottleneck.{new}" in key), key
        ): value
        for key, value in state_dict.items()
    }


def oldest_style(state_dict: dict) -> dict:
    """Names of CompressAI 1.0: ParameterLists with a leading underscore."""
    lists = ("matrices.", "biases.", "factors.")
    return {
        next((key.replace(part, f"_{part}") for part in lists if f"bottleneck.{part}" in key), key): value
        for key, value in state_dict.items()
    }


FORMATS = {
    "bare": lambda state: state,
    "wrapped in state_dict": lambda state: {
        "epoch": 3,
        "state_dict": state,
        "loss": torch.tensor(1.0),
        "optimizer": {},
    },
    "wrapped in model": lambda state: {"model": state, "epoch": 1},
    "wrapped twice": lambda state: {"model": {"state_dict": state}},
    "DataParallel": lambda state: {f"module.{key}": value for key, value in state.items()},
    "compiled": lambda state: {f"_orig_mod.module.{key}": value for key, value in state.items()},
    "wrapped in weights": lambda state: {"weights": state, "epoch": 1},
    "wrapped in params": lambda state: {"params": state},
    "Lightning": lambda state: {
        "state_dict": {
            **{f"model.{key}": value for key, value in state.items()},
            "criterion.window": torch.full((3,), torch.inf),
        },
        "pytorch-lightning_version": "2.4.0",
    },
    "Lightning, compiled": lambda state: {
        "state_dict": {f"net._orig_mod.{key}": value for key, value in state.items()}
    },
    "Lightning around a module": lambda state: {f"model.codec.{key}": value for key, value in state.items()},
    "compiled parts": lambda state: {
        key.replace("g_a.", "g_a._orig_mod.", 1): value for key, value in state.items()
    },
    "averages alone": lambda state: {"params_ema": state},
    "averaged model": lambda state: {
        "n_averaged": torch.tensor(7),
        **{f"module.{key}": value for key, value in state.items()},
    },
    "CompressAI 1.1": old_style,
    "CompressAI 1.0": oldest_style,
    "without CDF buffers": lambda state: {
        k: v for k, v in state.items() if not k.endswith(("_cdf", "_offset", "_length"))
    },
    "without constants": lambda state: {
        k: v for k, v in state.items() if not k.endswith(("bound", "pedestal", "mask"))
    },
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("is_zip", [True, False])
def test_every_format_gives_the_same_network(name, is_zip, model, image, tmp_path):
    path = tmp_path / "checkpoint.pth.tar"
    torch.save(FORMATS[name](dict(model.state_dict())), path, _use_new_zipfile_serialization=is_zip)
    loaded = as_published(load_checkpoint(path, "minnen2018"))
    assert not loaded.training
    with torch.no_grad():
        torch.testing.assert_close(loaded(image), model(image), rtol=0, atol=0)


def test_lightnings_prefix_in_safetensors(model, image, tmp_path):
    state = {f"model.{key}": value.contiguous() for key, value in model.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "c.safetensors")
    loaded = as_published(load_checkpoint(tmp_path / "c.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(loaded(image), model(image), rtol=0, atol=0)


AVERAGED = {
    "two dictionaries": (
        lambda state, other: {"ema": other, "state_dict": state},
        "those at state_dict are taken, not those at ema",
    ),
    "two prefixes": (
        lambda state, other: {
            "state_dict": {
                **{f"ema_model.{key}": value for key, value in other.items()},
                **{f"model.{key}": value for key, value in state.items()},
            }
        },
        r"those at state_dict model\.\* are taken, not those at state_dict ema_model\.\*",
    ),
}


@pytest.mark.parametrize("name", AVERAGED)
def test_weights_are_taken_before_their_moving_averages_with_one_remark(name, model, tmp_path):
    state = dict(model.state_dict())
    make, words = AVERAGED[name]
    other = {key: value + 1 if key.endswith("bias") else value for key, value in state.items()}
    torch.save(make(state, other), tmp_path / "c.pth")
    with pytest.warns(InputWarning, match=words) as told:
        loaded = load_checkpoint(tmp_path / "c.pth", "minnen2018")
    assert len(told) == 1
    assert torch.equal(loaded.g_a[0].bias, model.g_a[0].bias)
    torch.save(make(state, state), tmp_path / "same.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_checkpoint(tmp_path / "same.pth", "minnen2018")


def test_what_is_wrong_behind_a_prefix_is_told_without_it(model, tmp_path):
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    del state["model.h_s.2.weight"]
    torch.save({"state_dict": state}, tmp_path / "c.pth")
    assert ": h_s.2.weight is missing;" in refusal(tmp_path / "c.pth", "minnen2018")
    assert "nearest is minnen2018" in refusal(tmp_path / "c.pth")
    assert "looks like minnen2018" in refusal(_saved(model, "model.", tmp_path / "d.pth"), "balle2018")
    state["model.h_s.2.weight"] = torch.full_like(model.h_s[2].weight, torch.nan)
    torch.save({"state_dict": state}, tmp_path / "c.pth")
    assert "not finite (h_s.2.weight)" in refusal(tmp_path / "c.pth")


def _saved(model, prefix, path):
    torch.save({f"{prefix}{key}": value for key, value in model.state_dict().items()}, path)
    return path


def test_a_network_without_cdf_tables_gets_them_and_can_code(model, image, tmp_path):
    torch.save(model.state_dict(), tmp_path / "c.pth")
    loaded = load_checkpoint(tmp_path / "c.pth")
    assert (
        loaded.entropy_bottleneck._quantized_cdf.numel()
        and loaded.gaussian_conditional.scale_table.numel() == 64
    )


def test_cdf_tables_of_the_file_are_kept(model, tmp_path):
    codec = JointAutoregressiveHierarchicalPriors(8, 12)
    codec.load_state_dict(model.state_dict())
    codec.update(scale_table=torch.tensor([0.5, 1.0, 2.0]))
    codec.entropy_bottleneck._quantized_cdf[0, 1] += 1
    torch.save(codec.state_dict(), tmp_path / "c.pth")
    loaded = load_checkpoint(tmp_path / "c.pth")
    assert torch.equal(loaded.entropy_bottleneck._quantized_cdf, codec.entropy_bottleneck._quantized_cdf)
    assert torch.equal(loaded.gaussian_conditional.scale_table, torch.tensor([0.5, 1.0, 2.0]))


def test_half_precision_file_keeps_the_bounds_that_half_precision_cannot_hold(model, image, tmp_path):
    torch.save(
        {key: v.half() if v.is_floating_point() else v for key, v in model.state_dict().items()},
        tmp_path / "c.pth",
    )
    loaded = load_checkpoint(tmp_path / "c.pth")
    assert {tensor.dtype for tensor in loaded.parameters()} == {torch.float32}
    assert float(loaded.entropy_bottleneck.likelihood_lower_bound.bound) == pytest.approx(1e-9)
    with torch.no_grad():
        assert all(bool((values > 0).all()) for values in loaded(image)["likelihoods"].values())


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("module.module.g_a.0.downsample.weight", "g_a.0.skip.weight"),
        ("entropy_bottleneck._biases.4", "entropy_bottleneck.biases.4"),
        ("entropy_bottleneck._factor2", "entropy_bottleneck.factors.2"),
        ("entropy_bottleneck.quantiles", "entropy_bottleneck.quantiles"),
        ("h_a.2._bias", "h_a.2._bias"),
    ],
)
def test_rename_key(key, expected):
    assert rename_key(key) == expected


@pytest.mark.parametrize("name", sorted({*list_models()}))
def test_saved_reference_networks_load_with_the_same_outputs(name, tmp_path):
    tiny = {"tic": {"N": 4, "M": 4, "depths": (2,) * 5, "num_heads": (2,) * 5, "causal_heads": 2}}
    tiny["lu2022"] = {"N": 8, "M": 16, "depths": (1,) * 6, "num_heads": (2,) * 6}
    tiny |= {"chen2021": {"M": 8, "N2": 6}, "qvrf-cheng2020": {"N": 8}}
    sizes = tiny.get(name, {"N": 8, "M": 12} if name[:3] != "che" else {"N": 8})
    torch.manual_seed(0)
    saved = create_model(name, **sizes).eval()
    saved.update()
    path = tmp_path / "m.safetensors"
    lmbda = get_architecture(name).lambda_for(3)
    save_checkpoint(
        saved, path, {"arch": name, "quality": 3, "lambda": lmbda, "metric": "mse"}, dtype=torch.float32
    )
    stated = get_architecture(name).complete(read_checkpoint(path).metadata["kwargs"])
    assert {key: stated[key] for key in sizes} == sizes
    loaded = load_checkpoint(path, quality=3)
    assert type(loaded) is type(saved)
    before, after = saved.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    assert identify(before) == name


def test_float16_rounds_layer_weights_only(model, tmp_path):
    save_checkpoint(model, tmp_path / "m.safetensors", {"arch": "minnen2018"})
    with safetensors.safe_open(tmp_path / "m.safetensors", "pt") as stream:
        types = {name: stream.get_tensor(name).dtype for name in stream.keys()}
    assert types["g_a.0.weight"] == types["context_prediction.weight"] == torch.float16
    assert (
        types["g_a.0.bias"] == types["g_a.1.gamma"] == types["entropy_bottleneck.matrices.1"] == torch.float32
    )
    assert "context_prediction.mask" not in types and "g_a.1.beta_reparam.pedestal" not in types
    loaded = load_checkpoint(tmp_path / "m.safetensors")
    assert torch.equal(loaded.g_a[0].weight, model.g_a[0].weight.half().float())


def test_weights_beyond_float16_stay_float32(model, tmp_path):
    large = ScaleHyperprior(4, 4)
    with torch.no_grad():
        large.g_a[0].weight[0, 0, 0, 0] = 1e6
    save_checkpoint(large, tmp_path / "m.safetensors", {"arch": "balle2018"})
    assert float(load_checkpoint(tmp_path / "m.safetensors").g_a[0].weight.max()) == 1e6


def test_saving_twice_gives_the_same_bytes(model, tmp_path):
    for name in ("a", "b"):
        save_checkpoint(model, tmp_path / f"{name}.safetensors", {"arch": "minnen2018", "quality": 1})
    assert sha256(tmp_path / "a.safetensors") == sha256(tmp_path / "b.safetensors")


def test_model_of_no_registered_architecture_is_saved_whole(tmp_path):
    save_checkpoint(nn.Linear(2, 3), tmp_path / "m.safetensors", {"note": "own"})
    content = read_checkpoint(tmp_path / "m.safetensors")
    assert set(content.state_dict) == {"weight", "bias"} and content.metadata == {"note": "own"}


def test_packed_cdf_tables_come_back_and_are_small():
    codec = ScaleHyperprior(4, 6)
    codec.update()
    state = codec.state_dict()
    packed = pack_cdfs(state)
    unpacked = unpack_cdfs(packed)
    assert unpacked.keys() == state.keys()
    assert all(torch.equal(unpacked[key], state[key]) for key in state)
    steps = packed["gaussian_conditional._cdf_steps"]
    assert steps.numel() * 2 * 10 < state["gaussian_conditional._quantized_cdf"].numel() * 4
    assert torch.equal(load_cdf(steps, state), state["gaussian_conditional._quantized_cdf"][-1])


def load_cdf(steps, state):
    """The last row, summed up by hand."""
    length = int(state["gaussian_conditional._cdf_length"][-1])
    row = [0]
    for step in steps.tolist()[-(length - 1) :]:
        row.append(row[-1] + step)
    return torch.tensor(row, dtype=torch.int32)


def test_cdf_table_that_does_not_start_at_zero_is_stored_as_it_is():
    state = {
        "e._quantized_cdf": torch.tensor([[3, 9]], dtype=torch.int32),
        "e._cdf_length": torch.tensor([2]),
    }
    assert pack_cdfs(state).keys() == state.keys()


def write(path, content: bytes):
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def good(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    torch.save(model.state_dict(), folder / "zip.pth.tar")
    torch.save(model.state_dict(), folder / "legacy.pth.tar", _use_new_zipfile_serialization=False)
    save_checkpoint(model, folder / "own.safetensors", {"arch": "minnen2018", "quality": 3, "lambda": 0.0067})
    np.savez(folder / "arrays.npz", **{key: value.numpy() for key, value in model.state_dict().items()})
    return folder


def test_missing_file_and_folder(tmp_path):
    assert "no checkpoint at" in refusal(tmp_path / "absent.pth")
    assert "directory" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        (b"hello", "damaged"),
        (bytes(range(256)) * 8, "damaged"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth.tar", ".safetensors"])
def test_files_that_are_no_checkpoints(content, expected, suffix, tmp_path):
    assert expected in refusal(write(tmp_path / f"bad{suffix}", content))


@pytest.mark.parametrize("name", ["zip.pth.tar", "legacy.pth.tar", "own.safetensors", "arrays.npz"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_truncated_files(name, share, good, tmp_path):
    content = (good / name).read_bytes()
    assert "damaged" in refusal(write(tmp_path / name, content[: int(len(content) * share)]))


@pytest.mark.parametrize("name", ["zip.pth.tar", "own.safetensors", "arrays.npz"])
def test_a_flipped_bit_is_noticed(name, good, tmp_path):
    content = bytearray((good / name).read_bytes())
    content[len(content) // 2] ^= 1
    assert "damaged" in refusal(write(tmp_path / name, bytes(content)))


def test_arrays_of_numpy_are_a_checkpoint(model, good, tmp_path):
    loaded = load_checkpoint(good / "arrays.npz", "minnen2018")
    assert all(torch.equal(value, loaded.get_parameter(key)) for key, value in model.named_parameters())
    np.savez_compressed(
        tmp_path / "a.npz", **{"module.a": np.float64([1.5]), "b": np.int64([2]), "c": "text"}
    )
    tensors = read_state_dict(tmp_path / "a.npz")
    assert {key: (value.dtype, value.item()) for key, value in tensors.items()} == {
        "a": (torch.float32, 1.5),
        "b": (torch.int64, 2),
    }
    np.savez(tmp_path / "objects.npz", a=np.array([{}], dtype=object))
    assert "needs code to be loaded" in refusal(tmp_path / "objects.npz")


@pytest.mark.parametrize("is_zip", [True, False])
def test_pickled_code_is_refused_and_not_run(is_zip, model, tmp_path):
    torch.save(model, tmp_path / "model.pth", _use_new_zipfile_serialization=is_zip)
    assert "torch.save(model.state_dict(), PATH)" in refusal(tmp_path / "model.pth")
    torch.save({"state_dict": model.state_dict(), "args": argparse.Namespace(a=1)}, tmp_path / "args.pth")
    assert "argparse.Namespace" in refusal(tmp_path / "args.pth")


def test_a_file_without_state_dict_is_refused(tmp_path):
    for content in ({"epoch": 3, "optimizer": {}}, [torch.zeros(3)], torch.zeros(3)):
        torch.save(content, tmp_path / "c.pth")
        assert "no state_dict" in refusal(tmp_path / "c.pth")


def test_weights_that_are_not_finite_are_refused(model, tmp_path):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state["g_a.0.bias"][2] = float("nan")
    torch.save(state, tmp_path / "c.pth")
    assert "g_a.0.bias" in refusal(tmp_path / "c.pth")


@pytest.mark.parametrize("arch", ["balle2018", "minnen2018-mean", "cheng2020", "tic", "lu2022"])
def test_another_architecture_is_named(arch, good):
    message = refusal(good / "zip.pth.tar", arch)
    assert "looks like minnen2018" in message and "`arch` minnen2018" in message
    assert "`arch` minnen2018" in refusal(good / "own.safetensors", arch)


def test_architectures_with_equal_names_are_told_apart_by_shapes(tmp_path):
    assert identify(ScaleHyperprior(8, 12).state_dict()) == "balle2018"
    assert identify(MeanScaleHyperprior(8, 12).state_dict()) == "minnen2018-mean"


def test_unknown_and_incomplete_networks(model, tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    assert "no known architecture" in refusal(tmp_path / "linear.pth")
    state = dict(model.state_dict())
    del state["h_s.2.weight"]
    state["extra.weight"] = torch.zeros(2)
    torch.save(state, tmp_path / "part.pth")
    message = refusal(tmp_path / "part.pth", "minnen2018")
    assert "h_s.2.weight is missing, and 1 more" in message
    assert "nearest is minnen2018" in refusal(tmp_path / "part.pth")


def test_unknown_architecture_lists_the_names(good):
    with pytest.raises(InputError, match="minnen2018"):
        load_checkpoint(good / "zip.pth.tar", "minen2018")


def test_another_quality_by_lambda(model, good, tmp_path):
    assert "`quality` 3" in refusal(good / "own.safetensors", "minnen2018", 4)
    torch.save({"state_dict": model.state_dict(), "lmbda": 0.013}, tmp_path / "c.pt")
    message = refusal(tmp_path / "c.pt", "minnen2018", 3)
    assert "0.013" in message and "0.0067" in message and "`quality` 4" in message
    load_checkpoint(tmp_path / "c.pt", "minnen2018", 4)
    load_checkpoint(tmp_path / "c.pt", "minnen2018", 3, lmbda=0.013)
    torch.save({"state_dict": model.state_dict(), "lmbda": 0.02}, tmp_path / "c.pt")
    assert "`lmbda` 0.02" in refusal(tmp_path / "c.pt", "minnen2018", 3)


def test_another_quality_by_metadata(model, tmp_path):
    save_checkpoint(model, tmp_path / "c.safetensors", {"arch": "minnen2018", "quality": 2})
    assert "`quality` 2" in refusal(tmp_path / "c.safetensors", "minnen2018", 3)


def test_another_quality_by_widths(tmp_path, monkeypatch):
    list_models()
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    register_model(
        "two-sizes",
        ScaleHyperprior,
        official={1: {"N": 4, "M": 6}, 2: {"N": 4, "M": 6}, 3: {"N": 6, "M": 9}},
        configurations={"reference": {"N": 3, "M": 3}},
    )
    torch.save(ScaleHyperprior(6, 9).state_dict(), tmp_path / "wide.pth")
    message = refusal(tmp_path / "wide.pth", "two-sizes", 1)
    assert "N=6, M=9" in message and "`quality` 3" in message
    load_checkpoint(tmp_path / "wide.pth", "two-sizes", 3)
    torch.save(ScaleHyperprior(3, 3).state_dict(), tmp_path / "small.pth")
    load_checkpoint(tmp_path / "small.pth", "two-sizes", 1)
    torch.save(ScaleHyperprior(5, 5).state_dict(), tmp_path / "other.pth")
    refusal(tmp_path / "other.pth", "two-sizes", 1)


def test_metadata_sizes_decide_where_shapes_do_not(tmp_path, monkeypatch):
    list_models()
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    @register_model("powers", official={1: {"power": 1}}, configurations={"reference": {"power": 2}})
    class Powers(nn.Module):
        def __init__(self, power: int):
            super().__init__()
            self.power, self.weight = power, nn.Parameter(torch.ones(2))

    save_checkpoint(Powers(7), tmp_path / "c.safetensors", {"arch": "powers", "kwargs": {"power": 7}})
    assert load_checkpoint(tmp_path / "c.safetensors").power == 7


def test_embedded_checkpoints_are_listed_when_one_is_absent(tmp_path, monkeypatch, model):
    monkeypatch.setattr(embedded, "ZOO", tmp_path)
    with pytest.raises(InputError, match="there are: none"):
        embedded_checkpoint("minnen2018", 1)
    save_checkpoint(
        model, tmp_path / "minnen2018-q4.safetensors", {"arch": "minnen2018", "quality": 4, "lambda": 0.013}
    )
    with pytest.raises(InputError, match="there are: minnen2018 4;"):
        embedded_checkpoint("minnen2018-mean", 4)
    assert isinstance(load_model("minnen2018", 4), JointAutoregressiveHierarchicalPriors)
    assert isinstance(load_model("minnen2018", 4, metric="ms-ssim"), JointAutoregressiveHierarchicalPriors)


def test_load_model_takes_a_file_and_refuses_contradictions(good):
    assert load_model("minnen2018", 3, checkpoint=good / "own.safetensors").M == 12
    with pytest.raises(InputError, match="exclude each other"):
        load_model("minnen2018", 3, checkpoint=good / "own.safetensors", pretrained=True)
    with pytest.raises(InputError, match="metric"):
        load_model("minnen2018", 3, metric="vmaf")
    with pytest.raises(InputError, match="from 1 to 8"):
        load_model("minnen2018", 9)


def test_unwritable_target_leaves_nothing(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        save_checkpoint(model, tmp_path / "file" / "c.safetensors", {"arch": "minnen2018"})


def test_header_states_the_metadata_as_json(good):
    with safetensors.safe_open(good / "own.safetensors", "pt") as stream:
        stated = json.loads(stream.metadata()["licq"])
    assert stated["arch"] == "minnen2018" and stated["lambda"] == 0.0067 and len(stated["sha256"]) == 64
    assert set(read_state_dict(good / "own.safetensors")) < set(
        JointAutoregressiveHierarchicalPriors(8, 12).state_dict()
    )


def test_foreign_safetensors_without_metadata_load(model, image, tmp_path):
    safetensors.torch.save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "f.safetensors"
    )
    with torch.no_grad():
        torch.testing.assert_close(
            as_published(load_checkpoint(tmp_path / "f.safetensors"))(image), model(image), rtol=0, atol=0
        )


def test_a_shared_parameter_is_not_left_at_random():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    network[1].weight = network[0].weight
    weights = {name: tensor for name, tensor in network.state_dict().items() if name != "1.weight"}
    with pytest.raises(InputError, match="1.weight"):
        fill_network(network, weights, "a file")
