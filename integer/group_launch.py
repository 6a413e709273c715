"""Groups as launches: a product and the elementwise steps on its results, tile by tile."""

import ctypes
import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from licq.integer.groups import PRODUCTS, Group, operand_type, shuffled_channels
from licq.integer.launches import Launch, LaunchContext, check
from licq.integer.library import SLACK, TYPES, Array, Product, Winograd, kernels
from licq.integer.products import OPERAND_TYPES, direct_products
from licq.integer.steps import GroupSteps, with_channels_last
from licq.integer.winograd import winograd_product
from licq.quant import operations as ops


class GroupLaunch(Launch):
    """A group as calls of one kernel: one call, or one for each phase of a transposed convolution."""

    def __init__(self, context: LaunchContext, group: Group):
        self.context, self.group = context, group
        computed = group.computed
        inside = [number for operation in group.operations for number in operation.inputs]
        self.loads = tuple(
            dict.fromkeys(n for n in inside if n not in computed and n not in context.constants)
        )
        self.writes = tuple(number for number in computed if number in context.storage)
        self.channel_dim = len(group.shape) - 1 if group.channel_dim is None else group.channel_dim
        channels = group.shape[self.channel_dim]
        order = None if group.shuffle is None else shuffled_channels(channels, group.shuffle.arguments[1])
        self.steps = GroupSteps(context, group, self.channel_dim, order, self.loads, self.writes)
        self.product: _ProductLaunch | None = None
        if group.root is not None:
            self.product = _ProductLaunch(context, group, group.root, order)
        self.reads = self.loads + (() if group.root is None else group.root.inputs)

    @property
    def jobs(self) -> list[Product | Winograd]:
        """The kernel's jobs; none where the group has no product."""
        return [] if self.product is None else self.product.jobs

    def run(self, values: dict[int, Tensor], inputs: Mapping[str, Tensor], names: Mapping[int, str]) -> None:
        storage = self.context.storage
        arrays = [(with_channels_last(values[n], self.channel_dim), storage[n][1]) for n in self.loads]
        for number in self.writes:
            shape = self.context.program.values[number].shape
            values[number] = self.context.new(number, shape, self.channel_dim)
            arrays.append((values[number], storage[number][1]))
        arrays += [(tensor, 0) for tensor in self.steps.constants]
        table, tensors = (Array * max(len(arrays), 1))(), []
        for entry, (tensor, offset) in zip(table, arrays):
            tensor = tensor if tensor.dtype in TYPES else tensor.to(torch.int32)
            tensors.append(tensor)  # keeps the memory until the kernel has read it
            entry.data, entry.type, entry.offset = tensor.data_ptr(), TYPES[tensor.dtype], offset
        if self.product is not None:
            self.product.run(values, self.steps, table, self.threads)
            return
        channels = self.group.shape[self.channel_dim]
        pixels = ctypes.c_int64(math.prod(self.group.shape) // channels)
        steps = self.steps
        status = kernels().elementwise(
            pixels, channels, steps.table, steps.count, table, steps.registers, self.threads
        )
        check(status)


class _ProductLaunch:
    """The product of a group.

    channel_order: in which its outputs are computed; None: theirs.
    """

    def __init__(
        self,
        context: LaunchContext,
        group: Group,
        root: ops.MultiplyAccumulate,
        channel_order: Tensor | None,
    ):
        if channel_order is not None:
            bias = None if root.bias is None else root.bias[channel_order]
            root = replace(root, weight=root.weight[channel_order], bias=bias)
        assert isinstance(root, PRODUCTS), "only operations that `has_kernel` takes are roots"
        self.source = root.inputs[0]
        self.channel_dim = -1 if isinstance(root, ops.Linear) else 1
        value = context.program.values[self.source]
        self.stored_offset = context.storage[self.source][1]
        self.source_type = context.storage[self.source]
        if self.source_type[0] not in OPERAND_TYPES:  # others read the value as it is, in 32 bits
            self.source_type = _operand_type(root, context)
        self.jobs: list[Product | Winograd] = []
        if kernels().has_winograd() and self.source_type == (torch.int16, 0):
            winograd = winograd_product(root, value.shape, value.range.largest, group.shape)
            if winograd is not None:
                job, self._buffers = winograd
                self.jobs = [job]
        if not self.jobs:
            jobs, self._buffers = direct_products(root, value.shape, group.shape, self.source_type)
            self.jobs = [*jobs]
        # The direct kernel reads four bytes at a time, Winograd's at least 32.
        row = root.weight.shape[1] * self.source_type[0].itemsize
        self.slack = max(32 - row, 0) if isinstance(self.jobs[0], Winograd) else -row % 4

    def run(
        self, values: Mapping[int, Tensor], steps: GroupSteps, arrays: ctypes.Array, threads: int
    ) -> None:
        x = self._readable(values[self.source])
        for job in self.jobs:
            job.x, job.threads = x.data_ptr(), threads
            kernel = kernels().winograd if isinstance(job, Winograd) else kernels().products
            check(kernel(ctypes.byref(job), steps.table, steps.count, arrays, steps.registers))

    def _readable(self, x: Tensor) -> Tensor:
        """x with its channels contiguous, in the type of the products, and with readable bytes behind it."""
        dtype, offset = self.source_type
        rows = x.movedim(self.channel_dim, -1)
        bytes_behind = x.untyped_storage().nbytes() - (x.storage_offset() + x.numel()) * x.element_size()
        is_ready = rows.is_contiguous() and (x.dtype, self.stored_offset) == (dtype, offset)
        if is_ready and (not self.slack or bytes_behind >= self.slack):
            return x
        copy = torch.empty(rows.numel() + SLACK, dtype=dtype)[: rows.numel()].view(rows.shape)
        copy.copy_(rows if self.stored_offset == offset else rows + (offset - self.stored_offset))
        return copy


def _operand_type(root: ops.MultiplyAccumulate, context: LaunchContext) -> tuple[torch.dtype, int]:
    operand = operand_type(context.program.values[root.inputs[0]].range)
    assert operand is not None, "only operations that `has_kernel` takes are roots"
    return operand
