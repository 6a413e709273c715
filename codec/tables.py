"""Distributions of symbols for the entropy coder, by integer arithmetic alone.

CompressAI's rANS coder takes rows. A row is a distribution of the integers from `offset` on: cumulative
frequencies of 16 bits. The last bin is for all other integers, which the coder then writes out.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from licq.codec.row_checks import checked_rows
from licq.quant.density import (
    FACTORIZED_BITS,
    INVERSE_BITS,
    NORMAL_BITS,
    POINT_BITS,
    REACH,
    STEP_BITS,
    DensityTables,
)

PRECISION = 16  # bits of a frequency, fixed in CompressAI's coder
_TAIL = 44  # tenths of standard deviations that a row reaches to; 2^-16.5 lies outside
_STEPS_A_DEVIATION = 16  # of the mean, per standard deviation; costs 2e-4 bits a symbol
_MAX_STEP_BITS = 7  # of the steps of a mean between two integers
_MAX_BINS = 2048  # of a mixture's row
STEP_OF_Z_BITS = 16  # fractional bits of the step of z in a codec of variable rate


@dataclass(frozen=True)
class Rows:
    """The distributions of n symbols: `cdfs[rows[i]]` is that of (symbol i - `base[i]`).

    Args:
        rows: (n,), which of the cdfs.
        base: (n,), integers.
        cdfs: cumulative frequencies.
        offsets: of each of the cdfs, the integer of its first bin.
    """

    rows: np.ndarray
    base: np.ndarray
    cdfs: list[list[int]]
    offsets: list[int]

    @property
    def sizes(self) -> list[int]:
        """The lengths of the cdfs."""
        return [len(cdf) for cdf in self.cdfs]


class GaussianRows:
    """Discretized Gaussians.

    There is a row for each level of the scale and, where the symbols are not differences from the mean, for
    each step of the mean between two integers.

    Args:
        tables: those of the model.
        boundary_bits: scales and means are integers in units of 2^-boundary_bits.
    """

    def __init__(self, tables: DensityTables, boundary_bits: int):
        self.thresholds, self.inverses, self.normal = (part.cpu().numpy() for part in tables)
        self.boundary_bits = boundary_bits
        one = 1 << INVERSE_BITS
        inverses = self.inverses.tolist()
        # symbols on either side of the mean: _TAIL deviations and 1.5
        self.reach = [(2 * _TAIL * one + 30 * inverse) // (20 * inverse) for inverse in inverses]
        most = min(_MAX_STEP_BITS, boundary_bits)
        self.steps = [
            min(max(0, (_STEPS_A_DEVIATION * inverse - 1).bit_length() - INVERSE_BITS), most)
            for inverse in inverses
        ]
        self._rows: dict[tuple[int, int], list[int]] = {}

    def of(self, scales: Tensor, means: Tensor | None = None) -> Rows:
        """The rows of symbols.

        Args:
            scales: integers, of any shape.
            means: integers of that shape; None where the symbols are differences from their means.
        """
        level = np.searchsorted(self.thresholds, scales.flatten().numpy(), side="right")
        if means is None:
            base = fraction = np.zeros(len(level), dtype=np.int64)
        else:
            base, fraction = self._split(means.flatten().numpy().astype(np.int64), level)
        keys, rows = np.unique((level << _MAX_STEP_BITS) + fraction, return_inverse=True)
        pairs = [(int(key) >> _MAX_STEP_BITS, int(key) & ((1 << _MAX_STEP_BITS) - 1)) for key in keys]
        return Rows(
            rows, base, [self._row(*pair) for pair in pairs], [-self.reach[level] for level, _ in pairs]
        )

    def _split(self, means: np.ndarray, level: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A mean as an integer and a number of steps of its level, rounded to the nearest step."""
        steps = np.asarray(self.steps)[level]
        rest = self.boundary_bits - steps
        near = (means + ((1 << rest) >> 1)) >> rest
        return near >> steps, near & ((1 << steps) - 1)

    def _row(self, level: int, fraction: int) -> list[int]:
        key = (level, fraction)
        if key not in self._rows:
            reach, steps = self.reach[level], self.steps[level]
            # edges of the bins, in halves; one more bin on the right, where the mean lies
            edges = np.arange(-reach, reach + 3) * 2 - 1
            distance = (edges << steps) - 2 * fraction  # in units of 2^-(steps + 1)
            self._rows[key] = frequencies(
                phi(distance * int(self.inverses[level]), steps + 1, self.normal)
            ).tolist()
        return self._rows[key]


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


class MixtureRows:
    """Mixtures of discretized Gaussians, a row for each symbol.

    Args:
        tables: those of the model.
        boundary_bits: scales and means are integers in units of 2^-boundary_bits.
        count: components of a mixture.
    """

    def __init__(self, tables: DensityTables, boundary_bits: int, count: int):
        self.gaussians = GaussianRows(tables, boundary_bits)
        self.count = count

    def of(self, scales: Tensor, means: Tensor, weights: Tensor) -> Rows:
        """The rows of symbols; scales, means, weights: integers (components, symbols)."""
        gaussians = self.gaussians
        s, m, w = (part.reshape(self.count, -1).numpy().astype(np.int64) for part in (scales, means, weights))
        level = np.searchsorted(gaussians.thresholds, s, side="right")
        reach = np.asarray(gaussians.reach)[level]
        floor = m >> gaussians.boundary_bits
        lowest = np.where(w > 0, floor - reach, np.iinfo(np.int64).max).min(0)
        highest = np.where(w > 0, floor + reach + 1, np.iinfo(np.int64).min).max(0)
        without_weight = w.sum(0) <= 0
        lowest, highest = np.where(without_weight, 0, lowest), np.where(without_weight, 0, highest)
        bins = np.minimum(highest - lowest + 1, _MAX_BINS)
        cdfs: list[list[int]] = [[]] * s.shape[1]
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
            rows = frequencies(summed // total[:, None]).tolist()
            for symbol, row in zip(chosen.tolist(), rows):
                cdfs[symbol] = row
        return Rows(np.arange(len(cdfs)), lowest, cdfs, [0] * len(cdfs))


class SteppedRows:
    """Factorized densities of z in a codec of variable rate, for symbols that are any step apart.

    Args:
        cumulative: the distribution functions at fixed points, (channels, points); see
            `quant.density.factorized_table`.
    """

    def __init__(self, cumulative: Tensor):
        self.cumulative = cumulative.cpu().numpy().astype(np.int64)
        self._known: dict[int, tuple[list[list[int]], list[int]]] = {}

    def of(self, step: int) -> tuple[list[list[int]], list[int]]:
        """(cdfs, offsets), one a channel; step: in units of 2^-`STEP_OF_Z_BITS`."""
        if step not in self._known:
            rows = [self._row(function, step) for function in self.cumulative]
            self._known[step] = [row for row, _ in rows], [offset for _, offset in rows]
        return self._known[step]

    @staticmethod
    def _row(function: np.ndarray, step: int) -> tuple[list[int], int]:
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
        return frequencies(chosen << (NORMAL_BITS - FACTORIZED_BITS)).tolist(), first - reach


def bottleneck_rows(cdf: Tensor, lengths: Tensor, offsets: Tensor) -> tuple[list[list[int]], list[int]]:
    """(cdfs, offsets), one a channel, from the tables that CompressAI's entropy bottleneck stores.

    Args:
        cdf: (channels, longest).
        lengths, offsets: (channels,).
    """
    rows = [row[:length] for row, length in zip(cdf.cpu().tolist(), lengths.cpu().tolist(), strict=True)]
    return rows, offsets.cpu().flatten().tolist()
