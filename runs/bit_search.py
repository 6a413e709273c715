"""The cheapest allocation of bits whose BD-rate stays below a limit.

Measured losses of single layers give, for any predicted loss, the cheapest allocation
(`reconstruction.mixed_precision`). How far that may go is found in two loops. The inner one bisects the
predicted loss until the prepared codecs, all layers quantized and nothing learned yet, lose on the
calibration crops what is aimed at, as rate: at equal slope a rise of J by so many bits per pixel is a rise of
the rate by as many. The outer one quantizes with learning, measures the BD-rate on the evaluation images, and
corrects the aim by what learning and other images make of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from licq.quant.bits import Bits
from licq.reconstruction.mixed_precision import Budget, Layer, allocate, totals

ROUNDS = 3  # of quantizing every quality
STEPS = 6  # of bisecting
NEAR = 0.8  # of the limit: no more is tried
_AIM = 0.9  # what a corrected aim is of the one that would meet the limit
_MAX_MOVE = 4.0  # factor by which an aim moves at once


@dataclass(frozen=True)
class Attempt:
    """One round of quantizing all qualities.

    number:            of the round, from 1.
    bits:              of the layers of each quality.
    bd_rate:           in percent, None where the curves have none.
    cost:              summed over the qualities, in the unit of `BdRateSearch.minimized`.
    predicted_percent: predicted loss, in percent of the rate.
    start_percent:     what the prepared codecs lose before learning, in percent of the rate.
    """

    number: int
    bits: tuple[Bits, ...]
    bd_rate: float | None
    cost: float
    predicted_percent: float
    start_percent: float

    def stays_below(self, limit: float) -> bool:
        return self.bd_rate is not None and self.bd_rate <= limit


class BdRateSearch:
    """Rounds of quantizing with ever better predicted bits.

    Args:
        layers: of each quality, with measured losses.
        bpp: of each quality's float codec, on the calibration crops.
        start_loss: (index of the quality, its bits) -> rise of J of the prepared codec, in bits per pixel.
        quantize: (number of the round, bits of each quality) -> BD-rate in percent on the evaluation images,
            or None.
        minimized: "mean_bits" or "bops", what is to be small.
    """

    def __init__(
        self,
        layers: Sequence[Sequence[Layer]],
        bpp: Sequence[float],
        start_loss: Callable[[int, Bits], float],
        quantize: Callable[[int, list[Bits]], float | None],
        minimized: str,
    ):
        self.layers, self.bpp, self.minimized = layers, bpp, minimized
        self._start_loss, self._quantize = start_loss, quantize
        # predicted loss -> that of the prepared codecs, percent of the rate
        self._known: dict[float, float] = {}

    def run(self, limit: float) -> list[Attempt]:
        """All rounds; the choice is `chosen(attempts, limit)`."""
        percent, attempts = self.loosest(limit), []
        for number in range(1, ROUNDS + 1):
            bits = self.at(percent)
            if any(list(attempt.bits) == bits for attempt in attempts):
                break
            bd_rate = self._quantize(number, bits)
            cost = sum(
                getattr(totals(layers, of_codec), self.minimized)
                for layers, of_codec in zip(self.layers, bits)
            )
            attempts.append(Attempt(number, tuple(bits), bd_rate, cost, percent, self.start(percent)))
            if attempts[-1].stays_below(limit) and bd_rate is not None and bd_rate >= NEAR * limit:
                break
            if bd_rate is None:
                ratio = 1 / _MAX_MOVE
            else:
                ratio = _AIM * limit / bd_rate if bd_rate > 0 else _MAX_MOVE
            percent = self._corrected(percent, min(max(ratio, 1 / _MAX_MOVE), _MAX_MOVE))
        return attempts

    def _corrected(self, percent: float, ratio: float) -> float:
        """The predicted loss to try after this one, when the prepared codecs may lose `ratio` times what they
        lose now.

        Where that leads nowhere, as from a loss that is nothing or below, which few crops measure by chance,
        the prediction itself is multiplied, for it is never below nothing.
        """
        corrected = self.loosest(self.start(percent) * ratio)
        if corrected > percent if ratio > 1 else corrected < percent:
            return corrected
        low, high = self._ends()
        return min(max(percent * ratio, low), high)

    def at(self, percent: float) -> list[Bits]:
        """The cheapest allocations with a predicted loss of this many percent of the rate, or the smallest
        that there is."""
        allocations = []
        for layers, bpp in zip(self.layers, self.bpp):
            smallest = sum(min(layer.w_loss.values()) + min(layer.a_loss.values()) for layer in layers)
            budget = Budget(loss=max(percent / 100 * bpp, smallest))
            allocations.append(allocate(layers, budget, self.minimized))
        return allocations

    def start(self, percent: float) -> float:
        """What the prepared codecs lose with the allocations at this predicted loss, percent of the rate,
        mean over qualities."""
        if percent not in self._known:
            losses = [
                100 * self._start_loss(number, bits) / bpp
                for number, (bits, bpp) in enumerate(zip(self.at(percent), self.bpp))
            ]
            self._known[percent] = sum(losses) / len(losses)
        return self._known[percent]

    def loosest(self, aim: float) -> float:
        """The largest predicted loss, by bisection of its logarithm, at which the prepared codecs lose no
        more than `aim`."""
        low, high = self._ends()
        if self.start(low) > aim:
            return low
        if self.start(high) <= aim:
            return high
        for _ in range(STEPS):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if self.start(middle) <= aim else (low, middle)
        return low

    def _ends(self) -> tuple[float, float]:
        """Predicted losses of the most and of the fewest bits everywhere, percent of the rate."""
        ends = [
            [
                100 * sum(pick(layer.w_loss.values()) + pick(layer.a_loss.values()) for layer in layers) / bpp
                for layers, bpp in zip(self.layers, self.bpp)
            ]
            for pick in (min, max)
        ]
        return max(min(ends[0]), 1e-4), max(*ends[1], 2e-4)


def chosen(attempts: Sequence[Attempt], limit: float) -> Attempt:
    """The cheapest that stays below the limit, else the one with the lowest BD-rate."""
    below = [attempt for attempt in attempts if attempt.stays_below(limit)]
    if below:
        return min(below, key=lambda attempt: attempt.cost)
    return min(attempts, key=lambda attempt: float("inf") if attempt.bd_rate is None else attempt.bd_rate)
