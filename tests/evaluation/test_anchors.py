"""Curves to compare with: what was published for official models stands beside classical codecs."""

import io
import json
import math

import numpy as np
import pytest
from PIL import Image, features

from licq.data.datasets import Dataset
from licq.evaluation import anchors
from licq.evaluation.anchors import (
    PUBLISHED,
    QUALITIES,
    anchor_points,
    anchors_of,
    can_write,
    published_curve,
)
from licq.models.registry import list_models
from licq.report.build import build_report


def test_published_curves_are_of_known_architectures_and_rise():
    entries = json.loads(PUBLISHED.read_text())
    assert set(entries) <= set(list_models())
    for name, entry in entries.items():
        columns = [entry[key] for key in ("bpp", "psnr", "ms_ssim")]
        assert len({*map(len, columns)}) == 1 and len(columns[0]) >= 4 and "/" in entry["source"], name
        assert all(column == sorted(column) for column in columns), name
        assert 0.05 < columns[0][0] < columns[0][-1] < 3 and 25 < columns[1][0] < columns[1][-1] < 45, name


def test_published_curve_is_found_for_its_data_set_only(make_image):
    path = make_image()
    kodak = Dataset("kodak", (path,) * 24)
    curve = published_curve("minnen2018", kodak)
    assert curve[0] == {"bpp": 0.11053, "psnr": 28.0885, "ms_ssim": 0.920696} and len(curve) == 8
    assert published_curve("minnen2018", kodak, "ms-ssim") is None
    assert published_curve("minnen2018", Dataset("kodak", (path,) * 8)) is None
    assert published_curve("minnen2018", Dataset("clic", (path,) * 24)) is None
    assert published_curve("tic", kodak) is None


def test_report_has_bd_rates_against_every_anchor(make_image, monkeypatch):
    kodak = Dataset("kodak", (make_image(width=64, height=64),) * 24)
    curves = anchors_of("cheng2020", kodak)
    assert list(curves) == [
        *(
            name
            for name, codec in (("JPEG", "jpg"), ("WebP", "webp"), ("AVIF", "avif"))
            if features.check(codec)
        ),
        "published cheng2020",
    ]
    report = build_report(
        arch="cheng2020",
        preset="licq",
        loss="rd",
        unit="block",
        w_bits=8,
        a_bits=8,
        dataset="kodak",
        images=24,
        points=[],
        anchors=curves,
    )
    assert set(report["anchor_bd_rate_psnr"]) == set(curves)
    monkeypatch.setattr("licq.evaluation.anchors.can_write", lambda codec: codec == "jpeg")
    assert list(anchors_of("tic", kodak)) == ["JPEG"]


def test_an_image_is_measured_once(make_image, monkeypatch, tmp_path):
    monkeypatch.setenv("LICQ_CACHE", str(tmp_path / "cache"))
    paths = [make_image(f"{seed}.png", 176, 176, seed) for seed in (1, 2)]
    measured = []
    whole = anchors._points_of
    monkeypatch.setattr(
        anchors, "_points_of", lambda path, **what: measured.append(path) or whole(path, **what)
    )
    first = anchor_points(paths, with_ms_ssim=True)
    assert measured == paths and not np.isnan(first).any()
    copy = tmp_path / "copy.png"
    copy.write_bytes(paths[1].read_bytes())
    assert np.array_equal(anchor_points([paths[0], copy], with_ms_ssim=True), first) and measured == paths
    for entry in (tmp_path / "cache" / "anchors").iterdir():
        entry.write_text("[]")  # damaged
    assert np.array_equal(anchor_points(paths, with_ms_ssim=True), first) and measured == 2 * paths
    Image.new("RGB", (16, 16), "white").save(copy)  # infinite PSNR, and too small for MS-SSIM
    assert np.array_equal(*(anchor_points([copy], with_ms_ssim=True) for _ in range(2)), equal_nan=True)
    measured.remove(copy)
    anchor_points(paths, with_ms_ssim=True, subsampling="4:4:4")  # other settings
    monkeypatch.setattr(anchors, "pillow", "another version")
    anchor_points(paths, with_ms_ssim=True)
    assert measured == 4 * paths


@pytest.mark.parametrize("codec", [codec for codec in QUALITIES if can_write(codec)])
def test_anchor_counts_the_bytes_of_files_and_rises_with_quality(codec, make_image):
    path = make_image(width=96, height=80)
    points = anchor_points([path], codec, qualities=(80, 20))[:, 0]
    assert np.array_equal(points, anchor_points([path], codec, qualities=(20, 80))[:, 0], equal_nan=True)
    (low_bpp, low_psnr, similarity), (high_bpp, high_psnr, _) = points.tolist()
    assert low_bpp < high_bpp and low_psnr < high_psnr and math.isnan(similarity)
    coded = io.BytesIO()
    Image.open(path).save(coded, format=codec, quality=80)  # Pillow's defaults
    assert high_bpp == 8 * len(coded.getvalue()) / (96 * 80)
