"""What happens to modules and functions that licq does not know: they run in float, and the report names every one."""

import pytest
import torch
import torch.nn.functional as F
from compressai.entropy_models import EntropyBottleneck
from torch import nn

from quant.config import QuantConfig
from quant.model import QuantModel

FORWARD = "the codec's own forward"


class Mix(nn.Module):
    """A module of the user's own with parameters that it uses functionally."""

    def __init__(self, channels: int):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(channels, 1, 1) + 0.5)
        self.mix = nn.Parameter(torch.rand(channels, channels) / channels)

    def forward(self, x):
        return torch.einsum("bchw,cd->bdhw", x * self.gain, self.mix)


class Odd(nn.Module):
    """Known and unknown layers and functions, operations in place, and a gate."""

    def __init__(self, c: int = 8):
        super().__init__()
        self.conv = nn.Conv2d(3, c, 5, 4, 2)
        self.norm, self.act, self.mix = nn.BatchNorm2d(c), nn.PReLU(), Mix(c)
        self.reflect = nn.Conv2d(c, 2 * c, 3, padding=1, padding_mode="reflect")
        self.down = nn.Conv2d(c, c, 5, 4, 2)
        self.shift = nn.Parameter(torch.rand(c, 1, 1))
        self.entropy_bottleneck = EntropyBottleneck(c)
        self.up = nn.Conv2d(2 * c, 3, 3, padding=1)
        self.idle = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        y = self.mix(self.act(self.norm(self.conv(x))))
        y += 1.0
        y = y.mul_(0.5)
        y.relu_()
        value, gate = self.reflect(y).chunk(2, 1)
        y_hat, likelihoods = self.entropy_bottleneck(self.down(value * torch.sigmoid(gate)) + self.shift)
        smooth = F.interpolate(y_hat, scale_factor=16, mode="bilinear", align_corners=False)
        blocky = F.interpolate(y_hat, scale_factor=16, mode="nearest")
        return {"x_hat": self.up(torch.cat([smooth, blocky], 1)), "likelihoods": {"y": likelihoods}}


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)) / 255


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = Odd().eval()
    with torch.no_grad():
        network.conv.weight.mul_(5)
        network.norm.running_mean.uniform_(-1, 1)
    return network


@pytest.fixture(scope="module")
def model(network, images):
    model = QuantModel(network, QuantConfig())
    model.observe([images])
    model.freeze()
    return model


def test_report_names_every_function_in_float_and_where(model):
    kept = {(entry["function"], entry["in"]) for entry in model.coverage()["kept_in_float"]}
    assert kept == {
        ("batch_norm", "norm"),
        ("prelu", "act"),
        ("einsum", "mix"),
        ("conv2d", "reflect"),
        ("interpolate", FORWARD),
    }


def test_report_names_every_module_left_alone_and_why(model):
    left = model.coverage()["left_alone"]
    assert left.keys() == {"norm", "act", "mix", "reflect", "idle"}
    assert "BatchNorm2d" in left["norm"] and "PReLU" in left["act"] and "Mix" in left["mix"]
    assert "'reflect'" in left["reflect"]
    assert left["idle"] == "never ran in calibration"


def test_what_is_known_is_integer(model):
    kinds = model.coverage()["quantized"]
    assert {"conv": 3, "sigmoid": 1, "entropy_bottleneck": 1}.items() <= kinds.items()
    assert kinds["mul"] == 2 and kinds["add"] == 2  # x * gain, the gate; y += 1 and + shift


def test_forward_runs_near_the_float_one(model, network, images):
    with torch.no_grad():
        expected, out = network(images.clone()), model(images)
    rest = (out["x_hat"] - expected["x_hat"].clamp(0, 1)).abs()
    assert float(rest.mean()) < 0.02
    assert expected["x_hat"].std() > 0.02


def test_nothing_is_float_in_silence(model, images, monkeypatch):
    """Independent of the report: every torch function that computes on a float version of a quantized tensor is in it."""
    seen = []
    original = model.runtime.in_float

    def watch(function, args, kwargs):
        seen.append(getattr(function, "__name__", str(function)))
        return original(function, args, kwargs)

    monkeypatch.setattr(model.runtime, "in_float", watch)
    before = dict(model.runtime.kept_in_float)
    with torch.no_grad():
        model(images)
    after = model.runtime.kept_in_float
    assert after.keys() == before.keys()
    assert sum(after.values()) - sum(before.values()) == len(seen) == 6  # interpolate twice
    unnamed = [
        name
        for name, module in model.model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
        and ".module" not in f".{name}"
        and not any(name == node or name.startswith(f"{node}.") for node in model.rewrite.nodes)
        and name not in model.coverage()["left_alone"]
        and name
    ]
    assert unnamed == []


def test_module_that_computes_behind_our_back_still_gets_real_numbers(images):
    """Functions that only know plain tensors (numpy, a C extension) fail aloud instead of computing on codes."""

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            y = self.conv(x)
            return {"x_hat": torch.from_numpy(y.detach().numpy() * 1.0), "likelihoods": {}}

    model = QuantModel(Hidden(), QuantConfig())
    try:
        model.observe([images])
        model.freeze()
        with torch.no_grad():
            out = model(images)["x_hat"]
    except (TypeError, AttributeError, RuntimeError):
        return
    with torch.no_grad():
        torch.testing.assert_close(out, model.model.conv.real(images), rtol=0, atol=0.02)
    assert {entry["function"] for entry in model.coverage()["kept_in_float"]} & {"numpy", "detach"}


def test_function_on_a_parameter_beside_layers_is_named_with_its_module(images):
    class Gained(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.gain = nn.Parameter(torch.ones(1, 3, 1, 1))

        def forward(self, x):
            return torch.lerp(self.conv(x), self.gain, 0.5)

    class Codec(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = Gained()

        def forward(self, x):
            return {"x_hat": self.part(x), "likelihoods": {}}

    model = QuantModel(Codec(), QuantConfig())
    model.observe([images])
    model.freeze()
    coverage = model.coverage()
    assert coverage["kept_in_float"] == [{"function": "lerp", "in": "part"}]
    assert coverage["quantized"] == {"conv": 1}
