"""What `quantize` takes as images: a folder, files, a data set or a tensor, with equal results to the bit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import licq
from licq.data.calibration import draw_levels, sample_crops
from licq.data.datasets import images_in, open_dataset
from licq.models.registry import get_architecture
from licq.quant.model import QuantModel
from licq.reconstruction.api import quantize
from licq.reconstruction.config import PtqConfig
from licq.reconstruction.crops import calibration_crops
from licq.support.errors import InputError
from tests.tiny_codecs import images, tiny_codec

FEW = {"joint_iters": 1, "measured": 2, "observed": 2, "balance": 0.0, "stress": False}


def assert_equal(one: QuantModel, other: QuantModel) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert one.history["j_end"] == other.history["j_end"]


@pytest.fixture
def folder(make_image, tmp_path) -> Path:
    for seed in range(3):
        make_image(f"image{seed}.png", 160 + 32 * seed, 144, seed, tmp_path / "photos")
    return tmp_path / "photos"


def test_a_folder_its_files_and_its_crops_are_quantized_alike(folder):
    model, config = tiny_codec("balle2018"), PtqConfig.from_preset(seed=3, **FEW)
    drawn = {"num_images": 2, "crop": 64, "crops_per_image": 2, "crop_reductions": (1, 2)}
    crops = sample_crops(images_in(folder), 2, 64, 3, crops_per_image=2, reductions=(1, 2))
    expected = quantize(model, crops, config, lmbda=0.01, progress=False)
    for source in (folder, str(folder), list(images_in(folder)), [str(path) for path in images_in(folder)]):
        assert_equal(expected, quantize(model, source, config, lmbda=0.01, progress=False, **drawn))
    assert_equal(expected, licq.quantize(model, folder, config, lmbda=0.01, progress=False, **drawn))


FORMS = {
    "float64": lambda x: x.double(),
    "with gradients": lambda x: x.clone().requires_grad_(),
    "uint8": lambda x: bytes_of(x),
    "list": list,
    "generator": iter,
    "batches": lambda x: list(x.split(1)),
    "list of uint8": lambda x: tuple(bytes_of(x)),
    "numpy": lambda x: x.numpy(),
    "numpy, other order of bytes": lambda x: x.numpy().astype(">f4"),
    "numpy, flipped twice": lambda x: x.numpy()[:, :, ::-1].copy()[:, :, ::-1],
    "numpy, channels last": lambda x: bytes_of(x).permute(0, 2, 3, 1).numpy(),
    "list of numpy": lambda x: list(bytes_of(x).permute(0, 2, 3, 1).numpy()),
    "Pillow": lambda x: [Image.fromarray(image) for image in bytes_of(x).permute(0, 2, 3, 1).numpy()],
}


def bytes_of(x: torch.Tensor) -> torch.Tensor:
    return (x * 255).round().to(torch.uint8)


@pytest.mark.parametrize("form", FORMS)
def test_images_in_memory_have_many_forms(form):
    crops = images(2)
    given = calibration_crops(tiny_codec("balle2018"), FORMS[form](crops), "mse", 0, 10, 256, 8, (1, 2))
    assert given.dtype == torch.float32 and not given.requires_grad and torch.equal(given, crops)


def test_a_data_set_and_an_array_of_names_are_files(folder):
    model = tiny_codec("balle2018")
    expected = calibration_crops(model, folder, "mse", 0, 2, 64, 1, (1,))
    names = [str(path) for path in images_in(folder)]
    for source in (open_dataset(folder), np.array(names), iter(names)):
        assert torch.equal(calibration_crops(model, source, "mse", 0, 2, 64, 1, (1,)), expected)


class Halving(nn.Module):
    """A codec of no registry that returns images whose sides are multiples of 4."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 4, 4), nn.ConvTranspose2d(4, 3, 4, 4)

    def forward(self, x):
        y = torch.round(self.down(x))
        return {"x_hat": self.up(y), "likelihoods": {"y": torch.full_like(y, 0.5)}}


def test_a_size_that_a_foreign_codec_does_not_return_is_refused():
    with pytest.raises(
        InputError, match=r"50x50 pixels into x_hat of shape \(1, 3, 48, 48\); give images whose"
    ):
        quantize(Halving(), torch.rand(1, 3, 50, 50), lmbda=0.01)
    assert calibration_crops(Halving(), torch.rand(1, 3, 52, 48), "mse", 0, 1, 1, 1, (1,)).shape[2] == 52


def test_the_probe_of_the_size_draws_no_random_number_and_leaves_the_codec_alone():
    class Drawing(Halving):
        def forward(self, x):
            torch.rand(1)
            return super().forward(x)

    model = Drawing().train()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    calibration_crops(model, images(1), "mse", 0, 1, 1, 1, (1,))
    assert torch.equal(torch.rand(1), expected) and model.training


def test_a_data_set_is_named_and_its_crops_are_the_command_lines_by_default(monkeypatch):
    """main_ptq.py: 10 images, 8 crops of 256 pixels from each, as they are and half the size, seed 0."""
    seen = []
    monkeypatch.setattr(
        "licq.reconstruction.api.run_steps",
        lambda calibration, steps: seen.append(calibration.crops) or 1 / 0,
    )
    with pytest.raises(ZeroDivisionError):
        quantize(tiny_codec("balle2018"), "photos-calib", lmbda=0.01)
    paths = open_dataset("photos-calib").paths
    assert torch.equal(seen[0], sample_crops(paths, 10, 256, 0, crops_per_image=8, reductions=(1, 2)))


