"""Values of a sweep file: that they are what they should be, or one line that says which is not.

`where` is how a message calls the part of the file. All of these raise InputError.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from licq.support.errors import InputError


def one_of(name: Any, where: str, known: Iterable[str]) -> str:
    """The name, if it is one of the known ones."""
    if name not in list(known):
        raise InputError(f"{where}: {name} is not one of {', '.join(known)}")
    return name


def names_of(value: Any, where: str, known: Iterable[str]) -> tuple[str, ...]:
    """The names of a list, or the one name, each of them a known one; none where the value is None."""
    names = [] if value is None else value if isinstance(value, list) else [value]
    return tuple(one_of(name, where, known) for name in names)


def mapping(value: Any, where: str, known: set[str] | None = None) -> Mapping[str, Any]:
    """The value, if it is a mapping whose keys are text, and among the `known` ones where these are given."""
    if not isinstance(value, Mapping):
        raise InputError(f"{where} is no mapping of names to values")
    other = [key for key in value if not isinstance(key, str)]
    if other:
        raise InputError(
            f"{where} has the name {other[0]}, which YAML does not read as text; put it in quotes"
        )
    unknown = [] if known is None else [key for key in value if key not in known]
    if known is not None and unknown:
        raise InputError(f"{where} has the unknown key {unknown[0]}; known are {', '.join(sorted(known))}")
    return value


def list_of(value: Any, where: str) -> list:
    """The value, if it is a list that is not empty."""
    if not isinstance(value, list) or not value:
        raise InputError(f"{where} is no list of values")
    return value


def as_text(value: Any) -> str:
    """A value as the command line spells it: lists with commas, true and false."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(as_text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def label_of(value: Any) -> str:
    """What a single value is called; a path is called by its last part."""
    text = as_text(value)
    return Path(text).name if "/" in text else text
