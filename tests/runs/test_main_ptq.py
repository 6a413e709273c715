"""main_ptq.py end to end, on codecs and images so small that a run takes a second or two."""

import subprocess
import sys
from pathlib import Path

import main_ptq
from licq.models import registry
from licq.models.registry import LAMBDAS, create_model
from licq.quant.config import SIMULATED
from licq.reconstruction.config import LOSSES, UNITS
from licq.runs.float_models import find_float_models
from licq.runs.inputs import evaluation_set
from licq.support import options
from tests.main_jobs import ARCH, contents, report_of, run

ROOT = Path(main_ptq.__file__).parent


def test_run_writes_the_report_and_the_models(job, capsys, tmp_path, blank_figures):
    blank_figures.undo()  # figures are drawn
    assert run(job, quality="1,3") == 0
    printed = capsys.readouterr()
    assert (
        printed.err == ""
        and "BD-rate" in printed.out
        and "bpp of written and decoded bitstreams (float: estimated)" in printed.out
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
    assert (
        report["bpp_source"] == "bitstream" and report["kept_in_float"] == [] and report["left_alone"] == {}
    )
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


def test_a_simulated_method_has_a_report_that_says_so_and_no_files(job, capsys):
    assert run(job, preset="rdo-ptq", loss=None, iters="1") == 0
    folder, report = Path(job["--out"]), report_of(job)
    assert report["bpp_source"] == "estimate" and report["left_alone"] == {"the codec": SIMULATED}
    assert SIMULATED in (folder / "report.md").read_text() and SIMULATED in capsys.readouterr().out


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
    built_in = [name for names in registry._BUILT_IN.values() for name in names]  # other tests load plug-ins
    assert all(name in text for name in built_in)


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
