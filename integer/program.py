"""A program: operations on whole-number tensors, in order, with the proven range of every value.

An operation's kind says what it computes; `integer.reference` holds the meaning of each kind as a few lines
of PyTorch, and faster kernels must equal it to the bit.

kinds
    input            pixels, symbols: given from outside
    constant         `value`
    rescale          round_half_away(x * mantissa * 2^-shift), clipped to low .. high, times `refinement`
                     (split channels)
    round            round_half_away(x * 2^-bits): from the grid of a boundary to symbols
    conv, conv3d, deconv, linear   products with `weight` plus `bias`, into an accumulator
    matmul           product of two values
    add              x + y, clipped;   product  x * y
    leaky            x, or round_half_away(x * mantissa * 2^-shift) where x is negative
    table            `table`[x - first]
    softmax, layer_norm, gdn       see `quant.integer_functions`
    attention        matmul, rescale, softmax, rescale, matmul at once (`steps`); made by `integer.passes`
    layout           a PyTorch function that moves numbers and computes none: `name`, `arguments`
    neg, abs, relu, clamp, mask, square, sum
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

INT32 = 2**31 - 1


@dataclass(frozen=True)
class Range:
    """low <= every number <= high."""

    low: int
    high: int

    @property
    def largest(self) -> int:
        return max(-self.low, self.high)

    @property
    def dtype(self) -> torch.dtype:
        """The smallest type that holds the range; uint8 only where there is no negative number."""
        for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32):
            info = torch.iinfo(dtype)
            if info.min <= self.low and self.high <= info.max:
                return dtype
        return torch.int64

    def union(self, other: "Range") -> "Range":
        return Range(min(self.low, other.low), max(self.high, other.high))

    @classmethod
    def of(cls, numbers: Tensor) -> "Range":
        return cls(int(numbers.min()), int(numbers.max())) if numbers.numel() else cls(0, 0)


@dataclass
class Operation:
    """One step. inputs, outputs: numbers of values. node: the module or function of the codec that it belongs
    to."""

    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    facts: dict[str, Any] = field(default_factory=dict)
    node: str = ""

    def __repr__(self) -> str:
        detail = f" {self.facts['name']}" if self.kind == "layout" else ""
        return f"{self.outputs} = {self.kind}{detail} {self.inputs}  [{self.node}]"


@dataclass
class Value:
    shape: tuple[int, ...]
    range: Range

    @property
    def dtype(self) -> torch.dtype:
        return self.range.dtype


@dataclass
class Boundary:
    """A place where a latent is rounded; numbers of values, all on the grid of the boundaries but the
    symbols.

    kind: round, entropy_bottleneck, gaussian, mixture or offsets. latent: before it is rounded. decoded:
    after.
    whole: the symbols are round(latent), though there are means; a mixture's always are.
    """

    kind: str
    node: str
    latent: int
    symbols: int
    decoded: int
    means: int | None = None
    scales: int | None = None
    weights: int | None = None
    whole: bool = False
    step: Tensor | None = None


@dataclass
class Program:
    """operations in order; values by number; inputs and outputs by name; boundaries in the order of the
    codec's forward."""

    operations: list[Operation] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    inputs: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)
    boundaries: list[Boundary] = field(default_factory=list)

    def value(self, shape: tuple[int, ...], numbers: Range) -> int:
        self.values.append(Value(tuple(shape), numbers))
        return len(self.values) - 1

    def add(
        self,
        kind: str,
        inputs: tuple[int, ...],
        shape: tuple[int, ...],
        numbers: Range,
        node: str = "",
        **facts: Any,
    ) -> int:
        """Append an operation with one result; gives the number of its value."""
        number = self.value(shape, numbers)
        self.operations.append(Operation(kind, tuple(inputs), (number,), facts, node))
        return number

    def input(self, name: str, shape: tuple[int, ...], numbers: Range) -> int:
        """Append an input; gives the number of its value."""
        self.inputs[name] = self.add("input", (), shape, numbers, name)
        return self.inputs[name]

    def producers(self) -> dict[int, Operation]:
        return {output: operation for operation in self.operations for output in operation.outputs}

    def beyond_int32(self) -> Iterator[tuple[Operation, Range]]:
        """Operations whose result may need more than 32 bits, with the proven range."""
        for operation in self.operations:
            for output in operation.outputs:
                if self.values[output].range.largest > INT32:
                    yield operation, self.values[output].range

    def waist(self, start: int, outputs: Iterable[int]) -> int:
        """The last value that every way from `start` to `outputs` leads through."""
        wanted = set(outputs)
        needed, derived = set(wanted), {start}
        for operation in reversed(self.operations):
            if needed.intersection(operation.outputs):
                needed.update(operation.inputs)
        steps = []
        for operation in self.operations:
            if derived.intersection(operation.inputs) and needed.intersection(operation.outputs):
                derived.update(operation.outputs)
                steps.append(operation)
        readers = Counter(number for operation in steps for number in set(operation.inputs))
        last, alive = start, {start}
        for operation in steps:
            for number in derived.intersection(operation.inputs):
                readers[number] -= 1
                if not readers[number] and number not in wanted:
                    alive.discard(number)
            alive.update(number for number in operation.outputs if readers[number] or number in wanted)
            if len(alive) == 1:
                (last,) = alive
        return last

    def to(self, device: torch.device | str) -> "Program":
        """The same program with its constants on a device."""
        return replace(self, operations=_moved(self.operations, device))

    def part(self, inputs: dict[str, int], outputs: dict[str, int]) -> "Program":
        """The operations that `outputs` need, from `inputs` on; both are values of this program by name.

        Raises ValueError where an output needs an input of the whole program that is not among `inputs`.
        """
        producers, given = self.producers(), set(inputs.values())
        needed: set[int] = set()
        pending = list(outputs.values())
        while pending:
            value = pending.pop()
            if value in needed or value in given:
                continue
            needed.add(value)
            operation = producers[value]
            if operation.kind == "input":
                raise ValueError(f"{operation.node} is needed and not given")
            pending.extend(operation.inputs)
        operations = [Operation("input", (), (value,), node=name) for name, value in inputs.items()]
        operations += [
            op
            for op in self.operations
            if not given.intersection(op.outputs) and needed.intersection(op.outputs)
        ]
        return Program(operations, self.values, dict(inputs), dict(outputs))


def _moved(part: Any, device: torch.device | str) -> Any:
    if isinstance(part, Tensor):
        return part.to(device)
    if isinstance(part, Operation):
        return replace(part, facts=_moved(part.facts, device))
    if isinstance(part, dict):
        return {name: _moved(value, device) for name, value in part.items()}
    if isinstance(part, (list, tuple)) and not isinstance(part, torch.Size):
        return type(part)(_moved(value, device) for value in part)
    return part
