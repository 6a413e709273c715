"""main_eval.py on models that main_ptq.py has saved."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main_eval
from licq.data.images import load_image, load_pixels
from licq.data.padding import crop_back, pad_to_multiple
from licq.models.checkpoints import load_checkpoint, save_checkpoint
from licq.quant.model import QuantModel
from licq.runs import coding, verify
from licq.support.cli import main_guard
from licq.support.errors import InputError
from tests.main_jobs import ARCH, one_line, report_of, run


def evaluate(*words) -> int:
    """The exit status of main_eval.py."""
    return main_guard(lambda: main_eval.main(["--quiet", "--device", "cpu", *map(str, words)]))


def read(folder) -> dict:
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Where the first run of this file leaves its folder for the others."""
    return tmp_path_factory.mktemp("finished") / "out"


@pytest.fixture
def saved(job, finished, tmp_path, capsys):
    """The folder of a run with qualities 1 and 3."""
    if not finished.exists():
        assert run(job, quality="1,3", **{"no-baseline": True}) == 0
        shutil.copytree(tmp_path / "out", finished)
        capsys.readouterr()
    shutil.copytree(finished, tmp_path / "out", dirs_exist_ok=True)
    return tmp_path / "out"


def test_saved_models_give_the_numbers_of_the_run_that_saved_them(saved, job, tmp_path, capsys):
    assert evaluate("--model", saved, "--data", tmp_path / "eval") == 0
    printed = capsys.readouterr()
    assert printed.err == "" and "estimated" in printed.out and "BD-rate" in printed.out
    report, before = read(saved / "eval_eval"), report_of(job)
    for key in before.keys() - {"points", "config", "baseline"}:
        assert report[key] == before[key], key
    for point, other in zip(report["points"], before["points"], strict=True):
        for key in other.keys() - {"checkpoint", "history", "coverage"}:
            assert point[key] == other[key], key
    assert (saved / "eval_eval" / "rd.png").is_file() and "estimated" in (
        saved / "eval_eval" / "report.md"
    ).read_text()
    for quality in (1, 3):
        picture = f"q{quality}/crops.png"
        assert (saved / "eval_eval" / picture).read_bytes() == (saved / picture).read_bytes()
    assert "What it looks like" in (saved / "eval_eval" / "report.html").read_text()


def test_one_model_without_its_float_codec(saved, tmp_path):
    assert (
        evaluate(
            "--model",
            saved / "q3" / "model.safetensors",
            "--data",
            tmp_path / "eval",
            "--no-float",
            "--out",
            tmp_path / "e",
        )
        == 0
    )
    report = read(tmp_path / "e")
    assert [(point["quality"], point["fp32"]) for point in report["points"]] == [(3, None)]
    assert report["bd_rate_psnr"] is None and "not both evaluated" in report["bd_rate_notes"]["bd_rate_psnr"]
    assert (
        evaluate(
            "--model",
            saved,
            "--quality",
            1,
            "--data",
            tmp_path / "eval",
            "--no-float",
            "--out",
            tmp_path / "e",
        )
        == 0
    )
    assert [point["quality"] for point in read(tmp_path / "e")["points"]] == [1]


def test_float_codecs_alone(zoo, job, tmp_path, capsys):
    words = [
        "--model",
        "float",
        "--checkpoint",
        zoo / "tiny-q{quality}.safetensors",
        "--data",
        tmp_path / "eval",
        "--out",
        tmp_path / "e",
    ]
    assert evaluate(*words) == 0
    report = read(tmp_path / "e")
    assert report["arch"] == ARCH and {point["quality"] for point in report["points"]} == {1, 3}
    assert all(point["quant"] is None and point["fp32"]["bpp"] > 0 for point in report["points"])
    assert "W8A8" not in (tmp_path / "e" / "report.md").read_text() and "WNone" not in capsys.readouterr().out


def test_float_codec_that_has_moved_is_asked_for(saved, zoo, tmp_path, capsys):
    home = tmp_path / "moved"
    home.mkdir()
    try:
        (zoo / "tiny-q1.safetensors").rename(home / "tiny-q1.safetensors")
        assert evaluate("--model", saved / "q1" / "model.safetensors", "--data", tmp_path / "eval") == 2
        one_line(capsys, "tiny-q1.safetensors", "--checkpoint", "--no-float")
        words = ["--model", saved / "q1" / "model.safetensors", "--data", tmp_path / "eval", "--checkpoint"]
        assert evaluate(*words, home / "tiny-q1.safetensors") == 0
        assert read(saved / "eval_eval")["warnings"] == []
        assert evaluate(*words, zoo / "tiny-q3.safetensors") == 2  # of another quality
    finally:
        (home / "tiny-q1.safetensors").rename(zoo / "tiny-q1.safetensors")


