"""Evaluate quantized image codecs that main_ptq.py has saved, beside the float ones they were made from; code images with them.

    python main_eval.py --model runs/lu2022_w8a8_rd --data kodak --real
    python main_eval.py encode IMAGE -o FILE.licq --model runs/lu2022_w8a8_rd --quality 5
    python main_eval.py decode FILE.licq -o IMAGE.png --model runs/lu2022_w8a8_rd
"""

import argparse
import sys
from pathlib import Path

from codec import commands
from evaluation import verify
from support import options
from support.cli import ArgumentParser, main_guard
from support.errors import InputError

EPILOG = """\
The folder of --out gets report.html, report.md, report.json, rd.png and compressai/*.json, of the same form as main_ptq.py's.

bpp is estimated from the entropy model's likelihoods. With --real it is that of files: each image is encoded, decoded and
compared with what the quantized network says, and the estimate stands beside it; the float codecs' stays an estimate.

    main_eval.py encode | decode | info    files of single images or folders; see main_eval.py encode --help
    main_eval.py verify                    does every machine decode the same? see main_eval.py verify --help
"""
_NO_FLOAT = "the float codec of quality {}, {}, is not there any more or has changed; give it with --checkpoint, or leave it out with --no-float"


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="main_eval.py", description=__doc__.split("\n\n")[0], epilog=EPILOG, allow_abbrev=False,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("what and on which images")
    group.add_argument("--model", metavar="WHAT", nargs="+", required=True,
                       help="quantized models (model.safetensors), a folder with q*/model.safetensors, or `float`: only the float "
                            "codecs that --arch, --quality and --checkpoint name")
    group.add_argument("--data", metavar="SET",
                       help="images: a folder or a data set's name (default: kodak where it is found through LICQ_DATA or the "
                            "cache, else photos, 3 photos that installed packages ship)")
    options.add_float_model(parser)
    group = parser.add_argument_group("variable rate")
    group.add_argument("--rate_factor", metavar="A", type=options.factors, default=[],
                       help="gains of a variable-rate codec, one or more positive numbers separated by commas: rates between its "
                            "qualities (default: the qualities)")
    options.add_machine(parser)
    group = parser.add_argument_group("run")
    group.add_argument("--real", action="store_true",
                       help="write and decode a file for every image; bpp is what it takes on disk (default: estimated)")
    group.add_argument("--no-float", dest="with_float", action="store_false",
                       help="do not evaluate the float codecs beside the quantized ones; no BD-rate then (default: evaluated)")
    group.add_argument("--out", metavar="FOLDER", help="results (default: eval_<data> in the models' folder; for `float` "
                                                       "runs/<arch>_float_<data>)")
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in commands.NAMES:
        return commands.run(argv)
    if argv and argv[0] == "verify":
        return verify.run(argv[1:])
    args = build_parser().parse_args(argv)
    args.quality = options.merge_qualities(args.quality)
    only_float = args.model == ["float"]
    if only_float and not args.with_float:
        raise InputError("--model float and --no-float leave nothing to evaluate; drop one of them")
    if only_float and args.real:
        raise InputError("--real is for quantized models: a float codec's files cannot be decoded safely elsewhere; leave it out")
    files = [] if only_float else find_models(args.model, args.quality)
    return evaluate_all(args, files)


def find_models(words: list[str], qualities: list[int] | str | None) -> list[Path]:
    """The quantized models that the words of --model name, of the given qualities where they are in folders.

    Raises:
        InputError: a word that names no file, or a folder without models.
    """
    files: list[Path] = []
    for word in words:
        path = Path(word).expanduser()
        if path.is_file():
            files.append(path)
            continue
        if not path.is_dir():
            raise InputError(f"no quantized model at {word}; give a model.safetensors or a folder that main_ptq.py has written"
                             + (", or `float` by itself" if word == "float" else ""))
        found = {int(file.parent.name[1:]): file for file in path.glob("q*/model.safetensors") if file.parent.name[1:].isdecimal()}
        if not found and (path / "model.safetensors").is_file():
            files.append(path / "model.safetensors")
            continue
        wanted = sorted(found) if qualities in (None, "all") else qualities
        missing = [quality for quality in wanted if quality not in found]
        if missing or not found:
            what = f"of quality {missing[0]} " if missing else ""
            there = f"; there are {', '.join(map(str, sorted(found)))}" if found else ""
            raise InputError(f"the folder {word} holds no quantized model {what}(q<quality>/model.safetensors){there}; "
                             "make one with main_ptq.py")
        files += [found[quality] for quality in wanted]
    return files


