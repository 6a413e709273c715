"""Shell completion, written by shtab from the parsers of the commands."""

import argparse
from collections.abc import Iterator, Mapping
from typing import Any, cast

import shtab

from licq.models.registry import list_models
from licq.reconstruction.preset_files import list_presets
from licq.support.cli import ArgumentParser
from licq.sweeps.grid import list_sweeps

SHELLS = ("bash", "zsh", "tcsh")
_EPILOG = """\
bash    licq completion bash > ~/.local/share/bash-completion/completions/licq
zsh     licq completion zsh > ~/.zfunc/_licq        with `fpath+=~/.zfunc` before `compinit` in ~/.zshrc
tcsh    licq completion tcsh > ~/.licq.tcsh         with `source ~/.licq.tcsh` in ~/.tcshrc
"""

# Words for a flag's value, by `dest`; the flag takes others too, as files of the user's own.
_WORDS = {"arch": list_models, "preset": list_presets, "sweep": list_sweeps}
_FILES = {"FILE", "IMAGE", "PATH", "RUN", "SET", "WHAT"}  # metavars of flags that take a file or a folder
_FOLDERS = {"FOLDER"}


def build_parser(prog: str) -> ArgumentParser:
    """The parser of `licq completion`."""
    parser = ArgumentParser(
        prog=prog,
        description="Print what makes a shell complete licq's commands and flags.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help="bash, zsh or tcsh")
    return parser


def script(shell: str, commands: Mapping[str, str]) -> str:
    """The script that makes `shell` complete `licq`.

    Args:
        shell: one of `SHELLS`.
        commands: name -> what it does, in one line.
    """
    return shtab.complete(_command_parser(commands), shell=shell)


def _command_parser(commands: Mapping[str, str]) -> ArgumentParser:
    """One parser of all commands, with what their values complete to."""
    parsers = dict(_parsers())
    root = ArgumentParser(prog="licq", description="Post-training quantization of learned image codecs.")
    root.add_argument("--version", action="store_true", help="show the version")

    def built(prog: str, **_: Any) -> Any:  # stands for the class that argparse would make a parser of
        return parsers[prog.removeprefix("licq ")]

    chosen = root.add_subparsers(dest="command", parser_class=cast(Any, built))
    for name, what in commands.items():
        chosen.add_parser(name, help=what)
        parsers[name].description = what
        for action in parsers[name]._actions:
            _describe(action)
    return root


def _parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    import main_eval
    import main_ptq
    from licq.runs import coding, verify

    yield "quantize", main_ptq.build_parser("licq quantize")
    yield "evaluate", main_eval.build_parser("licq evaluate")
    yield "encode", coding.build_encode_parser("licq encode")
    yield "decode", coding.build_decode_parser("licq decode")
    yield "info", coding.build_info_parser("licq info")
    yield "verify", verify.build_verify_parser("licq verify")
    yield "completion", build_parser("licq completion")


def _describe(action: argparse.Action) -> None:
    """Say what the value of a flag completes to: an attribute that shtab reads."""
    if action.dest in _WORDS:
        action.choices = _WORDS[action.dest]()
    elif action.metavar in _FOLDERS:
        action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    elif action.metavar in _FILES:
        action.complete = shtab.FILE  # type: ignore[attr-defined]
