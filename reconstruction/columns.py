"""Which inputs a layer's weights are multiplied with: a convolution as a matrix product, at chosen positions.

A transposed convolution with a stride is several such products, one for each residue of its output positions.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from licq.quant.modules import QuantConvTranspose2d, QuantLinear, QuantMAC


@dataclasses.dataclass(frozen=True)
class Phase:
    """Taps of a kernel that meet the same output positions: all of them, or with a transposed convolution
    those of one residue of its stride, so that no two phases have a product in common.

    taps: along each axis of the kernel. first, step: the output positions that they meet on each axis, first
    + k step.
    """

    taps: tuple[Tensor, ...] = ()
    first: tuple[int, ...] = ()
    step: tuple[int, ...] = ()

    def weights(self, node: QuantMAC) -> Tensor:
        """Which columns of the layer's flattened canonical weights these are."""
        if isinstance(node, QuantLinear):
            return torch.arange(node.module.in_features)
        weights = torch.arange(node.float_weight().shape[1])
        for size, taps in zip(node.module.kernel_size, self.taps):
            weights = weights[..., None] * size + taps
        return weights.flatten()


def phases(node: QuantMAC) -> list[Phase]:
    """The phases of a layer. A linear layer has one without taps."""
    m = node.module
    if isinstance(node, QuantLinear):
        return [Phase()]
    taps = tuple(torch.arange(size) for size in m.kernel_size)
    if not isinstance(node, QuantConvTranspose2d):
        return [Phase(taps, (0,) * len(taps), (1,) * len(taps))]
    found = []
    for residues in itertools.product(*map(range, m.stride)):
        meet = [t[t * d % s == r] for t, d, s, r in zip(taps, m.dilation, m.stride, residues)]
        first = tuple((r - p) % s for r, p, s in zip(residues, m.padding, m.stride))
        if all(map(len, meet)):
            found.append(Phase(tuple(meet), first, tuple(m.stride)))
    return found


def output_size(node: QuantMAC, x: Tensor) -> tuple[int, ...]:
    """Lengths of a convolution's output along the axes of its kernel."""
    m = node.module
    size = []
    for axis, length in enumerate(x.shape[-len(m.kernel_size) :]):
        reach = m.dilation[axis] * (m.kernel_size[axis] - 1)
        if isinstance(node, QuantConvTranspose2d):
            size.append(
                (length - 1) * m.stride[axis] - 2 * m.padding[axis] + reach + m.output_padding[axis] + 1
            )
        else:
            size.append((length + sum(_padding(m, axis)) - reach - 1) // m.stride[axis] + 1)
    return tuple(size)


def _padding(module: nn.Conv2d | nn.Conv3d, axis: int) -> tuple[int, int]:
    """Zeros before and after the input. "same" has one more behind where their number is odd."""
    if module.padding == "valid":
        return 0, 0
    if module.padding == "same":
        both = module.dilation[axis] * (module.kernel_size[axis] - 1)
        return both // 2, both - both // 2
    return module.padding[axis], module.padding[axis]


def columns(node: QuantMAC, x: Tensor, phase: Phase, at: Sequence[Tensor]) -> Tensor:
    """What a phase's weights are multiplied with at n output positions, which must be the phase's.

    Args:
        x: (inputs, H, W), with as many axes more as the kernel has.
        at: the positions along each axis, (n,) each.

    Returns:
        (inputs * taps of the phase, n), in the order of `Phase.weights`.
    """
    m = node.module
    index, inside = (
        torch.zeros(len(at[0]), dtype=torch.long),
        torch.ones(len(at[0]), dtype=torch.bool),
    )  # (taps ..., n)
    for axis, outputs in enumerate(at):
        moved = (phase.taps[axis] * m.dilation[axis])[:, None]
        if isinstance(node, QuantConvTranspose2d):
            place = (outputs + m.padding[axis] - moved) // m.stride[axis]
        else:
            place = outputs * m.stride[axis] - _padding(m, axis)[0] + moved
        length = x.shape[axis + 1]
        inside = inside[..., None, :] & (place >= 0) & (place < length)
        index = index[..., None, :] * length + place.clamp(0, length - 1)
    found = x.flatten(1)[:, index.to(x.device)] * inside.to(x)
    return found.reshape(-1, len(at[0]))