def evaluate_all(args: argparse.Namespace, files: list[Path]) -> int:
    """Everything is looked at first, then measured, then written."""
    from evaluation.anchors import anchors_of
    from evaluation.crops import make_crops, save_picture
    from evaluation.evaluate import evaluate
    from evaluation.inputs import evaluation_set, pick_device
    from evaluation.presentation import coverage_lines, render_summary
    from evaluation.report import build_report, make_point, write_report
    from models.registry import get_architecture, list_models
    from quant.model import QuantModel
    from support.determinism import set_threads
    from support.files import sha256, writable_folder

    if args.real:
        from codec.api import Codec

    device = pick_device(args.device)
    set_threads(args.threads)
    given = get_architecture(args.arch).name if args.arch else None  # a plug-in's file registers its codec here
    saved = [read_extra(file) for file in files]
    common = one_kind(files, saved) if files else None
    if args.rate_factor and not (common and "rates" in common):
        raise InputError("--rate_factor is for quantized variable-rate codecs; leave it out, or give one with --model")
    if common and "rates" in common:
        files, saved = rates_of_one(files[0], common, args)
    if common and common["arch"] not in list_models():
        raise InputError(f"{files[0]} needs the architecture {common['arch']!r}; name the Python file that registers it with --arch")
    if common and given not in (None, common["arch"]):
        raise InputError(f"--arch {args.arch} is not that of the quantized models, {common['arch']}; leave it out")
    floats = find_floats(args, saved)
    arch = common["arch"] if common else next(iter(floats.values())).arch
    metric = common["metric"] if common else args.metric
    dataset, remark = evaluation_set(args.data, metric)
    if files:
        root = files[0].parent.parent if files[0].parent.name.startswith("q") else files[0].parent
        out = Path(args.out or root / f"eval_{dataset.name}")
    else:
        out = Path(args.out or f"runs/{arch}_float_{dataset.name}")
    writable_folder(out)
    pad = get_architecture(arch).multiple

    def measure(model, codec=None):
        return evaluate(model, dataset, pad=pad, device=device, codec=codec, progress=not args.quiet)

    warnings = [remark] if remark else []
    warnings += [f"the float codec of quality {extra['quality']} is another file than the one that was quantized"
                 for extra in saved if extra["quality"] in floats and floats[extra["quality"]].sha256 != extra["checkpoint"]["sha256"]]
    points, pictures, coverage = [], {}, None
    total = len(files) or len(floats)
    for index in range(total):
        extra = saved[index] if files else {}
        quality = extra.get("quality") if files else sorted(floats)[index]
        source = floats.get(quality)
        if not args.quiet:
            print(f"{arch} quality {quality} ({index + 1} of {total})", file=sys.stderr)
        codec = QuantModel.load(files[index]) if files else None
        network = source.load() if source else None
        for model in (codec and codec.model, network):
            if model is not None and "level" in extra:
                model.set_level(extra["level"])
        real = Codec(codec, bytes.fromhex(sha256(files[index])), args.threads, pad) if codec and args.real else None
        quant = measure(codec, real) if codec else None
        fp32 = measure(network) if network is not None else None
        lmbda = extra.get("lambda") or source.lmbda
        crops = {}
        if quant and fp32:
            crops["crops"], picture = make_crops(round(quality, 3), codecs=(network, codec), reports=(fp32, quant), paths=dataset.paths,
                                                 lmbda=lmbda, metric=metric, pad=pad, device=device)
            pictures[crops["crops"]["file"]] = picture
        coverage = coverage or extra.get("coverage")
        points.append(make_point(
            quality=round(quality, 3), lmbda=lmbda, metric=metric, fp32=fp32, quant=quant,
            calibration_seconds=extra.get("calibration_seconds"), peak_memory_mb=extra.get("peak_memory_mb"),
            model_bytes=files[index].stat().st_size if files else None,
            fp32_model_bytes=4 * sum(p.numel() for p in network.parameters()) if network is not None else None,
            model=str(files[index]) if files else None, **crops))
    settings = common["config"] if common else {"preset": None, "quant": {}, "reconstruction": {}}
    report = build_report(
        arch=arch, preset=settings["preset"], loss=settings["reconstruction"].get("loss"),
        unit=settings["reconstruction"].get("unit"), w_bits=settings["quant"].get("w_bits"), a_bits=settings["quant"].get("a_bits"),
        dataset=dataset.name, images=len(dataset), points=points, warnings=warnings, metric=metric,
        anchors=anchors_of(arch, dataset, metric, progress=not args.quiet),
        config={**settings["quant"], **settings["reconstruction"], "metric": metric, "device": str(device)}
        | ({"calibration": common["calibration"]} if common else {}),
        **({"kept_in_float": coverage_lines(coverage), "left_alone": coverage["left_alone"]} if coverage else {}))
    for file, picture in pictures.items():
        save_picture(out / file, picture)
    write_report(out, report)
    print(render_summary(report))
    print(f"\nreport:  {out / 'report.html'}, report.md, report.json, rd.png")
    for warning in warnings:
        print(f"note: {warning}")
    return 0


