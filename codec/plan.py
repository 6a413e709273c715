"""A program cut into what an encoder runs, and what a decoder runs between the symbols that it reads.

Latents come one after the other: z, then those of y. For each, `before` computes what its densities need from
what is decoded already; where a context model reads the latent's own symbols, `context` is run again as these
come in.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from licq.codec.latents import NO_FILES, EncoderOnlyError, Latent, cut, find_latents
from licq.codec.order import Reading, dependents, passes, readings, wavefronts, window_side
from licq.codec.sizes import Sizes, analysis_part, synthesis_part
from licq.integer.execution import executable
from licq.integer.passes import without_duplicates
from licq.integer.program import Program
from licq.integer.tiles import Tiled
from licq.quant import operations as ops
from licq.support.errors import InputError


@dataclass
class Step:
    """How one latent is decoded.

    before: from the values `needs` to the values `gives`, by numbers. order: positions, flat, in the groups
    in which they come.
    """

    latent: Latent
    before: Callable
    needs: tuple[int, ...]
    gives: tuple[int, ...]
    order: list[np.ndarray]
    context: "Context | None" = None


@dataclass
class Context:
    """Densities of some positions of a latent from its symbols before them.

    run: by names of values to densities by name. own: the latent's decoded values that it takes. inputs: the
    other values.
    gathering: positions are taken out and laid into an image of `room` positions, with the numbers at `taps`
    of each as channels.
    """

    run: Callable
    own: tuple[int, ...]
    inputs: tuple[int, ...]
    gathering: "Gathering | None" = None


@dataclass
class Gathering:
    """What a context model reads of a plane of decoded numbers.

    prepare: from decoded numbers (the value `own`) to what the spatial operation takes, position by position.
    taps: (count, dimensions). channels: of the plane. room: the small image that the positions are laid into.
    by_channel: the columns are channels of taps; else taps of channels.
    """

    prepare: Callable
    own: int
    columns: str
    taps: np.ndarray
    channels: int
    room: tuple[int, ...]
    by_channel: bool


def _inputs(program: Program) -> tuple[int, ...]:
    return tuple(program.inputs.values())


class Plan:
    """Everything that coding images of one size needs.

    Args:
        program: of that size.
        sizes: the codec's programs of other sizes; None where there is no context model and no need for
        tiles.
        threads: of the kernels.
    """

    def __init__(self, program: Program, sizes: Sizes | None, threads: int | None = None):
        self.program = without_duplicates(program)
        self.threads = threads
        self.latents = find_latents(self.program)
        wanted = {}
        for place, latent in enumerate(self.latents):
            wanted[f"{place}.symbols"] = latent.symbols[0]
            wanted.update({f"{place}.{name}": number for name, number in latent.densities.items()})
        self._wanted, self._sizes = wanted, sizes
        self._orders: dict[int, list[np.ndarray]] = {}
        self._encoder: Callable | None = None
        self._steps: list[Step] | None = None
        self._synthesis: tuple[Callable, dict[str, int]] | None = None

    # -------------------------------------------------------------------------------------------------- parts

    def _executable(self, part: Program) -> Callable:
        return executable(part, self.threads)

    def outputs(self) -> tuple[Program, dict[str, int]]:
        """(the program, the numbers of each latent's symbols and densities as "place.name")."""
        return self.program, self._wanted

    def encode(self, pixels: Tensor) -> list[dict[str, Tensor]]:
        """For each latent its symbols and densities, whole numbers; pixels: (1, 3, H, W) uint8, padded."""
        if self._encoder is None:
            self._encoder = self._make_encoder()
        found = self._encoder({"pixels": pixels})
        return [
            {name: found[f"{place}.{name}"] for name in ("symbols", *latent.densities)}
            for place, latent in enumerate(self.latents)
        ]

    def _check(self) -> None:
        """Raises InputError where a decoder would not have what it needs: no file is written that cannot be
        read."""
        known: set[int] = set()
        try:
            for latent in self.latents:
                needed = (
                    _context_part(self.program, latent)[0].values()
                    if self._readings(latent)
                    else latent.densities.values()
                )
                cut(self.program, known, {str(number): number for number in needed})
                known.update((*needed, *latent.given))
            self.synthesis_of(self.program)
        except EncoderOnlyError as error:
            raise InputError(f"{error.node}: {NO_FILES}") from error

    def _make_encoder(self) -> Callable:
        self._check()
        pixels = self.program.inputs["pixels"]
        tiled = self._tiled("analysis", analysis_part)
        if tiled is None:
            return self._executable(self.program.part({"pixels": pixels}, self._wanted))
        latent = self.program.bottleneck(pixels, self._wanted.values())
        rest = self._executable(self.program.part({"latent": latent}, self._wanted))
        return lambda inputs: rest(tiled(inputs))

    def _tiled(self, name: str, part: Callable[[Program], Program]) -> Tiled | None:
        height, width = self.program.values[self.program.inputs["pixels"]].shape[-2:]
        return self._sizes.tiled(name, part, height, width, self.threads) if self._sizes else None

    @property
    def steps(self) -> list[Step]:
        if self._steps is None:
            known: set[int] = set()
            steps = []
            for latent in self.latents:
                step = self._step(latent, known)
                steps.append(step)
                known.update((*step.gives, *latent.given))
            self._steps = steps
        return self._steps

    @property
    def synthesis(self) -> tuple[Callable, dict[str, int]]:
        """(from known values by name to {"pixels"}, their numbers by name)."""
        if self._synthesis is None:
            part = self.synthesis_of(self.program)
            run = self._tiled("synthesis", self.synthesis_of)
            self._synthesis = run or self._executable(part), part.inputs
        return self._synthesis

    def synthesis_of(self, program: Program) -> Program:
        """`synthesis_part` of this program or one of another size, from the symbols, and where there is no
        context model from the densities."""
        latents = find_latents(program)
        without_context = [not self._readings(latent) for latent in self.latents]
        known = {
            number
            for latent, all_known in zip(latents, without_context, strict=True)
            for number in (*latent.given, *(latent.densities.values() if all_known else ()))
        }
        return synthesis_part(program, latents, known)

    def order(self, place: int) -> list[np.ndarray]:
        """Positions of a latent, flat, in the groups in which they are coded."""
        if place not in self._orders:
            latent = self.latents[place]
            found = self._readings(latent)
            self._orders[place] = _groups(found, _positions(latent, found))
        return self._orders[place]

    def _readings(self, latent: Latent) -> list[Reading]:
        own = set(latent.given)
        if latent.kind == "entropy_bottleneck" or not dependents(self.program, own).intersection(
            latent.densities.values()
        ):
            return []
        frontier, part = _context_part(self.program, latent)
        return readings(part, own)

    def _step(self, latent: Latent, known: set[int]) -> Step:
        found = self._readings(latent)
        positions = _positions(latent, found)
        order = _groups(found, positions)
        if not found:
            outputs = {str(number): number for number in latent.densities.values()}
            before = cut(self.program, known, outputs)
            return Step(
                latent, self._executable(before), _inputs(before), tuple(latent.densities.values()), order
            )
        frontier, part = _context_part(self.program, latent)
        before = cut(self.program, known, frontier)
        gathering = None
        own = tuple(number for number in _inputs(part) if number in latent.given)
        inputs = tuple(number for number in _inputs(part) if number not in latent.given)
        if found[0].is_plain:
            part, gathering = self._gathered(latent, found[0], positions, order, part)
        context = Context(self._executable(part), own, inputs, gathering)
        return Step(
            latent, self._executable(before), _inputs(before), tuple(frontier.values()), order, context
        )

    def _gathered(
        self,
        latent: Latent,
        reading: Reading,
        positions: tuple[int, ...],
        order: list[np.ndarray],
        part: Program,
    ) -> tuple[Program, Gathering]:
        """The context model `part` of an image with room for the positions of a group, which takes columns of
        numbers in place of neighbours."""
        if len(positions) == 2:
            most = max(len(group) for group in order)
        else:  # that many in one channel
            most = max(int(np.bincount(group // int(np.prod(positions[1:]))).max()) for group in order)
        pixels = self.program.values[self.program.inputs["pixels"]].shape[-1] // positions[-1]
        small = self._sizes.with_room(most, pixels)
        there = find_latents(small)[self.latents.index(latent)]
        same = _counterparts(part, _context_part(small, there)[1])
        if same is None:
            raise InputError(
                f"{latent.node}: this codec computes other steps at other image sizes, so its context model cannot be run by positions"
            )
        source, number = same[reading.operation.inputs[0]], same[reading.operation.outputs[0]]
        operation = small.producers()[number]
        shape = small.values[number].shape
        channels = small.values[source].shape[1]
        numbers = small.values[source].range.with_zero
        small = Program(
            list(small.operations),
            list(small.values),
            dict(small.inputs),
            dict(small.outputs),
            list(small.boundaries),
        )
        if isinstance(operation, ops.Layout):  # an unfolding: its result is the columns
            columns, by_channel, taps = number, True, _window(window_side(operation))
        else:
            taps = reading.taps
            centre = [size // 2 for size in operation.weight.shape[2:]]
            index = tuple(torch.from_numpy(taps[:, axis] + centre[axis]) for axis in range(taps.shape[1]))
            weight = operation.weight[(slice(None), slice(None), *index)]  # (outputs, channels, taps)
            weight = weight.transpose(1, 2).reshape(len(weight), -1, *[1] * taps.shape[1])
            columns = small.value((1, weight.shape[1], *shape[2:]), numbers)
            ones = (1,) * taps.shape[1]
            changed = replace(
                operation,
                inputs=(columns,),
                weight=weight.contiguous(),
                stride=ones,
                padding=(0,) * taps.shape[1],
                dilation=ones,
            )
            small.operations = [changed if step is operation else step for step in small.operations]
            by_channel = False
        # inputs keep the names that they have at the image's own size
        names = {same[own]: str(own) for own in _inputs(part)}
        frontier = [number for number in names if number not in there.given]
        part = _renamed(cut(small, {*frontier, columns}, there.densities), {**names, columns: _COLUMNS})
        prepare = _renamed(cut(small, set(there.given), {"plane": source}), names)
        room = small.values[source].shape[2:]
        own = next(number for number in latent.given if str(number) in prepare.inputs)
        return part, Gathering(
            self._executable(prepare), own, _COLUMNS, taps, channels, tuple(room), by_channel
        )


_COLUMNS = "columns"


def _context_part(program: Program, latent: Latent) -> tuple[dict[str, int], Program]:
    """(what the context takes besides the latent's own decoded values, the part of the program)."""
    own = set(latent.given)
    inside = dependents(program, own)
    producers = program.producers()
    frontier = set()
    for operation in cut(program, _free(program, inside) | own, latent.densities).operations:
        frontier.update(
            number
            for number in operation.inputs
            if number not in inside and not isinstance(producers[number], ops.Constant)
        )
    frontier.update(number for number in latent.densities.values() if number not in inside)
    return {str(number): number for number in sorted(frontier)}, cut(
        program, frontier | own, latent.densities
    )


def _counterparts(part: Program, other: Program) -> dict[int, int] | None:
    """For each value of a part that of the same part at another size of images; None where the steps are
    others."""
    steps, others = (
        [op for op in program.operations if not isinstance(op, ops.Input)] for program in (part, other)
    )
    if len(steps) != len(others):
        return None
    same: dict[int, int] = {}
    for a, b in zip(steps, others):
        if (type(a), a.node, len(a.inputs), len(a.outputs)) != (
            type(b),
            b.node,
            len(b.inputs),
            len(b.outputs),
        ):
            return None
        if any(same.setdefault(x, y) != y for x, y in zip((*a.inputs, *a.outputs), (*b.inputs, *b.outputs))):
            return None
    return same


def _renamed(part: Program, names: dict[int, str]) -> Program:
    return part.part(
        {names.get(number, name): number for name, number in part.inputs.items()}, dict(part.outputs)
    )


def _free(program: Program, inside: set[int]) -> set[int]:
    """Values outside `inside` that are read from inside, so that a cut stops at them."""
    producers = program.producers()
    return {
        n
        for op in program.operations
        if set(op.outputs) & inside
        for n in op.inputs
        if n not in inside and not isinstance(producers[n], ops.Constant)
    }


def _window(side: int) -> np.ndarray:
    return np.stack(np.meshgrid(*[np.arange(side) - side // 2] * 2, indexing="ij"), -1).reshape(-1, 2)


def _positions(latent: Latent, found: list[Reading]) -> tuple[int, ...]:
    """The shape of the latent's positions: rows and columns, or channels too where the context model runs
    over them."""
    volume = bool(found) and found[0].taps.shape[1] == 3
    return tuple(latent.shape[1:] if volume else latent.shape[2:])


def _groups(found: list[Reading], positions: tuple[int, ...]) -> list[np.ndarray]:
    if not found:
        return [np.arange(int(np.prod(positions)))]
    if len(found) == 1 and found[0].is_plain:
        time = wavefronts(found[0], positions)
    else:
        if any(reading.is_plain for reading in found):
            raise InputError(
                "a context model of several convolutions without masks has no decoding order here"
            )
        time = passes(found, positions)
        if time is None:
            raise InputError("this context model needs more passes than there is an order for")
    time = time.flatten()
    order = np.argsort(time, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(time[order])) + 1)
