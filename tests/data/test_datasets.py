import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import licq
import licq.data.datasets
from licq.data.calibration import sample_crops
from licq.data.datasets import images_in, known_datasets, open_dataset
from licq.data.images import load_image
from licq.support.errors import InputError


def test_folder_is_in_natural_order_and_only_images(tmp_path, make_image):
    for number in (10, 9, 1, 2):
        make_image(f"kodim{number}.png")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".hidden.png").write_text("x")
    dataset = open_dataset(tmp_path)
    assert [path.name for path in dataset.paths] == ["kodim1.png", "kodim2.png", "kodim9.png", "kodim10.png"]
    assert dataset.name == tmp_path.name and len(dataset) == 4


def test_name_is_found_in_licq_data_before_the_cache(tmp_path, make_image, monkeypatch):
    for root in ("data", "cache"):
        make_image("a.png", folder=tmp_path / root / "clic")
    monkeypatch.setenv("LICQ_CACHE", str(tmp_path / "cache"))
    assert open_dataset("clic").paths[0].parts[-3] == "cache"
    monkeypatch.setenv("LICQ_DATA", str(tmp_path / "data"))
    assert open_dataset("clic").paths[0].parts[-3] == "data"


@pytest.mark.parametrize("name", ["kodak", "clic", "tecnick"])
def test_missing_data_set_names_licq_data_and_the_folder(name, tmp_path, monkeypatch):
    for root in (None, str(tmp_path)):
        if root:
            monkeypatch.setenv("LICQ_DATA", root)
        with pytest.raises(InputError) as caught:
            open_dataset(name)
        assert "LICQ_DATA" in str(caught.value) and (root or "no-cache") in str(caught.value)
        assert "\n" not in str(caught.value)


def test_incomplete_kodak_is_not_passed_off_as_kodak(tmp_path, make_image, monkeypatch):
    make_image("kodim01.png", folder=tmp_path / "kodak")
    monkeypatch.setenv("LICQ_DATA", str(tmp_path))
    with pytest.raises(InputError, match="holds 1 images, kodak has 24"):
        open_dataset("kodak")


@pytest.mark.parametrize(
    "text, words", [("no_such", "no data set or folder"), ("empty", "no images"), ("file", "is a file")]
)
def test_useless_folder_is_refused(text, words, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=words):
        open_dataset(tmp_path / text)


def test_download_checks_every_file_and_resumes(tmp_path, monkeypatch):
    served = {"kodim01.png": b"one", "kodim02.png": b"two"}
    entry = {
        "images": 2,
        "url": "https://host/",
        "sha256": {name: hashlib.sha256(body).hexdigest() for name, body in served.items()},
    }
    monkeypatch.setattr(licq.data.datasets, "known_datasets", lambda: {"kodak": entry})
    monkeypatch.setenv("LICQ_CACHE", str(tmp_path))
    asked = []

    def fetch(url, damaged=""):
        name = url.removeprefix("https://host/")
        asked.append(name)
        return b"changed" if name == damaged else served[name]

    monkeypatch.setattr(licq.data.datasets, "_fetch", lambda url: fetch(url, damaged="kodim02.png"))
    with pytest.raises(InputError, match="SHA-256"):
        open_dataset("kodak")
    assert [path.name for path in images_in(tmp_path / "kodak")] == ["kodim01.png"]
    monkeypatch.setattr(licq.data.datasets, "_fetch", fetch)
    assert len(open_dataset("kodak")) == 2
    assert asked == ["kodim01.png", "kodim02.png", "kodim02.png"]


def test_kodak_checksums_are_complete():
    digests = known_datasets()["kodak"]["sha256"]
    assert list(digests) == [f"kodim{number:02d}.png" for number in range(1, 25)]
    assert len({digest for digest in digests.values() if len(digest) == 64}) == 24


def test_packaged_photos_are_photographs_and_splits_are_disjoint():
    photos, calibration = open_dataset("photos"), open_dataset("photos-calib")
    for path in photos.paths + calibration.paths:
        image = load_image(path)
        assert min(image.shape[1:]) >= 256 and image.std() > 0.1
    assert sample_crops(calibration.paths, 3, 64, exclude=photos.paths).shape == (3, 3, 64, 64)


def test_crops_are_of_the_images_and_repeat_with_the_seed(tmp_path, make_image):
    paths = [make_image(f"{seed}.png", seed=seed) for seed in range(4)]
    crops = sample_crops(paths, num=4, crop=32, seed=7)
    assert crops.shape == (4, 3, 32, 32)
    assert torch.equal(crops, sample_crops(paths, num=4, crop=32, seed=7))
    assert not torch.equal(crops, sample_crops(paths, num=4, crop=32, seed=8))
    sources = [
        next(index for index, path in enumerate(paths) if contains(load_image(path), crop)) for crop in crops
    ]
    assert sorted(sources) == [0, 1, 2, 3]


