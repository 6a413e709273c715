"""Cumulative frequencies of symbols, in the form that CompressAI's rANS coder takes, by whole-number
arithmetic alone.

A row is a distribution of whole numbers from `offset` on: cumulative frequencies of 16 bits, the last one for
every number outside (which the coder then writes out).
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

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
_TAIL = 44  # tenths of standard deviations that a row reaches to; outside is 2^-16.5
_FINE = 16  # steps of the mean per standard deviation; costs 2e-4 bits a symbol
_MOST_STEPS = 7  # bits of the steps of a mean between two whole numbers


@dataclass(frozen=True)
class Rows:
    """Distributions of a run of symbols: `cdfs[rows[i]]` is that of symbol i, less `base[i]`."""

    rows: np.ndarray
    base: np.ndarray
    cdfs: list[list[int]]
    offsets: list[int]

    @property
    def sizes(self) -> list[int]:
        return [len(cdf) for cdf in self.cdfs]


class GaussianRows:
    """Discretized Gaussians by level of the scale and, where the symbols are not differences from the mean,
    the mean's fraction.

    Args:
        tables: those of the model.
        boundary_bits: scales and means are whole numbers of 2^-boundary_bits.
    """

    def __init__(self, tables: DensityTables, boundary_bits: int):
        self.thresholds, self.inverses, self.normal = (part.cpu().numpy() for part in tables)
        self.boundary_bits = boundary_bits
        one = 1 << INVERSE_BITS
        inverses = self.inverses.tolist()
        self.reach = [
            (2 * _TAIL * one + 30 * inverse) // (20 * inverse) for inverse in inverses
        ]  # that many deviations and 1.5
        most = min(_MOST_STEPS, boundary_bits)
        self.steps = [
            min(max(0, (_FINE * inverse - 1).bit_length() - INVERSE_BITS), most) for inverse in inverses
        ]
        self._rows: dict[tuple[int, int], list[int]] = {}

    def of(self, scales: Tensor, means: Tensor | None = None) -> Rows:
        """scales, means: whole numbers of one shape; without means, of symbols that are differences from
        them."""
        level = np.searchsorted(self.thresholds, scales.flatten().numpy(), side="right")
        if means is None:
            fraction = base = np.zeros(len(level), dtype=np.int64)
        else:
            base, fraction = self._split(means.flatten().numpy().astype(np.int64), level)
        keys, rows = np.unique((level << _MOST_STEPS) + fraction, return_inverse=True)
        pairs = [(int(key) >> _MOST_STEPS, int(key) & ((1 << _MOST_STEPS) - 1)) for key in keys]
        return Rows(
            rows, base, [self._row(*pair) for pair in pairs], [-self.reach[level] for level, _ in pairs]
        )

    def _split(self, means: np.ndarray, level: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A mean as a whole number and a count of its level's steps."""
        steps = np.asarray(self.steps)[level]
        rest = self.boundary_bits - steps
        near = (means + ((1 << rest) >> 1)) >> rest
        return near >> steps, near & ((1 << steps) - 1)

    def _row(self, level: int, fraction: int) -> list[int]:
        key = (level, fraction)
        if key not in self._rows:
            reach, steps = self.reach[level], self.steps[level]
            edges = (
                np.arange(-reach, reach + 3) * 2 - 1
            )  # halves; one more bin on the right, where the mean is
            distance = (edges << steps) - 2 * fraction  # in 2^-(steps + 1)
            self._rows[key] = frequencies(
                phi(distance * int(self.inverses[level]), steps + 1, self.normal)
            ).tolist()
        return self._rows[key]


def phi(distance: np.ndarray, bits: int, normal: np.ndarray) -> np.ndarray:
    """2^30 Phi(t) for t = distance 2^-(20 + bits), by linear interpolation of the table; whole numbers
    throughout."""
    size = np.abs(distance)
    fine = INVERSE_BITS + bits - STEP_BITS  # bits of what lies between two entries
    place = np.minimum(size >> fine, REACH << STEP_BITS)
    below, above = normal[place], normal[np.minimum(place + 1, REACH << STEP_BITS)]
    rest = (size & ((1 << fine) - 1)) >> max(0, fine - 24)
    value = below + (((above - below) * rest) >> min(fine, 24))
    return np.where(distance < 0, (1 << NORMAL_BITS) - value, value)


def frequencies(cumulative: np.ndarray) -> np.ndarray:
    """16-bit cumulative frequencies from those at the edges of the bins (..., edges), of 2^30 together; every
    bin gets one at least."""
    bins = cumulative.shape[-1]  # with that of everything outside
    share = cumulative - cumulative[..., :1]
    counted = np.arange(bins) + ((share * ((1 << PRECISION) - bins)) >> NORMAL_BITS)
    return np.concatenate((counted, np.full((*counted.shape[:-1], 1), 1 << PRECISION)), -1)


