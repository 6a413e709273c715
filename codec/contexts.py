"""Context models in the decoder: densities of positions from symbols that are decoded before them."""

from collections.abc import Mapping

import numpy as np

from licq.codec.parts import Context, Gathering, Latent, Step
from licq.support.errors import InputError


def context_model(step: Step, values: Mapping[int, np.ndarray], count: int) -> "_Planes | _Columns | None":
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

    def __init__(self, context: Context, latent: Latent, values: Mapping[int, np.ndarray], count: int):
        self.context, self.latent, self.count = context, latent, count
        self.inputs = {str(number): values[number] for number in context.inputs}
        self.decoded = np.zeros((int(np.prod(latent.shape)) // count, count), dtype=np.int32)

    def densities(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        """The densities at some positions, (channels, len(positions)) each."""
        plane = self.decoded.reshape(self.latent.shape)
        results = self.context.run({**self.inputs, **{str(number): plane for number in self.context.decoded}})
        return {name: values.reshape(-1, self.count)[:, positions] for name, values in results.items()}

    def add(self, positions: np.ndarray, decoded: np.ndarray) -> None:
        """Take over what is decoded at some positions, (channels, len(positions))."""
        self.decoded[:, positions] = decoded


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
        values: Mapping[int, np.ndarray],
        count: int,
    ):
        self.context, self.gathering = context, gathering
        self.room = int(np.prod(gathering.room))
        self.volume = gathering.taps.shape[1] == 3
        shape = latent.shape[1:] if self.volume else latent.shape[2:]
        self.positions_a_channel = count // shape[0]
        margin = np.abs(gathering.taps).max(0)
        padded = np.asarray(shape) + 2 * margin
        self.plane: np.ndarray | None = None  # (positions with a margin, channels), of the first densities
        self.padded = int(np.prod(padded))
        strides = np.cumprod([1, *padded[:0:-1]])[::-1]
        coordinates = np.indices(shape).reshape(len(shape), -1).T + margin
        self.rows_of_plane = coordinates @ strides  # of each position
        self.taps = gathering.taps @ strides
        self.inputs = {}
        for number in context.inputs:
            value = values[number]
            if tuple(value.shape[-len(shape) :]) != tuple(shape):
                raise InputError(
                    f"{latent.node}: its context model takes more than what lies at each position"
                )
            self.inputs[str(number)] = np.ascontiguousarray(value.reshape(-1, count).T)

    def densities(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        """The densities at some positions, (channels, len(positions)) each."""
        gathering, slots = self.gathering, self._slots(positions)
        inputs = {name: self._laid(values[positions], slots) for name, values in self.inputs.items()}
        neighbours = self._plane()[self.rows_of_plane[positions][:, None] + self.taps]
        if gathering.by_channel:  # neighbours: (positions, taps, channels)
            unfolded = np.zeros((self.room, neighbours.shape[1] * neighbours.shape[2]), neighbours.dtype)
            unfolded[slots] = neighbours.transpose(0, 2, 1).reshape(len(positions), -1)
            inputs[gathering.columns] = unfolded.T[None]
        else:
            inputs[gathering.columns] = self._laid(neighbours.reshape(len(positions), -1), slots)
        results = self.context.run(inputs)
        return {name: values.reshape(-1, self.room)[:, slots] for name, values in results.items()}

    def add(self, positions: np.ndarray, decoded: np.ndarray) -> None:
        """Take over what is decoded at some positions, (channels, len(positions))."""
        self._plane()[self.rows_of_plane[positions]] = self._prepared(decoded, self._slots(positions))

    def _plane(self) -> np.ndarray:
        if self.plane is None:
            one = self._prepared(np.zeros((1, 1), dtype=np.int32), slice(0, 1))
            self.plane = np.zeros((self.padded, self.gathering.channels), one.dtype)
        return self.plane

    def _slots(self, positions: np.ndarray) -> np.ndarray | slice:
        """Where each position is laid in the room."""
        if not self.volume:
            return slice(0, len(positions))
        channel = positions // self.positions_a_channel  # ascending, as positions of one wavefront are
        first = np.searchsorted(channel, channel)
        return channel * (self.room // self.gathering.room[0]) + np.arange(len(positions)) - first

    def _laid(self, rows: np.ndarray, slots: np.ndarray | slice) -> np.ndarray:
        """(positions, channels) as an image of the room, channels last in memory."""
        full = np.zeros((self.room, rows.shape[1]), rows.dtype)
        full[slots] = rows
        return np.moveaxis(full.reshape(1, *self.gathering.room, -1), -1, 1)

    def _prepared(self, decoded: np.ndarray, slots: np.ndarray | slice) -> np.ndarray:
        """Decoded values (channels, positions) as the spatial operation takes them, (positions, channels)."""
        gathering = self.gathering
        channels = 1 if self.volume else gathering.channels
        full = np.zeros((channels, self.room), dtype=np.int32)
        full[:, slots] = decoded
        shape = (1, *gathering.room) if self.volume else (1, channels, *gathering.room)
        plane = gathering.prepare({str(gathering.decoded): full.reshape(shape)})["plane"]
        return plane.reshape(-1, self.room).T[slots]
