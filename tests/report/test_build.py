import json
import math
import os

import pytest
import torch
from PIL import Image
from torch import nn

from licq.data.datasets import open_dataset
from licq.data.images import load_image
from licq.evaluation.bd_rate import bd_rate
from licq.evaluation.evaluate import ImageResult, Report, delta_j_percent, evaluate
from licq.evaluation.metrics import psnr
from licq.report.build import build_report, make_point, write_report
from licq.report.text import render_markdown
from licq.support.errors import InputError


class Codec(nn.Module):
    """Adds a constant and spends half a bit on every padded value; remembers what it was given."""

    def __init__(self, shift=4 / 255):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))
        self.shapes = []

    def forward(self, x):
        assert not self.training
        self.shapes.append(tuple(x.shape))
        return {"x_hat": x + self.shift, "likelihoods": {"y": torch.full_like(x, 2**-0.5)}}


def test_rate_counts_all_likelihoods_over_true_pixels(make_image):
    path = make_image(width=70, height=50)
    model = Codec().train()
    report = evaluate(model, [path], progress=False)
    image = report.per_image[0]
    assert model.shapes == [(1, 3, 64, 128)] and model.training
    assert (image.name, image.width, image.height) == ("image.png", 70, 50)
    assert image.bpp == image.bpp_estimated == pytest.approx(0.5 * 3 * 64 * 128 / (70 * 50))
    x = load_image(path)
    assert image.psnr == psnr(x, x + 4 / 255)
    assert report.bpp_source == "estimate" and image.ms_ssim is None


def test_mean_is_of_the_decibels_and_equal_for_every_kind_of_input(make_image, tmp_path):
    paths = [make_image("a.png", 64, 64, 1), make_image("b.png", 192, 170, 2)]
    reports = [
        evaluate(Codec(), images, progress=False)
        for images in (
            paths,
            open_dataset(tmp_path),
            [load_image(path) for path in paths],
            [str(path) for path in paths],
        )
    ]
    assert all(report.mean() == reports[0].mean() for report in reports)
    per_image = reports[0].per_image
    assert reports[0].mean()["psnr"] == pytest.approx((per_image[0].psnr + per_image[1].psnr) / 2)
    assert per_image[0].ms_ssim is None and reports[0].mean()["ms_ssim"] == per_image[1].ms_ssim
    assert reports[1].name == tmp_path.name


def test_one_file_and_stacked_tensors_are_images_too(make_image):
    paths = [make_image("a.png", 64, 64, 1), make_image("b.png", 64, 64, 2)]
    x = torch.stack([load_image(path) for path in paths])
    each = [evaluate(Codec(), path, progress=False).mean()["psnr"] for path in (paths[0], str(paths[1]))]
    assert [evaluate(Codec(), one, progress=False).mean()["psnr"] for one in x] == each
    assert [image.psnr for image in evaluate(Codec(), x, progress=False).per_image] == each


def test_lossless_codec_has_infinite_psnr():
    assert (
        evaluate(Codec(0.0), [torch.rand(3, 64, 64).mul(255).round() / 255], progress=False).mean()["psnr"]
        == math.inf
    )


def test_nan_names_the_image(make_image):
    with pytest.raises(InputError, match="bad.png.*NaN"):
        evaluate(Codec(math.nan), [make_image("bad.png")], progress=False)

    class Zero(Codec):
        def forward(self, x):
            return super().forward(x) | {"likelihoods": {"y": torch.zeros(1)}}

    with pytest.raises(InputError, match="bad.png.*likelihoods"):
        evaluate(Zero(), [make_image("bad.png")], progress=False)
    with pytest.raises(InputError, match="no images"):
        evaluate(Codec(), [], progress=False)


def result(bpp, quality, similarity=None):
    return Report(
        "set",
        (ImageResult("a.png", 8, 8, bpp, bpp, 65025 / 10 ** (quality / 10), quality, similarity),),
        "estimate",
        1.0,
    )


def test_cost_is_rate_plus_lambda_times_distortion():
    report = Report(
        "set",
        (
            ImageResult("a", 8, 8, 0.5, 0.5, 100.0, 28.13, 0.9),
            ImageResult("b", 8, 8, 1.5, 1.5, 20.0, 35.1, 0.98),
        ),
        "estimate",
        1.0,
    )
    assert report.cost(0.01) == pytest.approx((0.5 + 1.0 + 1.5 + 0.2) / 2)
    assert report.cost(10.0, "ms-ssim") == pytest.approx((0.5 + 1.0 + 1.5 + 0.2) / 2)
    worse = Report(
        "set",
        tuple(
            ImageResult("c", 8, 8, 2 * image.bpp, 2 * image.bpp, 2 * image.mse, 0.0, None)
            for image in report.per_image
        ),
        "estimate",
        1.0,
    )
    assert delta_j_percent(report, worse, 0.01) == pytest.approx(100.0)
    with pytest.raises(InputError, match="too small"):
        worse.cost(1.0, "ms-ssim")


CURVE = [(0.2, 28.0, 0.90), (0.4, 31.0, 0.95), (0.7, 33.5, 0.975), (1.1, 36.0, 0.99)]


