"""What an encoder and a decoder run: the latents of a codec and the steps between them, without torch."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

Part = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
"""A part of an integer program: integers by name -> integers by name."""


@dataclass
class Chain:
    """Parts, each of which takes what the one before it gives."""

    parts: list[Part]

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        results = dict(inputs)
        for part in self.parts:
            results = part(results)
        return results


@dataclass
class Latent:
    """One latent, by the numbers of its values in the program.

    Args:
        node: the name of the entropy model.
        kind: "entropy_bottleneck", "gaussian" or "mixture".
        latent: the value before rounding.
        symbols: all values that are the symbols.
        decoded: all values that are y_hat, where y_hat is the symbols, plus the means where the symbols are
            differences from them; empty where y_hat is computed in another way.
        densities: the values that the density of a symbol follows from: "scales", "means", "weights".
        whole: the symbols are round(latent); else they are round(latent - means).
        shape: of the symbols, (1, C, H, W).
        step: of z in a codec of variable rate, in units of 2^-`STEP_OF_Z_BITS`.
        limits: the smallest and the largest symbol that the program proves to be possible.
        estimated: the symbols are those whose rate the forward estimates.
    """

    node: str
    kind: str
    latent: int
    symbols: tuple[int, ...]
    decoded: tuple[int, ...]
    densities: dict[str, int]
    whole: bool
    shape: tuple[int, ...]
    step: int | None = None
    limits: tuple[int, int] = (-(2**31), 2**31 - 1)
    estimated: bool = True

    @property
    def given(self) -> tuple[int, ...]:
        """The values that follow from the symbols and their means alone."""
        return (*self.symbols, *self.decoded)

    def names(self) -> Iterator[tuple[str, int]]:
        """(name, number) of the values that a decoder has; the names are the same for all sizes of images."""
        yield from ((f"given{index}", number) for index, number in enumerate(self.given))
        yield from self.densities.items()


@dataclass
class Gathering:
    """How a context model runs on single positions: they are laid side by side into a small image.

    There the spatial operation becomes one of size 1, on columns: the values at the taps around each
    position.

    Args:
        prepare: from the decoded values to what the spatial operation takes, position by position.
        decoded: the number of the decoded value that `prepare` takes.
        columns: the name of the columns among the inputs.
        taps: (count, dimensions), relative to a position.
        channels: of what the spatial operation takes.
        room: shape of the small image.
        by_channel: the order of a column's values: for each channel the taps; else for each tap the channels.
    """

    prepare: Part
    decoded: int
    columns: str
    taps: np.ndarray
    channels: int
    room: tuple[int, ...]
    by_channel: bool


@dataclass
class Context:
    """A context model: densities of positions from symbols that are decoded before them.

    Args:
        run: from values, named by their numbers, to densities by name.
        decoded: numbers of the latent's decoded values that it takes.
        inputs: numbers of the other values that it takes.
        gathering: how it runs on single positions; None where it runs on the whole plane.
    """

    run: Part
    decoded: tuple[int, ...]
    inputs: tuple[int, ...]
    gathering: Gathering | None = None


@dataclass
class Step:
    """How one latent is decoded.

    Args:
        latent: the latent.
        before: computes the values `gives` from the values `needs`; both are numbers of values.
        order: positions, flat, in the groups in which they are decoded.
        context: the context model; None where there is none.
    """

    latent: Latent
    before: Part
    needs: tuple[int, ...]
    gives: tuple[int, ...]
    order: list[np.ndarray]
    context: Context | None = None
