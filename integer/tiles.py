"""A program on a large image, tile by tile: the same numbers in bounded memory.

A tile is an ordinary image of its own size. Results that depend on what lies beyond its cuts are computed and
thrown away; `integer.reach` says how many these are. Tiles begin at multiples of the period of the network's
pattern (strides, windows of attention), so inside a tile every operation meets the same numbers as in the
whole image.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from licq.support.progress import progress

Part = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
"""A program: integers by name -> integers by name."""


@dataclass(frozen=True)
class Span:
    """How far results depend on the image along one axis.

    before, after: so many pixels beside those of the result. period: of the pattern, in pixels.
    """

    before: int
    after: int
    period: int


@dataclass(frozen=True)
class Reach:
    """How far results depend on the image."""

    rows: Span
    columns: Span


@dataclass(frozen=True)
class Cut:
    """A tile along one axis: pixels start .. end, of which the results of first .. last are right."""

    start: int
    end: int
    first: int
    last: int


def cuts(total: int, tile: int, span: Span, multiple: int) -> list[Cut]:
    """Tiles along an axis of `total` pixels; first .. last of all of them cover it once.

    tile: about so many pixels each, or as few more as `span` needs. multiple: tiles begin at multiples of it.
    """
    before, after = (-(-distance // multiple) * multiple for distance in (span.before, span.after))
    min_length = -(-(before + after + multiple) // span.period) * span.period + span.period
    length = max(tile // span.period * span.period, min_length)
    tiles = _cuts_of(total, length, before, after, span.period)
    while length > min_length and len(
        smaller := _cuts_of(total, length - span.period, before, after, span.period)
    ) == len(tiles):
        length, tiles = length - span.period, smaller  # as many tiles, of more equal sizes
    return tiles


def _cuts_of(total: int, length: int, before: int, after: int, period: int) -> list[Cut]:
    tiles, start, first = [], 0, 0
    while True:
        end = min(start + length, total)
        last = total if end == total else end - after
        tiles.append(Cut(start, end, first, last))
        if end == total:
            return tiles
        start, first = (last - before) // period * period, last


@dataclass
class Tiled:
    """Computes a program's outputs for an image of height x width in tiles.

    Inputs and outputs have the same names for all sizes, and rows and columns as last dimensions.

    Args:
        rows, columns: the tiles along each axis.
        parts: the program for a tile of (height, width); made when it is first needed.
        make: makes it; None: all are there.
        shown: what a progress bar says; empty: none.
    """

    height: int
    width: int
    rows: list[Cut]
    columns: list[Cut]
    parts: dict[tuple[int, int], Part]
    make: Callable[[int, int], Part] | None = None
    shown: str = ""

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs by name, from the inputs of the whole image."""
        outputs: dict[str, np.ndarray] = {}
        tiles = [(row, column) for row in self.rows for column in self.columns]
        for row, column in progress(
            tiles, desc=self.shown, unit="tile", enabled=bool(self.shown), leave=False
        ):
            pieces = {
                name: np.ascontiguousarray(self._piece(x, row.start, row.end, column.start, column.end))
                for name, x in inputs.items()
            }
            for name, result in self.part_for(row.end - row.start, column.end - column.start)(pieces).items():
                self._put(outputs, name, result, row, column)
        return outputs

    def part_for(self, height: int, width: int) -> Part:
        """The program for a tile of this size."""
        if (height, width) not in self.parts and self.make is not None:
            self.parts[height, width] = self.make(height, width)
        return self.parts[height, width]

    def _piece(self, x: np.ndarray, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """The view of x that belongs to a rectangle of the image."""
        down, across = self.height // x.shape[-2], self.width // x.shape[-1]
        return x[..., top // down : bottom // down, left // across : right // across]

    def _put(
        self, outputs: dict[str, np.ndarray], name: str, result: np.ndarray, row: Cut, column: Cut
    ) -> None:
        down, across = (
            (row.end - row.start) // result.shape[-2],
            (column.end - column.start) // result.shape[-1],
        )
        if name not in outputs:
            shape = (*result.shape[:-2], self.height // down, self.width // across)
            outputs[name] = np.empty(shape, dtype=result.dtype)
        top, left = (row.first - row.start) // down, (column.first - column.start) // across
        height, width = (row.last - row.first) // down, (column.last - column.first) // across
        self._piece(outputs[name], row.first, row.last, column.first, column.last)[...] = result[
            ..., top : top + height, left : left + width
        ]
