"""A user's own codec by the path of its file: `--arch path/to/file.py`."""

import sys

import pytest
import torch

from licq.models import registry
from licq.models.checkpoints import load_model, save_checkpoint
from licq.models.registry import architecture_of, create_model, get_architecture, list_models
from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.support.errors import InputError

PLUGIN = """
from pathlib import Path
import torch
from compressai.entropy_models import EntropyBottleneck
from torch import nn
from licq.models.registry import register_model

@register_model("mine", official={1: {"N": 4}, 2: {"N": 4}}, configurations={"reference": {"N": 2}},
                multiple=4, lambdas={"mse": {1: 0.01, 2: 0.02}}, LOADER)
class Mine(nn.Module):
    def __init__(self, N: int = 4):
        super().__init__()
        self.N = N
        self.g_a = nn.Conv2d(3, N, 4, 4)
        self.entropy_bottleneck = EntropyBottleneck(N)
        self.g_s = nn.ConvTranspose2d(N, 3, 4, 4)

    def forward(self, x):
        y_hat, likelihoods = self.entropy_bottleneck(self.g_a(x))
        return {"x_hat": self.g_s(y_hat), "likelihoods": {"y": likelihoods}}

    def update(self):
        self.entropy_bottleneck.update()

def fill(path, quality):
    network = Mine()
    network.g_a.weight.data.fill_(float(Path(path).read_text()) * quality)
    return network
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A function that writes the file with some text replaced; what it registers is gone after the test."""
    list_models()
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.setattr(registry, "_PLUGINS", {})

    def write(old: str = "LOADER", new: str = ""):
        path = tmp_path / "mine.py"
        path.write_text(PLUGIN.replace(old, new).replace("LOADER", ""))
        return str(path)

    yield write
    for name in [name for name in sys.modules if name.startswith("licq_plugin_mine")]:
        del sys.modules[name]


def test_path_of_a_file_is_taken_for_a_name_and_the_file_runs_once(plugin):
    path = plugin()
    assert "mine" not in list_models()
    architecture = get_architecture(path)
    assert (architecture.name, architecture.multiple, architecture.lambda_for(2)) == ("mine", 4, 0.02)
    assert get_architecture(path) is architecture and get_architecture("mine") is architecture
    assert create_model(path, quality=1).N == 4
    assert architecture_of(create_model("mine", N=3)) == ("mine", {"N": 3})


def test_checkpoint_of_a_plugin_goes_the_ordinary_way(plugin, tmp_path):
    path = plugin()
    saved = create_model(path, quality=2).eval()
    saved.update()
    save_checkpoint(saved, tmp_path / "m.safetensors", {"arch": "mine", "quality": 2}, torch.float32)
    loaded = load_model(path, 2, tmp_path / "m.safetensors")
    for name, tensor in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    with pytest.raises(InputError, match="`quality` 2"):
        load_model(path, 1, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="no embedded checkpoint of mine"):
        load_model(path, 1)
    with pytest.raises(InputError, match="ms-ssim"):
        load_model(path, 1, tmp_path / "m.safetensors", metric="ms-ssim")


def test_loader_of_a_plugin_serves_every_quality_from_one_path(plugin, tmp_path):
    path = plugin("LOADER", "loader=lambda path, quality: fill(path, quality)")
    (tmp_path / "weights.txt").write_text("0.5")
    for quality in (1, 2):
        network = load_model(path, quality, tmp_path / "weights.txt")
        assert not network.training and float(network.g_a.weight.detach().max()) == 0.5 * quality
        assert architecture_of(network) == ("mine", {"N": 4})


def test_quantized_plugin_says_which_file_it_needs(plugin, tmp_path, monkeypatch):
    model = QuantModel(create_model(plugin(), quality=1), QuantConfig())
    x = torch.randint(0, 256, (1, 3, 16, 16)) / 255
    model.observe([x])
    model.freeze()
    model.save(tmp_path / "q.safetensors")
    assert torch.equal(QuantModel.load(tmp_path / "q.safetensors")(x)["x_hat"], model(x)["x_hat"])
    del registry._REGISTRY["mine"]  # as in a process that never named the file
    with pytest.raises(InputError, match=r"'mine'.*`arch=FILE.py`"):
        QuantModel.load(tmp_path / "q.safetensors")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("import torch\n", "import torch_of_the_future\n", "ModuleNotFoundError.*torch_of_the_future"),
        ("class Mine", "clas Mine", "SyntaxError"),
        ('"mine"', '"lu2022"', "already taken"),
        ("@register_model(", "(lambda *a, **k: lambda c: c)(", "SyntaxError|registers no architecture"),
        (
            "def fill",
            "register_model('other', Mine, official={1: {}}, configurations={})\ndef fill",
            "registers mine, other",
        ),
    ],
)
def test_files_that_are_no_plugin_are_one_line_and_leave_nothing(plugin, old, new, expected):
    before = dict(registry._REGISTRY)
    path = plugin(old, new)
    with pytest.raises(InputError, match=expected) as caught:
        get_architecture(path)
    assert "\n" not in str(caught.value)
    assert registry._REGISTRY == before and not [
        name for name in sys.modules if name.startswith("licq_plugin_mine")
    ]


def test_missing_file_is_one_line(tmp_path):
    with pytest.raises(InputError, match="no plug-in at"):
        get_architecture(str(tmp_path / "none.py"))
