"""Symbols to bytes and back, latent by latent, in the order of the plan.

The entropy coder is CompressAI's rANS.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from compressai.ans import BufferedRansEncoder, RansDecoder
from torch import Tensor

from licq.codec.latents import Latent
from licq.codec.plan import Context, Gathering, Plan, Step
from licq.codec.row_checks import check_tables
from licq.codec.tables import GaussianRows, MixtureRows, Rows, SteppedRows, bottleneck_rows
from licq.quant.boundaries import QuantEntropyBottleneck, QuantGaussianMixture, QuantVariableBottleneck
from licq.quant.model import QuantModel
from licq.support.errors import InputError

# CompressAI's decoder reads on behind the end of a stream. Bytes that one byte of a hostile stream, and each
# symbol, can have it read there:
_BYTES_BEHIND_A_BYTE, _BYTES_BEHIND_A_SYMBOL = 16, 4
_BLOCK, _BLOCK_OF_MIXTURES = 2**18, 2**14  # symbols whose distributions are in memory at a time
_DAMAGED = "the stream holds symbols that this model cannot have written; it is damaged or of another model"


_Tables = GaussianRows | MixtureRows | SteppedRows | tuple[list[list[int]], list[int]]


class Coder:
    """Codes latents with the tables of a frozen model.

    Raises:
        InputError: the model has no usable tables.
    """

    def __init__(self, model: QuantModel):
        check_tables(model)
        self.bits = model.config.boundary_bits
        self._tables: dict[str, _Tables] = {}  # of each entropy model, by its name
        for node in model.nodes.values():
            if isinstance(node, QuantVariableBottleneck) and node.cumulative is not None:
                self._tables[node.name] = SteppedRows(node.cumulative)
            elif isinstance(node, QuantEntropyBottleneck):
                module: Any = node.module
                self._tables[node.name] = bottleneck_rows(
                    module._quantized_cdf, module._cdf_length, module._offset
                )
            elif isinstance(node, QuantGaussianMixture):
                mixture: Any = node.module
                self._tables[node.name] = MixtureRows(node.density, self.bits, mixture.K)
            elif hasattr(node, "density"):
                self._tables[node.name] = GaussianRows(node.density, self.bits)

    # ------------------------------------------------------------------------------------------------- encode

    def encode(self, plan: Plan, pixels: Tensor) -> bytes:
        """The stream of one image: uint8 (1, 3, H, W), of the plan's size."""
        encoder = BufferedRansEncoder()
        for index, (latent, values) in enumerate(zip(plan.latents, plan.encode(pixels), strict=True)):
            order = plan.order(index)
            count = sum(len(group) for group in order)
            symbols = values["symbols"].reshape(-1, count)
            densities = {name: values[name].reshape(-1, count) for name in latent.densities}
            for group in order:
                positions = torch.from_numpy(group)
                self._push(
                    encoder,
                    latent,
                    symbols[:, positions],
                    {name: values[:, positions] for name, values in densities.items()},
                )
        return encoder.flush()

    def _push(
        self, encoder: BufferedRansEncoder, latent: Latent, symbols: Tensor, densities: Mapping[str, Tensor]
    ) -> None:
        """Encode symbols (channels, positions), with their densities."""
        flat = symbols.flatten().numpy()
        for block, rows in self._rows(latent, densities, (symbols.shape[0], symbols.shape[1])):
            values = (flat[block].astype(np.int64) - rows.base).tolist()
            if latent.kind == "mixture":
                rows, values = _shortened(rows, values)
            encoder.encode_with_indexes(values, rows.rows.tolist(), rows.cdfs, rows.sizes, rows.offsets)

    def _rows(
        self, latent: Latent, densities: Mapping[str, Tensor], shape: tuple[int, int]
    ) -> Iterator[tuple[slice, Rows]]:
        """The distributions of symbols (channels, positions), flat, in blocks.

        In blocks because a distribution takes many times the memory of its symbol.
        """
        tables, count = self._tables[latent.node], shape[0] * shape[1]
        components, size = (
            (tables.count, _BLOCK_OF_MIXTURES) if isinstance(tables, MixtureRows) else (1, _BLOCK)
        )
        flat = {name: values.reshape(components, count) for name, values in densities.items()}
        for start in range(0, count, size):
            block = slice(start, min(start + size, count))
            of_block = {name: values[:, block] for name, values in flat.items()}
            if isinstance(tables, MixtureRows):
                rows = tables.of(of_block["scales"], of_block["means"], of_block["weights"])
            elif isinstance(tables, GaussianRows):
                rows = tables.of(of_block["scales"], of_block["means"] if latent.whole else None)
            else:
                cdfs, offsets = tables.of(latent.step or 0) if isinstance(tables, SteppedRows) else tables
                channels = np.arange(block.start, block.stop) // shape[1]
                if shape[0] > len(cdfs):
                    raise InputError(f"{latent.node}: it has {shape[0]} channels and {len(cdfs)} tables")
                rows = Rows(channels, np.zeros(len(channels), dtype=np.int64), cdfs, offsets)
            yield block, rows

    # ------------------------------------------------------------------------------------------------- decode

    def decode(self, plan: Plan, stream: bytes) -> Tensor:
        """The image of a stream: uint8 (1, 3, H, W), of the plan's size.

        Raises:
            InputError: the stream has symbols that the model cannot have written.
        """
        decoder = RansDecoder()
        count = sum(int(np.prod(latent.shape)) for latent in plan.latents)
        padding = _BYTES_BEHIND_A_BYTE * len(stream) + _BYTES_BEHIND_A_SYMBOL * count + 64
        decoder.set_stream(stream + bytes(padding))
        values: dict[int, Tensor] = {}
        for step in plan.steps:
            values.update(_run(step.before, step.needs, values))
            self._decode_latent(plan, step, decoder, values)
        run, needs = plan.synthesis
        return run({name: values[number] for name, number in needs.items()})["pixels"]

    def _decode_latent(self, plan: Plan, step: Step, decoder: RansDecoder, values: dict[int, Tensor]) -> None:
        """Decode one latent, and add its symbols and y_hat (or z_hat) to the values of the program."""
        latent, program = step.latent, plan.program
        count = sum(len(group) for group in step.order)
        channels = int(np.prod(latent.shape)) // count
        symbols = torch.zeros((channels, count), dtype=torch.int64)
        means = torch.zeros((channels, count), dtype=torch.int64)
        limits = program.values[latent.symbols[0]].range
        context = _context_model(step, values, count)
        known = {}  # densities that do not depend on the latent's own symbols
        if context is None:
            known = {name: values[number].reshape(-1, count) for name, number in latent.densities.items()}
        for group in step.order:
            positions = torch.from_numpy(group)
            if context is None:
                densities = {name: values[:, positions] for name, values in known.items()}
            else:
                densities = context.densities(positions)
            decoded = self._pull(decoder, latent, densities, (channels, len(group)))
            if int(decoded.min()) < limits.low or int(decoded.max()) > limits.high:
                raise InputError(_DAMAGED)
            symbols[:, positions] = decoded
            if not latent.whole and "means" in densities:
                means[:, positions] = densities["means"].to(torch.int64)
            if context is not None:
                context.add(positions, (decoded << self.bits) + means[:, positions])
        for number in latent.symbols:
            values[number] = symbols.reshape(latent.shape).to(program.values[number].dtype)
        y_hat = ((symbols << self.bits) + means).reshape(latent.shape)
        for number in latent.decoded:
            values[number] = y_hat.to(program.values[number].dtype)

    def _pull(
        self, decoder: RansDecoder, latent: Latent, densities: Mapping[str, Tensor], shape: tuple[int, int]
    ) -> Tensor:
        """Decode symbols of `shape` (channels, positions), with their densities."""
        symbols = np.empty(shape[0] * shape[1], dtype=np.int64)
        for block, rows in self._rows(latent, densities, shape):
            symbols[block] = decoder.decode_stream(rows.rows.tolist(), rows.cdfs, rows.sizes, rows.offsets)
            symbols[block] += rows.base
        return torch.from_numpy(symbols).reshape(shape)


