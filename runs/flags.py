"""The flags of `main_ptq.py` and `main_eval.py`, and what they say together. Nothing here imports torch."""

import argparse
from typing import TYPE_CHECKING

from licq.support import options
from licq.support.errors import InputError
from licq.support.options import ScreenParser

if TYPE_CHECKING:
    from licq.reconstruction.config import PtqConfig

_ARCHITECTURES = f"""\
architectures: {options.ARCHITECTURES[0]}
of variable rate: {options.ARCHITECTURES[1]}"""

_QUANTIZE_EPILOG = """\
bpp of quantized codecs is that of files, written and decoded; --estimate takes likelihoods.
--help_all shows all flags: bits of single layers, --analyze, --sweep, --set ..."""

_QUANTIZE_DETAILS = f"""\
The folder of --out gets report.html (pictures and tables in one file), report.md, report.json and rd.png, the
curves as CompressAI's plot tool takes them (compressai/*.json), and for each quality
q<quality>/model.safetensors, crops.png and result.json. Without --resume a run starts anew: what an earlier
run left there stands until its successor is finished. With --resume it goes on after the last finished unit,
refuses a folder that holds a run with other settings, and takes up qualities finished by other commands with
the same settings.

{_ARCHITECTURES}
"""

_EVALUATE_EPILOG = """\
bpp of quantized codecs is that of files, written and decoded; --estimate takes likelihoods.

  {command} encode | decode | info    code single images or folders of them
  {command} verify                    does every machine decode the same?

--help_all shows all flags: parts of large folders, rates between qualities ..."""

_EVALUATE_DETAILS = f"""\
The folder of --out gets report.html, report.md, report.json, rd.png and compressai/*.json, of the same form
as those of a quantization. The rate of float codecs is an estimate. What quantization costs (BD-rate and
delta J against the float codec) is told by the estimates of both.

{_ARCHITECTURES}
"""


def build_quantize_parser(prog: str = "main_ptq.py") -> ScreenParser:
    """The flags of a quantization, without those of a sweep."""
    parser = ScreenParser(
        prog,
        "Quantize trained image codecs after training, measure what that costs, and write a report.",
        _QUANTIZE_EPILOG,
        _QUANTIZE_DETAILS,
    )
    options.add_float_model(parser)
    _add_quantization(parser)
    _add_images(parser)
    _add_layers(parser)
    options.add_machine(parser)
    _add_run(parser)
    return parser


def _add_quantization(parser: ScreenParser) -> None:
    group = parser.add_argument_group("quantization")
    group.add_argument(
        "--w_bits",
        metavar="B",
        type=options.bits,
        default=8,
        help="bits of weights, 2 to 16, or 32 for float (default: 8)",
    )
    group.add_argument(
        "--a_bits",
        metavar="B",
        type=options.bits,
        default=8,
        help="bits of the layers' inputs, 2 to 16, or 32 for float (default: 8)",
    )
    group.add_argument(
        "--preset",
        metavar="NAME",
        default="licq",
        help="method: a preset's name, or the path of a YAML file (default: licq)",
    )
    group.add_argument(
        "--loss",
        choices=options.LOSSES,
        help="what a unit minimizes: error of its output (mse), weighted by sensitivity (fisher), squared "
        "change of J (rd), J itself (rd_direct), divergence (kl), error of its stage's (stage) or the "
        "codec's outputs (output) (default: the preset's; licq: rd)",
    )
    group.add_argument(
        "--iters", metavar="N", type=options.count, help="optimizer steps per unit (default: the preset's)"
    )
    group = parser.add_rare_group("quantization in detail")
    group.add_argument(
        "--bias_bits",
        type=int,
        choices=(8, 32),
        help="bits of biases: 32 at the accumulator's scale, or 8 with rescaling (default: the preset's, 32)",
    )
    group.add_argument(
        "--strict_int8",
        action="store_true",
        help="8 bits on every stored tensor, also between layers (default: 16 bits there)",
    )
    group.add_argument(
        "--unit",
        choices=options.UNITS,
        help="what is reconstructed at once (default: the preset's; licq: block)",
    )
    group.add_argument(
        "--set",
        dest="knobs",
        metavar="KNOB=VALUE",
        type=options.assignment,
        action="append",
        default=[],
        help="any other field of QuantConfig or ReconstructionConfig; repeatable (default: the preset's "
        "values)",
    )
    group.add_argument(
        "--seed",
        metavar="N",
        type=options.seed,
        default=0,
        help="of crops, batches and mixing, 0 to 4294967295 (default: 0)",
    )


