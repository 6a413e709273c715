"""From a checkpoint to a network: which architecture it is, which sizes, whether it is the one that was asked
for."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from licq.models.checkpoint_files import CDF_STATE, CheckpointFile, read_file, sha256_file, write_file
from licq.models.registry import Architecture, get_architecture, list_models, mark_architecture
from licq.support.errors import InputError

__all__ = [
    "embedded_checkpoint",
    "embedded_qualities",
    "fill_network",
    "identify",
    "load_checkpoint",
    "load_model",
    "rates_of",
    "read_checkpoint",
    "read_state_dict",
    "save_checkpoint",
    "sha256_file",
]

ZOO = Path(__file__).parent / "zoo"
_CODER_STATE = (*CDF_STATE, "scale_table")


def read_checkpoint(path: str | Path) -> CheckpointFile:
    """Tensors and metadata of a checkpoint in any format that `load_checkpoint` takes."""
    return read_file(path)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, float32, with the names that the installed CompressAI uses.

    Raises:
        InputError: the file is missing, empty, damaged, no checkpoint, or needs code to be unpickled.
    """
    return read_file(path).state_dict


def load_checkpoint(
    path: str | Path, arch: str | None = None, quality: int | None = None, lmbda: float | None = None
) -> nn.Module:
    """The network of a checkpoint, in eval mode, on the CPU, ready to code (CDF tables from the file or
    made).

    Takes CompressAI's .pth.tar, TinyLIC's and TIC's files, bare or wrapped state_dicts, and our safetensors.
    The widths are read off the tensors.

    Args:
        arch: the architecture that it must be, or a plug-in's file; None: the one that the file states or
        looks like.
        quality: that it must be; None: any. Checked by the file's own quality or lambda, else by its widths.
        A variable-rate
            codec is set to it.
        lmbda: a lambda of the user's own; then the file's lambda is not compared with the quality's.

    Raises:
        InputError: no such file, not a checkpoint, or another architecture or quality than asked for.
    """
    if arch is not None:
        architecture = get_architecture(arch)
        arch = architecture.name
        if architecture.loader is not None:
            model = architecture.loader(Path(path), quality)
            kwargs = _sizes(architecture, model.state_dict())
            return (model if kwargs is None else mark_architecture(model, architecture, kwargs)).eval()
    content = read_file(path)
    stated = content.metadata.get("arch")
    if arch is not None and stated in list_models() and stated != arch:
        get_architecture(arch)
        raise InputError(f"{path} is a checkpoint of {stated}, not of {arch}: pass --arch {stated}")
    architecture, kwargs, model, state_dict = _network(Path(path), content, arch or stated)
    if quality is not None and not architecture.variable:
        _check_quality(path, architecture, kwargs, content.metadata, quality, lmbda)
    fill_network(model, state_dict, path)
    if quality is not None and architecture.variable:
        if quality > model.levels and quality == int(quality):
            raise InputError(f"{path} has {model.levels} rates; choose --quality from 1 to {model.levels}")
        model.set_level(quality)
    return mark_architecture(model, architecture, kwargs).eval()


def save_checkpoint(
    model: nn.Module, path: str | Path, metadata: Mapping[str, Any], dtype: torch.dtype = torch.float16
) -> None:
    """Write a network as safetensors, whole or not at all.

    Weights of convolutions and linear layers are stored as `dtype`; everything else (biases, GDN, entropy
    models, CDF tables) as it is, because half precision there moves probabilities. With `metadata["arch"]`,
    buffers that a fresh network has anyway (masks, bounds) are left out. CDF tables are stored when
    `model.update()` has made them.

    Args:
        metadata: arch, kwargs (found when absent), quality, lambda, metric, and anything else that JSON can
        hold.

    Raises:
        InputError: the file cannot be written.
    """
    metadata = dict(metadata)
    state_dict = dict(model.state_dict())
    if "arch" in metadata:
        architecture = get_architecture(metadata["arch"])
        kwargs = metadata.get("kwargs") or _sizes(architecture, state_dict)
        if kwargs is None:
            raise ValueError(f"the model is no {architecture.name}")
        metadata["kwargs"] = dict(kwargs)
        fresh = dict(architecture.factory(**kwargs).named_buffers())
        for name, buffer in model.named_buffers():
            is_own = name in fresh and torch.equal(buffer.cpu(), fresh[name]) and not _is_coder_state(name)
            if is_own or buffer.numel() == 0:
                state_dict.pop(name, None)
    for name in _weight_names(model):
        cast = state_dict[name].to(dtype)
        if bool(torch.isfinite(cast).all()):
            state_dict[name] = cast
    write_file(path, state_dict, metadata)


