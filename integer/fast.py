"""Programs on the CPU's integer units: layers fused with what follows them elementwise, run by `kernels.c` and
`winograd.c`.

A group is one multiply-accumulate operation (or none) and the elementwise operations on its result; they run tile by tile, while
the accumulators are in the cache, and only what other groups read is stored. Everything that has no kernel here runs as the
reference does. Numbers are the reference's to the bit.
"""

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from integer.program import INT32, Operation, Program, Range
from integer.reference import MEANING
from integer.winograd import BLOCK, windows, winograd_weights
from quant.fixedpoint import multiplier_value
from quant.integer_functions import layer_norm_constants

S8, U8, S16, S32 = range(4)
_TYPES = {torch.int8: S8, torch.uint8: U8, torch.int16: S16, torch.int32: S32}
LOAD, STORE, RESCALE, ADD, PRODUCT, NEG, ABS, SQUARE, CLAMP, LEAKY, TABLE, GDN, ADDC = range(13)
_SLACK = 64  # bytes behind a tensor that a kernel may read, though it does not count them

_PRODUCTS = ("conv", "deconv", "linear")
_ELEMENTWISE = ("rescale", "add", "product", "neg", "abs", "square", "clamp", "leaky", "table", "gdn", "mask")


class _Array(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("type", ctypes.c_int32), ("offset", ctypes.c_int32)]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("op", "dst", "a", "b", "period", "first", "last", "quick")),
        *((name, ctypes.c_void_p) for name in ("multiplier", "low", "high", "factor", "table")),
    ]


class _Product(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weights", "bias", "border", "taps")),
        *((name, ctypes.c_int32) for name in (
            "type", "batch", "height", "width", "inputs", "count", "rows", "columns", "stride_rows", "stride_columns", "outputs",
            "spread", "first_row", "first_column", "all_columns", "all_rows", "threads")),
    ]  # fmt: skip


class _Winograd(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weights", "bias", "border", "starts", "phases")),
        *((name, ctypes.c_int32) for name in (
            "batch", "height", "width", "inputs", "stride", "first_y", "first_x", "rows", "columns", "outputs", "spread",
            "all_columns", "all_rows", "parts", "threads")),
    ]  # fmt: skip


class _LayerNorm(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "eps", "multiplier", "sign", "offset", "low", "high")),
        ("rows", ctypes.c_int64), ("eps_ceiling", ctypes.c_double), ("count", ctypes.c_int32), ("threads", ctypes.c_int32), ("out", _Array),
    ]  # fmt: skip


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "q", "k", "v", "score_scale", "weight_scale", "offset", "blank", "kind", "table")),
        ("batch", ctypes.c_int64),
        *((name, ctypes.c_int64 * 3) for name in ("q_steps", "k_steps", "v_steps")),
        *((name, ctypes.c_int32) for name in (
            "heads", "queries", "keys", "inner", "width", "last", "score_low", "score_high", "weight_low", "weight_high", "threads", "quick")),
        ("out", _Array),
    ]  # fmt: skip


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where the package was installed without a C compiler."""
    for path in sorted(Path(__file__).parent.glob("_kernels*.so")):
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            continue
    return None


# ------------------------------------------------------------------------------------------------------------ grouping


@dataclass
class Group:
    """Operations that run together. root: its multiply-accumulate operation, if any. channel_dim: of its values."""

    position: int
    root: Operation | None
    shape: tuple[int, ...]
    channel_dim: int | None
    operations: list[Operation] = field(default_factory=list)


def fits(operation: Operation, program: Program) -> bool:
    """Whether an operation's results, and what it computes them from, are numbers of 32 bits."""
    numbers = [*operation.inputs, *operation.outputs]
    return all(program.values[number].range.largest <= INT32 for number in numbers)


def has_kernel(operation: Operation, program: Program) -> bool:
    """Whether `kernels.c` has this multiply-accumulate operation."""
    if operation.kind not in _PRODUCTS or not fits(operation, program):
        return False
    facts = operation.facts
    if isinstance(facts.get("padding"), str) or (operation.kind == "deconv" and facts["stride"][0] != facts["stride"][1]):
        return False
    inputs = program.values[operation.inputs[0]].range
    return facts.get("groups", 1) == 1 and inputs.high - inputs.low < 2**16 and facts["weight"].dtype == torch.int8


def _constants(program: Program) -> dict[int, Tensor]:
    return {op.outputs[0]: op.facts["value"] for op in program.operations if op.kind == "constant"}


def _parameters(operation: Operation) -> list[Tensor]:
    names = ("mantissa", "shift", "low", "high", "refinement")
    found = [operation.facts.get(name) for name in names]
    return [torch.as_tensor(part) for part in found if part is not None]


