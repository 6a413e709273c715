"""The discretized densities of the entropy models as tables of integers.

They are made once, when a model is frozen, and saved with it. A scale's level is found by integer thresholds,
which lie in geometric order. The normal distribution function is a table. So coder and decoder compute with
integers, the same on every machine (design, section 4).
"""

import copy
import math
from typing import NamedTuple

import numpy as np
import torch
from compressai.entropy_models import EntropyBottleneck, EntropyBottleneckVbr
from scipy.special import ndtr
from torch import Tensor

from licq.quant.density_units import (
    FACTORIZED_BITS,
    INVERSE_BITS,
    LEVELS,
    NORMAL_BITS,
    POINT_BITS,
    REACH,
    STEP_BITS,
)
from licq.support.errors import InputError

SMALLEST, LARGEST = 0.11, 256.0  # standard deviations
"""CompressAI's bounds (`SCALES_MIN`, `SCALES_MAX`), between which it has 64 levels."""
FURTHEST = 64  # from the median
MOST_BINS = 2**14  # of a row of an entropy bottleneck


class DensityTables(NamedTuple):
    """Tables of a Gaussian conditional, all int64.

    thresholds: (LEVELS - 1,), in units of 2^-boundary_bits. A scale has level i where i thresholds are at
    most it.
    inverses: (LEVELS,), round(2^20 / scale of the level).
    normal: (REACH 2^8 + 1,), round(2^30 Phi(t)) for t = 0, 2^-8 .. REACH.
    """

    thresholds: Tensor
    inverses: Tensor
    normal: Tensor


class BottleneckTables(NamedTuple):
    """Tables of an entropy bottleneck as CompressAI's coder takes them, all int32.

    cdf: (channels, longest), cumulative frequencies from 0 to 2^16; rows are filled up with zeros.
    lengths: (channels,), entries of a row that count.
    offsets: (channels,), the integer of a row's first bin, relative to the median.
    """

    cdf: Tensor
    lengths: Tensor
    offsets: Tensor

    def differ(self, other: "BottleneckTables", counts: int = 4) -> bool:
        """Whether rows reach elsewhere, or frequencies differ by more than rounding does between machines.

        Args:
            counts: cumulative frequencies differ by up to so many.
        """
        if self.cdf.shape != other.cdf.shape or any(
            a.shape != b.shape or not torch.equal(a.long().cpu(), b.long().cpu())
            for a, b in zip(self[1:], other[1:])
        ):
            return True
        rows = torch.arange(self.cdf.shape[1]) < self.lengths.cpu()[:, None]
        change = (self.cdf.long().cpu() - other.cdf.long().cpu()).abs() * rows
        return bool((change > counts).any())


def density_tables(boundary_bits: int, smallest: float = SMALLEST) -> DensityTables:
    """Tables for scales on the grid of 2^-boundary_bits; scales below `smallest`, or a 32nd, count as it."""
    smallest = max(smallest, 1 / 32)
    scales = np.exp(np.linspace(math.log(smallest), math.log(LARGEST), LEVELS))
    thresholds = np.round(np.sqrt(scales[1:] * scales[:-1]) * 2**boundary_bits)
    normal = np.round(ndtr(np.arange(REACH * 2**STEP_BITS + 1) / 2**STEP_BITS) * 2**NORMAL_BITS)
    return DensityTables(
        *(
            torch.from_numpy(part.astype(np.int64))
            for part in (thresholds, np.round(2**INVERSE_BITS / scales), normal)
        )
    )


@torch.no_grad()
def factorized_table(bottleneck: EntropyBottleneck | EntropyBottleneckVbr, medians: Tensor) -> Tensor:
    """round(2^20 F(x)) of each channel of z at x = median + t 2^-3, t from -T to T: (channels, 2 T + 1),
    int64.

    T: where all but 2^-17 of every channel lies inside, at most 64 2^3. medians: (channels,).
    """
    exact = copy.deepcopy(bottleneck).double()
    middle = FURTHEST << POINT_BITS
    points = torch.arange(-middle, middle + 1, dtype=torch.float64) / 2**POINT_BITS
    x = medians.double().cpu()[:, None, None] + points
    cumulative = torch.sigmoid(exact.cpu()._logits_cumulative(x, stop_gradient=True))[:, 0].cummax(1).values
    inside = ((cumulative > 2.0**-17) & (cumulative < 1 - 2.0**-17)).any(0).nonzero().flatten()
    reach = int((inside - middle).abs().max()) + 1 if len(inside) else 1
    reach = min(reach, middle)
    return (cumulative[:, middle - reach : middle + reach + 1] * 2**FACTORIZED_BITS).round().long()


@torch.no_grad()
def bottleneck_tables(bottleneck: EntropyBottleneck) -> BottleneckTables:
    """The tables that CompressAI's `update(force=True)` makes of the densities, computed on the CPU. Tables
    that the bottleneck has, and an `update` of its own, do not count.

    Raises:
        InputError: the densities are no numbers, or reach over more than `MOST_BINS` integers.
    """
    exact = copy.deepcopy(bottleneck).cpu()
    parameters = (exact.quantiles, *exact.matrices, *exact.biases, *exact.factors)
    if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
        raise InputError(
            "the parameters of its densities are not finite; its training has diverged, give another "
            "checkpoint"
        )
    span = float(exact.quantiles[:, 0].diff().clamp(min=0).ceil().sum(1).max()) + 3
    if span > MOST_BINS:
        raise InputError(
            f"its quantiles are {span:.0f} integers apart, of which {MOST_BINS} fit into a table; train them "
            "with CompressAI's aux_loss()"
        )
    EntropyBottleneck.update(exact, force=True)
    return BottleneckTables(exact._quantized_cdf, exact._cdf_length.int(), exact._offset.int())
