"""Multiply-accumulate operations as jobs of `products` in products.c, which sums tap by tap."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from licq.integer.groups import padding_of
from licq.integer.library import BLOCK, S16, SLACK, U8, Product
from licq.quant import operations as ops

OPERAND_TYPES = {torch.uint8: U8, torch.int16: S16}
"""What `products` reads."""


@dataclass(frozen=True)
class Tap:
    """row, column: that the tap reads, relative to the output times the stride. ky, kx: in the kernel."""

    row: int
    column: int
    ky: int
    kx: int


@dataclass(frozen=True)
class _Phase:
    """Outputs (i * spread + first_row, j * spread + first_column) of a layer, and the taps that they sum."""

    taps: Sequence[Tap]
    first_row: int = 0
    first_column: int = 0


def direct_products(
    root: ops.MultiplyAccumulate,
    shape: tuple[int, ...],
    out_shape: tuple[int, ...],
    source_type: tuple[torch.dtype, int],
) -> tuple[list[Product], list[Tensor]]:
    """A job for each phase of the output, and the tensors that the jobs point to.

    Args:
        shape, out_shape: of the input and of the result.
        source_type: in which the input is read, and what is added to its integers there.
    """
    weight, (dtype, offset) = root.weight.to(torch.int64), source_type
    stride, spread = (1, 1), 1
    if isinstance(root, ops.Conv2d):
        phases, stride = [_Phase(_conv_taps(root))], root.stride
    elif isinstance(root, ops.ConvTranspose2d):
        spread = root.stride[0]
        rows_and_columns = [(a, b) for a in range(spread) for b in range(spread)]
        phases = [_Phase(_phase_taps(root, phase), *phase) for phase in rows_and_columns]
    else:
        weight = weight[:, :, None, None]
        phases = [_Phase([Tap(0, 0, 0, 0)])]
        rows = (math.prod(shape[:-2]), shape[-2])
        shape, out_shape = (1, shape[-1], *rows), (1, out_shape[-1], *rows)
    outputs, inputs = weight.shape[:2]
    bias = torch.zeros(outputs, dtype=torch.int64) if root.bias is None else root.bias
    padding = torch.full((inputs + SLACK,), offset, dtype=dtype)
    jobs, buffers = [], [padding]
    for phase in phases:
        taps = [tap for tap in phase.taps if bool(weight[:, :, tap.ky, tap.kx].any())]  # a masked tap is none
        chosen = weight.new_zeros(outputs, len(taps), inputs)
        for position, tap in enumerate(taps):
            chosen[:, position] = weight[:, :, tap.ky, tap.kx]
        full_bias = torch.zeros(-(-outputs // BLOCK) * BLOCK, dtype=torch.int32)
        full_bias[:outputs] = (bias - offset * chosen.sum((1, 2))).to(torch.int32)
        packed = pack(chosen, dtype)
        read_from = torch.tensor([(tap.row, tap.column) for tap in taps], dtype=torch.int32)
        buffers += [full_bias, packed, read_from]
        jobs.append(
            Product(
                weights=packed.data_ptr(),
                bias=full_bias.data_ptr(),
                padding=padding.data_ptr(),
                taps=read_from.data_ptr(),
                type=OPERAND_TYPES[dtype],
                batch=shape[0],
                height=shape[2],
                width=shape[3],
                inputs=inputs,
                count=len(taps),
                rows=-(-(out_shape[2] - phase.first_row) // spread),
                columns=-(-(out_shape[3] - phase.first_column) // spread),
                stride_rows=stride[0],
                stride_columns=stride[1],
                outputs=outputs,
                spread=spread,
                first_row=phase.first_row,
                first_column=phase.first_column,
                all_columns=out_shape[3],
                all_rows=out_shape[2],
            )
        )
    return jobs, buffers


def _conv_taps(conv: ops.Conv2d) -> list[Tap]:
    (dilation_y, dilation_x), (pad_y, pad_x) = conv.dilation, padding_of(conv)
    height, width = conv.weight.shape[2:]
    return [
        Tap(ky * dilation_y - pad_y, kx * dilation_x - pad_x, ky, kx)
        for ky in range(height)
        for kx in range(width)
    ]


def _phase_taps(conv: ops.ConvTranspose2d, phase: tuple[int, int]) -> list[Tap]:
    """Taps of the outputs of one phase of a transposed convolution."""

    def along(axis: int) -> list[tuple[int, int]]:
        """(what is read, relative to the output's number in its phase; position in the kernel)"""
        stride, pad, dilation = conv.stride[axis], padding_of(conv)[axis], conv.dilation[axis]
        offsets = [(phase[axis] + pad - k * dilation, k) for k in range(conv.weight.shape[2 + axis])]
        return [(offset // stride, k) for offset, k in offsets if offset % stride == 0]

    return [Tap(y, x, ky, kx) for y, ky in along(0) for x, kx in along(1)]


def pack(weight: Tensor, x_dtype: torch.dtype) -> Tensor:
    """Weights in the order in which products.c reads them.

    Args:
        weight: (outputs, taps, inputs).
        x_dtype: of the input, int16 or uint8. Of s = 2 or 4 inputs the numbers lie side by side: four bytes
            of int16 weights, or of int8 ones.

    Returns:
        (blocks of 16 outputs, taps, inputs / s, 16, s), filled up with zeros.
    """
    size = 2 if x_dtype == torch.int16 else 4
    outputs, taps, inputs = weight.shape
    blocks, parts = -(-outputs // BLOCK), -(-inputs // size)
    full = weight.new_zeros(blocks * BLOCK, taps, parts * size)
    full[:outputs, :, :inputs] = weight
    ordered = full.reshape(blocks, BLOCK, taps, parts, size).permute(0, 2, 3, 1, 4)
    return ordered.contiguous().to(torch.int16 if size == 2 else torch.int8)
