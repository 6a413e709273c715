"""A run: everything that one command line of `main_ptq.py` needs, checked before the work starts."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from licq.data.calibration import draw_levels
from licq.data.datasets import Dataset
from licq.models.qvrf import VariableRate
from licq.models.registry import Architecture, get_architecture
from licq.quant.bits import Bits
from licq.quant.config import FLOAT_BITS
from licq.reconstruction.config import PtqConfig
from licq.reconstruction.expected import count_layers
from licq.runs.flags import build_config
from licq.runs.float_models import FloatModel, find_float_models
from licq.runs.folder import RunFolder, read_json
from licq.runs.inputs import calibration_images, evaluation_set, images_digest, pick_device
from licq.runs.layer_bits import (
    check_float_stages,
    check_written_bits,
    read_layer_bits,
    settings_of_layers,
)
from licq.support.determinism import seed_everything, set_threads
from licq.support.errors import InputError
from licq.support.progress import say
from licq.support.version import __version__
from licq.workers.engine import Engine


@dataclass(frozen=True)
class Size:
    """Of a float network: its convolutions and linear layers, and the numbers in all its parameters."""

    layers: int
    parameters: int

    @classmethod
    def of(cls, network: nn.Module) -> "Size":
        return cls(count_layers(network), sum(parameter.numel() for parameter in network.parameters()))


@dataclass(frozen=True)
class Run:
    """What `prepare` has checked.

    args:           the command line.
    config:         the method.
    models:         float codecs, by rising quality.
    networks:       the sizes of their networks, by quality.
    multiple:       sides of the network's inputs are multiples of it, in pixels.
    dataset:        the evaluation images.
    crops:          calibration crops, (n, 3, crop, crop) in 0..1; of a variable-rate codec (n, 5, crop, crop)
                    with the planes of `models.qvrf.VariableRate.with_planes`.
    whole:          the images of the crops, as `quantize` takes them; none where the method does without.
    folder:         the results.
    shared_results: folder of results that other runs need too, see `runs.shared`.
    warnings:       remarks for the user.
    workers:        qualities that are done at a time, in processes of their own.
    layer_bits:     bits of single layers, by quality; empty where every layer has the same.
    bits_origin:    where they come from, for a reader; empty: from --bits_file.
    models_from:    the folder of the run that has made the quantized codecs with them already.
    cache:          what several qualities of a variable-rate codec share in this process.
    """

    args: argparse.Namespace
    config: PtqConfig
    device: torch.device
    models: list[FloatModel]
    networks: dict[int, Size]
    multiple: int
    dataset: Dataset
    crops: Tensor
    whole: list[Tensor]
    folder: RunFolder
    shared_results: str | Path
    warnings: list[str]
    workers: int = 1
    layer_bits: dict[int, Bits] = field(default_factory=dict)
    bits_origin: str = ""
    models_from: RunFolder | None = None
    cache: dict[str, Any] = field(default_factory=dict)

    @property
    def arch(self) -> str:
        return self.models[0].arch

    @property
    def is_variable(self) -> bool:
        """One quantized codec serves all qualities."""
        return get_architecture(self.arch).variable

    @property
    def codecs(self) -> list[FloatModel]:
        """The float codecs of which a quantized one is made: of a variable-rate codec the first quality's."""
        return self.models[:1] if self.is_variable else self.models

    @property
    def progress(self) -> bool:
        """Whether progress is shown."""
        return not self.args.quiet

    def say(self, text: str) -> None:
        """A line of progress, on standard error."""
        if self.progress:
            say(text)


