"""What one quality of a run goes through: a list of steps whose results are kept in the quality's folder."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import nn

from licq.codec.api import Codec
from licq.evaluation import evaluate as evaluation
from licq.evaluation.evaluate import Report
from licq.quant.bits import Bits
from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.reconstruction.api import quantize
from licq.reconstruction.expected import OBSERVING
from licq.report.build import make_point
from licq.report.crops import save_crops
from licq.runs.expected import CROPS, planned_qualities
from licq.runs.float_models import FloatModel, set_rate
from licq.runs.folder import QualityFolder
from licq.runs.layer_search import described_bits, find_layer_bits, write_layer_bits
from licq.runs.run import Run
from licq.runs.shared import shared
from licq.runs.side_by_side import publish, run_in_workers
from licq.support.files import atomic_path, sha256
from licq.support.progress import progress
from licq.support.work import Item, current, working
from licq.workers.engine import Engine

BASELINE = (
    "maximum ranges, nearest rounding, per-channel weights, one scale per activation tensor, no "
    "reconstruction; the same bits and calibration images"
)


@dataclass
class Quality:
    """One quality of a run while it goes through `STEPS`.

    index:      of the quality among the run's.
    folder:     keeps the result of each finished step as a part of that name.
    layer_bits: see `find_layer_bits`; set by the step of that name.
    made:       the quantized codec, where it was made in this process.
    """

    run: Run
    index: int
    source: FloatModel = field(init=False)
    folder: QualityFolder = field(init=False)
    layer_bits: dict | None = None
    made: QuantModel | None = None

    def __post_init__(self):
        self.source = self.run.models[self.index]
        self.folder = self.run.folder.quality(
            self.source.quality, quality_settings(self.source), shared=self.run.is_variable
        )

    @cached_property
    def network(self) -> nn.Module:
        """The float codec, loaded when a step needs it."""
        return self.source.load()

    @property
    def allocation(self) -> Bits | None:
        """Bits of single layers, as `QuantModel` takes them."""
        return self.layer_bits and self.layer_bits["layers"]

    @property
    def is_finished(self) -> bool:
        parts = {"fp32", "quant", "crops"} | ({"baseline"} if self.run.args.baseline else set())
        return parts <= self.folder.parts.keys()

    def measure(self, model: nn.Module, count_clipped: bool = False) -> dict:
        """`model` on the run's evaluation images, as `Report.to_dict`."""
        run = self.run
        return evaluation.evaluate(
            model,
            run.dataset,
            pad=run.multiple,
            device=run.device,
            real=False if run.args.estimate else None,
            count_clipped=count_clipped,
            progress=run.progress,
        ).to_dict()

    def report(self, part: str) -> Report:
        """What a finished step has measured."""
        stored = self.folder.parts[part]
        return Report.from_dict(stored["report"] if part == "quant" else stored)

    def saved_codec(self) -> QuantModel:
        """The quantized codec as it was made, or from its file; set to this quality."""
        codec = self.made or QuantModel.load(self.folder.model)
        if self.run.is_variable:
            set_rate(codec.model, self.source.quality)
        return codec


def quality_settings(source: FloatModel) -> dict:
    """What results of one quality depend on, beside the run's settings."""
    return {"quality": source.quality, "lambda": source.lmbda, "checkpoint_sha256": source.sha256}


# -------------------------------------------------------------------------------------------------- the steps


def measure_float_codec(quality: Quality) -> None:
    """The float codec on the evaluation images; the result serves other runs too."""
    run, source = quality.run, quality.source
    what = {
        "result": "float codec",
        "arch": source.arch,
        **quality.folder.settings["evaluation"],
        "device": str(run.device),
        **quality_settings(source),
    }
    quality.folder.part(
        "fp32", lambda: shared(run.shared_results, what, lambda: quality.measure(quality.network))
    )


def choose_layer_bits(quality: Quality) -> None:
    """Bits of single layers, from a file or by a search."""
    quality.layer_bits = find_layer_bits(quality.run, quality.index, lambda: quality.network, quality.folder)


def measure_baseline(quality: Quality) -> None:
    """The plain baseline, see `plain_baseline`."""
    if quality.run.args.baseline:
        quality.folder.part("baseline", lambda: quality.measure(plain_baseline(quality)))


def make_quantized_codec(quality: Quality) -> None:
    """Quantize, measure and save; or take what another run or the first rate of this one has made."""
    quality.folder.part("quant", lambda: _quantized_part(quality))


