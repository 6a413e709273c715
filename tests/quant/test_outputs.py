"""What a codec's forward may return, and what it may keep."""

import pytest
import torch
from compressai.entropy_models import EntropyBottleneck
from torch import nn

import licq
from licq.quant.model import QuantModel
from licq.quant.outputs import codec_output
from licq.reconstruction.api import quantize
from licq.reconstruction.config import PtqConfig
from licq.support.errors import InputError
from tests.tiny_codecs import images

CONFIG = PtqConfig.from_preset("licq", joint_iters=1, measured=1, observed=1, stress=False)
PIXELS = (images(1)[0] * 255).round().to(torch.uint8)


class Plain(nn.Module):
    """One latent; the codecs below return it in other forms, or keep it."""

    def __init__(self):
        super().__init__()
        self.g_a = nn.Conv2d(3, 4, 5, 4, 2)
        self.mid = nn.Conv2d(4, 4, 3, padding=1)
        self.entropy_bottleneck = EntropyBottleneck(4)
        self.g_s = nn.Sequential(nn.Conv2d(4, 48, 3, padding=1), nn.PixelShuffle(4))
        self.entropy_bottleneck.update()
        self.kept = None

    def forward(self, x):
        y_hat, likelihoods = self.entropy_bottleneck(self.latent(self.g_a(x)))
        return self.outputs(self.g_s(y_hat), likelihoods)

    def latent(self, y):
        return self.mid(y)

    def outputs(self, x_hat, likelihoods):
        return {"x_hat": x_hat, "likelihoods": {"y": likelihoods}}


class List(Plain):
    def outputs(self, x_hat, likelihoods):
        return {"x_hat": x_hat, "likelihoods": [likelihoods]}


class Tuple(Plain):
    def outputs(self, x_hat, likelihoods):
        return {"x_hat": x_hat, "likelihoods": (likelihoods,), "steps": 1}


class Single(Plain):
    def outputs(self, x_hat, likelihoods):
        return {"x_hat": x_hat, "likelihoods": likelihoods}


class Nested(Plain):
    def outputs(self, x_hat, likelihoods):
        return {"x_hat": x_hat, "likelihoods": {"y": [likelihoods]}}


def codec(kind: type[Plain]) -> Plain:
    torch.manual_seed(0)
    return kind().eval()


def quantized(kind: type[Plain]) -> QuantModel:
    return quantize(codec(kind), images(1), CONFIG, lmbda=0.01, progress=False)


def uses(qmodel: QuantModel) -> tuple:
    writer = licq.Codec(qmodel)
    data = writer.encode(PIXELS)
    report = licq.evaluate(qmodel, images(1), progress=False)
    assert report.bpp_source == "bitstream"
    return data[13:], writer.decode(data).tolist(), report.mean(), qmodel.history["j_end"]


@pytest.fixture(scope="module")
def expected():
    plain = licq.evaluate(codec(Plain), images(1), progress=False).mean()
    return plain, uses(quantized(Plain))


@pytest.mark.parametrize(
    ("kind", "name"), [(List, "0"), (Tuple, "0"), (Single, "y"), (Nested, "y.0")], ids=lambda v: str(v)[-10:]
)
def test_likelihoods_without_names_are_as_good(kind, name, expected, tmp_path):
    assert licq.evaluate(codec(kind), images(1), progress=False).mean() == expected[0]
    qmodel = quantized(kind)
    assert list(qmodel(images(1))["likelihoods"]) == [name]
    assert uses(qmodel) == expected[1]
    qmodel.save(tmp_path / "m.safetensors")
    loaded = QuantModel.load(tmp_path / "m.safetensors", model=kind())
    assert torch.equal(loaded(images(1))["x_hat"], qmodel(images(1))["x_hat"])


