"""What all tests share: no network, no data of the developer's machine, small images on request."""

import os

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path_factory):
    """Tests see no LICQ_DATA and an empty cache, and a download that is not replaced fails at once."""
    monkeypatch.delenv("LICQ_DATA", raising=False)
    monkeypatch.setenv("LICQ_CACHE", os.fspath(tmp_path_factory.getbasetemp() / "no-cache"))

    def refuse(url):
        raise ConnectionRefusedError(f"tests do not use the network: {url}")

    monkeypatch.setattr("licq.data.datasets._fetch", refuse)


@pytest.fixture
def make_image(tmp_path):
    """A function that writes a random 8-bit RGB image (smooth, so that codecs behave) and returns its path."""

    def make(name: str = "image.png", width: int = 64, height: int = 48, seed: int = 0, folder=None):
        folder = folder or tmp_path
        folder.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        image.save(folder / name)
        return folder / name

    return make
