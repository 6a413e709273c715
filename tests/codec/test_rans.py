"""The compiled entropy coder beside CompressAI's: the same bytes, and no way out of its arrays."""

import ctypes

import numpy as np
import pytest

from licq.codec.rans import (
    CompiledDecoder,
    CompiledEncoder,
    CompressaiDecoder,
    CompressaiEncoder,
    compiled,
    decoder,
    encoder,
)
from licq.codec.tables import GaussianRows, MixtureRows, Rows, RowTable
from licq.integer import library
from licq.quant.density import density_tables
from licq.support.errors import InputError

BITS = 12
TABLES = [part.numpy() for part in density_tables(BITS)]

pytestmark = pytest.mark.skipif(library.library() is None, reason="no compiled kernels")


def random_table(draw: np.random.Generator, rows: int) -> RowTable:
    """Rows of 2 to 300 bins."""
    cdfs = []
    for _ in range(rows):
        inner = draw.choice(np.arange(1, 2**16), int(draw.integers(1, 300)), replace=False)
        cdfs.append(np.concatenate(([0], np.sort(inner), [2**16])))
    return RowTable.of(cdfs, draw.integers(-150, 10, rows))


def symbols_of(draw: np.random.Generator, rows: Rows, far: float) -> np.ndarray:
    """Symbols inside the rows, a share `far` of them anywhere."""
    table, base = rows.table, 0 if rows.base is None else rows.base
    sizes = np.diff(table.starts)[rows.rows] - 2
    inside = table.offsets[rows.rows] + (draw.random(len(sizes)) * sizes).astype(int)
    spread = 10.0 ** draw.integers(0, 5, len(sizes))
    escapes = (draw.standard_cauchy(len(sizes)) * spread).clip(-(2**26), 2**26)
    return (np.where(draw.random(len(sizes)) < far, escapes.astype(int), inside) + base).astype(np.int32)


@pytest.mark.parametrize("seed", range(6))
def test_streams_are_those_of_compressai_to_the_byte(seed):
    """Several rows, empty pieces, escapes of all lengths, to one stream and back."""
    draw = np.random.default_rng(seed)
    table = random_table(draw, 17)
    pieces = []
    for count in (0, 1, 500, 3000):
        base = None if count == 500 else draw.integers(-5000, 5000, count).astype(np.int32)
        rows = Rows(draw.integers(0, 17, count).astype(np.int32), base, table)
        pieces.append((symbols_of(draw, rows, 0.2 * (seed % 3)), rows))
    ours, theirs = CompiledEncoder(), CompressaiEncoder()
    for symbols, rows in pieces:
        ours.push(symbols, rows)
        theirs.push(symbols, rows)
    stream = ours.flush()
    assert stream == theirs.flush()
    for reader in (CompiledDecoder(stream), CompressaiDecoder(stream, 4000)):
        for symbols, rows in pieces:
            np.testing.assert_array_equal(reader.pull(rows), symbols)
        reader.finish()


def test_gaussians_of_both_kinds_are_those_of_compressai():
    draw, rows = np.random.default_rng(1), GaussianRows(TABLES, BITS)
    scales = (np.exp(draw.normal(0, 2, 5000)) * 2**BITS).astype(np.int32)
    means = (draw.normal(0, 300, 5000) * 2**BITS).astype(np.int32)
    for chosen in (rows.of(scales), rows.of(scales, means)):
        symbols = symbols_of(draw, chosen, 0.05)
        ours, theirs = CompiledEncoder(), CompressaiEncoder()
        ours.push(symbols, chosen)
        theirs.push(symbols, chosen)
        stream = ours.flush()
        assert stream == theirs.flush()
        np.testing.assert_array_equal(CompiledDecoder(stream).pull(chosen), symbols)


