"""The rewriter on what codecs may do with their modules: one under several names, hooks, layers left in float."""

import pytest
import torch
from compressai.entropy_models import EntropyBottleneck
from tiny_codecs import images
from torch import Tensor, nn

from quant.config import QuantConfig
from quant.model import QuantModel


class Plain(nn.Module):
    """Three convolutions; codecs below do something between the first two."""

    def __init__(self, c: int = 8):
        super().__init__()
        self.down = nn.Conv2d(3, c, 5, 4, 2)
        self.mid = nn.Conv2d(c, c, 3, padding=1)
        self.entropy_bottleneck = EntropyBottleneck(c)
        self.up = nn.Sequential(nn.Conv2d(c, 48, 3, padding=1), nn.PixelShuffle(4))
        self.extra(c)
        with torch.no_grad():
            self.down.weight.mul_(8)

    def extra(self, c: int) -> None:
        pass

    def between(self, y: Tensor) -> Tensor:
        return y

    def forward(self, x):
        y_hat, likelihoods = self.entropy_bottleneck(self.mid(self.between(self.down(x))))
        return {"x_hat": self.up(y_hat), "likelihoods": {"y": likelihoods}}


def codec(kind: type[Plain]) -> Plain:
    torch.manual_seed(1)
    return kind().eval()


def observed(model: nn.Module) -> QuantModel:
    qmodel = QuantModel(model, QuantConfig())
    qmodel.observe([images(2)])
    return qmodel


@pytest.mark.parametrize(
    ("settings", "bits", "left", "integer"),
    [
        ({}, {"mid": {"w_bits": 32}, "up.0": {"a_bits": 32}}, {"mid": "w_bits 32", "up.0": "a_bits 32"}, 1),
        ({"a_bits": 32}, {"mid": {"a_bits": 8}}, {"2 layers": "a_bits 32"}, 1),
        ({"w_bits": 32, "a_bits": 32}, {"mid": {"w_bits": 8}}, {"mid": "a_bits 32", "2 layers": "w_bits and a_bits 32"}, 0),
    ],
)
def test_layers_of_32_bits_are_reported_as_left_in_float(settings, bits, left, integer):
    model = QuantModel(codec(Plain), QuantConfig(**settings), bits)
    model.observe([images(2)])
    coverage = model.coverage()
    assert coverage["left_alone"] == {name: f"products of real numbers ({reason})" for name, reason in left.items()}
    assert sum(coverage["quantized"].get(kind, 0) for kind in ("conv", "deconv")) == integer
