"""Launches of kernels in a ready program, but those of groups: what PyTorch computes, copies, layer
normalization, attention."""

import ctypes
import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from licq.integer.groups import fits, parameters_of, varying_dim
from licq.integer.library import TYPES, Attention, LayerNorm, library
from licq.integer.multipliers import tie_free_multiplier
from licq.integer.program import Program
from licq.integer.reference import MEANING, results_of
from licq.quant import operations as ops
from licq.quant.fixedpoint import multiplier_value
from licq.quant.integer_functions import layer_norm_constants
from licq.quant.operations import Operation, Range


class Owner(Protocol):
    """The ready program that a launch belongs to; `integer.fast.FastProgram` is one.

    constants: values that the program holds, by number. storage: (type, offset) of each value in memory.
    """

    program: Program
    threads: int | None
    constants: dict[int, Tensor]
    readers: dict[int, list[Any]]
    storage: dict[int, tuple[torch.dtype, int]]

    def new(self, number: int, shape: tuple[int, ...], channel_dim: int = -1) -> Tensor:
        """Memory for a value."""
        ...


def kernels() -> ctypes.CDLL:
    """The compiled kernels, which are there: a ready program is made only where they are."""
    compiled = library()
    assert compiled is not None
    return compiled


class Launch:
    """A step of a ready program: `run` computes the values `writes` from the values `reads`."""

    def __init__(self, owner: Owner, operation: Operation):
        self.owner, self.operation = owner, operation
        self.reads, self.writes = operation.inputs, operation.outputs

    @property
    def thread_count(self) -> int:
        return self.owner.threads or torch.get_num_threads()

    def run(self, values: dict[int, Tensor], inputs: Mapping[str, Tensor], names: Mapping[int, str]) -> None:
        """Compute what it writes. values: by number. inputs: of the program, by name. names: of its
        inputs."""
        raise NotImplementedError

    def new(self, shape: tuple[int, ...]) -> tuple[Tensor, int]:
        """A tensor for the one result, and the offset of its numbers."""
        return self.owner.new(self.writes[0], shape), self.owner.storage[self.writes[0]][1]


class SingleLaunch(Launch):
    """One operation, as the reference computes it."""

    def run(self, values: dict[int, Tensor], inputs: Mapping[str, Tensor], names: Mapping[int, str]) -> None:
        for number, tensor in results_of(self.operation, values, inputs, names, MEANING):
            dtype, offset = self.owner.storage.get(number, (tensor.dtype, 0))
            values[number] = tensor.to(dtype) if not offset else (tensor.to(torch.int32) + offset).to(dtype)


class CopyLaunch(SingleLaunch):
    """A layout function that copies a large value, into memory that is reused."""

    operation: ops.Layout

    @staticmethod
    def takes(layout: ops.Layout) -> bool:
        """Whether this kind of launch computes the function."""
        return layout.name in ("index_select", "reshape", "pixel_shuffle") and len(layout.inputs) == 1

    def run(self, values: dict[int, Tensor], inputs: Mapping[str, Tensor], names: Mapping[int, str]) -> None:
        source, number = self.reads[0], self.writes[0]
        x, shape, arguments = (
            values[source],
            self.owner.program.values[number].shape,
            self.operation.arguments,
        )
        dtype, offset = self.owner.storage[number]
        shuffled = self.operation.name == "pixel_shuffle"
        if (
            x.dtype != dtype
            or (shuffled and x.ndim != 4)
            or offset != self.owner.storage.get(source, (dtype, 0))[1]
            or self.operation.options
        ):
            super().run(values, inputs, names)
        elif self.operation.name == "index_select":
            values[number] = torch.index_select(x, *arguments[1:], out=self.new(shape)[0])
        elif shuffled:  # with channels contiguous, as the kernels read them
            batch, _, height, width = x.shape
            side, channels = arguments[1], shape[1]
            rows = self.owner.new(number, (batch, height, side, width, side, channels))
            rows.copy_(x.movedim(1, -1).unflatten(-1, (channels, side, side)).permute(0, 1, 4, 2, 5, 3))
            values[number] = rows.view(batch, height * side, width * side, channels).movedim(-1, 1)
        else:
            try:
                values[number] = x.view(shape)
            except RuntimeError:  # it takes a copy
                values[number] = self.owner.new(number, tuple(x.shape)).copy_(x).view(shape)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _fits16(*ranges: Range) -> bool:
    return all(-(2**15) <= numbers.low and numbers.high < 2**15 for numbers in ranges)