def _varying_dim(parameters: list[Tensor], ndim: int) -> int | None:
    """The one dimension along which parameters vary, -1 for none, None where there is more than one."""
    dims = {ndim - part.ndim + d for part in parameters for d, size in enumerate(part.shape) if size > 1}
    return -1 if not dims else dims.pop() if len(dims) == 1 else None


def _may_join(operation: Operation, program: Program, constants: Mapping[int, Tensor]) -> bool:
    if operation.kind not in _ELEMENTWISE or not fits(operation, program):
        return False
    shape = program.values[operation.outputs[0]].shape
    data = [number for number in operation.inputs if number not in constants]
    return bool(data) and all(program.values[number].shape == shape for number in data) and len(shape) >= 2


def groups_of(program: Program) -> list[Group | Operation]:
    """The program as groups and single operations, in an order in which they can run."""
    constants = _constants(program)
    position: dict[int, int] = {}
    group_of: dict[int, Group] = {}
    plan: list[Group | Operation] = []
    for place, operation in enumerate(program.operations):
        if operation.kind == "constant":
            continue
        out = operation.outputs[0]
        shape = program.values[out].shape
        group = None
        if has_kernel(operation, program):
            group = Group(place, operation, shape, len(shape) - 1 if operation.kind == "linear" else 1)
            plan.append(group)
        elif _may_join(operation, program, constants):
            data = [number for number in operation.inputs if number not in constants]
            latest = max(data, key=lambda number: position[number])
            varying = _varying_dim(_parameters(operation), len(shape))
            candidate = group_of.get(latest)
            if varying is not None and candidate is not None and candidate.shape == shape:
                if varying in (-1, candidate.channel_dim) or candidate.channel_dim is None:
                    group = candidate
            if group is None and varying is not None:
                group = Group(place, None, shape, None)
                plan.append(group)
            if group is not None:
                group.operations.append(operation)
                if varying != -1 and group.channel_dim is None:
                    group.channel_dim = varying
        if group is None:
            plan.append(operation)
        for number in operation.outputs:
            position[number] = place if group is None else group.position
            if group is not None:
                group_of[number] = group
    return plan


# ----------------------------------------------------------------------------------------------------------- execution


class FastProgram:
    """A program made ready to run on this machine.

    Args:
        threads: of the kernels; None: PyTorch's.

    Raises:
        RuntimeError: the package was installed without a C compiler; run `integer.reference.run` instead.
    """

    def __init__(self, program: Program, threads: int | None = None):
        if library() is None:
            raise RuntimeError("no compiled kernels; install the package where there is a C compiler, or use the reference")
        self.program, self.threads = program, threads
        self.constants = _constants(program)
        self.plan = groups_of(program)
        self.eight_bits = bool(library().has_vnni())
        self.readers = _readers(self.plan, program)
        self.storage = {number: self._storage(number) for number in self.readers}
        self.items = [self._item(entry) for entry in self.plan]
        self.dies = _deaths(self.items, set(program.outputs.values()))
        sizes = {number: int(torch.Size(program.values[number].shape).numel()) * dtype.itemsize for number, (dtype, _) in self.storage.items()}
        self.slots = _slots(self.items, set(program.outputs.values()), sizes)
        self.memory: dict[int, Tensor] = {}  # by slot
        self.keeps = False

    def _item(self, entry: Group | Operation) -> "_Item":
        if isinstance(entry, Group):
            return _GroupItem(self, entry)
        for kind in (_LayerNormItem, _AttentionItem, _CopyItem):
            if kind.takes(entry, self.program):
                return kind(self, entry)
        return _SingleItem(self, entry)

    def _storage(self, number: int) -> tuple[torch.dtype, int]:
        """(type, offset) in which a value lies in memory."""
        value, readers = self.program.values[number], self.readers[number]
        products = [entry for entry in readers if isinstance(entry, Group) and entry.root is not None and number in entry.root.inputs]
        if not products:
            return value.dtype, 0
        span = value.range.high - value.range.low
        only = len(products) == len(readers) and number not in self.program.outputs.values()
        if self.eight_bits and only and span < 256:
            return torch.uint8, -value.range.low
        if -(2**15) <= value.range.low and value.range.high < 2**15:
            return torch.int16, 0
        return (torch.int16, -(2**15) - value.range.low) if only else (value.dtype, 0)

    def __call__(self, inputs: Mapping[str, Tensor], keep: bool = False) -> dict[Any, Tensor]:
        """The outputs of the program by name; with `keep`, all that was stored, by number."""
        values: dict[int, Tensor] = dict(self.constants)
        self.keeps = keep
        numbers = {number: name for name, number in self.program.inputs.items()}
        for place, item in enumerate(self.items):
            item.run(values, inputs, numbers)
            if not keep:
                for number in self.dies[place]:
                    values.pop(number, None)
        if keep:
            return {number: tensor.to(torch.int64) - self.storage.get(number, (None, 0))[1] for number, tensor in values.items()}
        return {name: values[number].to(self.program.values[number].dtype) for name, number in self.program.outputs.items()}


    def new(self, number: int, count: int) -> Tensor:
        """Memory for a value, flat, with bytes behind it that kernels may read; in the next run the same, so that its pages are there."""
        dtype, _ = self.storage[number]
        size, slot = count * dtype.itemsize, self.slots.get(number)
        if slot is None or self.keeps:
            return torch.empty(size + _SLACK, dtype=torch.uint8)[:size].view(dtype)
        if slot not in self.memory or len(self.memory[slot]) < size + _SLACK:
            self.memory[slot] = torch.empty(size + _SLACK, dtype=torch.uint8)
        return self.memory[slot][:size].view(dtype)


