"""Groups as calls of the kernels: products with the steps that follow them, tile by tile."""

import ctypes
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from licq.integer.groups import Group, operand_type, shuffled_channels, varying_dim
from licq.integer.items import Item, nudged
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
    S16,
    SLACK,
    SQUARE,
    STORE,
    TABLE,
    TYPES,
    U8,
    Array,
    Product,
    Step,
    Winograd,
    library,
)
from licq.integer.program import INT32
from licq.integer.winograd import BLOCK, windows, winograd_weights
from licq.quant import operations as ops
from licq.quant.fixedpoint import multiplier_value
from licq.quant.operations import Operation, Range

if TYPE_CHECKING:
    from licq.integer.fast import FastProgram

_PLAIN = {ops.Product: PRODUCT, ops.Neg: NEG, ops.Abs: ABS, ops.Square: SQUARE}
_OPERANDS = {torch.uint8: U8, torch.int16: S16}  # what `products` in kernels.c reads


class GroupItem(Item):
    """A group as one call of the kernels."""

    def __init__(self, owner: "FastProgram", group: Group):
        self.owner, self.group = owner, group
        own = {number for operation in group.members for number in operation.outputs}
        root = group.root
        ndim = len(group.shape)
        self.channel_dim = ndim - 1 if group.channel_dim is None else group.channel_dim
        self.channels = group.shape[self.channel_dim]
        self.order: Tensor | None = None  # of the channels, if another one
        if group.shuffle is not None:
            self.order = shuffled_channels(self.channels, group.shuffle.arguments[1])
            bias = None if root.bias is None else root.bias[self.order]
            root = replace(root, weight=root.weight[self.order], bias=bias)
        self.writes = tuple(number for number in own if number in owner.readers)
        outside = [
            n for op in group.operations for n in op.inputs if n not in own and n not in owner.constants
        ]
        self.loads = tuple(dict.fromkeys(outside))
        self.reads = self.loads + (root.inputs if root else ())
        self._kept: list[Any] = []  # what the steps point to
        self.fixed: dict[int, Tensor] = {}  # constant arrays, by place
        self._build(own)
        if root is not None:
            self.source = root.inputs[0]
            self.stored = owner.storage[self.source]
            # where others read it as it is, it may lie in 32 bits; the products then read a copy
            self.source_type = (
                self.stored
                if self.stored[0] in _OPERANDS
                else operand_type(owner.program.values[self.source].range)
            )
            self.jobs = self._winograd(root) or self._direct(root)

    # -------------------------------------------------------------------------------------------------- steps

    def _build(self, own: set[int]) -> None:
        group, owner = self.group, self.owner
        self.arrays: list[int | None] = [*self.loads, *self.writes]  # values, or None for a constant array
        steps: list[dict[str, Any]] = []
        register: dict[int, int] = {}
        last = {number: place for place, op in enumerate(group.operations) for number in op.inputs}
        free: list[int] = []
        self.registers = 0

        def take() -> int:
            if free:
                return free.pop()
            self.registers += 1
            return self.registers - 1

        def write(number: int) -> None:
            step = {"op": STORE, "a": register[number]}
            if group.shuffle is not None and number == group.shuffle.inputs[0]:
                step.update(first=group.shuffle.arguments[1], last=group.shape[3])
                number = group.shuffle.outputs[0]
            if number in self.writes:
                steps.append({**step, "b": len(self.loads) + self.writes.index(number)})

        if group.root is not None:
            register[group.root.outputs[0]] = take()
            write(group.root.outputs[0])
        for place, operation in enumerate(group.operations):
            for number in operation.inputs:
                if number not in register and number not in owner.constants:
                    register[number] = take()
                    steps.append({"op": LOAD, "dst": register[number], "b": self.loads.index(number)})
            out = take()
            self._step(steps, operation, register, out)
            register[operation.outputs[0]] = out
            write(operation.outputs[0])
            for number in {*operation.inputs, *operation.outputs}:
                if last.get(number, place) <= place and number in register:
                    free.append(register.pop(number))
        self.registers = max(self.registers, 1) + 1
        table = (Step * max(len(steps), 1))()
        for entry, fields in zip(table, steps):
            for name, value in fields.items():
                setattr(entry, name, value)
        self.steps, self.step_count = table, len(steps)

    def _step(
        self, steps: list[dict[str, Any]], operation: Operation, register: dict[int, int], out: int
    ) -> None:
        constants = self.owner.constants
        data = [number for number in operation.inputs if number not in constants]
        largest = self.owner.program.values[data[0]].range.largest
        step: dict[str, Any] = {"dst": out, "a": register[data[0]], "period": 1}
        if len(data) > 1:
            step["b"] = register[data[1]]
        fixed = next((constants[number] for number in operation.inputs if number in constants), None)
        match operation:
            case ops.Rescale():
                step.update(op=RESCALE, **self._rescale(operation, largest))
            case ops.Add():
                step["op"] = ADD
                if fixed is not None and self._is_per_channel(fixed):
                    step.update(op=ADDC, **self._parameters(table=fixed))
                elif fixed is not None:
                    step["b"] = self._constant_array(steps, fixed)
                low, high = _limits(operation)
                step["low"] = self._parameters(low=low)["low"]
                step["high"] = self._parameters(high=high)["high"]
            case ops.Clamp():
                low, high = _limits(operation)
                step.update(op=CLAMP, **self._parameters(low=low, high=high))
            case ops.Leaky():
                multiplier = nudged(operation.mantissa, operation.shift, largest)
                quick = multiplier is not None and 0 <= float(multiplier) < 1
                if not quick:
                    multiplier = multiplier_value(operation.mantissa, operation.shift)
                step.update(op=LEAKY, quick=int(quick), **self._parameters(multiplier=multiplier))
            case ops.Table():
                entries = operation.table.to(torch.int32).contiguous()
                self._kept.append(entries)
                step.update(op=TABLE, first=operation.first, last=len(entries) - 1, table=entries.data_ptr())
            case ops.Gdn():
                step.update(op=GDN, **self._gdn(operation, largest))
            case ops.Mask():
                step.update(op=PRODUCT, b=self._constant_array(steps, operation.mask))
            case ops.Product() if fixed is not None:
                step.update(op=PRODUCT, b=self._constant_array(steps, fixed))
            case ops.Product() | ops.Neg() | ops.Abs() | ops.Square():
                step["op"] = _PLAIN[type(operation)]
        steps.append(step)

    def _rescale(self, rescale: ops.Rescale, largest: int) -> dict[str, Any]:
        low, high = _limits(rescale)
        limit = max(int(torch.as_tensor(end).abs().max()) for end in (low, high))
        multiplier = nudged(rescale.mantissa, rescale.shift, largest, limit)
        quick = multiplier is not None
        if multiplier is None:
            multiplier = multiplier_value(rescale.mantissa, rescale.shift)
        parameters = {"multiplier": multiplier, "low": low, "high": high}
        if int(rescale.refinement.max()) != 1:
            parameters["factor"] = rescale.refinement
        alike = all(
            torch.as_tensor(end).numel() == 1 or bool((end == end.flatten()[0]).all()) for end in (low, high)
        )
        return {"quick": int(quick), "first": int(alike), **self._parameters(**parameters)}

    def _gdn(self, gdn: ops.Gdn, largest: int) -> dict[str, Any]:
        quick = _has_quick_gdn(gdn, largest)
        parameters = {
            "multiplier": gdn.mantissa.double(),
            "table": gdn.shift,
            "low": gdn.low,
            "high": gdn.high,
        }
        if takes_float32(gdn, largest):
            parameters["scale"] = multiplier_value(gdn.mantissa, gdn.shift).float()
        return {
            "first": int(gdn.inverse),
            "last": int(gdn.algorithm == "gdn"),
            "quick": int(quick),
            **self._parameters(**parameters),
        }

    def _is_per_channel(self, tensor: Tensor) -> bool:
        return varying_dim([tensor], len(self.group.shape)) in (-1, self.channel_dim)

    def _parameters(self, **parts: Any) -> dict[str, Any]:
        """Pointers to parameters as long as the longest, repeated so that loops over them are not short; and
        their `period`."""
        tensors = {name: torch.as_tensor(part) for name, part in parts.items()}
        alike = all(part.numel() == 1 for part in tensors.values())
        period = 1 if alike and "table" not in tensors else self.channels * max(1, -(-256 // self.channels))
        pointers: dict[str, Any] = {"period": period}
        for name, part in tensors.items():
            dtype = {"multiplier": torch.float64, "scale": torch.float32}.get(name, torch.int32)
            flat = part.to(dtype).reshape(-1)
            flat = flat[self.order] if self.order is not None and flat.numel() > 1 else flat
            flat = flat.expand(period) if flat.numel() == 1 else flat.repeat(period // flat.numel())
            flat = flat.contiguous()
            self._kept.append(flat)
            pointers[name] = flat.data_ptr()
        return pointers

    def _constant_array(self, steps: list[dict[str, Any]], tensor: Tensor) -> int:
        """A register into which a constant of the group's shape is loaded."""
        full = self._physical(tensor.expand(self.group.shape).to(Range.of(tensor).dtype))
        self.fixed[len(self.arrays)] = full
        self.arrays.append(None)
        self.registers += 1
        steps.append({"op": LOAD, "dst": self.registers - 1, "b": len(self.arrays) - 1})
        return self.registers - 1

    def _physical(self, tensor: Tensor) -> Tensor:
        """The tensor with its channels contiguous in memory; its shape stays."""
        rows = tensor.movedim(self.channel_dim, -1)
        return tensor if rows.is_contiguous() else rows.contiguous().movedim(-1, self.channel_dim)

    # ----------------------------------------------------------------------------------------------- products

    def _winograd(self, root: ops.MultiplyAccumulate) -> list[Winograd]:
        """The products as one job of `winograd.c`, if it pays and is exact."""
        values = self.owner.program.values
        if not library().has_winograd() or self.source_type != (torch.int16, 0):
            return []
        found = windows(root, values[self.source].range.largest, self.group.shape)
        if found is None:
            return []
        weights, starts, phases = winograd_weights(found)
        outputs, inputs = root.weight.shape[:2]
        bias = torch.zeros(phases.shape[1] * BLOCK, dtype=torch.int32)
        if root.bias is not None:
            bias[: found.spread**2 * outputs] = root.bias.to(torch.int32).repeat(found.spread**2)
        border = torch.zeros(inputs, dtype=torch.int16)
        parts = {"weights": weights, "bias": bias, "border": border, "starts": starts, "phases": phases}
        self._kept += parts.values()
        job = Winograd(**{name: part.data_ptr() for name, part in parts.items()})
        job.batch, _, job.height, job.width = values[self.source].shape
        job.inputs, job.outputs, job.stride, job.spread = inputs, outputs, found.stride, found.spread
        job.first_y, job.first_x = found.first
        job.parts = len(found.parts)
        job.all_rows, job.all_columns = self.group.shape[2:]
        job.rows, job.columns = -(-job.all_rows // found.spread), -(-job.all_columns // found.spread)
        return [job]

    def _direct(self, root: ops.MultiplyAccumulate) -> list[Product]:
        """The products as a job of `products` for each phase of the output."""
        weight = root.weight.to(torch.int64)
        x_dtype, offset = self.source_type
        shape = self.owner.program.values[self.source].shape
        spread, first = (1, 1), [(0, 0)]
        if isinstance(root, ops.Linear):
            weight = weight[:, :, None, None]
            jobs = [([(0, 0, 0, 0)], (1, 1))]
        elif isinstance(root, ops.Conv2d):
            (dilation_y, dilation_x), (pad_y, pad_x) = root.dilation, root.padding
            taps = [
                (ky * dilation_y - pad_y, kx * dilation_x - pad_x, ky, kx)
                for ky in range(weight.shape[2])
                for kx in range(weight.shape[3])
            ]
            jobs = [(taps, root.stride)]
        else:
            spread = root.stride
            first = [(a, b) for a in range(spread[0]) for b in range(spread[1])]
            jobs = [(_phase_taps(root, phase), (1, 1)) for phase in first]
        outputs = weight.shape[0]
        blocks = -(-outputs // BLOCK)
        bias = torch.zeros(outputs, dtype=torch.int64) if root.bias is None else root.bias
        made = []
        for (taps, stride), (first_row, first_column) in zip(jobs, first):
            taps = [tap for tap in taps if bool(weight[:, :, tap[2], tap[3]].any())]  # a masked tap is none
            chosen = (
                torch.stack([weight[:, :, ky, kx] for _, _, ky, kx in taps], 1)
                if taps
                else weight.new_zeros(outputs, 0, weight.shape[1])
            )
            corrected = bias - offset * chosen.sum((1, 2))
            padded = torch.zeros(blocks * BLOCK, dtype=torch.int32)
            padded[:outputs] = corrected.to(torch.int32)
            packed = pack(chosen, x_dtype)
            places = (
                torch.tensor([[y, x] for y, x, _, _ in taps], dtype=torch.int32).reshape(-1, 2).contiguous()
            )
            border = torch.full((weight.shape[1] + SLACK,), offset, dtype=x_dtype)
            self._kept += [padded, packed, places, border]
            job = Product()
            job.weights, job.bias, job.border, job.taps = (
                packed.data_ptr(),
                padded.data_ptr(),
                border.data_ptr(),
                places.data_ptr(),
            )
            job.type, job.inputs, job.count, job.outputs = (
                _OPERANDS[x_dtype],
                weight.shape[1],
                len(taps),
                outputs,
            )
            job.stride_rows, job.stride_columns = stride
            if isinstance(root, ops.Linear):
                job.batch, job.height, job.width = 1, int(torch.Size(shape[:-2]).numel()), shape[-2]
                job.rows, job.columns = job.height, job.width
                job.all_rows, job.all_columns = job.rows, job.columns
            else:
                job.batch, _, job.height, job.width = shape
                job.all_rows, job.all_columns = self.group.shape[2:]
                job.rows = -(-(job.all_rows - first_row) // spread[0])
                job.columns = -(-(job.all_columns - first_column) // spread[1])
            job.spread, job.first_row, job.first_column = spread[0], first_row, first_column
            made.append(job)
        return made

    # ---------------------------------------------------------------------------------------------------- run

    def run(self, values: dict[int, Tensor], inputs: Mapping[str, Tensor], names: Mapping[int, str]) -> None:
        owner = self.owner
        table = (Array * max(len(self.arrays), 1))()
        held = []
        for place, number in enumerate(self.arrays):
            if number is None:
                tensor, offset = self.fixed[place], 0
            elif number in self.writes and place >= len(self.loads):
                tensor, offset = (
                    owner.new(number, owner.program.values[number].shape, self.channel_dim),
                    owner.storage[number][1],
                )
                values[number] = tensor
            else:
                tensor, offset = self._physical(values[number]), owner.storage[number][1]
            if tensor.dtype not in TYPES:
                tensor = tensor.to(torch.int32)
            held.append(tensor)
            table[place].data, table[place].type, table[place].offset = (
                tensor.data_ptr(),
                TYPES[tensor.dtype],
                offset,
            )
        threads = self.threads
        if self.group.root is None:
            pixels = int(torch.Size(self.group.shape).numel()) // self.channels
            failed = library().elementwise(
                ctypes.c_int64(pixels),
                self.channels,
                self.steps,
                self.step_count,
                table,
                self.registers,
                threads,
            )
        else:
            x = self._readable(values[self.source])
            failed = 0
            for job in self.jobs:
                job.x, job.threads = x.data_ptr(), threads
                run = library().winograd if isinstance(job, Winograd) else library().products
                failed |= run(ctypes.byref(job), self.steps, self.step_count, table, self.registers)
        if failed:
            raise MemoryError("the kernels ran out of memory")

    def _readable(self, x: Tensor) -> Tensor:
        """x with its channels contiguous, in the type of the products, and with readable bytes behind it."""
        dtype, offset = self.source_type
        channel_dim = x.ndim - 1 if isinstance(self.group.root, ops.Linear) else 1
        rows = x.movedim(channel_dim, -1)
        is_ready = rows.is_contiguous() and (x.dtype, self.stored[1]) == (dtype, offset)
        row = (
            rows.shape[-1] * x.element_size()
        )  # the direct kernel reads four bytes at a time, Winograd's at least 32
        needed = max(32 - row, 0) if isinstance(self.jobs[0], Winograd) else -row % 4
        if is_ready and (
            not needed
            or x.untyped_storage().nbytes() - (x.storage_offset() + x.numel()) * x.element_size() >= needed
        ):
            return x
        flat = torch.empty(rows.numel() + SLACK, dtype=dtype)[: rows.numel()].view(rows.shape)
        flat.copy_(rows if self.stored[1] == offset else rows + (offset - self.stored[1]))
        return flat


def _has_quick_gdn(gdn: ops.Gdn, largest: int) -> bool:
    """Whether `gdn4` in kernels.c has room for numbers up to `largest`."""
    limits = int(gdn.low.abs().max()), int(gdn.high.abs().max())
    fits = largest <= 2**15 and max(largest, *limits) <= 2**24 and int(gdn.shift.abs().max()) < 512
    return gdn.algorithm == "gdn" and fits


def takes_float32(gdn: ops.Gdn, largest: int) -> bool:
    """Whether the proof of `gdn8` in kernels.c holds, and float32 neither overflows nor gets near its
    smallest numbers."""
    limits = max(int(gdn.low.abs().max()), int(gdn.high.abs().max()))
    mantissa = gdn.mantissa
    return (
        _has_quick_gdn(gdn, largest)
        and limits < 2**16
        and 2**10 <= int(mantissa.min())
        and int(mantissa.max()) <= 2**24
        and int(gdn.shift.abs().max()) <= 60
    )


def _limits(operation: ops.Rescale | ops.Add | ops.Clamp) -> tuple[Tensor | int, Tensor | int]:
    """The limits of a result, of 32 bits where there are none."""
    return (
        -INT32 if operation.low is None else operation.low,
        INT32 if operation.high is None else operation.high,
    )


def _phase_taps(conv: ops.ConvTranspose2d, phase: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """Taps of the outputs of one phase of a transposed convolution: (row, column) read relative to the
    phase's own, and kernel place."""

    def along(axis: int) -> list[tuple[int, int]]:
        stride, pad, dilation = conv.stride[axis], conv.padding[axis], conv.dilation[axis]
        places = [(phase[axis] + pad - k * dilation, k) for k in range(conv.weight.shape[2 + axis])]
        return [(place // stride, k) for place, k in places if place % stride == 0]

    return [(y, x, ky, kx) for y, ky in along(0) for x, kx in along(1)]


def pack(weight: Tensor, x_dtype: torch.dtype) -> Tensor:
    """(outputs, taps, inputs) in the kernels' order: blocks of 16 outputs, taps, inputs by four bytes,
    outputs, inputs of the four bytes."""
    size = 2 if x_dtype == torch.int16 else 4
    outputs, taps, inputs = weight.shape
    blocks, parts = -(-outputs // BLOCK), -(-inputs // size)
    full = weight.new_zeros(blocks * BLOCK, taps, parts * size)
    full[:outputs, :, :inputs] = weight
    ordered = full.reshape(blocks, BLOCK, taps, parts, size).permute(0, 2, 3, 1, 4)
    return ordered.contiguous().to(torch.int16 if size == 2 else torch.int8)
