"""Codecs of installed packages, by the entry point group licq.models."""

import sys

import pytest

from licq.models import registry
from licq.models.registry import create_model, get_architecture, list_models
from licq.support.cli import main_guard
from licq.support.errors import InputError, InputWarning

CODEC = """
from torch import nn
import licq

@licq.register_model("{name}", official={{1: {{"N": 4}}}}, configurations={{"reference": {{"N": 2}}}})
class Installed(nn.Module):
    def __init__(self, N: int = 4):
        super().__init__()
        self.N = N
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A function that makes a package with a codec and its entry point, as an installer leaves them; gone
    after the test."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.syspath_prepend(tmp_path)
    known = set(sys.modules)

    def make(package: str, code: str, point: str):
        (tmp_path / f"{package}.py").write_text(code)
        facts = tmp_path / f"{package}-1.0.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (facts / "entry_points.txt").write_text(f"[licq.models]\n{point} = {package}\n")
        registry._installed.cache_clear()

    yield make
    registry._installed.cache_clear()
    registry._load_installed.cache_clear()
    for name in set(sys.modules) - known:
        if name.startswith("licq_test_"):
            del sys.modules[name]


def test_codec_of_an_installed_package_is_imported_when_it_is_asked_for(install):
    install("licq_test_good", CODEC.format(name="installed"), "installed")
    assert get_architecture("lu2022").name == "lu2022" and "licq_test_good" not in sys.modules
    assert create_model("installed", quality=1).N == 4
    assert "licq_test_good" in sys.modules and "installed" in list_models()


def test_packages_codecs_are_listed_and_may_have_other_names_than_their_entry_point(install):
    install("licq_test_other", CODEC.format(name="named-otherwise"), "other")
    assert "named-otherwise" in list_models()


def test_name_of_no_entry_point_is_looked_for_in_every_package(install):
    install("licq_test_other", CODEC.format(name="named-otherwise"), "other")
    assert get_architecture("named-otherwise").sizes() == {"N": 4}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import torch_of_the_future", "ModuleNotFoundError: No module named 'torch_of_the_future'"),
        (CODEC.format(name="lu2022"), "ValueError: the name 'lu2022' is already taken"),
    ],
)
def test_broken_package_is_one_line_and_does_not_take_the_others_down(install, capsys, code, expected):
    install("licq_test_good", CODEC.format(name="installed"), "installed")
    install("licq_test_broken", code, "broken")
    with pytest.warns(InputWarning, match="codec broken of the installed package licq_test_broken") as caught:
        names = list_models()
    assert len(caught) == 1 and expected in str(caught[0].message)
    assert "installed" in names and "lu2022" in names and get_architecture("lu2022").name == "lu2022"
    with pytest.raises(InputError, match=expected.replace("(", r"\(")):
        get_architecture("broken")
    assert main_guard(lambda: list_models() and 0) == 0
    error = capsys.readouterr().err
    assert error.startswith("warning: the codec broken") and error.count("\n") == 1
