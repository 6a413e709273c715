"""From operations of a program to launches of the ready program, and what these need to know of the program.

Here are those of single operations. `integer.group_launch` has the groups, `integer.attention` attention.
"""

import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from licq.integer import ready, ready_moves
from licq.integer.arrays import LAYOUT
from licq.integer.library import LayerNorm
from licq.integer.program import Program
from licq.integer.reference import MEANING
from licq.quant import operations as ops
from licq.quant.fixedpoint import multiplier_value
from licq.quant.integer_functions import layer_norm_constants
from licq.quant.operations import Operand, Operation, Range


class LaunchContext(Protocol):
    """What launches know of the program that they belong to; `integer.fast.FastProgram` is one.

    storage: of each stored value, the type in memory and what is added to its integers there.
    """

    program: Program
    constants: dict[int, Tensor]
    storage: dict[int, tuple[torch.dtype, int]]


class ReferenceLaunch(ready.Launch):
    """An operation without a kernel, computed by the reference."""

    uses_program_memory = False
    may_give_views = True

    def __init__(self, operation: Operation):
        self.operation = operation
        self.reads, self.writes = operation.inputs, operation.outputs

    def run(
        self, program: ready.ReadyProgram, values: ready.Values, inputs: Mapping[str, np.ndarray]
    ) -> None:
        tensors = (torch.from_numpy(np.asarray(values[number])) for number in self.reads)
        result = MEANING[type(self.operation)](self.operation, *tensors)
        many = isinstance(result, (list, tuple))
        for number, tensor in zip(self.writes, result if many else (result,), strict=True):
            program.put(values, number, _integers(tensor).numpy())


def _integers(tensor: Tensor) -> Tensor:
    return tensor.to(torch.int64) if tensor.is_floating_point() else tensor


def input_launch(operation: ops.Input, name: str) -> ready_moves.InputLaunch:
    """The launch of an input of the program."""
    return ready_moves.InputLaunch(name, (), operation.outputs)


def layout_launch(operation: ops.Layout, program: Program) -> ready.Launch:
    """The launch of a layout function; the reference's where NumPy's arrays have none."""
    name, options = operation.name, operation.options
    mode, value = operation.argument(2, "mode", "constant"), operation.argument(3, "value")
    padded = name == "pad" and (mode != "constant" or value not in (None, 0))
    if name not in LAYOUT or padded:
        return ReferenceLaunch(operation)
    arguments, options = _plain(operation.arguments), _plain(options)
    if name in ("index_select", "reshape", "pixel_shuffle") and len(operation.inputs) == 1:
        shape = program.values[operation.outputs[0]].shape
        where = operation.inputs, operation.outputs
        return ready_moves.CopyLaunch(name, arguments, options, *where, tuple(shape))
    return ready_moves.LayoutLaunch(name, arguments, options, operation.inputs, operation.outputs)


def _plain(part: Any) -> Any:
    """Arguments without anything of torch's."""
    if isinstance(part, Operand):
        return ready_moves.Place(part.index)
    if isinstance(part, Tensor):
        return part.cpu().numpy()
    if isinstance(part, dict):
        return {name: _plain(value) for name, value in part.items()}
    if isinstance(part, (list, tuple)):
        return [*map(_plain, part)] if isinstance(part, list) else tuple(map(_plain, part))
    return part


def has_layer_norm(operation: ops.LayerNorm, program: Program) -> bool:
    """Whether the kernel has this layer normalization."""
    return fits16(program.values[operation.inputs[0]].range)


def layer_norm_launch(operation: ops.LayerNorm, program: Program) -> ready.LayerNormLaunch:
    """The launch of a layer normalization, row by row."""
    shape = program.values[operation.outputs[0]].shape
    count = shape[-1]
    mantissa = operation.mantissa.expand(count)
    parts = {
        "eps": layer_norm_constants(count, operation.eps),
        "multiplier": multiplier_value(mantissa.abs(), operation.shift.expand(count)),
        "sign": mantissa.sign(),
        **{name: getattr(operation, name).expand(count) for name in ("offset", "low", "high")},
    }
    buffers = {name: part.double().contiguous().numpy() for name, part in parts.items()}
    job = LayerNorm(
        count=count,
        rows=math.prod(shape[:-1]),
        eps_ceiling=math.ceil(count**2 * operation.eps),
        **{name: part.ctypes.data for name, part in buffers.items()},
    )
    return ready.LayerNormLaunch(operation.inputs, operation.outputs, shape, job, [*buffers.values()])


def fits16(*ranges: Range) -> bool:
    """Whether int16 holds all numbers of the ranges."""
    return all(-(2**15) <= numbers.low and numbers.high < 2**15 for numbers in ranges)


def array_type(dtype: torch.dtype) -> np.dtype:
    """NumPy's name of an integer type."""
    return np.dtype(str(dtype).removeprefix("torch."))