@pytest.mark.parametrize("components", [1, 3])
def test_mixtures_are_those_of_their_rows(components):
    """The compiled coder never makes a mixture's row; CompressAI's takes it whole. Weights of 0, mixtures
    without any weight, means far apart and symbols far outside are among them."""
    draw, tables = np.random.default_rng(2), MixtureRows(TABLES, BITS, components)
    count = 1500
    scales = (np.exp(draw.normal(0, 2, (components, count))) * 2**BITS).astype(np.int32)
    means = (draw.standard_cauchy((components, count)).clip(-3000, 3000) * 3 * 2**BITS).astype(np.int32)
    weights = (draw.integers(0, 3, (components, count)) * draw.integers(0, 2000, count)).astype(np.int32)
    symbols = (means[0] >> BITS) + draw.standard_cauchy(count).clip(-(10**6), 10**6).astype(np.int32)
    ours, theirs = CompiledEncoder(), CompressaiEncoder()
    for writer in (ours, theirs):
        writer.push_mixtures(symbols, tables, scales, means, weights)
    stream = ours.flush()
    assert stream == theirs.flush()
    for reader in (CompiledDecoder(stream), CompressaiDecoder(stream, count)):
        np.testing.assert_array_equal(reader.pull_mixtures(tables, scales, means, weights), symbols)
        reader.finish()


def test_streams_that_no_encoder_wrote_are_refused_or_give_symbols():
    """Cut, changed, random and empty ones, also such that make CompressAI's decoder read on."""
    draw = np.random.default_rng(3)
    table = random_table(draw, 5)
    rows = Rows(draw.integers(0, 5, 400).astype(np.int32), None, table)
    writer = CompiledEncoder()
    writer.push(symbols_of(draw, rows, 0.2), rows)
    good, refused = writer.flush(), 0
    streams = [good[:length] for length in range(0, len(good), 3)] + [good + bytes(4)]
    streams += [draw.bytes(int(draw.integers(0, 900))) for _ in range(200)] + [b"\xff" * 40, bytes(40)]
    for _ in range(200):
        changed = bytearray(good)
        changed[draw.integers(len(good))] ^= 1 << draw.integers(8)
        streams.append(bytes(changed))
    for stream in streams:
        try:
            reader = CompiledDecoder(stream)
            assert len(reader.pull(rows)) == 400
            reader.finish()
        except InputError as error:
            refused += "damaged" in str(error)
    assert refused > 0.9 * len(streams)


def test_rows_that_are_none_are_refused_and_not_read():
    """The compiled coder checks what it is given, whatever was checked before."""
    table = RowTable.of([np.asarray([0, 100, 2**16])] * 2, [0, 0])
    for chosen in (-1, 2, 2**31 - 1):
        rows = Rows(np.asarray([0, chosen], dtype=np.int32), None, table)
        with pytest.raises(InputError):
            CompiledEncoder().push(np.zeros(2, dtype=np.int32), rows)
        with pytest.raises(InputError):
            CompiledDecoder(bytes(range(1, 41))).pull(rows)
    kernels = library.kernels()
    for cdfs, starts, bad in (
        ([0, 1, 65536, 0, 1, 65536], [0, 3, 6], -1),
        ([0, 1, 65536, 0, 0, 65536], [0, 3, 6], 1),
        ([0, 1, 65536], [0, 3, 3], 1),
        ([0, 1, 65536], [0, 3, 9], 1),
        ([0, 65536], [0, 2], 0),
        ([0, 1, 65536], [-3, 3], 0),
    ):
        arrays = [np.asarray(cdfs, dtype=np.int32), np.asarray(starts), np.zeros(2, dtype=np.int32)]
        struct = library.Rows(*(array.ctypes.data for array in arrays), len(starts) - 1, len(cdfs))
        assert kernels.rans_bad_row(ctypes.byref(struct)) == bad


def test_a_symbol_that_is_too_far_away_is_told():
    table = RowTable.of([np.asarray([0, 100, 2**16])], [2**31 - 1])
    rows = Rows(np.zeros(1, dtype=np.int32), np.full(1, 2**31 - 1, dtype=np.int32), table)
    with pytest.raises(InputError, match="too far"):
        CompiledEncoder().push(np.full(1, -(2**31), dtype=np.int32), rows)
    with pytest.raises(InputError, match="32 bits"):
        CompiledEncoder().push(np.full(1, 2**40), Rows(rows.rows, None, table))


def test_the_reference_is_compressais_coder(monkeypatch):
    assert isinstance(encoder(), CompiledEncoder)
    monkeypatch.setenv("LICQ_KERNELS", "reference")
    assert compiled() is None
    assert isinstance(encoder(), CompressaiEncoder) and isinstance(decoder(b"", 0), CompressaiDecoder)
