"""The rewriter on what codecs may do with their modules: one under several names, hooks, layers left in
float."""

import warnings

import pytest
import torch
from compressai.entropy_models import EntropyBottleneck
from compressai.layers import GDN, ResidualBlock
from torch import Tensor, nn
from torch.nn.utils import prune

from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.quant.modules import QuantModule
from licq.quant.serialization import read_quantized
from licq.reconstruction.api import quantize
from licq.reconstruction.config import PtqConfig
from licq.support.errors import InputError
from tests.tiny_codecs import images


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
        (
            {"w_bits": 32, "a_bits": 32},
            {"mid": {"w_bits": 8}},
            {"mid": "a_bits 32", "2 layers": "w_bits and a_bits 32"},
            0,
        ),
    ],
)
def test_layers_of_32_bits_are_reported_as_left_in_float(settings, bits, left, integer):
    model = QuantModel(codec(Plain), QuantConfig(**settings), bits)
    model.observe([images(2)])
    coverage = model.coverage()
    assert coverage["left_alone"] == {
        name: f"products of real numbers ({reason})" for name, reason in left.items()
    }
    assert sum(coverage["quantized"].get(kind, 0) for kind in ("conv", "deconv")) == integer


# ------------------------------------------------------------------------------------------ in several places


class SharedLayer(Plain):
    """One convolution twice in a Sequential, and once more under another parent."""

    def extra(self, c):
        conv = nn.Conv2d(c, c, 3, padding=1)
        self.seq, self.other = nn.Sequential(conv, nn.ReLU(), conv), nn.ModuleList([conv])

    def between(self, y):
        return self.other[0](self.seq(y))


class SharedContainer(Plain):
    """A container, with layers, a normalization and an addition, under two parents."""

    def extra(self, c):
        inner = ResidualBlock(c, c) if self.block else nn.Sequential(nn.Conv2d(c, c, 3, padding=1), GDN(c))
        self.a, self.b = nn.Sequential(inner, nn.ReLU()), nn.ModuleList([inner])

    block = False

    def between(self, y):
        return self.b[0](self.a(y))


class SharedBlock(SharedContainer):
    block = True


SHARED = {
    SharedLayer: {"seq.0": 3},
    SharedContainer: {"a.0.0": 2, "a.0.1": 2},
    SharedBlock: {"a.0.conv1": 2, "a.0.conv2": 2, "a.0.module.add0": 2},
}


@pytest.mark.parametrize("kind", SHARED, ids=lambda kind: kind.__name__)
def test_a_layer_in_several_places_is_one_node_with_the_ranges_of_all_its_calls(kind):
    network = codec(kind)
    qmodel = observed(network)
    shared = {
        name: node for name, node in qmodel.nodes.items() if name.startswith(("seq", "other", "a.", "b."))
    }
    assert {name: node.calls for name, node in shared.items() if node.kind != "leaky_relu"} == SHARED[kind]
    assert not [
        node for node in qmodel.nodes.values() for part in node.children() if isinstance(part, QuantModule)
    ]
    name = next(iter(SHARED[kind]))
    layer, inputs = network.get_submodule(name), []
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        network(images(2))
        hook.remove()
        lowest = torch.stack([x.amin((0, 2, 3)) for x in inputs]).amin(0).clamp(max=0)
        qmodel.quantize_nodes(False)
        assert torch.allclose(qmodel(images(2))["x_hat"], network(images(2))["x_hat"], atol=1e-4)
    assert torch.allclose(shared[name].input_grid.low, lowest * QuantConfig.a_headroom, atol=1e-4)


@pytest.mark.parametrize("kind", SHARED, ids=lambda kind: kind.__name__)
def test_a_layer_in_several_places_learns_freezes_and_is_in_a_file_once(kind, tmp_path):
    settings = {"a_bits": 8, "iters": 2, "joint_iters": 2, "batch": 1, "measured": 2, "observed": 2}
    qmodel = quantize(codec(kind), images(2), PtqConfig.from_preset("licq", **settings), lmbda=0.01)
    qmodel.save(tmp_path / "m.safetensors")
    tensors = read_quantized(tmp_path / "m.safetensors")[1]
    assert not [name for name in tensors if name.startswith(("model.seq.2", "model.other", "model.b."))]
    loaded = QuantModel.load(tmp_path / "m.safetensors", model=kind())
    with torch.no_grad():
        assert torch.equal(qmodel(images(1, seed=3))["x_hat"], loaded(images(1, seed=3))["x_hat"])


# ------------------------------------------------------------------------------------------------------ hooks


class Hooked(Plain):
    """A convolution whose weight a hook computes."""

    def extra(self, c):
        conv = nn.Conv2d(c, c, 3, padding=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.hooked = self.norm(conv)

    def between(self, y):
        return self.hooked(y)


class WeightNormed(Hooked):
    norm = staticmethod(nn.utils.weight_norm)


class SpectralNormed(Hooked):
    norm = staticmethod(nn.utils.spectral_norm)


class Pruned(Hooked):
    norm = staticmethod(lambda conv: prune.l1_unstructured(conv, "weight", 0.5))


@pytest.mark.parametrize("kind", [WeightNormed, SpectralNormed, Pruned])
def test_weights_that_a_hook_computes_are_those_of_the_state_that_was_loaded(kind):
    source = codec(kind)
    torch.manual_seed(2)
    network = kind().eval()
    network.load_state_dict(source.state_dict())
    qmodel = observed(network)  # before its first forward
    qmodel.quantize_nodes(False)
    with torch.no_grad():
        assert torch.allclose(qmodel(images(2))["x_hat"], source(images(2))["x_hat"], atol=1e-4)
    assert "hooked.weight" not in dict(network.named_parameters())  # the user's codec is as it was


def test_a_hook_of_a_layer_is_refused_and_says_how_to_mend_it():
    network = codec(Plain)

    def double(module, args, output):
        return 2 * output

    handle = network.mid.register_forward_hook(double)
    with pytest.raises(InputError, match="mid has a forward hook .*double.*; remove it") as caught:
        QuantModel(network, QuantConfig())
    assert "\n" not in str(caught.value)
    handle.remove()
    network.up.register_forward_hook(double)  # of a container: its forward runs
    qmodel = observed(network)
    qmodel.quantize_nodes(False)
    with torch.no_grad():
        assert torch.allclose(qmodel(images(2))["x_hat"], network(images(2))["x_hat"], atol=1e-4)
