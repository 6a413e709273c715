"""What the float values of calibration are, channel by channel: their ends, their energy, a sample of
them."""

import torch
from torch import Tensor

from licq.quant.ranges import sample

_SAMPLES = 2**21
"""Values kept for the range estimators. What clips is rare, and an estimator that has not seen it clips too
much."""

_SAMPLES_OF_CHANNEL = 4096
"""At least so many of them for each channel."""


class RangeObserver:
    """Collects values of one tensor, channel by channel.

    low, high: (channels,), None before the first batch. squares: (channels,), sums of squares of `count`
    values.

    Args:
        keeps_samples: whether a range estimator will need values, not only the ends.
    """

    def __init__(self, keeps_samples: bool):
        self.keeps_samples = keeps_samples
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.squares: Tensor | None = None
        self.count = 0
        self._samples: list[Tensor] = []
        self._every = 1

    @property
    def channels(self) -> int:
        """How many there are; 0 before the first batch."""
        return 0 if self.low is None else len(self.low)

    def observe(self, rows: Tensor, ranges_only: bool = False) -> None:
        """Take a batch into account. rows: (channels, values). ranges_only: it does not count for the
        energy."""
        low, high = rows.amin(1), rows.amax(1)
        squares = torch.zeros_like(low) if ranges_only else rows.square().mean(1) * rows.shape[1]
        if self.low is None:
            self.low, self.high, self.squares = low, high, squares
        else:  # in place: small tensors of every batch would cut the heap into pieces, gigabytes of them
            torch.minimum(self.low, low, out=self.low)
            torch.maximum(self.high, high, out=self.high)
            self.squares.add_(squares)
        self.count += 0 if ranges_only else rows.shape[1]
        if self.keeps_samples:
            self._keep_some(rows)

    def _keep_some(self, rows: Tensor) -> None:
        """One value of `_every` from every batch alike; when they become too many, half of them go, and of
        all to come."""
        most = max(_SAMPLES // rows.shape[0], _SAMPLES_OF_CHANNEL)
        self._samples.append(sample(rows, max(1, rows.shape[1] // self._every)).clone())
        count = sum(part.shape[1] for part in self._samples)
        while count > most:
            count = -(-count // 2)
            self._samples = [sample(torch.cat(self._samples, dim=1), count)]
            self._every *= 2

    def merge_channels(self) -> None:
        """All channels as one."""
        if self.low is None:
            return
        self.count *= len(self.low)
        self.low = self.low.amin(0, keepdim=True)
        self.high = self.high.amax(0, keepdim=True)
        self.squares = self.squares.sum(0, keepdim=True)
        self._samples = [part.reshape(1, -1) for part in self._samples]

    def samples(self) -> Tensor | None:
        """(channels, values) for a range estimator; None where none were kept."""
        return torch.cat(self._samples, dim=1) if self._samples else None

    def energy(self) -> Tensor:
        """(channels,): mean squares."""
        return self.squares / max(self.count, 1)
