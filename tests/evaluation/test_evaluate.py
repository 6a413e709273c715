"""The rate of a codec that has files is that of its files."""

import pytest
import torch
from PIL import Image

import licq
from licq.evaluation import evaluate as evaluation
from licq.evaluation.evaluate import Report, evaluate
from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.support.errors import InputError
from tests.tiny_codecs import images, tiny_codec


def quantized(name: str = "balle2018") -> QuantModel:
    codec = QuantModel(tiny_codec(name), QuantConfig())
    codec.observe(images(2).split(2))
    return codec


def test_files_are_written_where_the_codec_has_them_and_the_report_says_so():
    codec = quantized()
    x = images(2)
    assert evaluate(codec, x, progress=False).bpp_source == "estimate"  # not frozen
    codec.freeze()
    report = licq.evaluate(codec, x, progress=False)
    assert report.bpp_source == "bitstream"
    for image in report.per_image:
        size = image.bpp * image.width * image.height
        assert size == pytest.approx(8 * round(size / 8)) and image.bpp != image.bpp_estimated
    estimate = evaluate(codec, x, real=False, progress=False)
    assert estimate.bpp_source == "estimate"
    for image, simulated in zip(report.per_image, estimate.per_image):
        assert image.bpp_estimated == pytest.approx(simulated.bpp, rel=1e-6)
        assert (image.mse, image.ms_ssim) == (simulated.mse, simulated.ms_ssim)
    assert evaluate(tiny_codec("balle2018"), x, progress=False).no_files is None  # a float codec


def test_the_forward_runs_only_to_check_the_model(monkeypatch):
    codec = quantized()
    codec.freeze()
    x = images(3)
    evaluate(codec, x[:1], progress=False)
    monkeypatch.setattr(QuantModel, "forward", lambda *_: pytest.fail("the simulation runs"))
    assert evaluate(codec, x, progress=False).bpp_source == "bitstream"


def test_a_report_says_why_there_are_no_files():
    codec = quantized()
    assert "not frozen" in str(evaluate(codec, images(1), progress=False).no_files)
    half = QuantModel(tiny_codec("balle2018"), QuantConfig(w_bits=32))
    half.observe([images(1)])
    half.freeze()
    report = evaluate(half, images(1), progress=False)
    assert report.bpp_source == "estimate" and "32-bit" in str(report.no_files)
    assert Report.from_dict(report.to_dict()) == report == Report.joined([report])
    codec.freeze()
    device = torch.device("cuda")
    assert evaluation._codec_of(codec, 64, device)[1] == (
        "files are written on the CPU, and this evaluation ran on cuda"
    )


def test_a_codec_without_files_at_one_padding_has_them_at_another():
    codec = quantized()
    codec.freeze()
    small = evaluate(codec, images(1), pad=16, progress=False)  # z has no position for each of y's
    assert small.bpp_source == "estimate" and "total stride" in str(small.no_files)
    assert evaluate(codec, images(1), pad=64, progress=False).bpp_source == "bitstream"


def test_a_codec_that_estimates_other_symbols_than_it_codes_keeps_its_estimate():
    network = tiny_codec("minnen2018")
    network.gaussian_conditional.of_residual = True  # as CompressAI estimates
    codec = QuantModel(network, QuantConfig())
    codec.observe([images(1)])
    codec.freeze()
    report = evaluate(codec, images(1), progress=False)
    estimate = evaluate(codec, images(1), real=False, progress=False)
    assert report.bpp_source == "bitstream"
    assert report.per_image[0].bpp_estimated == estimate.per_image[0].bpp


def test_files_that_are_asked_for_and_cannot_be_written_are_refused():
    with pytest.raises(InputError, match="no files"):
        evaluate(tiny_codec("balle2018"), images(1), real=True, progress=False)
    assert evaluate(tiny_codec("balle2018"), images(1), progress=False).bpp_source == "estimate"


def test_the_model_is_in_evaluation_mode_only_for_the_duration():
    model = tiny_codec("balle2018").train()
    report = evaluate(model, images(1), progress=False)
    assert model.training and torch.isfinite(torch.tensor(report.mean()["psnr"]))


def test_images_in_memory_are_checked_and_have_many_forms():
    model, x = tiny_codec("balle2018"), images(1)
    pixels = (x * 255).round().to(torch.uint8)
    array = pixels[0].permute(1, 2, 0).numpy()
    expected = evaluate(model, x, progress=False).mean()
    for form in (
        x[0],
        pixels,
        [x.numpy()[0]],
        array,
        [array],
        Image.fromarray(array),
        [Image.fromarray(array)],
    ):
        assert evaluate(model, form, progress=False).mean() == expected
    for wrong, words in ((255 * x, "images / 255"), (2 * x - 1, r"\+ 1\) / 2"), (x / 0, "not finite")):
        with pytest.raises(InputError, match=f"^image 0 .*{words}"):
            evaluate(model, wrong, progress=False)
