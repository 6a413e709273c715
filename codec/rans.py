"""The entropy coder: symbols and their distributions to a stream and back.

The compiled coder (integer/rans.c) takes arrays and writes CompressAI's streams to the byte. Where there are
no compiled kernels, CompressAI's own coder runs.
"""

import ctypes
import os
from typing import Any, Protocol

import numpy as np

from licq.codec.tables import MAX_BINS, MixtureRows, Rows, RowTable
from licq.integer import library
from licq.support.errors import InputError

DAMAGED = "the stream holds symbols that this model cannot have written; it is damaged or of another model"
_ENTRIES_A_SYMBOL = 10  # a bin, and of an escape the number of digits and eight digits
_COMPONENTS = 16  # of a mixture, that the compiled coder takes
# CompressAI's decoder reads on behind the end of a stream. Bytes that one byte of a hostile stream, and each
# symbol, can have it read there:
_BYTES_BEHIND_A_BYTE, _BYTES_BEHIND_A_SYMBOL = 16, 4


class Encoder(Protocol):
    """Takes symbols in the order in which they are decoded."""

    def push(self, symbols: np.ndarray, rows: Rows) -> None:
        """Encode integers, (n,)."""
        ...

    def push_mixtures(self, symbols: np.ndarray, tables: MixtureRows, *parameters: np.ndarray) -> None:
        """Encode integers, (n,); parameters: scales, means and weights, integers (components, n)."""
        ...

    def flush(self) -> bytes:
        """The stream."""
        ...


class Decoder(Protocol):
    """Gives symbols as int32, in the order in which they were encoded.

    Its methods raise InputError where the stream holds none.
    """

    def pull(self, rows: Rows) -> np.ndarray:
        """The next symbols, (n,)."""
        ...

    def pull_mixtures(self, tables: MixtureRows, *parameters: np.ndarray) -> np.ndarray:
        """The next symbols, (n,); parameters: scales, means and weights, integers (components, n)."""
        ...

    def finish(self) -> None:
        """Raises InputError where the stream goes on."""
        ...


def compiled() -> Any:
    """The compiled kernels; None where there are none, or LICQ_KERNELS=reference says that none may run."""
    return None if os.environ.get("LICQ_KERNELS") == "reference" else library.library()


def encoder() -> Encoder:
    """The best encoder that there is."""
    return CompiledEncoder() if compiled() is not None else CompressaiEncoder()


def decoder(stream: bytes, count: int) -> Decoder:
    """The best decoder that there is, of a stream of `count` symbols."""
    return CompiledDecoder(stream) if compiled() is not None else CompressaiDecoder(stream, count)


# --------------------------------------------------------------------------------------------------- compiled


def _address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _int32(array: np.ndarray) -> np.ndarray:
    """The same integers, contiguous; InputError where they need more than 32 bits."""
    if array.dtype.itemsize > 4 and array.size and max(-int(array.min()), int(array.max())) >= 2**31:
        raise InputError("a symbol needs more than 32 bits, so it cannot be coded")
    return np.ascontiguousarray(array, dtype=np.int32)


def _rows_of(table: RowTable) -> library.Rows:
    """The table as the kernels take it; made once."""
    struct = vars(table).get("_struct")
    if struct is None:
        struct = library.Rows(
            table.cdfs.ctypes.data,
            table.starts.ctypes.data,
            table.offsets.ctypes.data,
            len(table.offsets),
            len(table.cdfs),
        )
        if library.kernels().rans_bad_row(ctypes.byref(struct)) >= 0:
            raise InputError("a table of the model is no distribution; the model is damaged")
        vars(table)["_struct"] = struct
    return struct


def _mixture_of(
    tables: MixtureRows, parameters: tuple[np.ndarray, ...]
) -> tuple[library.Mixture, int, list[np.ndarray]]:
    """(what the kernels take, the number of symbols, what must be kept until they have run)."""
    gaussians, parts = tables.gaussians, [_int32(part).reshape(tables.count, -1) for part in parameters]
    if tables.count > _COMPONENTS:
        raise InputError(
            f"mixtures of {tables.count} components cannot be coded; at most {_COMPONENTS} can be"
        )
    arrays = [*parts, gaussians.thresholds, gaussians.inverses, gaussians.reach, gaussians.normal]
    struct = library.Mixture(
        *(array.ctypes.data for array in arrays),
        len(gaussians.inverses),
        gaussians.boundary_bits,
        tables.count,
        MAX_BINS,
    )
    return struct, parts[0].shape[1], arrays