def _slots(items: list["_Item"], outputs: set[int], sizes: Mapping[int, int]) -> dict[int, int]:
    """The memory of each value that a kernel or a copy writes; values that are not needed at the same time share one, of the same size first.

    What PyTorch makes of a value may be a view of it, which then keeps the memory from others as long as it is needed itself.
    A program's outputs have none: they leave it.
    """
    owners: dict[int, set[int]] = {}  # whose memory a value may be a view of
    last: dict[int, int] = {}
    for place, item in enumerate(items):
        for number in item.writes:
            views = {owner for source in item.reads for owner in owners.get(source, ())} if isinstance(item, _SingleItem) else set()
            owners[number] = views if type(item) is _SingleItem else {number, *views}
        for number in (*item.reads, *item.writes):
            for owner in owners.get(number, ()):
                last[owner] = max(last.get(owner, 0), len(items) if number in outputs else place)
    dying: dict[int, list[int]] = {}
    for owner, place in last.items():
        dying.setdefault(place, []).append(owner)
    slots: dict[int, int] = {}
    free: list[tuple[int, int]] = []  # size, slot
    count = 0
    for place, item in enumerate(items):
        for number in item.writes:
            if type(item) is _SingleItem or last[number] == len(items):
                continue
            found = next((entry for entry in free if entry[0] == sizes[number]), free[-1] if free else None)
            if found is None:
                slots[number], count = count, count + 1
            else:
                free.remove(found)
                slots[number] = found[1]
        free += [(sizes[owner], slots[owner]) for owner in dying.get(place, ()) if owner in slots]
    return slots


def _readers(plan: list[Group | Operation], program: Program) -> dict[int, list[Group | Operation]]:
    """Which entries of the plan read each value that is stored."""
    readers: dict[int, list[Group | Operation]] = {number: [] for number in program.outputs.values()}
    for entry in plan:
        operations = ([entry.root] if entry.root else []) + entry.operations if isinstance(entry, Group) else [entry]
        own = {number for operation in operations for number in operation.outputs} if isinstance(entry, Group) else set()
        for operation in operations:
            for number in operation.inputs:
                if number not in own and entry not in readers.setdefault(number, []):
                    readers[number].append(entry)
    return readers


def _deaths(items: list, outputs: set[int]) -> list[list[int]]:
    last: dict[int, int] = {}
    for place, item in enumerate(items):
        for number in (*item.reads, *item.writes):
            last[number] = place
    dies: list[list[int]] = [[] for _ in items]
    for number, place in last.items():
        if number not in outputs:
            dies[place].append(number)
    return dies


class _Item:
    """A step of the plan: `run` computes the values `writes` from the values `reads`."""

    def __init__(self, owner: FastProgram, operation: Operation):
        self.owner, self.operation = owner, operation
        self.reads, self.writes = operation.inputs, operation.outputs

    @classmethod
    def takes(cls, operation: Operation, program: Program) -> bool:
        """Whether this kind of item computes this operation."""
        return False

    @property
    def threads(self) -> int:
        return self.owner.threads or torch.get_num_threads()

    def new(self, shape: tuple[int, ...]) -> tuple[Tensor, int]:
        """A tensor for the one result, and the offset of its numbers."""
        return self.owner.new(self.writes[0], int(torch.Size(shape).numel())).view(shape), self.owner.storage[self.writes[0]][1]


class _SingleItem(_Item):
    """One operation, as the reference computes it."""

    def run(self, values: dict[int, Tensor], inputs: Mapping[str, Tensor], names: Mapping[int, str]) -> None:
        operation = self.operation
        if operation.kind == "input":
            outputs = [inputs[names[operation.outputs[0]]]]
        else:
            result = MEANING[operation.kind](operation, *(values[number] for number in operation.inputs))
            outputs = list(result) if isinstance(result, (list, tuple)) else [result]
        for number, tensor in zip(operation.outputs, outputs, strict=True):
            dtype, offset = self.owner.storage.get(number, (tensor.dtype, 0))
            values[number] = tensor.to(dtype) if not offset else (tensor.to(torch.int32) + offset).to(dtype)


