"""A variable-rate codec is quantized once and serves all its rates: from Python and on the command line."""

import json

import pytest
import torch

import main_eval
from licq.data.calibration import draw_levels
from licq.models.checkpoints import save_checkpoint
from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.reconstruction.api import quantize
from licq.reconstruction.config import PtqConfig
from licq.reconstruction.objective import Objective
from licq.reconstruction.stress import stressed
from licq.runs import layer_search
from licq.support.cli import main_guard
from licq.support.errors import InputError
from tests.main_jobs import one_line, run
from tests.tiny_codecs import images, tiny_codec

ARCH = "qvrf-balle2018"


def rated(model, x, levels):
    levels = torch.tensor(levels)
    with torch.no_grad():
        return model.with_planes(x, levels, 0.001 * 2.0 ** levels.float())


def outcome(codec, x):
    with torch.no_grad():
        out = codec(x)
    return [out["x_hat"], *out["likelihoods"].values()]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("qvrf-balle2018", marks=pytest.mark.slow),
        "qvrf-minnen2018",
        pytest.param("qvrf-cheng2020", marks=pytest.mark.slow),
        pytest.param("balle2018-vbr", marks=pytest.mark.slow),
        "minnen2018-mean-vbr",
        "minnen2018-vbr",
    ],
)
def test_every_rate_of_one_quantized_codec_is_near_the_float_codecs(name):
    model = tiny_codec(name)
    x = images(8)
    # 16 bits everywhere, so that what is left is a symbol at a tie here and there, and what its context makes
    # of it
    codec = QuantModel(model, QuantConfig(w_bits=16, a_bits=16, latent_bits=16))
    for level in (*range(1, 9), 4.5):
        codec.model.set_level(level)
        codec.observe([x[:2]])
    codec.freeze()
    rates = []
    for level in (1, 4.5, 8):
        for network in (model, codec.model):
            network.set_level(level)
        real, whole = outcome(model, x[:2]), outcome(codec, x[:2])
        bits = [sum(float(-part.log2().sum()) for part in out[1:]) for out in (real, whole)]
        assert bits[1] == pytest.approx(bits[0], rel=0.01)
        assert float((real[0].clamp(0, 1) - whole[0]).square().mean()) < 0.003 * float(real[0].var())
        rates.append(bits[1])
    assert rates == sorted(rates) and rates[2] > 1.2 * rates[0]
    assert not codec.coverage()["kept_in_float"]


@pytest.mark.parametrize("name", ["qvrf-minnen2018", "minnen2018-mean-vbr"])
def test_images_with_planes_are_coded_at_their_own_rates(name, tmp_path):
    model = tiny_codec(name)
    x = images(4)
    codec = QuantModel(model, QuantConfig())
    codec.observe(rated(model, x, [1, 3, 5, 8]).split(2))
    codec.freeze()
    codec.model.set_level(2)
    together = outcome(codec, rated(model, x, [2, 7, 4, 1]))
    assert codec.model.rate.item() == pytest.approx(model.gain(2))  # as it was
    for index, level in enumerate([2, 7, 4, 1]):
        codec.model.set_level(level)
        x_hat, y, z = outcome(codec, x[index : index + 1])
        assert torch.equal(together[0][index : index + 1], x_hat) and torch.equal(
            together[1][index : index + 1], y
        )
        # a float estimate of all images at once
        torch.testing.assert_close(together[2][index : index + 1], z)
    codec.save(tmp_path / "model.safetensors")
    loaded = QuantModel.load(tmp_path / "model.safetensors")
    for network in (codec, loaded):
        network.model.set_level(5.3)
    assert all(torch.equal(a, b) for a, b in zip(outcome(codec, x), outcome(loaded, x)))


def test_j_has_the_lambda_of_each_image_and_harder_crops_keep_their_planes():
    model = tiny_codec(ARCH)
    x = rated(model, images(2), [1, 6])
    out = {"x_hat": x[:, :3] * 0.9, "likelihoods": {"y": torch.full((2, 1, 4, 4), 0.5)}}
    together = Objective(1.0)(out, x)
    for index, lmbda in enumerate((0.002, 0.064)):
        alone = {
            "x_hat": out["x_hat"][index : index + 1],
            "likelihoods": {"y": out["likelihoods"]["y"][index : index + 1]},
        }
        assert float(together[index]) == pytest.approx(
            float(Objective(lmbda)(alone, x[index : index + 1, :3])), rel=1e-6
        )
    harder = stressed(x)
    assert torch.equal(harder[:, :3], stressed(x[:, :3])) and torch.equal(
        harder[:, 3:], x[:, 3:].repeat(4, 1, 1, 1)
    )


def test_calibration_learns_on_crops_of_all_rates():
    model = tiny_codec(ARCH)
    crops = rated(model, images(6), [1, 8, 3, 6, 4, 7])
    config = PtqConfig.from_preset("licq", joint_iters=4, measured=4, observed=6)
    codec = quantize(model, crops, config, lmbda=0.01, progress=False)
    assert codec.frozen and codec.history["j_end"] < 1.2 * codec.history["j_float"]
    with pytest.raises(InputError, match=r"\(n, 5, H, W\) is needed"):
        quantize(model, images(2), config, lmbda=0.01, progress=False)


