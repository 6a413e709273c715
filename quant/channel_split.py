"""Channel splitting: input channels that are carried by two digits of b bits each.

A split channel has smaller steps and reaches further than the others of its grid. A kernel sees the other
channels, the high digits and the low digits (without a sign), all with the same weights, and adds the three
accumulators with two shifts.
"""

import torch
from torch import Tensor

SECOND_DIGIT = 6
"""Bits at most that a split channel has more: enough, and accumulators stay inside 32 bits."""


def split_shares(bits: int) -> tuple[int, int]:
    """(how much finer the steps of a split channel are, how much further it reaches): 16 and 4 from 6 bits,
    less below.

    A second digit adds at most `bits` bits, of which a third goes to the range.
    """
    more = min(SECOND_DIGIT, bits)
    reach = more // 3
    return 2 ** (more - reach), 2**reach


def split_steps(channels: Tensor, bits: int) -> Tensor | None:
    """(channels,): how many steps of a channel are one of the grid's scale; None where no channel is split.

    channels: bool, those to split.
    """
    finer, _ = split_shares(bits)
    return torch.where(channels, float(finer), 1.0) if channels.any() else None


def more_steps(steps: Tensor | None, bits: int) -> Tensor | float:
    """How many steps a channel has, times those of a channel that is not split. steps: of `split_steps`."""
    if steps is None:
        return 1.0
    return torch.where(steps > 1, steps * split_shares(bits)[1], 1.0)