class LayerNormLaunch(Launch):
    """Layer normalization, row by row."""

    @staticmethod
    def takes(operation: ops.LayerNorm, program: Program) -> bool:
        """Whether the kernel has room for the numbers."""
        return _fits16(program.values[operation.inputs[0]].range)

    def __init__(self, owner: Owner, operation: ops.LayerNorm):
        super().__init__(owner, operation)
        self.shape = owner.program.values[operation.outputs[0]].shape
        count = self.shape[-1]
        mantissa = operation.mantissa.expand(count)
        parts = {
            "eps": layer_norm_constants(count, operation.eps),
            "multiplier": multiplier_value(mantissa.abs(), operation.shift.expand(count)),
            "sign": mantissa.sign(),
            **{name: getattr(operation, name).expand(count) for name in ("offset", "low", "high")},
        }
        self._memory = {name: part.double().contiguous() for name, part in parts.items()}
        self.job = LayerNorm(**{name: part.data_ptr() for name, part in self._memory.items()})
        self.job.count, self.job.rows = count, int(torch.Size(self.shape[:-1]).numel())
        self.job.eps_ceiling = math.ceil(count**2 * operation.eps)

    def run(self, values: dict[int, Tensor], inputs: Mapping[str, Tensor], names: Mapping[int, str]) -> None:
        x = values[self.reads[0]].to(torch.int16).contiguous()
        out, offset = self.new(self.shape)
        job = self.job
        job.x, job.threads = x.data_ptr(), self.thread_count
        job.out.data, job.out.type, job.out.offset = out.data_ptr(), TYPES[out.dtype], offset
        if kernels().layer_norm(ctypes.byref(job)):
            raise MemoryError("the kernels ran out of memory")
        values[self.writes[0]] = out