def test_levels_are_drawn_in_rounds():
    drawn = draw_levels(20, [1, 3, 5], seed=2)
    assert drawn == draw_levels(20, [1, 3, 5], seed=2) != draw_levels(20, [1, 3, 5], seed=3)
    assert all(sorted(drawn[start : start + 3]) == [1, 3, 5] for start in range(0, 18, 3))


@pytest.fixture
def variable_job(job, tmp_path):
    save_checkpoint(tiny_codec(ARCH), tmp_path / "variable.safetensors", {"arch": ARCH})
    return job | {"--checkpoint": tmp_path / "variable.safetensors"}


def evaluate(*words) -> int:
    return main_guard(lambda: main_eval.main(["--quiet", "--device", "cpu", *map(str, words)]))


def read(folder) -> dict:
    return json.loads((folder / "report.json").read_text())


def test_one_model_for_all_qualities_and_rates_between_them(variable_job, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(variable_job, quality="2,5,8") == 0
    report = read(out)
    assert (out / "model.safetensors").is_file() and not list(out.glob("q*/model.safetensors"))
    bits = [point["quant"]["bpp"] for point in report["points"]]
    assert (
        [point["quality"] for point in report["points"]] == [2, 5, 8]
        and bits == sorted(bits)
        and bits[0] < bits[2]
    )
    # an untrained codec's curve may fall with the rate, or lie beside the other, and has no BD-rate then
    curves = [[point[codec]["psnr"] for point in report["points"]] for codec in ("fp32", "quant")]
    rise = all(curve == sorted(curve) for curve in curves)
    meet = max(map(min, curves)) < min(map(max, curves))
    assert (report["bd_rate_psnr"] is not None) == (rise and meet)
    assert evaluate("--model", out, "--data", tmp_path / "eval") == 0
    again = read(out / "eval_eval")
    for point, other in zip(again["points"], report["points"], strict=True):
        assert (point["quant"], point["fp32"], point["lambda"]) == (
            other["quant"],
            other["fp32"],
            other["lambda"],
        )
    gain = tiny_codec(ARCH).gain(6.5)
    assert (
        evaluate(
            "--model",
            out,
            "--data",
            tmp_path / "eval",
            "--quality",
            "5,8",
            "--rate_factor",
            gain,
            "--out",
            tmp_path / "e",
        )
        == 0
    )
    points = read(tmp_path / "e")["points"]
    assert [point["quality"] for point in points] == [5, pytest.approx(6.5), 8]
    assert points[0]["lambda"] < points[1]["lambda"] < points[2]["lambda"]
    assert points[0]["quant"]["bpp"] < points[1]["quant"]["bpp"] < points[2]["quant"]["bpp"]
    assert points[0]["fp32"]["bpp"] < points[1]["fp32"]["bpp"] < points[2]["fp32"]["bpp"]


def test_killed_between_two_rates_the_run_goes_on_with_the_same_model(variable_job, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert run(variable_job, quality="2,8") == 0
    whole, model = read(out), (out / "model.safetensors").read_bytes()
    (out / "q8" / "result.json").unlink()
    (out / "report.json").unlink()
    assert run(variable_job, quality="2,8", resume=True) == 0
    assert (out / "model.safetensors").read_bytes() == model
    assert [point["quant"] for point in read(out)["points"]] == [point["quant"] for point in whole["points"]]


def test_qualities_and_factors_that_a_codec_lacks_are_refused(variable_job, tmp_path, capsys, zoo):
    assert run(variable_job, quality="9") == 2
    one_line(capsys, "has 8 rates; choose --quality from 1 to 8")
    assert run(variable_job, quality="2") == 0
    capsys.readouterr()
    assert evaluate("--model", tmp_path / "out", "--data", tmp_path / "eval", "--quality", 9) == 2
    one_line(capsys, "has the qualities 1 to 8, not 9")
    for factor in ("0", "x"):
        assert (
            evaluate("--model", tmp_path / "out", "--data", tmp_path / "eval", "--rate_factor", factor) == 2
        )
        one_line(capsys, "is not a positive number; give one such as 1.5")
    words = (
        "--model",
        "float",
        "--checkpoint",
        zoo / "tiny-q{quality}.safetensors",
        "--data",
        tmp_path / "eval",
    )
    assert evaluate(*words, "--rate_factor", 2) == 2
    one_line(capsys, "--rate_factor is for quantized variable-rate codecs")


@pytest.mark.slow
def test_bits_are_searched_once_for_all_rates(variable_job, tmp_path, monkeypatch):
    original, searched = layer_search.measure_layers, []
    monkeypatch.setattr(
        layer_search,
        "measure_layers",
        lambda *args, **kwargs: searched.append(1) or original(*args, **kwargs),
    )
    assert (
        run(
            variable_job,
            quality="2,8",
            budget_size=6,
            bits_choices="4,8",
            **{"no-baseline": True},
        )
        == 0
    )
    first, second = read(tmp_path / "out")["points"]
    assert first["bits"] == second["bits"] and len(searched) == 1
