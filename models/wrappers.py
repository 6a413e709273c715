"""Where training code puts a network's weights: inside dictionaries, and behind prefixes of names."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

_KEYS = ("state_dict", "model_state_dict", "model", "network", "net", "codec", "weights", "params")
_AVERAGED_KEYS = (
    "ema",
    "model_ema",
    "ema_model",
    "params_ema",
    "ema_params",
    "ema_state_dict",
    "state_dict_ema",
    "model_ema_state_dict",
)
_PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "net.", "codec.")
_AVERAGED_PREFIXES = ("ema.", "model_ema.", "ema_model.")
_LAMBDA_KEYS = ("lambda", "lmbda")
_DEPTH = 4  # of dictionaries in dictionaries, and of prefixes behind each other


def wrapped(content: Any) -> Iterator[tuple[str, dict[str, Tensor], dict[str, Any]]]:
    """The state_dicts in a training checkpoint, the likeliest first, weights before their moving averages.

    Args:
        content: what the file holds.

    Yields:
        The keys that lead to it ("model.state_dict"), name -> tensor, and what the dictionaries around it say
        of the lambda. Each is followed by its parts behind known prefixes: Lightning's `model.`,
        DataParallel's `module.`, `_orig_mod.` of torch.compile and others.
    """
    for place, tensors, metadata in _inside(content, (), {}):
        yield place, tensors, metadata
        for prefix, part in behind_prefixes(tensors):
            yield f"{place} {prefix}*".strip(), part, metadata


def _inside(
    content: Any, path: tuple[str, ...], metadata: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Tensor], dict[str, Any]]]:
    if not isinstance(content, Mapping) or len(path) > _DEPTH:
        return
    if content and all(isinstance(value, Tensor) for value in content.values()):
        yield ".".join(path), dict(content), metadata
        return
    metadata = dict(metadata)
    for key in _LAMBDA_KEYS:
        value = content.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            metadata["lambda"] = float(value)
    for key in (*_KEYS, *_AVERAGED_KEYS):
        yield from _inside(content.get(key), (*path, key), metadata)


def behind_prefixes(tensors: Mapping[str, Tensor], depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(prefix, the tensors whose names begin with it, without it), also of several prefixes in a row."""
    for prefix in (*_PREFIXES, *_AVERAGED_PREFIXES) if depth < _DEPTH else ():
        part = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
        if part:
            yield prefix, part
            for more, inner in behind_prefixes(part, depth + 1):
                yield prefix + more, inner
