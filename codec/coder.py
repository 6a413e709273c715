"""Symbols to bytes and back, latent by latent, in the order of the plan. No torch is needed."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from licq.codec import rans
from licq.codec.contexts import context_model
from licq.codec.parts import Latent, Part, Step
from licq.codec.tables import GaussianRows, MixtureRows, Rows, RowTable, SteppedRows
from licq.support.errors import InputError

_BLOCK, _BLOCK_OF_MIXTURES = 2**18, 2**14  # symbols whose distributions are in memory at a time

Tables = GaussianRows | MixtureRows | SteppedRows | RowTable


class Coded(Protocol):
    """What the coder knows of the images of one size; `codec.plan.Plan` is one."""

    @property
    def latents(self) -> Sequence[Latent]:
        """The latents, in their order."""
        ...

    def order(self, index: int) -> list[np.ndarray]:
        """Positions of a latent, flat, in the groups in which they are coded."""
        ...

    def encode(self, pixels: np.ndarray) -> list[dict[str, np.ndarray]]:
        """Symbols and densities of an image, uint8 (1, 3, H, W)."""
        ...

    @property
    def steps(self) -> Sequence[Step]:
        """How the latents are decoded, in their order."""
        ...

    @property
    def synthesis(self) -> tuple[Part, dict[str, int]]:
        """(what computes {"pixels"} from values by name, the numbers of these values)."""
        ...


class Coder:
    """Codes latents.

    Args:
        tables: of each entropy model, by its name; see `codec.model_tables`.
        bits: latents, means and scales are integers in units of 2^-bits.
    """

    def __init__(self, tables: Mapping[str, Tables], bits: int):
        self.tables, self.bits = dict(tables), bits

    # ------------------------------------------------------------------------------------------------- encode

    def encode(self, plan: Coded, pixels: np.ndarray) -> bytes:
        """The stream of one image: uint8 (1, 3, H, W), of the plan's size."""
        return self.encode_symbols(plan, plan.encode(pixels))

    def encode_symbols(self, plan: Coded, latents: Sequence[Mapping[str, np.ndarray]]) -> bytes:
        """The stream of symbols and densities, as `plan.encode` gives them."""
        encoder = rans.encoder()
        for index, values in enumerate(latents):
            latent, order = plan.latents[index], plan.order(index)
            count = sum(len(group) for group in order)
            symbols = values["symbols"].reshape(-1, count)
            densities = {name: values[name].reshape(-1, symbols.size) for name in latent.densities}
            flat, size = symbols.reshape(-1), self._block(latent)
            for chosen in _in_blocks(_places(order, len(symbols), count), size):
                of_block = {name: values[:, chosen] for name, values in densities.items()}
                tables = self.tables[latent.node]
                if isinstance(tables, MixtureRows):
                    encoder.push_mixtures(flat[chosen], tables, *_mixture(of_block))
                else:
                    encoder.push(flat[chosen], self._rows(latent, of_block, chosen // count))
        return encoder.flush()

    def _block(self, latent: Latent) -> int:
        return _BLOCK_OF_MIXTURES if isinstance(self.tables[latent.node], MixtureRows) else _BLOCK

    def _rows(self, latent: Latent, densities: Mapping[str, np.ndarray], channels: np.ndarray) -> Rows:
        """The distributions of symbols, (n,).

        Args:
            densities: (1, n) each.
            channels: of each symbol, (n,).
        """
        tables = self.tables[latent.node]
        if isinstance(tables, GaussianRows):
            return tables.of(densities["scales"], densities["means"] if latent.whole else None)
        assert not isinstance(tables, MixtureRows)
        table = tables.of(latent.step or 0) if isinstance(tables, SteppedRows) else tables
        if latent.shape[1] > len(table.offsets):
            raise InputError(
                f"{latent.node}: it has {latent.shape[1]} channels and {len(table.offsets)} tables; quantize "
                "the codec again"
            )
        return Rows(channels.astype(np.int32), None, table)

    # ------------------------------------------------------------------------------------------------- decode

    def decode(
        self, plan: Coded, stream: bytes, found: list[dict[str, np.ndarray]] | None = None
    ) -> np.ndarray:
        """The image of a stream: uint8 (1, 3, H, W), of the plan's size.

        Args:
            found: gets what is decoded of each latent: "symbols", "y_hat" where the decoder adds means to
                them, and densities where they do not follow from the latent itself.

        Raises:
            InputError: the stream has symbols that the model cannot have written.
        """
        decoder = rans.decoder(stream, sum(int(np.prod(latent.shape)) for latent in plan.latents))
        values: dict[int, np.ndarray] = {}
        run, needs = plan.synthesis
        steps = plan.steps
        for index, step in enumerate(steps):
            results = step.before({str(number): values[number] for number in step.needs})
            values.update((int(name), result) for name, result in results.items())
            self._decode_latent(step, decoder, values)
            if found is not None:
                found.append(_found(step, values))
            later = {number for step in steps[index + 1 :] for number in step.needs} | set(needs.values())
            values = {number: value for number, value in values.items() if number in later}
        decoder.finish()
        return run({name: values[number] for name, number in needs.items()})["pixels"]

    def _decode_latent(self, step: Step, decoder: rans.Decoder, values: dict[int, np.ndarray]) -> None:
        """Decode one latent, and add its symbols and y_hat (or z_hat) to the values of the program."""
        latent = step.latent
        count = sum(len(group) for group in step.order)
        channels = int(np.prod(latent.shape)) // count
        symbols = np.empty((channels, count), dtype=np.int32)
        y_hat = np.empty((channels, count), dtype=np.int32) if latent.decoded or step.context else None
        context = context_model(step, values, count)
        known = {}  # densities that do not depend on the latent's own symbols
        if context is None:
            known = {name: values[number].reshape(-1, count) for name, number in latent.densities.items()}
        for group in step.order:
            if context is not None:
                densities = context.densities(group)
            elif len(group) == count:
                densities = known
            else:
                densities = {name: values[:, group] for name, values in known.items()}
            decoded = self._pull(decoder, latent, densities, (channels, len(group)))
            if int(decoded.min()) < latent.limits[0] or int(decoded.max()) > latent.limits[1]:
                raise InputError(rans.DAMAGED)
            symbols[:, group] = decoded
            if y_hat is not None:
                sums = decoded << self.bits
                if not latent.whole and "means" in densities:
                    sums += densities["means"]
                y_hat[:, group] = sums
                if context is not None:
                    context.add(group, sums)
        for number in latent.symbols:
            values[number] = symbols.reshape(latent.shape)
        for number in latent.decoded:
            assert y_hat is not None
            values[number] = y_hat.reshape(latent.shape)

    def _pull(
        self,
        decoder: rans.Decoder,
        latent: Latent,
        densities: Mapping[str, np.ndarray],
        shape: tuple[int, int],
    ) -> np.ndarray:
        """Decode symbols of `shape` (channels, positions), with their densities."""
        tables = self.tables[latent.node]
        components, count = tables.count if isinstance(tables, MixtureRows) else 1, shape[0] * shape[1]
        flat = {name: values.reshape(components, count) for name, values in densities.items()}
        parts = []
        for chosen in _in_blocks(np.arange(count), self._block(latent)):
            block = slice(chosen[0], chosen[-1] + 1)
            of_block = {name: values[:, block] for name, values in flat.items()}
            if isinstance(tables, MixtureRows):
                parts.append(decoder.pull_mixtures(tables, *_mixture(of_block)))
            else:
                parts.append(decoder.pull(self._rows(latent, of_block, chosen // shape[1])))
        return (parts[0] if len(parts) == 1 else np.concatenate(parts)).reshape(shape)


def _mixture(densities: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    return densities["scales"], densities["means"], densities["weights"]


def _found(step: Step, values: Mapping[int, np.ndarray]) -> dict[str, np.ndarray]:
    latent = step.latent
    numbers = {"symbols": latent.symbols[0], **(latent.densities if step.context is None else {})}
    if latent.decoded:
        numbers["y_hat"] = latent.decoded[0]
    return {name: values[number] for name, number in numbers.items()}


def _places(order: Sequence[np.ndarray], channels: int, count: int) -> np.ndarray:
    """Where in a flat latent (channels, count) each symbol stands, in the order of coding."""
    if len(order) == 1:
        return np.arange(channels * count)
    rows = np.arange(channels)[:, None] * count
    return np.concatenate([(rows + group).reshape(-1) for group in order])


def _in_blocks(places: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Pieces of at most `size` numbers: a distribution takes many times the memory of its symbol."""
    for start in range(0, len(places), size):
        yield places[start : start + size]
