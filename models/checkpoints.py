"""Networks from checkpoint files, and back: what other packages use of this one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from licq.models.checkpoint_files import (
    CDF_STATE,
    CheckpointFile,
    read_file,
    refuse_diverged,
    write_file,
)
from licq.models.embedded import embedded_checkpoint, embedded_qualities, rates_of
from licq.models.identify import check_quality, identify, identify_file, matching_network, sizes_of
from licq.models.pretrained import pretrained_checkpoint
from licq.models.registry import get_architecture, list_models, mark_architecture
from licq.support.errors import InputError

__all__ = [
    "embedded_checkpoint",
    "embedded_qualities",
    "fill_network",
    "identify",
    "identify_file",
    "load_checkpoint",
    "load_model",
    "rates_of",
    "read_checkpoint",
    "read_state_dict",
    "save_checkpoint",
]

_CODER_STATE = (*CDF_STATE, "scale_table")


def read_checkpoint(path: str | Path) -> CheckpointFile:
    """Tensors and metadata of a checkpoint, of any format that `load_checkpoint` takes."""
    return read_file(path)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, in float32, by the names that the installed CompressAI gives them.

    Raises:
        InputError: the file is missing, empty, damaged, no checkpoint, or needs code to be unpickled; or the
            tensors hold NaN or Inf.
    """
    state_dict = read_file(path).state_dict
    refuse_diverged(state_dict, path)
    return state_dict


def load_checkpoint(
    path: str | Path, arch: str | None = None, quality: int | None = None, lmbda: float | None = None
) -> nn.Module:
    """The network of a checkpoint, in eval mode, on the CPU.

    Takes CompressAI's .pth.tar files, those of TinyLIC and TIC, state_dicts that are bare, wrapped or behind
    a prefix such as Lightning's `model.` (`models.wrappers`), and licq's own safetensors. Where several
    networks of a file fit, the first is taken, weights before their moving averages, with an `InputWarning`.
    Widths are read off the tensors. CDF tables come from the file, or are made.

    Args:
        arch: the architecture that it must be, or the file of a plug-in; None: the one that the file states,
            or else that has these tensors.
        quality: that it must be; None: any. It is compared with the lambda or quality that the file states,
            or else with its widths. A variable-rate codec is set to it.
        lmbda: the user's own lambda; with one, the lambda that the file states is not compared.

    Raises:
        InputError: no such file, no checkpoint, or another architecture or quality than asked for.
    """
    if arch is not None:
        architecture = get_architecture(arch)
        arch = architecture.name
        if architecture.loader is not None:
            model = architecture.loader(Path(path), quality)
            kwargs = sizes_of(architecture, model.state_dict())
            return (model if kwargs is None else mark_architecture(model, architecture, kwargs)).eval()
    content = read_file(path)
    stated = content.metadata.get("arch")
    if arch is not None and stated in list_models() and stated != arch:
        get_architecture(arch)
        raise InputError(f"{path} is a checkpoint of {stated}, not of {arch}: pass `arch` {stated}")
    architecture, kwargs, model, state_dict = matching_network(Path(path), content, arch or stated)
    if quality is not None and not architecture.variable:
        check_quality(path, architecture, kwargs, content.metadata, quality, lmbda)
    fill_network(model, state_dict, path)
    if quality is not None and architecture.variable:
        network: Any = model
        if quality > network.levels and quality == int(quality):
            raise InputError(
                f"{path} has {network.levels} rates; choose `quality` from 1 to {network.levels}"
            )
        network.set_level(quality)
    return mark_architecture(model, architecture, kwargs).eval()


