"""The registry: names, sizes, lambdas, the plug-in decorator."""

import inspect

import pytest
import torch
from compressai.zoo import image as zoo_image

from licq.models import registry
from licq.models.registry import create_model, get_architecture, list_models, register_model
from licq.support.errors import InputError

COMPRESSAI = ("balle2018", "minnen2018", "minnen2018-mean", "cheng2020", "cheng2020-anchor")


def test_list_models_names_every_codec_of_the_project():
    assert {*COMPRESSAI, "tic"} <= set(list_models())
    assert list_models() == sorted(list_models())


@pytest.mark.parametrize("name", COMPRESSAI)
def test_official_sizes_are_those_of_the_compressai_zoo(name):
    architecture = get_architecture(name)
    expected = zoo_image.cfgs[architecture.zoo]
    assert set(architecture.official) == set(expected)
    for quality, widths in expected.items():
        assert tuple(architecture.official[quality].values()) == widths
    assert issubclass(architecture.factory, zoo_image.model_architectures[architecture.zoo])


@pytest.mark.parametrize("name", COMPRESSAI)
def test_forward_gives_x_hat_and_likelihoods(name):
    overrides = {"N": 12, "M": 18} if "M" in get_architecture(name).official[1] else {"N": 12}
    model = create_model(name, **overrides).eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        out = model(x)
    assert out["x_hat"].shape == x.shape
    assert set(out["likelihoods"]) == {"y", "z"}


def test_every_architecture_has_a_reference_configuration_of_valid_arguments():
    for name in list_models():
        architecture = get_architecture(name)
        if architecture.factory.__module__.startswith("licq_plugin"):
            continue  # another test's
        sizes = architecture.sizes(configuration="reference")
        inspect.signature(architecture.factory).bind(**sizes)
        assert architecture.multiple == 64
        assert set(architecture.official) <= set(architecture.lambdas["mse"])


def test_configuration_fixes_the_sizes_and_overrides_change_them():
    model = create_model("minnen2018", quality=1, configuration="reference")
    assert (model.N, model.M) == (48, 64)
    assert create_model("minnen2018", configuration="reference", M=24, N=16).M == 24


def test_lambda_follows_quality_and_metric():
    architecture = get_architecture("minnen2018")
    assert architecture.lambda_for(4) == 0.0130
    assert architecture.lambda_for(1, "ms-ssim") == 2.40
    with pytest.raises(InputError, match="psnr"):
        architecture.lambda_for(1, "psnr")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("minen2018",), "minnen2018"),
        (("cheng2020", 7), "from 1 to 6"),
        (("minnen2018", 1, "tiny"), "reference"),
    ],
)
def test_unknown_name_quality_and_configuration_are_one_line(arguments, expected):
    with pytest.raises(InputError, match=expected) as caught:
        create_model(*arguments)
    assert "\n" not in str(caught.value)


def test_unknown_size_argument_is_an_input_error():
    with pytest.raises(InputError, match="width"):
        create_model("tic", quality=1, width=3)


def test_decorator_registers_a_class_and_refuses_a_second_owner_of_the_name(monkeypatch):
    list_models()
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    @register_model("mine", official={1: {"N": 4}}, configurations={"reference": {"N": 2}})
    class Mine(torch.nn.Module):
        def __init__(self, N: int, depth: int = 3):
            super().__init__()
            self.N, self.depth = N, depth

    assert isinstance(create_model("mine", quality=1), Mine)
    assert create_model("mine", configuration="reference").N == 2
    assert get_architecture("mine").sizes() == {"N": 4, "depth": 3}
    register_model("mine", Mine, official={1: {"N": 4}}, configurations={})
    with pytest.raises(ValueError, match="already taken"):
        register_model("mine", torch.nn.Identity, official={}, configurations={})
