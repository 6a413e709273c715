"""A finished run that the tests of main_eval.py evaluate and code images with."""

import shutil

import pytest

from tests.main_jobs import run


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Where the first run of this file leaves its folder for the others."""
    return tmp_path_factory.mktemp("finished") / "out"


@pytest.fixture
def saved(job, finished, tmp_path, capsys):
    """The folder of a run with qualities 1 and 3."""
    if not finished.exists():
        assert run(job, quality="1,3", **{"no-baseline": True}) == 0
        shutil.copytree(tmp_path / "out", finished)
        capsys.readouterr()
    shutil.copytree(finished, tmp_path / "out", dirs_exist_ok=True)
    return tmp_path / "out"
