"""An evaluation run: quantized models and their float codecs measured on images, in parts if there are many,
and reported."""

import argparse
import functools
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from licq.data.datasets import Dataset
from licq.evaluation import evaluate as evaluation
from licq.evaluation.anchors import anchors_of, classical_points
from licq.evaluation.evaluate import Report
from licq.models.registry import Architecture, get_architecture, list_models
from licq.quant.model import QuantModel
from licq.report.build import build_report, make_point, write_report
from licq.report.crops import make_crops, save_picture
from licq.report.text import coverage_lines
from licq.runs.float_models import FloatModel, set_rate
from licq.runs.inputs import check_images, find_evaluation_set, pick_device
from licq.runs.saved_models import (
    common_header,
    find_float_codecs,
    find_models,
    models_at_rates,
    read_header,
    refuse_idle_flags,
)
from licq.runs.shards import PART, forget_shards, measured_in_shards
from licq.support import options
from licq.support.determinism import set_threads, versions
from licq.support.errors import InputError
from licq.support.files import sha256, writable_folder, write_json
from licq.workers.engine import Engine


@dataclass(frozen=True)
class RatePoint:
    """One point of the curves: a quality, its quantized model and what that model's file says of itself.

    file: None, and `header` empty, where only the float codec is measured.
    """

    quality: float
    file: Path | None
    header: dict[str, Any]


@dataclass(frozen=True)
class EvaluationRun:
    """What `prepare_evaluation` has checked.

    args:           the command line.
    points:         by rising quality or as --model names them.
    header:         what the quantized models have in common, None without any.
    float_codecs:   by quality; empty with --no-float.
    dataset:        the images; with --shard those of the shard.
    warnings:       remarks for the user.
    results_folder: gets the report.
    """

    args: argparse.Namespace
    device: torch.device
    points: list[RatePoint]
    header: dict[str, Any] | None
    float_codecs: dict[float, FloatModel]
    arch: str
    metric: str
    dataset: Dataset
    warnings: list[str]
    results_folder: Path

    @property
    def multiple(self) -> int:
        """Sides of the network's inputs are multiples of it, in pixels."""
        return get_architecture(self.arch).multiple

    @property
    def progress(self) -> bool:
        """Whether progress is shown."""
        return not self.args.quiet

    def codecs(self, index: int) -> tuple[nn.Module | None, QuantModel | None]:
        """The float codec and the quantized model of a rate point, set to its rate; None where there is
        none."""
        point = self.points[index]
        quant = QuantModel.load(point.file) if point.file else None
        network = self.float_codecs[point.quality].load() if point.quality in self.float_codecs else None
        if "level" in point.header:
            for model in (quant and quant.model, network):
                if model is not None:
                    set_rate(model, point.header["level"])
        return network, quant


def prepare_evaluation(args: argparse.Namespace) -> EvaluationRun:
    """The evaluation run of a command line. Models, float codecs and images are checked; nothing is written
    but an empty folder.

    Raises:
        InputError: one of them cannot be used, or flags contradict each other.
    """
    only_float = args.model == ["float"]
    if only_float and not args.with_float:
        raise InputError("--model float and --no-float leave nothing to evaluate; drop one of them")
    if only_float and args.real:
        raise InputError(
            "--real is for quantized models: a float codec's files cannot be decoded safely elsewhere; "
            "leave it out"
        )
    if args.real and args.estimate:
        raise InputError("--real and --estimate exclude each other; give one of them")
    files = [] if only_float else find_models(args.model, args.quality)
    Engine.from_args(args)  # its flags are checked before the files are read
    device = pick_device(args.device)
    set_threads(args.threads)
    # a plug-in's file registers its codec here
    architecture = get_architecture(args.arch) if args.arch else None
    headers = [read_header(file) for file in files]
    header = common_header(files, headers) if files else None
    if header:
        refuse_idle_flags(args, files, headers)
    if args.rate_factor and not (header and "rates" in header):
        raise InputError(
            "--rate_factor is for quantized variable-rate codecs; leave it out, or give one with --model"
        )
    if header and "rates" in header:
        files, headers = models_at_rates(files[0], header, args)
    if header:
        _check_architecture(args, architecture, files[0], header["arch"])
    float_codecs = find_float_codecs(args, headers)
    arch = header["arch"] if header else next(iter(float_codecs.values())).arch
    metric = header["metric"] if header else args.metric or "mse"
    dataset, remark = find_evaluation_set(args.data)
    if args.shard:
        dataset = Dataset(dataset.name, dataset.paths[args.shard])
    if not (args.workers or args.ray):  # where there are many images, each part looks at its own
        check_images(dataset, metric, progress=not args.quiet)
    return EvaluationRun(
        args=args,
        device=device,
        points=[RatePoint(header["quality"], file, header) for file, header in zip(files, headers)]
        or [RatePoint(quality, None, {}) for quality in sorted(float_codecs)],
        header=header,
        float_codecs=float_codecs,
        arch=arch,
        metric=metric,
        dataset=dataset,
        warnings=([remark] if remark else []) + _changed_float_codecs(headers, float_codecs),
        results_folder=writable_folder(args.out or _default_folder(files, arch, dataset)),
    )