def write_bits(quality: Quality) -> None:
    """bits.json, where single layers have bits of their own."""
    if quality.layer_bits:
        bits = quality.folder.parts["quant"]["bits"]["layers"]
        write_layer_bits(quality.run, quality.index, quality.folder, bits)


def cut_crops(quality: Quality) -> None:
    """crops.png: where quantization shows most."""
    quality.folder.part("crops", lambda: _crops(quality))


def _crops(quality: Quality) -> dict:
    run, source = quality.run, quality.source
    with progress(total=1, desc=CROPS, unit="picture", enabled=run.progress, leave=False):
        return save_crops(
            run.folder.path,
            source.quality,
            codecs=(quality.network, quality.saved_codec()),
            reports=(quality.report("fp32"), quality.report("quant")),
            paths=run.dataset.paths,
            lmbda=source.lmbda,
            metric=run.args.metric,
            pad=run.multiple,
            device=run.device,
        )


STEPS: tuple[Callable[[Quality], None], ...] = (
    measure_float_codec,
    choose_layer_bits,
    measure_baseline,
    make_quantized_codec,
    write_bits,
    cut_crops,
)


def run_quality(run: Run, index: int, announced: bool = False) -> dict:
    """All steps of one quality; returns its point of report.json.

    Args:
        announced: the user knows already that it is finished.
    """
    quality = Quality(run, index)
    label = f"{run.arch} quality {quality.source.quality} ({index + 1} of {len(run.models)})"
    work = current()
    if quality.is_finished:
        if not announced:
            run.say(f"{label}: finished before")
    elif work is not None:
        work.enter(f"q{quality.source.quality}", label)
    for step in STEPS:
        step(quality)
    quality.folder.finish()
    return _point(quality)


def run_all_qualities(run: Run, argv: Sequence[str] = ()) -> list[dict]:
    """The points of report.json, one a quality.

    Args:
        argv: the command line, for qualities in other processes.
    """
    count = len(run.models)
    items = planned(run) if run.progress and current() is None else []
    with working(run.arch, items, run.progress, workers=run.workers) as work:
        left = [number for number in range(count) if not Quality(run, number).is_finished]
        if run.workers > 1 and len(left) > 1:
            engine = Engine(run.workers, threads=run.args.threads)
            qualities = [run.models[number].quality for number in left]
            run_in_workers(argv, engine, run.folder.path, qualities, run.args.resume, work)
            run.folder.resume = True  # what the workers have finished is taken up
        else:
            left = []
        return [run_quality(run, number, announced=number in left) for number in range(count)]


def run_part(run: Run) -> None:
    """--part: one quality, in a worker process."""
    index = [model.quality for model in run.models].index(run.args.part)
    quality = Quality(run, index)
    items = planned_qualities(run, {index: quality.folder})
    with working(run.arch, items, run.progress, publish=partial(publish, quality.folder.path)):
        run_quality(run, index)


def planned(run: Run) -> list[Item]:
    """The work of all qualities that is left."""
    return planned_qualities(run, {index: Quality(run, index).folder for index in range(len(run.models))})


def _point(quality: Quality) -> dict:
    source, quant = quality.source, quality.folder.parts["quant"]
    return make_point(
        quality=source.quality,
        lmbda=source.lmbda,
        metric=quality.run.args.metric,
        fp32=quality.report("fp32"),
        quant=quality.report("quant"),
        baseline=quality.report("baseline") if quality.run.args.baseline else None,
        calibration_seconds=quant["history"]["seconds"],
        peak_memory_mb=quant["history"].get("peak_memory_mb"),
        model_bytes=quant["model_bytes"],
        fp32_model_bytes=quant["fp32_model_bytes"],
        checkpoint={"origin": source.origin, "path": str(source.path), "sha256": source.sha256},
        history=quant["history"],
        coverage=quant["coverage"],
        crops=quality.folder.parts["crops"],
        **({"bits": quant["bits"]} if quality.layer_bits else {}),
    )


# --------------------------------------------------------------------------------------- the quantized codecs


def plain_baseline(quality: Quality) -> QuantModel:
    """The same bits with maximum ranges, nearest rounding, one scale per activation tensor, nothing learned.

    Of a variable-rate codec there is one for all qualities.
    """
    run = quality.run
    if not run.is_variable:
        return _observed_baseline(quality)
    if "plain" not in run.cache:
        run.cache["plain"] = _observed_baseline(quality)
    set_rate(run.cache["plain"].model, quality.source.quality)
    return run.cache["plain"]


