"""Images to .licq files and back, on the command line."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main_eval
from licq.codec.api import Codec
from licq.data.images import load_image, load_pixels
from licq.data.padding import crop_back, pad_to_multiple
from licq.quant.model import QuantModel
from licq.runs import coding
from licq.support.cli import main_guard


def command(*words) -> int:
    return main_guard(lambda: main_eval.main([str(word) for word in words]))


def test_images_to_files_and_back(saved, tmp_path, capsys):
    source = tmp_path / "eval" / "1.png"
    model = saved / "q3" / "model.safetensors"
    assert command("encode", source, "-o", tmp_path / "a.licq", "--model", saved, "--quality", 3) == 0
    assert f"{(tmp_path / 'a.licq').stat().st_size} bytes" in capsys.readouterr().out
    assert command("info", tmp_path / "a.licq") == 0
    assert "96x64" in capsys.readouterr().out
    # finds the model by itself
    assert command("decode", tmp_path / "a.licq", "-o", tmp_path / "a.png", "--model", saved) == 0
    decoded = load_pixels(tmp_path / "a.png")
    with torch.no_grad():
        padded, unpad = pad_to_multiple(load_image(source)[None])
        expected = crop_back(QuantModel.load(model)(padded)["x_hat"], unpad)[0]
    assert np.array_equal(decoded, (expected * 255).round().permute(1, 2, 0).to(torch.uint8).numpy())


def test_grey_palette_and_small_images(saved, tmp_path, capsys):
    """Grey comes back as grey pixels, the others as RGB; all can be measured."""
    model, folder = saved / "q1" / "model.safetensors", tmp_path / "kinds"
    folder.mkdir()
    image = Image.open(tmp_path / "eval" / "1.png")
    image.convert("L").save(folder / "grey.png")
    image.convert("1").save(folder / "bits.png")
    image.quantize(9).save(folder / "palette.png")
    image.crop((5, 5, 10, 8)).save(folder / "small.png")
    image.convert("L").crop((5, 5, 6, 6)).save(folder / "one.tif")
    assert command("encode", folder, "-o", tmp_path / "coded", "--model", model, "--quiet") == 0
    assert command("info", tmp_path / "coded" / "grey.licq") == 0
    assert "grey.licq: 96x64 grey, model" in capsys.readouterr().out
    assert command("decode", tmp_path / "coded", "-o", tmp_path / "back", "--model", saved, "--quiet") == 0
    back = {path.stem: Image.open(path) for path in (tmp_path / "back").iterdir()}
    assert {name: (picture.mode, picture.size) for name, picture in back.items()} == {
        "grey": ("L", (96, 64)),
        "bits": ("L", (96, 64)),
        "palette": ("RGB", (96, 64)),
        "small": ("RGB", (5, 3)),
        "one": ("L", (1, 1)),
    }
    colour = codec_pixels(model, load_pixels(folder / "grey.png"))
    assert np.array_equal(np.asarray(back["grey"]), (colour.sum(2, dtype=np.int64) + 1) // 3)
    line = ("--model", model, "--data", folder, "--real", "--out", tmp_path / "measured", "--quiet")
    assert command(*line) == 0


def codec_pixels(model: Path, pixels: np.ndarray) -> np.ndarray:
    codec = Codec.load(model)
    return codec.decode(codec.encode(torch.from_numpy(pixels).permute(2, 0, 1))).permute(1, 2, 0).numpy()


def test_folders_of_images(saved, tmp_path, capsys):
    model = saved / "q1" / "model.safetensors"
    assert command("encode", tmp_path / "eval", "-o", tmp_path / "coded", "--model", model, "--quiet") == 0
    assert sorted(path.name for path in (tmp_path / "coded").iterdir()) == ["1.licq", "2.licq"]
    assert command("decode", tmp_path / "coded", "-o", tmp_path / "back", "--model", saved, "--quiet") == 0
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == ["1.png", "2.png"]
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_several_jobs_write_the_files_of_one(saved, tmp_path, capsys):
    model = saved / "q1" / "model.safetensors"
    for jobs, tile, status in ((1, 0, 0), (2, 64, 2)):
        if jobs == 2:  # one that cannot be read does not stop the others
            (tmp_path / "eval" / "3.png").write_bytes(b"nothing")
            capsys.readouterr()
        assert (
            command(
                "encode",
                tmp_path / "eval",
                "-o",
                tmp_path / f"coded{jobs}",
                "--model",
                model,
                "--jobs",
                jobs,
                "--tile",
                tile,
                "--quiet",
            )
            == status
        )
    files = {
        jobs: [path.read_bytes() for path in sorted((tmp_path / f"coded{jobs}").iterdir())] for jobs in (1, 2)
    }
    assert len(files[1]) == 2 and files[1] == files[2]
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and "3.png" in printed.err and printed.out == ""
    assert sorted(path.name for path in (tmp_path / "coded2").iterdir()) == ["1.licq", "2.licq"]


def test_what_cannot_be_coded_is_one_line(saved, tmp_path, capsys):
    image = tmp_path / "eval" / "1.png"
    assert command("encode", image, "-o", tmp_path / "a.licq", "--model", saved, "--quality", 1) == 0
    capsys.readouterr()
    bad = tmp_path / "bad.licq"
    bad.write_bytes((tmp_path / "a.licq").read_bytes()[:-1])
    wrong = [
        (("encode", image, "--model", saved), "--quality"),
        (("encode", image, "--model", saved, "--quality", 2), "qualities 1, 3"),
        (("encode", image, "--model", tmp_path / "none"), "no quantized model"),
        (("encode", tmp_path / "none.png", "--model", saved, "--quality", 1), "no such file"),
        (
            ("encode", tmp_path / "a.licq", "--model", saved, "--quality", 1, "-o", tmp_path / "b.licq"),
            "not an image",
        ),
        (("decode", bad, "--model", saved), "damaged"),
        (
            ("decode", tmp_path / "a.licq", "--model", saved / "q3" / "model.safetensors"),
            "written by the model",
        ),
        (("decode", tmp_path / "a.licq", "-o", tmp_path / "a.jpg", "--model", saved), "without loss"),
        (("decode", image, "--model", saved, "-o", tmp_path / "c.png"), "no .licq file"),
        (("info", image), "no .licq file"),
    ]
    before = sorted(tmp_path.iterdir())
    for line, expected in wrong:
        assert command(*line) == 2
        printed = capsys.readouterr()
        assert printed.err.count("\n") == 1 and expected in printed.err and printed.out == "", line
    assert sorted(tmp_path.iterdir()) == before


def test_pixels_that_a_viewer_would_turn_are_told_once(saved, tmp_path, capsys):
    image, exif = Image.open(tmp_path / "eval" / "1.png"), Image.Exif()
    exif[0x0112] = 6
    for name in ("a.jpg", "b.jpg"):
        image.save(tmp_path / name, exif=exif)
    model = saved / "q1" / "model.safetensors"
    assert (
        command(
            "encode",
            tmp_path / "eval" / "2.png",
            tmp_path / "a.jpg",
            tmp_path / "b.jpg",
            "-o",
            tmp_path / "coded",
            "--model",
            model,
            "--quiet",
        )
        == 0
    )
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "a.jpg and 1 more" in told and "EXIF orientation" in told


def test_paths_that_cannot_be_read_are_one_line(tmp_path, capsys, monkeypatch):
    image, long = tmp_path / "eval" / "1.png", tmp_path / ("x" * 300)
    image.parent.mkdir(exist_ok=True)
    image.write_bytes(b"")
    for line in (
        ("encode", long, "--model", tmp_path),
        ("encode", image, "--model", long),
        ("encode", image, "-o", long, "--model", tmp_path),
        ("decode", long, "--model", tmp_path),
        ("info", long),
        ("info", "~nobody-of-this-name/a.licq"),
    ):
        assert command(*line) == 2
        assert capsys.readouterr().err.count("\n") == 1, line

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", denied)
    assert command("info", tmp_path) == 2
    assert "Permission denied" in capsys.readouterr().err


def test_many_inputs_and_hidden_ones(tmp_path):
    names = [f"{number}.licq" for number in range(3000)]
    for name in (*names, ".left.licq"):
        (tmp_path / name).touch()
    start = time.process_time()
    assert len(coding.jobs([str(tmp_path)], str(tmp_path / "out"), frozenset({".licq"}), ".png")) == len(
        names
    )
    assert time.process_time() - start < 2  # comparing all with all took minutes for some ten thousand
