"""A codec on a set of images: rate and distortion of each, and their means."""

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from licq.codec.api import Codec
from licq.data.datasets import Dataset, open_dataset
from licq.data.images import load_image
from licq.data.padding import crop_back, pad_to_multiple
from licq.evaluation.metrics import bpp_from_likelihoods, ms_ssim, mse, psnr_from_mse, to_pixels
from licq.support.errors import InputError
from licq.support.progress import progress as progress_bar


@dataclass(frozen=True)
class ImageResult:
    """One image. bpp in bits per pixel, psnr in dB, mse on 0..255, ms_ssim in 0..1 or None where it does not
    fit."""

    name: str
    width: int
    height: int
    bpp: float
    bpp_estimated: float
    mse: float
    psnr: float
    ms_ssim: float | None

    def cost(self, lmbda: float, metric: str = "mse") -> float:
        """The codec's objective J = R + lambda * D of this image, R in bpp; D is the MSE on 0..255, or 1 -
        MS-SSIM.

        CompressAI writes the first as lambda * 255^2 * mse with mse on 0..1: the same number.
        """
        if metric == "mse":
            return self.bpp + lmbda * self.mse
        if metric != "ms-ssim":
            raise InputError(f"--metric {metric} is unknown; choose mse or ms-ssim")
        if self.ms_ssim is None:
            raise InputError(f"{self.name} is too small for MS-SSIM; leave it out or use --metric mse")
        return self.bpp + lmbda * (1.0 - self.ms_ssim)


@dataclass(frozen=True)
class Report:
    """What `evaluate` found. `bpp_source` is "estimate" (likelihoods) or "bitstream" (bytes written and
    decoded)."""

    name: str
    per_image: tuple[ImageResult, ...]
    bpp_source: str
    seconds: float

    def mean(self) -> dict[str, float | None]:
        """Means over the images of bpp, bpp_estimated, psnr (of the per-image dB) and ms_ssim.

        ms_ssim is the mean over the images large enough for it, None when there are none.
        """
        similar = [image.ms_ssim for image in self.per_image if image.ms_ssim is not None]
        means = {
            key: sum(getattr(image, key) for image in self.per_image) / len(self.per_image)
            for key in ("bpp", "bpp_estimated", "psnr")
        }
        return means | {"ms_ssim": sum(similar) / len(similar) if similar else None}

    def cost(self, lmbda: float, metric: str = "mse") -> float:
        """Mean over the images of J = R + lambda * D; see `ImageResult.cost`."""
        return sum(image.cost(lmbda, metric) for image in self.per_image) / len(self.per_image)

    def images_as_dicts(self) -> list[dict]:
        """The images as plain dictionaries, for report.json."""
        return [asdict(image) for image in self.per_image]

    def to_dict(self) -> dict:
        """The whole report as a plain dictionary; `from_dict` is the way back, also through JSON."""
        return {
            "name": self.name,
            "bpp_source": self.bpp_source,
            "seconds": self.seconds,
            "images": self.images_as_dicts(),
        }

    @classmethod
    def from_dict(cls, stored: dict) -> "Report":
        """The report that `to_dict` was of. A PSNR that JSON could not hold (null) was infinite."""
        images = tuple(
            ImageResult(**{**image, "psnr": math.inf if image["psnr"] is None else image["psnr"]})
            for image in stored["images"]
        )
        return cls(stored["name"], images, stored["bpp_source"], stored["seconds"])

    @classmethod
    def joined(cls, reports: Sequence["Report"]) -> "Report":
        """One codec's reports on parts of a data set, in their order, as one."""
        images = tuple(image for report in reports for image in report.per_image)
        return cls(reports[0].name, images, reports[0].bpp_source, sum(report.seconds for report in reports))


def delta_j_percent(reference: Report, other: Report, lmbda: float, metric: str = "mse") -> float:
    """How much larger J is for `other` than for `reference`, in percent of the reference's."""
    before = reference.cost(lmbda, metric)
    return 100.0 * (other.cost(lmbda, metric) - before) / before


