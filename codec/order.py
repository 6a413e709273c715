"""The groups in which the symbols of a latent with a context model are decoded.

A context model is found in the integer program: it is the convolutions and unfoldings of the latent's own
decoded values. What it reads follows from the taps with weights that are not 0, and from the 0/1 masks before
and after it. A context model with masks works in a few passes (checkerboard, multistage). One without is
autoregressive; its symbols are decoded in wavefronts.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from licq.integer.program import Program
from licq.quant import operations as ops
from licq.quant.operations import Operation
from licq.support.errors import InputError

_MAX_PASSES = 16
_SPATIAL = (ops.Conv2d, ops.Conv3d)


@dataclass(frozen=True)
class Reading:
    """What one spatial operation of a context model reads.

    Args:
        operation: a convolution or an unfolding.
        taps: (count, dimensions), the offsets of what it reads from the position that it computes.
        known: 0/1 over the positions, those that it reads; None: all.
        served: 0/1 over the positions, those whose density depends on it; None: all.
    """

    operation: Operation
    taps: np.ndarray
    known: np.ndarray | None
    served: np.ndarray | None

    @property
    def is_plain(self) -> bool:
        """Whether it reads and serves all positions."""
        return self.known is None and self.served is None


def dependents(program: Program, seeds: set[int]) -> set[int]:
    """The numbers of the values that are computed from any of `seeds`, and the seeds."""
    numbers = set(seeds)
    for operation in program.operations:
        if numbers.intersection(operation.inputs):
            numbers.update(operation.outputs)
    return numbers


def readings(program: Program, own: set[int]) -> list[Reading]:
    """The spatial operations of a context model.

    Args:
        program: the part of a program that computes the densities.
        own: numbers of the latent's own decoded values.

    Raises:
        InputError: the context model has an operation for which there is no decoding order.
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
                isinstance(operation, ops.Layout) and operation.name in ("unsqueeze", "contiguous", "clone")
            ):
                masks[out] = known
            else:
                raise InputError(
                    f"{operation.node}: this context model ({operation.kind} on decoded symbols) has no "
                    "decoding order here"
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
    """(count, dimensions): the taps of a convolution with weights that are not 0, relative to its centre."""
    used = (conv.weight != 0).flatten(0, 1).any(0)
    centre = torch.tensor([size // 2 for size in used.shape])
    same = all(2 * pad == size - 1 for pad, size in zip(conv.padding, used.shape))
    if not same or set(conv.stride) != {1} or set(conv.dilation) != {1} or conv.groups != 1:
        raise InputError(
            f"{conv.node}: a context model that changes the resolution has no decoding order here"
        )
    return (used.nonzero() - centre).numpy()


def window_side(unfold: ops.Layout) -> int | None:
    """The side of an unfolding's window; None where it is not square."""
    side = unfold.argument(1, "kernel_size")
    side = side[0] if isinstance(side, (tuple, list)) and len(set(side)) == 1 else side
    return side if isinstance(side, int) else None


def _unfolded_taps(program: Program, unfold: ops.Layout) -> np.ndarray:
    """(count, 2): the positions of an unfolding's window that the mask behind it leaves."""
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
    """The pass in which each position is decoded, from 0; None where more than `_MAX_PASSES` are needed.

    Args:
        readings: all operations of the context model.
        shape: of the positions.
    """
    level = np.zeros(shape, dtype=np.int64)
    for _ in range(_MAX_PASSES + 1):
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
    """The value at position + tap; -1 where that is outside of the plane."""
    out = np.full_like(plane, -1)
    here, there = [], []
    for size, step in zip(plane.shape, tap):
        here.append(slice(max(0, -step), min(size, size - step)))
        there.append(slice(max(0, step), min(size, size + step)))
    out[tuple(here)] = plane[tuple(there)]
    return out


def wavefronts(reading: Reading, shape: tuple[int, ...]) -> np.ndarray:
    """The wavefront on which each position lies.

    It is a linear function of the position that is smaller at every tap. So the positions of one wavefront do
    not depend on each other.

    Args:
        reading: the only operation of the context model.
        shape: of the positions.

    Raises:
        InputError: a tap reads a position that comes later in raster order.
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
    return np.tensordot(np.asarray(slopes), np.indices(shape), 1)


def positions_of(shape: tuple[int, ...], context: list[Reading]) -> tuple[int, ...]:
    """The shape of a latent's positions: (H, W), or (C, H, W) where its context model reads channels too.

    Args:
        shape: of the latent, (1, C, H, W).
        context: what its context model reads; empty where it has none.
    """
    volume = bool(context) and context[0].taps.shape[1] == 3
    return tuple(shape[1:] if volume else shape[2:])


def groups(context: list[Reading], positions: tuple[int, ...]) -> list[np.ndarray]:
    """Positions, flat, in the order of decoding, in groups whose symbols do not depend on each other.

    Args:
        context: what the context model reads; empty where there is none.
        positions: their shape.

    Raises:
        InputError: a context model for which there is no order.
    """
    if not context:
        return [np.arange(int(np.prod(positions)))]
    if len(context) == 1 and context[0].is_plain:
        time = wavefronts(context[0], positions)
    else:
        if any(reading.is_plain for reading in context):
            raise InputError(
                "a context model of several convolutions without masks has no decoding order here"
            )
        time = passes(context, positions)
        if time is None:
            raise InputError("this context model needs more passes than there is an order for")
    time = time.flatten()
    order = np.argsort(time, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(time[order])) + 1)
