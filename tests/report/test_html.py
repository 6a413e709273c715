"""report.html is whole, says what report.json says, and needs nothing but itself; CompressAI's tool reads our
curves."""

import base64
import json
import math
import os
import re
from html.parser import HTMLParser
from itertools import product

import numpy as np
import pytest
import torch
from compressai.utils.plot.__main__ import main as compressai_plot
from compressai.utils.plot.__main__ import parse_json_file
from PIL import Image

from licq.data.images import load_pixels
from licq.evaluation.evaluate import ImageResult, Report, evaluate
from licq.report.build import make_point, write_report
from licq.report.changes import image_deltas, predicted_rises
from licq.report.crops import PANELS, busiest_window, save_crops, split_panels
from licq.report.html import render_html
from licq.report.labels import percent
from licq.report.text import render_markdown
from tests.report.test_build import CURVE, Codec, points, report_of, result

SECTIONS = {"warnings", "curves", "bd-rate", "images", "layers", "crops", "cost", "float", "settings"}
VOID = {"meta", "img"}


class Page(HTMLParser):
    """What a page holds; every tag that is opened must be closed in its turn."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.ids, self.pictures, self.cells, self.links, self.text = [], [], [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert tag not in {"script", "link", "iframe", "object"}
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            assert attributes["alt"]
            self.pictures.append(attributes["src"])
        if tag == "td":
            self.cells.append("")
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes[name] for name in ("src", "href", "srcset") if name in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data
        if "td" in self.open:
            self.cells[-1] += data


def read(folder) -> tuple[Page, dict]:
    text = (folder / "report.html").read_text()
    page, report = Page(text), json.loads((folder / "report.json").read_text())
    assert text.startswith("<!DOCTYPE html>") and text.count("<html") == text.count("</html>") == 1
    assert (
        "://" not in text
        and "@import" not in text
        and all(link.startswith("data:image/") for link in page.links)
    )
    assert len(set(page.ids)) == len(page.ids) and "None" not in page.text and "nan" not in page.text
    return page, report


def predicted(layers: int) -> dict:
    return {
        "j_float": 2.0,
        "splitting": {"extra_macs": 0.1},
        "predicted": {
            f"layer{index}": {"inputs": 0.001 * index, "weights": 0.002} for index in range(layers)
        },
    }


def whole_report(folder, history=None):
    """A report with every part, and its crops."""
    everything = points(history=history or predicted(30))
    for number, (point, (rate, quality, similar)) in enumerate(zip(everything, CURVE)):
        point |= {
            "baseline": result(1.2 * rate, quality, similar).mean(),
            "baseline_delta_j_percent": 9.0,
            "crops": {
                "file": f"q{number}/crops.png",
                "index": 0,
                "image": "a.png",
                "left": 3,
                "top": 5,
                "width": 20,
                "height": 10,
                "amplified": 8,
            },
        }
        (folder / f"q{number}").mkdir(parents=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (10, 80, 3), dtype=np.uint8)).save(
            folder / f"q{number}" / "crops.png"
        )
    anchors = {
        name: [{"bpp": 2 * rate, "psnr": quality, "ms_ssim": similar} for rate, quality, similar in CURVE]
        for name in ("JPEG", "WebP", "AVIF", "published lu2022")
    }
    calibration = {"dataset": "clic", "images": 10, "crops_per_image": 8, "crop": 256}
    return report_of(
        everything,
        anchors=anchors,
        warnings=["few images", "an <odd> & one"],
        baseline="nothing learned",
        kept_in_float=["exp in h_s"],
        left_alone={"g_a.9": "never | called"},
        config={"calibration": calibration, "iters": 5, "device": "cpu"},
    )


def svg(uri: str) -> str:
    kind, data = uri.split(",")
    assert kind == "data:image/svg+xml;base64"
    return base64.b64decode(data).decode()


def test_page_has_every_section_and_the_numbers_of_the_json(tmp_path):
    write_report(tmp_path, whole_report(tmp_path))
    page, report = read(tmp_path)
    assert set(page.ids) == SECTIONS
    assert len(page.pictures) == 2 + 1 + 1 + 4 * len(PANELS)  # curves, scatter, the one codec's bars, crops
    assert (
        f"{report['bd_rate_psnr']:.2f}% more rate" in page.text
        and f"{report['bd_rate_psnr_baseline']:.2f}% more rate" in page.text
    )
    for key in ("bd_rate_psnr", "bd_rate_psnr_cubic", "bd_rate_ms_ssim", "bd_rate_psnr_baseline"):
        assert percent(report[key]) in page.cells
    for rates in report["anchor_bd_rate_psnr"].values():
        assert percent(rates["fp32"]) in page.cells and percent(rates["quant"]) in page.cells
    for point in report["points"]:
        for codec in ("fp32", "quant", "baseline"):
            assert f"{point[codec]['bpp']:.4f}" in page.cells and f"{point[codec]['psnr']:.3f}" in page.cells
        assert percent(point["delta_j_percent"]) in page.cells
    for text in (
        "few images",
        "an <odd> & one",
        "exp in h_s",
        "g_a.9: never | called",
        "clic, 10 images, 8 crops of 256 pixels",
        "weights 8, activations 8",
        "Difference \N{MULTIPLICATION SIGN} 8",
        report["versions"]["torch"],
    ):
        assert text in page.text
    assert (tmp_path / "report.html").stat().st_size < 1_000_000
    assert (
        render_html(report, tmp_path) == (tmp_path / "report.html").read_text()
    )  # of the JSON alone, and the same every time


def test_curves_of_all_anchors_are_drawn(tmp_path):
    write_report(tmp_path, whole_report(tmp_path))
    for number, measure in enumerate(("PSNR", "MS-SSIM")):
        picture = svg(read(tmp_path)[0].pictures[number])
        assert measure in picture and all(
            f">{name}<" in picture for name in ("JPEG", "WebP", "AVIF", "published lu2022")
        )


def test_bars_are_those_of_the_twenty_layers_that_cost_most(tmp_path):
    report = whole_report(tmp_path)
    report["points"][3]["history"] = predicted(3)
    write_report(tmp_path, report)
    page, _ = read(tmp_path)
    many, few = (svg(uri) for uri in page.pictures[3:5])
    assert re.findall(r">(layer\d+)<", many) == [f"layer{index}" for index in range(29, 9, -1)]
    assert re.findall(r">(layer\d+)<", few) == ["layer2", "layer1", "layer0"]
    assert "20 of 30 layers" in page.text and "3 layers" in page.text
    assert predicted_rises(report["points"][3])["layer2"] == pytest.approx((0.1, 0.1))  # percent of 2.0


def test_scatter_has_the_changes_of_every_image():
    def measured(scale):
        return Report(
            "set",
            tuple(
                ImageResult(
                    name,
                    8,
                    8,
                    scale * bpp,
                    scale * bpp,
                    scale**2 * error,
                    10 * math.log10(255**2 / (scale**2 * error)),
                    None,
                )
                for name, bpp, error in (("a.png", 1.0, 10.0), ("b.png", 0.5, 100.0))
            ),
            "estimate",
            1.0,
        )

    report = report_of(points(1))
    assert [(item["image"], item["bpp"]) for item in image_deltas(report)] == [("a.png", pytest.approx(5.0))]
    deltas = image_deltas(
        report_of([make_point(quality=1, lmbda=0.01, fp32=measured(1.0), quant=measured(1.1))])
    )
    assert [item["image"] for item in deltas] == [
        "b.png",
        "a.png",
    ]  # the second's J is more distortion, which rises more
    assert deltas[0]["j"] == pytest.approx(100 * ((0.55 + 1.21) / 1.5 - 1)) and deltas[1][
        "j"
    ] == pytest.approx(100 * ((1.1 + 0.121) / 1.1 - 1))
    assert all(item["psnr"] == pytest.approx(-20 * math.log10(1.1)) for item in deltas)


def _lossless():
    point = points(1)[0]
    point["quant"] |= {"psnr": math.inf}
    point["images_per"]["quant"][0] |= {"psnr": math.inf, "mse": 0.0}
    return point


@pytest.mark.parametrize(
    "content, gone",
    [
        (points(), {"layers", "crops"}),
        (points(1), {"layers", "crops"}),
        (points(2, similar=False), {"layers", "crops"}),
        ([point | {"lambda": None} for point in points(3)], {"layers", "crops"}),
        ([point | {"bpp_source": "bitstream"} for point in points()], {"layers", "crops"}),
        ([_lossless()], {"layers", "crops", "images"}),
        (
            [point | {"quant": None, "images_per": {"fp32": []}} for point in points()],
            {"layers", "crops", "images", "bd-rate"},
        ),
        (
            [point | {"fp32": None, "images_per": {"quant": []}} for point in points()],
            {"layers", "crops", "images", "bd-rate"},
        ),
        (
            [point | {"crops": {"file": "q1/crops.png", "index": 0}} for point in points()],
            {"layers", "crops"},
        ),
    ],
    ids=[
        "no anchors",
        "one quality",
        "small images",
        "no lambda",
        "files",
        "lossless",
        "float alone",
        "quantized alone",
        "crops deleted",
    ],
)
def test_page_without_some_parts(tmp_path, content, gone, blank_figures):
    write_report(tmp_path, report_of(content))
    page, _ = read(tmp_path)
    assert set(page.ids) == SECTIONS - {"warnings", "float"} - gone


def test_bits_of_single_layers_are_told(tmp_path):
    bits = {
        "how": "The least predicted loss with mean bits at most 6.",
        "mean_bits": 6.0,
        "megabytes": 0.7891,
        "relative_bops": 0.8537,
        "loss": 0.0123,
        "layers": {"g_a.0": {"w_bits": 6, "a_bits": 8}, "g_s.6": {"w_bits": 5, "a_bits": 7}},
    }
    write_report(
        tmp_path,
        report_of(
            points(history={"j_float": 2.0, "j_start": 2.1, "j_end": 2.03, "predicted": {}}, bits=bits)
        ),
    )
    page, _ = read(tmp_path)
    assert "bits" in page.ids and "of single layers below" in page.text and bits["how"] in page.text
    assert {"6.000", "0.7891", "0.8537", "+0.61%", "+5.00%", "+1.50%", "g_s.6", "W5 A7"} <= set(page.cells)


def test_compressai_reads_and_draws_every_curve(tmp_path):
    write_report(tmp_path, whole_report(tmp_path))
    files = sorted((tmp_path / "compressai").iterdir())
    assert [file.name for file in files] == ["baseline.json", "float.json", "quantized.json"]
    report = json.loads((tmp_path / "report.json").read_text())
    for file, codec, name in zip(
        files, ("baseline", "fp32", "quant"), ("lu2022 plain", "lu2022 float", "lu2022 W8A8 rd")
    ):
        for metric, key in (("psnr", "psnr"), ("ms-ssim", "ms_ssim")):
            curve = parse_json_file(file, metric)
            assert curve["name"] == name and curve["xs"] == [
                point[codec]["bpp"] for point in report["points"]
            ]
            values = [point[codec][key] for point in report["points"]]
            assert list(curve["ys"]) == pytest.approx(
                values if key == "psnr" else [-10 * math.log10(1 - value) for value in values]
            )
    compressai_plot(["-f", *map(str, files), "-m", "psnr", "-o", str(tmp_path / "plot.png")])
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_compressai_files_are_those_of_this_report(tmp_path):
    write_report(tmp_path, whole_report(tmp_path))
    write_report(tmp_path, report_of(points(2, similar=False)))
    assert sorted(os.listdir(tmp_path / "compressai")) == ["float.json", "quantized.json"]
    stored = json.loads((tmp_path / "compressai" / "float.json").read_text())
    assert set(stored["results"]) == {"bpp", "psnr-rgb"} and "estimates" in stored["description"]
    write_report(tmp_path, report_of([_lossless()]))
    compressai_plot(["-f", str(tmp_path / "compressai" / "quantized.json"), "-o", str(tmp_path / "plot.png")])


# -------------------------------------------------------------------------------------------------- the crops


@pytest.mark.parametrize("height, width", [(9, 11), (4, 11), (2, 3), (4, 4)])
def test_window_has_the_largest_sum_of_all(height, width):
    energy = torch.randint(0, 50, (height, width)).float()
    top, left, rows, columns = busiest_window(energy, 4)
    assert (rows, columns) == (min(4, height), min(4, width))
    sums = [
        energy[y : y + rows, x : x + columns].sum()
        for y, x in product(range(height - rows + 1), range(width - columns + 1))
    ]
    assert energy[top : top + rows, left : left + columns].sum() == max(sums)


class Spot(Codec):
    """Three grey levels more in a square at the bottom right, if the image is bright."""

    def forward(self, x):
        x_hat = x.clone()
        if x.mean() > 0.5:
            x_hat[..., -64:, -64:] += 3 / 255
        return super().forward(x_hat)


@pytest.mark.parametrize("lmbda", [0.01, None])
def test_crops_are_of_the_image_that_changes_most_and_where_it_does(tmp_path, lmbda):
    rng = np.random.default_rng(0)
    paths = []
    for name, low in (("dark.png", 20), ("bright.png", 170)):
        Image.fromarray(rng.integers(low, low + 40, (256, 320, 3), dtype=np.uint8)).save(tmp_path / name)
        paths.append(tmp_path / name)
    codecs = Codec(5 / 255), Spot(5 / 255)
    reports = tuple(evaluate(codec, paths, progress=False) for codec in codecs)
    facts = save_crops(
        tmp_path / "out",
        2,
        codecs=codecs,
        reports=reports,
        paths=paths,
        lmbda=lmbda,
        metric="mse",
        pad=64,
        device=torch.device("cpu"),
    )
    assert (facts["image"], facts["index"], facts["file"], facts["width"], facts["height"]) == (
        "bright.png",
        1,
        "q2/crops.png",
        160,
        160,
    )
    left, top = facts["left"], facts["top"]
    assert (left, top) == (320 - 160, 256 - 160)  # the only window with the whole square
    assert facts["amplified"] == 64  # 64 * 3 is below white
    panels = [np.array(panel).astype(int) for panel in split_panels(tmp_path / "out" / "q2" / "crops.png")]
    part = load_pixels(paths[1]).astype(int)[top : top + 160, left : left + 160]
    assert np.array_equal(panels[0], part) and np.array_equal(panels[1], part + 5)
    assert np.array_equal(panels[2] - panels[1], np.pad(np.full((64, 64, 3), 3), ((96, 0), (96, 0), (0, 0))))
    assert np.array_equal(panels[3], 64 * (panels[2] - panels[1]))
    assert all(codec.training for codec in codecs)  # as they were


def test_a_report_says_what_a_clipping_method_clipped(tmp_path):
    counted = points(2)
    counted[0]["clipped"] = {"g_s.2": 0.0125, "h_s.0": 0.00004}
    counted[1]["clipped"] = {}
    report = report_of(counted)
    page = Page(render_html(report, tmp_path))
    assert "clipped" in page.ids and "g_s.2 1.25%, h_s.0 0.004%" in page.cells and "none" in page.cells
    assert "## Values clipped" in render_markdown(report)
    plain = report_of(points(2))
    assert "clipped" not in Page(render_html(plain, tmp_path)).ids
    assert "Values clipped" not in render_markdown(plain)
