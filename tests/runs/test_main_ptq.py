"""main_ptq.py end to end, on codecs and images so small that a run takes a second or two."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main_ptq
from licq.data.calibration import sample_crops
from licq.models.checkpoint_files import read_tensors
from licq.models.checkpoints import load_checkpoint
from licq.models.registry import LAMBDAS, create_model, list_models
from licq.reconstruction.config import LOSSES, UNITS
from licq.reconstruction.state import StateFolder
from licq.runs.float_models import find_float_models
from licq.runs.inputs import evaluation_set
from licq.support import options
from licq.support.errors import InputError
from tests.main_jobs import ARCH, contents, refused, report_of, run, without_times

ROOT = Path(main_ptq.__file__).parent


# ----------------------------------------------------------------------------------------------- what it does


def test_run_writes_the_report_and_the_models(job, capsys, tmp_path):
    assert run(job, quality="1,3") == 0
    printed = capsys.readouterr()
    assert (
        printed.err == ""
        and "BD-rate" in printed.out
        and "estimated" in printed.out
        and "plain" in printed.out
    )
    out = tmp_path / "out"
    assert set(contents(out)) == {
        "report.json",
        "report.md",
        "report.html",
        "rd.png",
        "run.json",
        *(f"compressai/{name}.json" for name in ("float", "quantized", "baseline")),
        *(
            f"q{quality}/{name}"
            for quality in (1, 3)
            for name in ("model.safetensors", "result.json", "crops.png")
        ),
    }
    report = report_of(job)
    assert (report["arch"], report["preset"], report["loss"], report["unit"]) == (ARCH, "licq", "rd", "block")
    assert (report["w_bits"], report["a_bits"], report["dataset"], report["images"]) == (8, 8, "eval", 2)
    assert report["bpp_source"] == "estimate" and report["kept_in_float"] == [] and report["left_alone"] == {}
    assert {"bd_rate_psnr", "bd_rate_ms_ssim", "versions", "anchors", "config"} <= report.keys()
    assert {point["quality"]: point["lambda"] for point in report["points"]} == {1: 0.0018, 3: 0.0067}
    for point in report["points"]:
        assert point["fp32"] != point["quant"] != point["baseline"]
        assert point["model_bytes"] == (out / f"q{point['quality']}" / "model.safetensors").stat().st_size
        assert point["calibration_seconds"] > 0 and point["peak_memory_mb"] > 0
        assert point["fp32_model_bytes"] == 4 * sum(
            p.numel() for p in create_model(ARCH, N=8, M=8).parameters()
        )
    assert "estimated" in (out / "report.md").read_text()


def test_baseline_can_be_left_out_and_added_later(job, capsys):
    assert run(job, **{"no-baseline": True}) == 0
    assert "baseline" not in report_of(job)["points"][0] and "plain" not in capsys.readouterr().out
    assert run(job, resume=True) == 0
    assert "baseline" in report_of(job)["points"][0]


def test_output_folder_is_named_after_the_method(job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(job, out=None, w_bits=6) == 0
    assert (tmp_path / "runs" / f"{ARCH}_w6a8_rd" / "report.json").is_file()


def test_preset_file_stands_for_the_loss_in_names(job, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("loss: mse\nrounding: nearest\nlearn: [range_a]\n")
    assert run(job, out=None, preset=tmp_path / "mine.yaml") == 0
    assert "W8A8 mine" in capsys.readouterr().out
    assert (tmp_path / "runs" / f"{ARCH}_w8a8_mine" / "report.json").is_file()


def test_kodak_is_the_default_where_it_is_found_and_photos_elsewhere(monkeypatch, tmp_path, make_image):
    dataset, remark = evaluation_set(None)
    assert dataset.name == "photos" and "kodak was not found" in remark
    for number in range(1, 25):
        make_image(f"kodim{number:02}.png", 16, 16, number, tmp_path / "data" / "kodak")
    monkeypatch.setenv("LICQ_DATA", str(tmp_path / "data"))
    dataset, remark = evaluation_set(None)
    assert (dataset.name, len(dataset), remark) == ("kodak", 24, None)


def test_few_calibration_images_are_remarked(job, capsys):
    assert run(job, num_calib=5) == 0
    remark = "5 calibration images were asked for, and there are 2: they are used again, at other places"
    assert remark in capsys.readouterr().out
    assert report_of(job)["warnings"] == [remark]


def test_a_unit_that_is_not_reconstructed_is_remarked(job, capsys):
    assert run(job, iters=0, unit="layer") == 0
    assert "--unit layer has no effect" in capsys.readouterr().out
    assert any("--unit layer" in warning for warning in report_of(job)["warnings"])
    assert run(job, iters=1, unit="layer") == 0
    assert "no effect" not in capsys.readouterr().out


def test_quality_is_read_from_the_file(zoo):
    models = find_float_models(checkpoint=str(zoo / "tiny-q3.safetensors"))
    assert [(model.arch, model.quality, model.lmbda) for model in models] == [(ARCH, 3, 0.0067)]
    models = find_float_models(checkpoint=str(zoo / "tiny-q{quality}.safetensors"), lmbdas=[0.5, 0.7])
    assert [(model.quality, model.lmbda) for model in models] == [(1, 0.5), (3, 0.7)]


def test_arguments_are_checked_without_torch():
    code = (
        "import sys, main_ptq, main_eval\n"
        "main_ptq.build_parser().parse_args(['--quality', '1,3', '5', '--w_bits', '4'])\n"
        "main_eval.build_parser().parse_args(['--model', 'x'])\n"
        "assert 'torch' not in sys.modules and 'compressai' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


def test_script_ends_with_status_and_one_line(tmp_path):
    def script(*arguments):
        return subprocess.run(
            [sys.executable, "main_ptq.py", *arguments], cwd=ROOT, capture_output=True, text=True
        )

    sweep = script("--sweep", "nowhere", "--out", str(tmp_path / "out"))
    assert sweep.returncode == 2 and "table1" in sweep.stderr and sweep.stderr.count("\n") == 1
    shown = script("--help")
    assert shown.returncode == 0 and "(default: 10)" in shown.stdout and shown.stderr == ""


def test_choices_are_those_of_the_library():
    assert (options.LOSSES, options.UNITS, set(options.METRICS)) == (LOSSES, UNITS, set(LAMBDAS))
    text = "".join(
        main_ptq.build_parser().format_help(everything=True).split()
    )  # argparse breaks lines at hyphens
    assert all(name in text for name in list_models())


def test_knobs_are_converted_to_the_type_of_their_default():
    args = main_ptq.build_parser().parse_args(
        [
            "--set",
            "lr_range=1e-3",
            "--set",
            "learn=range_a, bias",
            "--set",
            "alternate=no",
            "--set",
            "carrier_bits=12",
            "--seed",
            "7",
            "--bias_bits",
            "8",
        ]
    )
    config = main_ptq.build_config(args)
    assert config.reconstruction.lr_range == 1e-3 and config.reconstruction.learn == ("range_a", "bias")
    assert config.reconstruction.alternate is False and config.quant.carrier_bits == 12
    assert config.reconstruction.seed == 7 and config.quant.bias_bits == 8


# -------------------------------------------------------------------------------------------------- bad input


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
        ({"workers": 2}, ["--workers", "--sweep"]),
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
    channels = {"RGB": 3, "CMYK": 4}.get(mode)
    shape = (height, width) + ((channels,) if channels else ())
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), mode)


def _write_bad(kind: str, folder: Path) -> Path:
    """A file that is refused, in the folder; returns its path."""
    path = folder / ("bad.tif" if kind in ("CMYK", "animated") else "bad.png")
    if kind == "1-pixel":
        _picture(1, 1).save(path)
    elif kind == "16-bit":
        Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)).save(path)
    elif kind == "grey":
        _picture(mode="L").save(path)
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
        ("1-pixel", "smaller than 8 pixels"),
        ("16-bit", "16 bits"),
        ("grey", "grey"),
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


# ---------------------------------------------------------------------------------------- stop, go on, repeat


LEARNING = {"quality": "1,3", "unit": "stage", "iters": 2, "set": "joint_iters=2"}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return tmp_path_factory.mktemp("reference") / "out"


@pytest.fixture
def finished(job, reference):
    """The report of a run that was never stopped; its folder is `reference`."""
    if not reference.exists():
        assert run(job, out=reference, **LEARNING) == 0
    return without_times(json.loads((reference / "report.json").read_text()))


def _stop_after(monkeypatch, owner, name: str, count: int):
    """Interrupt the `count`-th call of a function, counted from 1, after it has run."""
    original, calls = getattr(owner, name), []

    def stopping(*args, **kwargs):
        calls.append(1)
        value = original(*args, **kwargs)
        if len(calls) == count:
            raise KeyboardInterrupt
        return value

    monkeypatch.setattr(owner, name, stopping)


def test_run_stopped_anywhere_and_resumed_gives_the_same_report(
    job, finished, reference, monkeypatch, capsys, tmp_path
):
    import licq.evaluation.evaluate

    stops = [
        (licq.evaluation.evaluate, "evaluate", 1),
        (licq.evaluation.evaluate, "evaluate", 3),
        (StateFolder, "save", 1),
        (StateFolder, "save", 2),
        (licq.evaluation.evaluate, "evaluate", 1),
    ]
    for owner, name, count in stops:  # every attempt goes on where the one before was stopped
        with monkeypatch.context() as patch:
            _stop_after(patch, owner, name, count)
            assert run(job, resume=True, **LEARNING) == 130
        assert "--resume" in capsys.readouterr().err and not (tmp_path / "out" / "report.json").exists()
    assert run(job, resume=True, **LEARNING) == 0
    assert without_times(report_of(job)) == finished
    assert not list((tmp_path / "out").rglob("units")) and not list((tmp_path / "out").rglob("partial.json"))
    for quality in (1, 3):
        ours, theirs = (
            read_tensors(folder / f"q{quality}" / "model.safetensors")[0]
            for folder in (tmp_path / "out", reference)
        )
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    before = contents(tmp_path / "out")
    assert run(job, resume=True, **LEARNING) == 0  # all finished: nothing is computed again
    assert contents(tmp_path / "out") == before


def test_same_seed_gives_the_same_report_and_another_does_not(job, finished):
    assert run(job, **LEARNING) == 0
    assert without_times(report_of(job)) == finished
    assert run(job, seed=1, **LEARNING) == 0
    other = without_times(report_of(job))
    assert [point["fp32"] for point in other["points"]] == [point["fp32"] for point in finished["points"]]
    assert [point["quant"] for point in other["points"]] != [point["quant"] for point in finished["points"]]


def test_resuming_with_other_settings_is_refused(job, capsys, tmp_path, make_image):
    assert run(job) == 0
    before = contents(tmp_path / "out")
    capsys.readouterr()
    for changes, expected in (
        ({"w_bits": 6}, "w_bits 8, now 6"),
        ({"seed": 4}, "seed 0, now 4"),
        ({"set": "batch=1"}, "batch"),
        ({"num_calib": 3}, "num_calib 2, now 3"),
        ({"crops_per_image": 2}, "crops_per_image 1, now 2"),
    ):
        refused(capsys, job, expected, "--resume", "--out", untouched=False, resume=True, **changes)
    make_image("3.png", 64, 64, 3, tmp_path / "eval")
    refused(capsys, job, "evaluation.images 2, now 3", untouched=False, resume=True)
    assert contents(tmp_path / "out") == before


def test_new_run_in_a_used_folder_replaces_results_only_when_it_has_its_own(job, tmp_path, monkeypatch):
    import licq.evaluation.evaluate

    assert run(job, quality="1,3") == 0
    old = contents(tmp_path / "out")
    with monkeypatch.context() as patch:
        _stop_after(patch, licq.evaluation.evaluate, "evaluate", 5)  # the second quality's plain baseline
        assert run(job, quality="1,3", w_bits=6) == 130
    now = contents(tmp_path / "out")
    assert all(
        now[name] == old[name] for name in ("report.json", "rd.png", "q3/model.safetensors", "q3/result.json")
    )
    assert now["q1/result.json"] != old["q1/result.json"]
    assert run(job, quality="1,3", w_bits=6, resume=True) == 0
    assert report_of(job)["w_bits"] == 6
    assert all(
        json.loads((tmp_path / "out" / f"q{q}" / "result.json").read_text())["settings"]["config"]["quant"][
            "w_bits"
        ]
        == 6
        for q in (1, 3)
    )


def test_curves_of_other_codecs_are_measured_once(job, tmp_path, monkeypatch):
    from licq.evaluation import anchors
    from licq.runs import results

    curves, kept = [], tmp_path / "out" / "measured"
    monkeypatch.setattr(
        anchors,
        "classical_points",
        lambda *args, whole=anchors.classical_points: curves.append(1) or whole(*args),
    )
    with monkeypatch.context() as patch:
        patch.setattr(results, "write_report", _interrupt)
        assert run(job) == 130
    assert len(curves) == 1 and len(list(kept.iterdir())) == 2  # the float codec's evaluation, and the curves
    assert run(job, resume=True) == 0
    assert len(curves) == 1 and not kept.exists()


def _interrupt(*_) -> None:
    raise KeyboardInterrupt


def test_qualities_of_several_commands_come_together(job):
    assert run(job, quality=1) == 0 and run(job, quality=3, resume=True) == 0
    assert [point["quality"] for point in report_of(job)["points"]] == [3]
    assert run(job, quality="3,1", resume=True) == 0
    assert {point["quality"] for point in report_of(job)["points"]} == {1, 3}


def test_deleted_model_is_made_again(job, tmp_path):
    assert run(job) == 0
    model = tmp_path / "out" / "q1" / "model.safetensors"
    before = read_tensors(model)[0]
    model.unlink()
    assert run(job, resume=True) == 0
    after = read_tensors(model)[0]
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_deleted_crops_are_made_again(job, tmp_path):
    assert run(job) == 0
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "q1" / "crops.png").unlink()
    result = json.loads(before["q1/result.json"])
    del result["parts"]["crops"]  # as of a run by a version that made none
    (tmp_path / "out" / "q1" / "result.json").write_text(json.dumps(result))
    assert run(job, resume=True) == 0
    assert contents(tmp_path / "out") == before and b"What it looks like" in before["report.html"]
