"""Weights and images by formula: the same on every machine and PyTorch version, for golden outputs."""

import torch
from torch import Tensor, nn


def fill_by_formula(model: nn.Module) -> nn.Module:
    """Every parameter but the quantiles from a sine of its indices, in the order of the names."""
    for order, (name, parameter) in enumerate(sorted(model.named_parameters())):
        if name.endswith("quantiles"):
            continue
        wave = torch.sin(1.7 * torch.arange(parameter.numel(), dtype=torch.float64) + order).reshape(
            parameter.shape
        )
        fan_in = parameter.numel() / parameter.shape[0]
        if ".norm" in name:
            wave = wave * 0.2 + (1 if name.endswith("weight") else 0)
        elif parameter.dim() > 1 and "entropy_bottleneck" not in name and "entropy_func" not in name:
            wave = wave * (2 / fan_in) ** 0.5
        else:
            wave = wave * 0.5
        with torch.no_grad():
            parameter.copy_(wave)
    return model.eval()


def image_by_formula(height: int, width: int) -> Tensor:
    """(1, 3, height, width) in 0..1."""
    index = torch.arange(3 * height * width, dtype=torch.float64)
    smooth = torch.sin(0.013 * index) + torch.sin(0.00031 * index**1.1)
    return (0.5 + 0.25 * smooth).float().reshape(1, 3, height, width)


def as_published(model: nn.Module) -> nn.Module:
    """The codec with CompressAI's estimate of the rate, that of round(y - means), which is not what a decoder
    can have."""
    model.gaussian_conditional.of_residual = True
    return model
