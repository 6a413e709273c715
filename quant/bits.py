"""Bits of single layers: an allocation is {layer: {"w_bits": b, "a_bits": b}}, and lives in a JSON or YAML
file."""

import json
from collections.abc import Mapping
from pathlib import Path

import yaml

from licq.quant.config import FLOAT_BITS
from licq.support.errors import InputError

Bits = dict[str, dict[str, int]]
SIDES = ("w_bits", "a_bits")


def read_bits(path: str | Path) -> Bits:
    """The allocation of a file; a layer may name one side only.

    Raises:
        InputError: no such file, not an allocation, or bits other than 2 to 16 and 32.
    """
    try:
        content = _parsed(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        # ValueError: no UTF-8, or a date such as 2024-13-45
        raise InputError(f"`bits_file={path}` cannot be read ({error}); give a JSON or YAML file") from error
    if not isinstance(content, dict) or not all(isinstance(value, dict) for value in content.values()):
        raise InputError(
            f'`bits_file={path}` is no allocation; its form is {{"layer": {{"w_bits": 6, "a_bits": 8}}, ...}}'
        )
    for layer, sides in content.items():
        for side, bits in sides.items():
            if side not in SIDES:
                raise InputError(f"`bits_file={path}`: {layer} has {side!r}; choose w_bits or a_bits")
            if type(bits) is not int or bits != FLOAT_BITS and not 2 <= bits <= 16:
                raise InputError(
                    f"`bits_file={path}`: {side} {bits} of {layer} is out of range; "
                    "choose 2 to 16, or 32 for float"
                )
    return {str(layer): dict(sides) for layer, sides in content.items()}


def _parsed(text: str) -> object:
    """JSON first, for YAML takes all of it but tabs."""
    try:
        return json.loads(text)
    except ValueError:
        return yaml.safe_load(text)


def check_layers(bits: Mapping[str, Mapping[str, int]], layers: Mapping[str, object]) -> None:
    """Raises InputError when the allocation names a layer that the codec does not have."""
    for name in bits:
        if name not in layers:
            known = ", ".join(list(layers)[:6])
            raise InputError(
                f"no layer {name!r} whose bits could be set; "
                f"the {len(layers)} layers of this codec are {known} ..."
            )
