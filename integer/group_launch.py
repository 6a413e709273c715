"""A group as one launch of the compiled kernels: products, and the steps that follow them tile by tile."""

import ctypes
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from licq.integer.group_steps import GroupSteps, with_channels_last
from licq.integer.groups import Group, operand_type, shuffled_channels
from licq.integer.launches import Launch, Owner, kernels
from licq.integer.library import SLACK, TYPES, Array, Product, Winograd
from licq.integer.products import OPERANDS, tap_jobs, winograd_job
from licq.quant import operations as ops


class GroupLaunch(Launch):
    """All operations of a group, in one pass over its tiles."""

    def __init__(self, owner: Owner, group: Group):
        self.owner, self.group = owner, group
        inside = {number for operation in group.members for number in operation.outputs}
        ndim = len(group.shape)
        self.channel_dim = ndim - 1 if group.channel_dim is None else group.channel_dim
        self.channels = group.shape[self.channel_dim]
        root, order = group.root, None
        if group.shuffle is not None and root is not None:
            order = shuffled_channels(self.channels, group.shuffle.arguments[1])
            bias = None if root.bias is None else root.bias[order]
            root = replace(root, weight=root.weight[order], bias=bias)
        self.writes = tuple(number for number in inside if number in owner.readers)
        outside = [
            number
            for operation in group.operations
            for number in operation.inputs
            if number not in inside and number not in owner.constants
        ]
        self.loads = tuple(dict.fromkeys(outside))
        self.reads = self.loads + (root.inputs if root else ())
        self.steps = GroupSteps(owner, group, self.loads, self.writes, self.channel_dim, order)
        self.jobs: list[Product] | list[Winograd] = []
        if root is not None:
            self._prepare_products(root)

    def _prepare_products(self, root: ops.MultiplyAccumulate) -> None:
        self.source = root.inputs[0]
        self.stored = self.owner.storage[self.source]
        value = self.owner.program.values[self.source]
        # where others read it as it is, it may lie in 32 bits; the products then read a copy
        source_type = self.stored if self.stored[0] in OPERANDS else operand_type(value.range)
        assert source_type is not None  # else the operation has no kernel
        self.source_type = source_type
        winograd = None
        if kernels().has_winograd() and self.source_type == (torch.int16, 0):
            winograd = winograd_job(root, value.shape, value.range.largest, self.group.shape)
        if winograd is not None:
            self.jobs, self._memory = [winograd[0]], winograd[1]
        else:
            self.jobs, self._memory = tap_jobs(root, value.shape, self.source_type, self.group.shape)

    def run(self, values: dict[int, Tensor], inputs: Mapping[str, Tensor], names: Mapping[int, str]) -> None:
        arrays, held = self._arrays(values)
        steps, threads = self.steps, self.thread_count
        if self.group.root is None:
            pixels = int(torch.Size(self.group.shape).numel()) // self.channels
            failed = kernels().elementwise(
                ctypes.c_int64(pixels),
                self.channels,
                steps.steps,
                steps.count,
                arrays,
                steps.registers,
                threads,
            )
        else:
            x = self._readable(values[self.source])
            failed = 0
            for job in self.jobs:
                job.x, job.threads = x.data_ptr(), threads
                run = kernels().winograd if isinstance(job, Winograd) else kernels().products
                failed |= run(ctypes.byref(job), steps.steps, steps.count, arrays, steps.registers)
        del held
        if failed:
            raise MemoryError("the kernels ran out of memory")

    def _arrays(self, values: dict[int, Tensor]) -> tuple[ctypes.Array, list[Tensor]]:
        """(what the steps load and store, the tensors whose memory that is)."""
        owner, numbers = self.owner, self.steps.arrays
        arrays, held = (Array * max(len(numbers), 1))(), []
        for position, number in enumerate(numbers):
            if number is None:
                tensor, offset = self.steps.fixed[position], 0
            elif number in self.writes and position >= len(self.loads):
                tensor = owner.new(number, owner.program.values[number].shape, self.channel_dim)
                offset = owner.storage[number][1]
                values[number] = tensor
            else:
                tensor = with_channels_last(values[number], self.channel_dim)
                offset = owner.storage[number][1]
            if tensor.dtype not in TYPES:
                tensor = tensor.to(torch.int32)
            held.append(tensor)
            array = arrays[position]
            array.data, array.type, array.offset = tensor.data_ptr(), TYPES[tensor.dtype], offset
        return arrays, held

    def _readable(self, x: Tensor) -> Tensor:
        """x with its channels contiguous, in the type of the products, and with readable bytes behind it."""
        dtype, offset = self.source_type
        channel_dim = x.ndim - 1 if isinstance(self.group.root, ops.Linear) else 1
        rows = x.movedim(channel_dim, -1)
        is_ready = rows.is_contiguous() and (x.dtype, self.stored[1]) == (dtype, offset)
        # the kernel of taps reads four bytes at a time, Winograd's at least 32
        row = rows.shape[-1] * x.element_size()
        needed = max(32 - row, 0) if isinstance(self.jobs[0], Winograd) else -row % 4
        behind = x.untyped_storage().nbytes() - (x.storage_offset() + x.numel()) * x.element_size()
        if is_ready and (not needed or behind >= needed):
            return x
        flat = torch.empty(rows.numel() + SLACK, dtype=dtype)[: rows.numel()].view(rows.shape)
        flat.copy_(rows if self.stored[1] == offset else rows + (offset - self.stored[1]))
        return flat