class AttentionLaunch(Launch):
    """Attention, head by head, with the scores of a few queries at a time."""

    @staticmethod
    def takes(operation: ops.Attention, program: Program) -> bool:
        """Whether the kernel has room for the numbers, and the shapes and limits that it takes."""
        scores, weights = operation.scores, operation.weights
        q, k, v = (program.values[number] for number in operation.inputs)
        in_range = _fits16(q.range, k.range, v.range, program.values[weights.outputs[0]].range)
        in_range = in_range and all(fits(step, program) for step in (operation.products, operation.output))
        ndim = len(q.shape)
        same = (
            ndim >= 3
            and q.shape[:-2] == k.shape[:-2] == v.shape[:-2]
            and operation.softmax.dim % ndim == ndim - 1
        )
        per_head = all(varying_dim(parameters_of(step), ndim) in (-1, ndim - 3) for step in (scores, weights))
        alike = all(
            end is not None and end.numel() in (1, q.shape[-3]) and bool((end == end.flatten()[0]).all())
            for step in (scores, weights)
            for end in (step.low, step.high)
        )
        return in_range and same and per_head and alike

    def __init__(self, owner: Owner, operation: ops.Attention):
        super().__init__(owner, operation)
        program = owner.program
        scores, softmax, weights = operation.scores, operation.softmax, operation.weights
        q, k, v = (program.values[number].shape for number in operation.inputs)
        *batch, heads, queries, inner = q
        keys, width = k[-1], v[-1]
        self.shape = program.values[operation.outputs[0]].shape
        self.job = Attention(
            batch=int(torch.Size(batch).numel()),
            heads=heads,
            queries=queries,
            keys=keys,
            inner=inner,
            width=width,
        )
        self._memory: list[Tensor | None] = []
        steps = (("score", scores), ("weight", weights))
        limits, multipliers = {}, {}
        for name, step in steps:
            assert step.low is not None and step.high is not None  # see `takes`
            limits[name] = int(step.low.flatten()[0]), int(step.high.flatten()[0])
            largest = program.values[step.inputs[0]].range.largest
            multipliers[name] = tie_free_multiplier(
                step.mantissa, step.shift, largest, max(map(abs, limits[name]))
            )
        tie_free = all(multiplier is not None for multiplier in multipliers.values())
        self.job.tie_free = int(tie_free)
        for name, step in steps:
            multiplier = multipliers[name] if tie_free else multiplier_value(step.mantissa, step.shift)
            self._point(f"{name}_scale", multiplier.reshape(-1).expand(heads).contiguous())
            low, high = limits[name]
            setattr(self.job, f"{name}_low", low)
            setattr(self.job, f"{name}_high", high)
        table = softmax.table.float().contiguous()
        self._point("table", table)
        self.job.last = len(table) - 1
        self._offsets(softmax, tuple(batch), heads, queries, keys)

    def _point(self, name: str, tensor: Tensor | None) -> None:
        self._memory.append(tensor)
        setattr(self.job, name, _pointer(tensor))

    def _offsets(
        self, softmax: ops.Softmax, batch: tuple[int, ...], heads: int, queries: int, keys: int
    ) -> None:
        """Bias and mask of each kind of window, and the kind of each."""
        offset, blank, kinds = softmax.offset, softmax.blank, softmax.kinds
        if offset is None:
            return
        count = int(torch.Size(batch).numel())
        if (
            kinds is not None
        ):  # (kinds, heads, queries, keys); the last dimension of the batch has one kind each
            number = offset.shape[0]
            kind = kinds.expand(batch).reshape(-1)
        else:
            full = (1,) * (len(batch) + 3 - offset.ndim) + tuple(offset.shape)
            number = int(torch.Size(full[: len(batch)]).numel())
            kind = torch.arange(number).reshape(full[: len(batch)]).expand(batch).reshape(-1)
            offset = offset.reshape(full)
            offset = offset.reshape(number, *full[len(batch) :])
            blank = (
                None
                if blank is None
                else blank.reshape(*(1,) * (len(full) - blank.ndim), *blank.shape)
                .expand(*full[:-1], 1)
                .reshape(number, *full[len(batch) : -1], 1)
            )
        self._point("offset", offset.expand(number, heads, queries, keys).to(torch.int32).contiguous())
        if blank is not None:
            self._point("blank", blank.expand(number, heads, queries, 1).to(torch.uint8).contiguous())
        self._point("kind", kind.to(torch.int32).contiguous())
        assert len(kind) == count

    def run(self, values: dict[int, Tensor], inputs: Mapping[str, Tensor], names: Mapping[int, str]) -> None:
        q, k, v = (values[number] for number in self.reads)
        out, offset = self.new(self.shape)
        job = self.job
        held = []
        for name, part in (("q", q), ("k", k.transpose(-2, -1)), ("v", v)):
            part = part.to(torch.int16)
            part = (
                part[None] if part.ndim == 3 else part.flatten(0, -4)
            )  # a view of one step along the batch, where there is one
            part = part if part.stride(-1) == 1 else part.contiguous()
            held.append(part)
            setattr(job, name, part.data_ptr())
            setattr(job, f"{name}_steps", (ctypes.c_int64 * 3)(*part.stride()[:3]))
        job.out.data, job.out.type, job.out.offset, job.threads = (
            out.data_ptr(),
            TYPES[out.dtype],
            offset,
            self.thread_count,
        )
        if kernels().attention(ctypes.byref(job)):
            raise MemoryError("the kernels ran out of memory")
        values[self.writes[0]] = out
