"""Products of a layer as jobs of the compiled kernels: by taps, or by Winograd's algorithm."""

from typing import Any

import torch
from torch import Tensor

from licq.integer.library import S16, SLACK, U8, Product, Winograd
from licq.integer.winograd import BLOCK, windows, winograd_weights
from licq.quant import operations as ops

OPERANDS = {torch.uint8: U8, torch.int16: S16}
"""The types of inputs that `products` in products.c reads."""

Tap = tuple[int, int, int, int]
"""Row and column that are read, relative to the output's own; row and column in the kernel."""


def winograd_job(
    layer: ops.MultiplyAccumulate, x_shape: tuple[int, ...], largest: int, shape: tuple[int, ...]
) -> tuple[Winograd, list[Tensor]] | None:
    """(the job, tensors that it points to), or None where it does not pay or may not be exact.

    x_shape, shape: of the input and of the result, (batch, channels, height, width). largest: input.
    """
    found = windows(layer, largest, shape)
    if found is None:
        return None
    weights, starts, phases = winograd_weights(found)
    outputs, inputs = layer.weight.shape[:2]
    bias = torch.zeros(phases.shape[1] * BLOCK, dtype=torch.int32)
    if layer.bias is not None:
        bias[: found.spread**2 * outputs] = layer.bias.to(torch.int32).repeat(found.spread**2)
    padding = torch.zeros(inputs, dtype=torch.int16)
    parts = {"weights": weights, "bias": bias, "padding": padding, "starts": starts, "phases": phases}
    job = Winograd(**{name: part.data_ptr() for name, part in parts.items()})
    job.batch, _, job.height, job.width = x_shape
    job.inputs, job.outputs, job.stride, job.spread = inputs, outputs, found.stride, found.spread
    job.first_y, job.first_x = found.first
    job.parts = len(found.parts)
    job.all_rows, job.all_columns = shape[2:]
    job.rows, job.columns = -(-job.all_rows // found.spread), -(-job.all_columns // found.spread)
    return job, list(parts.values())


def tap_jobs(
    layer: ops.MultiplyAccumulate,
    x_shape: tuple[int, ...],
    x_type: tuple[torch.dtype, int],
    shape: tuple[int, ...],
) -> tuple[list[Product], list[Tensor]]:
    """(a job for each phase of the output, tensors that they point to).

    x_type: type of the input's stored numbers, and their offset.
    """
    dtype, offset = x_type
    weight = layer.weight.to(torch.int64)
    weight = weight[:, :, None, None] if isinstance(layer, ops.Linear) else weight
    spread, phases = _phases(layer)
    outputs, inputs = weight.shape[:2]
    blocks = -(-outputs // BLOCK)
    bias = torch.zeros(outputs, dtype=torch.int64) if layer.bias is None else layer.bias
    jobs, memory = [], []
    for (first_row, first_column), taps, stride in phases:
        taps = [tap for tap in taps if bool(weight[:, :, tap[2], tap[3]].any())]  # a masked tap is none
        used = [weight[:, :, ky, kx] for _, _, ky, kx in taps]
        weights = torch.stack(used, 1) if used else weight.new_zeros(outputs, 0, inputs)
        biases = torch.zeros(blocks * BLOCK, dtype=torch.int32)
        biases[:outputs] = (bias - offset * weights.sum((1, 2))).to(torch.int32)
        parts: dict[str, Tensor] = {
            "weights": pack(weights, dtype),
            "bias": biases,
            "padding": torch.full((inputs + SLACK,), offset, dtype=dtype),
            "taps": torch.tensor([tap[:2] for tap in taps], dtype=torch.int32).reshape(-1, 2).contiguous(),
        }
        memory += parts.values()
        job = Product(**{name: part.data_ptr() for name, part in parts.items()})
        job.type, job.inputs, job.count, job.outputs = OPERANDS[dtype], inputs, len(taps), outputs
        job.stride_rows, job.stride_columns = stride
        if isinstance(layer, ops.Linear):
            job.batch, job.height, job.width = 1, int(torch.Size(x_shape[:-2]).numel()), x_shape[-2]
            job.rows, job.columns = job.height, job.width
            job.all_rows, job.all_columns = job.rows, job.columns
        else:
            job.batch, _, job.height, job.width = x_shape
            job.all_rows, job.all_columns = shape[2:]
            job.rows = -(-(job.all_rows - first_row) // spread)
            job.columns = -(-(job.all_columns - first_column) // spread)
        job.spread, job.first_row, job.first_column = spread, first_row, first_column
        jobs.append(job)
    return jobs, memory


def _phases(layer: ops.MultiplyAccumulate) -> tuple[int, list[tuple[tuple[int, int], list[Tap], Any]]]:
    """(how far the outputs of a phase are apart, for each phase: its first output, its taps, the stride)."""
    if isinstance(layer, ops.Linear):
        return 1, [((0, 0), [(0, 0, 0, 0)], (1, 1))]
    assert isinstance(layer, (ops.Conv2d, ops.ConvTranspose2d))
    if isinstance(layer, ops.ConvTranspose2d):
        spread = layer.stride[0]
        firsts = [(a, b) for a in range(spread) for b in range(spread)]
        return spread, [(first, _taps_of_phase(layer, first), (1, 1)) for first in firsts]
    (dilation_y, dilation_x), (pad_y, pad_x) = layer.dilation, layer.pads
    taps = [
        (ky * dilation_y - pad_y, kx * dilation_x - pad_x, ky, kx)
        for ky in range(layer.weight.shape[2])
        for kx in range(layer.weight.shape[3])
    ]
    return 1, [((0, 0), taps, layer.stride)]


def _taps_of_phase(conv: ops.ConvTranspose2d, phase: tuple[int, int]) -> list[Tap]:
    """Taps of the outputs of one phase of a transposed convolution."""

    def along(axis: int) -> list[tuple[int, int]]:
        stride, pad, dilation = conv.stride[axis], conv.pads[axis], conv.dilation[axis]
        positions = [(phase[axis] + pad - k * dilation, k) for k in range(conv.weight.shape[2 + axis])]
        return [(position // stride, k) for position, k in positions if position % stride == 0]

    return [(y, x, ky, kx) for y, ky in along(0) for x, kx in along(1)]


def pack(weight: Tensor, x_dtype: torch.dtype) -> Tensor:
    """(outputs, taps, inputs) in the kernels' order: blocks of 16 outputs, taps, inputs by four bytes,
    outputs, inputs of the four bytes."""
    size = 2 if x_dtype == torch.int16 else 4
    outputs, taps, inputs = weight.shape
    blocks, parts = -(-outputs // BLOCK), -(-inputs // size)
    full = weight.new_zeros(blocks * BLOCK, taps, parts * size)
    full[:outputs, :, :inputs] = weight
    ordered = full.reshape(blocks, BLOCK, taps, parts, size).permute(0, 2, 3, 1, 4)
    return ordered.contiguous().to(torch.int16 if size == 2 else torch.int8)
