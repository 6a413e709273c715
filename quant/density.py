"""The discretized Gaussians of the entropy model in whole numbers, made once when a model is frozen and saved with it.

Scales are told by whole-number thresholds (levels in geometric order), and the normal distribution function is a table: what
coder and decoder compute from them are whole numbers, the same on every machine (design, section 4).
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import ndtr
from torch import Tensor

LEVELS = 192
SMALLEST, LARGEST = 0.11, 256.0  # standard deviations
"""CompressAI's bounds (`SCALES_MIN`, `SCALES_MAX`), between which it has 64 levels."""
NORMAL_BITS = 30
STEP_BITS = 8  # the table has a value every 2^-8 standard deviations,
REACH = 8  # up to so many
INVERSE_BITS = 20


class DensityTables(NamedTuple):
    """thresholds: (LEVELS - 1,), on the boundaries' grid: a scale is of level i where i of them are not above it.
    inverses: (LEVELS,), round(2^20 / scale of the level). normal: (REACH 2^8 + 1,), round(2^30 Phi(t)) for t from 0 on.
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
    return DensityTables(*(torch.from_numpy(part.astype(np.int64)) for part in (thresholds, np.round(2**INVERSE_BITS / scales), normal)))
