"""A codec whose numbers do not follow from the image alone is refused by name, before any work."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compressai.models import FactorizedPrior
from torch import nn

from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.reconstruction.api import quantize
from licq.reconstruction.config import PtqConfig
from licq.reconstruction.repeatability import check_frozen, check_source
from licq.support.errors import InputError
from tests.tiny_codecs import SIZES, images, tiny_codec


class Middle(nn.Module):
    """What a codec does to y_hat."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.register_buffer("count", torch.zeros(1))
        self.calls = 0.0
        self.cache = None

    def forward(self, y):
        return self.function(self, y)


class Codec(FactorizedPrior):
    def __init__(self, function):
        super().__init__(6, 8)
        self.middle = Middle(function)

    def forward(self, x):
        y_hat, likelihoods = self.entropy_bottleneck(self.g_a(x))
        return {"x_hat": self.g_s(self.middle(y_hat)), "likelihoods": {"y": likelihoods}}


def codec(function) -> nn.Module:
    torch.manual_seed(0)
    network = Codec(function).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 4 and not name.startswith("entropy_bottleneck"):
                parameter.mul_(2)
    return network


def seeded(middle, y):
    torch.manual_seed(3)
    return y + 0.3 * torch.randn(y.shape)


def own_generator(middle, y):
    return y + 0.3 * torch.randn(y.shape, generator=torch.Generator().manual_seed(3))


def of_numpy(middle, y):
    return y + 0.3 * float(np.random.rand())


def of_python(middle, y):
    return y + random.random()


def counter_buffer(middle, y):
    middle.count += 1
    return y + 0.01 * middle.count


def counter_attribute(middle, y):
    middle.calls += 1
    return y + 0.01 * middle.calls


def first_image(middle, y):
    """Everything is compared with the first image that was ever seen."""
    if middle.cache is None:
        middle.cache = y.mean(dim=(2, 3), keepdim=True)
    return y - middle.cache[:1]


def first_pixel(middle, y):
    """The same with one position of it, which a view gives."""
    if middle.cache is None:
        middle.cache = y[:1, :, :1, :1]
    return y - middle.cache


def last_image(middle, y):
    before, middle.cache = middle.cache, y
    return y if before is None else y + 0.1 * before[:1]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda middle, y: y + 0.3 * torch.randn(y.shape), r"random numbers .*\(randn in middle\)"),
        (lambda middle, y: F.dropout(y, 0.3, training=True), r"random numbers .*\(bernoulli in middle\)"),
        (seeded, r"random numbers .*\(randn in middle\)"),
        (own_generator, r"random numbers .*\(randn in middle\)"),
        (of_numpy, r"from middle \(it draws from Python's or numpy's generator\)"),
        (of_python, r"from middle \(it draws from Python's or numpy's generator\)"),
        (counter_buffer, r"from middle \(its buffer `count` of middle changed\)"),
        (counter_attribute, r"from middle \(its attribute `calls` of middle changed\)"),
        (first_image, "from middle"),
        (last_image, "from middle"),
        (lambda middle, y: y - y.mean(0, keepdim=True), "x_hat of an image depends on the other images"),
        (lambda middle, y: y / (0.1 + y.abs().max()), "x_hat of an image depends on the other images"),
        (lambda middle, y: F.batch_norm(y, None, None, training=True), "depends on the other images"),
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_what_does_not_follow_from_the_image_is_refused_by_name(function, message, count):
    network = codec(function)
    crops = images(count, 128, 128)
    with pytest.raises(InputError, match=message) as caught:
        quantize(network, crops, PtqConfig.from_preset("nearest"), lmbda=0.01, progress=False)
    assert "\n" not in str(caught.value)


def in_the_codec(network, x):
    y_hat, likelihoods = network.entropy_bottleneck(network.g_a(x))
    x_hat = network.g_s(y_hat + 0.3 * torch.randn(y_hat.shape))
    return {"x_hat": x_hat, "likelihoods": {"y": likelihoods}}


def test_the_codecs_own_forward_is_named(monkeypatch):
    monkeypatch.setattr(Codec, "forward", in_the_codec)
    with pytest.raises(InputError, match=r"\(randn in the codec's own forward\)"):
        check_source(codec(None), images(2), "cpu")


def masked(middle, y):
    """A mask that is made when a size is met first, as windowed attention does."""
    if middle.cache is None or middle.cache.shape[2:] != y.shape[2:]:
        middle.cache = torch.linspace(0.5, 1, y.shape[2] * y.shape[3]).reshape(1, 1, *y.shape[2:])
    return y * middle.cache


