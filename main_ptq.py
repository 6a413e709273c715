"""Quantize trained image codecs after training, measure what that costs, and write a report.

python main_ptq.py --arch lu2022 --w_bits 8 --a_bits 8 --loss rd
"""

import sys

from licq.runs.flags import build_config, build_quantize_parser, check_single_run
from licq.support.cli import main_guard
from licq.support.options import ScreenParser, merge_qualities
from licq.sweeps import commands

# torch takes seconds to import: what needs it is imported after the arguments have been checked.


def build_parser(prog: str = "main_ptq.py") -> ScreenParser:
    """All flags; `prog` is what the user types."""
    parser = build_quantize_parser(prog)
    commands.add_flags(parser.add_rare_group("sweep"))
    return parser


def main(argv: list[str] | None = None, prog: str = "main_ptq.py") -> int:
    """Run the command line `argv` (default: that of the process) and return the exit status.

    Raises:
        InputError: bad arguments or input.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    if args.sweep:
        return commands.run(argv, parser, build_config)
    check_single_run(args)
    args.quality = merge_qualities(args.quality)

    from licq.runs.run import prepare

    run = prepare(args)
    if args.part is not None:
        from licq.runs.quality import run_part

        run_part(run)
        return 0
    if args.analyze:
        from licq.runs.analysis import analyze_run

        for text in analyze_run(run):
            print(text)
        return 0

    from licq.report.text import render_summary
    from licq.runs.results import finish_run, written_files

    if args.max_bd_rate is not None:
        from licq.runs.bd_rate_limit import below_bd_rate

        run = below_bd_rate(run)
    report = finish_run(run, argv)
    print(f"{render_summary(report)}\n\n{written_files(run)}")
    for warning in run.warnings:
        print(f"note: {warning}")
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
