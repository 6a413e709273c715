"""Calibration crops made harder: what a few photographs do not show, the ranges must hold all the same."""

import torch
from torch import Tensor

SATURATION = 2.5


def stressed(crops: Tensor) -> Tensor:
    """The crops with strong colours, and these with their channels rotated: (3 n, 3, H, W) 8-bit samples in 0..1.

    Ten photographs are mostly grey and green: channels that speak for colour clip on red parrots (Kodak 23) when their
    ranges come from such crops alone.
    """
    grey = crops.mean(1, keepdim=True)
    strong = (grey + (crops - grey) * SATURATION).clamp(0, 1)
    rotated = [strong, strong[:, [1, 2, 0]], strong[:, [2, 0, 1]]]
    return torch.round(torch.cat(rotated) * 255) / 255
