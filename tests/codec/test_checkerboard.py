"""CompressAI's codecs of latent codecs: checkerboards, alone and in channel groups, have exact files."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compressai.models import sensetime

import licq
from licq.codec.latents import find_latents
from licq.codec.pieces import pieces_of
from licq.data.padding import pad_to_multiple
from licq.integer.passes import without_duplicates
from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from tests.tiny_codecs import images


def checkerboard(forward_method: str) -> torch.nn.Module:
    network: Any = sensetime.Cheng2020AnchorCheckerboard(N=6)
    network.latent_codec["y"].forward_method = forward_method
    return network


CODECS = {
    "twopass": (lambda: checkerboard("twopass"), [1, 2]),
    "twopass_faster": (lambda: checkerboard("twopass_faster"), [1, 2]),
    "elic2022-official": (lambda: sensetime.Elic2022Official(N=4, M=6, groups=[2, 4]), [1, 2, 2]),
    "elic2022-chandelier": (lambda: sensetime.Elic2022Chandelier(N=4, M=6, groups=[2, 4]), [1, 2, 2]),
}


def quantized(network: torch.nn.Module) -> QuantModel:
    torch.manual_seed(0)
    for name, parameter in network.named_parameters():
        if name.endswith("quantiles"):
            parameter.data[:, 0, 1] += 0.3
        elif parameter.ndim > 1 and "entropy_bottleneck" not in name and not name.endswith(("beta", "gamma")):
            parameter.data.normal_().mul_((len(parameter) / parameter.numel()) ** 0.5)
    model = QuantModel(network.eval(), QuantConfig())
    model.observe([images(1)])
    model.freeze()
    return model


@pytest.mark.parametrize("name", CODECS)
def test_files_are_the_forward_to_the_bit_in_two_passes_a_group(name):
    make, passes = CODECS[name]
    torch.manual_seed(0)
    model = quantized(make())
    assert not model.coverage()["kept_in_float"]
    codec = licq.Codec(model)
    pixels = (images(2, 128, 128)[:, :, :101, :75] * 255).byte()
    padded, crop = pad_to_multiple(pixels.float() / 255)
    with torch.no_grad():
        expected = (F.pad(model(padded)["x_hat"], crop) * 255).round().byte()
    assert expected.float().std() > 1
    for image, wanted in zip(pixels, expected):
        assert torch.equal(codec.decode(codec.encode(image)), wanted)
    plan = next(iter(codec._plans.values()))
    assert [len(plan.order(index)) for index in range(len(plan.latents))] == passes


def test_a_part_read_at_other_positions_than_its_own_is_none_of_the_estimate():
    model = quantized(checkerboard("twopass"))
    program = without_duplicates(licq.Codec(model)._lowered(64, 64))
    (density,) = (b for b in program.boundaries if b.kind == "gaussian")
    pieces = pieces_of(program, density)
    assert len(pieces) == 2 and find_latents(program)[1].decoded == tuple(p.decoded for p in pieces)
    program.outputs["everywhere"] = pieces[1].decoded
    assert pieces_of(program, density) == pieces[:1]