def test_outputs_in_one_form():
    x, p, q = torch.zeros(1, 3, 8, 8), torch.ones(1, 1), torch.ones(1, 2)
    given = {"x_hat": x, "likelihoods": {"a": [p, {"b": q}], "c": q}, "more": 3}
    assert codec_output(given) == {"x_hat": x, "likelihoods": {"a.0": p, "a.1.b": q, "c": q}, "more": 3}
    assert codec_output({"x_hat": x, "likelihoods": {}})["likelihoods"] == {}


class Pair(Plain):
    def outputs(self, x_hat, likelihoods):
        return x_hat, {"y": likelihoods}


class Image(Plain):
    def outputs(self, x_hat, likelihoods):
        return x_hat


class OtherKeys(Plain):
    def outputs(self, x_hat, likelihoods):
        return {"recon": x_hat, "likelihoods": likelihoods}


class Bits(Plain):
    def outputs(self, x_hat, likelihoods):
        return {"x_hat": x_hat, "likelihoods": {"y": likelihoods, "bpp": 0.5}}


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Pair, "returns a tuple of 2; it must return .*wrap it in a module"),
        (Image, "returns a Tensor; it must return"),
        (OtherKeys, "returns a dictionary of 'recon', 'likelihoods', without 'x_hat'; it must return"),
        (Bits, "likelihoods bpp is of type float and no tensor"),
    ],
)
def test_other_outputs_are_one_line_before_any_work(kind, words, monkeypatch):
    monkeypatch.setattr("licq.reconstruction.api.run_steps", lambda *_: pytest.fail("work was done"))
    for start in (lambda: quantized(kind), lambda: licq.evaluate(codec(kind), images(1), progress=False)):
        with pytest.raises(InputError, match=words) as refusal:
            start()
        assert "\n" not in str(refusal.value)


# ------------------------------------------------------------------------------- what a network has kept


class Previous(Plain):
    """A plain Python attribute holds the latent of the image before."""

    def latent(self, y):
        before, self.kept = self.kept, y
        return self.mid(y) + (y if before is None else before)


class Delayed(Plain):
    def latent(self, y):
        before, self.kept = self.kept, y
        return self.mid(y if before is None else before)


class Joined(Plain):
    def latent(self, y):
        before, self.kept = self.kept, y
        return torch.cat([y[:, :2], (y if before is None else before)[:, 2:]], 1)


@pytest.mark.parametrize(
    ("kind", "where"), [(Previous, "the codec's own forward"), (Delayed, "mid"), (Joined, "the codec's own")]
)
def test_what_was_kept_from_an_earlier_forward_is_no_part_of_a_program(kind, where):
    """Before: AttributeError, 'Tensor' object has no attribute 'number'."""
    qmodel = QuantModel(codec(kind), CONFIG.quant)
    qmodel.observe([images(1)])
    qmodel.freeze()
    for _ in range(2):
        with pytest.raises(InputError, match=f"^{where}.* kept from an earlier forward") as refusal:
            licq.Codec(qmodel).encode(PIXELS)
        assert "\n" not in str(refusal.value)


class Constant(Plain):
    def outputs(self, x_hat, likelihoods):
        return {"x_hat": torch.zeros(x_hat.shape), "likelihoods": {"y": likelihoods}}


class Odd(Plain):
    """Its own code meets something else than an image when the program is written down."""

    def latent(self, y):
        if type(y).__name__ == "QTensor" and type(y.q).__name__ == "Symbol":
            raise KeyError("a defect\nof the codec")
        return self.mid(y)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Constant, "x_hat does not follow from the image in integers"),
        (Odd, "cannot be lowered: the codec's own forward: KeyError: 'a defect.*of the codec'$"),
    ],
)
def test_what_cannot_be_written_down_is_one_line(kind, words):
    qmodel = QuantModel(codec(kind), CONFIG.quant)
    qmodel.observe([images(1)])
    qmodel.freeze()
    with pytest.raises(InputError, match=words) as refusal:
        licq.Codec(qmodel).encode(PIXELS)
    assert "\n" not in str(refusal.value)
