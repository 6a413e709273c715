"""Ready programs as plain data, and back: JSON for what they are, arrays for what they hold, no pickles.

The kernels' structures hold addresses. An address is written as the number of the array that it points to.
"""

import ctypes
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from licq.integer import library, ready, ready_moves

KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        ready_moves.InputLaunch,
        ready_moves.LayoutLaunch,
        ready_moves.CopyLaunch,
        ready_moves.SumLaunch,
        ready.GroupLaunch,
        ready.ProductJobs,
        ready.LayerNormLaunch,
        ready.AttentionLaunch,
        ready.ReadyProgram,
        ready_moves.Place,
    )
}
_STRUCTURES: dict[str, type[ctypes.Structure]] = {
    kind.__name__: kind for kind in (library.Product, library.Winograd, library.LayerNorm, library.Attention)
}
_IN_A_RUN = {"x", "q", "k", "v", "out"}  # set in every run
_STEPS = {
    library.RESCALE: "rescale",
    library.LEAKY: "leaky",
    library.ADD: "add",
    library.ADD_CHANNELS: "add",
    library.CLAMP: "clamp",
    library.TABLE: "table",
    library.GDN: "gdn",
}
_TAG = "$"  # no field has this name


class NotStorable(Exception):
    """A program holds something that files cannot, such as an operation that the reference computes."""


class Writer:
    """Turns objects into what JSON can hold.

    Args:
        kinds: dataclasses that may be written, by name. Fields whose names begin with "_" are left out.

    Attributes:
        arrays: what the objects refer to by number; none is there twice.
    """

    def __init__(self, kinds: Mapping[str, type] = KINDS) -> None:
        self.kinds = kinds
        self.arrays: list[np.ndarray] = []
        self._known: dict[tuple, int] = {}  # by content
        self._number: dict[int, int] = {}  # by address

    def array(self, array: np.ndarray) -> int:
        """The number of an array."""
        array = np.ascontiguousarray(array)
        key = (array.dtype.str, array.shape, hashlib.sha256(array.data).digest())
        if key not in self._known:
            self._known[key] = len(self.arrays)
            self.arrays.append(array)
        return self._known[key]

    def plain(self, part: Any) -> Any:
        """`part` as JSON.

        Raises:
            NotStorable: it holds something else than files can.
        """
        match part:
            case None | bool() | int() | float() | str():
                return part
            case np.integer():
                return int(part)
            case np.ndarray():
                return {_TAG: "array", "number": self.array(part)}
            case np.dtype():
                return {_TAG: "dtype", "name": part.name}
            case slice():
                ends = (part.start, part.stop, part.step)
                return {_TAG: "slice", "ends": [self.plain(end) for end in ends]}
            case tuple():
                return {_TAG: "tuple", "parts": [self.plain(value) for value in part]}
            case list():
                return [self.plain(value) for value in part]
            case dict():
                return {_TAG: "dict", "pairs": [[self.plain(a), self.plain(b)] for a, b in part.items()]}
            case ctypes.Structure():
                return self._structure(part)
            case _ if part is Ellipsis:
                return {_TAG: "ellipsis"}
            case _ if type(part) is self.kinds.get(type(part).__name__):
                return self._object(part)
        raise NotStorable(type(part).__name__)

    def _object(self, part: Any) -> dict[str, Any]:
        names = [field.name for field in dataclasses.fields(part) if not field.name.startswith("_")]
        # buffers come first: the structures point to them
        fields = {}
        for name in sorted(names, key=lambda name: name != "buffers"):
            value = getattr(part, name)
            if name == "buffers":
                for buffer in value:
                    if not buffer.flags.c_contiguous:
                        raise NotStorable("a buffer with gaps")
                    self._number[buffer.ctypes.data] = self.array(buffer)
                fields[name] = [self._number[buffer.ctypes.data] for buffer in value]
            elif name == "steps":
                fields[name] = [self._step(step) for step in value]
            else:
                fields[name] = self.plain(value)
        for buffer in getattr(part, "buffers", ()):
            self._number.pop(buffer.ctypes.data, None)
        return {_TAG: type(part).__name__, **fields}

    def _structure(self, part: ctypes.Structure) -> dict[str, Any]:
        return {_TAG: type(part).__name__, **{name: self._field(part, name) for name in _names(part)}}

    def _step(self, step: library.Step) -> dict[str, Any]:
        plain = {name: getattr(step, name) for name in ("op", "dst", "a", "b", "period")}
        member = "store" if step.op == library.STORE else _STEPS.get(step.op)
        if member is not None:
            struct = getattr(step, member)
            plain[member] = {name: self._field(struct, name) for name in _names(struct)}
        return plain

    def _field(self, struct: Any, name: str) -> Any:
        value = getattr(struct, name)
        if name in dict(_pointers(struct)):
            if value and value not in self._number:
                raise NotStorable(f"an address without an array: {name}")
            return [self._number[value]] if value else None
        return value


def _names(struct: Any) -> Iterator[str]:
    """The fields that are the same in every run."""
    for name, _ in struct._fields_:
        if not (name in _IN_A_RUN or name == "threads" or name.endswith("_steps")):
            yield name


def _pointers(struct: Any) -> Iterator[tuple[str, Any]]:
    yield from ((name, kind) for name, kind in struct._fields_ if kind is ctypes.c_void_p)


class Reader:
    """Makes objects of what `Writer` has written.

    Args:
        arrays: by number. They stay as they are while the objects are used.
        kinds: dataclasses that may be read, by name.
    """

    def __init__(self, arrays: list[np.ndarray], kinds: Mapping[str, type] = KINDS):
        self.arrays, self.kinds = arrays, kinds

    def object(self, plain: Any) -> Any:
        """The object; KeyError, ValueError, TypeError or IndexError where there is none like it."""
        if isinstance(plain, list):
            return [self.object(part) for part in plain]
        if not isinstance(plain, dict):
            return plain
        fields = {name: value for name, value in plain.items() if name != _TAG}
        match plain[_TAG]:
            case "array":
                return self.arrays[fields["number"]]
            case "dtype":
                return np.dtype(fields["name"])
            case "slice":
                return slice(*(self.object(end) for end in fields["ends"]))
            case "tuple":
                return tuple(self.object(part) for part in fields["parts"])
            case "dict":
                return {self.object(name): self.object(value) for name, value in fields["pairs"]}
            case "ellipsis":
                return Ellipsis
            case name if name in _STRUCTURES:
                struct = _STRUCTURES[name]()
                self._fill(struct, fields)
                return struct
            case name:
                return self.kinds[name](**{field: self._of(field, value) for field, value in fields.items()})

    def _of(self, field: str, value: Any) -> Any:
        if field == "buffers":
            return [self.arrays[number] for number in value]
        if field == "steps":
            table = (library.Step * max(len(value), 1))()
            for step, plain in zip(table, value):
                for name, part in plain.items():
                    if isinstance(part, dict):
                        self._fill(getattr(step, name), part)
                    else:
                        setattr(step, name, part)
            return table
        return self.object(value)

    def _fill(self, struct: Any, fields: dict[str, Any]) -> None:
        pointers = dict(_pointers(struct))
        for name, value in fields.items():
            if name in pointers:
                value = None if value is None else self.arrays[value[0]].ctypes.data
            setattr(struct, name, value)
