"""Symbols to bytes and back, latent by latent, in the order of the plan; entropy coding is CompressAI's
rANS."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from compressai.ans import BufferedRansEncoder, RansDecoder
from torch import Tensor

from licq.codec.latents import Latent
from licq.codec.plan import Gathering, Plan, Step
from licq.codec.tables import GaussianRows, MixtureRows, Rows, SteppedRows, bottleneck_rows
from licq.quant.boundaries import QuantEntropyBottleneck, QuantGaussianMixture, QuantVariableBottleneck
from licq.quant.model import QuantModel
from licq.quant.serialization import make_tables
from licq.support.errors import InputError

_BEHIND = 16  # a byte of a hostile stream can have the decoder read so many behind it
_BYTES_A_SYMBOL = 4
_TOGETHER, _MIXTURES_TOGETHER = 2**18, 2**14  # symbols whose rows are made at a time
_DAMAGED = "the stream holds symbols that this model cannot have written; it is damaged or of another model"


class Coder:
    """Codes latents with the tables of a frozen model."""

    def __init__(self, model: QuantModel):
        make_tables(model)
        self.bits = model.config.boundary_bits
        self._tables = {}
        for node in model.nodes.values():
            if isinstance(node, QuantVariableBottleneck) and node.cumulative is not None:
                self._tables[node.name] = SteppedRows(node.cumulative)
            elif isinstance(node, QuantEntropyBottleneck):
                inner = node.module
                self._tables[node.name] = bottleneck_rows(
                    inner._quantized_cdf, inner._cdf_length, inner._offset
                )
            elif isinstance(node, QuantGaussianMixture):
                self._tables[node.name] = MixtureRows(node.density, self.bits, node.module.K)
            elif hasattr(node, "density"):
                self._tables[node.name] = GaussianRows(node.density, self.bits)

    # ------------------------------------------------------------------------------------------------- encode

    def encode(self, plan: Plan, pixels: Tensor) -> bytes:
        """One image (1, 3, H, W), uint8, of the plan's size."""
        encoder = BufferedRansEncoder()
        for place, (latent, found) in enumerate(zip(plan.latents, plan.encode(pixels), strict=True)):
            order = plan.order(place)
            count = sum(len(group) for group in order)
            symbols = found["symbols"].reshape(-1, count)
            densities = {name: found[name].reshape(-1, count) for name in latent.densities}
            for group in order:
                chosen = torch.from_numpy(group)
                self._push(
                    encoder,
                    latent,
                    symbols[:, chosen],
                    {name: part[:, chosen] for name, part in densities.items()},
                )
        return encoder.flush()

    def _push(
        self, encoder: BufferedRansEncoder, latent: Latent, symbols: Tensor, densities: Mapping[str, Tensor]
    ) -> None:
        whole = symbols.flatten().numpy()
        for piece, rows in self._rows(latent, densities, symbols.shape):
            values = (whole[piece].astype(np.int64) - rows.base).tolist()
            if (
                latent.kind == "mixture"
            ):  # three edges around the symbol are all that the encoder needs of a long row
                rows, values = _shortened(rows, values)
            encoder.encode_with_indexes(values, rows.rows.tolist(), rows.cdfs, rows.sizes, rows.offsets)

    def _rows(
        self, latent: Latent, densities: Mapping[str, Tensor], shape: tuple[int, ...]
    ) -> Iterator[tuple[slice, Rows]]:
        """The distributions of symbols (channels, positions), flat, piece by piece: rows take many times the
        memory of symbols."""
        tables, count = self._tables[latent.node], shape[0] * shape[1]
        components = tables.count if latent.kind == "mixture" else 1
        flat = {name: part.reshape(components, count) for name, part in densities.items()}
        together = _TOGETHER if latent.kind != "mixture" else _MIXTURES_TOGETHER
        for start in range(0, count, together):
            piece = slice(start, min(start + together, count))
            parts = {name: part[:, piece] for name, part in flat.items()}
            if latent.kind == "entropy_bottleneck":
                cdfs, offsets = tables.of(latent.step) if isinstance(tables, SteppedRows) else tables
                channels = np.arange(piece.start, piece.stop) // shape[1]
                rows = Rows(channels, np.zeros(len(channels), dtype=np.int64), cdfs, offsets)
            elif latent.kind == "mixture":
                rows = tables.of(parts["scales"], parts["means"], parts["weights"])
            else:
                rows = tables.of(parts["scales"], parts["means"] if latent.whole else None)
            yield piece, rows

    # ------------------------------------------------------------------------------------------------- decode

    def decode(self, plan: Plan, stream: bytes) -> Tensor:
        """The pixels (1, 3, H, W), uint8, of a stream that `encode` made of an image of the plan's size.

        Raises:
            InputError: symbols that the model cannot have written.
        """
        decoder = RansDecoder()
        count = sum(int(np.prod(latent.shape)) for latent in plan.latents)
        decoder.set_stream(stream + bytes(_BEHIND * len(stream) + _BYTES_A_SYMBOL * count + 64))
        values: dict[int, Tensor] = {}
        for step in plan.steps:
            values.update(_run(step.before, step.needs, values))
            self._decode_latent(plan, step, decoder, values)
        run, needs = plan.synthesis
        return run({name: values[number] for name, number in needs.items()})["pixels"]

    def _decode_latent(self, plan: Plan, step: Step, decoder: RansDecoder, values: dict[int, Tensor]) -> None:
        latent, program = step.latent, plan.program
        count = sum(len(group) for group in step.order)
        channels = int(np.prod(latent.shape)) // count
        symbols = torch.zeros((channels, count), dtype=torch.int64)
        context = _context(step, values, count)
        densities = (
            None
            if context
            else {name: values[number].reshape(-1, count) for name, number in latent.densities.items()}
        )
        means = torch.zeros((channels, count), dtype=torch.int64)
        limits = program.values[latent.symbols[0]].range
        for group in step.order:
            chosen = torch.from_numpy(group)
            here = (
                context.densities(chosen)
                if context
                else {name: part[:, chosen] for name, part in densities.items()}
            )
            found = self._pull(decoder, latent, here, (channels, len(group)))
            if int(found.min()) < limits.low or int(found.max()) > limits.high:
                raise InputError(_DAMAGED)
            symbols[:, chosen] = found
            if not latent.whole and "means" in here:
                means[:, chosen] = here["means"].to(torch.int64)
            if context:
                context.add(chosen, (found << self.bits) + means[:, chosen])
        shape = latent.shape
        for number in latent.symbols:
            values[number] = symbols.reshape(shape).to(program.values[number].dtype)
        decoded = ((symbols << self.bits) + means).reshape(shape)
        for number in latent.decoded:
            values[number] = decoded.to(program.values[number].dtype)

    def _pull(
        self, decoder: RansDecoder, latent: Latent, densities: Mapping[str, Tensor], shape: tuple[int, int]
    ) -> Tensor:
        found = np.empty(shape[0] * shape[1], dtype=np.int64)
        for piece, rows in self._rows(latent, densities, shape):
            found[piece] = decoder.decode_stream(rows.rows.tolist(), rows.cdfs, rows.sizes, rows.offsets)
            found[piece] += rows.base
        return torch.from_numpy(found).reshape(shape)