class _CopyItem(_SingleItem):
    """A layout function that copies a large value, into memory that is kept."""

    @classmethod
    def takes(cls, operation: Operation, program: Program) -> bool:
        return operation.kind == "layout" and operation.facts["name"] in ("index_select", "reshape", "pixel_shuffle") and len(operation.inputs) == 1

    def run(self, values: dict[int, Tensor], inputs: Mapping[str, Tensor], names: Mapping[int, str]) -> None:
        source, number = self.reads[0], self.writes[0]
        x, shape, arguments = values[source], self.owner.program.values[number].shape, self.operation.facts["arguments"]
        dtype, offset = self.owner.storage[number]
        shuffled = self.operation.facts["name"] == "pixel_shuffle"
        if x.dtype != dtype or (shuffled and x.ndim != 4) or offset != self.owner.storage.get(source, (dtype, 0))[1] or self.operation.facts["options"]:
            super().run(values, inputs, names)
        elif self.operation.facts["name"] == "index_select":
            values[number] = torch.index_select(x, *arguments[1:], out=self.new(shape)[0])
        elif shuffled:  # with channels contiguous, as the kernels read them
            batch, _, height, width = x.shape
            side, channels = arguments[1], shape[1]
            rows = self.owner.new(number, x.numel()).view(batch, height, side, width, side, channels)
            rows.copy_(x.movedim(1, -1).unflatten(-1, (channels, side, side)).permute(0, 1, 4, 2, 5, 3))
            values[number] = rows.view(batch, height * side, width * side, channels).movedim(-1, 1)
        else:
            try:
                values[number] = x.view(shape)
            except RuntimeError:  # it takes a copy
                values[number] = self.owner.new(number, x.numel()).view(x.shape).copy_(x).view(shape)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _fits16(*ranges: Range) -> bool:
    return all(-(2**15) <= numbers.low and numbers.high < 2**15 for numbers in ranges)


class _LayerNormItem(_Item):
    """Layer normalization, row by row."""

    @classmethod
    def takes(cls, operation: Operation, program: Program) -> bool:
        return operation.kind == "layer_norm" and _fits16(program.values[operation.inputs[0]].range)

    def __init__(self, owner: FastProgram, operation: Operation):
        super().__init__(owner, operation)
        facts = operation.facts
        self.shape = owner.program.values[operation.outputs[0]].shape
        count = self.shape[-1]
        mantissa = facts["mantissa"].expand(count)
        parts = {
            "eps": layer_norm_constants(count, facts["eps"]),
            "multiplier": multiplier_value(mantissa.abs(), facts["shift"].expand(count)),
            "sign": mantissa.sign(),
            **{name: facts[name].expand(count) for name in ("offset", "low", "high")},
        }
        self._kept = {name: part.double().contiguous() for name, part in parts.items()}
        self.job = _LayerNorm(**{name: part.data_ptr() for name, part in self._kept.items()})
        self.job.count, self.job.rows = count, int(torch.Size(self.shape[:-1]).numel())
        self.job.eps_ceiling = math.ceil(count**2 * facts["eps"])

    def run(self, values: dict[int, Tensor], inputs: Mapping[str, Tensor], names: Mapping[int, str]) -> None:
        x = values[self.reads[0]].to(torch.int16).contiguous()
        out, offset = self.new(self.shape)
        job = self.job
        job.x, job.threads = x.data_ptr(), self.threads
        job.out.data, job.out.type, job.out.offset = out.data_ptr(), _TYPES[out.dtype], offset
        if library().layer_norm(ctypes.byref(job)):
            raise MemoryError("the kernels ran out of memory")
        values[self.writes[0]] = out


