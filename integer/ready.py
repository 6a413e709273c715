"""A program made ready for this machine, and how it runs: kernels, NumPy's arrays, and no torch.

`integer.fast` makes ready programs; `integer.ready_files` writes them to files and reads them.
"""

import ctypes
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from licq.integer.library import SLACK, TYPES, Array, Attention, LayerNorm, Product, Winograd, kernels

Values = dict[int, np.ndarray]
Storage = tuple[np.dtype, int]
"""The type in which a value lies in memory, and what is added to its integers there."""
_INT16 = np.dtype(np.int16)
_NUMBERS_AT_A_TIME = 2**23  # of queries, keys and values, which are copied into 16 bits
ALIGNED = 64
"""Bytes: what lies in memory of a program begins at multiples of it, as vectors do."""


class Launch(ABC):
    """Computes the values `writes` from the values `reads`."""

    reads: tuple[int, ...]
    writes: tuple[int, ...]
    uses_program_memory = True
    """Results are written into memory that the program gives."""
    may_give_views = False
    """Results may be views of what is read."""

    @abstractmethod
    def run(self, program: "ReadyProgram", values: Values, inputs: Mapping[str, np.ndarray]) -> None:
        """Read from `values` and add the results to it.

        inputs: the program's inputs by name.
        """


@dataclass
class ProductJobs:
    """The product of a group: one job, or one for each phase of a transposed convolution.

    source: the value that is multiplied. channel_dim: of it. stored: how it is stored. operand: as what the
    kernel reads it. slack: bytes behind it that the kernel may read. buffers: what the jobs point to.
    """

    source: int
    channel_dim: int
    stored: int
    operand: Storage
    jobs: list[Product | Winograd]
    slack: int
    buffers: list[np.ndarray]

    def run(self, x: np.ndarray, steps: Any, count: int, arrays: Any, registers: int, threads: int) -> None:
        x = self._readable(x)
        for job in self.jobs:
            job.x, job.threads = x.ctypes.data, threads
            kernel = kernels().winograd if isinstance(job, Winograd) else kernels().products
            check(kernel(ctypes.byref(job), steps, count, arrays, registers))

    def _readable(self, x: np.ndarray) -> np.ndarray:
        """x with its channels contiguous, in the type of the products, and with readable bytes behind it."""
        dtype, offset = self.operand
        rows = channels_last(x, self.channel_dim)
        if rows.flags.c_contiguous and (x.dtype, self.stored) == (dtype, offset):
            if not self.slack or _bytes_behind(rows) >= self.slack:
                return x
        copy = np.empty(rows.size + SLACK, dtype=dtype)[: rows.size].reshape(rows.shape)
        if self.stored == offset:
            copy[...] = rows
        else:
            np.add(rows, offset - self.stored, out=copy, casting="unsafe", dtype=np.int64)
        return copy


def _bytes_behind(x: np.ndarray) -> int:
    """Readable bytes behind a contiguous array."""
    owner = x
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    if not (owner.flags.c_contiguous or owner.flags.f_contiguous):
        return 0
    return owner.ctypes.data + owner.nbytes - (x.ctypes.data + x.nbytes)


@dataclass
class GroupLaunch(Launch):
    """A product, or none, and the elementwise steps on its results, tile by tile.

    Args:
        loads: values that the steps read.
        channel_dim: of the group's values, the dimension that is contiguous in memory.
        shapes: of the values that are written.
        pixels, channels: of the group's values.
        steps: a table of `library.Step`. count: its steps. registers: how many they use.
        constants: arrays that the steps read too, with channels as their last dimension.
        buffers: what the steps point to.
    """

    loads: tuple[int, ...]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    channel_dim: int
    shapes: list[tuple[int, ...]]
    pixels: int
    channels: int
    steps: Any
    count: int
    registers: int
    constants: list[np.ndarray]
    buffers: list[np.ndarray]
    product: ProductJobs | None = None

    @property
    def jobs(self) -> list[Product | Winograd]:
        """The kernel's jobs; none where the group has no product."""
        return [] if self.product is None else self.product.jobs

    def run(self, program: "ReadyProgram", values: Values, inputs: Mapping[str, np.ndarray]) -> None:
        storage = program.storage
        arrays = [(_with_channels_last(values[n], self.channel_dim), storage[n][1]) for n in self.loads]
        for number, shape in zip(self.writes, self.shapes):
            values[number] = program.new(number, shape, self.channel_dim)
            arrays.append((values[number], storage[number][1]))
        arrays += [(constant, 0) for constant in self.constants]
        table, kept = (Array * max(len(arrays), 1))(), []
        for entry, (array, offset) in zip(table, arrays):
            array = array if array.dtype in TYPES else array.astype(np.int32, order="K")
            kept.append(array)  # until the kernel has read it
            entry.data, entry.type, entry.offset = array.ctypes.data, TYPES[array.dtype], offset
        if self.product is not None:
            source = values[self.product.source]
            self.product.run(source, self.steps, self.count, table, self.registers, program.thread_count)
            return
        pixels = ctypes.c_int64(self.pixels)
        check(
            kernels().elementwise(
                pixels, self.channels, self.steps, self.count, table, self.registers, program.thread_count
            )
        )