def _run(run, needs: tuple[int, ...], values: Mapping[int, Tensor]) -> dict[int, Tensor]:
    return {
        int(name): tensor for name, tensor in run({str(number): values[number] for number in needs}).items()
    }


def _shortened(rows: Rows, values: list[int]) -> tuple[Rows, list[int]]:
    """The same code from rows of the symbol's own bin, what is below and what is above."""
    cdfs, short = [], []
    for cdf, value in zip(rows.cdfs, values):
        if 0 <= value < len(cdf) - 2:
            low, high = cdf[value], cdf[value + 1]
            cdfs.append([0, low, high, 1 << 16] if low else [0, high, 1 << 16])
            short.append(1 if low else 0)
        else:
            cdfs.append(cdf)
            short.append(value)
    return Rows(rows.rows, rows.base, cdfs, rows.offsets), short


# --------------------------------------------------------------------------------------------- context models


def _context(step: Step, values: Mapping[int, Tensor], count: int) -> "_Planes | _Columns | None":
    if step.context is None:
        return None
    return (
        _Planes(step, values, count)
        if step.context.gathering is None
        else _Columns(step, step.context.gathering, values, count)
    )


class _Planes:
    """The context model over the whole plane, once a pass."""

    def __init__(self, step: Step, values: Mapping[int, Tensor], count: int):
        self.context, self.latent, self.count = step.context, step.latent, count
        self.given = {str(number): values[number] for number in self.context.inputs}
        self.decoded = torch.zeros((int(np.prod(step.latent.shape)) // count, count), dtype=torch.int32)

    def densities(self, chosen: Tensor) -> dict[str, Tensor]:
        own = self.decoded.reshape(self.latent.shape)
        found = self.context.run({**self.given, **{str(number): own for number in self.context.own}})
        return {name: part.reshape(-1, self.count)[:, chosen] for name, part in found.items()}

    def add(self, chosen: Tensor, decoded: Tensor) -> None:
        self.decoded[:, chosen] = decoded.to(torch.int32)


class _Columns:
    """The context model at the positions of one front, from what lies at its taps around them."""

    def __init__(self, step: Step, gathering: Gathering, values: Mapping[int, Tensor], count: int):
        self.context, self.gathering = step.context, gathering
        self.room = int(np.prod(gathering.room))
        self.volume = gathering.taps.shape[1] == 3
        shape = step.latent.shape[1:] if self.volume else step.latent.shape[2:]
        self.a_channel = count // shape[0]
        margin = np.abs(gathering.taps).max(0)
        padded = np.asarray(shape) + 2 * margin
        self.plane: Tensor | None = None
        self.padded = int(np.prod(padded))
        strides = np.cumprod([1, *padded[:0:-1]])[::-1]
        grid = np.indices(shape).reshape(len(shape), -1).T + margin
        self.places = torch.from_numpy(grid @ strides)  # of each position in the padded plane
        self.taps = torch.from_numpy(gathering.taps @ strides)
        self.rows = {}
        for number in self.context.inputs:
            value = values[number]
            if tuple(value.shape[-len(shape) :]) != tuple(shape):
                raise InputError(
                    f"{step.latent.node}: its context model takes more than what lies at each position"
                )
            self.rows[str(number)] = value.reshape(-1, count).T.contiguous()

    def _slots(self, chosen: Tensor) -> Tensor:
        """Where each position is laid in the room: in a volume, into its own channel, whose parameters differ
        from others'."""
        if not self.volume:
            return torch.arange(len(chosen))
        channel = chosen // self.a_channel  # ascending, as positions of one front are
        first = torch.searchsorted(channel, channel)
        return channel * (self.room // self.gathering.room[0]) + torch.arange(len(chosen)) - first

    def _laid(self, rows: Tensor, slots: Tensor) -> Tensor:
        """(positions, channels) as an image of the room, channels last in memory."""
        full = rows.new_zeros((self.room, rows.shape[1]))
        full[slots] = rows
        return full.reshape(1, *self.gathering.room, -1).movedim(-1, 1)

    def densities(self, chosen: Tensor) -> dict[str, Tensor]:
        gathering, slots = self.gathering, self._slots(chosen)
        inputs = {name: self._laid(rows[chosen], slots) for name, rows in self.rows.items()}
        if self.plane is None:
            self.plane = self._empty()
        columns = self.plane[self.places[chosen][:, None] + self.taps]  # (positions, taps, channels)
        if gathering.by_channel:
            unfolded = columns.new_zeros((self.room, columns.shape[1] * columns.shape[2]))
            unfolded[slots] = columns.transpose(1, 2).flatten(1)
            inputs[gathering.columns] = unfolded.T[None]
        else:
            inputs[gathering.columns] = self._laid(columns.flatten(1), slots)
        found = self.context.run(inputs)
        return {name: part.reshape(-1, self.room)[:, slots] for name, part in found.items()}

    def _empty(self) -> Tensor:
        return self._prepared(
            torch.zeros((1, 1), dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        ).new_zeros((self.padded, self.gathering.channels))

    def _prepared(self, decoded: Tensor, slots: Tensor) -> Tensor:
        """decoded: (channels, positions); what the spatial operation takes, (positions, channels)."""
        gathering = self.gathering
        channels = 1 if self.volume else gathering.channels
        full = torch.zeros((channels, self.room), dtype=torch.int32)
        full[:, slots] = decoded.to(torch.int32)
        shape = (1, *gathering.room) if self.volume else (1, channels, *gathering.room)
        plane = gathering.prepare({str(gathering.own): full.reshape(shape)})["plane"]
        return plane.reshape(-1, self.room).T[slots]

    def add(self, chosen: Tensor, decoded: Tensor) -> None:
        self.plane[self.places[chosen]] = self._prepared(decoded, self._slots(chosen))
