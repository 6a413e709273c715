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

SMALLEST, LARGEST = 0.11, 256.0  # standard deviations
"""CompressAI's bounds (`SCALES_MIN`, `SCALES_MAX`), between which it has 64 levels."""
FURTHEST = 64  # from the median


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
