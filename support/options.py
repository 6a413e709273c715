"""Words of a command line and what they may be. Nothing here imports torch: a typing error is answered at
once."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from licq.support.cli import ArgumentParser
from licq.support.errors import InputError

# The public interface. reconstruction.config and models.registry have the same lists; a test compares them.
LOSSES = ("mse", "fisher", "rd", "rd_direct", "kl", "stage", "output")
UNITS = ("layer", "block", "stage", "network")
METRICS = ("mse", "ms-ssim")
ARCHITECTURES = (
    "lu2022, tic, balle2018, minnen2018, minnen2018-mean, cheng2019, cheng2020, cheng2020-anchor, chen2021",
    "qvrf-balle2018, qvrf-minnen2018, qvrf-cheng2020, balle2018-vbr, minnen2018-mean-vbr, minnen2018-vbr",
)  # of one rate a checkpoint, and of variable rate

_MAX_THREADS = 256  # beyond, thread creation fails inside the OpenMP runtime, which ends the process


class ScreenParser(ArgumentParser):
    """A parser whose --help fits a screen.

    The groups of `add_rare_group` are shown by --help_all alone; their flags are accepted like all others.

    Args:
        prog: what the user types.
        description, epilog: the first and the last paragraph of both helps.
        details: more paragraphs at the end of --help_all.
    """

    def __init__(self, prog: str, description: str, epilog: str = "", details: str = ""):
        super().__init__(
            prog=prog,
            usage="%(prog)s [options]",
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            add_help=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self._details = details
        self._rare_groups: list[argparse._ArgumentGroup] = []
        group = self.add_argument_group("help")
        group.add_argument("-h", "--help", action="help", help="show the flags that matter most and exit")
        group.add_argument("--help_all", action=_HelpAll, help="show all flags and exit")

    def add_rare_group(self, title: str) -> argparse._ArgumentGroup:
        """A group of flags that --help leaves out."""
        group = self.add_argument_group(title)
        self._rare_groups.append(group)
        return group

    def format_help(self, everything: bool = False) -> str:
        """The text of --help, or of --help_all."""
        groups, epilog = self._action_groups, self.epilog
        if everything:
            self.epilog = "\n\n".join(filter(None, [epilog, self._details]))
        else:
            self._action_groups = [group for group in groups if group not in self._rare_groups]
        try:
            return super().format_help()
        finally:
            self._action_groups, self.epilog = groups, epilog


class _HelpAll(argparse._HelpAction):
    def __call__(self, parser, namespace, values, option_string=None):
        if isinstance(parser, ScreenParser):
            print(parser.format_help(everything=True), end="")
        parser.exit()


def rare_group(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    """A group that a `ScreenParser` leaves out of --help; of any other parser an ordinary one."""
    if isinstance(parser, ScreenParser):
        return parser.add_rare_group(title)
    return parser.add_argument_group(title)


def bits(text: str) -> int:
    """A number of bits: 2..16, or 32 for float."""
    value = _integer(text)
    if value != 32 and not 2 <= value <= 16:
        raise argparse.ArgumentTypeError(f"{text} is out of range; choose 2 to 16, or 32 for float")
    return value


def count(text: str) -> int:
    """An integer from 0."""
    return _at_least(text, 0)


def positive(text: str) -> int:
    """An integer from 1."""
    return _at_least(text, 1)


def reductions(text: str) -> list[int]:
    """Integers from 1, separated by commas."""
    return [_at_least(part, 1) for part in text.split(",")]


def threads(text: str) -> int:
    """A number of CPU threads, 1..256."""
    value = _integer(text)
    if not 1 <= value <= _MAX_THREADS:
        raise argparse.ArgumentTypeError(f"{text} is out of range; choose 1 to {_MAX_THREADS}")
    return value


def seed(text: str) -> int:
    """A seed that every generator takes, 0 .. 2^32 - 1."""
    value = _integer(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is out of range; choose 0 to 4294967295")
    return value


def lambdas(text: str) -> list[float]:
    """One or more positive numbers, separated by commas."""
    return _positive_numbers(text, 0.0067)


def factors(text: str) -> list[float]:
    """One or more positive numbers, separated by commas."""
    return _positive_numbers(text, 1.5)


def image_range(text: str) -> slice:
    """FIRST:END, images counted from 0, END not included."""
    first, _, end = text.partition(":")
    if not (first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form FIRST:END, e.g. 0:64")
    return slice(int(first), int(end))


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share; choose 0 to 1")
    return value


def _positive_numbers(text: str, example: float) -> list[float]:
    values = []
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            raise argparse.ArgumentTypeError(
                f"{part.strip() or text!r} is not a positive number; give one such as {example}"
            )
        values.append(value)
    return values


def _positive_number(text: str, example: float) -> float:
    if "," in text:
        raise argparse.ArgumentTypeError(
            f"{text} is more than one number; give one such as {example}, decimals after a point"
        )
    return _positive_numbers(text, example)[0]


def size_budget(text: str) -> dict[str, float]:
    """Mean bits of a weight ("6"), or megabytes ("1.5MB"): a field of
    `reconstruction.mixed_precision.Budget`."""
    if text.upper().endswith("MB"):
        return {"megabytes": _positive_number(text[:-2], 1.5)}
    return {"mean_bits": _positive_number(text, 6)}


def bops_budget(text: str) -> dict[str, float]:
    """Bit operations as a share of those of 8 bits ("0.5"), or for a pixel in thousands or millions ("900k",
    "1.2M")."""
    unit = {"k": 1e3, "K": 1e3, "M": 1e6}.get(text[-1:])
    if unit:
        return {"bops": _positive_number(text[:-1], 900) * unit}
    return {"relative_bops": _positive_number(text, 0.5)}


def bits_choices(text: str) -> list[int]:
    """Numbers of bits from 2 to 16, separated by commas."""
    choices = sorted({_integer(part) for part in text.split(",")})
    for value in choices:
        if not 2 <= value <= 16:
            raise argparse.ArgumentTypeError(
                f"{value} is out of range; choose numbers from 2 to 16, such as 4,6,8"
            )
    return choices


def positive_number(text: str) -> float:
    """A positive number."""
    return _positive_number(text, 1.0)


def qualities(text: str) -> list[int] | str:
    """`all`, or integers separated by commas."""
    if text == "all":
        return text
    numbers = []
    for part in text.split(","):
        if not part.strip().isdecimal():
            raise argparse.ArgumentTypeError(
                f"{part.strip() or text!r} is not a quality; give numbers such as 1,3,5 or `all`"
            )
        numbers.append(int(part))
    return numbers


def merge_qualities(given: list[list[int] | str] | None) -> list[int] | str | None:
    """What several words of `--quality` say together: sorted numbers without repeats, "all", or None for no
    word."""
    if given is None:
        return None
    if "all" in given:
        return "all"
    return sorted({quality for word in given if not isinstance(word, str) for quality in word})


def assignment(text: str) -> tuple[str, str]:
    """name=value, as in `--set knob=value`."""
    name, sign, value = text.partition("=")
    if not sign or not name.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=value, e.g. joint_iters=0")
    return name.strip(), value.strip()


def convert(name: str, text: str, like: Any) -> Any:
    """The value that `text` spells, of the type of `like`; a tuple is written with commas.

    Raises:
        InputError: it spells none.
    """
    try:
        if isinstance(like, bool):
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[
                text.lower()
            ]
        if isinstance(like, tuple):
            return tuple(part.strip() for part in text.split(",") if part.strip())
        value = type(like)(text)
    except (ValueError, KeyError):
        value = None
    if value is None or isinstance(value, float) and not math.isfinite(value):
        kind = {bool: "true or false", int: "an integer", float: "a number"}[type(like)]
        raise InputError(f"--set {name}={text}: not {kind}; its default is {like}")
    return value


def existing_or_pattern(text: str) -> str:
    """A path that exists, or one with {quality} in it."""
    if "{quality}" not in text and not Path(text).expanduser().exists():
        raise argparse.ArgumentTypeError(
            f"the file {text} does not exist; give a checkpoint file, or a pattern such as "
            "models/mine-q{quality}.safetensors"
        )
    return str(Path(text).expanduser())


def add_float_model(parser: argparse.ArgumentParser, metric: str | None = "mse") -> None:
    """--arch --quality --checkpoint --pretrained --lambda --metric: which float codecs.

    metric: the default of --metric; None: what the quantized models were made for.
    """
    group = parser.add_argument_group("float codec")
    group.add_argument(
        "--arch",
        metavar="NAME",
        help="architecture: a name, or a Python file that registers one, as examples/bls2017.py does "
        "(default: what --checkpoint is, else lu2022)",
    )
    group.add_argument(
        "--quality",
        metavar="Q",
        nargs="+",
        type=qualities,
        help="rate points, 1 (smallest files) to 8: numbers separated by commas or spaces, or `all` "
        "(default: all that there are)",
    )
    group.add_argument(
        "--checkpoint",
        metavar="FILE",
        type=existing_or_pattern,
        help="trained weights, .pth.tar, .pt, .safetensors or .npz; {quality} in the name stands for the "
        "quality (default: those of the project)",
    )
    group.add_argument(
        "--pretrained",
        action="store_true",
        help="use CompressAI's published weights, checked by their hash (default: no)",
    )
    group = rare_group(parser, "objective of the float codec")
    group.add_argument(
        "--lambda",
        dest="lmbda",
        metavar="L",
        type=lambdas,
        help="weight of the distortion in J = R + lambda * D, one a quality, separated by commas; D is the "
        "squared error on 0..255, or 1 - MS-SSIM (default: what the quality is trained with)",
    )
    group.add_argument(
        "--metric",
        choices=METRICS,
        default=metric,
        help=f"distortion D of J (default: {metric or 'what the quantized models are made for, else mse'})",
    )


def add_plugin(parser: argparse.ArgumentParser) -> None:
    """--arch of commands that take quantized models alone."""
    parser.add_argument(
        "--arch",
        metavar="FILE",
        help="the Python file that registers the model's codec, where it is one of your own",
    )


def add_machine(parser: argparse.ArgumentParser) -> None:
    """--device --threads --quiet."""
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda where there is one, else cpu)"
    )
    group = rare_group(parser, "threads and progress")
    group.add_argument(
        "--threads", metavar="N", type=threads, help="CPU threads, 1 to 256 (default: PyTorch's choice)"
    )
    group.add_argument(
        "--quiet",
        action="store_true",
        help="no progress on standard error (default: progress with time left)",
    )


def add_engine(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """--workers --ray --gpu_share: where the tasks of a command run, all in this process by default."""
    parser.add_argument(
        "--workers",
        metavar="N",
        type=positive,
        help="run so many tasks (qualities, runs of a sweep, parts of the images) at a time, each in a "
        "process of its own, with an equal share of the processors, and on one of the GPUs if there are any "
        "(default: one after the other in this process)",
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        nargs="?",
        const="auto",
        help="run the tasks on the Ray cluster at this address; without one, on the cluster that this "
        "machine belongs to, else on this machine (default: no Ray)",
    )
    parser.add_argument(
        "--gpu_share",
        metavar="X",
        type=share,
        help="with --ray: share of a GPU that a task takes, 0 to 1 (default: 1 where the cluster has GPUs)",
    )


def words_of_parts(argv: Sequence[str]) -> list[str]:
    """A command line without the flags that say where and how often it runs: for its parts in other
    processes."""
    # not our own parser: messages go on naming the flags of the command's
    whole = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_engine(whole)
    for flag in ("--out", "--threads"):
        whole.add_argument(flag)
    for flag in ("--resume", "--quiet"):
        whole.add_argument(flag, action="store_true")
    return whole.parse_known_args(argv)[1]


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None


def _at_least(text: str, minimum: int) -> int:
    value = _integer(text)
    if value < minimum:
        raise argparse.ArgumentTypeError(f"{text} is out of range; choose {minimum} or more")
    return value