def channels_last(x: np.ndarray, channel_dim: int) -> np.ndarray:
    """The view of x with its channels as the last dimension."""
    last = x.ndim - 1
    channel_dim %= x.ndim
    if channel_dim == last:
        return x
    return x.transpose(*range(channel_dim), *range(channel_dim + 1, last + 1), channel_dim)


def _back(rows: np.ndarray, channel_dim: int) -> np.ndarray:
    """The inverse of `channels_last`."""
    last = rows.ndim - 1
    channel_dim %= rows.ndim
    if channel_dim == last:
        return rows
    return rows.transpose(*range(channel_dim), last, *range(channel_dim, last))


def _with_channels_last(x: np.ndarray, channel_dim: int) -> np.ndarray:
    """x with its channels contiguous in memory; its shape stays."""
    rows = channels_last(x, channel_dim)
    return x if rows.flags.c_contiguous else _back(np.ascontiguousarray(rows), channel_dim)


@dataclass
class LayerNormLaunch(Launch):
    """Layer normalization, row by row; buffers: what the job points to."""

    reads: tuple[int, ...]
    writes: tuple[int, ...]
    shape: tuple[int, ...]
    job: LayerNorm
    buffers: list[np.ndarray]

    def run(self, program: "ReadyProgram", values: Values, inputs: Mapping[str, np.ndarray]) -> None:
        x = np.ascontiguousarray(values[self.reads[0]], dtype=np.int16)
        out, job = program.new(self.writes[0], self.shape), self.job
        job.x, job.threads = x.ctypes.data, program.thread_count
        _point_out(job, out, program.storage[self.writes[0]][1])
        check(kernels().layer_norm(ctypes.byref(job)))
        values[self.writes[0]] = out


