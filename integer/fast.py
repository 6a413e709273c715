"""Programs on the CPU's integer units: layers fused with what follows them elementwise.

A group is one multiply-accumulate operation (or none) and the elementwise operations on its result. The
compiled kernels run it tile by tile, while the accumulators are in the cache, and store only what other
groups read. An operation that has no kernel runs as the reference does. Results are the reference's to the
bit.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from licq.integer.attention import AttentionLaunch
from licq.integer.group_launch import GroupLaunch
from licq.integer.groups import Group, constants_of, groups_of, operand_type
from licq.integer.launches import CopyLaunch, Launch, LayerNormLaunch, ReferenceLaunch
from licq.integer.library import SLACK, kernels
from licq.integer.memory import memory_slots, values_to_drop
from licq.integer.program import Program
from licq.quant import operations as ops
from licq.quant.operations import Operation


class FastProgram:
    """A program made ready to run on this machine.

    Args:
        threads: of the kernels; None: PyTorch's.

    Raises:
        RuntimeError: there are no compiled kernels; run `integer.reference.run` instead.
    """

    def __init__(self, program: Program, threads: int | None = None):
        self.program, self.threads = program, threads
        self.eight_bits = bool(kernels().has_vnni())
        self.constants = constants_of(program)
        self.plan = groups_of(program)
        readers = _readers(self.plan, program)
        self.storage = {number: self._storage(number, entries) for number, entries in readers.items()}
        self.launches = [self._launch(entry) for entry in self.plan]
        outputs = set(program.outputs.values())
        self._drops = values_to_drop(self.launches, outputs)
        sizes = {
            number: math.prod(program.values[number].shape) * dtype.itemsize
            for number, (dtype, _) in self.storage.items()
        }
        self._slots = memory_slots(self.launches, outputs, sizes)
        self._memory: dict[int, Tensor] = {}  # by slot
        self._views: dict[tuple[int, tuple[int, ...], int], Tensor] = {}  # of the memory, see `new`
        self._keeps_values = False

    def _launch(self, entry: Group | Operation) -> Launch:
        match entry:
            case Group():
                return GroupLaunch(self, entry)
            case ops.LayerNorm() if LayerNormLaunch.takes(entry, self.program):
                return LayerNormLaunch(self, entry)
            case ops.Attention() if AttentionLaunch.takes(entry, self.program):
                return AttentionLaunch(self, entry)
            case ops.Layout() if CopyLaunch.takes(entry):
                return CopyLaunch(self, entry)
            case _:
                return ReferenceLaunch(self, entry)

    def _storage(self, number: int, readers: list[Group | Operation]) -> tuple[torch.dtype, int]:
        """The type in which a value lies in memory, and what is added to its integers there."""
        value = self.program.values[number]
        products = [
            entry
            for entry in readers
            if isinstance(entry, Group) and entry.root is not None and number in entry.root.inputs
        ]
        if not products or number in self.constants:
            return value.dtype, 0
        padded = value.range.with_zero
        only_products = len(products) == len(readers) and number not in self.program.outputs.values()
        if self.eight_bits and only_products and padded.high - padded.low < 256:
            return torch.uint8, -padded.low
        operand = operand_type(value.range)
        if operand is None or (operand[1] and not only_products):
            return value.dtype, 0
        return operand

    def __call__(self, inputs: Mapping[str, Tensor], keep: bool = False) -> dict[Any, Tensor]:
        """The outputs of the program by name; with `keep`, all that was stored, by number."""
        values: dict[int, Tensor] = dict(self.constants)
        self._keeps_values = keep
        names = {number: name for name, number in self.program.inputs.items()}
        for launch, drops in zip(self.launches, self._drops):
            launch.run(values, inputs, names)
            if not keep:
                for number in drops:
                    values.pop(number, None)
        if keep:
            return {
                number: tensor.to(torch.int64) - self.storage.get(number, (None, 0))[1]
                for number, tensor in values.items()
            }
        return {
            name: values[number].to(self.program.values[number].dtype)
            for name, number in self.program.outputs.items()
        }

    def new(self, number: int, shape: tuple[int, ...], channel_dim: int = -1) -> Tensor:
        """Memory for a value, with `SLACK` bytes behind it that kernels may read.

        The next run gets the same memory, so that its pages are there.

        channel_dim: the dimension of the shape that is contiguous.
        """
        slot = self._slots.get(number)
        if slot is None or self._keeps_values:
            return self._view(self._bytes(number, shape), number, shape, channel_dim)
        key = (number, shape, channel_dim)
        if key not in self._views:
            memory = self._memory.get(slot)
            if memory is None or len(memory) < self._size(number, shape) + SLACK:
                memory = self._memory[slot] = self._bytes(number, shape)
                self._views = {of: view for of, view in self._views.items() if self._slots[of[0]] != slot}
            self._views[key] = self._view(memory, number, shape, channel_dim)
        return self._views[key]

    def _size(self, number: int, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * self.storage[number][0].itemsize

    def _bytes(self, number: int, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(self._size(number, shape) + SLACK, dtype=torch.uint8)

    def _view(self, memory: Tensor, number: int, shape: tuple[int, ...], channel_dim: int) -> Tensor:
        rows = [*shape]
        rows.append(rows.pop(channel_dim))
        typed = memory[: self._size(number, shape)].view(self.storage[number][0])
        return typed.view(rows).movedim(-1, channel_dim)


def _readers(plan: list[Group | Operation], program: Program) -> dict[int, list[Group | Operation]]:
    """The entries of the plan that read each value that is stored."""
    readers: dict[int, list[Group | Operation]] = {number: [] for number in program.outputs.values()}
    for entry in plan:
        members, computed = (
            (entry.members, entry.computed) if isinstance(entry, Group) else ([entry], set[int]())
        )
        for operation in members:
            for number in operation.inputs:
                if number not in computed and entry not in readers.setdefault(number, []):
                    readers[number].append(entry)
    return readers
