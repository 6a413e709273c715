"""A program: operations on integer tensors, in order, with the proven range of every value.

The kinds of operations are the classes of `quant.operations`.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from licq.quant.fixedpoint import INT32
from licq.quant.operations import Boundary, Input, Operation, Range


@dataclass
class Value:
    """What an operation computes: its shape and its proven range."""

    shape: tuple[int, ...]
    range: Range

    @property
    def dtype(self) -> torch.dtype:
        return self.range.dtype


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

    def add(self, operation: Operation, shape: tuple[int, ...], numbers: Range) -> int:
        """Append an operation with one result; gives the number of its value."""
        number = self.value(shape, numbers)
        self.operations.append(replace(operation, outputs=(number,)))
        return number

    def input(self, name: str, shape: tuple[int, ...], numbers: Range) -> int:
        """Append an input; gives the number of its value."""
        self.inputs[name] = self.add(Input(node=name), shape, numbers)
        return self.inputs[name]

    def producers(self) -> dict[int, Operation]:
        return {output: operation for operation in self.operations for output in operation.outputs}

    def beyond_int32(self) -> Iterator[tuple[Operation, Range]]:
        """Operations whose result may need more than 32 bits, with the proven range."""
        for operation in self.operations:
            for output in operation.outputs:
                if self.values[output].range.largest > INT32:
                    yield operation, self.values[output].range

    def bottleneck(self, start: int, outputs: Iterable[int]) -> int:
        """The last value that every way from `start` to `outputs` leads through."""
        results = set(outputs)
        needed, derived = set(results), {start}
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
                if not readers[number] and number not in results:
                    alive.discard(number)
            alive.update(number for number in operation.outputs if readers[number] or number in results)
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
            if isinstance(operation, Input):
                raise ValueError(f"{operation.node} is needed and not given")
            pending.extend(operation.inputs)
        operations = [Input(outputs=(value,), node=name) for name, value in inputs.items()]
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
        return replace(part, **_moved(part.attributes(), device))
    if isinstance(part, dict):
        return {name: _moved(value, device) for name, value in part.items()}
    if isinstance(part, (list, tuple)) and not isinstance(part, torch.Size):
        return type(part)(_moved(value, device) for value in part)
    return part
