"""The elementwise operations of a group as the table of steps that the kernels run on a tile.

Steps work on registers: arrays of the tile's integers. Register 0 holds the accumulators of the group's
product. Values from outside are loaded into registers, and what others read is stored from them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from licq.integer.exactness import gdn_fits_float32, gdn_fits_float64, tie_free_multiplier
from licq.integer.groups import Group, varying_dim
from licq.integer.launches import LaunchContext
from licq.integer.library import (
    ABS,
    ADD,
    ADD_CHANNELS,
    CLAMP,
    GDN,
    LEAKY,
    LOAD,
    MULTIPLY,
    NEG,
    RESCALE,
    SQUARE,
    STORE,
    TABLE,
    Step,
)
from licq.quant import operations as ops
from licq.quant.fixedpoint import INT32, multiplier_value
from licq.quant.operations import Operation, Range

_WITHOUT_PARAMETERS = {ops.Product: MULTIPLY, ops.Neg: NEG, ops.Abs: ABS, ops.Square: SQUARE}
_TYPES = {"multiplier": torch.float64, "mantissa": torch.float64, "scale": torch.float32}  # others: int32
_MIN_PERIOD = 256  # so that loops over parameters are not short


class GroupSteps:
    """Steps of a group.

    Args:
        channel_dim: of the group's values, the dimension that is contiguous in memory.
        channel_order: in which the group's channels are computed; None: theirs.
        loads: values that are read from outside. writes: values that are stored.

    Attributes:
        table: of `Step`. count: its steps.
        registers: how many the steps use.
        constants: tensors that are loaded too; their arrays come after those of `loads` and `writes`.
        buffers: what the steps point to.
    """

    def __init__(
        self,
        context: LaunchContext,
        group: Group,
        channel_dim: int,
        channel_order: Tensor | None,
        loads: tuple[int, ...],
        writes: tuple[int, ...],
    ):
        self._context, self._group = context, group
        self._channel_dim, self._channel_order = channel_dim, channel_order
        self._loads, self._writes = loads, writes
        self.constants: list[Tensor] = []
        self.buffers: list[Tensor] = []
        self._steps: list[Step] = []
        self._register: dict[int, int] = {}  # of each value that a later step needs
        self._free: list[int] = []
        self.registers = 0
        self._build()
        self.registers = max(self.registers, 1) + 1
        self.count = len(self._steps)
        self.table = (Step * max(self.count, 1))(*self._steps)

    def _build(self) -> None:
        group = self._group
        last_use = {number: position for position, op in enumerate(group.operations) for number in op.inputs}
        if group.root is not None:
            self._register[group.root.outputs[0]] = self._take()
            self._store(group.root.outputs[0])
        for position, operation in enumerate(group.operations):
            for number in operation.inputs:
                if number not in self._register and number not in self._context.constants:
                    self._register[number] = self._take()
                    array = self._loads.index(number)
                    self._steps.append(Step(op=LOAD, dst=self._register[number], b=array))
            out = self._take()
            self._steps.append(self._step(operation, out))
            self._register[operation.outputs[0]] = out
            self._store(operation.outputs[0])
            for number in {*operation.inputs, *operation.outputs}:
                if last_use.get(number, position) <= position and number in self._register:
                    self._free.append(self._register.pop(number))

    def _take(self) -> int:
        """A free register."""
        if self._free:
            return self._free.pop()
        self.registers += 1
        return self.registers - 1

    def _store(self, number: int) -> None:
        """Store a value, shuffled if the group shuffles it, where others read it."""
        step, shuffle = Step(op=STORE, a=self._register[number]), self._group.shuffle
        if shuffle is not None and number == shuffle.inputs[0]:
            step.store.shuffle_side, step.store.row_pixels = shuffle.arguments[1], self._group.shape[3]
            number = shuffle.outputs[0]
        if number in self._writes:
            step.b = len(self._loads) + self._writes.index(number)
            self._steps.append(step)

    def _step(self, operation: Operation, out: int) -> Step:
        constants = self._context.constants
        values = [number for number in operation.inputs if number not in constants]
        constant = next((constants[number] for number in operation.inputs if number in constants), None)
        largest = self._context.program.values[values[0]].range.largest
        step = Step(dst=out, a=self._register[values[0]], period=1)
        if len(values) > 1:
            step.b = self._register[values[1]]
        match operation:
            case ops.Rescale():
                self._rescale(step, operation, largest)
            case ops.Add():
                self._add(step, operation, constant)
            case ops.Clamp():
                step.op = CLAMP
                low, high = _limits(operation)
                step.period = self._point(step.clamp, {"low": low, "high": high})
            case ops.Leaky():
                self._leaky(step, operation, largest)
            case ops.Table():
                entries = operation.table.to(torch.int32).contiguous()
                self.buffers.append(entries)
                step.op = TABLE
                step.table.entries = entries.data_ptr()
                step.table.first, step.table.last = operation.first, len(entries) - 1
            case ops.Gdn():
                self._gdn(step, operation, largest)
            case ops.Mask():
                step.op, step.b = MULTIPLY, self._load_constant(operation.mask)
            case ops.Product() | ops.Neg() | ops.Abs() | ops.Square():
                step.op = _WITHOUT_PARAMETERS[type(operation)]
                if constant is not None:
                    step.b = self._load_constant(constant)
            case _:
                raise TypeError(f"{operation.kind} is no elementwise operation of the kernels")
        return step

    def _rescale(self, step: Step, rescale: ops.Rescale, largest: int) -> None:
        ends = [torch.as_tensor(end) for end in _limits(rescale)]
        limit = max(int(end.abs().max()) for end in ends)
        multiplier = tie_free_multiplier(rescale.mantissa, rescale.shift, largest, limit)
        step.op = RESCALE
        step.rescale.tie_free = int(multiplier is not None)
        if multiplier is None:
            multiplier = multiplier_value(rescale.mantissa, rescale.shift)
        step.rescale.limits_alike = int(all(bool((end == end.flatten()[0]).all()) for end in ends))
        parameters = {"multiplier": multiplier, "low": ends[0], "high": ends[1]}
        if int(rescale.refinement.max()) != 1:
            parameters["factor"] = rescale.refinement
        step.period = self._point(step.rescale, parameters)

    def _add(self, step: Step, add: ops.Add, constant: Tensor | None) -> None:
        step.op = ADD
        if constant is not None and varying_dim([constant], len(self._group.shape)) in (
            -1,
            self._channel_dim,
        ):
            step.op = ADD_CHANNELS
            step.period = self._point(step.add, {"addend": constant}, per_channel=True)
        elif constant is not None:
            step.b = self._load_constant(constant)
        low, high = _limits(add)
        self._point(step.add, {"low": low, "high": high})

    def _leaky(self, step: Step, leaky: ops.Leaky, largest: int) -> None:
        step.op = LEAKY
        multiplier = tie_free_multiplier(leaky.mantissa, leaky.shift, largest)
        tie_free = multiplier is not None and 0 <= float(multiplier) < 1
        step.leaky.tie_free = int(tie_free)
        if multiplier is None or not tie_free:
            multiplier = multiplier_value(leaky.mantissa, leaky.shift)
        step.period = self._point(step.leaky, {"multiplier": multiplier})

    def _gdn(self, step: Step, gdn: ops.Gdn, largest: int) -> None:
        step.op = GDN
        step.gdn.inverse, step.gdn.with_root = int(gdn.inverse), int(gdn.algorithm == "gdn")
        step.gdn.fits_float64 = int(gdn_fits_float64(gdn, largest))
        parameters = {"mantissa": gdn.mantissa, "shift": gdn.shift, "low": gdn.low, "high": gdn.high}
        if gdn_fits_float32(gdn, largest):
            parameters["scale"] = multiplier_value(gdn.mantissa, gdn.shift)
        step.period = self._point(step.gdn, parameters, per_channel=True)

    def _point(self, struct: Any, parameters: Mapping[str, Tensor | int], per_channel: bool = False) -> int:
        """Let fields of a step point to arrays of parameters of one length, the period, which is returned.

        per_channel: the arrays are of channels, though each parameter be one number for all.
        """
        tensors = {name: torch.as_tensor(part) for name, part in parameters.items()}
        channels = self._group.shape[self._channel_dim]
        per_channel = per_channel or any(part.numel() > 1 for part in tensors.values())
        period = channels * max(1, -(-_MIN_PERIOD // channels)) if per_channel else 1
        for name, part in tensors.items():
            flat = part.to(_TYPES.get(name, torch.int32)).reshape(-1)
            if self._channel_order is not None and flat.numel() > 1:
                flat = flat[self._channel_order]
            flat = flat.expand(period) if flat.numel() == 1 else flat.repeat(period // flat.numel())
            flat = flat.contiguous()
            self.buffers.append(flat)
            setattr(struct, name, flat.data_ptr())
        return period

    def _load_constant(self, tensor: Tensor) -> int:
        """A register into which a constant of the group's shape is loaded."""
        full = tensor.expand(self._group.shape).to(Range.of(tensor).dtype)
        self.constants.append(with_channels_last(full, self._channel_dim))
        self.registers += 1
        array = len(self._loads) + len(self._writes) + len(self.constants) - 1
        self._steps.append(Step(op=LOAD, dst=self.registers - 1, b=array))
        return self.registers - 1


def with_channels_last(tensor: Tensor, channel_dim: int) -> Tensor:
    """The tensor with its channels contiguous in memory; its shape stays."""
    rows = tensor.movedim(channel_dim, -1)
    return tensor if rows.is_contiguous() else rows.contiguous().movedim(-1, channel_dim)


def _limits(operation: ops.Rescale | ops.Add | ops.Clamp) -> tuple[Tensor | int, Tensor | int]:
    """The limits of a result, of 32 bits where there are none."""
    return (
        -INT32 if operation.low is None else operation.low,
        INT32 if operation.high is None else operation.high,
    )
