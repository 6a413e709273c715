"""Integers of fewer than eight bits, side by side in bytes."""

import numpy as np
import torch
from torch import Tensor


def bits_needed(values: Tensor) -> int:
    """Bits, with the sign, that hold every value of an int8 tensor: 1 to 8."""
    low, high = (int(limit) for limit in values.aminmax())
    return 1 + max(high, ~low, 0).bit_length()


def pack(values: Tensor, bits: int) -> Tensor:
    """An int8 tensor as uint8 (ceil(n bits / 8),): two's complements of `bits` bits, first value and highest
    bit first.

    Raises:
        ValueError: a value that needs more bits.
    """
    if values.dtype != torch.int8 or (values.numel() and bits_needed(values) > bits):
        raise ValueError(f"not int8 values of {bits} bits")
    each = np.unpackbits(values.cpu().reshape(-1, 1).numpy().view(np.uint8), axis=1)[:, 8 - bits :]
    return torch.from_numpy(np.packbits(each))


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """What `pack` was given, of this shape.

    Raises:
        ValueError: another number of bytes than the shape needs.
    """
    count = int(np.prod(shape, dtype=np.int64))
    if packed.dtype != torch.uint8 or packed.numel() != -(-count * bits // 8):
        raise ValueError(f"{packed.numel()} bytes for {count} values of {bits} bits")
    each = np.unpackbits(packed.cpu().numpy().reshape(-1), count=count * bits).reshape(count, bits)
    # the highest bit again in front: two's complement
    wide = np.concatenate([np.repeat(each[:, :1], 8 - bits, 1), each], 1)
    return torch.from_numpy(np.packbits(wide, axis=1).view(np.int8).reshape(shape).copy())
