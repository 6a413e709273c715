"""What main_ptq.py cannot use is one line on standard error, and nothing is written."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from licq.data.calibration import sample_crops
from licq.models.checkpoints import load_checkpoint
from licq.support.errors import InputError
from tests.main_jobs import ARCH, refused


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"w_bits": 1}, ["--w_bits", "1 is out of range", "2 to 16"]),
        ({"a_bits": 17}, ["--a_bits", "2 to 16"]),
        ({"w_bits": "eight"}, ["--w_bits", "not an integer"]),
        ({"bias_bits": 16}, ["--bias_bits", "8, 32"]),
        ({"loss": "psnr"}, ["--loss", "rd_direct"]),
        ({"unit": "pixel"}, ["--unit", "block"]),
        ({"preset": "magic"}, ["'magic'", "licq"]),
        ({"metric": "lpips"}, ["--metric", "ms-ssim"]),
        ({"arch": "vgg"}, ["'vgg'", "lu2022"]),
        ({"iters": -1}, ["--iters", "0 or more"]),
        ({"num_calib": 0}, ["--num_calib", "1 or more"]),
        ({"crop": 0}, ["--crop", "1 or more"]),
        ({"crop": 100}, ["--crop 100", "multiple of 64"]),
        ({"metric": "ms-ssim"}, ["MS-SSIM", "161"]),
        ({"lambda": 0}, ["--lambda", "positive"]),
        ({"lambda": "nan"}, ["--lambda", "positive"]),
        ({"lambda": "inf"}, ["--lambda", "positive"]),
        ({"lambda": "0.1,0.2"}, ["2 values of --lambda for 1 qualities"]),
        ({"threads": 0}, ["--threads", "1 to 256"]),
        ({"threads": 100000}, ["--threads", "1 to 256"]),
        ({"seed": -1}, ["--seed", "4294967295"]),
        ({"device": "abacus"}, ["--device abacus", "cpu"]),
        ({"device": "cuda:99"}, ["--device cuda:99", "cpu"]),
        ({"quality": "two"}, ["--quality", "'two'"]),
        ({"quality": 2}, ["tiny-q2.safetensors", "--quality"]),
        ({"quality": 99}, ["tiny-q99.safetensors"]),
        ({"set": "iters"}, ["name=value"]),
        ({"set": "w_bits=4"}, ["--w_bits"]),
        ({"set": "speed=9"}, ["speed", "known are"]),
        ({"set": "joint_iters=few"}, ["joint_iters", "not an integer"]),
        ({"set": "lr_range=nan"}, ["lr_range", "number"]),
        ({"set": "learn=luck"}, ["luck"]),
        ({"sweep": "nowhere"}, ["no sweep nowhere", "table1"]),
        ({"ray": True}, ["--ray", "--sweep"]),
        ({"colour": "red"}, ["--colour"]),
        ({"eval": "/nowhere"}, ["/nowhere", "photos"]),
        ({"calib": "/nowhere"}, ["/nowhere", "photos"]),
        ({"eval": "clic"}, ["LICQ_DATA"]),
    ],
)
def test_bad_argument_is_one_line(job, capsys, changes, expected):
    refused(capsys, job, *expected, **changes)


def test_missing_checkpoint_is_one_line(job, capsys, tmp_path, zoo):
    refused(capsys, job, "nowhere.pt", "does not exist", checkpoint=tmp_path / "nowhere.pt")
    refused(capsys, job, "directory", checkpoint=tmp_path)
    refused(capsys, job, "other-q1", checkpoint=tmp_path / "other-q{quality}.pt")
    refused(capsys, job, "no file is named like", checkpoint=tmp_path / "other-q{quality}.pt", quality="all")
    refused(capsys, job, "one file for 2 qualities", checkpoint=zoo / "tiny-q1.safetensors", quality="1,3")
    refused(capsys, job, "exclude each other", pretrained=True)
    refused(
        capsys, job, "no embedded checkpoint of cheng2019", checkpoint=None, arch="cheng2019", quality="all"
    )
    refused(capsys, job, "--quality from 1 to", checkpoint=None, arch="lu2022", quality=99)


def test_damaged_checkpoint_is_one_line(job, capsys, tmp_path, zoo):
    whole = (zoo / "tiny-q1.safetensors").read_bytes()
    damaged = {
        "cut.safetensors": whole[: len(whole) // 2],
        "empty.safetensors": b"",
        "text.pt": b"these are no weights at all",
        "flipped.safetensors": whole[:-9] + bytes([whole[-9] ^ 255]) + whole[-8:],
    }
    for name, data in damaged.items():
        (tmp_path / name).write_bytes(data)
        refused(capsys, job, name, checkpoint=tmp_path / name)
    torch.save({"state_dict": {"g_a.0.weight": torch.full((2, 2), math.nan)}}, tmp_path / "nan.pt")
    refused(capsys, job, "nan.pt", "not finite", checkpoint=tmp_path / "nan.pt")


def test_checkpoint_of_another_codec_is_one_line(job, capsys, zoo):
    refused(capsys, job, f"pass --arch {ARCH}", arch="minnen2018")
    refused(capsys, job, "pass --quality 1", checkpoint=zoo / "tiny-q1.safetensors", quality=3)
    bare = zoo / "bare.pt"
    torch.save(load_checkpoint(zoo / "tiny-q1.safetensors").state_dict(), bare)
    refused(capsys, job, "bare.pt", "--quality", checkpoint=bare, quality="all")


def test_overflowing_codec_names_the_image(job, capsys, zoo, tmp_path):
    model = load_checkpoint(zoo / "tiny-q1.safetensors")
    with torch.no_grad():
        model.g_s[6].weight.fill_(3e38)
    torch.save(model.state_dict(), tmp_path / "huge.pt")
    refused(capsys, job, "1.png", "NaN or Inf", untouched=False, checkpoint=tmp_path / "huge.pt")
    assert not (tmp_path / "out" / "report.json").exists() and not list((tmp_path / "out").glob("q*/*"))


def _picture(width=64, height=64, mode="RGB"):
    channels = {"RGB": 3, "RGBA": 4, "CMYK": 4}.get(mode)
    shape = (height, width) + ((channels,) if channels else ())
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), mode)


def _write_bad(kind: str, folder: Path) -> Path:
    """A file that is refused, in the folder; returns its path."""
    path = folder / ("bad.tif" if kind in ("CMYK", "animated") else "bad.png")
    if kind == "16-bit":
        Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)).save(path)
    elif kind == "alpha":
        _picture(mode="RGBA").save(path)
    elif kind == "CMYK":
        _picture(mode="CMYK").save(path)
    elif kind == "animated":
        _picture().save(path, save_all=True, append_images=[_picture()])
    elif kind == "truncated":
        _picture().save(path)
        path.write_bytes(path.read_bytes()[:3000])
    elif kind == "no image":
        path.write_text("words")
    return path


@pytest.mark.parametrize("flag", ["eval", "calib"])
@pytest.mark.parametrize(
    "kind, word",
    [
        ("16-bit", "16 bits"),
        ("alpha", "RGB with alpha"),
        ("CMYK", "CMYK"),
        ("animated", "2 pictures"),
        ("truncated", "truncated or damaged"),
        ("no image", "not an image"),
    ],
)
def test_bad_image_is_one_line(job, capsys, tmp_path, flag, kind, word):
    path = _write_bad(kind, tmp_path / flag)
    refused(capsys, job, path.name, word, num_calib=3)


def test_folder_without_images_is_one_line(job, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(capsys, job, "holds no images", eval=tmp_path / "empty")
    refused(capsys, job, "holds no images", calib=tmp_path / "empty")


def test_calibration_image_in_the_evaluation_set_is_refused(job, capsys, tmp_path):
    (tmp_path / "calib" / "other.png").write_bytes((tmp_path / "eval" / "2.png").read_bytes())
    refused(capsys, job, "other.png", "2.png", "--calib")
    with pytest.raises(InputError, match="other.png"):
        sample_crops([tmp_path / "calib" / "other.png"], 1, 64, exclude=[tmp_path / "eval" / "2.png"])


def test_output_that_cannot_be_written_is_one_line(job, capsys, tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below", "/proc/licq"):
        refused(capsys, job, "cannot write", "--out", untouched=False, out=out)
    assert (tmp_path / "file").read_text() == "x"