def prepare(args: argparse.Namespace) -> Run:
    """The run of a command line. Settings, checkpoints, images, the device and the folder are checked in this
    order; nothing is written before the last.

    Raises:
        InputError: one of them cannot be used.
    """
    config = build_config(args)
    device = pick_device(args.device)
    seed_everything(args.seed)
    models = find_float_models(
        args.arch, args.quality, args.checkpoint, args.pretrained, args.metric, args.lmbda
    )
    architecture = get_architecture(models[0].arch)
    out = Path(args.out or _default_folder(args, config, architecture.name))
    if args.part is not None:
        out = _folder_of_part(args, out, models)
    workers = 1 if architecture.variable else min(args.workers or 1, len(models))
    args.threads = set_threads(_threads(args, out, workers))
    dataset, fallback = evaluation_set(args.data, args.metric, progress=not args.quiet)
    crops, whole, calibration, scarce = calibration_images(
        args.calib,
        args.num_calib,
        args.crop,
        args.crops_per_image,
        args.crop_reductions,
        args.seed,
        architecture.multiple,
        args.metric,
        dataset,
        config.reconstruction.whole,
    )
    if args.max_bd_rate is not None and len(models) < 2:
        raise InputError(
            "--max_bd_rate needs two qualities at least, for a BD-rate is between curves; give more with "
            "--quality"
        )
    if config.reconstruction.allocation == "threshold" and (args.budget_bops or args.max_bd_rate):
        raise InputError(
            "`allocation=threshold` chooses bits of weights within a size; give --budget_size alone, or "
            "--set allocation=knapsack"
        )
    several = len(models) > 1 and not architecture.variable
    layer_bits: dict[int, Bits] = {}
    networks: dict[int, Size] = {}
    for model in models:
        network = model.load()
        networks[model.quality] = Size.of(network)
        check_float_stages(args, network, config.quant)
        layer_bits |= read_layer_bits(args, model.quality, network, several)
    if architecture.variable:
        crops = _with_rates(network, crops, models, args.seed)
        calibration["levels"] = [model.quality for model in models]
    settings = {
        "licq": __version__,
        "arch": architecture.name,
        "metric": args.metric,
        "config": config.to_dict(),
        "calibration": calibration,
        "evaluation": {
            "dataset": dataset.name,
            "images": len(dataset),
            "sha256": images_digest(dataset.paths, progress=not args.quiet),
        },
    }
    settings |= settings_of_layers(args, layer_bits)
    if args.estimate:
        settings["rates"] = "estimate"
    check_written_bits(args, [model.quality for model in (models[:1] if architecture.variable else models)])
    folder = RunFolder(out, settings, args.resume, args.threads, part=args.part is not None)
    remarks = (fallback, scarce, *_flags_without_effect(args, config, architecture))
    return Run(
        args=args,
        config=config,
        device=device,
        models=models,
        networks=networks,
        multiple=architecture.multiple,
        dataset=dataset,
        crops=crops,
        whole=whole,
        folder=folder,
        shared_results=args.shared or folder.measured,
        warnings=[remark for remark in remarks if remark],
        workers=workers,
        layer_bits=layer_bits,
    )


def _with_rates(network: nn.Module, crops: Tensor, models: list[FloatModel], seed: int) -> Tensor:
    """The crops (n, 3, H, W) of a variable-rate codec, each with the gain and the lambda of one of the
    qualities: (n, 5, H, W)."""
    lambdas = {model.quality: model.lmbda for model in models}
    levels = draw_levels(len(crops), list(lambdas), seed)
    with torch.no_grad():
        return cast(VariableRate, network).with_planes(
            crops, torch.tensor(levels), torch.tensor([lambdas[level] for level in levels])
        )


def _threads(args: argparse.Namespace, out: Path, workers: int) -> int | None:
    """The number of threads: --threads, what a resumed run had, or an equal part of the processors for each
    worker; None: PyTorch's choice."""
    before = read_json(out / "run.json") if args.resume else None
    if args.threads is None and before is not None:
        return before.get("threads")
    return Engine.from_args(
        argparse.Namespace(
            workers=workers if workers > 1 else None, ray=None, gpu_share=None, threads=args.threads
        )
    ).threads


def _folder_of_part(args: argparse.Namespace, out: Path, models: list[FloatModel]) -> Path:
    """The folder of the run that --part belongs to.

    Raises:
        InputError: --out is not the folder of that quality in a run that has been begun.
    """
    if args.part not in [model.quality for model in models] or get_architecture(models[0].arch).variable:
        raise InputError(
            f"--part {args.part} is none of the codecs of this command; choose one with --quality"
        )
    if out.name != f"q{args.part}" or not (out.parent / "run.json").is_file():
        raise InputError("--part goes on with a run that has been begun; use --workers, which begins one")
    return out.parent


def _default_folder(args: argparse.Namespace, config: PtqConfig, arch: str) -> str:
    method = config.reconstruction.loss if config.preset == "licq" else config.preset
    if args.analyze:
        method = "analysis"
    return f"runs/{arch}_w{config.quant.w_bits}a{config.quant.a_bits}_{method}"


def _flags_without_effect(
    args: argparse.Namespace, config: PtqConfig, architecture: Architecture
) -> list[str]:
    """Remarks on flags that change nothing beside the others."""
    remarks = []
    learning = config.reconstruction
    if learning.allocation == "threshold" and args.budget_size is None and not args.analyze:
        remarks.append(
            "the bits of layers are not chosen: `allocation` has an effect with --budget_size, e.g. 8"
        )
    if args.unit and not learning.iters and not (args.unit == "network" and learning.joint_iters):
        remarks.append(
            f"--unit {args.unit} has no effect: units are reconstructed in 0 steps each; give their number, "
            "e.g. --iters 20"
        )
    if config.quant.bias_bits == 8 and FLOAT_BITS in (config.quant.w_bits, config.quant.a_bits):
        remarks.append("8-bit biases have no effect: beside float weights or inputs biases stay in float")
    if args.workers and architecture.variable:
        remarks.append("--workers has no effect: a variable-rate codec is one for all qualities")
    return remarks
