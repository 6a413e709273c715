"""What happens to modules and functions that licq does not know: they run in float, and the report names
every one."""

import pytest
import torch
import torch.nn.functional as F
from compressai.entropy_models import EntropyBottleneck
from torch import nn

from licq.quant.config import QuantConfig
from licq.quant.dispatch import HANDLERS
from licq.quant.functions import make_function
from licq.quant.model import QuantModel
from licq.quant.qtensor import QTensor
from licq.quant.runtime import Runtime
from licq.support.errors import InputError

FORWARD = "the codec's own forward"


class Mix(nn.Module):
    """A module of the user's own with parameters that it uses functionally."""

    def __init__(self, channels: int):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(channels, 1, 1) + 0.5)
        self.mix = nn.Parameter(torch.rand(channels, channels) / channels)

    def forward(self, x):
        return torch.einsum("bchw,cd,d->bdhw", x * self.gain, self.mix, self.mix[0])


class Odd(nn.Module):
    """Known and unknown layers and functions, operations in place, and a gate."""

    def __init__(self, c: int = 8):
        super().__init__()
        self.conv = nn.Conv2d(3, c, 5, 4, 2)
        self.norm, self.act = nn.BatchNorm2d(c, track_running_stats=False), nn.RReLU()
        self.mix = Mix(c)
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
        both = torch.cat([torch.lerp(smooth, blocky, 0.5), torch.lerp(smooth, blocky, -0.5)], 1)
        return {"x_hat": self.up(both), "likelihoods": {"y": likelihoods}}


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)) / 255


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = Odd().eval()
    with torch.no_grad():
        network.conv.weight.mul_(5)
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
        ("rrelu", "act"),
        ("einsum", "mix"),
        ("lerp", FORWARD),
    }


def test_report_names_every_module_left_alone_and_why(model):
    left = model.coverage()["left_alone"]
    assert left.keys() == {"norm", "mix", "idle"}
    assert "BatchNorm2d" in left["norm"] and "Mix" in left["mix"]
    assert left["idle"] == "never ran in calibration"


def test_what_is_known_is_integer(model):
    kinds = model.coverage()["quantized"]
    assert {"conv": 4, "sigmoid": 1, "entropy_bottleneck": 1}.items() <= kinds.items()
    assert kinds["mul"] == 2 and kinds["add"] == 2  # x * gain, the gate; y += 1 and + shift


def test_forward_runs_near_the_float_one(model, network, images):
    with torch.no_grad():
        expected, out = network(images.clone()), model(images)
    rest = (out["x_hat"] - expected["x_hat"].clamp(0, 1)).abs()
    assert float(rest.mean()) < 0.02
    assert expected["x_hat"].std() > 0.02


def test_nothing_is_float_in_silence(model, images, monkeypatch):
    """Independent of the report: every torch function that computes on a float version of a quantized tensor
    is in it."""
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
    assert sum(after.values()) - sum(before.values()) == len(seen) == 5  # lerp twice
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
    """Functions that only know plain tensors (numpy, a C extension) fail aloud instead of computing on
    codes."""

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
    except (InputError, TypeError, AttributeError, RuntimeError):
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


# ------------------------------------------------------------ forwards that licq runs as they are, or refuses


class Around(nn.Module):
    """A codec with a function of the test's between its layers; the modules given are its own."""

    def __init__(self, middle, **modules: nn.Module):
        super().__init__()
        self.middle = middle
        self.down, self.entropy_bottleneck, self.mid = (
            nn.Conv2d(3, 8, 5, 4, 2),
            EntropyBottleneck(8),
            nn.Conv2d(8, 8, 3, padding=1),
        )
        self.up = nn.Sequential(nn.Conv2d(8, 48, 3, padding=1), nn.PixelShuffle(4))
        for name, module in modules.items():
            self.add_module(name, module)
        with torch.no_grad():
            self.down.weight.mul_(8)

    def forward(self, x):
        y_hat, likelihoods = self.entropy_bottleneck(self.mid(self.middle(self, self.down(x))))
        return {"x_hat": self.up(y_hat), "likelihoods": {"y": likelihoods}}