def _run(run: Callable, needs: tuple[int, ...], values: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """The results of a part of the program whose inputs and outputs are named by their numbers."""
    results = run({str(number): values[number] for number in needs})
    return {int(name): tensor for name, tensor in results.items()}


def _shortened(rows: Rows, values: list[int]) -> tuple[Rows, list[int]]:
    """The same code from distributions of three bins: the symbol's, what is below it and what is above.

    The encoder needs no more of a long distribution.
    """
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


def _context_model(step: Step, values: Mapping[int, Tensor], count: int) -> "_Planes | _Columns | None":
    """The context model of a latent of `count` positions; None where it has none."""
    if step.context is None:
        return None
    if step.context.gathering is None:
        return _Planes(step.context, step.latent, values, count)
    return _Columns(step.context, step.context.gathering, step.latent, values, count)


class _Planes:
    """A context model that computes the whole plane once a pass.

    Args:
        count: positions of the latent.
    """

    def __init__(self, context: Context, latent: Latent, values: Mapping[int, Tensor], count: int):
        self.context, self.latent, self.count = context, latent, count
        self.inputs = {str(number): values[number] for number in context.inputs}
        self.decoded = torch.zeros((int(np.prod(latent.shape)) // count, count), dtype=torch.int32)

    def densities(self, positions: Tensor) -> dict[str, Tensor]:
        """The densities at some positions, (channels, len(positions)) each."""
        plane = self.decoded.reshape(self.latent.shape)
        results = self.context.run({**self.inputs, **{str(number): plane for number in self.context.decoded}})
        return {name: values.reshape(-1, self.count)[:, positions] for name, values in results.items()}

    def add(self, positions: Tensor, decoded: Tensor) -> None:
        """Take over what is decoded at some positions, (channels, len(positions))."""
        self.decoded[:, positions] = decoded.to(torch.int32)


class _Columns:
    """A context model that computes the positions of one wavefront, from the values at its taps around each.

    The positions are laid side by side into a small image, the room, on which the rest of the context model
    runs. Where the context model convolves over channels too, positions are (channel, row, column), and each
    is laid into its own channel, because the channels' parameters differ.

    Args:
        count: positions of the latent.
    """

    def __init__(
        self,
        context: Context,
        gathering: Gathering,
        latent: Latent,
        values: Mapping[int, Tensor],
        count: int,
    ):
        self.context, self.gathering = context, gathering
        self.room = int(np.prod(gathering.room))
        self.volume = gathering.taps.shape[1] == 3
        shape = latent.shape[1:] if self.volume else latent.shape[2:]
        self.positions_a_channel = count // shape[0]
        margin = np.abs(gathering.taps).max(0)
        padded = np.asarray(shape) + 2 * margin
        self.plane: Tensor | None = None  # (positions with a margin, channels), made with the first densities
        self.padded = int(np.prod(padded))
        strides = np.cumprod([1, *padded[:0:-1]])[::-1]
        coordinates = np.indices(shape).reshape(len(shape), -1).T + margin
        self.rows_of_plane = torch.from_numpy(coordinates @ strides)  # of each position
        self.taps = torch.from_numpy(gathering.taps @ strides)
        self.inputs = {}
        for number in context.inputs:
            value = values[number]
            if tuple(value.shape[-len(shape) :]) != tuple(shape):
                raise InputError(
                    f"{latent.node}: its context model takes more than what lies at each position"
                )
            self.inputs[str(number)] = value.reshape(-1, count).T.contiguous()

    def densities(self, positions: Tensor) -> dict[str, Tensor]:
        """The densities at some positions, (channels, len(positions)) each."""
        gathering, slots = self.gathering, self._slots(positions)
        inputs = {name: self._laid(values[positions], slots) for name, values in self.inputs.items()}
        neighbours = self._plane()[self.rows_of_plane[positions][:, None] + self.taps]
        if gathering.by_channel:  # neighbours: (positions, taps, channels)
            unfolded = neighbours.new_zeros((self.room, neighbours.shape[1] * neighbours.shape[2]))
            unfolded[slots] = neighbours.transpose(1, 2).flatten(1)
            inputs[gathering.columns] = unfolded.T[None]
        else:
            inputs[gathering.columns] = self._laid(neighbours.flatten(1), slots)
        results = self.context.run(inputs)
        return {name: values.reshape(-1, self.room)[:, slots] for name, values in results.items()}

    def add(self, positions: Tensor, decoded: Tensor) -> None:
        """Take over what is decoded at some positions, (channels, len(positions))."""
        self._plane()[self.rows_of_plane[positions]] = self._prepared(decoded, self._slots(positions))

    def _plane(self) -> Tensor:
        if self.plane is None:
            one = self._prepared(torch.zeros((1, 1), dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
            self.plane = one.new_zeros((self.padded, self.gathering.channels))
        return self.plane

    def _slots(self, positions: Tensor) -> Tensor:
        """Where each position is laid in the room, (len(positions),)."""
        if not self.volume:
            return torch.arange(len(positions))
        channel = positions // self.positions_a_channel  # ascending, as positions of one wavefront are
        first = torch.searchsorted(channel, channel)
        return channel * (self.room // self.gathering.room[0]) + torch.arange(len(positions)) - first

    def _laid(self, rows: Tensor, slots: Tensor) -> Tensor:
        """(positions, channels) as an image of the room, channels last in memory."""
        full = rows.new_zeros((self.room, rows.shape[1]))
        full[slots] = rows
        return full.reshape(1, *self.gathering.room, -1).movedim(-1, 1)

    def _prepared(self, decoded: Tensor, slots: Tensor) -> Tensor:
        """Decoded values (channels, positions) as the spatial operation takes them, (positions, channels)."""
        gathering = self.gathering
        channels = 1 if self.volume else gathering.channels
        full = torch.zeros((channels, self.room), dtype=torch.int32)
        full[:, slots] = decoded.to(torch.int32)
        shape = (1, *gathering.room) if self.volume else (1, channels, *gathering.room)
        plane = gathering.prepare({str(gathering.decoded): full.reshape(shape)})["plane"]
        return plane.reshape(-1, self.room).T[slots]