def test_bad_input_is_one_line(saved, job, zoo, tmp_path, capsys):
    model = saved / "q1" / "model.safetensors"
    whole = model.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "flipped.safetensors").write_bytes(whole[:-9] + bytes([whole[-9] ^ 255]) + whole[-8:])
    (tmp_path / "nothing").mkdir()
    (tmp_path / "file").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    for words, expected in (
        (["--model", tmp_path / "nowhere"], ["no quantized model at"]),
        (["--model", tmp_path / "nothing"], ["holds no quantized model"]),
        (["--model", saved, "--quality", 2], ["of quality 2", "1, 3"]),
        (["--model", tmp_path / "cut.safetensors"], ["cut.safetensors"]),
        (["--model", tmp_path / "flipped.safetensors"], ["flipped.safetensors"]),
        (["--model", tmp_path / "file"], ["file"]),
        (["--model", zoo / "tiny-q1.safetensors"], ["main_ptq.py"]),
        (["--model", model, model], ["two models of quality 1"]),
        (["--model", "float", "--no-float"], ["nothing to evaluate"]),
        (["--model", "float", model], ["no quantized model at float"]),
        (["--model", model, "--arch", "lu2022"], ["--arch"]),
        (["--model", model, "--metric", "ms-ssim"], ["--metric ms-ssim", "made for, mse"]),
        (["--model", model, "--lambda", "0.01"], ["--lambda is for"]),
        (["--model", model, "--quality", 3], ["quality 1", "--quality"]),
        (["--model", model, "--pretrained", "--no-float"], ["--pretrained and --no-float"]),
        (["--model", model, "--data", "/nowhere"], ["/nowhere"]),
        (["--model", model, "--data", tmp_path / "nothing"], ["holds no images"]),
        (["--model", model, "--device", "abacus"], ["--device abacus"]),
        (["--model", model, "--threads", 0], ["--threads"]),
        (["--model", model, "--out", tmp_path / "file"], ["cannot write", "--out"]),
        ([], ["--model"]),
    ):
        assert evaluate("--data", tmp_path / "eval", *words) == 2, words
        one_line(capsys, *expected)
    assert sorted(tmp_path.rglob("*")) == before


def test_models_of_different_settings_are_no_curve(saved, job, tmp_path, capsys):
    assert run(job, quality=3, w_bits=6, out=tmp_path / "six") == 0
    capsys.readouterr()
    words = [saved / "q1" / "model.safetensors", tmp_path / "six" / "q3" / "model.safetensors"]
    assert evaluate("--model", *words, "--data", tmp_path / "eval") == 2
    one_line(capsys, "differ in config")


def test_float_checkpoint_of_another_codec_is_refused(saved, tmp_path, zoo, capsys):
    other = load_checkpoint(zoo / "tiny-q1.safetensors")
    save_checkpoint(
        other, tmp_path / "other.safetensors", {"arch": ARCH, "quality": 1, "lambda": 0.5, "metric": "mse"}
    )
    words = [
        "--model",
        saved / "q1" / "model.safetensors",
        "--data",
        tmp_path / "eval",
        "--checkpoint",
        tmp_path / "other.safetensors",
    ]
    assert evaluate(*words) == 2
    one_line(capsys, "lambda 0.5")


