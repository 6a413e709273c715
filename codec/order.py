"""Which symbols of a latent can be decoded together, from what its context model reads.

A context model is found in the program: every convolution (or unfolding) over the latent's own decoded
numbers, with the taps that its weights leave and the 0/1 masks before and after it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from licq.integer.program import Program
from licq.quant import operations as ops
from licq.quant.operations import Operation
from licq.support.errors import InputError

_MOST_PASSES = 16
_SPATIAL = (ops.Conv2d, ops.Conv3d)


@dataclass(frozen=True)
class Reading:
    """One spatial operation on a latent: taps (count, dimensions) relative to a position; what it may read,
    and whom it serves.

    known, served: 0/1 over the positions, or None for all.
    """

    operation: Operation
    taps: np.ndarray
    known: np.ndarray | None
    served: np.ndarray | None

    @property
    def is_plain(self) -> bool:
        return self.known is None and self.served is None


def dependents(program: Program, seeds: set[int]) -> set[int]:
    """The values that are computed from any of `seeds`, and these."""
    found = set(seeds)
    for operation in program.operations:
        if found.intersection(operation.inputs):
            found.update(operation.outputs)
    return found


def readings(program: Program, own: set[int]) -> list[Reading]:
    """The spatial operations of a part of a program on the numbers `own`.

    Raises:
        InputError: a context model of another kind.
    """
    masks: dict[int, np.ndarray | None] = dict.fromkeys(
        own
    )  # values that are still position by position, with the mask on them
    found: list[tuple[Operation, np.ndarray, np.ndarray | None]] = []
    served: dict[int, np.ndarray] = {}  # by the operation's place in `found`
    after: dict[int, int] = {}  # results of spatial operations before anything but elementwise work
    for operation in program.operations:
        sources = [number for number in operation.inputs if number in masks]
        if sources:
            out = operation.outputs[0]
            known = masks[sources[0]]
            if isinstance(operation, ops.Mask):
                here = _plane(operation.mask)
                masks[out] = here if known is None else here * known
            elif isinstance(operation, _SPATIAL) and max(operation.weight.shape[2:]) > 1:
                found.append((operation, _taps(operation), known))
                after[out] = len(found) - 1
            elif isinstance(operation, ops.Layout) and operation.name == "unfold":
                found.append((operation, _unfolded_taps(program, operation), known))
            elif isinstance(operation, (ops.Rescale, ops.Neg, ops.Clamp, ops.Abs)) or (
                isinstance(operation, ops.Layout) and operation.name in ("unsqueeze", "contiguous")
            ):
                masks[out] = known
            else:
                raise InputError(
                    f"{operation.node}: this context model ({operation.kind} on decoded symbols) has no decoding order here"
                )
        else:
            before = [after[number] for number in operation.inputs if number in after]
            if before and isinstance(operation, ops.Mask):
                served[before[0]] = _plane(operation.mask)
            elif before and isinstance(operation, (ops.Rescale, ops.Neg)):
                after[operation.outputs[0]] = before[0]
    return [
        Reading(operation, taps, known, served.get(place))
        for place, (operation, taps, known) in enumerate(found)
    ]


def _plane(mask: Tensor) -> np.ndarray:
    plane = mask.reshape(mask.shape[-2:]) if mask.numel() == mask.shape[-2] * mask.shape[-1] else None
    if plane is None:
        raise InputError(
            "a context model with a mask that differs from channel to channel has no decoding order here"
        )
    return plane.numpy() != 0


def _taps(conv: ops.Convolution) -> np.ndarray:
    """Places of a convolution's weights that are not all zero, relative to the output's."""
    used = (conv.weight != 0).flatten(0, 1).any(0)
    centre = torch.tensor([size // 2 for size in used.shape])
    same = all(2 * pad == size - 1 for pad, size in zip(conv.padding, used.shape))
    if not same or set(conv.stride) != {1} or set(conv.dilation) != {1} or conv.groups != 1:
        raise InputError(
            f"{conv.node}: a context model that changes the resolution has no decoding order here"
        )
    return (used.nonzero() - centre).numpy()


def window_side(unfold: ops.Layout) -> int | None:
    """Side of an unfolding's window, None where it is not square."""
    side = unfold.argument(1, "kernel_size")
    side = side[0] if isinstance(side, (tuple, list)) and len(set(side)) == 1 else side
    return side if isinstance(side, int) else None


def _unfolded_taps(program: Program, unfold: ops.Layout) -> np.ndarray:
    """Those of the window's places that a mask leaves: what is unfolded goes through layouts to a
    multiplication with it."""
    options = unfold.options
    side, pad = window_side(unfold), options.get("padding", 0)
    if (
        not isinstance(side, int)
        or 2 * pad != side - 1
        or options.get("stride", 1) != 1
        or options.get("dilation", 1) != 1
    ):
        raise InputError(f"{unfold.node}: an unfolding with {options} has no decoding order here")
    number = unfold.outputs[0]
    while True:
        reader = next((operation for operation in program.operations if number in operation.inputs), None)
        if not isinstance(reader, (ops.Layout, ops.Mask, ops.Rescale)):
            raise InputError(f"{unfold.node}: an unfolding without a mask has no decoding order here")
        if isinstance(reader, ops.Mask):
            break
        number = reader.outputs[0]
    left = torch.nonzero(reader.mask.flatten()).flatten()
    if reader.mask.numel() != side**2:
        raise InputError(f"{unfold.node}: the mask of this context model has no decoding order here")
    return torch.stack((left // side, left % side), 1).numpy() - side // 2


def passes(readings: list[Reading], shape: tuple[int, ...]) -> np.ndarray | None:
    """The pass in which each position is decoded, where a few are enough; None where they are not. shape: of
    the positions."""
    level = np.zeros(shape, dtype=np.int64)
    for _ in range(_MOST_PASSES + 1):
        new = np.zeros_like(level)
        for reading in readings:
            known = np.where(reading.known, level, -1) if reading.known is not None else level
            for tap in reading.taps:
                seen = _shifted(known, tap) + 1
                new = np.maximum(new, seen if reading.served is None else np.where(reading.served, seen, 0))
        if np.array_equal(new, level):
            return level
        level = new
    return None


def _shifted(plane: np.ndarray, tap: np.ndarray) -> np.ndarray:
    """What stands at position + tap, -1 outside."""
    out = np.full_like(plane, -1)
    here, there = [], []
    for size, step in zip(plane.shape, tap):
        here.append(slice(max(0, -step), min(size, size - step)))
        there.append(slice(max(0, step), min(size, size + step)))
    out[tuple(here)] = plane[tuple(there)]
    return out


def wavefronts(reading: Reading, shape: tuple[int, ...]) -> np.ndarray:
    """The front on which each position lies: a linear function of it that is smaller at every tap.

    Raises:
        InputError: a tap that raster order has not reached.
    """
    taps = reading.taps
    slopes = [1] * len(shape)
    for axis in reversed(range(len(shape))):
        later = taps[:, axis + 1 :]
        now = taps[(taps[:, :axis] == 0).all(1)]
        if (now[:, axis] > 0).any() or (axis == len(shape) - 1 and (now[:, axis] >= 0).any()):
            raise InputError(
                f"{reading.operation.node}: this context model reads symbols that are decoded later"
            )
        if axis + 1 < len(shape):
            reach = later[taps[:, axis] < 0] @ np.asarray(slopes[axis + 1 :])
            slopes[axis] = max(1, int(reach.max(initial=0)) + 1)
    return sum(slope * grid for slope, grid in zip(slopes, np.indices(shape)))
