"""A plug-in file finds the modules beside it, wherever licq runs."""

import sys
from importlib import import_module
from pathlib import Path

import pytest

from licq.models.plugin_path import _BesidePlugin, find_beside

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder; imports are as before after the test."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])  # as of `python .../main_ptq.py`
    known = set(sys.modules)
    find_beside(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(tmp_path) in str(getattr(sys.modules[name], "__path__", "")) + str(
            getattr(sys.modules[name], "__file__", "")
        ):
            del sys.modules[name]


@pytest.mark.parametrize("marked", [False, True])
def test_users_models_are_not_those_of_the_checkout(folder, marked):
    (folder / "models").mkdir()
    (folder / "models" / "network.py").write_text("MINE = True\n")
    if marked:
        (folder / "models" / "__init__.py").touch()
    users = "models"  # the one bare name that tests of the imports would refuse
    assert import_module(f"{users}.network").MINE and "licq.models" in sys.modules
    sys.path.append("/somewhere/else")  # makes Python look namespace packages up again
    (folder / "models" / "late.py").write_text("MINE = True\n")
    assert import_module(f"{users}.late").MINE


def test_folders_that_are_no_packages_hide_nothing_installed(folder):
    for name in ("licq", "tabulate", "yaml"):
        (folder / name).mkdir()
    known = {name: sys.modules.pop(name, None) for name in ("tabulate",)}
    try:
        import tabulate

        assert str(folder) not in tabulate.__file__
    finally:
        sys.modules.update({name: module for name, module in known.items() if module})
    (folder / "licq" / "__init__.py").touch()
    assert _BesidePlugin(str(folder)).find_spec("licq") is None


def test_folder_is_looked_in_once_however_often_it_is_named(folder):
    before = list(sys.meta_path)
    undo = find_beside(folder)
    assert sys.meta_path == before and str(folder) not in sys.path
    undo()  # the first one's is still needed
    assert sys.meta_path == before
    find_beside(folder / "other")()
    assert sys.meta_path == before