def _add_images(parser: ScreenParser) -> None:
    group = parser.add_argument_group("images")
    group.add_argument(
        "--calib",
        metavar="SET",
        help="calibration images: a folder or a data set's name (default: photos-calib, 3 photos of "
        "installed packages)",
    )
    group.add_argument(
        "--num_calib", metavar="N", type=options.positive, default=10, help="calibration images (default: 10)"
    )
    group.add_argument(
        "--eval",
        dest="data",
        metavar="SET",
        help="evaluation images: a folder or a data set's name (default: kodak if LICQ_DATA or the cache has "
        "it, else photos, 3 photos of installed packages)",
    )
    group = parser.add_rare_group("calibration crops")
    group.add_argument(
        "--crop",
        metavar="PX",
        type=options.positive,
        default=256,
        help="side of a calibration crop in pixels, a multiple of 64 (default: 256)",
    )
    group.add_argument(
        "--crops_per_image",
        metavar="N",
        type=options.positive,
        default=8,
        help="crops from each calibration image (default: 8)",
    )
    group.add_argument(
        "--crop_reductions",
        metavar="N",
        type=options.reductions,
        default=[1, 2],
        help="how many times smaller an image is made before its first, second ... crop, over and over, "
        "separated by commas; one too small for that stays as it is (default: 1,2)",
    )


def _add_layers(parser: ScreenParser) -> None:
    """What is done with single layers; docs/bits-and-methods.md."""
    group = parser.add_rare_group("single layers")
    group.add_argument(
        "--analyze",
        action="store_true",
        help="do not quantize but measure where it would cost: each layer and each --unit quantized alone, "
        "ranges and outliers of channels, the landscape of J at one layer; tables and pictures for each "
        "quality",
    )
    group.add_argument(
        "--landscape",
        metavar="LAYER",
        help="the layer of --analyze's landscape (default: the one that costs most)",
    )
    group.add_argument(
        "--bits_file",
        metavar="FILE",
        help='bits of single layers, JSON or YAML: {"g_a.0": {"w_bits": 6, "a_bits": 8}, ...}; {quality} '
        "in the name stands for the quality. With one of the next three it is written (default: --w_bits and "
        "--a_bits everywhere)",
    )
    group.add_argument(
        "--budget_size",
        metavar="B",
        type=options.size_budget,
        help="search bits of weights with the least loss of J within this size: mean bits of a weight, e.g. "
        "6, or all weights in megabytes, e.g. 1.5MB",
    )
    group.add_argument(
        "--budget_bops",
        metavar="B",
        type=options.bops_budget,
        help="search bits of weights and inputs with the least loss within so many bit operations: a share "
        "of those of 8 bits, e.g. 0.5, or for a pixel, e.g. 900k or 1.2M",
    )
    group.add_argument(
        "--max_bd_rate",
        metavar="X",
        type=options.positive_number,
        help="search the cheapest model whose BD-rate (PSNR, against float) stays below X percent; needs two "
        "qualities",
    )
    group.add_argument(
        "--bits_choices",
        metavar="B",
        type=options.bits_choices,
        help="candidates of a search, separated by commas (default: 4,5,6,7,8)",
    )
    group.add_argument(
        "--cost",
        choices=("size", "bops"),
        help="what --max_bd_rate makes small: the size of the weights, or bit operations, by the bits of "
        "weights and inputs (default: size)",
    )


def _add_run(parser: ScreenParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "--out",
        metavar="FOLDER",
        help="results (default: runs/<arch>_w<w_bits>a<a_bits>_<loss, or preset>)",
    )
    group.add_argument(
        "--resume", action="store_true", help="go on where the same command was stopped (default: start anew)"
    )
    group = parser.add_rare_group("what is measured, and results of other runs")
    group.add_argument(
        "--no-baseline",
        dest="baseline",
        action="store_false",
        help="leave out the comparison with plain quantization: maximum ranges, nearest rounding, one scale "
        "per activation tensor, no reconstruction (default: compared)",
    )
    _add_measures(group)
    group.add_argument(
        "--part",
        metavar="Q",
        type=options.positive,
        help="do only this quality, of the run in the folder above --out: what --workers does with each "
        "(default: all, and a report)",
    )
    group.add_argument(
        "--shared",
        metavar="FOLDER",
        help="keep there what other runs need too, and take it from there: results of float codecs and "
        "JPEG's curves (default: in --out until the run is finished)",
    )


