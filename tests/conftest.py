"""What all tests share: no network, no data of the developer's machine, small images on request.

PyTorch is imported by the fixtures that need it: the process that hands tests out to others reads this file,
too, and would spend seconds on it."""

import os

import numpy as np
import pytest
from PIL import Image

from tests.main_jobs import ARCH


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
    """A function that writes a random 8-bit RGB image (smooth, so that codecs behave) and returns its
    path."""

    def make(name: str = "image.png", width: int = 64, height: int = 48, seed: int = 0, folder=None):
        folder = folder or tmp_path
        folder.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        image.save(folder / name)
        return folder / name

    return make


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    """Folder with tiny-q1 and tiny-q3, weights large enough that their latents are not all zero."""
    import torch

    from licq.models.checkpoints import save_checkpoint
    from licq.models.registry import LAMBDAS, create_model

    folder = tmp_path_factory.mktemp("zoo")
    for quality in (1, 3):
        torch.manual_seed(quality)
        model = create_model(ARCH, N=8, M=8)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.startswith(("g_", "h_")) and parameter.ndim == 4:
                    parameter.mul_(2.0)
        model.update()
        save_checkpoint(
            model,
            folder / f"tiny-q{quality}.safetensors",
            {"arch": ARCH, "quality": quality, "lambda": LAMBDAS["mse"][quality], "metric": "mse"},
        )
    return folder


@pytest.fixture
def blank_figures():
    """Figures are files of their type without a drawing: to draw them takes half of a small run's time, and
    tests/report looks at them. A test that needs them drawn calls `undo` of this."""
    from matplotlib.figure import Figure

    def save(figure, file, format=None, **_):
        kind = format or os.path.splitext(file)[1][1:]
        if kind == "svg":
            file.write(b'<svg xmlns="http://www.w3.org/2000/svg"/>')
        else:
            Image.new("L", (8, 8)).save(file, kind)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save)
        yield patch


@pytest.fixture
def job(tmp_path, zoo, make_image, blank_figures):
    """Arguments of a run of a second: nothing is learned, split or balanced, and no figure is drawn. Results
    go to tmp_path/out."""
    for seed in (1, 2):
        make_image(f"{seed}.png", 96, 64, seed, tmp_path / "eval")
        make_image(f"{seed}.png", 80, 72, seed + 10, tmp_path / "calib")
    return {
        "--checkpoint": zoo / "tiny-q{quality}.safetensors",
        "--quality": 1,
        "--eval": tmp_path / "eval",
        "--calib": tmp_path / "calib",
        "--crop": 64,
        "--num_calib": 2,
        "--crops_per_image": 1,
        "--iters": 0,
        "--set": ["joint_iters=0", "balance=0", "split=0", "stress=false", "round_init=nearest"],
        "--device": "cpu",
        "--out": tmp_path / "out",
        "--quiet": True,
    }
