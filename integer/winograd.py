"""Which convolutions run through Winograd's F(4x4, 3x3), and their transformed weights; `winograd.c` has the
algorithm."""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from licq.integer.groups import padding_of
from licq.integer.library import BLOCK, Winograd
from licq.quant import operations as ops

_POSITIONS = 36
_TILE = 4
_WINDOW = 3

# Lavin and Gray's G, with rows times 4, 6, 6, 24, 24, 1: integers.
_G = torch.tensor(
    [[1, 0, 0], [-1, -1, -1], [-1, 1, -1], [1, 2, 4], [1, -2, 4], [0, 0, 1]], dtype=torch.float32
)

_LARGEST_INPUT = (2**15 - 1) // 100  # B' d B sums at most 10 * 10 numbers
_LARGEST_WEIGHT = (2**15 - 1) // 49  # G g G', 7 * 7
_LARGEST_SUM = 2**25 - 1  # 64 y must fit in 32 bits
_GAIN = 0.7
"""It is used where it leaves at most this share of the multiplications; the transforms take time, too."""
_GAIN_OVER_BYTES = 0.4
"""The same beside 8-bit instructions, which make twice as many products at a time, on Intel processors too.
An EPYC with AVX-512 and VNNI needs 22.7 against 26.5 ms for 5x5 with stride 2, 192 -> 192, 64x96 outputs (a
share of 0.30), and 7.9 against 4.7 ms for 3x3 with stride 2, 128 -> 128 (0.56); no Intel one was at hand."""


@dataclass(frozen=True)
class Windows:
    """A convolution as one by 3x3 windows, from phases of the input to phases of the output.

    weight: (out_phases, outputs, in_phases, inputs, 3, 3).
    stride: of the convolution; in_phases is its square. spread: out_phases is its square.
    first: row and column of the windows' first taps relative to the output.
    parts: the phases of the input, in lists whose sums of products stay below 2^25.
    """

    weight: Tensor
    stride: int
    spread: int
    first: tuple[int, int]
    parts: list[list[int]]