@dataclass
class AttentionLaunch(Launch):
    """Attention, head by head, with the scores of a few queries at a time.

    buffers: what the job points to.
    """

    reads: tuple[int, ...]
    writes: tuple[int, ...]
    shape: tuple[int, ...]
    job: Attention
    buffers: list[np.ndarray]

    def run(self, program: "ReadyProgram", values: Values, inputs: Mapping[str, np.ndarray]) -> None:
        q, k, v = (self._rows(values[number]) for number in self.reads)
        out, job = program.new(self.writes[0], self.shape), self.job
        _point_out(job, out, program.storage[self.writes[0]][1])
        job.threads = program.thread_count
        batch, kind, data = job.batch, job.kind, job.out.data
        size = max(1, _NUMBERS_AT_A_TIME // sum(part[0].size for part in (q, k, v)))
        try:
            for start in range(0, batch, size):
                pieces = [part[start : start + size] for part in (q, k.swapaxes(-2, -1), v)]
                job.batch = len(pieces[0])
                job.kind = None if kind is None else kind + 4 * start
                job.out.data = data + start * (out.nbytes // batch)
                self._run(pieces)
        finally:
            job.batch, job.kind = batch, kind
        values[self.writes[0]] = out

    @staticmethod
    def _rows(x: np.ndarray) -> np.ndarray:
        """(batch, heads, rows, columns): a view with one step along the batch, where there is one."""
        return x.reshape((1, *x.shape) if x.ndim == 3 else (-1, *x.shape[-3:]))

    def _run(self, pieces: list[np.ndarray]) -> None:
        job, kept = self.job, []
        for name, part in zip("qkv", pieces):
            part = part if part.dtype == _INT16 else part.astype(np.int16)
            part = part if part.strides[-1] == 2 else np.ascontiguousarray(part)
            kept.append(part)  # until the kernel has read it
            setattr(job, name, part.ctypes.data)
            setattr(job, f"{name}_steps", (ctypes.c_int64 * 3)(*(step // 2 for step in part.strides[:3])))
        check(kernels().attention(ctypes.byref(job)))


def _point_out(job: LayerNorm | Attention, out: np.ndarray, offset: int) -> None:
    job.out.data, job.out.type, job.out.offset = out.ctypes.data, TYPES[out.dtype], offset


def check(status: int) -> None:
    """Raises MemoryError where a kernel says that it had no memory."""
    if status:
        raise MemoryError("the kernels ran out of memory")


@dataclass
class ReadyProgram:
    """Launches in order, and where their values lie.

    Args:
        launches: in order.
        constants: arrays by number of the value.
        storage: of each stored value.
        outputs: name -> (number of the value, type in which it is given).
        drops: the values that nothing needs after each launch.
        offsets: where in the program's memory each value is written; see `integer.memory`.
        size: of that memory, in bytes.
        threads: of the kernels; None: as many as there are processors.
    """

    launches: Sequence[Launch]
    constants: Values
    storage: dict[int, Storage]
    outputs: dict[str, tuple[int, np.dtype]]
    drops: list[list[int]]
    offsets: dict[int, int]
    size: int
    threads: int | None = None
    _memory: np.ndarray | None = None
    _views: dict[tuple, np.ndarray] = field(default_factory=dict)  # of the memory, see `new`
    _keeps: bool = False

    @property
    def thread_count(self) -> int:
        """Threads of the kernels."""
        return self.threads or default_threads()

    def __call__(self, inputs: Mapping[str, np.ndarray], keep: bool = False) -> dict[Any, np.ndarray]:
        """The outputs by name; with `keep`, all that was stored, by number."""
        values: Values = dict(self.constants)
        self._keeps = keep
        for launch, drops in zip(self.launches, self.drops):
            launch.run(self, values, inputs)
            if not keep:
                for number in drops:
                    values.pop(number, None)
        if keep:
            return {
                number: array.astype(np.int64) - self.storage.get(number, (None, 0))[1]
                for number, array in values.items()
            }
        return {
            name: values[number].astype(dtype, order="K", copy=False)
            for name, (number, dtype) in self.outputs.items()
        }

    def put(self, values: Values, number: int, array: np.ndarray) -> None:
        """Keep a result in the type in which it is stored."""
        dtype, offset = self.storage.get(number, (array.dtype, 0))
        if offset:
            values[number] = (array.astype(np.int32, order="K") + offset).astype(dtype, order="K")
        else:
            values[number] = array.astype(dtype, order="K", copy=False)

    def new(self, number: int, shape: tuple[int, ...], channel_dim: int = -1) -> np.ndarray:
        """Memory for a value, with `SLACK` bytes behind it that kernels may read.

        The next run gets the same memory, so that its pages are there.

        channel_dim: the dimension of the shape that is contiguous.
        """
        start = self.offsets.get(number)
        if start is None or self._keeps:
            return self._view(_bytes(self._size(number, shape)), number, shape, channel_dim)
        key = (number, shape, channel_dim)
        if key not in self._views:
            if self._memory is None:
                self._memory = _bytes(self.size)
            memory = self._memory[start : start + self._size(number, shape) + SLACK]
            self._views[key] = self._view(memory, number, shape, channel_dim)
        return self._views[key]

    def _size(self, number: int, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * self.storage[number][0].itemsize

    def _view(self, memory: np.ndarray, number: int, shape: tuple[int, ...], channel_dim: int) -> np.ndarray:
        rows = [*shape]
        rows.append(rows.pop(channel_dim))
        typed = memory[: self._size(number, shape)].view(self.storage[number][0])
        return _back(typed.reshape(rows), channel_dim)


def _bytes(size: int) -> np.ndarray:
    """Memory of `size` bytes and `SLACK`, at a multiple of `ALIGNED`."""
    memory = np.empty(size + SLACK + ALIGNED, dtype=np.uint8)
    start = -memory.ctypes.data % ALIGNED
    return memory[start : start + size + SLACK]


def default_threads() -> int:
    """OMP_NUM_THREADS, or the processors that this process may use."""
    stated = os.environ.get("OMP_NUM_THREADS", "")
    if stated.isdigit() and int(stated):
        return int(stated)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
