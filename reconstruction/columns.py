"""A convolution as a matrix product at chosen output positions: which inputs its weights are multiplied with.

A transposed convolution with a stride is several such products, one for each residue of its output positions.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from licq.quant.layers import QuantConvTranspose2d, QuantLinear
from licq.quant.mac import QuantMAC


@dataclasses.dataclass(frozen=True)
class Phase:
    """Taps of a kernel that meet the same output positions.

    A convolution has one phase with all taps. A transposed convolution has one for each residue of its
    stride, and no two phases have a product in common.
    """

    taps: tuple[Tensor, ...] = ()
    """Indices along each axis of the kernel."""

    first: tuple[int, ...] = ()
    """The first output position that the taps meet, on each axis."""

    step: tuple[int, ...] = ()
    """From one such position to the next, on each axis."""

    def weights(self, node: QuantMAC) -> Tensor:
        """Which columns of the layer's flattened canonical weights these are."""
        if isinstance(node, QuantLinear):
            return torch.arange(cast(nn.Linear, node.module).in_features)
        weights = torch.arange(node.float_weight().shape[1])
        for size, taps in zip(_convolution(node).kernel_size, self.taps):
            weights = weights[..., None] * size + taps
        return weights.flatten()


def phases(node: QuantMAC) -> list[Phase]:
    """The phases of a layer. A linear layer has one without taps."""
    if isinstance(node, QuantLinear):
        return [Phase()]
    m = _convolution(node)
    taps = tuple(torch.arange(size) for size in m.kernel_size)
    if not isinstance(node, QuantConvTranspose2d):
        return [Phase(taps, (0,) * len(taps), (1,) * len(taps))]
    result = []
    for residues in itertools.product(*map(range, m.stride)):
        meeting = [t[t * d % s == r] for t, d, s, r in zip(taps, m.dilation, m.stride, residues)]
        first = tuple((r - p) % s for r, p, s in zip(residues, cast(tuple[int, ...], m.padding), m.stride))
        if all(map(len, meeting)):
            result.append(Phase(tuple(meeting), first, tuple(m.stride)))
    return result


def _convolution(node: QuantMAC) -> nn.Conv2d:
    """The layer's own module; transposed and three-dimensional ones have the fields of a `Conv2d` too."""
    return cast(nn.Conv2d, node.module)


def output_size(node: QuantMAC, x: Tensor) -> tuple[int, ...]:
    """Lengths of a convolution's output along the axes of its kernel, for an input x (..., H, W)."""
    m = _convolution(node)
    size = []
    for axis, length in enumerate(x.shape[-len(m.kernel_size) :]):
        reach = m.dilation[axis] * (m.kernel_size[axis] - 1)
        if isinstance(node, QuantConvTranspose2d):
            size.append(
                (length - 1) * m.stride[axis] - sum(_padding(m, axis)) + reach + m.output_padding[axis] + 1
            )
        else:
            size.append((length + sum(_padding(m, axis)) - reach - 1) // m.stride[axis] + 1)
    return tuple(size)


def _padding(module: nn.Conv2d, axis: int) -> tuple[int, int]:
    """Zeros before and behind the input. "same" has one more behind where their number is odd."""
    if module.padding == "valid":
        return 0, 0
    if module.padding == "same":
        both = module.dilation[axis] * (module.kernel_size[axis] - 1)
        return both // 2, both - both // 2
    zeros = int(module.padding[axis])
    return zeros, zeros


def columns(node: QuantMAC, x: Tensor, phase: Phase, at: Sequence[Tensor]) -> Tensor:
    """What a phase's weights are multiplied with at n output positions, which must be the phase's.

    Args:
        x: (inputs, H, W), with as many axes more as the kernel has.
        at: the positions along each axis, (n,) each.

    Returns:
        (inputs * taps of the phase, n), in the order of `Phase.weights`.
    """
    m = _convolution(node)
    # (taps ..., n)
    index = torch.zeros(len(at[0]), dtype=torch.long)
    inside = torch.ones(len(at[0]), dtype=torch.bool)
    for axis, outputs in enumerate(at):
        moved = (phase.taps[axis] * m.dilation[axis])[:, None]
        if isinstance(node, QuantConvTranspose2d):
            position = (outputs + _padding(m, axis)[0] - moved) // m.stride[axis]
        else:
            position = outputs * m.stride[axis] - _padding(m, axis)[0] + moved
        length = x.shape[axis + 1]
        inside = inside[..., None, :] & (position >= 0) & (position < length)
        index = index[..., None, :] * length + position.clamp(0, length - 1)
    # on a CPU index_select is several times faster than x[:, index]
    values = x.flatten(1).index_select(1, index.flatten().to(x.device))
    if not inside.all():
        values.mul_(inside.flatten().to(x))
    return values.reshape(-1, len(at[0]))
