"""The elementwise operations of a group as steps of the compiled kernels."""

from typing import Any

import torch
from torch import Tensor

from licq.integer.groups import Group, varying_dim
from licq.integer.launches import Owner
from licq.integer.library import (
    ABS,
    ADD,
    ADDC,
    CLAMP,
    GDN,
    LEAKY,
    LOAD,
    NEG,
    PRODUCT,
    RESCALE,
    SQUARE,
    STORE,
    TABLE,
    OfGdn,
    OfLeaky,
    OfRescale,
    OfStore,
    OfTable,
    Step,
)
from licq.integer.multipliers import tie_free_multiplier
from licq.integer.program import INT32
from licq.quant import operations as ops
from licq.quant.fixedpoint import multiplier_value
from licq.quant.operations import Operation, Range

_PLAIN = {ops.Product: PRODUCT, ops.Neg: NEG, ops.Abs: ABS, ops.Square: SQUARE}
_TYPES = {"multiplier": torch.float64, "scale": torch.float32}  # of parameters of channels; others are int32


class GroupSteps:
    """Steps and registers of a group.

    steps: Step structures. registers: how many a kernel needs. arrays: the values that steps load and store,
    by their position; None for a constant of `fixed`.

    Args:
        loads, writes: values of the program that the group reads elementwise and stores.
        channel_dim, order: the dimension of the channels, and the order in which they are computed (None: as
        they are).
    """

    def __init__(
        self,
        owner: Owner,
        group: Group,
        loads: tuple[int, ...],
        writes: tuple[int, ...],
        channel_dim: int,
        order: Tensor | None,
    ):
        self.owner, self.group, self.loads, self.writes = owner, group, loads, writes
        self.channel_dim, self.order = channel_dim, order
        self.channels = group.shape[channel_dim]
        self.arrays: list[int | None] = [*loads, *writes]
        self.fixed: dict[int, Tensor] = {}
        self.registers = 0
        self._memory: list[Tensor] = []  # what the steps point to
        self._steps: list[Step] = []
        self._register: dict[int, int] = {}  # of values
        self._free: list[int] = []
        self._build()
        self.registers = max(self.registers, 1) + 1
        self.count = len(self._steps)
        self.steps = (Step * max(self.count, 1))(*self._steps)

    def _build(self) -> None:
        group, register = self.group, self._register
        last = {number: index for index, op in enumerate(group.operations) for number in op.inputs}
        if group.root is not None:
            register[group.root.outputs[0]] = self._take()
            self._write(group.root.outputs[0])
        for index, operation in enumerate(group.operations):
            for number in operation.inputs:
                if number not in register and number not in self.owner.constants:
                    register[number] = self._take()
                    self._steps.append(Step(op=LOAD, dst=register[number], b=self.loads.index(number)))
            out = self._take()
            self._compute(operation, out)
            register[operation.outputs[0]] = out
            self._write(operation.outputs[0])
            for number in {*operation.inputs, *operation.outputs}:
                if last.get(number, index) <= index and number in register:
                    self._free.append(register.pop(number))

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        self.registers += 1
        return self.registers - 1

    def _write(self, number: int) -> None:
        step, shuffle = Step(op=STORE, a=self._register[number]), self.group.shuffle
        if shuffle is not None and number == shuffle.inputs[0]:
            step.store = OfStore(side=shuffle.arguments[1], width=self.group.shape[3])
            number = shuffle.outputs[0]
        if number in self.writes:
            step.b = len(self.loads) + self.writes.index(number)
            self._steps.append(step)

    def _compute(self, operation: Operation, out: int) -> None:
        constants = self.owner.constants
        data = [number for number in operation.inputs if number not in constants]
        fixed = next((constants[number] for number in operation.inputs if number in constants), None)
        largest = self.owner.program.values[data[0]].range.largest
        step = Step(dst=out, a=self._register[data[0]], period=1)
        if len(data) > 1:
            step.b = self._register[data[1]]
        match operation:
            case ops.Rescale():
                self._rescale(step, operation, largest)
            case ops.Add():
                self._add(step, operation, fixed)
            case ops.Clamp():
                step.op = CLAMP
                low, high = _limits(operation)
                self._point(step, low=low, high=high)
            case ops.Leaky():
                multiplier = tie_free_multiplier(operation.mantissa, operation.shift, largest)
                if multiplier is not None and not 0 <= float(multiplier) < 1:
                    multiplier = None
                step.op, step.leaky = LEAKY, OfLeaky(tie_free=int(multiplier is not None))
                exact = multiplier_value(operation.mantissa, operation.shift)
                self._point(step, multiplier=exact if multiplier is None else multiplier)
            case ops.Table():
                entries = operation.table.to(torch.int32).contiguous()
                self._memory.append(entries)
                step.op, step.table = TABLE, OfTable(first=operation.first, last=len(entries) - 1)
                step.entries = entries.data_ptr()
            case ops.Gdn():
                self._gdn(step, operation, largest)
            case ops.Mask():
                step.op, step.b = PRODUCT, self._constant(operation.mask)
            case ops.Product() if fixed is not None:
                step.op, step.b = PRODUCT, self._constant(fixed)
            case ops.Product() | ops.Neg() | ops.Abs() | ops.Square():
                step.op = _PLAIN[type(operation)]
            case _:
                raise ValueError(f"the kernels have no step for {operation}")
        self._steps.append(step)

    def _rescale(self, step: Step, rescale: ops.Rescale, largest: int) -> None:
        low, high = _limits(rescale)
        limit = max(int(torch.as_tensor(end).abs().max()) for end in (low, high))
        multiplier = tie_free_multiplier(rescale.mantissa, rescale.shift, largest, limit)
        same_limits = all(
            bool((torch.as_tensor(end) == torch.as_tensor(end).flatten()[0]).all()) for end in (low, high)
        )
        step.op = RESCALE
        step.rescale = OfRescale(same_limits=int(same_limits), tie_free=int(multiplier is not None))
        exact = multiplier_value(rescale.mantissa, rescale.shift)
        factor = {"factor": rescale.refinement} if int(rescale.refinement.max()) != 1 else {}
        self._point(
            step, multiplier=exact if multiplier is None else multiplier, low=low, high=high, **factor
        )

    def _add(self, step: Step, add: ops.Add, fixed: Tensor | None) -> None:
        step.op = ADD
        period = 1
        if fixed is not None and varying_dim([fixed], len(self.group.shape)) in (-1, self.channel_dim):
            step.op = ADDC
            self._point(step, constant=fixed)
            period = step.period
        elif fixed is not None:
            step.b = self._constant(fixed)
        low, high = _limits(add)
        self._point(step, low=low)
        self._point(step, high=high)
        step.period = period

    def _gdn(self, step: Step, gdn: ops.Gdn, largest: int) -> None:
        step.op = GDN
        step.gdn = OfGdn(
            inverse=int(gdn.inverse),
            root=int(gdn.algorithm == "gdn"),
            vectors=int(_fits_vectors(gdn, largest)),
        )
        scale = (
            {"scale": multiplier_value(gdn.mantissa, gdn.shift).float()}
            if takes_float32(gdn, largest)
            else {}
        )
        self._point(
            step, multiplier=gdn.mantissa.double(), shift=gdn.shift, low=gdn.low, high=gdn.high, **scale
        )

    def _point(self, step: Step, **parts: Any) -> None:
        """Have a step point to parameters of channels.

        They are as long as the longest, and repeated, so that loops over them are not short; the step's
        `period` says how long.
        """
        tensors = {name: torch.as_tensor(part) for name, part in parts.items()}
        single = (
            all(part.numel() == 1 for part in tensors.values()) and not {"shift", "constant"} & tensors.keys()
        )
        period = 1 if single else self.channels * max(1, -(-256 // self.channels))
        for name, part in tensors.items():
            flat = part.to(_TYPES.get(name, torch.int32)).reshape(-1)
            flat = flat[self.order] if self.order is not None and flat.numel() > 1 else flat
            flat = flat.expand(period) if flat.numel() == 1 else flat.repeat(period // flat.numel())
            flat = flat.contiguous()
            self._memory.append(flat)
            setattr(step, name, flat.data_ptr())
        step.period = period

    def _constant(self, tensor: Tensor) -> int:
        """A register into which a constant of the group's shape is loaded."""
        full = tensor.expand(self.group.shape).to(Range.of(tensor).dtype)
        self.fixed[len(self.arrays)] = with_channels_last(full, self.channel_dim)
        self.arrays.append(None)
        self.registers += 1
        self._steps.append(Step(op=LOAD, dst=self.registers - 1, b=len(self.arrays) - 1))
        return self.registers - 1


def with_channels_last(tensor: Tensor, channel_dim: int) -> Tensor:
    """The tensor with its channels contiguous in memory; its shape stays."""
    rows = tensor.movedim(channel_dim, -1)
    return tensor if rows.is_contiguous() else rows.contiguous().movedim(-1, channel_dim)


def _fits_vectors(gdn: ops.Gdn, largest: int) -> bool:
    """Whether `gdn4` in steps.c has room for numbers up to `largest`."""
    limits = int(gdn.low.abs().max()), int(gdn.high.abs().max())
    fits = largest <= 2**15 and max(largest, *limits) <= 2**24 and int(gdn.shift.abs().max()) < 512
    return gdn.algorithm == "gdn" and fits


def takes_float32(gdn: ops.Gdn, largest: int) -> bool:
    """Whether the proof of `gdn8` in steps.c holds, and float32 neither overflows nor gets near its smallest
    numbers.

    largest: the largest magnitude of what is normalized.
    """
    limits = max(int(gdn.low.abs().max()), int(gdn.high.abs().max()))
    mantissa = gdn.mantissa
    return (
        _fits_vectors(gdn, largest)
        and limits < 2**16
        and 2**10 <= int(mantissa.min())
        and int(mantissa.max()) <= 2**24
        and int(gdn.shift.abs().max()) <= 60
    )


def _limits(operation: ops.Rescale | ops.Add | ops.Clamp) -> tuple[Tensor | int, Tensor | int]:
    """The limits of a result, of 32 bits where there are none."""
    low = -INT32 if operation.low is None else operation.low
    high = INT32 if operation.high is None else operation.high
    return low, high
