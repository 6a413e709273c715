"""Pretrained models: the hash in the name is checked for a download and for a file that is already there."""

import hashlib

import pytest
import torch
from compressai.models import JointAutoregressiveHierarchicalPriors
from compressai.zoo import image as zoo_image

from licq.models.checkpoints import load_model
from licq.models.pretrained import cache_dir, expected_hash, pretrained_checkpoint, pretrained_url
from licq.models.registry import get_architecture, list_models
from licq.support.errors import InputError


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A folder that stands for CompressAI's server, with a small model of quality 1; the cache is empty."""
    folder = tmp_path / "server"
    folder.mkdir()
    torch.save(JointAutoregressiveHierarchicalPriors(8, 12).state_dict(), folder / "model")
    digest = hashlib.sha256((folder / "model").read_bytes()).hexdigest()
    name = f"mbt2018-1-{digest[:8]}.pth.tar"
    (folder / "model").rename(folder / name)
    monkeypatch.setitem(zoo_image.model_urls["mbt2018"], "mse", {1: f"file://{folder / name}"})
    monkeypatch.setenv("LICQ_CACHE", str(tmp_path / "cache"))
    return folder / name


def message(*arguments) -> str:
    with pytest.raises(InputError) as caught:
        pretrained_checkpoint(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_download_is_cached_and_loads(server):
    path = pretrained_checkpoint("minnen2018", 1)
    assert path == cache_dir() / server.name
    server.unlink()
    assert pretrained_checkpoint("minnen2018", 1) == path
    assert load_model("minnen2018", 1, pretrained=True).M == 12


def test_download_with_a_wrong_hash_is_refused_and_leaves_nothing(server):
    server.write_bytes(server.read_bytes() + b" ")
    assert "SHA-256" in message("minnen2018", 1)
    assert list(cache_dir().iterdir()) == []


def test_cached_file_with_a_wrong_hash_is_refused(server):
    path = pretrained_checkpoint("minnen2018", 1)
    path.write_bytes(path.read_bytes()[:-10])
    text = message("minnen2018", 1)
    assert str(path) in text and "delete it" in text


def test_without_network_the_message_says_where_to_put_the_file(server):
    server.unlink()
    assert f"put the file at {cache_dir() / server.name}" in message("minnen2018", 1)
    assert list(cache_dir().iterdir()) == []


def test_models_that_are_not_published():
    assert "only balle2018" in message("lu2022", 1)
    assert "from 1, 2, 3, 4, 5, 6" in message("cheng2020", 8)
    assert "'ms-ssim'; choose from mse" in message("balle2018-vbr", 1, "ms-ssim")
    assert "vmaf" in message("cheng2020", 1, "vmaf")


def test_every_address_states_a_hash():
    for name in list_models():
        architecture = get_architecture(name)
        for metric in ("mse",) if architecture.variable else ("mse", "ms-ssim"):
            for quality in architecture.official if architecture.zoo else ():
                assert len(expected_hash(pretrained_url(name, quality, metric).rpartition("/")[2])) == 8


def test_cache_is_pytorch_hubs_own_by_default(monkeypatch):
    monkeypatch.delenv("LICQ_CACHE", raising=False)
    assert str(cache_dir()) == f"{torch.hub.get_dir()}/checkpoints"
