"""The console script `licq`: the two scripts' commands under one name, and shell completion."""

import sys
from collections.abc import Sequence

from licq.support.cli import main_guard
from licq.support.errors import InputError
from licq.support.version import __version__

# The work is imported by the command that does it: `licq --help` answers at once.

COMMANDS = {
    "quantize": "quantize trained codecs, measure what that costs, write a report; also sweeps of such runs",
    "evaluate": "measure quantized codecs beside the float ones they were made from",
    "encode": "write images as .licq files",
    "decode": "write the images of .licq files as PNG",
    "info": "say what .licq files hold",
    "verify": "does every machine decode the same?",
    "completion": "print what makes bash, zsh or tcsh complete these commands and their flags",
}
HELP = f"""\
usage: licq COMMAND ...

Post-training quantization of learned image codecs: integer-exact, rate-distortion-optimized.

commands:
{chr(10).join(f"  {name:<13} {what}" for name, what in COMMANDS.items())}

options:
  -h, --help    show this help; licq COMMAND --help shows a command's own
  --version     show the version

  licq quantize --arch lu2022 --w_bits 8 --a_bits 8 --out runs/first
  licq evaluate --model runs/first --data kodak
  licq encode IMAGE -o FILE.licq --model runs/first --quality 5
  licq decode FILE.licq -o IMAGE.png --model runs/first

In a checkout that is not installed `python main_ptq.py` is `licq quantize`, `python main_eval.py` the others.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `licq`; returns the exit status (0 done, 2 bad arguments or input, 130 interrupted)."""
    words = list(sys.argv[1:] if argv is None else argv)
    return main_guard(lambda: _run(words))


def _run(words: list[str]) -> int:
    command, rest = (words[0], words[1:]) if words else ("--help", [])
    if command in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if command == "--version":
        print(f"licq {__version__}")
        return 0
    if command not in COMMANDS:
        raise InputError(f"licq has no command {command!r}; choose one of {', '.join(COMMANDS)}")
    if command == "completion":
        from licq import completion

        print(completion.script(completion.build_parser("licq completion").parse_args(rest).shell, COMMANDS))
        return 0
    if command == "quantize":
        import main_ptq

        return main_ptq.main(rest, prog="licq quantize")
    import main_eval

    if command == "evaluate":
        return main_eval.main(rest, prog="licq evaluate")
    return main_eval.main(words, prog="licq")
