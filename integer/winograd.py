"""Which convolutions run through Winograd's F(4x4, 3x3), and their transformed weights; `winograd.c` has the
algorithm."""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from licq.quant import operations as ops

BLOCK = 16
_POSITIONS = 36
_TILE = 4
_WINDOW = 3

# Lavin and Gray's G, with rows times 4, 6, 6, 24, 24, 1: whole numbers.
_G = torch.tensor(
    [[1, 0, 0], [-1, -1, -1], [-1, 1, -1], [1, 2, 4], [1, -2, 4], [0, 0, 1]], dtype=torch.float64
)

_LARGEST_INPUT = (2**15 - 1) // 100  # B' d B sums at most 10 * 10 numbers
_LARGEST_WEIGHT = (2**15 - 1) // 49  # G g G', 7 * 7
_LARGEST_SUM = 2**25 - 1  # 64 y must fit in 32 bits
_GAIN = 0.7
"""It is used where it leaves at most this share of the multiplications; the transforms take time, too."""


@dataclass(frozen=True)
class Windows:
    """A convolution as one by 3x3 windows, from phases of the input to phases of the output.

    weight: (out_phases, outputs, in_phases, inputs, 3, 3). first: where the windows' first taps lie relative
    to the output.
    parts: the phases of the input, in lists whose sums of products stay below 2^25.
    """

    weight: Tensor
    stride: int
    spread: int
    first: tuple[int, int]
    parts: list[list[int]]


def _taps(conv: ops.Convolution, axis: int) -> list[tuple[int, int, int, int]]:
    """(phase of the output, phase of the input, offset in it, place in the kernel) along one axis."""
    stride, pad, dilation = conv.stride[axis], conv.pads[axis], conv.dilation[axis]
    size = conv.weight.shape[2 + axis]
    if isinstance(conv, ops.Conv2d):
        return [
            (0, place % stride, place // stride, k) for k in range(size) for place in (k * dilation - pad,)
        ]
    places = [(phase, phase + pad - k * dilation, k) for phase in range(stride) for k in range(size)]
    return [(phase, 0, place // stride, k) for phase, place, k in places if place % stride == 0]


def _used(taps: list[tuple[int, int, int, int]], first: int) -> dict[tuple[int, int], int]:
    """How many of the six products along an axis the window of two phases needs."""
    there: dict[tuple[int, int], set[int]] = {}
    for a, b, offset, _ in taps:
        there.setdefault((a, b), set()).add(offset - first)
    return {phases: 6 - (0 not in places) - (2 not in places) for phases, places in there.items()}


def windows(conv: ops.MultiplyAccumulate, largest_input: int, shape: tuple[int, ...]) -> Windows | None:
    """The windows of a convolution, None where it does not pay or may leave the range in which it is exact.

    shape: of the result, (batch, channels, height, width).
    """
    if not isinstance(conv, (ops.Conv2d, ops.ConvTranspose2d)) or conv.stride[0] != conv.stride[1]:
        return None
    weight, stride = conv.weight, conv.stride
    if largest_input > _LARGEST_INPUT or int(weight.to(torch.int64).abs().max()) > _LARGEST_WEIGHT:
        return None
    axes, first = [_taps(conv, axis) for axis in (0, 1)], []
    for taps in axes:
        offsets = [offset for _, _, offset, _ in taps]
        places = range(max(offsets) - _WINDOW + 1, min(offsets) + 1)
        if not places:
            return None
        first.append(min(places, key=lambda place: sum(_used(taps, place).values())))
    spread, stride = (1, stride[0]) if isinstance(conv, ops.Conv2d) else (stride[0], 1)
    count = [sum(_used(taps, place).values()) for taps, place in zip(axes, first)]
    padded = [-(-size // (spread * _TILE)) * spread * _TILE / size for size in shape[2:]]
    if count[0] * count[1] / _TILE**2 * padded[0] * padded[1] > _GAIN * len(axes[0]) * len(axes[1]):
        return None
    made = torch.zeros(
        spread**2, weight.shape[0], stride**2, weight.shape[1], _WINDOW, _WINDOW, dtype=torch.int64
    )
    for (a, b, y, ky), (c, d, x, kx) in product(*axes):
        made[a * spread + c, :, b * stride + d, :, y - first[0], x - first[1]] = weight[:, :, ky, kx].to(
            torch.int64
        )
    parts = _parts(made.abs().sum((3, 4, 5)).flatten(0, 1) * largest_input)
    return None if parts is None else Windows(made, stride, spread, (first[0], first[1]), parts)


def _parts(largest: Tensor) -> list[list[int]] | None:
    """Phases, each put into the first part that has room for it; largest: (outputs, phases), of their
    sums."""
    parts: list[list[int]] = []
    for phase in largest.amax(0).argsort(descending=True).tolist():
        part = next(
            (part for part in parts if int(largest[:, [*part, phase]].sum(1).max()) <= _LARGEST_SUM), None
        )
        if part is not None:
            part.append(phase)
        elif int(largest[:, phase].max()) <= _LARGEST_SUM:
            parts.append([phase])
        else:
            return None
    return parts


def winograd_weights(found: Windows) -> tuple[Tensor, Tensor, Tensor]:
    """Transformed weights in the kernel's order, where each block of outputs at each position begins, and its
    input phases.

    weights: int16, for every part, block of 16 (out_phase, output), position, and input phase with weights
    there: (pairs of inputs, 16, 2).
    starts: (parts, blocks, 36), in bytes. phases: (parts, blocks, 36, in_phases + 1), their number and which.
    """
    out_phases, outputs, in_phases, inputs = found.weight.shape[:4]
    blocks, pairs = -(-out_phases * outputs // BLOCK), -(-inputs // 2)
    full = torch.zeros(blocks * BLOCK, in_phases, pairs * 2, _POSITIONS, dtype=torch.int16)
    transformed = _G @ found.weight.double() @ _G.T
    full[: out_phases * outputs, :, :inputs] = transformed.to(torch.int16).reshape(
        -1, in_phases, inputs, _POSITIONS
    )
    ordered = (
        full.reshape(blocks, BLOCK, in_phases, pairs, 2, _POSITIONS).permute(0, 5, 2, 3, 1, 4).contiguous()
    )
    there = (ordered != 0).flatten(3).any(-1)
    weights, phases = [], torch.zeros(len(found.parts), blocks, _POSITIONS, in_phases + 1, dtype=torch.int32)
    for part, members in enumerate(found.parts):
        chosen = there & torch.isin(torch.arange(in_phases), torch.tensor(members))
        weights.append(ordered[chosen])
        phases[part, ..., 0] = chosen.sum(-1)
        phases[part, ..., 1:] = (~chosen).to(torch.int8).argsort(dim=-1, stable=True)
    number = phases[..., 0].flatten().to(torch.int64)
    starts = (number.cumsum(0) - number) * (pairs * BLOCK * 4)
    return torch.cat(weights), starts.contiguous(), phases
