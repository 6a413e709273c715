"""A .licq file: what is needed to decode it with its model, and to notice that it is damaged or of another.

    bytes     2  "LQ"
              1  version in its lower four bits; 16: a gain follows; 32 times the number of streams less one
              4  the model: first bytes of the SHA-256 of its file
    varints      width, height, the gain of a variable-rate codec times 2^16, the streams' lengths but the
                 last one's
    bytes  4 each  CRC-32 of everything before it that is not a checksum, and of its stream
                 the streams

Varints have seven bits a byte, lowest first; the last byte is below 128. 15 bytes beside one stream of a
768x512 image: at 0.2 bits per pixel, 0.15 % of the file.
"""

import zlib
from dataclasses import dataclass

from licq.support.errors import InputError

MAGIC = b"LQ"
VERSION = 2
MODEL_BYTES = 4
GAIN_UNIT = 2.0**-16
MAX_PIXELS = 2**26
"""Of one image, its padding included; more in a file is taken for damage."""
MAX_GAIN = 2**10
"""Of a variable-rate codec, times 1; published ones end at 28. Symbols stay far inside what the entropy coder
takes."""
TILE = 2048
"""Images of more than TILE x TILE pixels are computed in tiles, unless another size is asked for."""
MAX_STREAMS = 8
_VERSION_BITS, _WITH_GAIN, _STREAMS = 15, 16, 32  # parts of the third byte
_DAMAGED = "the file is truncated or damaged; get an intact copy or encode the image again"


@dataclass(frozen=True)
class Container:
    """model: MODEL_BYTES bytes. gain: of a variable-rate codec in GAIN_UNITs, 0 of others.

    A gain and not a level, because the way from one to the other goes through logarithms, which differ
    between machines.
    """

    model: bytes
    width: int
    height: int
    gain: int
    streams: tuple[bytes, ...]

    def to_bytes(self) -> bytes:
        kind = VERSION + _WITH_GAIN * bool(self.gain) + _STREAMS * (len(self.streams) - 1)
        numbers = (self.width, self.height, *([self.gain] if self.gain else ()), *map(len, self.streams[:-1]))
        head = MAGIC + bytes([kind]) + self.model + b"".join(map(_varint, numbers))
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
        kind = data[place]
        if kind & _VERSION_BITS != VERSION:
            raise InputError(
                f"the file has version {kind & _VERSION_BITS} of the format, this program reads {VERSION}; encode the image again"
            )
        with_gain, count = bool(kind & _WITH_GAIN), kind // _STREAMS + 1
        place += 1
        model = data[place : place + MODEL_BYTES]
        place += MODEL_BYTES
        numbers = []
        for _ in range(2 + with_gain + count - 1):
            number, place = _read_varint(data, place)
            numbers.append(number)
        width, height, *rest = numbers
        gain = rest.pop(0) if with_gain else 0
        if not 0 < width * height <= MAX_PIXELS or (with_gain and not 0 < gain * GAIN_UNIT <= MAX_GAIN):
            raise InputError(_DAMAGED)
        head = data[:place]
        sums = [data[place + 4 * i : place + 4 * i + 4] for i in range(count)]
        place += 4 * count
        lengths = [*rest, len(data) - place - sum(rest)]
        if lengths[-1] < 0:
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
