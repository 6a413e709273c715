"""An integer program cut into the parts that an encoder and a decoder run.

The encoder computes all symbols and their densities at once. The decoder takes the latents one after the
other, z and then y:

    for step in plan.steps:
        run step.before             what the densities need, from what is decoded already
        for group in step.order:
            run step.context        where there is a context model: densities from the symbols so far
            decode the symbols of the group
    run plan.synthesis              the pixels
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from licq.codec.latents import NO_FILES, EncoderOnlyError, cut, find_latents
from licq.codec.order import Reading, dependents, groups, positions_of, readings, window_side
from licq.codec.parts import Chain, Context, Gathering, Latent, Part, Step
from licq.codec.ready_plan import named_values
from licq.codec.sizes import Sizes, analysis_part, synthesis_part
from licq.integer.execution import on_arrays
from licq.integer.passes import without_duplicates
from licq.integer.program import Program
from licq.integer.tiles import Tiled
from licq.quant import operations as ops
from licq.support.errors import InputError


def _inputs(program: Program) -> tuple[int, ...]:
    return tuple(program.inputs.values())


class Plan:
    """What coding images of one size needs. Its parts are made when they are first used.

    Args:
        program: the codec's program for images of that size.
        sizes: the codec's programs for other sizes; they are needed for tiles, and to decode with an
            autoregressive context model.
        threads: CPU threads; None: PyTorch's choice.
    """

    def __init__(self, program: Program, sizes: Sizes | None, threads: int | None = None):
        self.program = without_duplicates(program)
        self.threads = threads
        self.latents = find_latents(self.program)
        coded = {}  # the symbols and densities of all latents
        for index, latent in enumerate(self.latents):
            coded[f"{index}.symbols"] = latent.symbols[0]
            coded.update({f"{index}.{name}": number for name, number in latent.densities.items()})
        self._coded, self._sizes = coded, sizes
        self._orders: dict[int, list[np.ndarray]] = {}
        self._encoder: Part | None = None
        self._steps: list[Step] | None = None
        self._synthesis: tuple[Part, dict[str, int]] | None = None

    # -------------------------------------------------------------------------------------------------- parts

    def _executable(self, part: Program) -> Part:
        return on_arrays(part, self.threads)

    def outputs(self) -> tuple[Program, dict[str, int]]:
        """(the program, the numbers of its symbols and densities by name, such as "1.scales")."""
        return self.program, self._coded

    def encode(self, pixels: np.ndarray) -> list[dict[str, np.ndarray]]:
        """Symbols and densities of an image, which are integers.

        Args:
            pixels: uint8 (1, 3, H, W), of the plan's size.

        Returns:
            For each latent {"symbols", and the names of `Latent.densities`}.

        Raises:
            InputError: the codec's forward has no bitstream.
        """
        return named_values(self.latents, self.encoder({"pixels": pixels}))

    @property
    def encoder(self) -> Part:
        """From {"pixels"} to symbols and densities by names such as "1.scales"."""
        if self._encoder is None:
            self._encoder = self._make_encoder()
        return self._encoder

    def _check(self) -> None:
        """Raises InputError where a decoder would not have what it needs: no unreadable file is written."""
        known: set[int] = set()
        try:
            for latent in self.latents:
                for name, number in latent.densities.items():
                    if (shape := self.program.values[number].shape)[2:] != latent.shape[2:]:
                        raise InputError(
                            f"{latent.node}: its {name} have the shape {shape}, its symbols {latent.shape}; "
                            "give sides that are multiples of the codec's total stride"
                        )
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

    def _make_encoder(self) -> Part:
        self._check()
        pixels = self.program.inputs["pixels"]
        tiled = self._tiled("analysis", analysis_part)
        if tiled is None:
            return self._executable(self.program.part({"pixels": pixels}, self._coded))
        latent = self.program.bottleneck(pixels, self._coded.values())
        rest = self._executable(self.program.part({"latent": latent}, self._coded))
        return Chain([tiled, rest])

    def _tiled(self, name: str, part: Callable[[Program], Program]) -> Tiled | None:
        height, width = self.program.values[self.program.inputs["pixels"]].shape[-2:]
        return self._sizes.tiled(name, part, height, width, self.threads) if self._sizes else None

    @property
    def steps(self) -> list[Step]:
        """How the latents are decoded, in their order."""
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
    def synthesis(self) -> tuple[Part, dict[str, int]]:
        """(what computes {"pixels": uint8 (1, 3, H, W)} from values by name, the numbers of these values)."""
        if self._synthesis is None:
            part = self.synthesis_of(self.program)
            run = self._tiled("synthesis", self.synthesis_of)
            self._synthesis = run or self._executable(part), part.inputs
        return self._synthesis

    def synthesis_of(self, program: Program) -> Program:
        """`synthesis_part` of this program or of the same codec's for another size of images.

        It starts from the symbols, and from the densities of latents without a context model.
        """
        latents = find_latents(program)
        without_context = [not self._readings(latent) for latent in self.latents]
        known = {
            number
            for latent, all_known in zip(latents, without_context, strict=True)
            for number in (*latent.given, *(latent.densities.values() if all_known else ()))
        }
        return synthesis_part(program, latents, known)

    def order(self, index: int) -> list[np.ndarray]:
        """Positions of a latent, flat, in the groups in which they are coded."""
        if index not in self._orders:
            latent = self.latents[index]
            context = self._readings(latent)
            self._orders[index] = groups(context, positions_of(latent.shape, context))
        return self._orders[index]

    def _readings(self, latent: Latent) -> list[Reading]:
        """What the latent's context model reads; empty where it has none."""
        given = set(latent.given)
        if latent.kind == "entropy_bottleneck" or not dependents(self.program, given).intersection(
            latent.densities.values()
        ):
            return []
        _, part = _context_part(self.program, latent)
        return readings(part, given)

    def _step(self, latent: Latent, known: set[int]) -> Step:
        reads = self._readings(latent)
        positions = positions_of(latent.shape, reads)
        order = groups(reads, positions)
        if not reads:
            outputs = {str(number): number for number in latent.densities.values()}
            before = cut(self.program, known, outputs)
            return Step(
                latent, self._executable(before), _inputs(before), tuple(latent.densities.values()), order
            )
        frontier, part = _context_part(self.program, latent)
        before = cut(self.program, known, frontier)
        gathering = None
        decoded = tuple(number for number in _inputs(part) if number in latent.given)
        inputs = tuple(number for number in _inputs(part) if number not in latent.given)
        if reads[0].is_plain:
            part, gathering = self._gathered(latent, reads[0], positions, order, part)
        context = Context(self._executable(part), decoded, inputs, gathering)
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
        """The context model on single positions, and how they are gathered; see `Gathering`.

        Args:
            reading: its only spatial operation.
            positions: the shape of the latent's positions.
            order: these positions in groups.
            part: the context model on the whole plane.
        """
        if len(positions) == 2:
            most = max(len(group) for group in order)
        else:  # that many in one channel
            most = max(int(np.bincount(group // int(np.prod(positions[1:]))).max()) for group in order)
        assert self._sizes is not None  # see the class
        pixels = self.program.values[self.program.inputs["pixels"]].shape[-1] // positions[-1]
        small = self._sizes.with_room(most, pixels)
        there = find_latents(small)[self.latents.index(latent)]
        same = _counterparts(part, _context_part(small, there)[1])
        if same is None:
            raise InputError(
                f"{latent.node}: this codec computes other steps at other image sizes, so its context "
                "model cannot be run by positions"
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
            columns, by_channel, taps = number, True, _window(window_side(operation) or 0)
        else:
            assert isinstance(operation, ops.Convolution)  # the other kind of reading, see codec.order
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
        names = {same[number]: str(number) for number in _inputs(part)}
        frontier = [number for number in names if number not in there.given]
        part = _renamed(cut(small, {*frontier, columns}, there.densities), {**names, columns: _COLUMNS})
        prepare = _renamed(cut(small, set(there.given), {"plane": source}), names)
        room = small.values[source].shape[2:]
        decoded = next(number for number in latent.given if str(number) in prepare.inputs)
        return part, Gathering(
            self._executable(prepare), decoded, _COLUMNS, taps, channels, tuple(room), by_channel
        )


_COLUMNS = "columns"


def _context_part(program: Program, latent: Latent) -> tuple[dict[str, int], Program]:
    """(the values that the context model takes besides the latent's own, its part of the program)."""
    given = set(latent.given)
    inside = dependents(program, given)
    producers = program.producers()
    frontier = set()
    for operation in cut(program, _free(program, inside) | given, latent.densities).operations:
        frontier.update(
            number
            for number in operation.inputs
            if number not in inside and not isinstance(producers[number], ops.Constant)
        )
    frontier.update(number for number in latent.densities.values() if number not in inside)
    return {str(number): number for number in sorted(frontier)}, cut(
        program, frontier | given, latent.densities
    )


def _counterparts(part: Program, other: Program) -> dict[int, int] | None:
    """For each value of a part the same value of that part at another size of images.

    None where the operations of the two parts differ.
    """
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
    """The values outside of `inside` that operations inside read; a cut is to stop at them."""
    producers = program.producers()
    return {
        n
        for op in program.operations
        if set(op.outputs) & inside
        for n in op.inputs
        if n not in inside and not isinstance(producers[n], ops.Constant)
    }


def _window(side: int) -> np.ndarray:
    """(side^2, 2): the positions of a square window, relative to its centre."""
    return np.stack(np.meshgrid(*[np.arange(side) - side // 2] * 2, indexing="ij"), -1).reshape(-1, 2)