class MixtureRows:
    """Mixtures of discretized Gaussians, a row for each symbol.

    Args:
        count: components.
    """

    def __init__(self, tables: DensityTables, boundary_bits: int, count: int):
        self.gaussians = GaussianRows(tables, boundary_bits)
        self.count = count

    def of(self, scales: Tensor, means: Tensor, weights: Tensor) -> Rows:
        """scales, means, weights: whole numbers (components, symbols)."""
        one = self.gaussians
        scales, means, weights = (
            part.reshape(self.count, -1).numpy().astype(np.int64) for part in (scales, means, weights)
        )
        level = np.searchsorted(one.thresholds, scales, side="right")
        reach = np.asarray(one.reach)[level]
        whole = means >> one.boundary_bits
        lowest = np.where(weights > 0, whole - reach, np.iinfo(np.int64).max).min(0)
        highest = np.where(weights > 0, whole + reach + 1, np.iinfo(np.int64).min).max(0)
        none = weights.sum(0) <= 0
        lowest, highest = np.where(none, 0, lowest), np.where(none, 0, highest)
        bins = np.minimum(highest - lowest + 1, _MOST_BINS)
        cdfs: list[list[int]] = [[]] * scales.shape[1]
        for size in np.unique(bins):
            chosen = np.flatnonzero(bins == size)
            edges = 2 * (lowest[chosen, None] + np.arange(size + 1)) - 1
            total = np.maximum(weights[:, chosen].sum(0), 1)
            summed = np.zeros(edges.shape, dtype=np.int64)
            for part in range(self.count):
                distance = (edges << one.boundary_bits) - 2 * means[part, chosen, None]
                summed += (
                    phi(distance * one.inverses[level[part, chosen], None], one.boundary_bits + 1, one.normal)
                    * weights[part, chosen, None]
                )
            rows = frequencies(summed // total[:, None]).tolist()
            for place, row in zip(chosen.tolist(), rows):
                cdfs[place] = row
        return Rows(np.arange(len(cdfs)), lowest, cdfs, [0] * len(cdfs))


_MOST_BINS = 2048


STEP_OF_Z_BITS = 16


class SteppedRows:
    """Factorized densities of z, whose symbols stand for numbers a step apart; any step, from distribution
    functions at fixed points.

    Args:
        cumulative: `quant.density.factorized_table`, (channels, points).
    """

    def __init__(self, cumulative: Tensor):
        self.cumulative = cumulative.cpu().numpy().astype(np.int64)
        self._known: dict[int, tuple[list[list[int]], list[int]]] = {}

    def of(self, step: int) -> tuple[list[list[int]], list[int]]:
        """(cdfs, offsets) by channel; step: in 2^-16."""
        if step not in self._known:
            found = [self._row(function, step) for function in self.cumulative]
            self._known[step] = [row for row, _ in found], [offset for _, offset in found]
        return self._known[step]

    @staticmethod
    def _row(function: np.ndarray, step: int) -> tuple[list[int], int]:
        middle, fine = len(function) // 2, STEP_OF_Z_BITS + 1 - POINT_BITS  # edges are halves of steps
        reach = (middle << fine) // (2 * step) + 1
        edges = (2 * np.arange(-reach, reach + 2) - 1) * step + (middle << fine)
        edges = np.clip(edges, 0, ((len(function) - 1) << fine) - 1)
        place, rest = edges >> fine, edges & ((1 << fine) - 1)
        values = function[place] + (((function[place + 1] - function[place]) * rest) >> fine)
        least = 1 << (
            FACTORIZED_BITS - PRECISION
        )  # a bin with less before or behind it is left to the escape
        first = int(np.argmax(values[1:] > least)) if (values[1:] > least).any() else reach
        last = len(values) - 2 - int(np.argmax(values[-2::-1] < (1 << FACTORIZED_BITS) - least))
        chosen = values[first : max(last, first) + 2]
        return frequencies(chosen << (NORMAL_BITS - FACTORIZED_BITS)).tolist(), first - reach


def bottleneck_rows(cdf: Tensor, lengths: Tensor, offsets: Tensor) -> tuple[list[list[int]], list[int]]:
    """(cdfs, offsets) of CompressAI's stored tables: (channels, longest), (channels,), (channels,)."""
    table = cdf.cpu().tolist()
    return [
        row[:length] for row, length in zip(table, lengths.cpu().tolist(), strict=True)
    ], offsets.cpu().flatten().tolist()
