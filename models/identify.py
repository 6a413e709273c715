"""Which architecture, of which sizes, the tensors of a checkpoint belong to."""

import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from licq.models.checkpoint_files import CheckpointFile, read_file, refuse_diverged
from licq.models.registry import Architecture, get_architecture, list_models
from licq.support.errors import InputError, InputWarning


def identify(state_dict: Mapping[str, Tensor]) -> str | None:
    """The registered architecture whose parameters have exactly these names and shapes, or None."""
    for name in sorted(list_models(), key=lambda name: -_likeness(name, state_dict)):
        architecture = get_architecture(name)
        adapted = architecture.adapt(state_dict) if architecture.adapt is not None else state_dict
        kwargs = sizes_of(architecture, adapted)
        if kwargs is not None and not _differences(architecture.factory(**kwargs), adapted):
            return name
    return None


def matching_network(
    path: Path, content: CheckpointFile, arch: str | None
) -> tuple[Architecture, dict[str, Any], nn.Module, Mapping[str, Tensor]]:
    """A new network that a checkpoint fits; `path` is where its content was read.

    Args:
        arch: the architecture that it must be; None: any.

    Returns:
        The architecture, the factory's arguments, the network with initial weights, and the checkpoint's
        tensors by the network's names.

    Raises:
        InputError: the checkpoint is not of this architecture, or of none that is known.
    """
    arch = arch or identify_file(content)
    if arch is None:
        likely, _ = max(
            ((name, _likeness(name, tensors)) for _, tensors in content.candidates for name in list_models()),
            key=lambda pair: pair[1],
        )
        hint = (
            f"; nearest is {likely}: pass `arch` {likely} to see what differs"
            if any(_likeness(likely, tensors) > 0.3 for _, tensors in content.candidates)
            else ""
        )
        raise InputError(
            f"{path} is a checkpoint of no known architecture ({', '.join(list_models())}){hint}"
        )
    architecture = get_architecture(arch)
    tried = []
    for place, tensors in content.candidates:
        network, differences = _network_of(path, tensors, content.metadata, architecture)
        if network is not None:
            _remark_on_others(path, content, place, network[2])
            refuse_diverged(network[3], path)
            return network
        tried.append((_likeness(arch, tensors), differences))
    other = identify_file(content)
    if other is not None:
        raise InputError(f"{path} is no checkpoint of {arch}; this looks like {other}: pass `arch` {other}")
    _, differences = max(tried, key=lambda entry: entry[0])
    raise InputError(
        f"{path} is no checkpoint of {arch}: {differences[0]}"
        + (f", and {len(differences) - 1} more" if len(differences) > 1 else "")
        + "; give another file as `checkpoint` or its architecture as `arch`"
    )


def identify_file(content: CheckpointFile) -> str | None:
    """The registered architecture that tensors of a file have exactly the names and shapes of, or None."""
    return next((name for _, tensors in content.candidates if (name := identify(tensors))), None)


_Network = tuple[Architecture, dict[str, Any], nn.Module, Mapping[str, Tensor]]


def _network_of(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], architecture: Architecture
) -> tuple[_Network | None, list[str]]:
    """(what `matching_network` returns for these tensors or None, how they differ)."""
    state_dict: Mapping[str, Tensor] = _with_companions(path, tensors, architecture)
    if architecture.adapt is not None:
        state_dict = architecture.adapt(state_dict)
    differences = ["its sizes cannot be told"]
    stated = (
        [metadata["kwargs"]]
        if metadata.get("arch") == architecture.name and isinstance(metadata.get("kwargs"), dict)
        else []
    )
    for kwargs in (*stated, sizes_of(architecture, state_dict)):
        if kwargs is None:
            continue
        try:
            model = architecture.factory(**kwargs)
        except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
            differences = [str(error)]
            continue
        differences = _differences(model, state_dict)
        if not differences:
            return (architecture, architecture.complete(kwargs), model, state_dict), []
    return None, differences


def _remark_on_others(path: Path, content: CheckpointFile, taken: str, model: nn.Module) -> None:
    """Warn where the file has other weights for the network than those that are taken."""
    parameters = dict(model.named_parameters())
    candidates = dict(content.candidates)
    weights = {name: tensor for name, tensor in candidates[taken].items() if name in parameters}
    others = [
        place
        for place, tensors in candidates.items()
        if all(name in tensors and tensors[name].shape == tensor.shape for name, tensor in weights.items())
        and not all(torch.equal(tensors[name], tensor) for name, tensor in weights.items())
    ]
    if others:
        warnings.warn(
            f"{path} has weights in several places that fit; those at {taken or 'its top'} are taken, not "
            f"those at {' or '.join(place or 'its top' for place in others)}: to use those, save them alone",
            InputWarning,
            stacklevel=2,
        )


def sizes_of(architecture: Architecture, state_dict: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The factory's arguments, complete, for a network with these tensors; None where there are none."""
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


def check_quality(
    path: str | Path,
    architecture: Architecture,
    kwargs: Mapping[str, Any],
    metadata: Mapping[str, Any],
    quality: int,
    lmbda: float | None,
) -> None:
    """Compare a checkpoint with the quality that it should have.

    The lambda that the file states decides, or else its quality, or else its widths.

    Args:
        path: of the file, for the message.
        kwargs: the factory's arguments for it.
        metadata: what the file states.
        lmbda: the user's own lambda; with one, the lambda that the file states is not compared.

    Raises:
        InputError: it is of another quality.
    """
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
            remedy = f"pass `quality` {fitting[0]}" if fitting else f"pass `lmbda` {stated_lambda:g}"
            raise InputError(
                f"{path} was trained with lambda {stated_lambda:g}, but quality {quality} means "
                f"{tables[0][quality]:g}: {remedy}"
            )
        return
    if stated_quality is not None:
        if stated_quality != quality:
            raise InputError(
                f"{path} is of quality {stated_quality}, not {quality}: pass `quality` {stated_quality}"
            )
        return
    if dict(kwargs) == architecture.sizes(quality):
        return
    others = [other for other in sorted(architecture.official) if dict(kwargs) == architecture.sizes(other)]
    if others:
        widths = ", ".join(
            f"{name}={value}" for name, value in kwargs.items() if value != architecture.sizes(quality)[name]
        )
        raise InputError(
            f"{path} has {widths}, as {architecture.name} of quality {', '.join(map(str, others))} has, "
            f"not of quality {quality}: pass `quality` {others[0]}"
        )


def _with_companions(
    path: Path, state_dict: Mapping[str, Tensor], architecture: Architecture
) -> dict[str, Tensor]:
    """The tensors, and those of the second file in which a publication keeps a part of its network."""
    complete = dict(state_dict)
    for prefix, pattern in architecture.companions.items():
        second = path.with_name(pattern.format(stem=path.stem, suffix=path.suffix))
        if not any(name.startswith(prefix) for name in complete) and second.is_file():
            complete.update({prefix + name: tensor for name, tensor in read_file(second).state_dict.items()})
    return complete


def _differences(model: nn.Module, state_dict: Mapping[str, Tensor]) -> list[str]:
    """How the tensors differ from those of a network, a phrase for each; empty where they fit.

    Buffers may be absent or of another size.
    """
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
    """The share of names that a state_dict and the architecture's smallest network have in common, 0..1."""
    architecture = get_architecture(arch)
    configuration = "reference" if "reference" in architecture.configurations else None
    names = _reference_names(
        architecture.factory, tuple(architecture.sizes(configuration=configuration).items())
    )
    return len(names & state_dict.keys()) / len(names | state_dict.keys())


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= 0.01 * abs(a)
