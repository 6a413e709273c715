"""Launches: the entries of a ready program, each of which computes some values from others.

Here are those of single operations. `integer.group_launch` has the groups, `integer.attention` attention.
"""

import ctypes
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from licq.integer.library import TYPES, LayerNorm, kernels
from licq.integer.program import Program
from licq.integer.reference import MEANING, results_of
from licq.quant import operations as ops
from licq.quant.fixedpoint import multiplier_value
from licq.quant.integer_functions import layer_norm_constants
from licq.quant.operations import Operation, Range


class LaunchContext(Protocol):
    """What launches know of the program that they belong to; `integer.fast.FastProgram` is one.

    storage: of each stored value, the type in memory and what is added to its integers there.
    threads: of the kernels; None: PyTorch's.
    """

    program: Program
    constants: dict[int, Tensor]
    storage: dict[int, tuple[torch.dtype, int]]
    threads: int | None

    def new(self, number: int, shape: tuple[int, ...], channel_dim: int = -1) -> Tensor:
        """Memory for value `number`, with `SLACK` bytes behind it; dimension `channel_dim` is contiguous."""
        ...


class Launch(ABC):
    """Computes the values `writes` from the values `reads`."""

    context: LaunchContext
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    uses_context_memory = True
    """Results are written into memory that the context gives."""
    may_give_views = False
    """Results may be views of what is read."""

    @property
    def threads(self) -> int:
        return self.context.threads or torch.get_num_threads()

    @abstractmethod
    def run(self, values: dict[int, Tensor], inputs: Mapping[str, Tensor], names: Mapping[int, str]) -> None:
        """Read from `values` and add the results to it.

        inputs: the program's inputs by name. names: of the inputs, by number of the value.
        """


class OperationLaunch(Launch):
    """One operation."""

    def __init__(self, context: LaunchContext, operation: Operation):
        self.context = context
        self.reads, self.writes = operation.inputs, operation.outputs

    def new(self, shape: tuple[int, ...]) -> tuple[Tensor, int]:
        """A tensor for the one result, and what is added to its integers there."""
        return self.context.new(self.writes[0], shape), self.context.storage[self.writes[0]][1]


class ReferenceLaunch(OperationLaunch):
    """An operation without a kernel, computed by the reference."""

    uses_context_memory = False
    may_give_views = True

    def __init__(self, context: LaunchContext, operation: Operation):
        super().__init__(context, operation)
        self.operation = operation

    def run(self, values: dict[int, Tensor], inputs: Mapping[str, Tensor], names: Mapping[int, str]) -> None:
        for number, tensor in results_of(self.operation, values, inputs, names, MEANING):
            dtype, offset = self.context.storage.get(number, (tensor.dtype, 0))
            values[number] = tensor.to(dtype) if not offset else (tensor.to(torch.int32) + offset).to(dtype)


class CopyLaunch(ReferenceLaunch):
    """A layout function that copies a large value, into memory that is used again in the next run."""

    uses_context_memory = True

    def __init__(self, context: LaunchContext, operation: ops.Layout):
        super().__init__(context, operation)
        self.layout = operation

    @staticmethod
    def takes(operation: ops.Layout) -> bool:
        return operation.name in ("index_select", "reshape", "pixel_shuffle") and len(operation.inputs) == 1

    def run(self, values: dict[int, Tensor], inputs: Mapping[str, Tensor], names: Mapping[int, str]) -> None:
        source, number = self.reads[0], self.writes[0]
        x, shape = values[source], self.context.program.values[number].shape
        arguments = self.layout.arguments
        dtype, offset = self.context.storage[number]
        shuffled = self.layout.name == "pixel_shuffle"
        if (
            x.dtype != dtype
            or (shuffled and x.ndim != 4)
            or offset != self.context.storage.get(source, (dtype, 0))[1]
            or self.layout.options
        ):
            super().run(values, inputs, names)
        elif self.layout.name == "index_select":
            values[number] = torch.index_select(x, *arguments[1:], out=self.new(shape)[0])
        elif shuffled:  # with channels contiguous, as the kernels read them
            batch, _, height, width = x.shape
            side, channels = arguments[1], shape[1]
            rows = self.context.new(number, (batch, height, side, width, side, channels))
            rows.copy_(x.movedim(1, -1).unflatten(-1, (channels, side, side)).permute(0, 1, 4, 2, 5, 3))
            values[number] = rows.view(batch, height * side, width * side, channels).movedim(-1, 1)
        else:
            try:
                values[number] = x.view(shape)
            except RuntimeError:  # the shape takes a copy
                values[number] = self.context.new(number, tuple(x.shape)).copy_(x).view(shape)


class LayerNormLaunch(OperationLaunch):
    """Layer normalization, row by row."""

    @staticmethod
    def takes(operation: ops.LayerNorm, program: Program) -> bool:
        return fits16(program.values[operation.inputs[0]].range)

    def __init__(self, context: LaunchContext, operation: ops.LayerNorm):
        super().__init__(context, operation)
        self.shape = context.program.values[operation.outputs[0]].shape
        count = self.shape[-1]
        mantissa = operation.mantissa.expand(count)
        parts = {
            "eps": layer_norm_constants(count, operation.eps),
            "multiplier": multiplier_value(mantissa.abs(), operation.shift.expand(count)),
            "sign": mantissa.sign(),
            **{name: getattr(operation, name).expand(count) for name in ("offset", "low", "high")},
        }
        self._buffers = {name: part.double().contiguous() for name, part in parts.items()}
        self.job = LayerNorm(
            count=count,
            rows=math.prod(self.shape[:-1]),
            eps_ceiling=math.ceil(count**2 * operation.eps),
            **{name: part.data_ptr() for name, part in self._buffers.items()},
        )

    def run(self, values: dict[int, Tensor], inputs: Mapping[str, Tensor], names: Mapping[int, str]) -> None:
        x = values[self.reads[0]].to(torch.int16).contiguous()
        out, offset = self.new(self.shape)
        job = self.job
        job.x, job.threads = x.data_ptr(), self.threads
        job.out.data, job.out.type, job.out.offset = out.data_ptr(), TYPES[out.dtype], offset
        check(kernels().layer_norm(ctypes.byref(job)))
        values[self.writes[0]] = out


def fits16(*ranges: Range) -> bool:
    """Whether int16 holds all numbers of the ranges."""
    return all(-(2**15) <= numbers.low and numbers.high < 2**15 for numbers in ranges)


def check(status: int) -> None:
    """Raises MemoryError where a kernel says that it had no memory."""
    if status:
        raise MemoryError("the kernels ran out of memory")
