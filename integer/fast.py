"""Programs on the CPU's integer units: layers fused with what follows them elementwise.

A group is one multiply-accumulate operation (or none) and the elementwise operations on its result. The
compiled kernels run it tile by tile, while the accumulators are in the cache, and store only what other
groups read. An operation that has no kernel runs as the reference does. Results are the reference's to the
bit.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from licq.integer import ready, ready_moves
from licq.integer.attention import AttentionJob, attention_launch
from licq.integer.group_launch import group_launch
from licq.integer.groups import Group, constants_of, groups_of, operand_type
from licq.integer.launches import (
    ReferenceLaunch,
    array_type,
    has_layer_norm,
    input_launch,
    layer_norm_launch,
    layout_launch,
)
from licq.integer.library import kernels
from licq.integer.memory import memory_offsets, values_to_drop
from licq.integer.program import Program
from licq.integer.winograd import beats_bytes
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
        names = {number: name for name, number in program.inputs.items()}
        self.launches = [
            self._launch(entry, names) for entry in self.plan if not isinstance(entry, ops.Constant)
        ]
        outputs = set(program.outputs.values())
        sizes = {
            number: math.prod(program.values[number].shape) * dtype.itemsize
            for number, (dtype, _) in self.storage.items()
        }
        self.ready = ready.ReadyProgram(
            self.launches,
            {number: value.numpy() for number, value in self.constants.items()},
            {number: (array_type(dtype), offset) for number, (dtype, offset) in self.storage.items()},
            {
                name: (number, array_type(program.values[number].dtype))
                for name, number in program.outputs.items()
            },
            values_to_drop(self.launches, outputs),
            *memory_offsets(self.launches, outputs, sizes),
        )

    def _launch(self, entry: Group | Operation, names: Mapping[int, str]) -> ready.Launch:
        match entry:
            case Group():
                return group_launch(self, entry)
            case ops.Input():
                return input_launch(entry, names[entry.outputs[0]])
            case ops.LayerNorm() if has_layer_norm(entry, self.program):
                return layer_norm_launch(entry, self.program)
            case ops.Attention() if AttentionJob.takes(entry, self.program):
                return attention_launch(self, entry)
            case ops.Sum():
                return ready_moves.SumLaunch(entry.dim, entry.keepdim, entry.inputs, entry.outputs)
            case ops.Layout():
                return layout_launch(entry, self.program)
            case _:
                return ReferenceLaunch(entry)

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
            if not any(self._runs_winograd(entry, value.range.largest) for entry in products):
                return torch.uint8, -padded.low
        operand = operand_type(value.range)
        if operand is None or (operand[1] and not only_products):
            return value.dtype, 0
        return operand

    def _runs_winograd(self, group: Group, largest_input: int) -> bool:
        """Whether the product of a group is to read 16 bits, though 8 bits hold its input."""
        assert group.root is not None
        return bool(kernels().has_winograd()) and beats_bytes(group.root, largest_input, group.shape)

    def __call__(self, inputs: Mapping[str, Tensor], keep: bool = False) -> dict[Any, Tensor]:
        """The outputs of the program by name; with `keep`, all that was stored, by number."""
        results = self.on_arrays({name: tensor.numpy() for name, tensor in inputs.items()}, keep)
        return {name: torch.from_numpy(np.asarray(array)) for name, array in results.items()}

    def on_arrays(self, inputs: Mapping[str, np.ndarray], keep: bool = False) -> dict[Any, np.ndarray]:
        """The same on NumPy's arrays."""
        self.ready.threads = self.threads or torch.get_num_threads()
        return self.ready(inputs, keep)


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
