"""Launches that need no kernel: inputs, sums, and functions that move numbers. No torch is needed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from licq.integer.arrays import LAYOUT, viewed
from licq.integer.ready import Launch, ReadyProgram, Values


@dataclass
class Place:
    """In the place of a value among the arguments of a layout function: input number `index`."""

    index: int


@dataclass
class InputLaunch(Launch):
    """An input of the program, in the type in which the program stores it."""

    name: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    uses_program_memory = False

    def run(self, program: ReadyProgram, values: Values, inputs: Mapping[str, np.ndarray]) -> None:
        program.put(values, self.writes[0], inputs[self.name])


@dataclass
class LayoutLaunch(Launch):
    """A function that moves numbers.

    arguments: with a `Place` for each value. shape: of the result, where the program gives memory for it.
    """

    name: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    may_give_views = True
    uses_program_memory = False

    def run(self, program: ReadyProgram, values: Values, inputs: Mapping[str, np.ndarray]) -> None:
        results = LAYOUT[self.name](*_filled(self.arguments, [values[n] for n in self.reads]), **self.options)
        many = isinstance(results, (list, tuple))
        for number, result in zip(self.writes, results if many else (results,), strict=True):
            program.put(values, number, result)


@dataclass
class CopyLaunch(LayoutLaunch):
    """A layout function that copies a large value, into memory that is used again in the next run."""

    shape: tuple[int, ...]
    uses_program_memory = True

    def run(self, program: ReadyProgram, values: Values, inputs: Mapping[str, np.ndarray]) -> None:
        (source,), (number,) = self.reads, self.writes
        x, (dtype, offset) = values[source], program.storage[number]
        shuffled = self.name == "pixel_shuffle"
        if (
            x.dtype != dtype
            or (shuffled and x.ndim != 4)
            or offset != program.storage.get(source, (dtype, 0))[1]
            or self.options
        ):
            super().run(program, values, inputs)
        elif self.name == "index_select":
            out = program.new(number, self.shape)
            values[number] = np.take(x, self.arguments[2], self.arguments[1], out=out, mode="clip")
        elif shuffled:  # with channels contiguous, as the kernels read them
            batch, _, height, width = x.shape
            side, channels = self.arguments[1], self.shape[1]
            rows = program.new(number, (batch, height, side, width, side, channels))
            cells = x.transpose(0, 2, 3, 1).reshape(batch, height, width, channels, side, side)
            rows[...] = cells.transpose(0, 1, 4, 2, 5, 3)
            values[number] = rows.reshape(batch, height * side, width * side, channels).transpose(0, 3, 1, 2)
        else:
            view = viewed(x, self.shape)
            if view is None:
                view = program.new(number, x.shape)
                view[...] = x
            values[number] = view.reshape(self.shape)


@dataclass
class SumLaunch(Launch):
    """Sums along dimensions."""

    dim: Any
    keepdim: bool
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    uses_program_memory = False

    def run(self, program: ReadyProgram, values: Values, inputs: Mapping[str, np.ndarray]) -> None:
        dim = tuple(self.dim) if isinstance(self.dim, list) else self.dim
        x = values[self.reads[0]]
        program.put(values, self.writes[0], x.sum(dim, dtype=np.int64, keepdims=self.keepdim))


def _filled(parts: Any, inputs: list[np.ndarray]) -> Any:
    if isinstance(parts, (list, tuple)):
        return type(parts)(_filled(part, inputs) for part in parts)
    return inputs[parts.index] if isinstance(parts, Place) else parts
