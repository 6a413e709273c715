"""Files below the estimate: what an improbable symbol is estimated at, and what it takes in a file."""

import torch

from licq.codec.api import Codec
from licq.models.checkpoints import embedded_checkpoint, load_checkpoint
from licq.reconstruction.api import quantize
from licq.reconstruction.config import PtqConfig
from tests.tiny_codecs import images

IMPROBABLE = 16  # bits: the smallest frequency of a table
ESCAPE = 12  # further bits at most, of a symbol within 2^8 of its mean
HEAD = 240  # bits of a small file beside its symbols: its head, the coder's last state


def bits_of(likelihoods):
    return torch.cat([-part.double().log2().flatten() for part in likelihoods.values()])


def test_a_white_picture_has_no_improbable_symbols():
    """Ranges of dull crops clip it. Then improbable symbols, escapes in the file, make the difference."""
    network = load_checkpoint(embedded_checkpoint("minnen2018", 5), "minnen2018", 5)
    dull = torch.round((0.45 + 0.1 * images(2, 128, 128)) * 255) / 255
    white = torch.ones(1, 3, 128, 128)
    with torch.no_grad():
        in_float = float(bits_of(network(white)["likelihoods"]).sum())
    counts = {}
    for flat in (False, True):
        config = PtqConfig.from_preset("nearest", flat=flat)
        qmodel = quantize(network, dull, config, lmbda=0.01, progress=False)
        file = 8 * len(Codec(qmodel).encode((white[0] * 255).to(torch.uint8)))
        with torch.no_grad():
            bits = bits_of(qmodel(white)["likelihoods"])
        count, rest = int((bits > IMPROBABLE).sum()), float(bits[bits <= IMPROBABLE].sum())
        assert rest + IMPROBABLE * count < file < rest + (IMPROBABLE + ESCAPE) * count + HEAD
        counts[flat] = count
        if flat:
            assert float(bits.sum()) < 1.2 * in_float + 0.002 * 128 * 128
        else:
            assert file < 0.9 * float(bits.sum())
    assert counts[True] == 0 and counts[False] > 100
