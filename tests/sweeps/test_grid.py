"""Sweep files become command lines, or are refused in one line before anything runs."""

import pytest

import main_ptq
from licq.reconstruction.config import list_presets
from licq.support.errors import InputError
from licq.sweeps.grid import list_sweeps, load_sweep

PARSER = main_ptq.build_parser()


@pytest.fixture
def sweep(tmp_path):
    """A function that reads a sweep from its content."""

    def read(content: str, *changes: str):
        (tmp_path / "mine.yaml").write_text(content)
        return load_sweep(str(tmp_path / "mine.yaml"), PARSER, changes)

    return read


METHODS = """
title: Two methods
flags: {arch: tic, no-baseline: true, strict_int8: false, quality: [1, 3], set: {joint_iters: 4}}
grid:
  method:
    - {name: Nearest!, preset: nearest}
    - {preset: licq, loss: mse, set: {learn: [range_w, bias], alternate: false}}
  w_bits: [8, 4]
seeds: [0, 1]
table: {rows: method}
plot: {x: w_bits, y: bd_rate_psnr, lines: method}
"""


def test_a_run_for_every_combination(sweep):
    read = sweep(METHODS)
    assert len(read.runs) == 8 and len({run.name for run in read.runs}) == 8
    assert read.runs[0].name == "Nearest_w_bits8_seed0"
    assert " ".join(read.runs[0].words) == (
        "--arch tic --no-baseline --quality 1,3 --preset nearest --w_bits 8 --seed 0 --set joint_iters=4"
    )
    last = PARSER.parse_args(read.runs[-1].words)
    assert (last.preset, last.loss, last.w_bits, last.seed, last.baseline, last.strict_int8) == (
        "licq",
        "mse",
        4,
        1,
        False,
        False,
    )
    config = main_ptq.build_config(last).reconstruction
    assert (config.learn, config.alternate, config.joint_iters) == (("range_w", "bias"), False, 4)
    assert read.rows == ("method",) and read.columns == ("w_bits",) and read.title == "Two methods"


def test_the_command_line_changes_every_run(sweep):
    read = sweep(
        METHODS,
        "--w_bits",
        "6",
        "--arch=lu2022",
        "--set",
        "joint_iters=9",
        "--quality",
        "1",
        "2",
        "--seed",
        "5",
        "--strict_int8",
    )
    assert [run.name for run in read.runs][0] == "Nearest" and len(read.runs) == 2
    args = PARSER.parse_args(read.runs[0].words)
    assert (args.w_bits, args.arch, args.seed, args.knobs, args.quality, args.strict_int8) == (
        6,
        "lu2022",
        5,
        [("joint_iters", "9")],
        [[1], [2]],
        True,
    )
    assert read.axes["w_bits"] == ["6"] and read.axes["seed"] == ["5"]
    for words, expected in (
        (["--preset", "licq"], "--preset is what the sweep's method varies"),
        (["--set", "alternate=true"], "--set alternate is what"),
    ):
        with pytest.raises(InputError, match=expected):
            sweep(METHODS, *words)


def test_an_axis_may_be_a_knob(sweep):
    read = sweep("grid: {set.joint_iters: [0, 40], set.stress: [true, false]}")
    assert [run.name for run in read.runs][:2] == ["joint_iters0_stresstrue", "joint_iters0_stressfalse"]
    assert PARSER.parse_args(read.runs[1].words).knobs == [("joint_iters", "0"), ("stress", "false")]
    assert (
        read.rows == ("set.joint_iters",)
        and read.columns == ("set.stress",)
        and read.values == ("bd_rate_psnr", "delta_j_percent")
    )


@pytest.mark.parametrize(
    "content, expected",
    [
        ("- 1", "no mapping"),
        ("grid: {w_bits: [8}", "not a readable sweep"),
        ("gird: {}", "unknown key gird"),
        ("grid: {w_bit: [8]}", "w_bit is not a flag"),
        ("grid: {out: [a]}", "out is not a flag"),
        ("flags: {seed: 3}", "use `seeds`"),
        ("flags: {set: 3}", "no mapping"),
        ("grid: {w_bits: 8}", "no list"),
        ("grid: {w_bits: []}", "no list"),
        ("grid: {w_bits: [8, 8]}", "w_bits has 8 twice"),
        ("flags: {strict_int8: 8}", "true or false"),
        ("flags: {w_bits: true}", "takes a value"),
        ("grid: {a: [{w_bits: 8}], w_bits: [4]}", "both set w_bits"),
        ("grid: {eval: [x/a, x.a]}\ntable: {rows: evil}", "evil is not one of eval"),
        ("grid: {w_bits: [8]}\ntable: {value: psrn}", "psrn"),
        ("grid: {w_bits: [8]}\nplot: {x: bpp, y: bd_rate_psnr}", "plot: y"),
        ("grid: {w_bits: [8]}\nplot: {x: a_bits, y: psnr}", "plot: x"),
        ("grid: {a: [{name: x/, w_bits: 8}, {name: x, w_bits: 4}]}", "two runs would have the folder x"),
        ("gpu_share: 2", "gpu_share"),
        ("grid: {no: [8]}", "the name False.*quotes"),
        ("grid: {2026: [{w_bits: 8}]}", "the name 2026.*quotes"),
        ("2026: 3", "the name 2026.*quotes"),
        ("grid: {a: [{2: 8}]}", "the name 2.*quotes"),
        ("flags: {on: 1}", "the name True.*quotes"),
        ("grid: {w_bits: [2024-13-45]}", "not a readable sweep"),
    ],
)
def test_bad_file_is_one_line(sweep, content, expected):
    with pytest.raises(InputError, match=expected) as raised:
        sweep(content)
    assert "mine.yaml" in str(raised.value)


def test_unknown_sweep_names_those_there_are():
    with pytest.raises(InputError, match="choose `sweep` from bits, fig2, .*table1"):
        load_sweep("table9", PARSER)


def test_the_sweeps_that_were_promised_are_there():
    assert set(list_sweeps()) >= {
        "table1",
        "fig2",
        "fig4",
        "fig5",
        "fig6",
        "fig7",
        "w10a10",
        "mse_vs_rd",
        "units",
        "bits",
        "ms_ssim",
    }


@pytest.mark.parametrize("name", list_sweeps())
def test_shipped_sweep_is_made_of_runs_that_parse(name):
    if name == "fig2" and "--analyze" not in PARSER._option_string_actions:
        pytest.skip("main_ptq.py has no --analyze yet")
    missing = set()
    for run in load_sweep(name, PARSER).runs:
        args = PARSER.parse_args(run.words)
        if args.preset in list_presets():
            main_ptq.build_config(args)
        else:
            missing.add(args.preset)
    if missing:
        pytest.skip(f"presets that are not there yet: {', '.join(sorted(missing))}")