def embedded_qualities(arch: str) -> list[int]:
    """The qualities for which the repository ships a checkpoint of this architecture."""
    if get_architecture(arch).variable:
        path = ZOO / f"{arch}.safetensors"
        return rates_of(path) if path.is_file() else []
    pattern = re.compile(re.escape(arch) + r"-q(\d+)\.safetensors")
    found = (pattern.fullmatch(file.name) for file in ZOO.glob("*.safetensors"))
    return sorted(int(match[1]) for match in found if match)


def embedded_checkpoint(arch: str, quality: int) -> Path:
    """The checkpoint that the repository ships for this architecture and quality.

    Raises:
        InputError: there is none; the message lists those there are.
    """
    architecture = get_architecture(arch)
    architecture.check_quality(quality)
    path = ZOO / (f"{arch}.safetensors" if architecture.variable else f"{arch}-q{quality}.safetensors")
    if path.is_file() and not (architecture.variable and quality not in rates_of(path)):
        return path
    there = [
        f"{name} {', '.join(map(str, embedded_qualities(name)))}"
        for name in list_models()
        if embedded_qualities(name)
    ]
    raise InputError(
        f"no embedded checkpoint of {arch} at quality {quality}; there are: {'; '.join(there) or 'none'}; "
        "choose one of these or give a file with --checkpoint"
    )


def rates_of(path: Path) -> list[int]:
    """The qualities of a variable-rate codec's file, 1 to the number of its gains.

    Raises:
        InputError: it is no such file.
    """
    gains = read_file(path).state_dict.get("Gain")
    if gains is None:
        raise InputError(
            f"{path} is no checkpoint of a variable-rate codec (it has no Gain); give another file with --checkpoint"
        )
    return list(range(1, gains.numel() + 1))


def load_model(
    arch: str,
    quality: int,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    metric: str = "mse",
    lmbda: float | None = None,
) -> nn.Module:
    """The network that the command line asks for: a file, CompressAI's pretrained one, or else the embedded
    one.

    `metric` chooses among pretrained models; embedded ones are trained for MSE and serve for every metric.

    Raises:
        InputError: unknown names, contradicting arguments, or a checkpoint that cannot be had or does not
        fit.
    """
    architecture = get_architecture(arch)
    architecture.check_quality(quality)
    if lmbda is None:
        architecture.lambda_for(quality, metric)
    if checkpoint is not None and pretrained:
        raise InputError("--checkpoint and --pretrained exclude each other; give one of them")
    if pretrained:
        from licq.models.pretrained import pretrained_checkpoint

        checkpoint = pretrained_checkpoint(architecture.name, quality, metric)
    elif checkpoint is None:
        checkpoint = embedded_checkpoint(architecture.name, quality)
    return load_checkpoint(checkpoint, arch, quality, lmbda)


def identify(state_dict: Mapping[str, Tensor]) -> str | None:
    """The registered architecture whose parameters have exactly these names and shapes; None if there is
    none."""
    for name in sorted(list_models(), key=lambda name: -_likeness(name, state_dict)):
        architecture = get_architecture(name)
        adapted = architecture.adapt(state_dict) if architecture.adapt is not None else state_dict
        kwargs = _sizes(architecture, adapted)
        if kwargs is not None and not _differences(architecture.factory(**kwargs), adapted):
            return name
    return None


