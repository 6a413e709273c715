"""Curves to compare with: what was published for official models stands beside classical codecs."""

import json

from data.datasets import Dataset
from evaluation.anchors import PUBLISHED, anchors_of, published_curve
from evaluation.report import build_report
from models.registry import list_models


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


def test_report_has_bd_rates_against_every_anchor(make_image):
    kodak = Dataset("kodak", (make_image(width=64, height=64),) * 24)
    curves = anchors_of("cheng2020", kodak, webp=True)
    assert list(curves) == ["JPEG", "WebP", "published cheng2020"] and list(anchors_of("tic", kodak)) == ["JPEG"]
    report = build_report(arch="cheng2020", preset="licq", loss="rd", unit="block", w_bits=8, a_bits=8, dataset="kodak", images=24,
                          points=[], anchors=curves)
    assert set(report["anchor_bd_rate_psnr"]) == set(curves)
