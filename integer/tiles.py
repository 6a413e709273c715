"""A program on a large image, tile by tile: the same numbers in bounded memory.

A tile is an ordinary image of its own size, and whatever depends on what lies beyond its cuts is computed and
thrown away (`integer.reach` says how much that is). Tiles begin at multiples of the period of the network's
pattern (strides, windows of attention), so inside a tile every operation meets the same numbers as in the
whole image.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from licq.integer.execution import Executable, executable
from licq.integer.program import Program
from licq.integer.reach import Reach, Span
from licq.support.progress import progress


@dataclass(frozen=True)
class Cut:
    """Along one axis, in pixels: the tile start .. end, of which first .. last are kept."""

    start: int
    end: int
    first: int
    last: int


def cuts(total: int, tile: int, span: Span, multiple: int) -> list[Cut]:
    """Tiles of at most about `tile` pixels, or as few more as `span` needs, along an axis of `total`; what
    they keep covers it once."""
    before, after = (-(-distance // multiple) * multiple for distance in (span.before, span.after))
    least = -(-(before + after + multiple) // span.period) * span.period + span.period
    length = max(tile // span.period * span.period, least)
    found = _cuts_of(total, length, before, after, span.period)
    while length > least and len(
        smaller := _cuts_of(total, length - span.period, before, after, span.period)
    ) == len(found):
        length, found = length - span.period, smaller  # as many tiles, of more equal sizes
    return found


def _cuts_of(total: int, length: int, before: int, after: int, period: int) -> list[Cut]:
    found, start, first = [], 0, 0
    while True:
        end = min(start + length, total)
        last = total if end == total else end - after
        found.append(Cut(start, end, first, last))
        if end == total:
            return found
        start, first = (last - before) // period * period, last


class Tiled:
    """Computes a program's outputs for an image of height x width in tiles.

    Args:
        part: gives the program for an image of a size; inputs and outputs by the same names for all sizes,
        with rows and columns
            as last dimensions.
        tile: about so many pixels along each side.
        multiple: sides of images are multiples of it.
        threads: of the kernels.
        shown: what a progress bar says; empty: none.
    """

    def __init__(
        self,
        part: Callable[[int, int], Program],
        height: int,
        width: int,
        reach: Reach,
        tile: int,
        multiple: int,
        threads: int | None = None,
        shown: str = "",
    ):
        self.part, self.height, self.width, self.threads, self.shown = part, height, width, threads, shown
        self.rows = cuts(height, tile, reach.rows, multiple)
        self.columns = cuts(width, tile, reach.columns, multiple)
        self._ready: dict[tuple[int, int], Executable] = {}

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs by name, from the inputs of the whole image."""
        outputs: dict[str, Tensor] = {}
        places = [(row, column) for row in self.rows for column in self.columns]
        for row, column in progress(
            places, desc=self.shown, unit="tile", enabled=bool(self.shown), leave=False
        ):
            pieces = {
                name: self._piece(x, row.start, row.end, column.start, column.end).contiguous()
                for name, x in inputs.items()
            }
            for name, found in self._run(row.end - row.start, column.end - column.start)(pieces).items():
                self._keep(outputs, name, found, row, column)
        return outputs

    def _run(self, height: int, width: int) -> Executable:
        if (height, width) not in self._ready:
            self._ready[height, width] = executable(self.part(height, width), self.threads)
        return self._ready[height, width]

    def _piece(self, x: Tensor, top: int, bottom: int, left: int, right: int) -> Tensor:
        """The view of x that belongs to a rectangle of the image."""
        down, across = self.height // x.shape[-2], self.width // x.shape[-1]
        return x[..., top // down : bottom // down, left // across : right // across]

    def _keep(self, outputs: dict[str, Tensor], name: str, found: Tensor, row: Cut, column: Cut) -> None:
        down, across = (
            (row.end - row.start) // found.shape[-2],
            (column.end - column.start) // found.shape[-1],
        )
        if name not in outputs:
            outputs[name] = torch.empty(
                *found.shape[:-2], self.height // down, self.width // across, dtype=found.dtype
            )
        top, left = (row.first - row.start) // down, (column.first - column.start) // across
        height, width = (row.last - row.first) // down, (column.last - column.first) // across
        self._piece(outputs[name], row.first, row.last, column.first, column.last).copy_(
            found[..., top : top + height, left : left + width]
        )