def _network(
    path: Path, content: CheckpointFile, arch: str | None
) -> tuple[Architecture, dict[str, Any], nn.Module, Mapping[str, Tensor]]:
    """The architecture, sizes and a fresh network that a checkpoint fits, and its tensors as that network has
    them."""
    state_dict, metadata = content.state_dict, content.metadata
    arch = arch or identify(state_dict)
    if arch is None:
        likely = max(list_models(), key=lambda name: _likeness(name, state_dict))
        hint = (
            f"; nearest is {likely}: pass --arch {likely} to see what differs"
            if _likeness(likely, state_dict) > 0.3
            else ""
        )
        raise InputError(
            f"{path} is a checkpoint of no known architecture ({', '.join(list_models())}){hint}"
        )
    architecture = get_architecture(arch)
    state_dict = _with_companions(path, state_dict, architecture)
    if architecture.adapt is not None:
        state_dict = architecture.adapt(state_dict)
    differences = ["its sizes cannot be told"]
    stated = (
        [metadata["kwargs"]]
        if metadata.get("arch") == arch and isinstance(metadata.get("kwargs"), dict)
        else []
    )
    for kwargs in (*stated, _sizes(architecture, state_dict)):
        if kwargs is None:
            continue
        try:
            model = architecture.factory(**kwargs)
        except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
            differences = [str(error)]
            continue
        differences = _differences(model, state_dict)
        if not differences:
            return architecture, architecture.complete(kwargs), model, state_dict
    other = identify(content.state_dict)
    if other is not None:
        raise InputError(f"{path} is no checkpoint of {arch}; this looks like {other}: pass --arch {other}")
    raise InputError(
        f"{path} is no checkpoint of {arch}: {differences[0]}"
        + (f", and {len(differences) - 1} more" if len(differences) > 1 else "")
        + "; give another file with --checkpoint or its architecture with --arch"
    )


def _with_companions(
    path: Path, state_dict: Mapping[str, Tensor], architecture: Architecture
) -> dict[str, Tensor]:
    """The tensors, with those of a second file where a publication keeps a part of its network in one."""
    whole = dict(state_dict)
    for prefix, pattern in architecture.companions.items():
        second = path.with_name(pattern.format(stem=path.stem, suffix=path.suffix))
        if not any(name.startswith(prefix) for name in whole) and second.is_file():
            whole.update({prefix + name: tensor for name, tensor in read_file(second).state_dict.items()})
    return whole


