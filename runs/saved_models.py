"""Which quantized models a command line names, what their files say of themselves, and the float codecs that
they were made from."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from licq.models.checkpoints import embedded_checkpoint, load_checkpoint
from licq.models.qvrf import VariableRate
from licq.models.registry import get_architecture
from licq.quant.model import QuantModel
from licq.quant.serialization import read_quantized
from licq.runs.float_models import FloatModel, find_float_models, weights_digest
from licq.support.errors import InputError
from licq.support.files import sha256

_FIELDS = {"arch", "quality", "lambda", "metric", "config", "calibration", "checkpoint"}
_CURVE = ("arch", "metric", "config")  # what the models of one R-D curve have in common


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
        elif path.is_dir():
            files += _models_in_folder(path, word, qualities)
        else:
            raise InputError(
                f"no quantized model at {word}; give a model.safetensors or a folder that main_ptq.py has "
                "written" + (", or `float` by itself" if word == "float" else "")
            )
    return files


def _models_in_folder(path: Path, word: str, qualities: list[int] | str | None) -> list[Path]:
    models = {
        int(file.parent.name[1:]): file
        for file in path.glob("q*/model.safetensors")
        if file.parent.name[1:].isdecimal()
    }
    if not models and (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    asked = qualities if isinstance(qualities, list) else sorted(models)
    missing = [quality for quality in asked if quality not in models]
    if missing or not models:
        what = f"of quality {missing[0]} " if missing else ""
        there = f"; there are {', '.join(map(str, sorted(models)))}" if models else ""
        raise InputError(
            f"the folder {word} holds no quantized model {what}(q<quality>/model.safetensors){there}; "
            "make one with main_ptq.py"
        )
    return [models[quality] for quality in asked]


def read_header(path: Path) -> dict[str, Any]:
    """What a run wrote into a quantized model's header; the file is verified whole.

    Raises:
        InputError: damaged, not a quantized model, or not one of a run.
    """
    header = read_quantized(path)[0].get("extra") or {}
    missing = _FIELDS - header.keys()
    if missing:
        raise InputError(
            f"{path} was not saved by main_ptq.py (it does not say its {min(missing)}); evaluate it from "
            "Python: licq.evaluate(licq.QuantModel.load(path), images)"
        )
    return header


def models_at_rates(
    file: Path, header: dict[str, Any], args: argparse.Namespace
) -> tuple[list[Path], list[dict[str, Any]]]:
    """A variable-rate codec's file once for each rate to measure, and its header with "quality", "level" and
    "lambda" of that rate.

    Raises:
        InputError: a quality for which it was not quantized.
    """
    lambdas = {int(quality): lmbda for quality, lmbda in header["rates"].items()}
    if args.quality not in (None, "all"):
        qualities = args.quality
    else:
        qualities = [] if args.rate_factor and args.quality is None else sorted(lambdas)
    codec = cast(VariableRate, QuantModel.load(file).model)
    table = get_architecture(header["arch"]).lambdas[header["metric"]]
    for quality in qualities:
        if quality not in lambdas and not 1 <= quality <= codec.levels:
            raise InputError(
                f"{file} has the qualities 1 to {codec.levels}, not {quality}; choose others with --quality"
            )
    levels = {quality: float(quality) for quality in qualities}
    levels |= {level: level for level in map(codec.level_of, args.rate_factor)}
    headers = [
        header
        | {"quality": quality, "level": level, "lambda": lambdas.get(quality) or _interpolated(table, level)}
        for quality, level in sorted(levels.items())
    ]
    return [file] * len(headers), headers


def _interpolated(table: Mapping[int, float], level: float) -> float:
    """The lambda of a level between two, on the straight line of its logarithm."""
    return float(np.exp(np.interp(level, list(table), np.log(list(table.values())))))


def common_header(files: list[Path], headers: list[dict[str, Any]]) -> dict[str, Any]:
    """The header of the first model, whose architecture, metric and method the others share.

    Raises:
        InputError: models that differ in these, or two of one quality: they are no R-D curve.
    """
    first = headers[0]
    for file, header in zip(files[1:], headers[1:]):
        for key in _CURVE:
            if header[key] != first[key]:
                raise InputError(
                    f"{file} and {files[0]} differ in {key}, so they are no R-D curve; evaluate them one "
                    "after the other"
                )
    qualities = [header["quality"] for header in headers]
    twice = [quality for quality in qualities if qualities.count(quality) > 1]
    if twice:
        raise InputError(f"two models of quality {twice[0]} are given with --model; leave one out")
    return first


def refuse_idle_flags(args: argparse.Namespace, files: list[Path], headers: list[dict[str, Any]]) -> None:
    """Raises InputError for flags that have no effect beside these quantized models, or another than they
    say."""
    named = "--checkpoint" if args.checkpoint is not None else "--pretrained" if args.pretrained else None
    if named and not args.with_float:
        raise InputError(f"{named} and --no-float exclude each other; drop one of them")
    if args.lmbda is not None and not named:
        raise InputError(
            "--lambda is for the float codecs of --checkpoint or --pretrained; quantized models say their "
            "own, leave it out"
        )
    if args.metric not in (None, headers[0]["metric"]):
        raise InputError(
            f"--metric {args.metric} is not what the quantized models are made for, "
            f"{headers[0]['metric']}; leave it out"
        )
    for file, header in zip(files, headers):
        if isinstance(args.quality, list) and "rates" not in header and header["quality"] not in args.quality:
            raise InputError(
                f"{file} is of quality {header['quality']}, which --quality leaves out; drop one of them"
            )


def find_float_codecs(args: argparse.Namespace, headers: list[dict[str, Any]]) -> dict[float, FloatModel]:
    """The float codecs by quality: those that flags name, else those that the quantized models were made
    from.

    Raises:
        InputError: a float codec is missing, damaged or another than it was.
    """
    if not args.with_float:
        return {}
    if not headers or args.checkpoint is not None or args.pretrained:
        models = _named_float_codecs(args, headers)
    else:
        models = {header["quality"]: _origin(header) for header in headers}
    for model in models.values():
        model.load()
    return models


def _named_float_codecs(args: argparse.Namespace, headers: list[dict[str, Any]]) -> dict[float, FloatModel]:
    arch, qualities, metric = args.arch, args.quality, args.metric or "mse"
    if headers:
        arch, metric = arch or headers[0]["arch"], headers[0]["metric"]
        qualities = sorted({round(header["quality"]) for header in headers})
    models = find_float_models(arch, qualities, args.checkpoint, args.pretrained, metric, args.lmbda)
    return {model.quality: model for model in models}


def _origin(header: dict[str, Any]) -> FloatModel:
    """The float codec that a quantized model was made from."""
    origin, arch, quality = header["checkpoint"], header["arch"], header["quality"]
    path = Path(origin["path"])
    if origin["origin"] == "embedded":  # moves with the project; a rate between two qualities has both's
        path = embedded_checkpoint(arch, max(1, round(quality)))
    if get_architecture(arch).loader is None:
        is_same = path.is_file() and sha256(path) == origin["sha256"]
    else:
        is_same = path.exists() and weights_digest(load_checkpoint(path, arch, quality)) == origin["sha256"]
    if not is_same:
        raise InputError(
            f"the float codec of quality {quality}, {path}, is not there any more or has changed; give it "
            "with --checkpoint, or leave it out with --no-float"
        )
    return FloatModel(
        arch, quality, header["lambda"], origin["origin"], path, origin["sha256"], origin["own_lambda"]
    )
