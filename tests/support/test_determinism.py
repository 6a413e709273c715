"""What a caller has set for all of PyTorch changes no number of licq."""

import contextlib

import pytest
import torch

import licq
from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.reconstruction.api import prepare_calibration, quantize
from licq.reconstruction.config import PtqConfig
from licq.reconstruction.objective import Objective
from licq.reconstruction.preset_files import list_presets
from licq.support.determinism import plain_torch
from tests.tiny_codecs import images, tiny_codec

PIXELS = (images(1)[0] * 255).round().to(torch.uint8)
OTHER = images(1, seed=3)
FEW = {"joint_iters": 2, "iters": 2, "measured": 2, "observed": 2, "search_evals": 2}


@contextlib.contextmanager
def default_dtype():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def gradients_off():
    torch.set_grad_enabled(False)
    try:
        yield
    finally:
        torch.set_grad_enabled(True)


@contextlib.contextmanager
def short_products():
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@contextlib.contextmanager
def flushed():
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


AROUND = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "set_grad_enabled": gradients_off,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default dtype": default_dtype,
    "default device": lambda: torch.device("meta"),
    "matmul precision": short_products,
    "denormals": flushed,
}


def settings() -> tuple:
    return (
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.empty(0).device,
        torch.get_float32_matmul_precision(),
        bool(torch.full((), 2.0**-1030, dtype=torch.float64, device="cpu") * 0.5 == 0),
    )


def few(preset: str | None = None) -> PtqConfig:
    config = PtqConfig.from_preset(preset) if preset else PtqConfig.from_preset()
    knobs = {key: value for key, value in FEW.items() if getattr(config.reconstruction, key)}
    return PtqConfig.from_preset(preset, **knobs) if preset else PtqConfig.from_preset(**knobs)


def quantized(preset: str | None = None) -> QuantModel:
    return quantize(tiny_codec("balle2018"), images(2), few(preset), lmbda=0.01, progress=False)


def assert_equal(one: QuantModel, other: QuantModel) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert one.history["j_end"] == other.history["j_end"]


@pytest.mark.parametrize("name", AROUND)
def test_settings_are_the_defaults_inside_and_as_they_were_afterwards(name):
    plain, learning = (False, False), (False, True)
    usual = settings()
    with AROUND[name]():
        before = settings()
        assert before != usual
        with plain_torch():
            assert settings()[2:] == usual[2:] and settings()[:2] == (False, before[1])
        with plain_torch(learning=True):
            assert settings() == usual and settings()[:2] == learning != plain
        assert settings() == before
    assert settings() == usual


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The model, and what its file gives: an image's file and pixels, a forward, an evaluation."""
    qmodel = quantized()
    path = tmp_path_factory.mktemp("plain") / "m.safetensors"
    qmodel.save(path)
    return qmodel, uses(QuantModel.load(path))


def uses(loaded: QuantModel) -> tuple:
    codec = licq.Codec(loaded)
    data = codec.encode(PIXELS)
    x_hat = loaded(OTHER)["x_hat"]
    report = licq.evaluate(loaded, OTHER, progress=False)
    behind_the_name = data[13:]
    return behind_the_name, codec.decode(data).tolist(), x_hat.tolist(), report.mean(), report.bpp_source


@pytest.mark.parametrize("name", AROUND)
def test_a_setting_around_the_calls_changes_nothing(name, expected, tmp_path):
    qmodel, results = expected
    model, crops = tiny_codec("balle2018"), images(2)
    in_float = licq.evaluate(model, OTHER, progress=False).mean()
    with AROUND[name]():
        assert licq.evaluate(model, OTHER, progress=False).mean() == in_float
        made = quantize(model, crops, few(), lmbda=0.01, progress=False)
        made.save(tmp_path / "m.safetensors")
        assert uses(QuantModel.load(tmp_path / "m.safetensors")) == results
    assert_equal(made, qmodel)


@pytest.mark.parametrize(
    "preset",
    [
        pytest.param(name, marks=() if name in ("rdo-ptq", "nearest") else pytest.mark.slow)
        for name in list_presets()
    ],
)
def test_every_preset_learns_without_the_callers_gradients(preset):
    expected = quantized(preset)
    with torch.no_grad():
        assert_equal(quantized(preset), expected)


def test_networks_and_images_of_inference_mode_are_learned_from():
    expected = quantized()
    with torch.inference_mode():
        model, crops = tiny_codec("balle2018"), images(2)
        assert crops.is_inference() and next(model.parameters()).is_inference()
        assert_equal(quantize(model, crops, few(), lmbda=0.01, progress=False), expected)
        calibration = prepare_calibration(model, crops, few(), Objective(0.01), progress=False)
        direct = QuantModel(model, QuantConfig())
        direct.observe([crops])
    for qmodel in (calibration.qmodel, direct):
        assert not any(tensor.is_inference() for tensor in qmodel.state_dict().values())
    # the network of an earlier mode, quantized outside of it
    assert_equal(quantize(model, crops, few(), lmbda=0.01, progress=False), expected)