def _sizes(architecture: Architecture, state_dict: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The sizes with which the architecture may fit these tensors, complete; None where it cannot."""
    if architecture.infer is not None:
        try:
            return architecture.complete(architecture.infer(state_dict))
        except (KeyError, IndexError, ValueError, TypeError, ZeroDivisionError):
            return None
    candidates: list[dict[str, Any]] = []
    for kwargs in (*architecture.configurations.values(), *architecture.official.values()):
        kwargs = architecture.complete(kwargs)
        if kwargs not in candidates:
            candidates.append(kwargs)
            if not _differences(architecture.factory(**kwargs), state_dict):
                return kwargs
    return None


def _differences(model: nn.Module, state_dict: Mapping[str, Tensor]) -> list[str]:
    """What keeps the tensors from being the model's, one phrase each; buffers may be absent or of another
    size."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    known = {*model.state_dict(), *shapes}
    phrases = [f"{name} is missing" for name in shapes if name not in state_dict]
    phrases += [
        f"{name} has shape {tuple(state_dict[name].shape)} instead of {shape}"
        for name, shape in shapes.items()
        if name in state_dict and tuple(state_dict[name].shape) != shape
    ]
    phrases += [f"{name} is unknown" for name in state_dict if name not in known]
    return phrases


@cache
def _reference_names(factory: Any, sizes: tuple[tuple[str, Any], ...]) -> frozenset[str]:
    return frozenset(factory(**dict(sizes)).state_dict())


def _likeness(arch: str, state_dict: Mapping[str, Tensor]) -> float:
    """Share of common names between a state_dict and the architecture's smallest network, 0..1."""
    architecture = get_architecture(arch)
    configuration = "reference" if "reference" in architecture.configurations else None
    names = _reference_names(
        architecture.factory, tuple(architecture.sizes(configuration=configuration).items())
    )
    return len(names & state_dict.keys()) / len(names | state_dict.keys())


def _check_quality(
    path: str | Path,
    architecture: Architecture,
    kwargs: Mapping[str, Any],
    metadata: Mapping[str, Any],
    quality: int,
    lmbda: float | None,
) -> None:
    """Raises InputError when the file's quality, its lambda, or else its widths are those of another
    quality."""
    architecture.check_quality(quality)
    stated_quality, stated_lambda = metadata.get("quality"), metadata.get("lambda")
    if lmbda is None and stated_lambda is not None:
        if metadata.get("metric") in architecture.lambdas:
            tables = [architecture.lambdas[metadata["metric"]]]
        else:
            tables = list(architecture.lambdas.values())
        fitting = [
            q
            for table in tables
            for q in table
            if q in architecture.official and _close(table[q], stated_lambda)
        ]
        if quality not in fitting:
            mend = f"pass --quality {fitting[0]}" if fitting else f"pass --lambda {stated_lambda:g}"
            meant = tables[0][quality]
            raise InputError(
                f"{path} was trained with lambda {stated_lambda:g}, but quality {quality} means {meant:g}: {mend}"
            )
        return
    if stated_quality is not None:
        if stated_quality != quality:
            raise InputError(
                f"{path} is of quality {stated_quality}, not {quality}: pass --quality {stated_quality}"
            )
        return
    if dict(kwargs) == architecture.sizes(quality):
        return
    others = [other for other in sorted(architecture.official) if dict(kwargs) == architecture.sizes(other)]
    if others:
        found = ", ".join(
            f"{name}={value}" for name, value in kwargs.items() if value != architecture.sizes(quality)[name]
        )
        raise InputError(
            f"{path} has {found}, as {architecture.name} of quality {', '.join(map(str, others))} has, "
            f"not of quality {quality}: pass --quality {others[0]}"
        )


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= 0.01 * abs(a)


def _is_coder_state(name: str) -> bool:
    return name.rpartition(".")[2] in _CODER_STATE


def _weight_names(model: nn.Module) -> list[str]:
    """Names of the weights of all convolutions and linear layers."""
    layers = (nn.Linear, nn.modules.conv._ConvNd)
    return [
        f"{name}.weight" if name else "weight"
        for name, module in model.named_modules()
        if isinstance(module, layers)
    ]


def fill_network(model: nn.Module, state_dict: Mapping[str, Tensor], path: str | Path) -> None:
    """Load the tensors; buffers that are absent, or constants made for another image size, stay the model's
    own.

    CDF tables take the size that they have in the file; absent ones are made, where the model has `update()`.

    Raises:
        InputError: parameters are missing, unknown or of another shape; `path` is what the message names.
    """
    tensors = dict(state_dict)
    incomplete = set()
    for name, buffer in model.state_dict().items():
        if _is_coder_state(name):
            if tensors.get(name) is None or tensors[name].numel() == 0:
                incomplete.add(name.rpartition(".")[0])
        elif name not in tensors or tensors[name].shape != buffer.shape:
            tensors[name] = buffer
    for name, buffer in model.state_dict().items():
        if _is_coder_state(name) and name.rpartition(".")[0] in incomplete:
            tensors[name] = buffer
        elif (
            _is_coder_state(name) and name in tensors
        ):  # as CompressAI's base class does, which not every codec has
            owner, _, key = name.rpartition(".")
            model.get_submodule(owner)._buffers[key] = torch.empty_like(tensors[name], device=buffer.device)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise InputError(f"{path} cannot be loaded: {' '.join(str(error).split())[:200]}") from error
    if incomplete and hasattr(model, "update"):
        model.update()
