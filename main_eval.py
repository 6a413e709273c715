"""Evaluate quantized image codecs that main_ptq.py has saved, beside the float ones they were made from; code
images with them.

python main_eval.py --model runs/lu2022_w8a8_rd --data kodak
python main_eval.py encode IMAGE -o FILE.licq --model runs/lu2022_w8a8_rd --quality 5
python main_eval.py decode FILE.licq -o IMAGE.png --model runs/lu2022_w8a8_rd
"""

import sys
from collections.abc import Sequence

from licq.runs import coding, verify
from licq.runs.flags import build_evaluate_parser
from licq.support.cli import main_guard
from licq.support.options import ScreenParser, merge_qualities

# torch takes seconds to import: what needs it is imported after the arguments have been checked.

SUBCOMMANDS = {**coding.COMMANDS, "verify": verify.main}


def build_parser(prog: str = "main_eval.py") -> ScreenParser:
    """The flags of an evaluation; those of a subcommand are in `runs.coding` and `runs.verify`."""
    return build_evaluate_parser(prog)


def main(argv: list[str] | None = None, prog: str = "main_eval.py") -> int:
    """Run the command line `argv` (default: that of the process) and return the exit status.

    Raises:
        InputError: bad arguments or input.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in SUBCOMMANDS:
        return SUBCOMMANDS[argv[0]](argv[1:], f"{prog} {argv[0]}")
    args = build_parser(prog).parse_args(argv)
    args.quality = merge_qualities(args.quality)

    from licq.report.text import render_summary
    from licq.runs.evaluation import finish_evaluation, prepare_evaluation, write_part

    run = prepare_evaluation(args)
    if args.shard:
        write_part(run)
        return 0
    report = finish_evaluation(run, argv)
    print(render_summary(report))
    print(f"\nreport:  {run.results_folder / 'report.html'}, report.md, report.json, rd.png")
    for warning in run.warnings:
        print(f"note: {warning}")
    return 0


def after_interrupt(argv: Sequence[str]) -> str:
    """How to go on after an interrupt of this command line."""
    if argv and argv[0] in SUBCOMMANDS:
        return "run the same command again"
    return "the same command with --resume goes on after the last finished part, of 64 images at most"


if __name__ == "__main__":
    sys.exit(main_guard(main, interrupted=after_interrupt(sys.argv[1:])))