def _check_architecture(args: argparse.Namespace, named: Architecture | None, file: Path, arch: str) -> None:
    """Raises InputError where the models' architecture is unknown, or not the one that --arch names."""
    if arch not in list_models():
        raise InputError(
            f"{file} needs the architecture {arch!r}; name the Python file that registers it with --arch"
        )
    if named is not None and named.name != arch:
        raise InputError(f"--arch {args.arch} is not that of the quantized models, {arch}; leave it out")


def _default_folder(files: Sequence[Path], arch: str, dataset: Dataset) -> Path:
    if not files:
        return Path(f"runs/{arch}_float_{dataset.name}")
    folder = files[0].parent
    return (folder.parent if folder.name.startswith("q") else folder) / f"eval_{dataset.name}"


def _changed_float_codecs(
    headers: Sequence[dict[str, Any]], float_codecs: dict[float, FloatModel]
) -> list[str]:
    """Remarks on float codecs that are not those that were quantized."""
    return [
        f"the float codec of quality {header['quality']} is another file than the one that was quantized"
        for header in headers
        if header["quality"] in float_codecs
        and float_codecs[header["quality"]].sha256 != header["checkpoint"]["sha256"]
    ]


# ----------------------------------------------------------------------------------------------- measurements


def measure_part(run: EvaluationRun, images: slice) -> dict[str, Any]:
    """The codecs on some of the images.

    Returns:
        As JSON: {"points": [{"quant", "fp32": `Report.to_dict` of each that is there, "fp32_model_bytes"}]
        one a rate point, "anchors": see `classical_points`}.
    """
    dataset = Dataset(run.dataset.name, run.dataset.paths[images])
    points = [_measure_point(run, index, dataset) for index in range(len(run.points))]
    anchors = classical_points(dataset.paths, progress=run.progress) if run.args.with_anchors else {}
    return {"points": points, "anchors": {name: values.tolist() for name, values in anchors.items()}}


def _measure_point(run: EvaluationRun, index: int, dataset: Dataset) -> dict[str, Any]:
    point = run.points[index]
    if run.progress:
        print(f"{run.arch} quality {point.quality} ({index + 1} of {len(run.points)})", file=sys.stderr)
    network, quant = run.codecs(index)
    real = True if run.args.real else False if run.args.estimate else None
    measured = {}
    for name, model in (("quant", quant), ("fp32", network)):
        if model is not None:
            measured[name] = evaluation.evaluate(
                model,
                dataset,
                pad=run.multiple,
                device=run.device,
                real=real if name == "quant" else None,
                progress=run.progress,
            ).to_dict()
    if network is not None:
        measured["fp32_model_bytes"] = 4 * sum(p.numel() for p in network.parameters())
    return measured


def write_part(run: EvaluationRun) -> None:
    """--shard: OUT/part.json."""
    write_json(run.results_folder / PART, measure_part(run, slice(None)))


def finish_evaluation(run: EvaluationRun, argv: Sequence[str]) -> dict:
    """Measure, here or in parts elsewhere, and write the files of the report.

    Args:
        argv: the command line, for parts in other processes.

    Returns:
        What report.json holds.

    Raises:
        InputError: a part failed, or what is to be resumed belongs to other settings.
    """
    engine = Engine.from_args(run.args)
    parts = measured_in_shards(
        len(run.dataset),
        run.results_folder,
        _settings(run, engine),
        engine,
        _words_of_shards(argv, engine),
        run.args.resume,
        run.args.quiet,
        functools.partial(measure_part, run),
    )
    points, pictures = [], {}
    for index in range(len(run.points)):
        point, picture = _report_point(run, index, [part["points"][index] for part in parts])
        points.append(point)
        pictures |= picture
    anchors = {
        name: np.concatenate([np.array(part["anchors"][name], float) for part in parts], axis=1)
        for name in parts[0]["anchors"]
    }
    report = _build_report(run, points, anchors)
    for file, picture in pictures.items():
        save_picture(run.results_folder / file, picture)
    write_report(run.results_folder, report)
    forget_shards(run.results_folder)
    return report


