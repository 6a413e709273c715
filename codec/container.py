"""A .licq file: what is needed to decode it with its model, and to notice that it is damaged or of another.

    bytes     4  "LICQ"
              1  version
              4  the model: first bytes of the SHA-256 of its file
    varints      width, height, gain (0: the codec has one rate; else that of a variable-rate codec, times 2^16), number of streams,
                 their lengths
    bytes  4 each  CRC-32 of everything before it that is not a checksum, and of its stream
                 the streams

Varints have seven bits a byte, lowest first; the last byte is below 128.
"""

import zlib
from dataclasses import dataclass

from support.errors import InputError

MAGIC = b"LICQ"
VERSION = 1
MODEL_BYTES = 4
GAIN_UNIT = 2.0**-16
MAX_PIXELS = 2**26
"""Of one image; more in a file is taken for damage."""
TILE = 2048
"""Images of more than TILE x TILE pixels are computed in tiles, unless another size is asked for."""
_MAX_STREAMS = 4096
_DAMAGED = "the file is truncated or damaged; get an intact copy or encode the image again"


@dataclass(frozen=True)
class Container:
    """model: MODEL_BYTES bytes. gain: of a variable-rate codec in GAIN_UNITs, 0 of others.

    A gain and not a level, because the way from one to the other goes through logarithms, which differ between machines.
    """

    model: bytes
    width: int
    height: int
    gain: int
    streams: tuple[bytes, ...]

    def to_bytes(self) -> bytes:
        numbers = (self.width, self.height, self.gain, len(self.streams), *map(len, self.streams))
        head = MAGIC + bytes([VERSION]) + self.model + b"".join(map(_varint, numbers))
        sums = b"".join(_checksum(head, stream) for stream in self.streams)
        return head + sums + b"".join(self.streams)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Container":
        """The content of a file.

        Raises:
            InputError: no .licq file, of another version, truncated, or damaged anywhere.
        """
        if data[: len(MAGIC)] != MAGIC[: len(data)] or not data:
            raise InputError("this is no .licq file; give one that `main_eval.py encode` has written")
        place = len(MAGIC)
        if len(data) <= place:
            raise InputError(_DAMAGED)
        if data[place] != VERSION:
            raise InputError(f"the file has version {data[place]} of the format, this program reads {VERSION}; encode the image again")
        place += 1
        model = data[place : place + MODEL_BYTES]
        place += MODEL_BYTES
        numbers = []
        for _ in range(4):
            number, place = _read_varint(data, place)
            numbers.append(number)
        width, height, gain, count = numbers
        if not (0 < width * height <= MAX_PIXELS and 0 < count <= _MAX_STREAMS):
            raise InputError(_DAMAGED)
        lengths = []
        for _ in range(count):
            number, place = _read_varint(data, place)
            lengths.append(number)
        head = data[:place]
        sums = [data[place + 4 * i : place + 4 * i + 4] for i in range(count)]
        place += 4 * count
        if len(data) != place + sum(lengths):
            raise InputError(_DAMAGED)
        streams = []
        for length, stated in zip(lengths, sums):
            stream = data[place : place + length]
            if _checksum(head, stream) != stated:
                raise InputError(_DAMAGED)
            streams.append(stream)
            place += length
        return cls(model, width, height, gain, tuple(streams))


def _checksum(head: bytes, stream: bytes) -> bytes:
    return zlib.crc32(stream, zlib.crc32(head)).to_bytes(4, "little")


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _read_varint(data: bytes, place: int) -> tuple[int, int]:
    number = 0
    for shift in range(0, 35, 7):
        if place >= len(data):
            raise InputError(_DAMAGED)
        byte = data[place]
        place += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, place
    raise InputError(_DAMAGED)