def read_extra(path: Path) -> dict:
    """What main_ptq.py wrote into a saved model's header; the file is verified whole.

    Raises:
        InputError: damaged, not a quantized model, or not one of main_ptq.py's.
    """
    from quant.serialization import read_quantized

    extra = read_quantized(path)[0].get("extra") or {}
    missing = {"arch", "quality", "lambda", "metric", "config", "calibration", "checkpoint"} - extra.keys()
    if missing:
        raise InputError(f"{path} was not saved by main_ptq.py (it does not say its {min(missing)}); evaluate it from Python: "
                         "evaluation.evaluate.evaluate(QuantModel.load(path), images)")
    return extra


def rates_of_one(file: Path, extra: dict, args: argparse.Namespace) -> tuple[list[Path], list[dict]]:
    """A variable-rate codec's file once for each rate to measure, and what it says of itself at that rate.

    Raises:
        InputError: a quality for which it was not quantized.
    """
    from models.registry import get_architecture
    from quant.model import QuantModel

    lambdas = {int(quality): lmbda for quality, lmbda in extra["rates"].items()}
    qualities = [] if args.rate_factor and args.quality is None else sorted(lambdas) if args.quality in (None, "all") else args.quality
    codec = QuantModel.load(file).model
    table = get_architecture(extra["arch"]).lambdas[extra["metric"]]
    for quality in qualities:
        if quality not in lambdas and not 1 <= quality <= codec.levels:
            raise InputError(f"{file} has the qualities 1 to {codec.levels}, not {quality}; choose others with --quality")
    levels = {quality: float(quality) for quality in qualities} | {level: level for level in map(codec.level_of, args.rate_factor)}
    at = [extra | {"quality": quality, "level": level, "lambda": lambdas.get(quality) or interpolated(table, level)}
          for quality, level in sorted(levels.items())]
    return [file] * len(at), at


def interpolated(table: dict[int, float], level: float) -> float:
    """The lambda of a level between two, on the straight line of its logarithm."""
    import numpy as np

    return float(np.exp(np.interp(level, list(table), np.log(list(table.values())))))


def one_kind(files: list[Path], saved: list[dict]) -> dict:
    """What the models of one curve have in common.

    Raises:
        InputError: models of different architectures or settings, or two of one quality, which are no R-D curve.
    """
    first = saved[0]
    for file, extra in zip(files[1:], saved[1:]):
        for key in ("arch", "metric", "config"):
            if extra[key] != first[key]:
                raise InputError(f"{file} and {files[0]} differ in {key}, so they are no R-D curve; evaluate them one after the other")
    qualities = [extra["quality"] for extra in saved]
    twice = [quality for quality in qualities if qualities.count(quality) > 1]
    if twice:
        raise InputError(f"two models of quality {twice[0]} are given with --model; leave one out")
    return first


def find_floats(args: argparse.Namespace, saved: list[dict]) -> dict:
    """quality -> FloatModel: those the flags name, else those that the saved models were made from."""
    from evaluation.float_models import FloatModel, find_float_models, weights_digest
    from models.checkpoints import load_checkpoint
    from models.registry import get_architecture
    from support.files import sha256

    if not args.with_float:
        return {}
    named = args.checkpoint is not None or args.pretrained
    if not saved or named:
        arch = args.arch or (saved[0]["arch"] if saved else None)
        qualities = args.quality if not saved else sorted({round(extra["quality"]) for extra in saved})
        found = find_float_models(arch, qualities, args.checkpoint, args.pretrained, args.metric, args.lmbda)
        models = {model.quality: model for model in found}
    else:
        models = {}
        for extra in saved:
            origin = extra["checkpoint"]
            path = _where(origin, extra)
            if get_architecture(extra["arch"]).loader is None:
                is_same = path.is_file() and sha256(path) == origin["sha256"]
            else:
                is_same = path.exists() and weights_digest(load_checkpoint(path, extra["arch"], extra["quality"])) == origin["sha256"]
            if not is_same:
                raise InputError(_NO_FLOAT.format(extra["quality"], path))
            models[extra["quality"]] = FloatModel(extra["arch"], extra["quality"], extra["lambda"], origin["origin"], path,
                                                  origin["sha256"], origin["own_lambda"])
    for model in models.values():
        model.load()
    return models


def _where(origin: dict, extra: dict) -> Path:
    """The checkpoint's path; an embedded one moves with the project."""
    if origin["origin"] == "embedded":
        from models.checkpoints import embedded_checkpoint

        return embedded_checkpoint(extra["arch"], max(1, round(extra["quality"])))  # a rate between two qualities has both's
    return Path(origin["path"])


if __name__ == "__main__":
    sys.exit(main_guard(main, interrupted="nothing was written; run the command again"))
