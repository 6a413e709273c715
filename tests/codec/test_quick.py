"""Plans from the cache: the same files and pixels, without the network and without torch."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from licq.codec import plan_cache
from licq.codec.api import Codec
from licq.codec.quick import QuickCodec
from licq.codec.ready_plan import plain_plan, read_plan
from licq.integer.library import library
from licq.integer.tiles import Tiled
from licq.support.errors import InputError
from tests.codec.test_files import pixels
from tests.frozen_codecs import frozen
from tests.tiny_codecs import SIZES

pytestmark = pytest.mark.skipif(library() is None, reason="no compiled kernels")
QUICK = ("balle2018", "minnen2018", "qvrf-minnen2018")
COMPUTED_BY_THE_REFERENCE = ("chen2021",)  # parts of it: there are no kernels for them, so no plan in a file


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LICQ_CACHE", os.fspath(tmp_path / "cache"))
    return tmp_path / "cache" / "plans"


class NoNetwork(QuickCodec):
    """A codec that fails where it would need its network."""

    @property
    def codec(self):
        raise AssertionError("the network is needed")


def model_file(folder, name: str):
    frozen(name).save(folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SIZES]
)
def test_plans_from_the_cache_give_the_same_files_and_pixels(name, tmp_path):
    model, image = model_file(tmp_path, name), pixels(70, 150)
    codec = Codec.load(model, 1)
    level = 3.5 if codec.variable else None
    data = codec.encode(image, level)
    decoded = codec.decode(data).numpy()
    first = QuickCodec(model, 1)
    assert first.encode(image.numpy(), level) == data
    np.testing.assert_array_equal(first.decode(data), decoded)
    for _ in range(2):
        again = (QuickCodec if name in COMPUTED_BY_THE_REFERENCE else NoNetwork)(model, 1)
        assert again.encode(image.numpy(), level) == data
        np.testing.assert_array_equal(again.decode(data), decoded)
        np.testing.assert_array_equal(again.decode(data), decoded)  # in memory that was used before


@pytest.mark.parametrize("name", ["minnen2018", pytest.param("tic", marks=pytest.mark.slow)])
def test_tiles_from_the_cache(name, tmp_path):
    model, image = model_file(tmp_path, name), pixels(470, 520)
    data = QuickCodec(model, 1, 64).encode(image.numpy())
    decoded = QuickCodec(model, 1, 64).decode(data)
    again = NoNetwork(model, 1, 64)
    assert again.encode(image.numpy()) == data == Codec.load(model, 1, tile=None).encode(image)
    np.testing.assert_array_equal(again.decode(data), decoded)
    (plan,) = again._plans.values()
    assert isinstance(plan.synthesis[0], Tiled)


def test_a_damaged_entry_is_made_again(tmp_path, cache):
    model, image = model_file(tmp_path, "balle2018"), pixels(64, 64).numpy()
    data = QuickCodec(model, 1).encode(image)
    whole = {path: path.read_bytes() for path in cache.iterdir()}
    assert len(whole) == 3  # what is known of the model, and the plans of both directions
    for path, content in whole.items():
        for damaged in (b"", content[:50], content[:-1], content[:100] + b"\1" + content[101:]):
            path.write_bytes(damaged)
            assert QuickCodec(model, 1).encode(image) == data
            np.testing.assert_array_equal(QuickCodec(model, 1).decode(data).shape, (3, 64, 64))
        assert path.read_bytes() == content


def test_an_entry_is_of_one_model_size_and_version(tmp_path, cache, monkeypatch):
    model = model_file(tmp_path, "balle2018")
    QuickCodec(model, 1).encode(pixels(64, 64).numpy())
    count = len([*cache.iterdir()])
    QuickCodec(model, 1).encode(pixels(60, 50).numpy())  # the same size with its padding
    assert len([*cache.iterdir()]) == count
    QuickCodec(model, 1).encode(pixels(64, 128).numpy())
    assert len([*cache.iterdir()]) == count + 2
    monkeypatch.setattr(plan_cache, "_machine", lambda: "another version")
    with pytest.raises(AssertionError, match="network"):
        NoNetwork(model, 1).encode(pixels(64, 64).numpy())


def test_no_cache_where_none_is_wanted_or_possible(tmp_path, cache, monkeypatch):
    model, image = model_file(tmp_path, "balle2018"), pixels(64, 64).numpy()
    monkeypatch.setenv("LICQ_PLANS", "off")
    data = QuickCodec(model, 1).encode(image)
    assert not cache.exists()
    monkeypatch.delenv("LICQ_PLANS")
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text("a file in the place of the folder")
    assert QuickCodec(model, 1).encode(image) == data


def test_the_oldest_entries_make_room(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(plan_cache, "MAX_BYTES", 40_000)
    for number in range(8):
        plan_cache.write({"number": number}, [np.zeros(8000, dtype=np.uint8)], number)
        os.utime(max(cache.iterdir(), key=lambda path: path.stat().st_mtime), (number, number))
    assert sum(path.stat().st_size for path in cache.iterdir()) <= 40_000
    assert plan_cache.read(0) is None and plan_cache.read(7)[0] == {"number": 7}
    plan_cache.write({}, [np.zeros(30_000, dtype=np.uint8)], "too large")
    assert plan_cache.read("too large") is None


def test_files_of_other_models_are_refused(tmp_path):
    model, other = model_file(tmp_path, "balle2018"), model_file(tmp_path, "minnen2018")
    data = QuickCodec(model, 1).encode(pixels(64, 64).numpy())
    for _ in range(2):
        with pytest.raises(InputError, match="another model"):
            QuickCodec(other, 1).decode(data)
        with pytest.raises(InputError, match="one rate"):
            QuickCodec(model, 1).encode(pixels(64, 64).numpy(), 3)


def test_what_json_and_arrays_hold_is_the_whole_plan(tmp_path):
    """Through text and copies of the arrays, nothing else."""
    codec = Codec(frozen("minnen2018"), bytes(32), threads=1)
    image = pixels(64, 128)
    data = codec.encode(image)
    stream = codec._coder.encode(codec._plan(64, 128, 0), image[None].numpy())
    content, arrays = plain_plan(codec.ready_plan("decode", 64, 128, 0))
    plan = read_plan(json.loads(json.dumps(content)), [array.copy() for array in arrays])
    decoded = plan.coder.decode(plan, stream)
    assert torch.equal(torch.from_numpy(decoded[0]), codec.decode(data))


def test_a_warm_command_imports_neither_torch_nor_compressai(tmp_path):
    """The two take 5 s of processor time, and decoding takes a tenth of one."""
    from PIL import Image

    model = model_file(tmp_path, "minnen2018")
    Image.fromarray(pixels(64, 64).permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    program = (
        "import sys; from licq.command import main; status = main(sys.argv[1:]); "
        "assert not {'torch', 'compressai', 'scipy', 'torchvision'} & {*sys.modules}; sys.exit(status)"
    )
    QuickCodec(model, 1).encode(pixels(64, 64).numpy())
    for words in (
        ["encode", tmp_path / "a.png", "-o", tmp_path / "a.licq"],
        ["decode", tmp_path / "a.licq", "-o", tmp_path / "b.png"],
    ):
        command = [sys.executable, "-c", program, *map(str, words), "--model", str(model)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert not done.returncode, done.stderr
    info = [sys.executable, "-c", program, "info", str(tmp_path / "a.licq")]
    assert "64x64" in subprocess.run(info, capture_output=True, text=True, check=True).stdout
    expected = Codec.load(model, 1).decode((tmp_path / "a.licq").read_bytes())
    assert torch.equal(torch.from_numpy(np.array(Image.open(tmp_path / "b.png"))).permute(2, 0, 1), expected)
