"""An image is measured by the integer program: its file, decoded, and the rate that the forward estimates."""

import numpy as np
import pytest
import torch

from licq.codec.api import Codec
from licq.codec.coder import Coder
from licq.data.padding import crop_back, pad_to_multiple
from licq.evaluation.metrics import bpp_from_likelihoods
from licq.support.errors import InputError
from tests.frozen_codecs import frozen, make_frozen
from tests.tiny_codecs import SIZES, images


def pixels(height: int, width: int) -> torch.Tensor:
    return (images(1, height, width, 3)[0] * 255).round().to(torch.uint8)


@pytest.mark.parametrize("name", SIZES)
def test_file_pixels_and_estimate_are_those_of_the_forward(name):
    model = frozen(name)
    codec = Codec(model, bytes(8))
    codec.settle_rate()
    image = pixels(64, 96)
    measured = codec.measure(image)
    assert measured.data == codec.encode(image)
    padded, unpad = pad_to_multiple(image[None].float() / 255, codec.multiple)
    with torch.no_grad():
        own = model(padded)
    assert torch.equal(measured.pixels, (crop_back(own["x_hat"], unpad)[0] * 255).round().to(torch.uint8))
    expected = bpp_from_likelihoods(own["likelihoods"], 1)
    assert measured.estimated_bits == pytest.approx(expected, rel=1e-6)


def test_a_decoder_with_other_numbers_ends_the_measurement(monkeypatch):
    codec = Codec(make_frozen("minnen2018-mean"), bytes(8))
    codec.measure(pixels(64, 64))
    whole = Coder.encode_symbols

    def other(self, plan, values):
        values = [{**latent, "symbols": latent["symbols"].copy()} for latent in values]
        values[-1]["symbols"].flat[0] += np.int32(1)
        return whole(self, plan, values)

    monkeypatch.setattr(Coder, "encode_symbols", other)
    with pytest.raises(InputError, match="the decoder's symbols of gaussian_conditional are not"):
        codec.measure(pixels(64, 64))
