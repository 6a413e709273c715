"""The training of reference checkpoints: what it writes, and that a killed run resumed is the run that was
not."""

import argparse

import pytest
import torch

import licq.models.train_reference as training
from licq.models.checkpoints import load_checkpoint, read_checkpoint, save_checkpoint
from licq.models.registry import LAMBDAS, create_model


@pytest.fixture
def photos(tmp_path, make_image):
    for seed in range(3):
        make_image(f"{seed}.png", 80, 72, seed, tmp_path / "photos")
    return tmp_path / "photos"


def train(folder, photos, name, steps, **more):
    flags = {
        "arch": name,
        "data": photos,
        "steps": steps,
        "batch": 2,
        "crop": 64,
        "device": "cpu",
        "warmup": 2,
        "save_every": 1,
        "state": folder / "state",
        "out": folder / "out",
        "threads": 1,
        **more,
    }
    words = ([f"--{key}", *([] if value is None else [str(value)])] for key, value in flags.items())
    training.main(sum(words, []))


@pytest.mark.parametrize("name", ["balle2018", "qvrf-balle2018", "balle2018-vbr"])
def test_stopped_and_resumed_gives_the_same_checkpoint(name, photos, tmp_path, monkeypatch):
    train(tmp_path / "whole", photos, name, 4, quality=3)
    original = training.learning_rate

    def stop_at_the_third(step, *more):
        if step == 2:
            raise KeyboardInterrupt
        return original(step, *more)

    monkeypatch.setattr(training, "learning_rate", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", photos, name, 4, quality=3)
    monkeypatch.setattr(training, "learning_rate", original)
    train(tmp_path / "parts", photos, name, 4, quality=3)
    variable = name != "balle2018"
    file = f"{name}.safetensors" if variable else f"{name}-q3.safetensors"
    whole, parts = (read_checkpoint(tmp_path / folder / "out" / file) for folder in ("whole", "parts"))
    assert all(torch.equal(tensor, parts.state_dict[key]) for key, tensor in whole.state_dict.items())
    stated = whole.metadata
    assert stated["steps"] == 4 and stated["photos"] == 3
    if variable:
        assert stated["lambdas"] == pytest.approx(list(LAMBDAS["mse"].values())) and "quality" not in stated
    else:
        assert (stated["quality"], stated["lambda"]) == (3, 0.0067)
    model = load_checkpoint(tmp_path / "whole" / "out" / file, name, 3)
    assert model.entropy_bottleneck._quantized_cdf.numel()


def test_crops_drawn_ahead_are_those_of_their_steps(photos):
    pictures = training.read_photos(photos, 64)
    args = argparse.Namespace(batch=2, crop=64, seed=5, steps=5, device="cpu")
    drawn = list(training.drawn_ahead(pictures, args, 2))
    expected = [training.draw_batch(pictures, 2, 64, 5, step) for step in (2, 3, 4)]
    assert len(drawn) == 3 and all(map(torch.equal, drawn, expected))


def test_bfloat16_and_channels_last_learn_the_same_but_for_rounding(photos, tmp_path):
    train(tmp_path / "plain", photos, "minnen2018-mean", 3, quality=3)
    train(tmp_path / "fast", photos, "minnen2018-mean", 3, quality=3, bf16=None, channels_last=None)
    plain, fast = (
        read_checkpoint(tmp_path / folder / "out" / "minnen2018-mean-q3.safetensors").state_dict
        for folder in ("plain", "fast")
    )
    one, other = (
        torch.cat([t[key].flatten().float() for key in plain if key.endswith("weight")])
        for t in (plain, fast)
    )
    assert not torch.equal(one, other) and float((one - other).norm() / one.norm()) < 0.05


def test_starts_from_a_wider_codec_and_from_one_that_shares_layers(photos, tmp_path, capsys):
    wide = tmp_path / "wide.safetensors"
    save_checkpoint(
        create_model("balle2018", N=60, M=84), wide, {"arch": "balle2018", "kwargs": {"N": 60, "M": 84}}
    )
    train(tmp_path, photos, "balle2018", 1, quality=3, init=wide)
    train(tmp_path, photos, "qvrf-balle2018", 1, init=tmp_path / "out" / "balle2018-q3.safetensors")
    assert "trained from the start: Gain" in capsys.readouterr().out
    assert (
        read_checkpoint(tmp_path / "out" / "qvrf-balle2018.safetensors").metadata["init"]
        == "balle2018-q3.safetensors"
    )


def test_layers_in_between_are_left_out(photos, tmp_path, capsys):
    """Cheng2020 without attention starts from the one with it: every layer of its transforms is one of the
    other's."""
    source = create_model("cheng2020", N=36)
    save_checkpoint(source, tmp_path / "with.safetensors", {"arch": "cheng2020", "kwargs": {"N": 36}})
    train(tmp_path, photos, "cheng2020-anchor", 1, quality=3, init=tmp_path / "with.safetensors", lr=1e-9)
    assert "trained from the start" not in capsys.readouterr().out
    tensors = read_checkpoint(tmp_path / "out" / "cheng2020-anchor-q3.safetensors").state_dict
    for layer, other in (
        ("g_a.3.conv1", "g_a.4.conv1"),
        ("g_s.0.conv2", "g_s.1.conv2"),
        ("g_s.7.0", "g_s.9.0"),
        ("h_a.0", "h_a.0"),
    ):
        assert torch.allclose(
            tensors[f"{layer}.weight"].float(), source.state_dict()[f"{other}.weight"], rtol=2e-3, atol=1e-4
        )
