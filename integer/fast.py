"""Programs on the CPU's integer units: layers fused with what follows them elementwise, run by the C kernels.

A group is one multiply-accumulate operation (or none) and the elementwise operations on its result; they run
tile by tile, while the accumulators are in the cache, and only what other groups read is stored. Everything
that has no kernel here runs as the reference does. Numbers are the reference's to the bit.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from licq.integer.group_launch import GroupLaunch
from licq.integer.groups import Group, constants_of, groups_of, operand_type
from licq.integer.launches import AttentionLaunch, CopyLaunch, Launch, LayerNormLaunch, SingleLaunch, kernels
from licq.integer.library import SLACK, library
from licq.integer.program import Program
from licq.quant import operations as ops
from licq.quant.operations import Operation


class FastProgram:
    """A program made ready to run on this machine.

    Args:
        threads: of the kernels; None: PyTorch's.

    Raises:
        RuntimeError: the package was installed without a C compiler; run `integer.reference.run` instead.
    """

    def __init__(self, program: Program, threads: int | None = None):
        if library() is None:
            raise RuntimeError(
                "no compiled kernels; install the package where there is a C compiler, or use the reference"
            )
        self.program, self.threads = program, threads
        self.constants = constants_of(program)
        self.plan = groups_of(program)
        self.eight_bits = bool(kernels().has_vnni())
        self.readers = _readers(self.plan, program)
        self.storage = {number: self._storage(number) for number in self.readers}
        self.launches = [self._launch(entry) for entry in self.plan]
        self.dies = _deaths(self.launches, set(program.outputs.values()))
        sizes = {
            number: int(torch.Size(program.values[number].shape).numel()) * dtype.itemsize
            for number, (dtype, _) in self.storage.items()
        }
        self.slots = _slots(self.launches, set(program.outputs.values()), sizes)
        self.memory: dict[int, Tensor] = {}  # by slot
        self.views: dict[tuple[int, tuple[int, ...], int], Tensor] = {}  # of the memory, see `new`
        self.keeps = False

    def _launch(self, entry: Group | Operation) -> Launch:
        if isinstance(entry, Group):
            return GroupLaunch(self, entry)
        if isinstance(entry, ops.LayerNorm) and LayerNormLaunch.takes(entry, self.program):
            return LayerNormLaunch(self, entry)
        if isinstance(entry, ops.Attention) and AttentionLaunch.takes(entry, self.program):
            return AttentionLaunch(self, entry)
        if isinstance(entry, ops.Layout) and CopyLaunch.takes(entry):
            return CopyLaunch(self, entry)
        return SingleLaunch(self, entry)

    def _storage(self, number: int) -> tuple[torch.dtype, int]:
        """(type, offset) in which a value lies in memory."""
        value, readers = self.program.values[number], self.readers[number]
        products = [
            entry
            for entry in readers
            if isinstance(entry, Group) and entry.root is not None and number in entry.root.inputs
        ]
        if not products or number in self.constants:
            return value.dtype, 0
        numbers = value.range.with_zero  # with the padding of a convolution
        only = len(products) == len(readers) and number not in self.program.outputs.values()
        if self.eight_bits and only and numbers.high - numbers.low < 256:
            return torch.uint8, -numbers.low
        storage = operand_type(value.range)
        assert storage is not None  # else a product would not read the value
        return storage if only or not storage[1] else (value.dtype, 0)

    def __call__(self, inputs: Mapping[str, Tensor], keep: bool = False) -> dict[Any, Tensor]:
        """The outputs of the program by name; with `keep`, all that was stored, by number."""
        values: dict[int, Tensor] = dict(self.constants)
        self.keeps = keep
        numbers = {number: name for name, number in self.program.inputs.items()}
        for place, launch in enumerate(self.launches):
            launch.run(values, inputs, numbers)
            if not keep:
                for number in self.dies[place]:
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
        """Memory for a value, with bytes behind it that kernels may read; in the next run the same, so that
        its pages are there.

        channel_dim: of the shape, the one whose numbers lie side by side.
        """
        slot = None if self.keeps else self.slots.get(number)
        if slot is not None and (number, shape, channel_dim) in self.views:
            return self.views[number, shape, channel_dim]
        dtype, _ = self.storage[number]
        size = math.prod(shape) * dtype.itemsize
        memory = None if slot is None else self.memory.get(slot)
        if memory is None or len(memory) < size + SLACK:
            memory = torch.empty(size + SLACK, dtype=torch.uint8)
            if slot is not None:
                self.memory[slot] = memory
                self.views = {key: view for key, view in self.views.items() if self.slots[key[0]] != slot}
        rows = [*shape]
        rows.append(rows.pop(channel_dim))
        made = memory[:size].view(dtype).view(rows).movedim(-1, channel_dim)
        if slot is not None:
            self.views[number, shape, channel_dim] = made
        return made


def _slots(launches: list[Launch], outputs: set[int], sizes: Mapping[int, int]) -> dict[int, int]:
    """The memory of each value that a kernel or a copy writes; values that are not needed at the same time
    share one, of the same size first.

    What PyTorch makes of a value may be a view of it, which then keeps the memory from others as long as it
    is needed itself. A program's outputs have none: they leave it.
    """
    owners: dict[int, set[int]] = {}  # whose memory a value may be a view of
    last: dict[int, int] = {}
    for place, launch in enumerate(launches):
        for number in launch.writes:
            views = (
                {owner for source in launch.reads for owner in owners.get(source, ())}
                if isinstance(launch, SingleLaunch)
                else set()
            )
            owners[number] = views if type(launch) is SingleLaunch else {number, *views}
        for number in (*launch.reads, *launch.writes):
            for owner in owners.get(number, ()):
                last[owner] = max(last.get(owner, 0), len(launches) if number in outputs else place)
    dying: dict[int, list[int]] = {}
    for owner, place in last.items():
        dying.setdefault(place, []).append(owner)
    slots: dict[int, int] = {}
    free: list[tuple[int, int]] = []  # size, slot
    count = 0
    for place, launch in enumerate(launches):
        for number in launch.writes:
            if type(launch) is SingleLaunch or last[number] == len(launches):
                continue
            found = next((entry for entry in free if entry[0] == sizes[number]), free[-1] if free else None)
            if found is None:
                slots[number], count = count, count + 1
            else:
                free.remove(found)
                slots[number] = found[1]
        free += [(sizes[owner], slots[owner]) for owner in dying.get(place, ()) if owner in slots]
    return slots


def _readers(plan: list[Group | Operation], program: Program) -> dict[int, list[Group | Operation]]:
    """Which entries of the plan read each value that is stored."""
    readers: dict[int, list[Group | Operation]] = {number: [] for number in program.outputs.values()}
    for entry in plan:
        operations = entry.members if isinstance(entry, Group) else [entry]
        own = (
            {number for operation in operations for number in operation.outputs}
            if isinstance(entry, Group)
            else set()
        )
        for operation in operations:
            for number in operation.inputs:
                if number not in own and entry not in readers.setdefault(number, []):
                    readers[number].append(entry)
    return readers


def _deaths(launches: list[Launch], outputs: set[int]) -> list[list[int]]:
    last: dict[int, int] = {}
    for place, launch in enumerate(launches):
        for number in (*launch.reads, *launch.writes):
            last[number] = place
    dies: list[list[int]] = [[] for _ in launches]
    for number, place in last.items():
        if number not in outputs:
            dies[place].append(number)
    return dies
