"""Packed integers, against Python's own integers."""

import pytest
import torch

from licq.quant.packing import bits_needed, pack, unpack


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5, 2), (64, 3)])
def test_every_value_comes_back(bits, shape):
    draw = torch.Generator().manual_seed(bits)
    values = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=draw).to(torch.int8)
    packed = pack(values, bits)
    assert packed.dtype == torch.uint8 and len(packed) == (values.numel() * bits + 7) // 8
    assert torch.equal(unpack(packed, bits, shape), values)


def test_bits_are_in_reading_order():
    values = torch.tensor([1, -1, -4, 3, 2], dtype=torch.int8)
    text = "".join(format(value & 7, "03b") for value in values.tolist()).ljust(16, "0")
    assert pack(values, 3).tolist() == [int(text[:8], 2), int(text[8:], 2)]


@pytest.mark.parametrize(
    "values, bits",
    [([0], 1), ([-1], 1), ([1], 2), ([-2, 1], 2), ([-3], 3), ([7, -7], 4), ([8], 5), ([-128], 8)],
)
def test_bits_needed_are_those_of_twos_complement(values, bits):
    assert bits_needed(torch.tensor(values, dtype=torch.int8)) == bits


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError):
        pack(torch.tensor([8], dtype=torch.int8), 4)
    with pytest.raises(ValueError):
        unpack(torch.zeros(3, dtype=torch.uint8), 4, (7,))