def evaluate(
    model: nn.Module,
    images: Dataset | str | Path | Sequence[Path | str] | Sequence[Tensor],
    *,
    name: str | None = None,
    pad: int = 64,
    device: torch.device | str | None = None,
    codec: Codec | None = None,
    progress: bool = True,
) -> Report:
    """Run `model` on each image by itself and measure it; bpp is the likelihood estimate, or with `codec`
    that of files.

    Args:
        model: anything whose call on (1, 3, H, W) in 0..1 returns {"x_hat": the same shape, "likelihoods":
        {...}}.
            It is put in evaluation mode for the duration.
        images: a data set, its name, a folder, image files, or tensors (3, H, W) or (1, 3, H, W) in 0..1.
        name: the report's; default the data set's, else "images".
        pad: images are padded with zeros to multiples of this (see `pad_to_multiple`); rate counts per true
        pixel.
        device: where to run; default where the model's parameters are. The model is moved there.
        codec: of the quantized `model`: encodes every image, decodes it, and must give the model's pixels.

    Raises:
        InputError: no images, an unreadable image, a NaN or Inf in the model's output, or a file that decodes
        to other pixels, with
            the image's name.
    """
    if isinstance(images, (str, Path)):
        images = open_dataset(images)
    items = list(images.paths if isinstance(images, Dataset) else images)
    if not items:
        raise InputError("no images to evaluate on; give a folder of images or a data set with --eval")
    if name is None:
        name = images.name if isinstance(images, Dataset) else "images"
    if device is None:
        parameter = next(model.parameters(), None)
        device = parameter.device if parameter is not None else torch.device("cpu")
    else:
        model.to(device)
    if codec is not None:
        codec.settle_rate()
    started = time.monotonic()
    with _evaluating(model):
        results = [
            _evaluate_one(model, item, index, pad, device, codec)
            for index, item in enumerate(
                progress_bar(items, desc=f"evaluating on {name}", unit="image", enabled=progress, leave=False)
            )
        ]
    return Report(name, tuple(results), "bitstream" if codec else "estimate", time.monotonic() - started)


def decoded_pixels(model: nn.Module, path: Path, pad: int, device: torch.device) -> Tensor:
    """What `model` makes of an image file: 8-bit pixels, float32 (3, H, W) in 0..255 on the CPU, as
    `evaluate` measures them.

    Raises:
        InputError: as `evaluate`.
    """
    with _evaluating(model.to(device)):
        return to_pixels(_decode(model, load_image(path)[None].to(device), path.name, pad)[0])[0].cpu()


@contextlib.contextmanager
def _evaluating(model: nn.Module):
    """The model is in evaluation mode for the duration, and no gradients are kept."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _decode(model: nn.Module, x: Tensor, label: str, pad: int) -> tuple[Tensor, float]:
    """x_hat (1, 3, H, W) of x (1, 3, H, W), and the estimated bpp; refused where they are no numbers."""
    padded, unpad = pad_to_multiple(x, pad)
    output = model(padded)
    x_hat, likelihoods = output["x_hat"], output["likelihoods"]
    if x_hat.shape != padded.shape:
        raise InputError(
            f"{label}: the model turned {tuple(padded.shape)} into {tuple(x_hat.shape)}; "
            f"evaluate with pad at least its total stride (now {pad})"
        )
    if not torch.isfinite(x_hat).all():
        raise InputError(
            f"{label}: the model's x_hat holds NaN or Inf; the checkpoint is damaged or the calibration "
            "diverged"
        )
    rate = bpp_from_likelihoods(likelihoods, x.shape[-2] * x.shape[-1])
    if not 0 <= rate < float("inf"):
        raise InputError(
            f"{label}: the model's likelihoods give {rate} bpp; the checkpoint is damaged or the "
            "calibration diverged"
        )
    return crop_back(x_hat, unpad), rate


def _evaluate_one(
    model: nn.Module, item: Path | str | Tensor, index: int, pad: int, device, codec: Codec | None
) -> ImageResult:
    label = f"image {index}" if isinstance(item, Tensor) else Path(item).name
    x = (item if isinstance(item, Tensor) else load_image(item)).to(device)
    x = x.reshape(1, *x.shape[-3:])
    height, width = x.shape[-2:]
    x_hat, rate = _decode(model, x, label, pad)
    real = rate
    if codec is not None:
        pixels, decoded = ((image[0] * 255).round().to("cpu", torch.uint8) for image in (x, x_hat))
        data = codec.encode(pixels)
        if not torch.equal(codec.decode(data), decoded):
            raise InputError(
                f"{label}: its file does not decode to the pixels of the quantized network; this is a defect, please report it"
            )
        real = 8 * len(data) / (height * width)
    error = mse(x, x_hat)
    return ImageResult(label, width, height, real, rate, error, psnr_from_mse(error), ms_ssim(x, x_hat))
