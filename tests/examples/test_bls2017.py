"""The example of a user's own codec: step absorbed as published, entirely integer, one path for all rates."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from licq.models.checkpoints import load_model
from licq.models.registry import create_model, get_architecture
from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.runs.float_models import find_float_models
from licq.support.errors import InputError

FILE = str(Path(__file__).parents[2] / "examples" / "bls2017.py")
STEPS = {1: 8, 2: 4, 3: 2, 4: 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random weights in the layout of the published ones, narrow; medians off zero."""
    folder = tmp_path_factory.mktemp("bls2017")
    torch.manual_seed(0)
    network = create_model(FILE, configuration="reference", N=8)
    with torch.no_grad():
        for layer in (network.g_a[0], network.g_a[2], network.g_a[4]):
            layer.weight.mul_(4)
        network.entropy_bottleneck.quantiles[:, 0] += torch.rand(8, 1)
    state = network.state_dict()
    safetensors.torch.save_file(
        {k: v for k, v in state.items() if k[0] == "g"}, folder / "transform.safetensors"
    )
    network.update()
    prior = dict(network.entropy_bottleneck.state_dict())
    for step in STEPS.values():
        safetensors.torch.save_file(prior, folder / f"entropy_bottleneck_step{step}.safetensors")
    return folder


def images(count: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 48, 64), generator=torch.Generator().manual_seed(1)) / 255


@pytest.mark.parametrize("quality", STEPS)
def test_step_is_absorbed_into_the_neighbouring_layers(folder, quality):
    step = STEPS[quality]
    network = load_model(FILE, quality, folder / "transform.safetensors")
    published = load_model(FILE, 4, folder)  # step 1: the weights as they are
    with torch.no_grad():
        y = published.g_a(images()) / step
        medians = network.entropy_bottleneck._get_medians().reshape(1, -1, 1, 1)
        y_hat = step * ((y - medians).round() + medians)
        expected = published.g_s(y_hat)
        out = network(images())
    assert (y - medians).round().unique().numel() > 2
    torch.testing.assert_close(out["x_hat"], expected, rtol=1e-4, atol=1e-4)
    assert out["likelihoods"]["y"].shape == (1, 8, 3, 4)


def test_every_function_is_integer_and_the_model_survives_a_file(folder, tmp_path):
    model = QuantModel(load_model(FILE, 3, folder), QuantConfig())
    model.observe([images(2)])
    model.freeze()
    coverage = model.coverage()
    assert (coverage["kept_in_float"], coverage["left_alone"]) == ([], {})
    assert coverage["quantized"] == {"conv": 3, "deconv": 3, "entropy_bottleneck": 1, "gdn": 4}
    model.save(tmp_path / "m.safetensors")
    with torch.no_grad():
        assert torch.equal(
            QuantModel.load(tmp_path / "m.safetensors")(images())["x_hat"], model(images())["x_hat"]
        )


def test_command_line_finds_all_four_rates_behind_one_path(folder):
    models = find_float_models(FILE, None, str(folder / "transform.safetensors"))
    assert [(m.arch, m.quality, m.lmbda) for m in models] == [
        ("bls2017", 1, 0.0035),
        ("bls2017", 2, 0.0070),
        ("bls2017", 3, 0.023),
        ("bls2017", 4, 0.054),
    ]
    assert models[1].load()(images())["x_hat"].shape == (1, 3, 48, 64)
    assert get_architecture(FILE).multiple == 16


def test_missing_files_and_qualities_are_one_line(folder, tmp_path):
    with pytest.raises(InputError, match="transform.safetensors"):
        load_model(FILE, 1, tmp_path)
    with pytest.raises(InputError, match="quality 5"):
        load_model(FILE, 5, folder)
