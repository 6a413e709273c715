"""The format of a .licq file.

    bytes     2  "LQ"
              1  version in its lower three bits; 8: the image is grey; 16: a gain follows; 32 times the
                 number of streams less one
              4  the model: first bytes of its identity, the SHA-256 of its program and tables. Earlier
                 versions of licq put the SHA-256 of the model's file there; a decoder takes both
    varints      width, height, the gain of a variable-rate codec times 2^16, the lengths of all streams but
                 the last
    bytes  4 each  for each stream the CRC-32 of the bytes above (without checksums) and of the stream
                 the streams

So a decoder notices that a file is damaged, or of another model than its own.

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
"""Pixels of one image with its padding; a file that states more is taken for a damaged one."""
MAX_GAIN = 2**10
"""The largest gain of a variable-rate codec that a file can state; gains of published codecs end at 28. Up to
here symbols stay far inside the range of the entropy coder."""
TILE = 2048
"""By default, images of more than TILE x TILE pixels are computed in tiles."""
_VERSION_BITS, _GREY, _WITH_GAIN, _STREAMS = 7, 8, 16, 32  # parts of the third byte
_DAMAGED = "the file is truncated or damaged; get an intact copy or encode the image again"


@dataclass(frozen=True)
class Container:
    """The content of a .licq file.

    Args:
        model: the first `MODEL_BYTES` bytes of the model's identity, or of the SHA-256 of its file.
        width, height: of the image, in pixels.
        gain: of a variable-rate codec, in units of `GAIN_UNIT`; 0 for a codec of one rate. A level is not
            stored, because the way from a level to a gain goes through logarithms, which differ between
            machines.
        streams: what the entropy coder has written.
        grey: the image has one channel; it is coded as three equal ones.
    """

    model: bytes
    width: int
    height: int
    gain: int
    streams: tuple[bytes, ...]
    grey: bool = False

    def to_bytes(self) -> bytes:
        """The file."""
        kind = VERSION + _GREY * self.grey + _WITH_GAIN * bool(self.gain) + _STREAMS * (len(self.streams) - 1)
        numbers = (self.width, self.height, *([self.gain] if self.gain else ()), *map(len, self.streams[:-1]))
        head = MAGIC + bytes([kind]) + self.model + b"".join(map(_varint, numbers))
        sums = b"".join(_checksum(head, stream) for stream in self.streams)
        return head + sums + b"".join(self.streams)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Container":
        """The content of a file.

        Raises:
            InputError: no .licq file, one of another version, or a truncated or damaged one.
        """
        if data[: len(MAGIC)] != MAGIC[: len(data)] or not data:
            raise InputError("this is no .licq file; give one that `main_eval.py encode` has written")
        position = len(MAGIC)
        if len(data) <= position:
            raise InputError(_DAMAGED)
        kind = data[position]
        if kind & _VERSION_BITS != VERSION:
            raise InputError(
                f"the file has version {kind & _VERSION_BITS} of the format, this program reads {VERSION}; "
                "encode the image again"
            )
        with_gain, count = bool(kind & _WITH_GAIN), kind // _STREAMS + 1
        position += 1
        model = data[position : position + MODEL_BYTES]
        position += MODEL_BYTES
        numbers = []
        for _ in range(2 + with_gain + count - 1):
            number, position = _read_varint(data, position)
            numbers.append(number)
        width, height, *rest = numbers
        gain = rest.pop(0) if with_gain else 0
        if not 0 < width * height <= MAX_PIXELS or (with_gain and not 0 < gain * GAIN_UNIT <= MAX_GAIN):
            raise InputError(_DAMAGED)
        head = data[:position]
        sums = [data[position + 4 * i : position + 4 * i + 4] for i in range(count)]
        position += 4 * count
        lengths = [*rest, len(data) - position - sum(rest)]
        if lengths[-1] < 0:
            raise InputError(_DAMAGED)
        streams = []
        for length, stated in zip(lengths, sums):
            stream = data[position : position + length]
            if _checksum(head, stream) != stated:
                raise InputError(_DAMAGED)
            streams.append(stream)
            position += length
        return cls(model, width, height, gain, tuple(streams), bool(kind & _GREY))


def _checksum(head: bytes, stream: bytes) -> bytes:
    return zlib.crc32(stream, zlib.crc32(head)).to_bytes(4, "little")


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    number = 0
    for shift in range(0, 35, 7):
        if position >= len(data):
            raise InputError(_DAMAGED)
        byte = data[position]
        position += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, position
    raise InputError(_DAMAGED)
