"""The integer programs of one codec for images of all sizes, and its transforms in tiles."""

from collections.abc import Callable, Sequence

from licq.codec.latents import Latent, cut, find_latents
from licq.integer.execution import on_arrays
from licq.integer.passes import without_duplicates
from licq.integer.program import Program
from licq.integer.reach import BATCH
from licq.integer.reach import reach as trace
from licq.integer.tiles import Reach, Tiled, cuts


def analysis_part(program: Program) -> Program:
    """The part of a program from the pixels to "latent", the one value that all coded symbols follow from."""
    pixels = program.inputs["pixels"]
    coded = (
        number
        for latent in find_latents(program)
        for number in (latent.symbols[0], *latent.densities.values())
    )
    return program.part({"pixels": pixels}, {"latent": program.bottleneck(pixels, coded)})


def synthesis_part(program: Program, latents: Sequence[Latent], known: set[int]) -> Program:
    """The part of a program from the decoded values to the pixels.

    Args:
        latents: those of the program.
        known: numbers of the values that a decoder has.

    Returns:
        A program whose inputs have names that are the same for all sizes of images, such as "1.given0".
    """
    part = cut(program, known, {"pixels": program.outputs["pixels"]})
    names = {
        number: f"{index}.{name}" for index, latent in enumerate(latents) for name, number in latent.names()
    }
    return program.part(
        {names.get(number, str(number)): number for number in part.inputs.values()}, dict(part.outputs)
    )


class Sizes:
    """The integer programs of one codec for images of any size.

    Args:
        lowered: (height, width, batch) -> the program; height and width are multiples of `multiple`.
        multiple: in pixels.
        tile: images of more than tile x tile pixels are computed in tiles of about that size; None: never.
        progress: show on standard error how many tiles are done.
    """

    def __init__(
        self,
        lowered: Callable[[int, int, int], Program],
        multiple: int = 64,
        tile: int | None = None,
        progress: bool = False,
    ):
        self.lowered, self.multiple, self.tile, self.progress = lowered, multiple, tile, progress
        self._reaches: dict[str, Reach | None] = {}

    def program(self, height: int, width: int, batch: int = 1) -> Program:
        """The program of `batch` images, with no operation in it twice."""
        return without_duplicates(self.lowered(height, width, batch))

    def with_room(self, positions: int, pixels: int) -> Program:
        """The program of a small image, of which a latent has at least `positions` positions.

        Args:
            pixels: side of the square that stands behind one position.
        """
        across = (self.multiple // pixels) ** 2
        return self.program(self.multiple, self.multiple * -(-positions // across))

    def tiled(
        self, name: str, part: Callable[[Program], Program], height: int, width: int, threads: int | None
    ) -> Tiled | None:
        """A part of the program in tiles.

        Args:
            name: of the part, such as "analysis".
            part: from the program to the part.

        Returns:
            None where the image is small, or a result of the part depends on the whole image.
        """
        if self.tile is None or height * width <= self.tile**2:
            return None
        reach = self.reach(name, part)
        if reach is None:
            return None
        return Tiled(
            height,
            width,
            cuts(height, self.tile, reach.rows, self.multiple),
            cuts(width, self.tile, reach.columns, self.multiple),
            {},
            lambda h, w: on_arrays(part(self.program(h, w)), threads),
            f"{name} transform" if self.progress else "",
        )

    def reach(self, name: str, part: Callable[[Program], Program]) -> Reach | None:
        """How far a result of the part sees; None where it sees the whole image. Traced once."""
        if name not in self._reaches:
            sides = (self.multiple * times for times in (4, 8, 16))
            traces = (
                trace(part(self.program(side, side, BATCH)), side, side, self.multiple) for side in sides
            )
            self._reaches[name] = next((reach for reach in traces if reach), None)
        return self._reaches[name]