def points(count=4, similar=True, **more):
    return [
        make_point(
            quality=index + 1,
            lmbda=0.0018 * 2**index,
            fp32=result(rate, psnr_, similar and ms or None),
            quant=result(1.05 * rate, psnr_, similar and ms or None),
            model_bytes=10**6,
            **more,
        )
        for index, (rate, psnr_, ms) in enumerate(CURVE[:count])
    ]


def report_of(points, **more):
    return build_report(
        arch="lu2022",
        preset=None,
        loss="rd",
        unit="block",
        w_bits=8,
        a_bits=8,
        dataset="photos",
        images=1,
        points=points,
        **more,
    )


def test_report_has_the_public_keys_and_the_bd_rates():
    report = report_of(points()[::-1], config={"iters": 5})
    public = {
        "arch",
        "preset",
        "loss",
        "unit",
        "w_bits",
        "a_bits",
        "dataset",
        "images",
        "points",
        "bd_rate_psnr",
        "bd_rate_ms_ssim",
        "versions",
    }
    assert public <= report.keys() and report["bpp_source"] == "estimate" and report["config"] == {"iters": 5}
    for point in report["points"]:
        assert {
            "quality",
            "lambda",
            "fp32",
            "quant",
            "delta_j_percent",
            "calibration_seconds",
            "peak_memory_mb",
            "model_bytes",
            "fp32_model_bytes",
        } <= point.keys()
        assert set(point["fp32"]) == set(point["quant"]) == {"bpp", "bpp_estimated", "psnr", "ms_ssim"}
    assert [point["quality"] for point in report["points"]] == [1, 2, 3, 4]
    for key in ("bd_rate_psnr", "bd_rate_ms_ssim", "bd_rate_psnr_cubic"):
        assert report[key] == pytest.approx(5.0)


def test_files_are_compared_with_the_estimate_where_they_were_written():
    assert "bd_rate_psnr_files" not in report_of(points())
    written = points()
    for point in written:
        point["bpp_source"] = "bitstream"
        point["quant"] = point["quant"] | {"bpp_estimated": point["quant"]["bpp"] / 1.02}
    report = report_of(written)
    assert report["bd_rate_psnr_files"] == pytest.approx(2.0)
    assert "files against the estimate" in render_markdown(report) and "+2.000%" in render_markdown(report)


def test_report_says_why_a_bd_rate_is_missing():
    report = report_of(points(2, similar=False))
    assert report["bd_rate_psnr"] == pytest.approx(5.0)
    assert report["bd_rate_psnr_cubic"] is None and "needs 4" in report["bd_rate_notes"]["bd_rate_psnr_cubic"]
    assert report["bd_rate_ms_ssim"] is None and "ms_ssim" in report["bd_rate_notes"]["bd_rate_ms_ssim"]
    text = render_markdown(report)
    assert "Only 2 points" in text and "cubic needs 4" in text
    assert "no BD-rate can be given" in render_markdown(report_of(points(1)))


def test_baseline_and_anchors_are_compared():
    anchor = [{"quality": 1, "bpp": 2 * rate, "psnr": quality, "ms_ssim": None} for rate, quality, _ in CURVE]
    with_baseline = points()
    for point, (rate, quality, _) in zip(with_baseline, CURVE):
        point |= {"baseline": result(1.2 * rate, quality).mean(), "baseline_delta_j_percent": 9.0}
    report = report_of(with_baseline, anchors={"JPEG": anchor})
    assert report["bd_rate_psnr_baseline"] == pytest.approx(20.0)
    assert report["anchor_bd_rate_psnr"]["JPEG"]["fp32"] == pytest.approx(-50.0)
    rates, qualities = [1.05 * rate for rate, _, _ in CURVE], [quality for _, quality, _ in CURVE]
    expected = bd_rate([2 * rate for rate, _, _ in CURVE], qualities, rates, qualities)
    assert report["anchor_bd_rate_psnr"]["JPEG"]["quant"] == pytest.approx(expected)
    text = render_markdown(report)
    assert "+20.00%" in text and "-50.00%" in text


def test_written_report_is_readable_and_rendered_again_from_json(tmp_path):
    lossless = points(1)[0]
    lossless["quant"] = lossless["quant"] | {"psnr": math.inf}
    for name, content in (
        ("four", points()),
        ("one", points(1)),
        ("lossless", [lossless]),
        ("nolambda", [points(1)[0] | {"lambda": None}]),
    ):
        report = report_of(content, kept_in_float={"softmax": "ablation"}, warnings=["few images"])
        write_report(tmp_path / name, report)
        assert sorted(os.listdir(tmp_path / name)) == [
            "compressai",
            "rd.png",
            "report.html",
            "report.json",
            "report.md",
        ]
        read = json.loads((tmp_path / name / "report.json").read_text())
        text = (tmp_path / name / "report.md").read_text()
        assert "estimated" in text and "softmax: ablation" in text and "few images" in text
        assert name == "lossless" or render_markdown(read) == text
        with Image.open(tmp_path / name / "rd.png") as image:
            assert min(image.size) > 600


def test_unwritable_output_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="`out`"):
        write_report(tmp_path / "file", report_of(points(1)))
