"""The programs of one codec for images of all sizes, and its transforms in tiles."""

from collections.abc import Callable, Sequence

from licq.codec.latents import Latent, cut, find_latents
from licq.integer.passes import without_duplicates
from licq.integer.program import Program
from licq.integer.reach import BATCH, Reach, reach
from licq.integer.tiles import Tiled


def analysis_part(program: Program) -> Program:
    """From the pixels to the one value, "latent", that everything which is coded follows from."""
    pixels = program.inputs["pixels"]
    wanted = (
        number
        for latent in find_latents(program)
        for number in (latent.symbols[0], *latent.densities.values())
    )
    return program.part({"pixels": pixels}, {"latent": program.bottleneck(pixels, wanted)})


def synthesis_part(program: Program, latents: Sequence[Latent], known: set[int]) -> Program:
    """From what is decoded to the pixels; inputs have names that are the same for all sizes of images."""
    part = cut(program, known, {"pixels": program.outputs["pixels"]})
    names = {
        number: f"{place}.{name}" for place, latent in enumerate(latents) for name, number in latent.names()
    }
    return program.part(
        {names.get(number, str(number)): number for number in part.inputs.values()}, dict(part.outputs)
    )


class Sizes:
    """The programs of one codec for images of any size, and what is known of all of them.

    Args:
        lowered: (height, width, batch) -> the program; sides are multiples of `multiple`.
        tile: images of more than tile x tile pixels are computed in tiles of about that size; None: never.
        progress: show how many tiles are done.
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
        return without_duplicates(self.lowered(height, width, batch))

    def with_room(self, positions: int, pixels: int) -> Program:
        """The program of a small image of which a latent has at least so many positions, each of pixels x
        pixels."""
        across = (self.multiple // pixels) ** 2
        return self.program(self.multiple, self.multiple * -(-positions // across))

    def tiled(
        self, name: str, part: Callable[[Program], Program], height: int, width: int, threads: int | None
    ) -> Tiled | None:
        """A part in tiles; None where the image is small, or the part's results reach over all of it."""
        if self.tile is None or height * width <= self.tile**2:
            return None
        far = self.reach(name, part)
        shown = f"{name} transform" if self.progress else ""
        return far and Tiled(
            lambda h, w: part(self.program(h, w)),
            height,
            width,
            far,
            self.tile,
            self.multiple,
            threads,
            shown,
        )

    def reach(self, name: str, part: Callable[[Program], Program]) -> Reach | None:
        """The reach of a part, traced once; None where it is the whole image's."""
        if name not in self._reaches:
            sides = (self.multiple * times for times in (4, 8, 16))
            found = (
                reach(part(self.program(side, side, BATCH)), side, side, self.multiple) for side in sides
            )
            self._reaches[name] = next((result for result in found if result), None)
        return self._reaches[name]
