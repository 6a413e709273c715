"""Evaluate quantized image codecs that main_ptq.py has saved, beside the float ones they were made from; code
images with them.

python main_eval.py --model runs/lu2022_w8a8_rd --data kodak --real
python main_eval.py encode IMAGE -o FILE.licq --model runs/lu2022_w8a8_rd --quality 5
python main_eval.py decode FILE.licq -o IMAGE.png --model runs/lu2022_w8a8_rd
"""

import argparse
import functools
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from licq.runs import coding as commands
from licq.runs import verify
from licq.runs.shards import PART, forget_shards, measured_in_shards
from licq.support import options
from licq.support.cli import ArgumentParser, main_guard
from licq.support.errors import InputError
from licq.support.files import write_json
from licq.workers.engine import Engine

if TYPE_CHECKING:
    import torch
    from torch import nn

    from licq.data.datasets import Dataset
    from licq.quant.model import QuantModel

EPILOG = """\
The folder of --out gets report.html, report.md, report.json, rd.png and compressai/*.json, of the same form as main_ptq.py's.

bpp is estimated from the entropy model's likelihoods. With --real it is that of files: each image is encoded, decoded and
compared with what the quantized network says, and the estimate stands beside it; the float codecs' stays an estimate.

    main_eval.py encode | decode | info    files of single images or folders; see main_eval.py encode --help
    main_eval.py verify                    does every machine decode the same? see main_eval.py verify --help
"""
_NO_FLOAT = "the float codec of quality {}, {}, is not there any more or has changed; give it with --checkpoint, or leave it out with --no-float"


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="main_eval.py",
        description=__doc__.split("\n\n")[0],
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_argument_group("what and on which images")
    group.add_argument(
        "--model",
        metavar="WHAT",
        nargs="+",
        required=True,
        help="quantized models (model.safetensors), a folder with q*/model.safetensors, or `float`: only the float "
        "codecs that --arch, --quality and --checkpoint name",
    )
    group.add_argument(
        "--data",
        metavar="SET",
        help="images: a folder or a data set's name (default: kodak where it is found through LICQ_DATA or the "
        "cache, else photos, 3 photos that installed packages ship)",
    )
    options.add_float_model(parser, metric=None)
    group = parser.add_argument_group("variable rate")
    group.add_argument(
        "--rate_factor",
        metavar="A",
        type=options.factors,
        default=[],
        help="gains of a variable-rate codec, one or more positive numbers separated by commas: rates between its "
        "qualities (default: the qualities)",
    )
    options.add_machine(parser)
    group = parser.add_argument_group("run")
    group.add_argument(
        "--real",
        action="store_true",
        help="write and decode a file for every image; bpp is what it takes on disk (default: estimated)",
    )
    group.add_argument(
        "--no-float",
        dest="with_float",
        action="store_false",
        help="do not evaluate the float codecs beside the quantized ones; no BD-rate then (default: evaluated)",
    )
    group.add_argument(
        "--out",
        metavar="FOLDER",
        help="results (default: eval_<data> in the models' folder; for `float` runs/<arch>_float_<data>)",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on where the same command was stopped, after the last part of the images "
        "that was finished (default: start anew)",
    )
    group = parser.add_argument_group("large folders of images, in parts")
    options.add_engine(group)
    group.add_argument(
        "--shard",
        metavar="FIRST:END",
        type=options.image_range,
        help="measure only these images, counted from 0, and write OUT/part.json: what --workers and --ray do with each "
        "part (default: all, and a report)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in commands.NAMES:
        return commands.run(argv)
    if argv and argv[0] == "verify":
        return verify.run(argv[1:])
    parser = build_parser()
    args = parser.parse_args(argv)
    args.quality = options.merge_qualities(args.quality)
    only_float = args.model == ["float"]
    if only_float and not args.with_float:
        raise InputError("--model float and --no-float leave nothing to evaluate; drop one of them")
    if only_float and args.real:
        raise InputError(
            "--real is for quantized models: a float codec's files cannot be decoded safely elsewhere; leave it out"
        )
    files = [] if only_float else find_models(args.model, args.quality)
    engine = Engine.from_args(args)
    subject = look(args, files)
    if args.shard:
        write_json(subject.out / PART, measure(subject, slice(None)))
        return 0
    return evaluate_all(subject, engine, argv)


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
            raise InputError(
                f"no quantized model at {word}; give a model.safetensors or a folder that main_ptq.py has written"
                + (", or `float` by itself" if word == "float" else "")
            )
        found = {
            int(file.parent.name[1:]): file
            for file in path.glob("q*/model.safetensors")
            if file.parent.name[1:].isdecimal()
        }
        if not found and (path / "model.safetensors").is_file():
            files.append(path / "model.safetensors")
            continue
        wanted = sorted(found) if qualities in (None, "all") else qualities
        missing = [quality for quality in wanted if quality not in found]
        if missing or not found:
            what = f"of quality {missing[0]} " if missing else ""
            there = f"; there are {', '.join(map(str, sorted(found)))}" if found else ""
            raise InputError(
                f"the folder {word} holds no quantized model {what}(q<quality>/model.safetensors){there}; "
                "make one with main_ptq.py"
            )
        files += [found[quality] for quality in wanted]
    return files


@dataclass(frozen=True)
class Subject:
    """What is measured on what; built by `look`.

    files, saved: quantized models and what main_ptq.py wrote into each; common: what they share. floats: by
    quality.
    dataset: with --shard those images alone. remarks: for the user.
    """

    args: argparse.Namespace
    device: "torch.device"
    files: list[Path]
    saved: list[dict]
    common: dict | None
    floats: dict
    arch: str
    metric: str
    dataset: "Dataset"
    remarks: list[str]
    out: Path

    def points(self) -> list[tuple[float, Path | None, dict]]:
        """(quality, file of the quantized model, what it says of itself) of each rate point."""
        if not self.files:
            return [(quality, None, {}) for quality in sorted(self.floats)]
        return [(extra["quality"], file, extra) for file, extra in zip(self.files, self.saved)]

    def codecs(self, index: int) -> tuple["QuantModel | None", "nn.Module | None"]:
        """The quantized model and the float codec of a rate point, set to its rate; None where there is
        none."""
        from licq.quant.model import QuantModel

        quality, file, extra = self.points()[index]
        quant = QuantModel.load(file) if file else None
        network = self.floats[quality].load() if quality in self.floats else None
        for model in (quant and quant.model, network):
            if model is not None and "level" in extra:
                model.set_level(extra["level"])
        return quant, network


def look(args: argparse.Namespace, files: list[Path]) -> Subject:
    """Everything is looked at first; nothing is written but an empty folder."""
    from licq.data.datasets import Dataset
    from licq.models.registry import get_architecture, list_models
    from licq.runs.inputs import check_images, find_evaluation_set, pick_device
    from licq.support.determinism import set_threads
    from licq.support.files import writable_folder

    device = pick_device(args.device)
    set_threads(args.threads)
    given = (
        get_architecture(args.arch).name if args.arch else None
    )  # a plug-in's file registers its codec here
    saved = [read_extra(file) for file in files]
    common = one_kind(files, saved) if files else None
    if common:
        refuse_idle_flags(args, files, saved)
    if args.rate_factor and not (common and "rates" in common):
        raise InputError(
            "--rate_factor is for quantized variable-rate codecs; leave it out, or give one with --model"
        )
    if common and "rates" in common:
        files, saved = rates_of_one(files[0], common, args)
    if common and common["arch"] not in list_models():
        raise InputError(
            f"{files[0]} needs the architecture {common['arch']!r}; name the Python file that registers it with --arch"
        )
    if common and given not in (None, common["arch"]):
        raise InputError(
            f"--arch {args.arch} is not that of the quantized models, {common['arch']}; leave it out"
        )
    floats = find_floats(args, saved)
    arch = common["arch"] if common else next(iter(floats.values())).arch
    metric = common["metric"] if common else args.metric or "mse"
    dataset, remark = find_evaluation_set(args.data)
    if args.shard:
        dataset = Dataset(dataset.name, dataset.paths[args.shard])
    if not (args.workers or args.ray):  # where there are many images, each part looks at its own
        check_images(dataset, metric, progress=not args.quiet)
    if files:
        root = files[0].parent.parent if files[0].parent.name.startswith("q") else files[0].parent
        out = Path(args.out or root / f"eval_{dataset.name}")
    else:
        out = Path(args.out or f"runs/{arch}_float_{dataset.name}")
    writable_folder(out)
    remarks = [remark] if remark else []
    remarks += [
        f"the float codec of quality {extra['quality']} is another file than the one that was quantized"
        for extra in saved
        if extra["quality"] in floats and floats[extra["quality"]].sha256 != extra["checkpoint"]["sha256"]
    ]
    return Subject(args, device, files, saved, common, floats, arch, metric, dataset, remarks, out)


def measure(subject: Subject, which: slice) -> dict:
    """The codecs on some of the images, as JSON: {"points": one dictionary a rate point, "anchors": see
    classical_points}."""
    from licq.data.datasets import Dataset
    from licq.evaluation.anchors import classical_points
    from licq.evaluation.evaluate import evaluate
    from licq.models.registry import get_architecture
    from licq.support.files import sha256

    args = subject.args
    if args.real:
        from licq.codec.api import Codec

    images = Dataset(subject.dataset.name, subject.dataset.paths[which])
    pad = get_architecture(subject.arch).multiple
    points, wanted = [], subject.points()
    for index, (quality, file, _) in enumerate(wanted):
        if not args.quiet:
            print(f"{subject.arch} quality {quality} ({index + 1} of {len(wanted)})", file=sys.stderr)
        quant, network = subject.codecs(index)
        codec = Codec(quant, bytes.fromhex(sha256(file)), args.threads, pad) if quant and args.real else None
        point = {
            name: evaluate(
                model,
                images,
                pad=pad,
                device=subject.device,
                codec=codec if name == "quant" else None,
                progress=not args.quiet,
            ).to_dict()
            for name, model in (("quant", quant), ("fp32", network))
            if model is not None
        }
        points.append(
            point
            | (
                {"fp32_model_bytes": 4 * sum(p.numel() for p in network.parameters())}
                if network is not None
                else {}
            )
        )
    classical = classical_points(images.paths, progress=not args.quiet)
    return {"points": points, "anchors": {name: values.tolist() for name, values in classical.items()}}


def evaluate_all(subject: Subject, engine: Engine, argv: list[str]) -> int:
    """Measure, here or in parts elsewhere, and write the report."""
    import numpy as np
    import torch

    from licq.evaluation.anchors import anchors_of
    from licq.evaluation.evaluate import Report
    from licq.models.registry import get_architecture
    from licq.report.build import build_report, make_point, write_report
    from licq.report.crops import make_crops, save_picture
    from licq.report.text import coverage_lines, render_summary
    from licq.support.determinism import versions
    from licq.support.files import sha256

    args, common, out, dataset = subject.args, subject.common, subject.out, subject.dataset
    settings = {
        "versions": versions(),
        "threads": engine.threads or torch.get_num_threads(),
        "device": str(subject.device),
        "real": args.real,
        "quantized": [sha256(file) for file in subject.files],
        "rates": [quality for quality, _, _ in subject.points()],
        "float": {str(quality): model.sha256 for quality, model in subject.floats.items()},
        "dataset": dataset.name,
        "images": len(dataset),
        "files": files_digest(dataset.paths),
    }
    parts = measured_in_shards(
        len(dataset),
        out,
        settings,
        engine,
        words_of_shards(argv, engine),
        args.resume,
        args.quiet,
        functools.partial(measure, subject),
    )

    def joined(index: int, codec: str) -> Report | None:
        measured = [part["points"][index] for part in parts]
        return (
            Report.joined([Report.from_dict(point[codec]) for point in measured])
            if codec in measured[0]
            else None
        )

    points, pictures = [], {}
    for index, (quality, file, extra) in enumerate(subject.points()):
        quality, fp32, quant = round(quality, 3), joined(index, "fp32"), joined(index, "quant")
        lmbda, crops = extra.get("lambda") or subject.floats[quality].lmbda, {}
        if quant and fp32:
            facts, picture = make_crops(
                quality,
                codecs=subject.codecs(index)[::-1],
                reports=(fp32, quant),
                paths=dataset.paths,
                lmbda=lmbda,
                metric=subject.metric,
                pad=get_architecture(subject.arch).multiple,
                device=subject.device,
            )
            crops, pictures[facts["file"]] = {"crops": facts}, picture
        points.append(
            make_point(
                quality=quality,
                lmbda=lmbda,
                metric=subject.metric,
                fp32=fp32,
                quant=quant,
                calibration_seconds=extra.get("calibration_seconds"),
                peak_memory_mb=extra.get("peak_memory_mb"),
                model_bytes=file.stat().st_size if file else None,
                fp32_model_bytes=parts[0]["points"][index].get("fp32_model_bytes"),
                model=str(file) if file else None,
                **crops,
            )
        )
    anchors = {
        name: np.concatenate([np.array(part["anchors"][name], float) for part in parts], axis=1)
        for name in parts[0]["anchors"]
    }
    coverage = next((extra["coverage"] for extra in subject.saved if extra.get("coverage")), None)
    config = common["config"] if common else {"preset": None, "quant": {}, "reconstruction": {}}
    report = build_report(
        arch=subject.arch,
        preset=config["preset"],
        loss=config["reconstruction"].get("loss"),
        unit=config["reconstruction"].get("unit"),
        w_bits=config["quant"].get("w_bits"),
        a_bits=config["quant"].get("a_bits"),
        dataset=dataset.name,
        images=len(dataset),
        points=points,
        warnings=subject.remarks,
        metric=subject.metric,
        anchors=anchors_of(subject.arch, dataset, subject.metric, points=anchors),
        config={
            **config["quant"],
            **config["reconstruction"],
            "metric": subject.metric,
            "device": str(subject.device),
        }
        | ({"calibration": common["calibration"]} if common else {}),
        **(
            {"kept_in_float": coverage_lines(coverage), "left_alone": coverage["left_alone"]}
            if coverage
            else {}
        ),
    )
    for file, picture in pictures.items():
        save_picture(out / file, picture)
    write_report(out, report)
    forget_shards(out)
    print(render_summary(report))
    print(f"\nreport:  {out / 'report.html'}, report.md, report.json, rd.png")
    for remark in subject.remarks:
        print(f"note: {remark}")
    return 0


def files_digest(paths: Sequence[Path]) -> str:
    """SHA-256 over names, sizes and times of change: enough to resume by, where contents would take
    minutes."""
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def words_of_shards(argv: list[str], engine: Engine) -> list[str]:
    """The command line without what is the whole evaluation's, for its parts."""
    whole = ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_engine(whole)
    for flag in ("--out", "--threads"):
        whole.add_argument(flag)
    for flag in ("--resume", "--quiet"):
        whole.add_argument(flag, action="store_true")
    rest = whole.parse_known_args(argv)[1]
    return rest if engine.threads is None else [*rest, "--threads", str(engine.threads)]


def read_extra(path: Path) -> dict:
    """What main_ptq.py wrote into a saved model's header; the file is verified whole.

    Raises:
        InputError: damaged, not a quantized model, or not one of main_ptq.py's.
    """
    from licq.quant.serialization import read_quantized

    extra = read_quantized(path)[0].get("extra") or {}
    missing = {"arch", "quality", "lambda", "metric", "config", "calibration", "checkpoint"} - extra.keys()
    if missing:
        raise InputError(
            f"{path} was not saved by main_ptq.py (it does not say its {min(missing)}); evaluate it from Python: "
            "evaluation.evaluate.evaluate(QuantModel.load(path), images)"
        )
    return extra


def rates_of_one(file: Path, extra: dict, args: argparse.Namespace) -> tuple[list[Path], list[dict]]:
    """A variable-rate codec's file once for each rate to measure, and what it says of itself at that rate.

    Raises:
        InputError: a quality for which it was not quantized.
    """
    from licq.models.registry import get_architecture
    from licq.quant.model import QuantModel

    lambdas = {int(quality): lmbda for quality, lmbda in extra["rates"].items()}
    qualities = (
        []
        if args.rate_factor and args.quality is None
        else sorted(lambdas)
        if args.quality in (None, "all")
        else args.quality
    )
    codec = QuantModel.load(file).model
    table = get_architecture(extra["arch"]).lambdas[extra["metric"]]
    for quality in qualities:
        if quality not in lambdas and not 1 <= quality <= codec.levels:
            raise InputError(
                f"{file} has the qualities 1 to {codec.levels}, not {quality}; choose others with --quality"
            )
    levels = {quality: float(quality) for quality in qualities} | {
        level: level for level in map(codec.level_of, args.rate_factor)
    }
    at = [
        extra
        | {"quality": quality, "level": level, "lambda": lambdas.get(quality) or interpolated(table, level)}
        for quality, level in sorted(levels.items())
    ]
    return [file] * len(at), at


def interpolated(table: dict[int, float], level: float) -> float:
    """The lambda of a level between two, on the straight line of its logarithm."""
    import numpy as np

    return float(np.exp(np.interp(level, list(table), np.log(list(table.values())))))


def one_kind(files: list[Path], saved: list[dict]) -> dict:
    """What the models of one curve have in common.

    Raises:
        InputError: models of different architectures or settings, or two of one quality, which are no R-D
        curve.
    """
    first = saved[0]
    for file, extra in zip(files[1:], saved[1:]):
        for key in ("arch", "metric", "config"):
            if extra[key] != first[key]:
                raise InputError(
                    f"{file} and {files[0]} differ in {key}, so they are no R-D curve; evaluate them one after the other"
                )
    qualities = [extra["quality"] for extra in saved]
    twice = [quality for quality in qualities if qualities.count(quality) > 1]
    if twice:
        raise InputError(f"two models of quality {twice[0]} are given with --model; leave one out")
    return first


def refuse_idle_flags(args: argparse.Namespace, files: list[Path], saved: list[dict]) -> None:
    """Raises InputError for flags that would have no effect beside these quantized models, or another than
    they say."""
    named = "--checkpoint" if args.checkpoint is not None else "--pretrained" if args.pretrained else None
    if named and not args.with_float:
        raise InputError(f"{named} and --no-float exclude each other; drop one of them")
    if args.lmbda is not None and not named:
        raise InputError(
            "--lambda is for the float codecs of --checkpoint or --pretrained; quantized models say their own, leave it out"
        )
    if args.metric not in (None, saved[0]["metric"]):
        raise InputError(
            f"--metric {args.metric} is not what the quantized models are made for, {saved[0]['metric']}; leave it out"
        )
    for file, extra in zip(files, saved):
        if isinstance(args.quality, list) and "rates" not in extra and extra["quality"] not in args.quality:
            raise InputError(
                f"{file} is of quality {extra['quality']}, which --quality leaves out; drop one of them"
            )


def find_floats(args: argparse.Namespace, saved: list[dict]) -> dict:
    """quality -> FloatModel: those the flags name, else those that the saved models were made from."""
    from licq.models.checkpoints import load_checkpoint
    from licq.models.registry import get_architecture
    from licq.runs.float_models import FloatModel, find_float_models, weights_digest
    from licq.support.files import sha256

    if not args.with_float:
        return {}
    named = args.checkpoint is not None or args.pretrained
    if not saved or named:
        arch = args.arch or (saved[0]["arch"] if saved else None)
        qualities = args.quality if not saved else sorted({round(extra["quality"]) for extra in saved})
        metric = saved[0]["metric"] if saved else args.metric or "mse"
        found = find_float_models(arch, qualities, args.checkpoint, args.pretrained, metric, args.lmbda)
        models = {model.quality: model for model in found}
    else:
        models = {}
        for extra in saved:
            origin = extra["checkpoint"]
            path = _where(origin, extra)
            if get_architecture(extra["arch"]).loader is None:
                is_same = path.is_file() and sha256(path) == origin["sha256"]
            else:
                is_same = (
                    path.exists()
                    and weights_digest(load_checkpoint(path, extra["arch"], extra["quality"]))
                    == origin["sha256"]
                )
            if not is_same:
                raise InputError(_NO_FLOAT.format(extra["quality"], path))
            models[extra["quality"]] = FloatModel(
                extra["arch"],
                extra["quality"],
                extra["lambda"],
                origin["origin"],
                path,
                origin["sha256"],
                origin["own_lambda"],
            )
    for model in models.values():
        model.load()
    return models


def _where(origin: dict, extra: dict) -> Path:
    """The checkpoint's path; an embedded one moves with the project."""
    if origin["origin"] == "embedded":
        from licq.models.checkpoints import embedded_checkpoint

        return embedded_checkpoint(
            extra["arch"], max(1, round(extra["quality"]))
        )  # a rate between two qualities has both's
    return Path(origin["path"])


def after_interrupt(argv: Sequence[str]) -> str:
    """How to go on after an interrupt of this command line."""
    if argv and argv[0] in (*commands.NAMES, "verify"):
        return "run the same command again"
    return "the same command with --resume goes on after the last finished part, of 64 images at most"


if __name__ == "__main__":
    sys.exit(main_guard(main, interrupted=after_interrupt(sys.argv[1:])))