def _observed_baseline(quality: Quality) -> QuantModel:
    run, quant = quality.run, quality.run.config.quant
    config = QuantConfig(
        w_bits=quant.w_bits,
        a_bits=quant.a_bits,
        bias_bits=quant.bias_bits,
        strict_int8=quant.strict_int8,
        latent_bits=min(quant.a_bits, 16),
        a_granularity="tensor",
        w_range="max",
        a_range="max",
        a_headroom=1.0,
        a_symmetry="one_sided",
        rounding="nearest",
    )
    plain = QuantModel(quality.network, config, quality.allocation)
    plain.to(run.device)
    batches = run.crops[: run.config.reconstruction.observed].to(run.device).split(2)
    plain.observe(progress(batches, desc=OBSERVING, unit="batch", enabled=run.progress, leave=False))
    plain.freeze()
    return plain


def _quantized_part(quality: Quality) -> dict[str, Any]:
    """The part "quant" of result.json."""
    run = quality.run
    if run.models_from is not None:
        return _copied_codec(quality)
    if run.is_variable and quality.index:  # quantized with the first quality
        first = run.folder.quality_parts(run.models[0].quality)["quant"]
        return first | {"report": quality.measure(quality.saved_codec())}
    codec = quantize(
        quality.network,
        run.crops,
        run.config,
        lmbda=quality.source.lmbda,
        metric=run.args.metric,
        bits=quality.allocation,
        device=run.device,
        folder=quality.folder.path,
        resume=run.args.resume,
        progress=run.progress,
        whole=run.whole,
    )
    quality.made = codec
    _check_files(quality, codec)
    report = quality.measure(codec, count_clipped=run.config.clips)
    codec.save(quality.folder.model, _header(quality, codec))
    layer_bits = quality.layer_bits and described_bits(quality.layer_bits, codec, run)
    return {
        "report": report,
        "history": codec.history,
        "coverage": codec.coverage(),
        "checked": codec.checked,
        "model_sha256": sha256(quality.folder.model),
        "model_identity": codec.identity,
        "model_bytes": quality.folder.model.stat().st_size,
        "fp32_model_bytes": 4 * sum(parameter.numel() for parameter in quality.network.parameters()),
        **({"bits": layer_bits} if layer_bits else {}),
    }


def _check_files(quality: Quality, codec: QuantModel) -> None:
    """Check that the model's files decode to its own pixels, on a calibration crop. The model's file says
    what was found.

    Raises:
        InputError: they do not.
    """
    run = quality.run
    if (why := codec.config.why_no_files) is not None:
        codec.checked["files"] = {"none": why}
        return
    crop = (run.crops[0, :3] * 255).round().to("cpu", torch.uint8)
    Codec(codec, None, run.args.threads, run.multiple).check(crop)


def _header(quality: Quality, codec: QuantModel) -> dict[str, Any]:
    """What the file of a quantized codec says of itself, beside its tensors; `main_eval.py` reads it."""
    run, source, history = quality.run, quality.source, cast(dict[str, Any], codec.history)
    rates = {"rates": {other.quality: other.lmbda for other in run.models}} if run.is_variable else {}
    return {
        **rates,
        "arch": source.arch,
        "quality": source.quality,
        "lambda": source.lmbda,
        "metric": run.args.metric,
        "preset": run.config.preset,
        "config": run.config.to_dict(),
        "calibration": run.folder.settings["calibration"],
        "checkpoint": {
            "origin": source.origin,
            "path": str(source.path.resolve()),
            "sha256": source.sha256,
            "own_lambda": source.own_lambda,
        },
        "calibration_seconds": history["seconds"],
        "peak_memory_mb": history.get("peak_memory_mb"),
        "coverage": codec.coverage(),
    }


def _copied_codec(quality: Quality) -> dict[str, Any]:
    """The part "quant" of a quality that another run has made, whose model is copied."""
    other, number = quality.run.models_from, quality.source.quality
    assert other is not None and quality.layer_bits is not None
    with atomic_path(quality.folder.model) as temporary:
        shutil.copyfile(other.model(number, quality.run.is_variable), temporary)
    part = other.quality_parts(number)["quant"]
    origin = {key: value for key, value in quality.layer_bits.items() if key != "layers"}
    return part | {"bits": part["bits"] | origin}