def around(middle, **modules: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    return Around(middle, **modules).eval()


def observed(network: nn.Module, images) -> QuantModel:
    model = QuantModel(network, QuantConfig())
    model.observe([images])
    return model


@torch.no_grad()
def difference_of_float_state(model: QuantModel, network: nn.Module, images) -> float:
    model.quantize_nodes(False)
    model.runtime.observing = True  # the image enters as real numbers
    try:
        return float((model(images)["x_hat"] - network(images.clone())["x_hat"]).abs().max())
    finally:
        model.runtime.observing = False


def assert_runs_as_it_is(network: nn.Module, images) -> QuantModel:
    """In float the network's own numbers, and near them as a frozen model."""
    model = observed(network, images)
    assert difference_of_float_state(model, network, images) < 1e-4
    model.freeze()
    with torch.no_grad():
        expected = network(images.clone())["x_hat"].clamp(0, 1)
        assert float((model(images)["x_hat"] - expected).abs().mean()) < 0.03
    return model


def statement(change):
    """A function of the test that changes y in place and throws the result away."""

    def middle(codec, y):
        change(y)
        return y

    return middle


def other_name(codec, y):
    kept = y
    y += 1.0
    return kept


def changed_part(codec, y):
    value, gate = y.chunk(2, 1)
    value.relu_()
    gate *= 0.5
    return torch.cat([value, gate], 1)


IN_PLACE = {
    "relu_": (statement(lambda y: y.relu_()), {}),
    "clamp_": (statement(lambda y: y.clamp_(-0.3, 0.3)), {}),
    "add_ and mul_": (statement(lambda y: y.add_(1.0).mul_(2.0)), {}),
    "fill_": (statement(lambda y: y.copy_(y + torch.zeros_like(y).fill_(0.5))), {}),
    "inplace=True": (statement(lambda y: F.relu(y, inplace=True)), {}),
    "activation before a skip": (
        lambda codec, y: y + codec.conv(codec.act(y)),
        {"act": nn.LeakyReLU(inplace=True), "conv": nn.Conv2d(8, 8, 1)},
    ),
    "another name": (other_name, {}),
    "a part whose whole is not read": (changed_part, {}),
    "zeros": (statement(lambda y: y.__setitem__((..., slice(0, None, 2), slice(1, None, 2)), 0)), {}),
    "a part": (statement(lambda y: y.__setitem__((slice(None), slice(0, 2)), y[:, 2:4] * 0.5)), {}),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_operations_in_place_change_the_tensor_that_the_forward_goes_on_with(name, images):
    middle, modules = IN_PLACE[name]
    assert_runs_as_it_is(around(middle, **modules), images)


def test_what_a_node_gave_is_kept_as_it_was_where_the_forward_changes_it_in_place(images):
    model = observed(around(lambda codec, y: codec.act(y), act=nn.ReLU(inplace=True)), images)
    with torch.no_grad(), model.runtime.recording([("down", 0)]) as record:
        model(images)
    assert float(record["down", 0].real().min()) < 0
    with torch.no_grad(), model.runtime.replaying(record):
        once, twice = model(images)["x_hat"], model(images)["x_hat"]
    assert torch.equal(once, twice) and float(record["down", 0].real().min()) < 0


@pytest.mark.parametrize("change", [lambda whole, view: view.relu_(), lambda whole, view: whole.relu_()])
def test_a_view_that_lags_behind_an_operation_in_place_is_refused_by_name(change, images):
    def middle(codec, y):
        view = y[:, :4]
        change(y, view)
        return torch.cat([y[:, :4], view], 1)

    with pytest.raises(InputError, match="relu in the codec's own forward changes a tensor in place"):
        observed(around(middle), images)


def test_a_copy_is_no_view():
    runtime = Runtime(QuantConfig())
    x = QTensor(torch.tensor([[-1.0, 2.0]]), None, runtime)
    copy, view = x.t().reshape(2).clone(), x.t()
    x.relu_()
    assert copy.q.tolist() == [-1, 2] and x.q.tolist() == [[0, 2]]
    with pytest.raises(InputError):
        view.size()


def test_a_float_forward_that_is_not_the_networks_own_is_refused(images, monkeypatch):
    network = around(lambda codec, y: torch.relu(y))
    monkeypatch.setitem(HANDLERS, "relu", lambda runtime, function, args, kwargs: args[0])
    with pytest.raises(InputError, match="licq does not run this network as it is: its x_hat differs"):
        observed(network, images)


def test_a_latent_rounded_to_the_other_side_is_not_refused(images, monkeypatch):
    network = around(lambda codec, y: y)
    model = QuantModel(network, QuantConfig())
    rounded = model.model.entropy_bottleneck.real

    def flipped(z):
        z_hat, likelihoods = rounded(z)
        z_hat[0, 0, 0, 0] += 1
        return z_hat, likelihoods

    monkeypatch.setattr(model.model.entropy_bottleneck, "real", flipped)
    model.observe([images])
    assert difference_of_float_state(model, network, images) > 1e-3


def test_the_comparison_changes_neither_random_numbers_nor_the_network(images):
    network = around(lambda codec, y: y + 0.0 * torch.rand(1))
    network.train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    torch.manual_seed(5)
    observed(network, images)
    after = torch.rand(1)
    torch.manual_seed(5)
    torch.rand(1), torch.rand(1)  # of the forward that observes, of the one on integers
    assert torch.equal(after, torch.rand(1))
    assert network.training and all(
        torch.equal(before[key], value) for key, value in network.state_dict().items()
    )


def test_a_network_that_was_trained_further_is_not_compared(images):
    network = around(lambda codec, y: y)
    model = QuantModel(network, QuantConfig())
    with torch.no_grad():
        network.up[0].weight.mul_(-3)
    model.observe([images])


@pytest.mark.parametrize(
    "function, kinds",
    [
        (lambda codec, y: F.elu(y, alpha=0.2), {"elu"}),
        (lambda codec, y: codec.act(y), {"softplus"}),
        (lambda codec, y: F.softplus(y, beta=5), {"softplus"}),
        (lambda codec, y: torch.div(y, 0.3, rounding_mode="floor") * 0.3, set()),
        (lambda codec, y: torch.pow(2, y.clamp(-3, 3)), {"exp"}),
        (lambda codec, y: torch.clamp(input=y, min=-0.3, max=0.3), set()),
        (lambda codec, y: F.leaky_relu(y).repeat_interleave(2, dim=1)[:, ::2], {"leaky_relu"}),
        (lambda codec, y: y.repeat_interleave(4, 2)[:, :, ::4], set()),
        (lambda codec, y: torch.where((y > 0) | (y == 0), y, 0.1 * y), {"where"}),
        (lambda codec, y: abs(y), set()),
        (lambda codec, y: y * (y.shape[1] if bool(y.max() > 1e9) else 0.5), set()),
    ],
)
def test_arguments_and_operators_count(function, kinds, images):
    model = assert_runs_as_it_is(around(function, act=nn.Softplus()), images)
    assert kinds == model.coverage()["quantized"].keys() - {"conv", "entropy_bottleneck", "carrier"}


def test_a_table_with_arguments_comes_back_from_its_file(images, tmp_path):
    network = around(lambda codec, y: F.softplus(F.elu(y, alpha=0.2), beta=5))
    model = observed(network, images)
    model.freeze()
    model.save(tmp_path / "m.safetensors")
    loaded = QuantModel.load(tmp_path / "m.safetensors", model=network)
    with torch.no_grad():
        assert torch.equal(model(images)["x_hat"], loaded(images)["x_hat"])
    assert loaded.functions["elu0"].options == {"alpha": 0.2} and loaded.functions["softplus0"].options == {
        "beta": 5.0
    }


def test_einops_moves_quantized_tensors(images):
    einops = pytest.importorskip("einops")

    def middle(codec, y):
        rows = einops.rearrange(y, "b c h w -> b (h w) c")
        return einops.rearrange(rows, "b (h w) c -> b c h w", h=y.shape[2])

    assert not assert_runs_as_it_is(around(middle), images).coverage()["kept_in_float"]


def test_compressais_checkerboard_codec_runs_as_it_is(images):
    from compressai.models import Cheng2020AnchorCheckerboard

    torch.manual_seed(0)
    network = Cheng2020AnchorCheckerboard(N=8).eval()
    model = observed(network, images[:1])
    assert difference_of_float_state(model, network, images[:1]) < 1e-4
    assert not model.coverage()["kept_in_float"]


@pytest.mark.parametrize(
    "modules, middle, message",
    [
        (
            {"a": nn.MultiheadAttention(8, 2)},
            lambda codec, y: codec.a(y.flatten(2), y.flatten(2), y.flatten(2))[0],
            "network: multi_head_attention_forward in a: RuntimeError",
        ),
        ({}, lambda codec, y: y.reshape(7, 7), "network: reshape in the codec's own forward: RuntimeError"),
        ({"c": nn.Conv2d(9, 8, 1)}, lambda codec, y: codec.c(y), "network: c: RuntimeError"),
    ],
)
def test_what_a_forward_raises_is_one_line_that_names_the_place(modules, middle, message, images):
    with pytest.raises(InputError, match=message):
        observed(around(middle, **modules), images)


def test_networks_of_half_precision_are_told_to_convert(images):
    with pytest.raises(InputError, match="float16.*float()"):
        observed(around(lambda codec, y: y).half(), images)


class Windows(nn.Module):
    """Attention inside windows of 4x4, with the windows where heads are in other codecs."""

    def forward(self, y):
        b, c, h, w = y.shape
        rows = y.reshape(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, 16, c)
        rows = torch.softmax(rows @ rows.transpose(-1, -2) * 0.3, -1) @ rows
        return rows.reshape(b, h // 4, w // 4, 4, 4, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)


def test_windows_that_vary_in_calibration_have_one_scale(images):
    model = QuantModel(around(lambda codec, y: codec.windows(y), windows=Windows()), QuantConfig())
    model.observe([images, images[:, :, :32]])
    assert model.nodes["windows.matmul0"].grid_a.channel_dim is None
    assert model.nodes["windows.matmul0"].options["heads"] is False
    model.freeze()
    with torch.no_grad():
        assert torch.isfinite(model(images.repeat(1, 1, 2, 2))["x_hat"]).all()


def test_windows_that_vary_only_later_are_refused_in_words(images):
    model = observed(around(lambda codec, y: codec.windows(y), windows=Windows()), images)
    with pytest.raises(InputError, match="windows.matmul0 was calibrated with a scale for each of 16 heads"):
        model(images.repeat(1, 1, 2, 2))


def test_nodes_of_functions_are_made_where_their_input_is():
    runtime = Runtime(QuantConfig(softmax="log2"), make_function)
    runtime.observing = True
    runtime.function("softmax", {"dim": -1}, (QTensor(torch.empty(2, 3, device="meta"), None, runtime),))
    assert {buffer.device.type for buffer in runtime.functions["softmax0"].buffers()} == {"meta"}
