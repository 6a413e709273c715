"""Help that fits a screen, and flags that every command line accepts."""

import pytest

import main_eval
import main_ptq
from licq.runs import coding, verify
from licq.support.options import ScreenParser

SCREEN = 46  # lines, at 100 columns


@pytest.fixture(autouse=True)
def hundred_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


@pytest.mark.parametrize("build", [main_ptq.build_parser, main_eval.build_parser])
def test_help_fits_a_screen_and_help_all_shows_every_flag(build, capsys):
    parser = build()
    texts = {}
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit) as leaving:
            parser.parse_args([flag])
        assert leaving.value.code == 0
        texts[flag] = capsys.readouterr().out
    lines = texts["--help"].splitlines()
    assert len(lines) <= SCREEN and max(map(len, lines)) <= 100
    flags = [option for action in parser._actions for option in action.option_strings]
    assert all(option in texts["--help_all"] for option in flags)
    assert "--threads" not in texts["--help"] and "--help_all" in texts["--help"]


@pytest.mark.parametrize(
    "build",
    [
        coding.build_encode_parser,
        coding.build_decode_parser,
        coding.build_info_parser,
        verify.build_verify_parser,
    ],
)
def test_help_of_a_subcommand_fits_a_screen(build):
    assert len(build().format_help().splitlines()) <= SCREEN


def test_flags_that_help_leaves_out_are_accepted():
    parser = ScreenParser("tool", "Does something.", "See also.", "More of it.")
    parser.add_argument_group("usual").add_argument("--often", type=int)
    parser.add_rare_group("seldom").add_argument("--rarely", type=int)
    args = parser.parse_args(["--rarely", "3", "--often", "4"])
    assert (args.rarely, args.often) == (3, 4)
    short, whole = parser.format_help(), parser.format_help(everything=True)
    assert "--often" in short and "--rarely" not in short and "See also." in short and "More" not in short
    assert "--rarely" in whole and whole.index("See also.") < whole.index("More of it.")
    assert parser.format_help() == short


def test_every_command_is_called_by_the_name_that_the_user_types():
    assert main_ptq.build_parser("licq quantize").format_help().startswith("usage: licq quantize [options]")
    text = main_eval.build_parser("licq evaluate").format_help()
    assert "licq encode | decode | info" in text and "main_eval" not in text
    assert "main_eval" not in main_ptq.build_parser("licq quantize").format_help()
    assert coding.build_encode_parser("licq encode").format_help().startswith("usage: licq encode ")
