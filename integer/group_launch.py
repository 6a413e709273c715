"""Groups as launches: a product and the elementwise steps on its results, tile by tile."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from licq.integer import ready
from licq.integer.groups import PRODUCTS, Group, operand_type, shuffled_channels
from licq.integer.launches import LaunchContext, array_type
from licq.integer.library import Product, Winograd, kernels
from licq.integer.products import OPERAND_TYPES, direct_products
from licq.integer.steps import GroupSteps
from licq.integer.winograd import winograd_product
from licq.quant import operations as ops


def group_launch(context: LaunchContext, group: Group) -> ready.GroupLaunch:
    """A group as calls of one kernel: one call, or one for each phase of a transposed convolution."""
    computed = group.computed
    inside = [number for operation in group.operations for number in operation.inputs]
    loads = tuple(dict.fromkeys(n for n in inside if n not in computed and n not in context.constants))
    writes = tuple(number for number in computed if number in context.storage)
    channel_dim = len(group.shape) - 1 if group.channel_dim is None else group.channel_dim
    channels = group.shape[channel_dim]
    order = None if group.shuffle is None else shuffled_channels(channels, group.shuffle.arguments[1])
    steps = GroupSteps(context, group, channel_dim, order, loads, writes)
    return ready.GroupLaunch(
        loads,
        loads + (() if group.root is None else group.root.inputs),
        writes,
        channel_dim,
        [context.program.values[number].shape for number in writes],
        math.prod(group.shape) // channels,
        channels,
        steps.table,
        steps.count,
        steps.registers,
        [ready.channels_last(tensor.numpy(), channel_dim) for tensor in steps.constants],
        [tensor.numpy() for tensor in steps.buffers],
        None if group.root is None else _product_jobs(context, group, group.root, order),
    )


def _product_jobs(
    context: LaunchContext, group: Group, root: ops.MultiplyAccumulate, channel_order: Tensor | None
) -> ready.ProductJobs:
    """The product of a group.

    channel_order: in which its outputs are computed; None: theirs.
    """
    if channel_order is not None:
        bias = None if root.bias is None else root.bias[channel_order]
        root = replace(root, weight=root.weight[channel_order], bias=bias)
    assert isinstance(root, PRODUCTS), "only operations that `has_kernel` takes are roots"
    source = root.inputs[0]
    value = context.program.values[source]
    dtype, offset = context.storage[source]
    if dtype not in OPERAND_TYPES:  # others read the value as it is, in 32 bits
        dtype, offset = _operand_type(root, context)
    jobs: list[Product | Winograd] = []
    buffers: list[Tensor] = []
    if kernels().has_winograd() and (dtype, offset) == (torch.int16, 0):
        winograd = winograd_product(root, value.shape, value.range.largest, group.shape)
        if winograd is not None:
            job, buffers = winograd
            jobs = [job]
    if not jobs:
        direct, buffers = direct_products(root, value.shape, group.shape, (dtype, offset))
        jobs = [*direct]
    # The direct kernel reads four bytes at a time, Winograd's at least 32.
    row = root.weight.shape[1] * dtype.itemsize
    return ready.ProductJobs(
        source,
        -1 if isinstance(root, ops.Linear) else 1,
        context.storage[source][1],
        (array_type(dtype), offset),
        jobs,
        max(32 - row, 0) if isinstance(jobs[0], Winograd) else -row % 4,
        [tensor.numpy() for tensor in buffers],
    )


def _operand_type(root: ops.MultiplyAccumulate, context: LaunchContext) -> tuple[torch.dtype, int]:
    operand = operand_type(context.program.values[root.inputs[0]].range)
    assert operand is not None, "only operations that `has_kernel` takes are roots"
    return operand
