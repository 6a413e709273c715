"""Which operations of a program run together: a multiply-accumulate operation and the elementwise ones on its
result."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeGuard

import torch
from torch import Tensor

from licq.integer.program import Program
from licq.quant import operations as ops
from licq.quant.fixedpoint import INT32
from licq.quant.operations import Operation, Range

PRODUCTS = (ops.Conv2d, ops.ConvTranspose2d, ops.Linear)
"""The multiply-accumulate operations that the compiled kernels have."""


@dataclass
class Group:
    """Operations that run together.

    position: in the program, of the first operation.
    root: the multiply-accumulate operation, if there is one. operations: elementwise, in order.
    shape: of all values. channel_dim: the dimension along which parameters differ; None: none differ.
    shuffle: a pixel shuffle of the one value that others read, which is stored shuffled.
    """

    position: int
    root: ops.MultiplyAccumulate | None
    shape: tuple[int, ...]
    channel_dim: int | None
    operations: list[Operation] = field(default_factory=list)
    shuffle: ops.Layout | None = None

    @property
    def members(self) -> list[Operation]:
        """All operations, in their order."""
        return [part for part in (self.root, *self.operations, self.shuffle) if part is not None]

    @property
    def computed(self) -> set[int]:
        """Numbers of the values that the group computes."""
        return {number for operation in self.members for number in operation.outputs}


def fits(operation: Operation, program: Program) -> bool:
    """Whether an operation's results, and what it computes them from, are numbers of 32 bits."""
    numbers = [*operation.inputs, *operation.outputs]
    return all(program.values[number].range.largest <= INT32 for number in numbers)


def has_kernel(operation: Operation, program: Program) -> TypeGuard[ops.MultiplyAccumulate]:
    """Whether the compiled kernels have this multiply-accumulate operation."""
    if not isinstance(operation, PRODUCTS) or not fits(operation, program):
        return False
    if isinstance(operation, ops.Convolution):
        unequal = isinstance(operation, ops.ConvTranspose2d) and operation.stride[0] != operation.stride[1]
        if isinstance(operation.padding, str) or unequal or operation.groups != 1:
            return False
    source = operand_type(program.values[operation.inputs[0]].range)
    return source is not None and operation.weight.dtype == torch.int8


def padding_of(conv: ops.Convolution) -> tuple[int, ...]:
    """Zeros on each side along each axis, of a convolution whose padding is given in numbers."""
    assert not isinstance(conv.padding, str)
    return conv.padding


def operand_type(numbers: Range) -> tuple[torch.dtype, int] | None:
    """(int16, offset) in which a product can read numbers of a range, and the zeros of the padding.

    offset: is added to the numbers. None: 16 bits do not hold them.
    """
    padded = numbers.with_zero
    if -(2**15) <= padded.low and padded.high < 2**15:
        return torch.int16, 0
    return (torch.int16, -(2**15) - padded.low) if padded.high - padded.low < 2**16 else None


def constants_of(program: Program) -> dict[int, Tensor]:
    """The constants of a program by number of their value."""
    return {op.outputs[0]: op.value for op in program.operations if isinstance(op, ops.Constant)}


def parameters_of(operation: Operation) -> list[Tensor]:
    """The attributes that may differ from channel to channel."""
    return list(operation.parameters().values())


def varying_dim(parameters: list[Tensor], ndim: int) -> int | None:
    """The one dimension of a result of `ndim` along which parameters vary; -1: none, None: more than one."""
    dims = {ndim - part.ndim + d for part in parameters for d, size in enumerate(part.shape) if size > 1}
    return -1 if not dims else dims.pop() if len(dims) == 1 else None


def _may_join(operation: Operation, program: Program, constants: Mapping[int, Tensor]) -> bool:
    if not isinstance(operation, ops.Elementwise) or not fits(operation, program):
        return False
    shape = program.values[operation.outputs[0]].shape
    data = [number for number in operation.inputs if number not in constants]
    return bool(data) and all(program.values[number].shape == shape for number in data) and len(shape) >= 2


def groups_of(program: Program) -> list[Group | Operation]:
    """The program as groups and single operations, in an order in which they can run."""
    constants = constants_of(program)
    position: dict[int, int] = {}
    group_of: dict[int, Group] = {}
    plan: list[Group | Operation] = []
    for index, operation in enumerate(program.operations):
        if isinstance(operation, ops.Constant):
            continue
        out = operation.outputs[0]
        shape = program.values[out].shape
        group = None
        if has_kernel(operation, program):
            group = Group(index, operation, shape, len(shape) - 1 if isinstance(operation, ops.Linear) else 1)
            plan.append(group)
        elif _may_join(operation, program, constants):
            data = [number for number in operation.inputs if number not in constants]
            latest = max(data, key=lambda number: position[number])
            varying = varying_dim(parameters_of(operation), len(shape))
            candidate = group_of.get(latest)
            if varying is not None and candidate is not None and candidate.shape == shape:
                if varying in (-1, candidate.channel_dim) or candidate.channel_dim is None:
                    group = candidate
            if group is None and varying is not None:
                group = Group(index, None, shape, None)
                plan.append(group)
            if group is not None:
                group.operations.append(operation)
                if varying != -1 and group.channel_dim is None:
                    group.channel_dim = varying
        if group is None:
            plan.append(operation)
        for number in operation.outputs:
            position[number] = index if group is None else group.position
            if group is not None:
                group_of[number] = group
    return _with_shuffles(plan, program)


def _with_shuffles(plan: list[Group | Operation], program: Program) -> list[Group | Operation]:
    """The plan with the pixel shuffles of convolutions' results in their groups, where only the shuffled
    value is read by others.

    The channels of such a group are computed in another order, so it has no other input and no constants but
    the parameters of channels.
    """
    readers: dict[int, list[Operation]] = {}
    for operation in program.operations:
        for number in operation.inputs:
            readers.setdefault(number, []).append(operation)
    maker = {number: entry for entry in plan if isinstance(entry, Group) for number in entry.computed}
    joined = []
    for entry in plan:
        if not isinstance(entry, ops.Layout) or entry.name != "pixel_shuffle":
            continue
        group = maker.get(entry.inputs[0])
        if group is None or not isinstance(group.root, ops.Conv2d):
            continue
        if group.channel_dim != 1 or group.shuffle is not None:
            continue
        computed = group.computed
        inside = {*map(id, group.members), id(entry)}
        alone = all(id(reader) in inside for number in computed for reader in readers.get(number, ()))
        if (
            alone
            and computed.isdisjoint(program.outputs.values())
            and all(computed.issuperset(part.inputs) for part in group.operations)
        ):
            group.shuffle = entry
            joined.append(id(entry))
    return [entry for entry in plan if id(entry) not in joined]


def shuffled_channels(channels: int, side: int) -> Tensor:
    """The order in which the channels of a value must be computed so that a shuffled pixel's lie side by
    side."""
    return torch.arange(channels).reshape(-1, side**2).T.flatten()