def test_drawn_crops_of_a_variable_rate_codec_are_of_all_its_rates(folder):
    model = tiny_codec("qvrf-balle2018")
    crops = calibration_crops(model, folder, "mse", 5, 3, 64, 3, (1,))
    levels = draw_levels(9, range(1, model.levels + 1), 5)
    assert set(levels) == set(range(1, model.levels + 1))
    lambdas = [get_architecture("qvrf-balle2018").lambda_for(level) for level in levels]
    assert crops.shape == (9, 5, 64, 64) and not crops.requires_grad
    assert crops[:, 3, 0, 0].tolist() == pytest.approx([model.gain(level) for level in levels])
    assert crops[:, 4, 0, 0].tolist() == pytest.approx(lambdas)
    assert torch.equal(crops[:, :3], sample_crops(images_in(folder), 3, 64, 5, crops_per_image=3))
    config = PtqConfig.from_preset(**FEW)
    codec = quantize(
        model, folder, config, lmbda=0.01, progress=False, num_images=2, crop=64, crops_per_image=1
    )
    assert codec.frozen


def test_a_variable_rate_codec_of_unknown_lambdas_asks_for_planes(folder):
    model = tiny_codec("qvrf-balle2018")
    del model.licq_architecture
    with pytest.raises(InputError, match="lambdas .* are not known.*`images`.*with_planes"):
        quantize(model, folder, lmbda=0.01, crop=64)
    with pytest.raises(InputError, match=r"\(n, 5, H, W\) is needed, with .*with_planes"):
        quantize(model, images(2), lmbda=0.01)
    with pytest.raises(InputError, match="ms-ssim"):  # its lambdas are for the squared error
        quantize(tiny_codec("qvrf-balle2018"), folder, lmbda=0.01, metric="ms-ssim", crop=192)


def ramp(low: float, high: float) -> torch.Tensor:
    return torch.linspace(low, high, 3 * 64 * 64).reshape(1, 3, 64, 64)


@pytest.mark.parametrize(
    "source, changes, words",
    [
        ("nowhere", {}, "no data set or folder nowhere"),
        (["nowhere.png"], {"crop": 64}, "nowhere.png"),
        ([], {}, "`images` holds no files"),
        (None, {}, "`images` holds an object of type NoneType"),
        ([None], {}, "`images` holds an object of type NoneType"),
        (["a.png", torch.zeros(3, 64, 64)], {}, "`images` holds files and tensors"),
        ([torch.zeros(3, 64, 64), torch.zeros(3, 64, 128)], {}, "different sizes.*64x64, 128x64"),
        ([torch.zeros(3, 64, 64), torch.zeros(1, 64, 64)], {}, r"shape \(1, 64, 64\)"),
        ("photos-calib", {"crop": 100}, "`crop` 100 is no multiple of 64.*choose 64"),
        ("photos-calib", {"crop": 0}, "choose 1 or more"),
        ("photos-calib", {"num_images": 0}, "choose 1 or more"),
        (
            "photos-calib",
            {"crop": 128, "metric": "ms-ssim"},
            "`crop` 128 is too small for MS-SSIM; choose 192",
        ),
        (torch.zeros(3, 64, 64), {}, r"shape \(3, 64, 64\); \(n, 3, H, W\) is needed"),
        (torch.zeros(0, 3, 64, 64), {}, "shape"),
        (
            torch.full((1, 3, 64, 64), 255.0),
            {},
            "float32 that reach from 255 to 255; give float samples in 0..1",
        ),
        (torch.full((1, 3, 64, 64), 40.0), {}, "from 40 to 40; .*0..1: images / 255"),  # dark
        (
            torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64),
            {},
            r"from -1 to 1; .*\(images \+ 1\) / 2",
        ),
        (ramp(-0.02, 1.03), {}, r"0..1: images.clip\(0, 1\)"),
        (4 * images(1) - 2, {}, "without a normalization by mean and deviation"),
        (300 * images(1) + 1, {}, "0..1, divided by the largest value"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.int64), {}, "type int64; give float samples"),
        (np.zeros((1, 64, 64, 3), np.uint16), {}, "type uint16; give float samples"),
        (np.zeros((1, 64, 64, 3), np.complex64), {}, "type complex64; give float samples"),
        (np.zeros((64, 64), np.uint8), {}, r"shape \(64, 64\); \(n, 3, H, W\) is needed"),
        (torch.full((1, 3, 64, 64), torch.nan), {}, "not finite"),
        (torch.full((1, 3, 64, 64), torch.inf), {}, "not finite"),
        (
            torch.zeros(1, 3, 50, 50),
            {},
            r"turns .*50x50 pixels into x_hat of shape \(1, 3, 64, 64\).*multiples of 64",
        ),
        ([Image.new("RGBA", (64, 64))], {}, "calibration images: is RGB with alpha"),
        (torch.zeros(1, 3, 64, 64), {"metric": "ms-ssim"}, "64x64 pixels are too small for MS-SSIM"),
        (torch.zeros(1, 3, 64, 64), {"metric": "psnr"}, "`metric` psnr is unknown"),
        (torch.zeros(1, 3, 64, 64), {"lmbda": 0}, "`lmbda` 0 is not positive"),
    ],
)
def test_images_that_cannot_be_taken_are_one_line(source, changes, words):
    with pytest.raises(InputError, match=words) as refusal:
        quantize(tiny_codec("balle2018"), source, **({"lmbda": 0.01} | changes))
    assert "\n" not in str(refusal.value)