class _AttentionItem(_Item):
    """Attention, head by head, with the scores of a few queries at a time."""

    @classmethod
    def takes(cls, operation: Operation, program: Program) -> bool:
        if operation.kind != "attention":
            return False
        products, scores, softmax, weights, output = operation.facts["steps"]
        q, k, v = (program.values[number] for number in operation.inputs)
        in_range = _fits16(q.range, k.range, v.range, program.values[weights.outputs[0]].range)
        in_range = in_range and all(fits(step, program) for step in (products, output))
        ndim = len(q.shape)
        same = ndim >= 3 and q.shape[:-2] == k.shape[:-2] == v.shape[:-2] and softmax.facts["dim"] % ndim == ndim - 1
        per_head = all(_varying_dim(_parameters(step), ndim) in (-1, ndim - 3) for step in (scores, weights))
        alike = all(step.facts[end] is not None and step.facts[end].numel() in (1, q.shape[-3]) and bool(
            (step.facts[end] == step.facts[end].flatten()[0]).all()) for step in (scores, weights) for end in ("low", "high"))
        return in_range and same and per_head and alike

    def __init__(self, owner: FastProgram, operation: Operation):
        super().__init__(owner, operation)
        program = owner.program
        _, scores, softmax, weights, _ = operation.facts["steps"]
        q, k, v = (program.values[number].shape for number in operation.inputs)
        *batch, heads, queries, inner = q
        keys, width = k[-1], v[-1]
        self.shape = program.values[operation.outputs[0]].shape
        self.job = _Attention(batch=int(torch.Size(batch).numel()), heads=heads, queries=queries, keys=keys, inner=inner, width=width)
        self._kept: list[Tensor | None] = []
        steps = (("score", scores), ("weight", weights))
        ends = {name: (int(step.facts["low"].flatten()[0]), int(step.facts["high"].flatten()[0])) for name, step in steps}
        found = {name: nudged(step.facts["mantissa"], step.facts["shift"], program.values[step.inputs[0]].range.largest, max(map(abs, ends[name])))
                 for name, step in steps}  # fmt: skip
        self.job.quick = int(None not in found.values())
        for name, step in steps:
            exact = multiplier_value(step.facts["mantissa"], step.facts["shift"])
            self._point(f"{name}_scale", (found[name] if self.job.quick else exact).reshape(-1).expand(heads).contiguous())
            setattr(self.job, f"{name}_low", ends[name][0])
            setattr(self.job, f"{name}_high", ends[name][1])
        table = softmax.facts["table"].float().contiguous()
        self._point("table", table)
        self.job.last = len(table) - 1
        self._offsets(softmax, tuple(batch), heads, queries, keys)

    def _point(self, name: str, tensor: Tensor | None) -> None:
        self._kept.append(tensor)
        setattr(self.job, name, _pointer(tensor))

    def _offsets(self, softmax: Operation, batch: tuple[int, ...], heads: int, queries: int, keys: int) -> None:
        """Bias and mask of each kind of window, and the kind of each."""
        offset, blank, kinds = (softmax.facts[name] for name in ("offset", "blank", "kinds"))
        if offset is None:
            return
        count = int(torch.Size(batch).numel())
        if kinds is not None:  # (kinds, heads, queries, keys); the last dimension of the batch has one kind each
            number = offset.shape[0]
            kind = kinds.expand(batch).reshape(-1)
        else:
            full = (1,) * (len(batch) + 3 - offset.ndim) + tuple(offset.shape)
            number = int(torch.Size(full[: len(batch)]).numel())
            kind = torch.arange(number).reshape(full[: len(batch)]).expand(batch).reshape(-1)
            offset = offset.reshape(full)
            offset = offset.reshape(number, *full[len(batch):])
            blank = None if blank is None else blank.reshape(*(1,) * (len(full) - blank.ndim), *blank.shape).expand(*full[:-1], 1).reshape(
                number, *full[len(batch):-1], 1)
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
            part = part[None] if part.ndim == 3 else part.flatten(0, -4)  # a view of one step along the batch, where there is one
            part = part if part.stride(-1) == 1 else part.contiguous()
            held.append(part)
            setattr(job, name, part.data_ptr())
            setattr(job, f"{name}_steps", (ctypes.c_int64 * 3)(*part.stride()[:3]))
        job.out.data, job.out.type, job.out.offset, job.threads = out.data_ptr(), _TYPES[out.dtype], offset, self.threads
        if library().attention(ctypes.byref(job)):
            raise MemoryError("the kernels ran out of memory")
        values[self.writes[0]] = out


