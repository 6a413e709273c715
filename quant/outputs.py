"""What a codec's forward returns, in one form."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from licq.quant.qtensor import QTensor
from licq.support.errors import InputError

_NEEDED = "{'x_hat': (B, 3, H, W), 'likelihoods': {'y': ...}}"


def codec_output(output: Any) -> dict[str, Any]:
    """The output of a codec's forward, with its likelihoods by name.

    Args:
        output: a mapping with "x_hat" and "likelihoods"; the likelihoods are a mapping, a list, a tuple or
            one tensor, and mappings may hold lists. What else the mapping holds stays as it is.

    Returns:
        {"x_hat": tensor, "likelihoods": {name: tensor}, ...}. Likelihoods without a name are called by their
        position, "0", "1" ..., and a single tensor "y".

    Raises:
        InputError: another output.
    """
    if not isinstance(output, Mapping):
        what = f"a {type(output).__name__}"
        if isinstance(output, (list, tuple)):
            what += f" of {len(output)}"
        raise InputError(
            f"the network's forward returns {what}; it must return {_NEEDED}: wrap it in a module that does"
        )
    missing = [key for key in ("x_hat", "likelihoods") if key not in output]
    if missing:
        there = ", ".join(map(repr, output)) or "nothing"
        raise InputError(
            f"the network's forward returns a dictionary of {there}, without "
            f"{' and '.join(map(repr, missing))}; it must return {_NEEDED}: wrap it in a module that does"
        )
    likelihoods = output["likelihoods"]
    if isinstance(likelihoods, (Tensor, QTensor)):
        likelihoods = {"y": likelihoods}
    named = dict(_flat(likelihoods, ""))
    for name, value in (
        ("x_hat", output["x_hat"]),
        *((f"likelihoods {name}", p) for name, p in named.items()),
    ):
        if not isinstance(value, (Tensor, QTensor)):
            raise InputError(
                f"the network's {name} is of type {type(value).__name__} and no tensor; its forward must "
                f"return {_NEEDED}"
            )
    return {**output, "likelihoods": named}


def _flat(likelihoods: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """(name, likelihoods) of each latent in nested mappings, lists and tuples."""
    if isinstance(likelihoods, (list, tuple)):
        likelihoods = {str(position): part for position, part in enumerate(likelihoods)}
    if not isinstance(likelihoods, Mapping):
        yield prefix, likelihoods
        return
    for name, part in likelihoods.items():
        yield from _flat(part, f"{prefix}.{name}".lstrip("."))
