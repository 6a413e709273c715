"""How the scales of a layer's input channels spread, and how its output channels share scales.

An input channel's scale s_x[k] is at least what its range asks; the weights take over the spread, w'[o, k] =
w[o, k] s_x[k] / s_ref. So every method that moves difficulty between activations and weights of one layer is
a choice of s_x. Each function here gives ln N of the layer's input grid, (inputs,).
"""

from typing import Protocol

import torch
from torch import Tensor

from licq.quant.config import QuantConfig
from licq.quant.fixedpoint import int_range
from licq.quant.quantizer import Quantizer

FACTORS = 3
"""FQ-ViT's K: the smallest scale is 2^-3 of the largest."""


class FoldedLayer(Protocol):
    """What a choice of scales asks of a layer; `quant.mac.QuantMAC` is one."""

    config: QuantConfig
    input_grid: Quantizer

    @property
    def groups(self) -> int: ...

    def float_weight(self) -> Tensor:
        """(outputs, inputs / groups, ...)"""
        ...

    def per_input(self, values: Tensor, weight: Tensor) -> Tensor:
        """A vector over input channels, shaped to broadcast against a weight."""
        ...


def equalized(node: FoldedLayer) -> Tensor:
    """s_x[k] = s (r_k / r_max)^alpha with the least predicted noise at the output, uniform errors assumed.

    The inputs' s_x[k]^2 / 12 through the squared weights, the weights' s_w[o]^2 / 12 through the inputs' mean
    squares. alpha 0 is one scale for the tensor, 1 the full fold.
    """
    grid = node.input_grid
    weight = node.float_weight()
    start = grid.log_n.clone()
    scale_full = grid.parameters_of_grid()[0]
    per_input = weight.square().flatten(2).sum(2) if weight.ndim > 2 else weight.square()
    qmax = int_range(node.config.w_bits)[1]
    best, best_noise = start, None
    for alpha in torch.linspace(0, 1, 11).tolist():
        scale = scale_full.max() * (scale_full / scale_full.max()) ** alpha
        spread = node.per_input(scale, per_input)
        noise_inputs = (spread**2 * per_input).sum()
        folded = node.float_weight().abs() * node.per_input(scale, weight)
        step = folded.flatten(1).amax(1) / qmax
        taps = weight[0, 0].numel() if weight.ndim > 2 else 1
        energy = node.per_input((grid.energy / scale**2), per_input)
        noise_weights = (step[:, None] ** 2 * energy * taps).sum()
        noise = noise_inputs + noise_weights
        if best_noise is None or noise < best_noise:
            best_noise, best = noise, start + torch.log(scale / scale_full).to(start)
    return best


def smoothed(node: FoldedLayer) -> Tensor:
    """SmoothQuant (Xiao et al. 2023, eq. 4): x_k / m_k has one scale, m_k = max|x_k|^alpha / max|w_k|^(1 -
    alpha)."""
    grid, weight, alpha = node.input_grid, node.float_weight(), node.config.smooth_alpha
    scale_full = grid.parameters_of_grid()[0]
    largest = (
        weight.abs().flatten(2).amax(2) if weight.ndim > 2 else weight.abs()
    )  # (outputs, inputs / groups)
    largest = largest.reshape(node.groups, -1, largest.shape[1]).amax(1).flatten().double()
    largest = largest.clamp(min=float(largest.max().clamp(min=1e-12)) * 1e-5)
    moved = scale_full**alpha / largest ** (1 - alpha)
    scale = moved * (scale_full / moved).max()
    return grid.log_n + torch.log(scale / scale_full).to(grid.log_n)


def power_of_two_factors(node: FoldedLayer) -> Tensor:
    """FQ-ViT's power-of-two factor (Lin et al. 2022, eq. 9): s_x[k] = s 2^-a_k, a_k from 0 to 3, none below
    the channel's own range."""
    grid = node.input_grid
    scale_full = grid.parameters_of_grid()[0]
    largest = scale_full.max()
    factor = torch.exp2(-torch.floor(torch.log2(largest / scale_full)).clamp(0, FACTORS))
    return grid.log_n + torch.log(largest * factor / scale_full).to(grid.log_n)


TRANSFORMS = {"equalize": equalized, "smooth": smoothed, "ptf": power_of_two_factors}
"""By the name of `QuantConfig.transform`; "fold" leaves every channel its own range."""


def range_groups(ranges: Tensor, count: int) -> Tensor:
    """(outputs,) int64: the group of each output channel, 0 for the smallest ranges.

    Channels in order of their ranges are cut into at most `count` groups such that the bits that channels
    lose by their group's scale, sum log2(largest range of the group / range of the channel), are fewest. The
    cut is optimal, by dynamic programming.
    """
    order = torch.argsort(ranges, stable=True)
    bits = torch.log2(ranges[order].double().clamp(min=1e-12)).tolist()
    size = len(bits)
    total = [0.0]
    for value in bits:
        total.append(total[-1] + value)
    min_lost = [[0.0] + [float("inf")] * size]
    begins: list[list[int]] = []
    for _ in range(min(count, size)):
        row, begin = [float("inf")] * (size + 1), [0] * (size + 1)
        for end in range(1, size + 1):
            for start in range(end):
                lost = min_lost[-1][start] + (end - start) * bits[end - 1] - (total[end] - total[start])
                if lost < row[end] - 1e-12:
                    row[end], begin[end] = lost, start
        row[0] = 0.0
        min_lost.append(row)
        begins.append(begin)
    groups = torch.zeros(size, dtype=torch.int64)
    end = size
    for number in reversed(range(len(begins))):
        groups[begins[number][end] : end] = number
        end = begins[number][end]
    group_of_channel = torch.empty_like(groups)
    group_of_channel[order.cpu()] = torch.unique(groups, return_inverse=True)[1]
    return group_of_channel.to(ranges.device)