def save_checkpoint(
    model: nn.Module, path: str | Path, metadata: Mapping[str, Any], dtype: torch.dtype = torch.float16
) -> None:
    """Write a network as a safetensors file, complete or not at all.

    Only weights of convolutions and linear layers are stored as `dtype`. Everything else (biases, GDN,
    entropy models, CDF tables) stays as it is, because half precision would change probabilities. Where
    `metadata` names the architecture, buffers that every new network has (masks, bounds) are left out. CDF
    tables are stored where `model.update()` has made them.

    Args:
        metadata: arch, kwargs (found where it is absent), quality, lambda, metric, and anything else that
            JSON can hold.
        dtype: of the weights. A weight that does not fit stays as it is.

    Raises:
        InputError: the file cannot be written.
        ValueError: the model is not of the architecture that `metadata` names.
    """
    metadata = dict(metadata)
    state_dict = dict(model.state_dict())
    if "arch" in metadata:
        architecture = get_architecture(metadata["arch"])
        kwargs = metadata.get("kwargs") or sizes_of(architecture, state_dict)
        if kwargs is None:
            raise ValueError(f"the model is no {architecture.name}")
        metadata["kwargs"] = dict(kwargs)
        fresh = dict(architecture.factory(**kwargs).named_buffers())
        for name, buffer in model.named_buffers():
            is_new = name in fresh and torch.equal(buffer.cpu(), fresh[name]) and not _is_coder_state(name)
            if is_new or buffer.numel() == 0:
                state_dict.pop(name, None)
    for name in _weight_names(model):
        cast = state_dict[name].to(dtype)
        if bool(torch.isfinite(cast).all()):
            state_dict[name] = cast
    write_file(path, state_dict, metadata)


def load_model(
    arch: str,
    quality: int,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    metric: str = "mse",
    lmbda: float | None = None,
) -> nn.Module:
    """The network of an architecture and quality, from one of three sources.

    Args:
        checkpoint: a file; without it, and without `pretrained`, the checkpoint that comes with the project.
        pretrained: take CompressAI's published weights.
        metric: chooses among the published weights. The embedded checkpoints are trained for MSE and serve
            for every metric.
        lmbda: the user's own lambda, for which no quality needs to be trained.

    Raises:
        InputError: an unknown name, arguments that contradict each other, or a checkpoint that does not
            exist, cannot be downloaded or does not fit.
    """
    architecture = get_architecture(arch)
    architecture.check_quality(quality)
    if lmbda is None:
        architecture.lambda_for(quality, metric)
    if checkpoint is not None and pretrained:
        raise InputError("`checkpoint` and `pretrained` exclude each other; give one of them")
    if pretrained:
        checkpoint = pretrained_checkpoint(architecture.name, quality, metric)
    elif checkpoint is None:
        checkpoint = embedded_checkpoint(architecture.name, quality)
    return load_checkpoint(checkpoint, arch, quality, lmbda)


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
    """Load tensors into a network.

    Buffers that are absent, or that are constants for another image size, stay the network's own. CDF tables
    take the size that they have in the file. Absent ones are made, where the network has `update()`.

    Args:
        path: what a message calls the source of the tensors.

    Raises:
        InputError: parameters are missing, unknown or of another shape.
    """
    tensors = dict(state_dict)
    incomplete = set()
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, buffer in model.state_dict().items():
        if _is_coder_state(name):
            if tensors.get(name) is None or tensors[name].numel() == 0:
                incomplete.add(name.rpartition(".")[0])
        elif name not in parameters and (name not in tensors or tensors[name].shape != buffer.shape):
            tensors[name] = buffer
    for name, buffer in model.state_dict().items():
        if _is_coder_state(name) and name.rpartition(".")[0] in incomplete:
            tensors[name] = buffer
        elif _is_coder_state(name) and name in tensors:
            # as CompressAI's base class does, which not every codec has
            owner, _, key = name.rpartition(".")
            model.get_submodule(owner)._buffers[key] = torch.empty_like(tensors[name], device=buffer.device)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise InputError(f"{path} cannot be loaded: {' '.join(str(error).split())[:200]}") from error
    update: Any = getattr(model, "update", None)
    if incomplete and update is not None:
        update()
