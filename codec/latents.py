"""The latents of a codec, found in its integer program, and the parts of the program between values."""

from collections.abc import Mapping

import torch

from licq.codec.parts import Latent
from licq.codec.pieces import pieces_of
from licq.codec.tables import STEP_OF_Z_BITS
from licq.integer.groups import constants_of
from licq.integer.program import Program
from licq.quant.operations import Input
from licq.support.errors import InputError

NO_FILES = (
    "this codec's forward computes y_hat from other symbols than those whose rate it estimates, so no "
    "bitstream gives its images; evaluate it with estimated rates (without `real`)"
)


class EncoderOnlyError(InputError):
    """A decoder would need a value that only the encoder has, from the node of name `node`."""

    def __init__(self, node: str):
        super().__init__(f"{node}: the decoder would need what only the encoder has")
        self.node = node


def find_latents(program: Program) -> list[Latent]:
    """The latents of a program, in the order in which they are coded: z, then y.

    Args:
        program: with no operation in it twice; see `integer.passes.without_duplicates`.

    Raises:
        InputError: y_hat is not computed from the symbols whose rate the codec estimates.
    """
    read = {number for operation in program.operations for number in operation.inputs} | set(
        program.outputs.values()
    )
    of_z = [boundary for boundary in program.boundaries if boundary.kind == "entropy_bottleneck"]
    latents = []
    for z in of_z:
        same = [
            b
            for b in program.boundaries
            if b.latent == z.latent and _same_constant(program, b.means, z.means)
        ]
        symbols = tuple({z.symbols: 0, **{b.symbols: 0 for b in same}})
        step = None if z.step is None else round(float(z.step) * 2**STEP_OF_Z_BITS)
        latents.append(
            Latent(
                z.node,
                "entropy_bottleneck",
                z.latent,
                symbols,
                (),
                {},
                False,
                program.values[z.symbols].shape,
                step,
                _limits(program, z.symbols),
            )
        )
    coded: set[int] = set()
    for density in program.boundaries:
        if density.kind not in ("gaussian", "mixture"):
            continue
        group = [b for b in program.boundaries if b.latent == density.latent and b.decoded not in coded]
        used = [b for b in group if b.decoded in read]
        offsets = next((b for b in used if b.kind == "offsets"), None)
        pieces = []
        if not used:
            pieces = [b for b in pieces_of(program, density) if b.decoded in read and b.decoded not in coded]
            used = pieces
        if not used:  # y is scaled for the density
            offsets = next(
                (
                    b
                    for b in program.boundaries
                    if b.kind == "offsets" and b.decoded in read and b.decoded not in coded
                ),
                None,
            )
        used = [offsets] if offsets else used
        others = [
            b
            for b in program.boundaries
            if offsets and b.kind == "round" and b.decoded in read and b.decoded not in coded
        ]
        whole = density.whole or any(b.means is None for b in used if b.kind == "round")
        final = (
            offsets
            or (density if pieces else None)
            or next((b for b in used if b.symbols == density.symbols), None)
            or (used[-1] if used else None)
        )
        if final is None or others or (whole and any(b.means is not None and not b.whole for b in used)):
            raise InputError(f"{density.node}: {NO_FILES}")
        densities = {
            name: number
            for name in ("scales", "means", "weights")
            if (number := getattr(density, name)) is not None
        }
        decoded = tuple({b.decoded: 0 for b in used})
        coded.update(decoded)
        shape = program.values[final.symbols].shape
        latents.append(
            Latent(
                density.node,
                density.kind,
                final.latent,
                (final.symbols,),
                () if offsets else decoded,
                densities,
                whole,
                shape,
                limits=_limits(program, final.symbols),
                estimated=density.whole or density.means is None or not whole,
            )
        )
    return latents


def _limits(program: Program, number: int) -> tuple[int, int]:
    numbers = program.values[number].range
    return numbers.low, numbers.high


def _same_constant(program: Program, a: int | None, b: int | None) -> bool:
    values = constants_of(program)
    return a == b or (a in values and b in values and torch.equal(values[a].flatten(), values[b].flatten()))


def cut(program: Program, known: set[int], outputs: Mapping[str, int]) -> Program:
    """The part of a program that computes `outputs` from `known` values, as far as it needs them.

    Args:
        known: numbers of values.
        outputs: name -> number.

    Returns:
        A program whose inputs are named by their numbers.

    Raises:
        EncoderOnlyError: the outputs depend on the pixels in another way than through the known values.
    """
    producers = program.producers()
    used, seen, pending = set(), set(), list(outputs.values())
    while pending:
        number = pending.pop()
        if number in seen:
            continue
        seen.add(number)
        if number in known:
            used.add(number)
            continue
        operation = producers[number]
        if isinstance(operation, Input):
            raise EncoderOnlyError(operation.node)
        pending.extend(operation.inputs)
    return program.part({str(number): number for number in sorted(used)}, dict(outputs))
