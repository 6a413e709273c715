"""Quantize trained image codecs after training, measure what that costs, and write a report.

python main_ptq.py --arch lu2022 --w_bits 8 --a_bits 8 --loss rd
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from licq.support import options
from licq.support.cli import ArgumentParser, main_guard
from licq.support.errors import InputError
from licq.support.progress import time_left
from licq.sweeps import commands

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from licq.data.datasets import Dataset
    from licq.quant.bits import Bits
    from licq.quant.model import QuantModel
    from licq.reconstruction.config import PtqConfig
    from licq.runs.float_models import FloatModel
    from licq.runs.folder import QualityFolder, RunFolder

# torch takes seconds to import: it is left to the functions that run after the arguments have been checked.

EPILOG = """\
The folder of --out gets report.html (pictures and tables in one file), report.md, report.json and rd.png, the curves as
CompressAI's plot tool takes them (compressai/*.json), and for each quality q<quality>/model.safetensors, crops.png and
result.json. Without --resume a run starts anew: what an earlier run left there stands until its successor is finished. With
--resume it goes on after the last finished unit, refuses a folder that holds a run with other settings, and takes up
qualities finished by other commands with the same settings.

bpp is estimated from the entropy model's likelihoods; main_eval.py --real counts the bytes of files.
"""


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="main_ptq.py",
        description=__doc__.splitlines()[0],
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_float_model(parser)
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
        help="bits of the inputs of multiply-accumulate layers, 2 to 16, or 32 for float (default: 8)",
    )
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
    group = parser.add_argument_group("reconstruction")
    group.add_argument(
        "--preset",
        metavar="NAME",
        default="licq",
        help="method: a name from reconstruction/presets/ or the path of a YAML file (default: licq)",
    )
    group.add_argument(
        "--loss",
        choices=options.LOSSES,
        help="what a unit minimizes: error of its output (mse), the same weighted by sensitivity (fisher), the "
        "squared change of J (rd), J itself (rd_direct), divergence (kl), error of its stage's output (stage), of the "
        "codec's outputs (output) (default: the preset's; licq: rd)",
    )
    group.add_argument(
        "--unit",
        choices=options.UNITS,
        help="what is reconstructed at once (default: the preset's; licq: block)",
    )
    group.add_argument(
        "--iters", metavar="N", type=options.count, help="optimizer steps per unit (default: the preset's)"
    )
    group.add_argument(
        "--set",
        dest="knobs",
        metavar="KNOB=VALUE",
        type=options.assignment,
        action="append",
        default=[],
        help="any other field of QuantConfig or ReconstructionConfig; repeatable (default: the preset's values)",
    )
    group.add_argument(
        "--seed",
        metavar="N",
        type=options.seed,
        default=0,
        help="of crops, batches and mixing, 0 to 4294967295 (default: 0)",
    )
    group = parser.add_argument_group("images")
    group.add_argument(
        "--calib",
        metavar="SET",
        help="calibration images: a folder or a data set's name (default: photos-calib, "
        "3 photos that installed packages ship)",
    )
    group.add_argument(
        "--num_calib", metavar="N", type=options.positive, default=10, help="calibration images (default: 10)"
    )
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
        help="how many times smaller an image is made before its first, second ... crop, over and over, separated "
        "by commas; one too small for that stays as it is (default: 1,2)",
    )
    group.add_argument(
        "--eval",
        dest="data",
        metavar="SET",
        help="evaluation images: a folder or a data set's name (default: kodak where it is found through "
        "LICQ_DATA or the cache, else photos, 3 photos that installed packages ship)",
    )
    add_layers(parser)
    options.add_machine(parser)
    group = parser.add_argument_group("run")
    group.add_argument(
        "--out",
        metavar="FOLDER",
        help="results (default: runs/<arch>_w<w_bits>a<a_bits>_<loss>; with a preset "
        "other than licq its name stands for the loss)",
    )
    group.add_argument(
        "--resume", action="store_true", help="go on where the same command was stopped (default: start anew)"
    )
    group.add_argument(
        "--no-baseline",
        dest="baseline",
        action="store_false",
        help="leave out the comparison with plain quantization: maximum ranges, nearest rounding, one scale per "
        "activation tensor, no reconstruction (default: compared)",
    )
    group.add_argument(
        "--shared",
        metavar="FOLDER",
        help="keep there what other runs need too, and take it from there: results of float codecs and JPEG's curves "
        "(default: in --out until the run is finished)",
    )
    commands.add_flags(parser.add_argument_group("sweep"))
    return parser


def add_layers(parser: ArgumentParser) -> None:
    """What is done with single layers; docs/analysis.md."""
    group = parser.add_argument_group("single layers")
    group.add_argument(
        "--analyze",
        action="store_true",
        help="do not quantize but measure where it would cost: each layer and each --unit quantized alone, ranges and "
        "outliers of channels, the landscape of J at one layer; tables and pictures for each quality",
    )
    group.add_argument(
        "--landscape",
        metavar="LAYER",
        help="the layer of --analyze's landscape (default: the one that costs most)",
    )
    group.add_argument(
        "--bits_file",
        metavar="FILE",
        help='bits of single layers, JSON or YAML: {"g_a.0": {"w_bits": 6, "a_bits": 8}, ...}; {quality} in the name stands '
        "for the quality. With one of the next three it is written (default: --w_bits and --a_bits everywhere)",
    )
    group.add_argument(
        "--budget_size",
        metavar="B",
        type=options.size_budget,
        help="search bits of weights with the least loss of J within this size: mean bits of a weight, e.g. 6, or all "
        "weights in megabytes, e.g. 1.5MB",
    )
    group.add_argument(
        "--budget_bops",
        metavar="B",
        type=options.bops_budget,
        help="search bits of weights and inputs with the least loss within so many bit operations: a share of those of 8 "
        "bits, e.g. 0.5, or for a pixel, e.g. 900k or 1.2M",
    )
    group.add_argument(
        "--max_bd_rate",
        metavar="X",
        type=options.positive_number,
        help="search the cheapest model whose BD-rate (PSNR, against float) stays below X percent; needs two qualities",
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
        help="what --max_bd_rate makes small: the size of the weights, or bit operations, "
        "by the bits of weights and inputs (default: size)",
    )


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.sweep:
        return commands.run(argv, parser, build_config)
    if args.only or args.workers or args.ray or args.gpu_share is not None:
        raise InputError("--only, --workers, --ray and --gpu_share are for --sweep; a single run is one task")
    args.quality = options.merge_qualities(args.quality)
    run = prepare(args)
    if args.analyze:
        from licq.runs.layers import analyze_run

        return analyze_run(run)
    if args.max_bd_rate is not None:
        from licq.runs.layers import below_bd_rate

        run = below_bd_rate(
            run, lambda attempt: (points := quantize_all(attempt), summarize(attempt, points)["bd_rate_psnr"])
        )
    return finish(run, quantize_all(run))


def quantize_all(run: "Run") -> list[dict]:
    """The points of all qualities."""
    return [quantize_quality(run, index) for index in range(len(run.models))]


@dataclass(frozen=True)
class Run:
    """Everything that was checked before the work starts; built by `prepare`.

    models: FloatModels. multiple: sides of inputs are multiples of it. crops: (n, 3, crop, crop) in 0..1, or
    with the planes of
    `models.qvrf.VariableRate`. kept: the folder of results that other runs or rounds need too. shared: what
    several qualities of a variable-rate codec use.
    warnings: remarks for the user. started: monotonic seconds.
    bits: of single layers, by quality. how: where they come from. taken_from: the run that has made the
    models with them already.
    """

    args: argparse.Namespace
    config: "PtqConfig"
    device: "torch.device"
    models: list["FloatModel"]
    multiple: int
    dataset: "Dataset"
    crops: "Tensor"
    folder: "RunFolder"
    kept: str | Path
    warnings: list[str]
    started: float
    shared: dict = field(default_factory=dict)
    bits: dict = field(default_factory=dict)
    how: str = ""
    taken_from: "RunFolder | None" = None

    @property
    def is_variable(self) -> bool:
        """One quantized codec serves all qualities."""
        from licq.models.registry import get_architecture

        return get_architecture(self.models[0].arch).variable

    def say(self, text: str) -> None:
        if not self.args.quiet:
            print(text, file=sys.stderr, flush=True)


def prepare(args: argparse.Namespace) -> Run:
    """Check settings, checkpoints, images, the device and the folder, in this order: nothing is written
    before the last."""
    from licq.models.registry import get_architecture
    from licq.quant.config import FLOAT_BITS
    from licq.runs.float_models import find_float_models
    from licq.runs.folder import RunFolder
    from licq.runs.inputs import calibration_crops, evaluation_set, images_digest, pick_device
    from licq.runs.layers import check_flags, check_written, named_layers, settings_of_layers
    from licq.support.determinism import seed_everything, set_threads
    from licq.support.version import __version__

    check_flags(args)
    config = build_config(args)
    device = pick_device(args.device)
    set_threads(args.threads)
    seed_everything(args.seed)
    models = find_float_models(
        args.arch, args.quality, args.checkpoint, args.pretrained, args.metric, args.lmbda
    )
    multiple = get_architecture(models[0].arch).multiple
    dataset, remark = evaluation_set(args.data, args.metric, progress=not args.quiet)
    crops, calibration, scarce = calibration_crops(
        args.calib,
        args.num_calib,
        args.crop,
        args.crops_per_image,
        args.crop_reductions,
        args.seed,
        multiple,
        args.metric,
        dataset,
    )
    if args.max_bd_rate is not None and len(models) < 2:
        raise InputError(
            "--max_bd_rate needs two qualities at least, for a BD-rate is between curves; give more with --quality"
        )
    bits = {}
    for source in models:
        network = source.load()
        bits |= named_layers(
            args, source.quality, network, len(models) > 1 and not get_architecture(source.arch).variable
        )
    if get_architecture(models[0].arch).variable:
        crops = with_rates(network, crops, models, args.seed)
        calibration["levels"] = [source.quality for source in models]
    settings = {
        "licq": __version__,
        "arch": models[0].arch,
        "metric": args.metric,
        "config": config.to_dict(),
        "calibration": calibration,
        "evaluation": {
            "dataset": dataset.name,
            "images": len(dataset),
            "sha256": images_digest(dataset.paths, progress=not args.quiet),
        },
    }
    settings |= settings_of_layers(args, bits)
    method = (
        "analysis"
        if args.analyze
        else config.reconstruction.loss
        if config.preset == "licq"
        else config.preset
    )
    out = args.out or f"runs/{models[0].arch}_w{config.quant.w_bits}a{config.quant.a_bits}_{method}"
    check_written(
        args,
        [source.quality for source in (models[:1] if get_architecture(models[0].arch).variable else models)],
    )
    folder = RunFolder(out, settings, args.resume)
    idle = unread = None
    if config.quant.bias_bits == 8 and FLOAT_BITS in (config.quant.w_bits, config.quant.a_bits):
        unread = "8-bit biases have no effect: beside float weights or inputs biases stay in float"
    learning = config.reconstruction
    if args.unit and not learning.iters and not (args.unit == "network" and learning.joint_iters):
        idle = f"--unit {args.unit} has no effect: units are reconstructed in 0 steps each; give their number, e.g. --iters 20"
    return Run(
        args=args,
        config=config,
        device=device,
        models=models,
        multiple=multiple,
        dataset=dataset,
        crops=crops,
        folder=folder,
        kept=args.shared or folder.measured,
        warnings=[remark for remark in (remark, scarce, idle, unread) if remark],
        started=time.monotonic(),
        bits=bits,
    )


def with_rates(network: "nn.Module", crops: "Tensor", models: list["FloatModel"], seed: int) -> "Tensor":
    """The crops of a variable-rate codec, each with the gain and the lambda of one of the qualities."""
    import torch

    from licq.data.calibration import draw_levels

    lambdas = {source.quality: source.lmbda for source in models}
    levels = draw_levels(len(crops), list(lambdas), seed)
    with torch.no_grad():
        return network.with_planes(
            crops, torch.tensor(levels), torch.tensor([lambdas[level] for level in levels])
        )


def build_config(args: argparse.Namespace) -> "PtqConfig":
    """The preset with the knobs of the command line."""
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


def quantize_quality(run: Run, index: int) -> dict:
    """One rate point, of which finished parts are taken from the folder; returns the point of report.json."""
    from licq.evaluation.evaluate import Report, evaluate
    from licq.report.build import make_point
    from licq.report.crops import save_crops
    from licq.runs.layers import bits_of_quality, own_settings, write_bits
    from licq.runs.shared import shared

    source, args = run.models[index], run.args
    folder = run.folder.quality(source.quality, own_settings(source), shared=run.is_variable)
    what = {
        "result": "float codec",
        "arch": source.arch,
        **folder.settings["evaluation"],
        "device": str(run.device),
        **own_settings(source),
    }
    complete = {"fp32", "quant", "crops"} | ({"baseline"} if args.baseline else set())
    done = complete <= folder.parts.keys()
    run.say(
        f"{source.arch} quality {source.quality} ({index + 1} of {len(run.models)})"
        + (": finished before" if done else time_left(run.started, index, len(run.models)))
    )
    load = functools.cache(source.load)

    def measure(model: "nn.Module") -> dict:
        return evaluate(
            model, run.dataset, pad=run.multiple, device=run.device, progress=not args.quiet
        ).to_dict()

    fp32 = folder.part("fp32", lambda: shared(run.kept, what, lambda: measure(load())))
    own = bits_of_quality(run, index, load, folder)
    bits = own and own["layers"]
    baseline = (
        folder.part("baseline", lambda: measure(plain_baseline(load(), run, source.quality, bits)))
        if args.baseline
        else None
    )
    quant = folder.part("quant", lambda: _reconstruct(load(), run, index, folder, measure, own))
    if own:
        write_bits(run, index, folder.path, quant["bits"]["layers"])
    reports = Report.from_dict(fp32), Report.from_dict(quant["report"])
    crops = folder.part(
        "crops",
        lambda: save_crops(
            run.folder.path,
            source.quality,
            codecs=(load(), _saved(run, index, folder)),
            reports=reports,
            paths=run.dataset.paths,
            lmbda=source.lmbda,
            metric=args.metric,
            pad=run.multiple,
            device=run.device,
        ),
    )
    folder.finish()
    return make_point(
        quality=source.quality,
        lmbda=source.lmbda,
        metric=args.metric,
        fp32=reports[0],
        quant=reports[1],
        baseline=baseline and Report.from_dict(baseline),
        calibration_seconds=quant["history"]["seconds"],
        peak_memory_mb=quant["history"].get("peak_memory_mb"),
        model_bytes=quant["model_bytes"],
        fp32_model_bytes=quant["fp32_model_bytes"],
        checkpoint={"origin": source.origin, "path": str(source.path), "sha256": source.sha256},
        history=quant["history"],
        coverage=quant["coverage"],
        crops=crops,
        **({"bits": quant["bits"]} if own else {}),
    )


def plain_baseline(model: "nn.Module", run: Run, quality: int, bits: "Bits | None" = None) -> "QuantModel":
    """The same bits with maximum ranges, nearest rounding, one scale per activation tensor, nothing learned.

    Of a variable-rate codec there is one for all qualities, as of the other.
    """
    if not run.is_variable:
        return _plain(model, run, bits)
    if "plain" not in run.shared:
        run.shared["plain"] = _plain(model, run, bits)
    run.shared["plain"].model.set_level(quality)
    return run.shared["plain"]


def _plain(model: "nn.Module", run: Run, own: "Bits | None") -> "QuantModel":
    from licq.quant.config import QuantConfig
    from licq.quant.model import QuantModel

    bits = {
        name: getattr(run.config.quant, name) for name in ("w_bits", "a_bits", "bias_bits", "strict_int8")
    }
    plain = QuantModel(
        model,
        QuantConfig(
            **bits,
            latent_bits=min(run.config.quant.a_bits, 16),
            a_granularity="tensor",
            w_range="max",
            a_range="max",
            a_headroom=1.0,
            a_symmetry="one_sided",
            rounding="nearest",
        ),
        own,
    )
    plain.to(run.device)
    plain.observe(run.crops[: run.config.reconstruction.observed].to(run.device).split(2))
    plain.freeze()
    return plain


BASELINE = (
    "maximum ranges, nearest rounding, per-channel weights, one scale per activation tensor, no reconstruction; "
    "the same bits and calibration images"
)


def _reconstruct(
    model: "nn.Module",
    run: Run,
    index: int,
    folder: "QualityFolder",
    measure: Callable[["nn.Module"], dict],
    own: dict | None,
) -> dict:
    """Quantize, measure, save: the finished part of result.json. A variable-rate codec is quantized with its
    first quality.

    own: the bits of single layers, see `bits_of_quality`.
    """
    from licq.reconstruction.api import quantize
    from licq.runs.layers import described_bits, take_model
    from licq.support.files import sha256

    args, source = run.args, run.models[index]
    if run.taken_from is not None:
        return take_model(run, index, folder, own)
    if run.is_variable and index:
        first = run.folder.quality_parts(run.models[0].quality)["quant"]
        return first | {"report": measure(_saved(run, index, folder))}
    codec = quantize(
        model,
        run.crops,
        run.config,
        lmbda=source.lmbda,
        metric=args.metric,
        bits=own and own["layers"],
        device=run.device,
        folder=folder.path,
        resume=args.resume,
        progress=not args.quiet,
    )
    report = measure(codec)
    rates = {"rates": {other.quality: other.lmbda for other in run.models}} if run.is_variable else {}
    codec.save(
        folder.model,
        {
            **rates,
            "arch": source.arch,
            "quality": source.quality,
            "lambda": source.lmbda,
            "metric": args.metric,
            "preset": run.config.preset,
            "config": run.config.to_dict(),
            "calibration": run.folder.settings["calibration"],
            "checkpoint": {
                "origin": source.origin,
                "path": str(source.path.resolve()),
                "sha256": source.sha256,
                "own_lambda": source.own_lambda,
            },
            "calibration_seconds": codec.history["seconds"],
            "peak_memory_mb": codec.history.get("peak_memory_mb"),
            "coverage": codec.coverage(),
        },
    )
    if own is not None:
        own = described_bits(own, codec, run.crops)
    return {
        "report": report,
        "history": codec.history,
        "coverage": codec.coverage(),
        "model_sha256": sha256(folder.model),
        "model_bytes": folder.model.stat().st_size,
        "fp32_model_bytes": 4 * sum(parameter.numel() for parameter in model.parameters()),
        **({"bits": own} if own else {}),
    }


def _saved(run: Run, index: int, folder: "QualityFolder") -> "QuantModel":
    """The quantized codec of a quality as it was saved."""
    from licq.quant.model import QuantModel

    codec = QuantModel.load(folder.model)
    if run.is_variable:
        codec.model.set_level(run.models[index].quality)
    return codec


def summarize(run: Run, points: list[dict]) -> dict:
    """The dictionary of report.json."""
    from licq.evaluation.anchors import anchors_of
    from licq.report.build import build_report
    from licq.report.text import coverage_lines
    from licq.runs.shared import shared

    config, args = run.config, run.args
    arch = run.models[0].arch
    anchors = shared(
        run.kept,
        {"result": "anchors", "arch": arch, **run.folder.settings["evaluation"], "metric": args.metric},
        lambda: anchors_of(arch, run.dataset, args.metric, progress=not args.quiet),
    )
    coverage = points[0]["coverage"]
    return build_report(
        arch=arch,
        preset=config.preset,
        loss=config.reconstruction.loss,
        unit=config.reconstruction.unit,
        w_bits=config.quant.w_bits,
        a_bits=config.quant.a_bits,
        dataset=run.dataset.name,
        images=len(run.dataset),
        points=points,
        anchors=anchors,
        warnings=run.warnings,
        baseline=BASELINE if args.baseline else None,
        metric=args.metric,
        config={
            **config.quant.to_dict(),
            **config.reconstruction.to_dict(),
            "metric": args.metric,
            "calibration": run.folder.settings["calibration"],
            "device": str(run.device),
        },
        kept_in_float=coverage_lines(coverage),
        left_alone=coverage["left_alone"],
    )


def finish(run: Run, points: list[dict]) -> int:
    """The report, and its essence on standard output."""
    from licq.report.build import write_report
    from licq.report.text import render_summary

    report = summarize(run, points)
    write_report(run.folder.path, report)
    run.folder.forget_measured()
    print(render_summary(report))
    print(
        f"\nreport:  {run.folder.path / 'report.html'}, report.md, report.json, rd.png"
        f"\nmodels:  {', '.join(dict.fromkeys(str(run.folder.model(source.quality, run.is_variable)) for source in run.models))}"
    )
    for warning in run.warnings:
        print(f"note: {warning}")
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
