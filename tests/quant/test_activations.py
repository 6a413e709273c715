"""A kind of layer is one class on the primitives: PReLU, and one that is made here, to files that decode."""

from fractions import Fraction

import pytest
import torch
from compressai.models import FactorizedPrior
from torch import nn

from licq.codec.api import Codec
from licq.quant import primitives
from licq.quant.config import QuantConfig
from licq.quant.fixedpoint import quantize_multiplier
from licq.quant.model import QuantModel
from licq.quant.modules import REPLACEMENTS, QuantModule, replaces
from licq.quant.qtensor import QTensor
from tests.integer.test_lowering import assert_program_equals_model
from tests.tiny_codecs import images


def codec_with(layer) -> nn.Module:
    """A factorized-prior codec of a few channels, with `layer(channels)` between its convolutions."""
    torch.manual_seed(0)
    codec = FactorizedPrior(6, 8)
    codec.g_a = nn.Sequential(nn.Conv2d(3, 6, 5, 4, 2), layer(6), nn.Conv2d(6, 8, 5, 4, 2))
    codec.g_s = nn.Sequential(nn.ConvTranspose2d(8, 6, 4, 4), layer(6), nn.ConvTranspose2d(6, 3, 4, 4))
    for name, parameter in codec.named_parameters():
        if name.startswith("g_") and parameter.ndim == 4:
            parameter.data.mul_(4.0)
    codec.update()
    return codec.eval()


def frozen_with(layer) -> QuantModel:
    codec = QuantModel(codec_with(layer), QuantConfig())
    codec.observe(images(4).split(2))
    codec.freeze()
    return codec


def prelu(slopes: list[float]):
    def layer(channels: int) -> nn.PReLU:
        made = nn.PReLU(channels if len(slopes) > 1 else 1)
        made.weight.data = torch.tensor((slopes * channels)[: made.num_parameters])
        return made

    return layer


SLOPES = [[0.25], [0.25, 0.0, 1.0, -0.5, 1.7, 0.01]]


@pytest.mark.parametrize("slopes", SLOPES)
def test_prelu_reaches_files_that_decode(slopes, tmp_path):
    codec = frozen_with(prelu(slopes))
    assert codec.coverage()["quantized"]["prelu"] == 2 and not codec.coverage()["kept_in_float"]
    assert_program_equals_model(codec, images(2))
    codec.save(tmp_path / "m.safetensors")
    saved = QuantModel.load(tmp_path / "m.safetensors", model=codec_with(prelu(slopes)))
    picture = (images(1, seed=3)[0] * 255).round().to(torch.uint8)
    data = Codec(codec, bytes(32)).encode(picture)
    decoded = Codec(saved, bytes(32)).decode(data)
    with torch.no_grad():
        assert torch.equal(decoded.float() / 255, codec(picture[None].float() / 255)["x_hat"][0])


@pytest.mark.parametrize("slopes", SLOPES)
def test_prelu_rounds_halves_away_from_zero(slopes):
    codec = frozen_with(prelu(slopes))
    node = next(node for node in codec.nodes.values() if node.kind == "prelu")
    numbers = torch.arange(-60, 60, dtype=torch.float32).reshape(1, 6, 4, 5)
    out = node.integer(QTensor(numbers, torch.tensor(0.5, dtype=torch.float64), codec.runtime)).q

    def expected(x: int, slope: float) -> int:
        if x >= 0:
            return x
        mantissa, shift = quantize_multiplier(torch.tensor(abs(slope)).double().clamp(min=2.0**-40))
        exact = Fraction(-x) * int(mantissa) / Fraction(2) ** int(shift)
        return -int(exact + Fraction(1, 2)) * (1 if slope >= 0 else -1)

    slope = (slopes * 6)[:6]
    brute = [
        expected(int(x), float(torch.tensor(slope[c]))) for c in range(6) for x in numbers[0, c].flatten()
    ]
    assert out.flatten().tolist() == brute


class Fold(nn.Module):
    """|x| - a layer that nobody here knows."""

    def __init__(self, channels: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        return x.abs() * self.gain.reshape(1, -1, 1, 1)


def test_a_layer_of_ones_own_is_one_class():
    before = dict(REPLACEMENTS)
    try:

        @replaces(Fold)
        class QuantFold(QuantModule):
            kind = "fold"

            def __init__(self, module, config):
                super().__init__(config)
                self.module = module

            def real(self, x):
                return self.module(x)

            def integer(self, x):
                gain = self.module.gain.detach().double().reshape(1, -1, 1, 1)
                return x.like(primitives.absolute(x.q), x.full_scale() * gain)

        codec = frozen_with(Fold)
        assert codec.coverage()["quantized"]["fold"] == 2
        assert_program_equals_model(codec, images(2))
        picture = (images(1, seed=3)[0] * 255).round().to(torch.uint8)
        decoded = Codec(codec, bytes(32)).decode(Codec(codec, bytes(32)).encode(picture))
        with torch.no_grad():
            assert torch.equal(decoded.float() / 255, codec(picture[None].float() / 255)["x_hat"][0])
    finally:
        REPLACEMENTS.clear()
        REPLACEMENTS.update(before)