class _GroupItem(_Item):
    """A group as one call of the kernels."""

    def __init__(self, owner: FastProgram, group: Group):
        self.owner, self.group = owner, group
        own = {number for operation in group.operations for number in operation.outputs}
        root = group.root
        if root is not None:
            own.add(root.outputs[0])
        ndim = len(group.shape)
        self.channel_dim = ndim - 1 if group.channel_dim is None else group.channel_dim
        self.channels = group.shape[self.channel_dim]
        self.writes = tuple(number for number in own if number in owner.readers)
        outside = [n for op in group.operations for n in op.inputs if n not in own and n not in owner.constants]
        self.loads = tuple(dict.fromkeys(outside))
        self.reads = self.loads + (root.inputs if root else ())
        self._kept: list[Any] = []  # what the steps point to
        self.fixed: dict[int, Tensor] = {}  # constant arrays, by place
        self._build(own)
        if root is not None:
            self.source = root.inputs[0]
            self.source_type = owner.storage[self.source]
            self.jobs = self._winograd(root) or self._direct(root)

    # ------------------------------------------------------------------------------------------------------------- steps

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
            if number in self.writes:
                steps.append({"op": STORE, "a": register[number], "b": len(self.loads) + self.writes.index(number)})

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
        table = (_Step * max(len(steps), 1))()
        for entry, facts in zip(table, steps):
            for name, value in facts.items():
                setattr(entry, name, value)
        self.steps, self.step_count = table, len(steps)

    def _step(self, steps: list[dict[str, Any]], operation: Operation, register: dict[int, int], out: int) -> None:
        facts, kind, constants = operation.facts, operation.kind, self.owner.constants
        data = [number for number in operation.inputs if number not in constants]
        step: dict[str, Any] = {"dst": out, "a": register[data[0]], "period": 1}
        if len(data) > 1:
            step["b"] = register[data[1]]
        if kind == "rescale":
            low, high = (-INT32, INT32) if facts["low"] is None else (facts["low"], facts["high"])
            limit = max(int(torch.as_tensor(end).abs().max()) for end in (low, high))
            multiplier = nudged(facts["mantissa"], facts["shift"], self.owner.program.values[data[0]].range.largest, limit)
            step["quick"] = int(multiplier is not None)
            multiplier = multiplier_value(facts["mantissa"], facts["shift"]) if multiplier is None else multiplier
            names = {"multiplier": multiplier, "low": low, "high": high}
            if int(torch.as_tensor(facts["refinement"]).max()) != 1:
                names["factor"] = facts["refinement"]
            alike = all(torch.as_tensor(end).numel() == 1 or bool((end == end.flatten()[0]).all()) for end in (low, high))
            step.update(op=RESCALE, first=int(alike), **self._parameters(**names))
        elif kind == "add":
            low = -INT32 if facts["low"] is None else facts["low"]
            high = INT32 if facts["high"] is None else facts["high"]
            step["op"] = ADD
            if len(data) == 1:
                constant = constants[next(number for number in operation.inputs if number in constants)]
                if self._is_per_channel(constant):
                    step.update(op=ADDC, **self._parameters(table=constant))
                else:
                    step["b"] = self._constant_array(steps, constant)
            step.update({name: self._parameters(**{name: end})[name] for name, end in (("low", low), ("high", high))})
        elif kind == "clamp":
            low = -INT32 if facts["low"] is None else facts["low"]
            high = INT32 if facts["high"] is None else facts["high"]
            step.update(op=CLAMP, **self._parameters(low=low, high=high))
        elif kind == "leaky":
            multiplier = nudged(facts["mantissa"], facts["shift"], self.owner.program.values[data[0]].range.largest)
            quick = multiplier is not None and 0 <= float(multiplier) < 1
            multiplier = multiplier if quick else multiplier_value(facts["mantissa"], facts["shift"])
            step.update(op=LEAKY, quick=int(quick), **self._parameters(multiplier=multiplier))
        elif kind == "table":
            entries = facts["table"].to(torch.int32).contiguous()
            self._kept.append(entries)
            step.update(op=TABLE, first=facts["first"], last=len(entries) - 1, table=entries.data_ptr())
        elif kind == "gdn":
            largest = self.owner.program.values[data[0]].range.largest, int(facts["low"].abs().max()), int(facts["high"].abs().max())
            quick = facts["algorithm"] == "gdn" and largest[0] <= 2**15 and max(largest) <= 2**24 and int(facts["shift"].abs().max()) < 512
            step.update(op=GDN, first=int(facts["inverse"]), last=int(facts["algorithm"] == "gdn"), quick=int(quick),
                        **self._parameters(multiplier=facts["mantissa"].double(), table=facts["shift"], low=facts["low"], high=facts["high"]))  # fmt: skip
        elif kind == "mask":
            step.update(op=PRODUCT, b=self._constant_array(steps, facts["mask"]))
        elif kind == "product" and len(data) == 1:
            constant = constants[next(number for number in operation.inputs if number in constants)]
            step.update(op=PRODUCT, b=self._constant_array(steps, constant))
        else:
            step["op"] = {"product": PRODUCT, "neg": NEG, "abs": ABS, "square": SQUARE}[kind]
        steps.append(step)

    def _is_per_channel(self, tensor: Tensor) -> bool:
        return _varying_dim([tensor], len(self.group.shape)) in (-1, self.channel_dim)

    def _parameters(self, **parts: Any) -> dict[str, Any]:
        """Pointers to parameters as long as the longest, repeated so that loops over them are not short; and their `period`."""
        tensors = {name: torch.as_tensor(part) for name, part in parts.items()}
        alike = all(part.numel() == 1 for part in tensors.values())
        period = 1 if alike and "table" not in tensors else self.channels * max(1, -(-64 // self.channels))
        pointers: dict[str, Any] = {"period": period}
        for name, part in tensors.items():
            dtype = torch.float64 if name == "multiplier" else torch.int32
            flat = part.to(dtype).reshape(-1)
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
        if self.channel_dim == tensor.ndim - 1:
            return tensor.contiguous()
        return tensor.movedim(self.channel_dim, -1).contiguous().movedim(-1, self.channel_dim)

    def _new(self, number: int) -> Tensor:
        shape = [*self.group.shape]
        moved = [*shape[: self.channel_dim], *shape[self.channel_dim + 1 :], shape[self.channel_dim]]
        return self.owner.new(number, int(torch.Size(moved).numel())).view(moved).movedim(-1, self.channel_dim)

    # ---------------------------------------------------------------------------------------------------------- products

    def _winograd(self, root: Operation) -> list[_Winograd]:
        """The products as one job of `winograd.c`, if it pays and is exact."""
        values, facts = self.owner.program.values, root.facts
        if not library().has_winograd() or self.source_type != (torch.int16, 0):
            return []
        found = windows(root.kind, facts, values[self.source].range.largest, self.group.shape)
        if found is None:
            return []
        weights, starts, phases = winograd_weights(found)
        outputs, inputs = facts["weight"].shape[:2]
        bias = torch.zeros(phases.shape[1] * BLOCK, dtype=torch.int32)
        if facts["bias"] is not None:
            bias[: found.spread**2 * outputs] = facts["bias"].to(torch.int32).repeat(found.spread**2)
        border = torch.zeros(inputs, dtype=torch.int16)
        parts = {"weights": weights, "bias": bias, "border": border, "starts": starts, "phases": phases}
        self._kept += parts.values()
        job = _Winograd(**{name: part.data_ptr() for name, part in parts.items()})
        job.batch, _, job.height, job.width = values[self.source].shape
        job.inputs, job.outputs, job.stride, job.spread = inputs, outputs, found.stride, found.spread
        job.first_y, job.first_x = found.first
        job.parts = len(found.parts)
        job.all_rows, job.all_columns = self.group.shape[2:]
        job.rows, job.columns = -(-job.all_rows // found.spread), -(-job.all_columns // found.spread)
        return [job]

    def _direct(self, root: Operation) -> list[_Product]:
        """The products as a job of `products` for each phase of the output."""
        facts = root.facts
        weight = facts["weight"].to(torch.int64)
        x_dtype, offset = self.source_type
        shape = self.owner.program.values[self.source].shape
        spread, first = (1, 1), [(0, 0)]
        if root.kind == "linear":
            weight = weight[:, :, None, None]
            jobs = [([(0, 0, 0, 0)], (1, 1))]
        elif root.kind == "conv":
            (dilation_y, dilation_x), (pad_y, pad_x) = facts["dilation"], facts["padding"]
            taps = [(ky * dilation_y - pad_y, kx * dilation_x - pad_x, ky, kx) for ky in range(weight.shape[2]) for kx in range(weight.shape[3])]
            jobs = [(taps, facts["stride"])]
        else:
            spread = facts["stride"]
            first = [(a, b) for a in range(spread[0]) for b in range(spread[1])]
            jobs = [(_phase_taps(facts, weight.shape, phase), (1, 1)) for phase in first]
        outputs = weight.shape[0]
        blocks = -(-outputs // BLOCK)
        bias = torch.zeros(outputs, dtype=torch.int64) if facts["bias"] is None else facts["bias"]
        made = []
        for (taps, stride), (first_row, first_column) in zip(jobs, first):
            taps = [tap for tap in taps if bool(weight[:, :, tap[2], tap[3]].any())]  # a masked tap is none
            chosen = torch.stack([weight[:, :, ky, kx] for _, _, ky, kx in taps], 1) if taps else weight.new_zeros(outputs, 0, weight.shape[1])
            corrected = bias - offset * chosen.sum((1, 2))
            padded = torch.zeros(blocks * BLOCK, dtype=torch.int32)
            padded[:outputs] = corrected.to(torch.int32)
            packed = pack(chosen, x_dtype)
            places = torch.tensor([[y, x] for y, x, _, _ in taps], dtype=torch.int32).reshape(-1, 2).contiguous()
            border = torch.full((weight.shape[1] + _SLACK,), offset, dtype=x_dtype)
            self._kept += [padded, packed, places, border]
            job = _Product()
            job.weights, job.bias, job.border, job.taps = packed.data_ptr(), padded.data_ptr(), border.data_ptr(), places.data_ptr()
            job.type, job.inputs, job.count, job.outputs = _TYPES[x_dtype], weight.shape[1], len(taps), outputs
            job.stride_rows, job.stride_columns = stride
            if root.kind == "linear":
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

    # --------------------------------------------------------------------------------------------------------------- run

    def run(self, values: dict[int, Tensor], inputs: Mapping[str, Tensor], names: Mapping[int, str]) -> None:
        owner = self.owner
        table = (_Array * max(len(self.arrays), 1))()
        held = []
        for place, number in enumerate(self.arrays):
            if number is None:
                tensor, offset = self.fixed[place], 0
            elif number in self.writes and place >= len(self.loads):
                tensor, offset = self._new(number), owner.storage[number][1]
                values[number] = tensor
            else:
                tensor, offset = self._physical(values[number]), owner.storage[number][1]
            if tensor.dtype not in _TYPES:
                tensor = tensor.to(torch.int32)
            held.append(tensor)
            table[place].data, table[place].type, table[place].offset = tensor.data_ptr(), _TYPES[tensor.dtype], offset
        threads = self.threads
        if self.group.root is None:
            pixels = int(torch.Size(self.group.shape).numel()) // self.channels
            failed = library().elementwise(ctypes.c_int64(pixels), self.channels, self.steps, self.step_count, table, self.registers, threads)
        else:
            x = self._readable(values[self.source])
            failed = 0
            for job in self.jobs:
                job.x, job.threads = x.data_ptr(), threads
                run = library().winograd if isinstance(job, _Winograd) else library().products
                failed |= run(ctypes.byref(job), self.steps, self.step_count, table, self.registers)
        if failed:
            raise MemoryError("the kernels ran out of memory")

    def _readable(self, x: Tensor) -> Tensor:
        """x with its channels contiguous, in the type of the products, and with readable bytes behind it."""
        dtype = self.source_type[0]
        channel_dim = 1 if self.group.root.kind != "linear" else x.ndim - 1
        rows = x.movedim(channel_dim, -1)
        is_ready = rows.is_contiguous() and x.dtype == dtype
        behind = x.untyped_storage().nbytes() - (x.storage_offset() + x.numel()) * x.element_size()
        if is_ready and (rows.shape[-1] * x.element_size() % 4 == 0 or behind >= 4):
            return x
        flat = torch.empty(rows.numel() + _SLACK, dtype=dtype)[: rows.numel()].view(rows.shape)
        flat.copy_(rows)
        return flat


def nudged(mantissa: Tensor, shift: Tensor, largest: int, limit: int = INT32) -> Tensor | None:
    """A multiplier, a little larger, whose products with whole numbers up to `largest` are never halves, and round as the exact ones do.

    mantissa * 2^-shift (1 + 2^-51): products with it, rounded to float64, are larger than the exact ones by more than one part in
    2^52 and less than three in 2^52. So an exact half becomes more than a half, and is rounded away from zero by any rounding to
    nearest; and what lies below a half stays there, if three parts in 2^52 are less than the step between products, 2^-shift for odd
    mantissas. None where they are more, for a product up to `limit` (those above it are clipped to it), or where a product leaves
    the range of 32 bits.
    """
    mantissa, shift = torch.as_tensor(mantissa).to(torch.int64), torch.as_tensor(shift).to(torch.int64)
    exact = multiplier_value(mantissa, shift)
    products = exact.abs() * largest
    twos = torch.where(mantissa == 0, 1, mantissa & -mantissa).double()  # powers of two: a step is twos * 2^-shift
    step = (twos * multiplier_value(torch.ones_like(shift), shift)).clamp(max=0.5)
    fits = bool((products < 2**31 - 2).all()) and bool((products.clamp(max=limit + 1) * 3 * 2.0**-52 < step * 0.99).all())
    return exact * (1 + 2.0**-51) if fits else None


def _phase_taps(facts: Mapping[str, Any], shape: torch.Size, phase: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """Taps of the outputs of one phase of a transposed convolution: (row, column) read relative to the phase's own, and kernel place."""

    def along(axis: int) -> list[tuple[int, int]]:
        stride, pad, dilation = facts["stride"][axis], facts["padding"][axis], facts["dilation"][axis]
        places = [(phase[axis] + pad - k * dilation, k) for k in range(shape[2 + axis])]
        return [(place // stride, k) for place, k in places if place % stride == 0]

    return [(y, x, ky, kx) for y, ky in along(0) for x, kx in along(1)]


def pack(weight: Tensor, x_dtype: torch.dtype) -> Tensor:
    """(outputs, taps, inputs) in the kernels' order: blocks of 16 outputs, taps, inputs by four bytes, outputs, inputs of the four bytes."""
    size = 2 if x_dtype == torch.int16 else 4
    outputs, taps, inputs = weight.shape
    blocks, parts = -(-outputs // BLOCK), -(-inputs // size)
    full = weight.new_zeros(blocks * BLOCK, taps, parts * size)
    full[:outputs, :, :inputs] = weight
    ordered = full.reshape(blocks, BLOCK, taps, parts, size).permute(0, 2, 3, 1, 4)
    return ordered.contiguous().to(torch.int16 if size == 2 else torch.int8)