def test_real_rates_are_those_of_files_and_near_the_estimate(saved, tmp_path, capsys):
    assert (
        evaluate(
            "--model", saved, "--data", tmp_path / "eval", "--real", "--out", tmp_path / "e", "--threads", 1
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "bitstreams that were written and decoded" in printed + (tmp_path / "e" / "report.md").read_text()
    estimated = read(tmp_path / "out")
    report = read(tmp_path / "e")
    assert report["bpp_source"] == "bitstream" and "bd_rate_psnr_files" not in estimated
    if report["bd_rate_psnr_files"] is None:  # two points of a random codec need not be a curve
        assert report["bd_rate_notes"]["bd_rate_psnr_files"]
    else:
        assert f"against the estimate: {report['bd_rate_psnr_files']:+.3f}%" in printed
    for point, before in zip(report["points"], estimated["points"], strict=True):
        quant = point["quant"]
        assert quant["bpp_estimated"] == before["quant"]["bpp"] and quant["psnr"] == before["quant"]["psnr"]
        whole_bytes = quant["bpp"] * 96 * 64 / 8
        assert whole_bytes == pytest.approx(round(2 * whole_bytes) / 2, abs=1e-6)  # a mean of two images
        # head and last bytes on one side; on the other outliers, which the estimate's smallest likelihood
        # makes dearer than an escape
        assert -46 < (quant["bpp"] - quant["bpp_estimated"]) * 96 * 64 / 8 < 34


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


def test_folders_of_images(saved, tmp_path, capsys):
    model = saved / "q1" / "model.safetensors"
    assert command("encode", tmp_path / "eval", "-o", tmp_path / "coded", "--model", model, "--quiet") == 0
    assert sorted(path.name for path in (tmp_path / "coded").iterdir()) == ["1.licq", "2.licq"]
    assert command("decode", tmp_path / "coded", "-o", tmp_path / "back", "--model", saved, "--quiet") == 0
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == ["1.png", "2.png"]
    assert capsys.readouterr().out == ""


def test_several_jobs_write_the_files_of_one(saved, tmp_path, capsys):
    model = saved / "q1" / "model.safetensors"
    for jobs, tile in ((1, 0), (2, 64)):
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
            == 0
        )
    files = {
        jobs: [path.read_bytes() for path in sorted((tmp_path / f"coded{jobs}").iterdir())] for jobs in (1, 2)
    }
    assert len(files[1]) == 2 and files[1] == files[2]
    (tmp_path / "eval" / "3.png").write_bytes(b"nothing")
    assert (
        command(
            "encode", tmp_path / "eval", "-o", tmp_path / "coded2", "--model", model, "--jobs", 2, "--quiet"
        )
        == 2
    )
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


def test_an_interrupted_command_says_how_to_go_on():
    for word in ("encode", "decode", "info", "verify"):
        assert "--resume" not in main_eval.after_interrupt([word, "x"])
    assert "--resume" in main_eval.after_interrupt(
        ["--model", "encode"]
    ) and "--resume" in main_eval.after_interrupt([])


@pytest.mark.slow
def test_verify_finds_no_difference(saved, tmp_path, capsys):
    out = tmp_path / "table.md"
    status = command(
        "verify",
        "--model",
        saved,
        "--quality",
        1,
        "--data",
        tmp_path / "eval",
        "--images",
        1,
        "--out",
        out,
        "--quiet",
    )
    assert status == 0 and "reference kernels" in out.read_text()
    assert json.loads(out.with_suffix(".json").read_text())["1 thread"]["float"]


def test_verify_finds_the_model_or_the_rate_of_a_quality(monkeypatch):
    files = [Path(f"run/q{quality}/model.safetensors") for quality in (1, 3)]
    monkeypatch.setattr(verify, "_extra", lambda file: {})
    assert verify.model_at(files, None) == (files[0], None) and verify.model_at(files, 3) == (files[1], None)
    monkeypatch.setattr(verify, "_extra", lambda file: {"rates": {"2": 0.01, "5": 0.02}})
    assert verify.model_at(files[:1], None) == (files[0], 2) and verify.model_at(files[:1], 5) == (
        files[0],
        5,
    )
    for extra, quality in (({}, 2), ({"rates": {"2": 0.01}}, 3)):
        monkeypatch.setattr(verify, "_extra", lambda file, extra=extra: extra)
        with pytest.raises(InputError, match="--quality"):
            verify.model_at(files, quality)


def test_verify_counts_images_that_differ():
    def result(**hashes):
        return {"integer": [hashes], "float": []}

    base = result(symbols="a", indexes="b", pixels="c", decoded="c")
    same, other, failed = (
        dict(base),
        result(symbols="a", indexes="b", pixels="x", decoded="c"),
        result(symbols="a", indexes="b", pixels="c", decoded="the file is damaged"),
    )
    found = verify.compared(
        [base, same, other, failed, result(symbols="a", indexes="b", pixels="c")], "integer"
    )
    assert [sum(part.values()) for part in found] == [0, 0, 1, 1, 0] and found[2]["pixels"] == found[3][
        "decoded"
    ] == 1
    assert verify.compared([base, same], "float") == [None, None]
    inconsistent = result(symbols="a", indexes="b", pixels="c", decoded="d")
    assert verify.compared([inconsistent], "integer")[0]["decoded"] == 1
