"""QVRF against the public code (bytedance/QRAF): names, shapes, and outputs on weights made by a formula.

The golden numbers were printed by the public code (forward with noise=True, stage 3, in evaluation mode) on
the same weights, with gains 1.1 times the published ones; ours were equal to it, likelihoods to 6e-8.
"""

import math

import pytest
import torch

from licq.models.checkpoints import identify, load_checkpoint, save_checkpoint
from licq.models.qvrf import LEVEL_LAMBDAS, QVRFBalle2018, QVRFCheng2020, QVRFMinnen2018
from licq.models.registry import create_model, get_architecture
from licq.models.train_reference import rate_distortion, spread_levels
from licq.support.errors import InputError
from tests.formula import as_published, fill_by_formula, image_by_formula

PUBLISHED = [1.0000, 1.3944, 1.9293, 2.6874, 3.7268, 5.1801, 7.1957, 10.0000]


def filled(model, factor: float = 1.1):
    gains = model.Gain.detach().clone()
    fill_by_formula(model).Gain.data = gains * factor
    return model


GOLDEN = {
    QVRFBalle2018: (
        {"N": 6, "M": 8},
        {
            1: (-2089.72778, -9.7977753, [-0.468641, -0.436042, -0.140436, -0.127997, 0.5171]),
            4: (-3595.16309, -9.7977753, [-0.468293, -0.434982, -0.139614, -0.127642, 0.517788]),
            8: (-4836.06104, -9.7977753, [-0.4687, -0.434884, -0.139775, -0.127486, 0.517941]),
        },
    ),
    QVRFCheng2020: (
        {"N": 8},
        {
            1: (-3297.10571, -70.464806, [0.152532, 0.431262, 0.049076, 0.382693, -0.187868]),
            4: (-4821.31152, -70.464806, [0.154511, 0.430985, 0.048597, 0.384484, -0.184558]),
            8: (-5660.77881, -70.464806, [0.154655, 0.431228, 0.047656, 0.385345, -0.183761]),
        },
    ),
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_outputs_equal_the_public_code(kind):
    sizes, expected = GOLDEN[kind]
    model = filled(kind(**sizes))
    if kind is QVRFCheng2020:
        as_published(model)
    x = image_by_formula(64, 128)
    for level, (y_bits, z_bits, x_hat) in expected.items():
        model.set_level(level)
        with torch.no_grad():
            out = model(x)
        torch.testing.assert_close(out["x_hat"].flatten()[::4999], torch.tensor(x_hat), rtol=1e-4, atol=1e-4)
        assert float(out["likelihoods"]["y"].log2().sum()) == pytest.approx(y_bits, rel=1e-4)
        assert float(out["likelihoods"]["z"].log2().sum()) == pytest.approx(z_bits, rel=1e-4)


@pytest.mark.parametrize("name", ["qvrf-balle2018", "qvrf-minnen2018", "qvrf-cheng2020"])
def test_gains_are_the_published_and_gain_one_is_the_plain_codec(name):
    sizes = {"N": 6} if name == "qvrf-cheng2020" else {"N": 6, "M": 8}
    model = create_model(name, **sizes)
    assert model.Gain.tolist() == pytest.approx(PUBLISHED, abs=1e-4)
    plain = create_model(name.removeprefix("qvrf-"), **sizes)
    assert {*model.state_dict()} == {*plain.state_dict(), "Gain"}
    filled(model, 1.0)
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if key != "Gain"})
    x = image_by_formula(64, 64)
    model.set_level(1)
    with torch.no_grad():
        ours, theirs = model(x), plain.eval()(x)
    assert torch.equal(ours["x_hat"], theirs["x_hat"])
    assert all(torch.equal(ours["likelihoods"][key], theirs["likelihoods"][key]) for key in "yz")


def test_levels_between_two_are_a_line_of_logarithms_and_back():
    model = QVRFMinnen2018(4, 4)
    assert model.gain(3) == pytest.approx(PUBLISHED[2], abs=1e-4)
    assert model.gain(3.5) == pytest.approx(math.sqrt(model.gain(3) * model.gain(4)))
    for factor in (0.7, 1.0, 2.5, 9.9, 12.0):  # outside the list the outer lines go on
        assert model.gain(model.level_of(factor)) == pytest.approx(factor)
    model.set_factor(2.5)
    assert model.rate.shape == (1, 1, 1, 1) and model.rate.item() == 2.5


def test_images_bring_their_own_gains():
    model = filled(QVRFBalle2018(6, 8))
    x = torch.cat([image_by_formula(64, 64), image_by_formula(64, 64).flip(-1)])
    levels = torch.tensor([7, 2])
    together = model(model.with_planes(x, levels, torch.tensor([0.0932, 0.0035])))
    for index, level in enumerate(levels.tolist()):
        model.set_level(level)
        alone = model(x[index : index + 1])
        torch.testing.assert_close(together["x_hat"][index : index + 1], alone["x_hat"], rtol=1e-5, atol=1e-6)
    model.train()(model.with_planes(x, levels, torch.tensor([0.0932, 0.0035])))["x_hat"].sum().backward()
    # y_hat is y * a over a constant: the gain has a gradient, of the levels in the batch
    assert [bool(value) for value in model.Gain.grad != 0] == [level in (2, 7) for level in range(1, 9)]


def test_training_weighs_each_image_with_its_lambda():
    levels = spread_levels(8, 8, seed=0, step=5)
    assert sorted(levels.tolist()) == list(range(1, 9)) and torch.equal(levels, spread_levels(8, 8, 0, 5))
    assert set(spread_levels(8, 2, 0, 5).tolist()) <= set(range(1, 9))
    x = torch.rand(2, 3, 8, 8)
    out = {
        "x_hat": x + torch.tensor([0.1, 0.2]).reshape(2, 1, 1, 1),
        "likelihoods": {"y": torch.full((2, 4, 2, 2), 0.5)},
    }
    loss, bpp, mse = rate_distortion(out, x, torch.tensor([0.01, 0.02]))
    squares = [255**2 * 0.01, 255**2 * 0.04]
    assert float(bpp) == pytest.approx(16 / 64) and float(mse) == pytest.approx(sum(squares) / 2)
    assert float(loss) == pytest.approx(16 / 64 + (0.01 * squares[0] + 0.02 * squares[1]) / 2)


def test_files_keep_their_number_of_rates(tmp_path):
    model = filled(QVRFMinnen2018(6, 8, levels=11))
    path = tmp_path / "model.pth.tar"
    torch.save(
        {"state_dict": {f"module.{name}": tensor for name, tensor in model.state_dict().items()}}, path
    )
    loaded = load_checkpoint(path, quality=11)
    assert identify(model.state_dict()) == "qvrf-minnen2018" and loaded.levels == 11
    assert loaded.rate.item() == pytest.approx(loaded.Gain[10].item())
    assert get_architecture("qvrf-minnen2018").lambda_for(11) == LEVEL_LAMBDAS[10] == 1.44
    save_checkpoint(QVRFMinnen2018(6, 8), tmp_path / "eight.safetensors", {"arch": "qvrf-minnen2018"})
    with pytest.raises(InputError, match="has 8 rates; choose `quality` from 1 to 8"):
        load_checkpoint(tmp_path / "eight.safetensors", quality=9)
