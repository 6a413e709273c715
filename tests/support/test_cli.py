import argparse
import errno
import io
import sys
import warnings

import pytest
import torch

from licq.support import cli
from licq.support.cli import ArgumentParser, explain, main_guard
from licq.support.determinism import seed_everything, set_threads, versions
from licq.support.errors import InputError, InputWarning
from licq.support.progress import progress


@pytest.fixture(autouse=True)
def _no_command_runs():
    """A test before may have parsed a command line in this process."""
    token = cli._parser.set(None)
    yield
    cli._parser.reset(token)


def raising(error):
    def function():
        raise error

    return function


@pytest.mark.parametrize(
    "error, words",
    [
        (InputError("a.png: is\ngrey; convert it"), "error: a.png: is grey; convert it"),
        (argparse.ArgumentError(None, "--w_bits takes 2 to 16"), "error: --w_bits takes 2 to 16"),
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (
            RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            ),
            "out of memory",
        ),
        (OSError(errno.ENAMETOOLONG, "File name too long", "/in/x"), "/in/x: File name too long"),
        (PermissionError(errno.EACCES, "Permission denied", "/in/x"), "/in/x: Permission denied"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/out/x"),
            "cannot write /out/x: No space left on device",
        ),
    ],
)
def test_users_error_is_one_line_and_status_2(error, words, capsys):
    assert main_guard(raising(error)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: ") and words in captured.err


def test_interrupt_says_how_to_continue(capsys):
    assert main_guard(raising(KeyboardInterrupt())) == 130
    error = capsys.readouterr().err
    assert "--resume" in error and error.count("\n") == 1


def test_broken_pipe_is_quiet(capfd, monkeypatch):
    with open("/dev/null", "w") as sink:  # the guard redirects this descriptor, not the test runner's
        monkeypatch.setattr(sys, "stdout", sink)
        assert main_guard(raising(BrokenPipeError())) == 141
    assert capfd.readouterr().err == ""


def test_status_of_the_body_is_returned():
    assert main_guard(lambda: None) == 0
    assert main_guard(lambda: 3) == 3


@pytest.mark.parametrize(
    "error", [ValueError("x"), RuntimeError("shape"), FileNotFoundError(errno.ENOENT, "no")]
)
def test_defects_keep_their_traceback(error):
    with pytest.raises(type(error)):
        main_guard(raising(error))


def test_bad_argument_is_one_line(capsys):
    parser = ArgumentParser(prog="main_ptq.py")
    parser.add_argument("--w_bits", type=int)
    assert main_guard(lambda: parser.parse_args(["--w_bits", "x"])) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--w_bits" in error


def test_progress_in_a_log_has_no_control_characters(monkeypatch):
    monkeypatch.setattr("licq.support.progress._LOG_INTERVAL", 0.0)
    log = io.StringIO()
    for _ in progress(range(3), desc="outer", stream=log):
        for _ in progress(range(2), desc="inner", stream=log, leave=False):
            pass
    assert "\r" not in log.getvalue() and "\x1b" not in log.getvalue()
    lines = log.getvalue().splitlines()
    assert all(lines) and all(line != following for line, following in zip(lines, lines[1:]))
    assert lines[-1].startswith("outer: 3/3")


def test_short_loop_leaves_no_line_in_a_log():
    log = io.StringIO()
    assert list(progress(range(3), stream=log)) == [0, 1, 2]
    assert log.getvalue() == ""


def test_progress_disabled_is_silent():
    log = io.StringIO()
    assert list(progress(range(3), enabled=False, stream=log)) == [0, 1, 2]
    assert log.getvalue() == ""


def test_seed_repeats_and_bad_numbers_are_refused():
    seed_everything(3)
    first = torch.rand(4)
    seed_everything(3)
    assert torch.equal(first, torch.rand(4))
    with pytest.raises(InputError, match="`seed`"):
        seed_everything(-1)
    with pytest.raises(InputError, match="`threads`"):
        set_threads(0)
    assert set_threads(None) == torch.get_num_threads()
    assert set(versions()) == {"licq", "python", "torch", "compressai", "timm", "numpy", "pillow"}


def parser_of(*flags: tuple) -> ArgumentParser:
    parser = ArgumentParser(prog="main_ptq.py", allow_abbrev=False)
    for *options, more in flags:
        parser.add_argument(*options, **more)
    return parser


MAIN = parser_of(
    ("--checkpoint", {}),
    ("--lambda", {"dest": "lmbda"}),
    ("--eval", {"dest": "data"}),
    ("--calib", {}),
    ("--strict_int8", {"action": "store_true"}),
    ("--set", {"dest": "knobs", "action": "append"}),
    ("-o", "--out", {}),
    ("inputs", {"metavar": "IMAGE", "nargs": "*"}),
)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("give `checkpoint` an existing file", "give --checkpoint an existing file"),
        ("`lmbda` 0.0 is not positive", "--lambda 0.0 is not positive"),
        ("no images in `images`", "no images in --eval"),  # of evaluate
        ("give other `files` or `exclude` none of them", "give other --calib or --eval none of them"),
        ("free some space in `folder`, or `out`", "free some space in --out, or --out"),
        ("say `lmbda=0.01`", "say --lambda 0.01"),
        ("pass `strict_int8=True`", "pass --strict_int8"),
        ("add `rounding=adaround`", "add --set rounding=adaround"),
        ("name `inputs`", "name IMAGE"),
        ("`split` 3 is too much", "`split` 3 is too much"),
        ("models: `float` or `ray start --head`", "models: `float` or `ray start --head`"),
    ],
)
def test_argument_in_a_message_becomes_the_flag(message, expected):
    assert MAIN.with_flags(message) == expected


def test_message_of_the_library_names_the_flags_of_the_command_that_runs(capsys):
    def command(parser: ArgumentParser, words: list[str]):
        parser.parse_args(words)
        raise InputError("no images; give `images`, or `rounding=ste`")

    other = parser_of(("--data", {}))
    for parser, expected in ((MAIN, "--eval, or --set rounding=ste"), (other, "--data, or `rounding=ste`")):
        assert main_guard(lambda parser=parser: command(parser, [])) == 2
        assert capsys.readouterr().err == f"error: no images; give {expected}\n"
    assert explain(InputError("give `images`")) == "give `images`"  # no command runs any more


def test_message_of_a_subcommand_names_its_own_flags(capsys):
    parser = ArgumentParser(prog="main_eval.py")
    commands = parser.add_subparsers(parser_class=ArgumentParser)
    commands.add_parser("encode").add_argument("-o", "--out")

    def command():
        parser.parse_args(["encode"])
        raise InputError("choose another `out`")

    assert main_guard(command) == 2
    assert capsys.readouterr().err == "error: choose another --out\n"


def test_out_of_memory_names_only_flags_that_there_are(capsys):
    def command():
        parser_of(("--tile", {}), ("--jobs", {})).parse_args([])
        raise MemoryError

    assert main_guard(command) == 2
    assert capsys.readouterr().err == "error: out of memory; use fewer --jobs or a smaller --tile\n"


def test_warning_for_the_user_is_one_line(capsys):
    def command():
        parser_of(("--arch", {})).parse_args([])
        warnings.warn("the codec of `arch` is left\nout", InputWarning, stacklevel=1)

    assert main_guard(command) == 0
    assert capsys.readouterr().err == "warning: the codec of --arch is left out\n"
