"""The example of a user's own codec with a hyperprior: steps absorbed, tables of its own coder, one file."""

import importlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from licq.codec.api import Codec
from licq.data.images import load_pixels
from licq.models import registry
from licq.models.checkpoints import load_model
from licq.models.layers import TabulatedBottleneck
from licq.models.registry import create_model
from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.runs import coding
from licq.runs.float_models import find_float_models
from licq.support.errors import InputError
from tests.tiny_codecs import images

FILE = str(Path(__file__).parents[2] / "examples" / "tic_n32.py")
STEPS = {1: 4.0, 2: 2.5, 3: 1.6, 4: 1.0}
SHARED = Path(__file__).parents[2].resolve().parent / "shared"


def published_arrays(N: int = 6, M: int = 8) -> dict[str, np.ndarray]:
    """Random weights under the names of the published file; medians off zero, rows of several lengths."""
    torch.manual_seed(0)
    draw = np.random.default_rng(0)
    network = create_model(FILE, N=N, M=M)
    arrays = {}
    for name, parameter in network.named_parameters():
        value = parameter.detach().numpy()
        if name.endswith((".beta", ".gamma")):
            value = 0.1 * np.eye(N, dtype=np.float32) if value.ndim > 1 else np.ones(N, dtype=np.float32)
            name += "_effective"
        elif value.ndim > 1:
            value = value * (25.0 if name == "g_a.6.weight" else 2.0)
        arrays[name] = value
    row = [0, 1, 9, 4000, 30000, 60000, 65500, 65535, 65536]
    arrays["cdf.FIXED_EB_CDF"] = np.array([row] * (N - 1) + [[0, 1, 65534, 65535, 65536, 0, 0, 0, 0]])
    arrays["cdf.FIXED_EB_LENGTH"] = np.array([9] * (N - 1) + [5])
    arrays["cdf.FIXED_EB_OFFSET"] = np.array([-3] * (N - 1) + [-1])
    arrays["cdf.FIXED_EB_MEDIANS"] = draw.uniform(-1, 1, (N, 1, 1))
    return arrays


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    file = tmp_path_factory.mktemp("tic_n32") / "weights.npz"
    np.savez(file, **published_arrays())
    return file


@pytest.mark.parametrize("quality", STEPS)
def test_step_is_absorbed_into_the_layers_around_y(file, quality):
    step, x = STEPS[quality], images(1)
    network, published = load_model(FILE, quality, file), load_model(FILE, 4, file)
    with torch.no_grad():
        y = published.g_a(x)
        z = published.h_a(y.abs())
        z_hat, of_z = published.entropy_bottleneck(z)
        scales, means = published.h_s(z_hat).chunk(2, 1)
        symbols = ((y - means) / step).round()
        out = network(x)
        _, of_y = network.gaussian_conditional(symbols, scales / step)
    assert symbols.unique().numel() > 3 and z_hat.std() > 0
    torch.testing.assert_close(out["x_hat"], published.g_s(symbols * step + means), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(out["likelihoods"]["z"], of_z)
    torch.testing.assert_close(out["likelihoods"]["y"], of_y, rtol=1e-2, atol=1e-4)


def test_normalization_is_that_of_the_effective_values(file):
    arrays = published_arrays()
    x = torch.randn(1, 6, 4, 4, generator=torch.Generator().manual_seed(3))
    norm = torch.einsum("oc,bchw->bohw", torch.from_numpy(arrays["g_s.3.gamma_effective"]), x.square())
    expected = x * (norm + torch.from_numpy(arrays["g_s.3.beta_effective"])[:, None, None]).sqrt()
    with torch.no_grad():
        torch.testing.assert_close(load_model(FILE, 1, file).g_s[3](x), expected)


def test_quantized_it_has_files_that_survive_the_model_s_file(file, tmp_path):
    network = load_model(FILE, 4, file)
    model = QuantModel(network, QuantConfig())
    model.observe([images(2)])
    model.freeze()
    coverage = model.coverage()
    assert (coverage["kept_in_float"], coverage["left_alone"]) == ([], {})
    assert coverage["quantized"] == {
        "conv": 14,
        "entropy_bottleneck": 1,
        "gaussian_conditional": 1,
        "gdn": 6,
    }
    pixels = (images(1, 64, 128, seed=5)[0] * 255).round().to(torch.uint8)
    data = Codec(model).encode(pixels)
    model.save(tmp_path / "m.safetensors")
    for fresh in (type(network)(N=6, M=8), None):  # a network of the user's, and one by its name
        loaded = QuantModel.load(tmp_path / "m.safetensors", model=fresh)
        bottleneck = loaded.nodes["entropy_bottleneck"].module
        assert isinstance(bottleneck, TabulatedBottleneck)
        assert torch.equal(bottleneck._cdf_length, network.entropy_bottleneck._cdf_length)
        decoded = Codec(loaded).decode(data)
        with torch.no_grad():
            x_hat = loaded(pixels[None] / 255)["x_hat"][0]
        assert torch.equal(decoded, (x_hat * 255).round().to(torch.uint8))


def test_encode_and_decode_take_the_codec_s_file(file, tmp_path, make_image, monkeypatch):
    model = QuantModel(load_model(FILE, 4, file), QuantConfig())
    model.observe([images(2)])
    model.freeze()
    model.save(tmp_path / "m.safetensors")
    photo = make_image("photo.png", 64, 128)
    with torch.no_grad():
        x_hat = model(torch.from_numpy(load_pixels(photo)).permute(2, 0, 1)[None] / 255)["x_hat"][0]
    monkeypatch.setattr(registry, "_PLUGINS", {})  # as in a process that never named the file
    monkeypatch.delitem(registry._REGISTRY, "tic_n32")
    coding._loaded.cache_clear()
    common = ["--model", str(tmp_path / "m.safetensors"), "--quiet", "--threads", "1"]
    encode = coding.build_encode_parser().parse_args([str(photo), *common])
    with pytest.raises(InputError, match="needs the architecture 'tic_n32'"):
        coding.encode(encode)
    encode.arch = FILE
    assert coding.encode(encode) == 0
    decode = [str(photo.with_suffix(".licq")), "-o", str(tmp_path / "out.png"), "--arch", FILE, *common]
    assert coding.decode(coding.build_decode_parser().parse_args(decode)) == 0
    decoded = torch.from_numpy(load_pixels(tmp_path / "out.png")).permute(2, 0, 1)
    assert torch.equal(decoded, (x_hat * 255).round().to(torch.uint8))


def test_command_line_finds_all_four_rates_behind_one_file(file):
    models = find_float_models(FILE, None, str(file))
    assert [(m.arch, m.quality, m.lmbda) for m in models] == [
        ("tic_n32", 1, 0.00088),
        ("tic_n32", 2, 0.0021),
        ("tic_n32", 3, 0.0051),
        ("tic_n32", 4, 0.014),
    ]
    assert len({m.sha256 for m in models}) == 4


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda arrays: arrays.pop("g_a.0.weight"), "has no 'g_a.0.weight'"),
        (lambda arrays: arrays.pop("h_s.2.0.bias"), "h_s.2.0.bias"),
        (lambda arrays: arrays.update({"h_a.2.weight": arrays["h_a.2.weight"][:, :3]}), "h_a.2.weight"),
        (lambda arrays: arrays["cdf.FIXED_EB_CDF"].__setitem__((0, 3), 2), "do not rise"),
        (lambda arrays: arrays.update({"cdf.FIXED_EB_LENGTH": np.array([9])}), "other sizes"),
    ],
)
def test_other_weights_are_one_line(change, expected, tmp_path):
    arrays = published_arrays()
    change(arrays)
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(InputError, match=expected) as caught:
        load_model(FILE, 4, tmp_path / "other.npz")
    assert "\n" not in str(caught.value) and "other.npz" in str(caught.value)


