"""Distributions of symbols for the entropy coder, by integer arithmetic alone.

The coder takes rows. A row is a distribution of the integers from its offset on: cumulative frequencies of 16
bits. The last bin is for all other integers, which the coder then writes out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from licq.quant.density_units import (
    FACTORIZED_BITS,
    INVERSE_BITS,
    NORMAL_BITS,
    POINT_BITS,
    REACH,
    STEP_BITS,
)
from licq.support.errors import InputError

PRECISION = 16  # bits of a frequency, fixed in CompressAI's coder
_TAIL = 44  # tenths of standard deviations that a row reaches to; 2^-16.5 lies outside
_STEPS_A_DEVIATION = 16  # of the mean, per standard deviation; costs 2e-4 bits a symbol
_MAX_STEP_BITS = 7  # of the steps of a mean between two integers
MAX_BINS = 2048  # of a mixture's row
STEP_OF_Z_BITS = 16  # fractional bits of the step of z in a codec of variable rate


class RowTable:
    """Rows, one after the other in one array.

    Args:
        cdfs: int32, the cumulative frequencies of all rows.
        starts: int64, (rows + 1,), where each row begins.
        offsets: int32, (rows,), the integer of each row's first bin.

    Raises:
        InputError: a row is empty, or is no distribution of at least two bins.
    """

    def __init__(self, cdfs: np.ndarray, starts: np.ndarray, offsets: np.ndarray):
        self.cdfs = np.ascontiguousarray(cdfs, dtype=np.int32)
        self.starts = np.ascontiguousarray(starts, dtype=np.int64)
        self.offsets = np.ascontiguousarray(offsets, dtype=np.int32)
        self._check()

    def _check(self) -> None:
        first, end = self.starts[:-1], self.starts[1:]
        bad = (end - first < 3) | (first < 0) | (end > len(self.cdfs))
        if not bad.any() and len(first):
            bad |= (self.cdfs[first] != 0) | (self.cdfs[end - 1] != 1 << PRECISION)
            falls = np.flatnonzero(np.diff(self.cdfs) <= 0) + 1  # a row may begin there
            falls = falls[~np.isin(falls, first)]
            bad[np.searchsorted(first, falls, side="right") - 1] = True
        if bad.any() or len(self.offsets) != len(first):
            row = int(np.flatnonzero(bad)[0]) if bad.any() else len(first)
            raise InputError(
                f"row {row} of the model's tables is no distribution; the model is damaged: quantize the "
                "codec again"
            )

    @classmethod
    def of(cls, rows: Sequence[np.ndarray], offsets: Sequence[int]) -> "RowTable":
        """The table of single rows."""
        starts = np.cumsum([0, *(len(row) for row in rows)])
        cdfs = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int32)
        return cls(cdfs, starts, np.asarray(offsets, dtype=np.int64).reshape(-1))

    def row(self, number: int) -> np.ndarray:
        """The cumulative frequencies of one row."""
        return self.cdfs[self.starts[number] : self.starts[number + 1]]


@dataclass(frozen=True)
class Rows:
    """The distributions of n symbols: row `rows[i]` of the table is that of (symbol i - `base[i]`).

    Args:
        rows: int32 (n,).
        base: int32 (n,); None: 0.
    """

    rows: np.ndarray
    base: np.ndarray | None
    table: RowTable


class GaussianRows:
    """Discretized Gaussians.

    There is a row for each level of the scale and, where the symbols are not differences from the mean, for
    each step of the mean between two integers.

    Args:
        tables: those of the model, see `quant.density.DensityTables`; arrays or tensors on the CPU.
        boundary_bits: scales and means are integers in units of 2^-boundary_bits.
    """

    def __init__(self, tables: Sequence[Any], boundary_bits: int):
        self.tables = tuple(np.ascontiguousarray(part, dtype=np.int64) for part in tables)
        self.thresholds, self.inverses, self.normal = self.tables
        self.boundary_bits = boundary_bits
        one = 1 << INVERSE_BITS
        # symbols on either side of the mean: _TAIL deviations and 1.5
        self.reach = (2 * _TAIL * one + 30 * self.inverses) // (20 * self.inverses)
        most = min(_MAX_STEP_BITS, boundary_bits)
        self.steps = np.asarray(
            [
                min(max(0, (_STEPS_A_DEVIATION * inverse - 1).bit_length() - INVERSE_BITS), most)
                for inverse in self.inverses.tolist()
            ]
        )
        self.first = np.cumsum([0, *(1 << self.steps)])[:-1]  # of each level's rows in `with_means`

    @cached_property
    def with_means(self) -> RowTable:
        """The rows of all levels and steps."""
        return self._table([range(1 << steps) for steps in self.steps.tolist()])

    @cached_property
    def without_means(self) -> RowTable:
        """The rows of all levels, of symbols that are differences from their means."""
        return self._table([range(1)] * len(self.steps))

    def of(self, scales: np.ndarray, means: np.ndarray | None = None) -> Rows:
        """The rows of symbols.

        Args:
            scales: integers, of any shape.
            means: integers of that shape; None where the symbols are differences from their means.
        """
        level = np.searchsorted(self.thresholds, scales.reshape(-1), side="right")
        if means is None:
            return Rows(level.astype(np.int32), None, self.without_means)
        steps = self.steps[level]
        rest = self.boundary_bits - steps
        # a mean as an integer and a number of steps of its level, rounded to the nearest step
        near = (means.reshape(-1).astype(np.int64) + ((1 << rest) >> 1)) >> rest
        rows = self.first[level] + (near & ((1 << steps) - 1))
        return Rows(rows.astype(np.int32), (near >> steps).astype(np.int32), self.with_means)

    def _table(self, fractions: Sequence[range]) -> RowTable:
        rows, offsets = [], []
        for level, chosen in enumerate(fractions):
            rows += [*self._rows(level, np.asarray(chosen))]
            offsets += [-int(self.reach[level])] * len(chosen)
        return RowTable.of(rows, offsets)

    def _rows(self, level: int, fractions: np.ndarray) -> np.ndarray:
        reach, steps = int(self.reach[level]), int(self.steps[level])
        # edges of the bins, in halves; one more bin on the right, where the mean lies
        edges = np.arange(-reach, reach + 3) * 2 - 1
        distance = (edges << steps) - 2 * fractions[:, None]  # in units of 2^-(steps + 1)
        return frequencies(phi(distance * self.inverses[level], steps + 1, self.normal)).astype(np.int32)


def phi(distance: np.ndarray, bits: int, normal: np.ndarray) -> np.ndarray:
    """The distribution function of a Gaussian, in integers: 2^30 Phi(t) for t = distance 2^-(20 + bits).

    By linear interpolation between the entries of the table `normal`.
    """
    size = np.abs(distance)
    fine = INVERSE_BITS + bits - STEP_BITS  # bits of what lies between two entries
    entry = np.minimum(size >> fine, REACH << STEP_BITS)
    below, above = normal[entry], normal[np.minimum(entry + 1, REACH << STEP_BITS)]
    rest = (size & ((1 << fine) - 1)) >> max(0, fine - 24)
    value = below + (((above - below) * rest) >> min(fine, 24))
    return np.where(distance < 0, (1 << NORMAL_BITS) - value, value)


def frequencies(cumulative: np.ndarray) -> np.ndarray:
    """16-bit cumulative frequencies; every bin gets at least 1.

    Args:
        cumulative: 2^30 times the distribution function at the edges of the bins, (..., edges).

    Returns:
        (..., edges + 1); the last bin is for everything outside.

    Raises:
        InputError: the distribution function does not rise.
    """
    bins = cumulative.shape[-1]
    share = cumulative - cumulative[..., :1]
    counted = np.arange(bins) + ((share * ((1 << PRECISION) - bins)) >> NORMAL_BITS)
    return checked_rows(np.concatenate((counted, np.full((*counted.shape[:-1], 1), 1 << PRECISION)), -1))


def checked_rows(rows: np.ndarray) -> np.ndarray:
    """Cumulative frequencies (..., edges) as they are; of three edges at least, rising from 0 to 2^16.

    Raises:
        InputError: they are not so: the parameters of a density are none.
    """
    usable = rows.shape[-1] > 2 and not rows[..., 0].any() and bool((rows[..., -1] == 1 << PRECISION).all())
    if not usable or not bool((rows[..., 1:] > rows[..., :-1]).all()):
        raise InputError(
            "the codec gives parameters of a density that no symbols can be coded with (negative weights?); "
            "its files are none"
        )
    return rows


class MixtureRows:
    """Mixtures of discretized Gaussians, a row for each symbol.

    Args:
        tables: those of the model, see `quant.density.DensityTables`; arrays or tensors on the CPU.
        boundary_bits: scales and means are integers in units of 2^-boundary_bits.
        count: components of a mixture.
    """

    def __init__(self, tables: Sequence[Any], boundary_bits: int, count: int):
        self.gaussians = GaussianRows(tables, boundary_bits)
        self.count = count

    def of(self, scales: np.ndarray, means: np.ndarray, weights: np.ndarray) -> Rows:
        """The rows of symbols; scales, means, weights: integers (components, symbols)."""
        gaussians = self.gaussians
        s, m, w = (part.reshape(self.count, -1).astype(np.int64) for part in (scales, means, weights))
        level = np.searchsorted(gaussians.thresholds, s, side="right")
        reach = gaussians.reach[level]
        floor = m >> gaussians.boundary_bits
        lowest = np.where(w > 0, floor - reach, np.iinfo(np.int64).max).min(0)
        highest = np.where(w > 0, floor + reach + 1, np.iinfo(np.int64).min).max(0)
        without_weight = w.sum(0) <= 0
        lowest, highest = np.where(without_weight, 0, lowest), np.where(without_weight, 0, highest)
        bins = np.minimum(highest - lowest + 1, MAX_BINS)
        starts = np.concatenate(([0], np.cumsum(bins + 2)))
        cdfs = np.empty(starts[-1], dtype=np.int32)
        for size in np.unique(bins):
            chosen = np.flatnonzero(bins == size)
            edges = 2 * (lowest[chosen, None] + np.arange(size + 1)) - 1
            total = np.maximum(w[:, chosen].sum(0), 1)
            summed = np.zeros(edges.shape, dtype=np.int64)
            for part in range(self.count):
                distance = (edges << gaussians.boundary_bits) - 2 * m[part, chosen, None]
                inverse = gaussians.inverses[level[part, chosen], None]
                summed += (
                    phi(distance * inverse, gaussians.boundary_bits + 1, gaussians.normal)
                    * w[part, chosen, None]
                )
            cdfs[starts[chosen, None] + np.arange(size + 2)] = frequencies(summed // total[:, None])
        table = RowTable(cdfs, starts, np.zeros(len(bins)))
        return Rows(np.arange(len(bins), dtype=np.int32), lowest.astype(np.int32), table)


class SteppedRows:
    """Factorized densities of z in a codec of variable rate, for symbols that are any step apart.

    Args:
        cumulative: the distribution functions at fixed points, (channels, points); see
            `quant.density.factorized_table`.
    """

    def __init__(self, cumulative: Any):
        self.cumulative = np.asarray(cumulative, dtype=np.int64)
        self._known: dict[int, RowTable] = {}

    def of(self, step: int) -> RowTable:
        """A row for each channel; step: in units of 2^-`STEP_OF_Z_BITS`."""
        if step not in self._known:
            rows = [self._row(function, step) for function in self.cumulative]
            self._known[step] = RowTable.of([row for row, _ in rows], [offset for _, offset in rows])
        return self._known[step]

    @staticmethod
    def _row(function: np.ndarray, step: int) -> tuple[np.ndarray, int]:
        middle, fine = len(function) // 2, STEP_OF_Z_BITS + 1 - POINT_BITS  # edges are halves of steps
        reach = (middle << fine) // (2 * step) + 1
        edges = (2 * np.arange(-reach, reach + 2) - 1) * step + (middle << fine)
        edges = np.clip(edges, 0, ((len(function) - 1) << fine) - 1)
        point, rest = edges >> fine, edges & ((1 << fine) - 1)
        values = function[point] + (((function[point + 1] - function[point]) * rest) >> fine)
        # bins with less than one frequency before or behind them are left to the last bin
        one = 1 << (FACTORIZED_BITS - PRECISION)
        first = int(np.argmax(values[1:] > one)) if (values[1:] > one).any() else reach
        last = len(values) - 2 - int(np.argmax(values[-2::-1] < (1 << FACTORIZED_BITS) - one))
        chosen = values[first : max(last, first) + 2]
        return frequencies(chosen << (NORMAL_BITS - FACTORIZED_BITS)), first - reach


def bottleneck_rows(cdf: Any, lengths: Any, offsets: Any) -> RowTable:
    """A row for each channel, from the tables that CompressAI's entropy bottleneck stores.

    Args:
        cdf: (channels, longest).
        lengths, offsets: (channels,).

    Raises:
        InputError: a row is empty, or is no distribution.
    """
    cdf, lengths, offsets = (np.asarray(part) for part in (cdf, lengths, offsets))
    return RowTable.of([row[:length] for row, length in zip(cdf, lengths.reshape(-1).tolist())], offsets)
