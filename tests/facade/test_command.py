"""The console script `licq`."""

import shutil
import subprocess

import pytest

import main_eval
import main_ptq
from licq import completion
from licq.command import COMMANDS, HELP, main
from licq.support.version import __version__
from tests.main_jobs import one_line, words


def test_help_fits_a_screen_and_names_every_command(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert shown == HELP and len(shown.splitlines()) <= 24 and max(map(len, shown.splitlines())) <= 110
    assert main([]) == 0 and capsys.readouterr().out == HELP
    for command in COMMANDS:
        assert f"\n  {command} " in shown


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"licq {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_under_its_own_name(command, capsys):
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: licq {command} ")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["quantise"], "no command 'quantise'; choose one of quantize, evaluate"),
        (["quantize", "--w_bits", "99"], "argument --w_bits: 99 is out of range"),
        (["quantize", "--bits", "9"], "see licq quantize --help"),
        (["evaluate"], "see licq evaluate --help"),
        (["encode"], "see licq encode --help"),
        (["verify"], "see licq verify --help"),
        (["completion", "fish"], "invalid choice: 'fish'"),
    ],
)
def test_bad_words_are_one_line_and_status_2(given, expected, capsys):
    assert main(given) == 2
    one_line(capsys, expected)


def test_quantize_and_evaluate_are_the_scripts(monkeypatch):
    calls = []
    monkeypatch.setattr(main_ptq, "main", lambda argv, prog: calls.append(("ptq", argv, prog)))
    monkeypatch.setattr(main_eval, "main", lambda argv, prog: calls.append(("eval", argv, prog)))
    main(["quantize", "--arch", "tic"])
    main(["evaluate", "--model", "x"])
    main(["decode", "f.licq"])
    assert calls == [
        ("ptq", ["--arch", "tic"], "licq quantize"),
        ("eval", ["--model", "x"], "licq evaluate"),
        ("eval", ["decode", "f.licq"], "licq"),
    ]


def test_a_codec_is_quantized_and_an_image_coded(job, tmp_path, capsys):
    assert main(["quantize", *words(job)]) == 0
    image, out = tmp_path / "eval" / "1.png", tmp_path / "1.licq"
    model = ["--model", str(tmp_path / "out")]
    assert main(["encode", str(image), "-o", str(out), *model]) == 0
    assert main(["decode", str(out), "-o", str(tmp_path / "1.png"), *model]) == 0
    capsys.readouterr()
    assert main(["info", str(out)]) == 0
    assert "96x64" in capsys.readouterr().out


def complete(*given: str) -> set[str]:
    """What bash offers for the last of the words."""
    script = completion.script("bash", COMMANDS)
    shell = f"""{script}
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
    _shtab_licq licq "${{COMP_WORDS[$COMP_CWORD]}}"
    echo "${{COMPREPLY[*]}}"
    """
    done = subprocess.run(
        ["bash", "-c", shell, "bash", "licq", *given], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_bash_completes_commands_flags_and_their_values():
    assert complete("qu") == {"quantize"}
    assert complete("quantize", "--w_bi") == {"--w_bits"}
    assert complete("evaluate", "--rea") == {"--real"}
    assert complete("quantize", "--arch", "lu") == {"lu2022"}
    assert complete("quantize", "--preset", "rdo") == {"rdo-ptq", "rdo-ptq-integer", "rdo-ptq-public"}
    assert complete("quantize", "--loss", "rd") == {"rd", "rd_direct"}
    assert complete("completion", "z") == {"zsh"}


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_completion_holds_every_flag_and_is_valid(shell, tmp_path, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    flags = {
        option
        for parser in (main_ptq.build_parser(), main_eval.build_parser())
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--")
    }
    assert len(flags) > 30
    for flag in flags:
        assert flag.lstrip("-") in script, flag
    (tmp_path / "script").write_text(script)
    if shutil.which(shell):
        subprocess.run([shell, "-n", tmp_path / "script"], check=True)