def test_unknown_qualities_are_one_line(file):
    with pytest.raises(InputError, match="quality 5"):
        load_model(FILE, 5, file)


def test_lambdas_are_slopes_of_the_curve(file, tmp_path, make_image, monkeypatch, capsys):
    monkeypatch.syspath_prepend(os.fspath(Path(FILE).parent))
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    module = importlib.import_module("tic_n32")
    monkeypatch.setattr(module, "STEPS", {1: 4.0})
    make_image(width=64, height=64, folder=tmp_path / "photos")
    module.main(os.fspath(file), os.fspath(tmp_path / "photos"))
    quality, step, bpp, psnr, slope = capsys.readouterr().out.split()[-5:]
    del sys.modules["tic_n32"]
    assert (
        (quality, step) == ("1", "4.0") and float(bpp) > 0 and float(psnr) > 0 and np.isfinite(float(slope))
    )


WEIGHTS = SHARED / "checkpoints" / "tic_n32" / "tic_n32_fp32.npz"


@pytest.mark.skipif(not WEIGHTS.is_file(), reason="the published weights are not at hand")
def test_published_weights_have_the_rate_of_their_own_tables():
    """One image, against a table look-up in NumPy and figures of an evaluation in float64 without licq."""
    network = load_model(FILE, 4, WEIGHTS)
    x = torch.from_numpy(load_pixels(SHARED / "kodak" / "kodim02.png")).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        out = network(x)
        z = network.h_a(network.g_a(x).abs())[0].flatten(1).numpy()
    pixels = x[0, 0].numel()
    bits = {name: -float(p.double().log2().sum()) / pixels for name, p in out["likelihoods"].items()}
    stored = np.load(WEIGHTS)
    rows = (stored[f"cdf.FIXED_EB_{name}"] for name in ("CDF", "OFFSET", "MEDIANS"))
    own = 0.0
    for row, offset, median, values in zip(*rows, z):
        bins = np.rint(values - median.item()).astype(int) - offset
        own -= np.log2((row[bins + 1] - row[bins]) / 65536).sum() / pixels
    assert bits["z"] == pytest.approx(own, abs=1e-6)
    assert (bits["y"], bits["z"]) == pytest.approx((0.33485, 0.010025), abs=5e-5)
    mse = ((out["x_hat"].clamp(0, 1) * 255).round() - x * 255).square().mean()
    assert float(10 * torch.log10(255**2 / mse)) == pytest.approx(31.134, abs=0.002)