def _taps(conv: ops.Convolution, axis: int) -> list[tuple[int, int, int, int]]:
    """(phase of the output, phase of the input, offset in it, position in the kernel) along one axis."""
    stride, pad, dilation = conv.stride[axis], padding_of(conv)[axis], conv.dilation[axis]
    size = conv.weight.shape[2 + axis]
    if isinstance(conv, ops.Conv2d):
        inputs = [(k * dilation - pad, k) for k in range(size)]
        return [(0, x % stride, x // stride, k) for x, k in inputs]
    outputs = [(phase, phase + pad - k * dilation, k) for phase in range(stride) for k in range(size)]
    return [(phase, 0, x // stride, k) for phase, x, k in outputs if x % stride == 0]


def _used(taps: list[tuple[int, int, int, int]], first: int) -> dict[tuple[int, int], int]:
    """How many of the six products along an axis the window of two phases needs."""
    used: dict[tuple[int, int], set[int]] = {}
    for out_phase, in_phase, offset, _ in taps:
        used.setdefault((out_phase, in_phase), set()).add(offset - first)
    return {phases: 6 - (0 not in offsets) - (2 not in offsets) for phases, offsets in used.items()}


def _first_taps(
    conv: ops.MultiplyAccumulate, largest_input: int, shape: tuple[int, ...]
) -> tuple[tuple[int, int], float] | None:
    """(`Windows.first`, the share of the multiplications that is left); None where it may not be exact.

    shape: of the result, (batch, channels, height, width).
    """
    if not isinstance(conv, (ops.Conv2d, ops.ConvTranspose2d)) or conv.stride[0] != conv.stride[1]:
        return None
    if largest_input > _LARGEST_INPUT or int(conv.weight.to(torch.int16).abs().max()) > _LARGEST_WEIGHT:
        return None
    first, share, step = [], 1.0, _TILE * (1 if isinstance(conv, ops.Conv2d) else conv.stride[0])
    for axis, size in enumerate(shape[2:]):
        taps = _taps(conv, axis)
        offsets = [offset for _, _, offset, _ in taps]
        candidates = range(max(offsets) - _WINDOW + 1, min(offsets) + 1)
        if not candidates:
            return None
        counts = {offset: sum(_used(taps, offset).values()) for offset in candidates}
        first.append(min(candidates, key=counts.__getitem__))
        padded = -(-size // step) * step / size
        share *= counts[first[axis]] / _TILE * padded / len(taps)
    return (first[0], first[1]), share


def beats_bytes(conv: ops.MultiplyAccumulate, largest_input: int, shape: tuple[int, ...]) -> bool:
    """Whether it is faster than direct products by 8-bit instructions; as `windows`."""
    taps = _first_taps(conv, largest_input, shape)
    return taps is not None and taps[1] <= _GAIN_OVER_BYTES


def windows(conv: ops.MultiplyAccumulate, largest_input: int, shape: tuple[int, ...]) -> Windows | None:
    """The windows of a convolution, None where it does not pay or may leave the range in which it is exact.

    shape: of the result, (batch, channels, height, width).
    """
    found = _first_taps(conv, largest_input, shape)
    if found is None or found[1] > _GAIN:
        return None
    assert isinstance(conv, (ops.Conv2d, ops.ConvTranspose2d)), "others have no taps"
    first, weight, stride = found[0], conv.weight, conv.stride
    axes = [_taps(conv, axis) for axis in (0, 1)]
    spread, stride = (1, stride[0]) if isinstance(conv, ops.Conv2d) else (stride[0], 1)
    outputs, inputs = weight.shape[:2]
    full = torch.zeros(spread**2, outputs, stride**2, inputs, _WINDOW, _WINDOW, dtype=torch.int16)
    for (a, b, y, ky), (c, d, x, kx) in product(*axes):
        full[a * spread + c, :, b * stride + d, :, y - first[0], x - first[1]] = weight[:, :, ky, kx].short()
    parts = _parts(full.abs().sum((3, 4, 5)).flatten(0, 1) * largest_input)
    return None if parts is None else Windows(full, stride, spread, first, parts)


def _parts(largest: Tensor) -> list[list[int]] | None:
    """Phases, each put into the first part that has room for it; None where one alone has too large sums.

    largest: (outputs, phases), the largest sum of each.
    """
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


def winograd_weights(layer: Windows) -> tuple[Tensor, Tensor, Tensor]:
    """Transformed weights in the order in which winograd.c reads them.

    Returns:
        weights: int16. For every part, block of 16 (out_phase, output), position of the transformed window,
            and input phase with weights there: (pairs of inputs, 16, 2).
        starts: (parts, blocks, 36), the byte at which the weights of each begin.
        phases: (parts, blocks, 36, in_phases + 1), the number of the input phases, and which they are.
    """
    out_phases, outputs, in_phases, inputs = layer.weight.shape[:4]
    blocks, pairs = -(-out_phases * outputs // BLOCK), -(-inputs // 2)
    full = torch.zeros(blocks * BLOCK, in_phases, pairs * 2, _POSITIONS, dtype=torch.int16)
    transformed = layer.weight.float().reshape(-1, _WINDOW**2) @ torch.kron(_G, _G).T  # below 2^15: exact
    full[: out_phases * outputs, :, :inputs] = transformed.to(torch.int16).reshape(
        -1, in_phases, inputs, _POSITIONS
    )
    ordered = (
        full.reshape(blocks, BLOCK, in_phases, pairs, 2, _POSITIONS).permute(0, 5, 2, 3, 1, 4).contiguous()
    )
    nonzero = (ordered != 0).flatten(3).any(-1)
    weights, phases = [], torch.zeros(len(layer.parts), blocks, _POSITIONS, in_phases + 1, dtype=torch.int32)
    for part, members in enumerate(layer.parts):
        chosen = nonzero & torch.isin(torch.arange(in_phases), torch.tensor(members))
        weights.append(ordered[chosen])
        phases[part, ..., 0] = chosen.sum(-1)
        phases[part, ..., 1:] = (~chosen).to(torch.int8).argsort(dim=-1, stable=True)
    number = phases[..., 0].flatten().to(torch.int64)
    starts = (number.cumsum(0) - number) * (pairs * BLOCK * 4)
    return torch.cat(weights), starts.contiguous(), phases


def winograd_product(
    root: ops.MultiplyAccumulate, shape: tuple[int, ...], largest_input: int, out_shape: tuple[int, ...]
) -> tuple[Winograd, list[Tensor]] | None:
    """A job of winograd.c, and the tensors that it points to; None where it does not pay or is not exact.

    shape, out_shape: of the input and of the result, (batch, channels, height, width).
    """
    layer = windows(root, largest_input, out_shape)
    if layer is None:
        return None
    weights, starts, phases = winograd_weights(layer)
    outputs, inputs = root.weight.shape[:2]
    bias = torch.zeros(phases.shape[1] * BLOCK, dtype=torch.int32)
    if root.bias is not None:
        bias[: layer.spread**2 * outputs] = root.bias.to(torch.int32).repeat(layer.spread**2)
    padding = torch.zeros(inputs, dtype=torch.int16)
    buffers = {"weights": weights, "bias": bias, "padding": padding, "starts": starts, "phases": phases}
    job = Winograd(
        batch=shape[0],
        height=shape[2],
        width=shape[3],
        inputs=inputs,
        stride=layer.stride,
        first_y=layer.first[0],
        first_x=layer.first[1],
        rows=-(-out_shape[2] // layer.spread),
        columns=-(-out_shape[3] // layer.spread),
        outputs=outputs,
        spread=layer.spread,
        all_columns=out_shape[3],
        all_rows=out_shape[2],
        parts=len(layer.parts),
        **{name: buffer.data_ptr() for name, buffer in buffers.items()},
    )
    return job, list(buffers.values())
