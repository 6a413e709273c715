"""main_eval.py on models that main_ptq.py has saved."""

import json

import pytest

import main_eval
from licq.models.checkpoints import load_checkpoint, save_checkpoint
from licq.support.cli import main_guard
from tests.main_jobs import ARCH, one_line, report_of, run


def evaluate(*words) -> int:
    """The exit status of main_eval.py."""
    return main_guard(lambda: main_eval.main(["--quiet", "--device", "cpu", *map(str, words)]))


def read(folder) -> dict:
    return json.loads((folder / "report.json").read_text())


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
    words = ["--model", saved, "--data", tmp_path / "eval", "--out", tmp_path / "s", "--threads", 1]
    assert evaluate(*words, "--estimate", "--no-anchors") == 0
    assert "estimated from likelihoods" in capsys.readouterr().out
    estimated = read(tmp_path / "s")
    report = read(tmp_path / "e")
    assert "anchors" not in estimated and "no_files" not in estimated["points"][0]
    assert estimated["bd_rate_psnr"] == pytest.approx(report["bd_rate_psnr"])
    assert report["bpp_source"] == "bitstream" and "bd_rate_psnr_files" not in estimated
    if report["bd_rate_psnr_files"] is None:  # two points of a random codec need not be a curve
        assert report["bd_rate_notes"]["bd_rate_psnr_files"]
    else:
        assert f"against the estimate: {report['bd_rate_psnr_files']:+.3f}%" in printed
    for point, before in zip(report["points"], estimated["points"], strict=True):
        quant = point["quant"]
        assert quant["bpp_estimated"] == pytest.approx(before["quant"]["bpp"], rel=1e-6)
        assert quant["psnr"] == before["quant"]["psnr"]
        assert point["delta_j_percent"] == pytest.approx(before["delta_j_percent"], abs=1e-4)
        whole_bytes = quant["bpp"] * 96 * 64 / 8
        assert whole_bytes == pytest.approx(round(2 * whole_bytes) / 2, abs=1e-6)  # a mean of two images
        # head and last bytes on one side; on the other outliers, which the estimate's smallest likelihood
        # makes dearer than an escape
        assert -46 < (quant["bpp"] - quant["bpp_estimated"]) * 96 * 64 / 8 < 34


def test_an_interrupted_command_says_how_to_go_on():
    for word in ("encode", "decode", "info", "verify"):
        assert "--resume" not in main_eval.after_interrupt([word, "x"])
    assert "--resume" in main_eval.after_interrupt(
        ["--model", "encode"]
    ) and "--resume" in main_eval.after_interrupt([])
