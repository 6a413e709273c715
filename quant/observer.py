"""Range observers: the ends, the energy and a sample of a tensor's float values in calibration."""

import torch
from torch import Tensor

from licq.quant.ranges import sample

_SAMPLES = 2**21
"""How many values the range estimators get. Large values are rare, and an estimator that has not seen them
clips too much."""

_SAMPLES_OF_CHANNEL = 4096
"""How many values of each channel the range estimators get at least."""


class RangeObserver:
    """Collects values of one tensor, channel by channel.

    low, high: (channels,), None before the first batch.

    Args:
        keeps_samples: whether a range estimator will need values, not only the ends.
    """

    def __init__(self, keeps_samples: bool):
        self.keeps_samples = keeps_samples
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self._squares: Tensor | None = None
        self.count = 0
        self._samples: list[Tensor] = []
        self._every = 1

    @property
    def channels(self) -> int:
        """How many channels there are; 0 before the first batch."""
        return 0 if self.low is None else len(self.low)

    def observe(self, rows: Tensor, ranges_only: bool = False) -> None:
        """Take a batch into account.

        Args:
            rows: (channels, values).
            ranges_only: the batch counts for the ends alone. Where a range estimator needs samples, it does
                not count at all: the estimator clips on purpose, and what it clips is the method's choice.
        """
        if ranges_only and self.keeps_samples:
            return
        squares = rows.square().mean(1) * rows.shape[1]
        self.observe_ends(rows.amin(1), rows.amax(1), squares, rows.shape[1], ranges_only)
        if self.keeps_samples:
            self._add_samples(rows)

    def observe_ends(self, low: Tensor, high: Tensor, squares: Tensor, count: int, ranges_only: bool) -> None:
        """Take a batch into account of which no samples are kept.

        Args:
            low, high, squares: (channels,): smallest and largest value, sum of squares.
            count: values of a channel.
        """
        squares = torch.zeros_like(low) if ranges_only else squares
        if self.low is None or self.high is None or self._squares is None:
            self.low, self.high, self._squares = low, high, squares
        else:  # in place: small tensors of every batch would cut the heap into pieces, gigabytes of them
            torch.minimum(self.low, low, out=self.low)
            torch.maximum(self.high, high, out=self.high)
            self._squares.add_(squares)
        self.count += 0 if ranges_only else count

    def _add_samples(self, rows: Tensor) -> None:
        """Take one value in `_every` of a batch. When there are too many, half of them are removed, and
        `_every` doubles."""
        max_count = max(_SAMPLES // rows.shape[0], _SAMPLES_OF_CHANNEL)
        self._samples.append(sample(rows, max(1, rows.shape[1] // self._every)).clone())
        count = sum(part.shape[1] for part in self._samples)
        while count > max_count:
            count = -(-count // 2)
            self._samples = [sample(torch.cat(self._samples, dim=1), count)]
            self._every *= 2

    def merge_channels(self) -> None:
        """Count all channels as one."""
        if self.low is None or self.high is None or self._squares is None:
            return
        self.count *= len(self.low)
        self.low = self.low.amin(0, keepdim=True)
        self.high = self.high.amax(0, keepdim=True)
        self._squares = self._squares.sum(0, keepdim=True)
        self._samples = [part.reshape(1, -1) for part in self._samples]

    def samples(self) -> Tensor | None:
        """(channels, values) for a range estimator; None where no samples were taken."""
        return torch.cat(self._samples, dim=1) if self._samples else None

    def energy(self) -> Tensor:
        """(channels,): mean squares. Not before the first batch."""
        assert self._squares is not None
        return self._squares / max(self.count, 1)