def _settings(run: EvaluationRun, engine: Engine) -> dict[str, Any]:
    """Everything that the parts of an evaluation depend on."""
    return {
        "versions": versions(),
        "threads": engine.threads or torch.get_num_threads(),
        "device": str(run.device),
        "real": run.args.real,
        "estimate": run.args.estimate,
        "anchors": run.args.with_anchors,
        "quantized": [sha256(point.file) for point in run.points if point.file],
        "rates": [point.quality for point in run.points],
        "float": {str(quality): model.sha256 for quality, model in run.float_codecs.items()},
        "dataset": run.dataset.name,
        "images": len(run.dataset),
        "files": _files_digest(run.dataset.paths),
    }


def _files_digest(paths: Sequence[Path]) -> str:
    """SHA-256 over names, sizes and times of change: enough to resume by, where contents would take
    minutes."""
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(repr(states).encode()).hexdigest()


def _words_of_shards(argv: Sequence[str], engine: Engine) -> list[str]:
    """The command line without what is the whole evaluation's, for its parts."""
    rest = options.words_of_parts(argv)
    return rest if engine.threads is None else [*rest, "--threads", str(engine.threads)]


# ------------------------------------------------------------------------------------------------- the report


def _report_point(
    run: EvaluationRun, index: int, parts: Sequence[dict[str, Any]]
) -> tuple[dict, dict[str, Image.Image]]:
    """A point of report.json, and {file: picture} of its crops where both codecs were measured."""
    point = run.points[index]
    quality, header = round(point.quality, 3), point.header
    fp32, quant = (
        Report.joined([Report.from_dict(part[codec]) for part in parts]) if codec in parts[0] else None
        for codec in ("fp32", "quant")
    )
    lmbda = header.get("lambda") or run.float_codecs[quality].lmbda
    crops: dict[str, Any] = {}
    pictures: dict[str, Image.Image] = {}
    network, codec = run.codecs(index) if fp32 and quant else (None, None)
    if network is not None and codec is not None and fp32 and quant:
        where, picture = make_crops(
            quality,
            codecs=(network, codec),
            reports=(fp32, quant),
            paths=run.dataset.paths,
            lmbda=lmbda,
            metric=run.metric,
            pad=run.multiple,
            device=run.device,
        )
        crops, pictures = {"crops": where}, {where["file"]: picture}
    return (
        make_point(
            quality=quality,
            lmbda=lmbda,
            metric=run.metric,
            fp32=fp32,
            quant=quant,
            calibration_seconds=header.get("calibration_seconds"),
            peak_memory_mb=header.get("peak_memory_mb"),
            model_bytes=point.file.stat().st_size if point.file else None,
            fp32_model_bytes=parts[0].get("fp32_model_bytes"),
            model=str(point.file) if point.file else None,
            **crops,
        ),
        pictures,
    )


def _build_report(run: EvaluationRun, points: list[dict], anchors: dict[str, np.ndarray]) -> dict:
    """The dictionary of report.json."""
    config = run.header["config"] if run.header else {"preset": None, "quant": {}, "reconstruction": {}}
    quant, reconstruction = config["quant"], config["reconstruction"]
    settings = {**quant, **reconstruction, "metric": run.metric, "device": str(run.device)}
    if run.header:
        settings["calibration"] = run.header["calibration"]
    headers = [point.header for point in run.points]
    coverage = next((header["coverage"] for header in headers if header.get("coverage")), None)
    in_float = (
        {"kept_in_float": coverage_lines(coverage), "left_alone": coverage["left_alone"]} if coverage else {}
    )
    return build_report(
        arch=run.arch,
        preset=config["preset"],
        loss=reconstruction.get("loss"),
        unit=reconstruction.get("unit"),
        w_bits=quant.get("w_bits"),
        a_bits=quant.get("a_bits"),
        dataset=run.dataset.name,
        images=len(run.dataset),
        points=points,
        warnings=run.warnings,
        metric=run.metric,
        anchors=anchors_of(run.arch, run.dataset, run.metric, points=anchors)
        if run.args.with_anchors
        else None,
        config=settings,
        **in_float,
    )