def counted(middle, y):
    """Statistics that nothing reads."""
    middle.calls += 1
    return y


def unread_noise(middle, y):
    return y + 0.0 * torch.rand(1)


@pytest.mark.parametrize("function", [masked, counted, unread_noise])
def test_caches_of_constants_and_what_nothing_reads_are_no_fault(function):
    torch.manual_seed(5)
    state = torch.get_rng_state(), random.getstate()
    network = codec(function)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    torch.manual_seed(5)
    check_source(network, images(2), "cpu")
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.middle.calls == 0 and network.middle.cache is None


@pytest.mark.parametrize("name", SIZES)
def test_every_architecture_passes(name):
    network = tiny_codec(name)
    crops = images(2, 128, 128)
    if hasattr(network, "levels"):
        with torch.no_grad():
            crops = network.with_planes(crops, torch.tensor([1, 3]), torch.tensor([0.01, 0.02]))
    check_source(network, crops, "cpu")
    model = QuantModel(network, QuantConfig())
    model.observe([crops])
    model.freeze()
    assert check_frozen(model, crops)["exact"]


@pytest.mark.parametrize("name", ["balle2018"])
def test_the_quantized_codec_is_asked_to_the_bit(name, tmp_path):
    """A node whose pixels depend on the batch by one level is named; what was checked is in the file."""
    model = quantize(
        tiny_codec(name), images(2), PtqConfig.from_preset("nearest"), lmbda=0.01, progress=False
    )
    stated = model.checked["repeatable"]
    assert (
        stated.items() >= {"height": 64, "width": 64, "exact": True}.items() and len(stated["pixels"]) == 16
    )
    model.save(tmp_path / "m.safetensors")
    assert QuantModel.load(tmp_path / "m.safetensors").checked == model.checked
    node = model.nodes["g_s.2"]
    plain = node.integer

    def mixed(x):
        out = plain(x)
        out.q = out.q + float(len(out.q) > 1) * 2000
        return out

    node.integer = mixed
    with pytest.raises(InputError, match="other pixels for the same image in a batch, from g_s.2 on"):
        check_frozen(model, images(2))


@pytest.mark.parametrize("settings", [{"a_scales": "simulated"}, {"float_stages": ("g_a", "g_s")}])
def test_a_codec_that_computes_in_float_is_not_asked_to_the_bit(settings):
    """The last bits of a float sum depend on the size of the batch."""
    model = QuantModel(tiny_codec("balle2018"), QuantConfig(**settings))
    model.observe([images(2)])
    model.freeze()
    assert check_frozen(model, images(2)) == {"height": 64, "width": 64, "exact": False}


def test_a_codec_that_takes_only_its_crops_is_checked_at_that_size():
    def of_one_size(middle, y):
        if y.shape[-1] != 6:
            raise RuntimeError("96 pixels")
        return y + 0.3 * torch.randn(y.shape)

    with pytest.raises(InputError, match="random numbers"):
        check_source(codec(of_one_size), images(2, 96, 96), "cpu")


def test_a_network_that_computes_something_else_than_the_quantized_one_is_refused(tmp_path):
    """A constant of Python is in no file; neither is what a network keeps of an image that it has seen before
    it is quantized."""

    def gained(gain):
        return lambda middle, y: y * gain

    config = PtqConfig.from_preset("nearest")
    model = quantize(codec(gained(1.5)), images(2), config, lmbda=0.01, progress=False)
    model.save(tmp_path / "m.safetensors")
    QuantModel.load(tmp_path / "m.safetensors", model=codec(gained(1.5)))
    with pytest.raises(InputError, match="gives other pixels in this Codec") as caught:
        QuantModel.load(tmp_path / "m.safetensors", model=codec(gained(1.25)))
    assert "\n" not in str(caught.value)

    # a function that did not run in calibration has no node; a view has none anyway
    for kept, message in (
        (first_pixel, "parameter or buffer"),
        (first_image, "the same path for every image"),
    ):
        used = codec(kept)
        used(images(1, seed=8))
        model = quantize(used, images(2), config, lmbda=0.01, progress=False)
        model.save(tmp_path / "m.safetensors")
        with pytest.raises(InputError, match=message):
            QuantModel.load(tmp_path / "m.safetensors", model=codec(kept))