class CompiledEncoder:
    """rANS in C."""

    def __init__(self) -> None:
        self._kernels = library.kernels()
        self._entries: list[np.ndarray] = []  # see rans.c

    def push(self, symbols: np.ndarray, rows: Rows) -> None:
        symbols, chosen = _int32(symbols), _int32(rows.rows)
        base = None if rows.base is None else _int32(rows.base)
        entries = np.empty(_ENTRIES_A_SYMBOL * len(symbols), dtype=np.uint32)
        self._add(
            entries,
            self._kernels.rans_entries(
                ctypes.byref(_rows_of(rows.table)),
                _address(symbols),
                _address(chosen),
                None if base is None else _address(base),
                ctypes.c_int64(len(symbols)),
                _address(entries),
            ),
        )

    def push_mixtures(self, symbols: np.ndarray, tables: MixtureRows, *parameters: np.ndarray) -> None:
        symbols = _int32(symbols)
        struct, count, _kept = _mixture_of(tables, parameters)
        assert count == len(symbols)
        entries = np.empty(_ENTRIES_A_SYMBOL * count, dtype=np.uint32)
        self._add(
            entries,
            self._kernels.rans_mixture_entries(
                ctypes.byref(struct), _address(symbols), ctypes.c_int64(count), _address(entries)
            ),
        )

    def _add(self, entries: np.ndarray, count: int) -> None:
        if count < 0:
            raise InputError("a symbol is too far from its mean to be coded; quantize the codec again")
        self._entries.append(entries[:count].copy())

    def flush(self) -> bytes:
        entries = np.concatenate([*self._entries, np.zeros(0, dtype=np.uint32)])
        self._entries = []
        words = np.empty(len(entries) + 2, dtype=np.uint32)
        first = self._kernels.rans_stream(_address(entries), ctypes.c_int64(len(entries)), _address(words))
        return words[first:].tobytes()


class CompiledDecoder:
    """rANS in C, which reads nothing outside of the stream."""

    def __init__(self, stream: bytes):
        self._kernels, self._stream = library.kernels(), stream  # keeps the memory
        self._state = library.RansDecoder(
            ctypes.cast(ctypes.c_char_p(stream), ctypes.c_void_p).value, len(stream) // 4, 0, 0
        )
        self._pointer = ctypes.byref(self._state)
        if len(stream) % 4 or not self._kernels.rans_begin(self._pointer):
            raise InputError(DAMAGED)

    def pull(self, rows: Rows) -> np.ndarray:
        chosen = _int32(rows.rows)
        base = None if rows.base is None else _int32(rows.base)
        symbols = np.empty(len(chosen), dtype=np.int32)
        done = self._kernels.rans_symbols(
            self._pointer,
            ctypes.byref(_rows_of(rows.table)),
            _address(chosen),
            None if base is None else _address(base),
            ctypes.c_int64(len(chosen)),
            _address(symbols),
        )
        if done != len(chosen):
            raise InputError(DAMAGED)
        return symbols

    def pull_mixtures(self, tables: MixtureRows, *parameters: np.ndarray) -> np.ndarray:
        struct, count, _kept = _mixture_of(tables, parameters)
        symbols = np.empty(count, dtype=np.int32)
        if (
            self._kernels.rans_mixture_symbols(
                self._pointer, ctypes.byref(struct), ctypes.c_int64(count), _address(symbols)
            )
            != count
        ):
            raise InputError(DAMAGED)
        return symbols

    def finish(self) -> None:
        if not self._kernels.rans_ended(self._pointer):
            raise InputError(DAMAGED)


# ------------------------------------------------------------------------------------------------- CompressAI


def _lists_of(rows: Rows) -> tuple[list[int], tuple[list[list[int]], list[int], list[int]]]:
    """(which row each symbol has, (cumulative frequencies, lengths, offsets) of those rows alone)."""
    used, chosen = np.unique(rows.rows, return_inverse=True)
    cdfs = [rows.table.row(number).tolist() for number in used]
    return chosen.tolist(), (cdfs, [len(cdf) for cdf in cdfs], rows.table.offsets[used].tolist())


class CompressaiEncoder:
    """CompressAI's coder, which takes lists."""

    def __init__(self) -> None:
        from compressai.ans import BufferedRansEncoder

        self._coder = BufferedRansEncoder()

    def push(self, symbols: np.ndarray, rows: Rows) -> None:
        values = symbols.astype(np.int64) - (0 if rows.base is None else rows.base)
        chosen, lists = _lists_of(rows)
        self._coder.encode_with_indexes(values.tolist(), chosen, *lists)

    def push_mixtures(self, symbols: np.ndarray, tables: MixtureRows, *parameters: np.ndarray) -> None:
        self.push(symbols, tables.of(*parameters))

    def flush(self) -> bytes:
        return self._coder.flush()


class CompressaiDecoder:
    """CompressAI's coder, with zeros behind the stream for what it reads there."""

    def __init__(self, stream: bytes, count: int):
        from compressai.ans import RansDecoder

        self._coder = RansDecoder()
        padding = _BYTES_BEHIND_A_BYTE * len(stream) + _BYTES_BEHIND_A_SYMBOL * count + 64
        self._coder.set_stream(stream + bytes(padding))

    def pull(self, rows: Rows) -> np.ndarray:
        chosen, lists = _lists_of(rows)
        values = self._coder.decode_stream(chosen, *lists)
        symbols = np.asarray(values, dtype=np.int64) + (0 if rows.base is None else rows.base)
        if len(symbols) and max(-int(symbols.min()), int(symbols.max())) >= 2**31:
            raise InputError(DAMAGED)
        return symbols.astype(np.int32)

    def pull_mixtures(self, tables: MixtureRows, *parameters: np.ndarray) -> np.ndarray:
        return self.pull(tables.of(*parameters))

    def finish(self) -> None:
        """CompressAI's coder does not know."""
