"""Networks that cannot be quantized end in one line before any work; compiled ones are looked into."""

import pytest
import torch
from compressai.entropy_models import EntropyBottleneck
from torch import nn

from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.reconstruction.api import prepare_calibration, quantize
from licq.reconstruction.config import PtqConfig
from licq.reconstruction.objective import Objective
from licq.support.errors import InputError
from tests.tiny_codecs import images


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.g_a = nn.Sequential(nn.Conv2d(3, 4, 5, 4, 2), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        self.entropy_bottleneck = EntropyBottleneck(4)
        self.g_s = nn.Sequential(nn.Conv2d(4, 48, 3, padding=1), nn.PixelShuffle(4))

    def forward(self, x):
        y_hat, likelihoods = self.entropy_bottleneck(self.g_a(x))
        return {"x_hat": self.g_s(y_hat), "likelihoods": {"y": likelihoods}}


def lazy() -> nn.Module:
    model = Small()
    model.g_a[2] = nn.LazyConv2d(4, 3, padding=1)
    return model


def with_part(change) -> nn.Module:
    model = Small()
    change(model)
    return model


def scripted_part(model):
    model.g_a[2] = torch.jit.script(model.g_a[2])


def traced_part(model):
    model.g_s = torch.jit.trace(model.g_s, torch.zeros(1, 4, 16, 16))


def scripted_function(model):
    model.g_a.helper = torch.jit.script(_twice)


def _twice(x):
    return 2 * x


def quantized_part(model):
    model.g_a[0] = torch.ao.nn.quantized.Conv2d(3, 4, 5, 4, 2)


REFUSED = {
    "half": (lambda: Small().half(), r"float16 \(g_a.0.(module.)?weight\); convert it with .float\(\)"),
    "bfloat16": (lambda: Small().bfloat16(), r"bfloat16 .*\.float\(\)"),
    "double": (lambda: Small().double(), r"float64 .*\.float\(\)"),
    "one part": (lambda: with_part(lambda m: m.g_s.double()), r"float64 \(g_s.0.(module.)?weight\)"),
    "lazy": (lazy, "g_a.2.weight has no shape yet.*run the network once"),
    "meta": (lambda: Small().to("meta"), "g_a.0.(module.)?weight is on the meta device.*load the weights"),
    "scripted": (
        lambda: torch.jit.trace_module(Small().g_a, {"forward": torch.zeros(1, 3, 8, 8)}),
        "^the net",
    ),
    "scripted part": (lambda: with_part(scripted_part), r"^g_a\.2 of the network is scripted or traced"),
    "traced part": (lambda: with_part(traced_part), r"^g_s of the network is scripted or traced"),
    "scripted function": (lambda: with_part(scripted_function), r"^g_a\.helper of the network is scripted"),
    "function": (lambda: torch.jit.script(_twice), "the network is a scripted function; give an nn.Module"),
    "no module": (lambda: {"g_a.0.weight": torch.zeros(1)}, "the network is dict; give an nn.Module"),
    "quantized": (
        lambda: with_part(quantized_part),
        r"g_a\.0 of the network \(Conv2d\) is quantized already",
    ),
    "exported": (
        lambda: torch.export.export(Small().g_a.eval(), (torch.zeros(1, 3, 64, 64),)).module(),
        "is a graph of torch.export",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_quantized_is_refused_before_any_work(name, monkeypatch):
    make, words = REFUSED[name]
    monkeypatch.setattr("licq.reconstruction.api.calibration_crops", lambda *_: pytest.fail("work was done"))
    model = make()
    config = PtqConfig.from_preset("nearest")
    for start in (
        lambda: quantize(model, images(1), config, lmbda=0.01),
        lambda: prepare_calibration(model, images(1), config, Objective(0.01)),
        lambda: QuantModel(model, QuantConfig()).observe([images(1)]),
    ):
        with pytest.raises(InputError, match=words) as refusal:
            start()
        assert "\n" not in str(refusal.value)


def test_a_quantized_model_is_not_quantized_again():
    config = PtqConfig.from_preset("nearest")
    qmodel = quantize(Small().eval(), images(1), config, lmbda=0.01, progress=False)
    with pytest.raises(InputError, match="quantized already; give the float codec"):
        quantize(qmodel, images(1), config, lmbda=0.01)


def test_a_lazy_layer_that_has_run_is_like_any_other():
    model = lazy().eval()
    model(images(1))
    assert quantize(model, images(1), PtqConfig.from_preset("nearest"), lmbda=0.01, progress=False).frozen


def test_compiled_networks_are_looked_into():
    torch.manual_seed(0)
    model = Small().eval()
    config = PtqConfig.from_preset("nearest")
    expected = quantize(model, images(1), config, lmbda=0.01, progress=False).state_dict()
    whole = torch.compile(model)
    part = Small().eval()
    part.load_state_dict(model.state_dict())
    part.g_a = torch.compile(part.g_a)
    for compiled in (whole, part):
        result = quantize(compiled, images(1), config, lmbda=0.01, progress=False).state_dict()
        assert result.keys() == expected.keys()
        assert all(torch.equal(result[key], expected[key]) for key in expected)
    assert isinstance(part.g_a, torch._dynamo.OptimizedModule)  # the user's model is as it was
