"""Roundings of a latent by parts: each is read only at its positions, as two passes of a checkerboard are.

CompressAI's CheckerboardLatentCodec rounds y masked to the anchors about the means of its first pass, and y
masked to the other positions about those of its second. The rate is estimated of y about both means in one
tensor. At the positions where a part is read, its rounding is then that of the estimate.
"""

from typing import Any

import torch
from torch import Tensor

from licq.integer.program import Program
from licq.quant import operations as ops
from licq.quant.operations import Boundary

_IDENTITY = ("clone", "contiguous")
_CHANNELS = ("chunk", "split", "narrow")


def pieces_of(program: Program, density: Boundary) -> list[Boundary]:
    """The roundings about means that equal the density's own wherever they are read, each at its positions.

    Args:
        density: of the program, with means.
    """
    if density.means is None or density.whole:
        return []
    parts = _Positions(program)
    found = []
    for piece in program.boundaries:
        if piece.kind != "round" or piece.means is None or piece.whole or piece.latent == density.latent:
            continue
        if program.values[piece.latent].shape != program.values[density.latent].shape:
            continue
        plane = parts.read(piece.decoded)
        if plane is None or not bool(plane.any()):
            continue
        if parts.same(piece.latent, density.latent, plane) and parts.same(piece.means, density.means, plane):
            found.append(piece)
    return found


class _Positions:
    """What the values of a program are at some of their positions, which are a 0/1 plane (H, W)."""

    def __init__(self, program: Program):
        self.program, self.producers = program, program.producers()
        self.readers: dict[int, list[ops.Operation]] = {}
        for operation in program.operations:
            for number in operation.inputs:
                self.readers.setdefault(number, []).append(operation)

    def read(self, number: int, plane: Tensor | None = None) -> Tensor | None:
        """The positions at which a value is read, of those in `plane`; None: at all."""
        if number in self.program.outputs.values():
            return plane
        shape = self.program.values[number].shape
        read = torch.zeros(shape[-2:], dtype=torch.bool)
        for reader in self.readers.get(number, []):
            here = plane
            if isinstance(reader, ops.Mask) and (mask := _plane(reader, shape)) is not None:
                here = self.read(reader.outputs[0], mask if plane is None else mask & plane)
            elif isinstance(reader, ops.Layout) and reader.name in _IDENTITY:
                here = self.read(reader.outputs[0], plane)
            if here is None:
                return None
            read = read | here
        return read

    def same(self, a: int, b: int, plane: Tensor) -> bool:
        """Whether two values are proven to be equal at the positions of a plane."""
        return all(_equal(self._at(a, part), self._at(b, part)) for part in self._parts(plane))

    def _parts(self, plane: Tensor) -> list[Tensor]:
        """The plane in parts, on each of which every mask of the program is 0 or 1."""
        masks = (op for op in self.program.operations if isinstance(op, ops.Mask))
        planes = [known for op in masks if (known := _plane(op, (1, 1, *plane.shape))) is not None]
        every = torch.stack([plane, *planes]).flatten(1).unique(dim=0).to(torch.uint8)
        which = every.unique(dim=1, return_inverse=True)[1].reshape(plane.shape)
        return [(which == part) & plane for part in which[plane].unique()]

    def _at(self, number: int, plane: Tensor) -> Any:
        """How a value is computed at these positions: nested tuples of operations, down to numbers of values.

        Values of 0 are None.
        """
        operation = self.producers[number]
        shape = self.program.values[number].shape
        if isinstance(operation, ops.Mask) and (mask := _plane(operation, shape)) is not None:
            if not bool((mask & plane).any()):
                return None
            if bool(mask[plane].all()):
                return self._at(operation.inputs[0], plane)
        elif isinstance(operation, ops.Add) and all(
            self.program.values[source].shape == shape for source in operation.inputs
        ):
            first, second = (self._at(source, plane) for source in operation.inputs)
            other = operation.inputs[1 if first is None else 0]
            numbers = self.program.values[other].range
            inside = numbers.clamped(operation.low, operation.high) == numbers
            if (first is None or second is None) and inside:
                return second if first is None else first
        elif isinstance(operation, ops.Rescale):
            return ("rescale", operation.parameters(), self._at(operation.inputs[0], plane))
        elif isinstance(operation, ops.Layout) and operation.name in _IDENTITY:
            return self._at(operation.inputs[0], plane)
        elif isinstance(operation, ops.Layout) and operation.name in _CHANNELS and len(operation.inputs) == 1:
            position = 1 if operation.name == "narrow" else 2
            if operation.argument(position, "dim", 0) in (1, 1 - len(shape)):
                how = (operation.name, repr(operation.arguments), repr(operation.options))
                place = operation.outputs.index(number)
                return (how, place, self._at(operation.inputs[0], plane))
        return number


def _plane(mask: ops.Mask, shape: tuple[int, ...]) -> Tensor | None:
    """The 0/1 plane (H, W) of a mask; None where it differs from channel to channel."""
    same = mask.mask.shape[-2:] == shape[-2:] and mask.mask.numel() == shape[-2] * shape[-1]
    return mask.mask.reshape(shape[-2:]) != 0 if same else None


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool((a == b).all())
    return type(a) is type(b) and a == b