def contains(image, crop):
    windows = image.unfold(1, crop.shape[1], 1).unfold(2, crop.shape[2], 1)  # (3, rows, columns, h, w)
    return bool((windows == crop[:, None, None]).all(dim=(0, 3, 4)).any())


def test_few_images_give_several_different_crops(make_image):
    crops = sample_crops([make_image(width=40, height=40)], num=8, crop=36, seed=0)
    assert len({crop.numpy().tobytes() for crop in crops}) == 8


def test_more_crops_per_image_begin_with_the_same(make_image):
    paths = [make_image(f"{seed}.png", seed=seed) for seed in range(4)]
    once, often = sample_crops(paths, 3, 16, seed=5), sample_crops(paths, 3, 16, seed=5, crops_per_image=3)
    assert often.shape[0] == 9 and torch.equal(often[:3], once)
    images = [load_image(path) for path in paths]
    sources = [next(i for i, image in enumerate(images) if contains(image, crop)) for crop in often]
    assert sources[:3] == sources[3:6] == sources[6:] and len(set(sources)) == 3
    assert len({crop.numpy().tobytes() for crop in often}) == 9


def test_reduced_images_give_every_second_crop(make_image):
    path = make_image(width=41, height=38)
    crops = sample_crops([path], num=1, crop=16, seed=3, crops_per_image=4, reductions=(1, 2))
    image = load_image(path)
    with Image.open(path) as picture:
        half = (
            torch.from_numpy(np.array(picture.crop((0, 0, 40, 38)).reduce(2))).permute(2, 0, 1) / 255
        )  # Pillow's means

    def near(crop):
        windows = half.unfold(1, 16, 1).unfold(2, 16, 1) - crop[:, None, None]
        return bool(
            windows.abs().amax(dim=(0, 3, 4)).le(1.01 / 255).any()
        )  # a tie may be rounded up or to even

    assert [contains(image, crop) for crop in crops] == [True, False, True, False]
    assert [near(crop) for crop in crops] == [False, True, False, True]
    assert torch.equal((crops * 255).round() / 255, crops)
    # half of 38 pixels is less than 20
    assert all(
        contains(image, crop)
        for crop in sample_crops([path], 1, 20, seed=3, crops_per_image=2, reductions=(1, 2))
    )


def test_image_smaller_than_the_crop_is_reflected(make_image):
    path = make_image(width=10, height=9)
    crop = sample_crops([path], num=1, crop=32, seed=0)[0]
    image = load_image(path)

    def reflected(position, length):
        position %= 2 * (length - 1)
        return min(position, 2 * (length - 1) - position)

    for row, column in ((0, 0), (9, 11), (31, 30), (17, 5)):
        assert torch.equal(crop[:, row, column], image[:, reflected(row, 9), reflected(column, 10)])


def test_evaluation_image_under_another_name_is_refused(tmp_path, make_image):
    evaluated = make_image("a.png", seed=1)
    other = make_image("b.png", seed=2)
    copy = shutil.copy(evaluated, tmp_path / "renamed.png")
    with pytest.raises(InputError, match="renamed.png is the evaluation image .*a.png"):
        sample_crops([other, copy], num=1, crop=16, exclude=[evaluated])
    assert sample_crops([other], num=1, crop=16, exclude=[evaluated]).shape == (1, 3, 16, 16)


def test_crops_by_the_names_of_the_public_interface(make_image):
    files = [str(make_image("a.png", 40, 40)), str(make_image("b.png", 40, 40))]
    crops = licq.sample_crops(files=files, num=2, crop=16, seed=1, crops_per_image=3, reductions=(1, 2))
    assert crops.shape == (6, 3, 16, 16) and crops.dtype == torch.float32
    assert torch.equal(crops * 255, (crops * 255).round())


def test_impossible_calibration_is_refused(make_image):
    with pytest.raises(InputError, match="`files`"):
        sample_crops([], num=1, crop=16)
    with pytest.raises(InputError):
        sample_crops([make_image()], num=0, crop=16)
    with pytest.raises(InputError):
        sample_crops([make_image()], num=1, crop=16, crops_per_image=0)
    for reductions in ((), (1, 0)):
        with pytest.raises(InputError, match="1 or more"):
            sample_crops([make_image()], num=1, crop=16, reductions=reductions)


def test_registry_file_is_json_with_a_way_to_each_data_set():
    for name, entry in known_datasets().items():
        assert {"url", "get", "packaged"} & entry.keys(), name
    json.dumps(known_datasets())