def _add_measures(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--estimate",
        action="store_true",
        help="run the simulation of quantized codecs and estimate their rate, in place of their integer "
        "program and files (default: files, where the CPU measures)",
    )
    group.add_argument(
        "--no-anchors",
        dest="with_anchors",
        action="store_false",
        help="leave out the curves of JPEG, WebP and AVIF (default: measured once for each image and kept in "
        "the cache)",
    )


def check_single_run(args: argparse.Namespace) -> None:
    """Raises InputError for flags of a sweep, or flags of single layers that do not go together."""
    if args.only or args.ray or args.gpu_share is not None:
        raise InputError(
            "--only, --ray and --gpu_share are for --sweep; a single run takes --workers for its qualities"
        )
    if args.workers and (args.analyze or args.max_bd_rate is not None):
        flag = "--analyze" if args.analyze else "--max_bd_rate"
        raise InputError(f"{flag} does one quality after the other; leave --workers out")
    budgets = [
        flag for flag in ("budget_size", "budget_bops", "max_bd_rate") if getattr(args, flag) is not None
    ]
    if args.analyze and (budgets or args.bits_file):
        flag = (budgets or ["bits_file"])[0]
        raise InputError(f"--analyze and --{flag} exclude each other; analyze first, then quantize")
    if args.landscape and not args.analyze:
        raise InputError("--landscape belongs to --analyze; give both")
    if args.max_bd_rate is not None and len(budgets) > 1:
        raise InputError(f"--max_bd_rate and --{budgets[0]} exclude each other; give one")
    for flag in ("bits_choices", "cost"):
        if getattr(args, flag) is not None and not budgets:
            raise InputError(
                f"--{flag} is for a search; give --budget_size, --budget_bops or --max_bd_rate as well"
            )
    if args.cost is not None and args.max_bd_rate is None:
        raise InputError("--cost belongs to --max_bd_rate; a budget says itself what it bounds")


def build_config(args: argparse.Namespace) -> "PtqConfig":
    """The preset with the knobs of the command line.

    Raises:
        InputError: an unknown preset or knob, or a value that it cannot have.
    """
    from licq.reconstruction.config import PtqConfig, parse_knobs

    knobs = {"w_bits": args.w_bits, "a_bits": args.a_bits, "seed": args.seed}
    knobs |= {
        name: value
        for name in ("bias_bits", "loss", "unit", "iters")
        if (value := getattr(args, name)) is not None
    }
    if args.strict_int8:
        knobs["strict_int8"] = True
    return PtqConfig.from_preset(args.preset, **parse_knobs(args.knobs, knobs))


def build_evaluate_parser(prog: str = "main_eval.py") -> ScreenParser:
    """The flags of an evaluation."""
    parser = ScreenParser(
        prog,
        "Evaluate quantized image codecs beside the float ones they were made from; code images with them.",
        _EVALUATE_EPILOG.format(command=prog.removesuffix(" evaluate")),
        _EVALUATE_DETAILS,
    )
    group = parser.add_argument_group("what and on which images")
    group.add_argument(
        "--model",
        metavar="WHAT",
        nargs="+",
        required=True,
        help="quantized models or folders of runs, or `float`: only the float codecs that --arch, --quality "
        "and --checkpoint name",
    )
    group.add_argument(
        "--data",
        metavar="SET",
        help="images: a folder or a data set's name (default: kodak if LICQ_DATA or the cache has it, else "
        "photos, 3 photos of installed packages)",
    )
    options.add_float_model(parser, metric=None)
    group = parser.add_rare_group("variable rate")
    group.add_argument(
        "--rate_factor",
        metavar="A",
        type=options.factors,
        default=[],
        help="gains of a variable-rate codec, one or more positive numbers separated by commas: rates "
        "between its qualities (default: the qualities)",
    )
    options.add_machine(parser)
    group = parser.add_argument_group("run")
    group.add_argument(
        "--real",
        action="store_true",
        help="refuse models that have no files (default: their rate is estimated)",
    )
    _add_measures(group)
    group.add_argument(
        "--no-float",
        dest="with_float",
        action="store_false",
        help="leave out the float codecs, and with them the BD-rate (default: evaluated)",
    )
    group.add_argument(
        "--out",
        metavar="FOLDER",
        help="results (default: eval_<data> in the models' folder; for `float` runs/<arch>_float_<data>)",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on where the same command was stopped, after the last part of the images that was finished "
        "(default: start anew)",
    )
    group = parser.add_rare_group("large folders of images, in parts")
    options.add_engine(group)
    group.add_argument(
        "--shard",
        metavar="FIRST:END",
        type=options.image_range,
        help="measure only these images, counted from 0, and write OUT/part.json: what --workers and --ray "
        "do with each part (default: all, and a report)",
    )
    return parser
