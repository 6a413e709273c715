"""One codec on a set of images: rate and distortion of each image, and their means."""

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from licq.codec.api import Codec
from licq.codec.container import MODEL_BYTES
from licq.data.datasets import Dataset, open_dataset
from licq.data.images import load_image
from licq.data.padding import crop_back, pad_to_multiple
from licq.data.samples import samples_of
from licq.evaluation.metrics import bpp_from_likelihoods, ms_ssim, mse, psnr_from_mse, to_pixels
from licq.quant.clipping import counting
from licq.quant.model import QuantModel
from licq.quant.outputs import codec_output
from licq.support.determinism import plain_torch
from licq.support.errors import InputError
from licq.support.progress import progress as progress_bar

Picture = Path | str | Tensor | np.ndarray | Image
Images = Dataset | Picture | Sequence[Picture]


@dataclass(frozen=True)
class ImageResult:
    """One image.

    width, height: in pixels.
    bpp:           rate in bits per pixel; of a file where one was written, else the estimate.
    bpp_estimated: from the entropy model's likelihoods.
    mse:           mean squared error of 8-bit pixels, on 0..255.
    psnr:          in dB.
    ms_ssim:       in 0..1, None for images that are too small for it.
    """

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
            raise InputError(f"`metric` is {metric!r}; choose mse or ms-ssim")
        if self.ms_ssim is None:
            raise InputError(f"{self.name} is too small for MS-SSIM; leave it out, or give `metric` mse")
        return self.bpp + lmbda * (1.0 - self.ms_ssim)


@dataclass(frozen=True)
class Report:
    """What `evaluate` has measured.

    name:       of the data set.
    per_image:  one result an image, in the order of the images.
    bpp_source: "estimate" (likelihoods) or "bitstream" (bytes that were written and decoded).
    seconds:    that it took.
    clipped:    of each node of a quantized codec that clips, the share of its input values that it clips;
        None where that was not counted.
    """

    name: str
    per_image: tuple[ImageResult, ...]
    bpp_source: str
    seconds: float
    clipped: dict[str, float] | None = None

    def mean(self) -> dict[str, float | None]:
        """Means over the images: {"bpp", "bpp_estimated", "psnr" (of the images' dB), "ms_ssim"}.

        "ms_ssim" is the mean over the images that are large enough for it, None when there are none.
        """
        similar = [image.ms_ssim for image in self.per_image if image.ms_ssim is not None]
        means = {
            key: sum(getattr(image, key) for image in self.per_image) / len(self.per_image)
            for key in ("bpp", "bpp_estimated", "psnr")
        }
        return means | {"ms_ssim": sum(similar) / len(similar) if similar else None}

    def cost(self, lmbda: float, metric: str = "mse") -> float:
        """Mean over the images of the objective J = R + lambda * D, see `ImageResult.cost`."""
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
            **({} if self.clipped is None else {"clipped": self.clipped}),
        }

    @classmethod
    def from_dict(cls, stored: dict) -> "Report":
        """The report that `to_dict` was of. A PSNR that JSON could not hold (null) was infinite."""
        images = tuple(
            ImageResult(**{**image, "psnr": math.inf if image["psnr"] is None else image["psnr"]})
            for image in stored["images"]
        )
        return cls(stored["name"], images, stored["bpp_source"], stored["seconds"], stored.get("clipped"))

    @classmethod
    def joined(cls, reports: Sequence["Report"]) -> "Report":
        """One codec's reports on parts of a data set, in their order, as one."""
        images = tuple(image for report in reports for image in report.per_image)
        return cls(reports[0].name, images, reports[0].bpp_source, sum(report.seconds for report in reports))


def delta_j_percent(reference: Report, other: Report, lmbda: float, metric: str = "mse") -> float:
    """How much larger J is for `other` than for `reference`, in percent of the reference's."""
    before = reference.cost(lmbda, metric)
    return 100.0 * (other.cost(lmbda, metric) - before) / before


@plain_torch()
def evaluate(
    model: nn.Module,
    images: Images,
    *,
    name: str | None = None,
    pad: int = 64,
    device: torch.device | str | None = None,
    codec: Codec | None = None,
    real: bool | None = None,
    count_clipped: bool = False,
    progress: bool = True,
) -> Report:
    """Measure the rate and the distortion of a codec on each image by itself.

    The rate is that of real files where the codec has them: each image is encoded, decoded, and the decoded
    pixels are compared with those of the model. Otherwise it is the estimate from the likelihoods.
    `Report.bpp_source` says which.

    Args:
        model: a float codec or a `QuantModel`: its call on (1, 3, H, W) in 0..1 returns {"x_hat": of the same
            shape, "likelihoods": {name: tensor}}. It is in evaluation mode for the duration.
        images: the name of a data set ("kodak", "clic", "photos" ...), a folder, an image file, several image
            files, a `Dataset`, or images in memory: (n, 3, H, W), or a list of (3, H, W) or (1, 3, H, W), as
            tensors or numpy arrays in 0..1 or of uint8; also Pillow images.
        name: what the report calls the images; default the data set's name, else "images".
        pad: images are padded with zeros to multiples of this many pixels, see `pad_to_multiple`. The rate
            counts per pixel of the image without padding.
        device: where to run; default where the model's parameters are. The model is moved there.
        codec: what writes the files of `model`; default one made here.
        real: True asks for files, False for the estimate alone; default files of a frozen `QuantModel` whose
            forward has a bitstream, else the estimate.
        count_clipped: also count the values that the quantizers of a `QuantModel` clip, for `Report.clipped`.
        progress: show a bar with the time left.

    Returns:
        A `Report`; its `mean()` has the means of bpp, PSNR and MS-SSIM, its `per_image` each image's.

    Raises:
        InputError: no images, an image that cannot be read, `real` for a codec without files, NaN or Inf in
            the model's output, or a file that decodes to other pixels; the message names the image.

    Example:
        >>> report = licq.evaluate(qmodel, "kodak")
        >>> report.mean()["bpp"], report.bpp_source
    """
    pictures, found_name = _pictures(images)
    name = name or found_name
    if not pictures:
        raise InputError("no images to evaluate on; give a folder of images or a data set as `images`")
    if device is None:
        parameter = next(model.parameters(), None)
        device = parameter.device if parameter is not None else torch.device("cpu")
    else:
        model.to(device)
    if codec is None and real is not False:
        codec = _codec_of(model, pad)
        if codec is None and real:
            raise InputError("this codec has no files: give a frozen `QuantModel`, or leave out `real`")
    if codec is not None:
        codec.settle_rate()
    started = time.monotonic()
    nodes = model.nodes if count_clipped and isinstance(model, QuantModel) else {}
    with _evaluating(model), counting(nodes) as counter:
        results = [
            _evaluate_one(model, picture, index, pad, device, codec)
            for index, picture in enumerate(
                progress_bar(
                    pictures, desc=f"evaluating on {name}", unit="image", enabled=progress, leave=False
                )
            )
        ]
    clipped = counter.shares() if nodes else None
    return Report(
        name, tuple(results), "bitstream" if codec else "estimate", time.monotonic() - started, clipped
    )


def _pictures(images: Images) -> tuple[list[Picture], str]:
    """The images one by one, and the name of their data set or "images"."""
    if isinstance(images, (str, Path)) and not Path(images).expanduser().is_file():
        images = open_dataset(images)
    if isinstance(images, Dataset):
        return list(images.paths), images.name
    if isinstance(images, (str, Path)):
        return [Path(images).expanduser()], "images"
    if isinstance(images, (Tensor, np.ndarray)) and images.ndim == 3 or isinstance(images, Image):
        return [images], "images"
    return list(images), "images"


def _codec_of(model: nn.Module, multiple: int) -> Codec | None:
    """What writes files of a model; None where it is not quantized, not frozen, or has no bitstream.

    Raises:
        InputError: its files do not decode to its own pixels.
    """
    if not isinstance(model, QuantModel) or not model.frozen:
        return None
    try:
        codec = Codec(model, bytes(MODEL_BYTES), multiple=multiple)
        codec.settle_rate()
        codec.encode(torch.zeros((3, multiple, multiple), dtype=torch.uint8))
    except InputError:
        if "files" not in model.checked:  # there is a file, and it decodes to other pixels
            raise
        return None
    return codec


@plain_torch()
def decoded_pixels(model: nn.Module, path: Path, pad: int, device: torch.device) -> Tensor:
    """What `model` makes of an image file, as `evaluate` measures it.

    Args:
        pad: the image is padded with zeros to multiples of this many pixels.

    Returns:
        8-bit pixels, float32 (3, H, W) in 0..255, on the CPU.

    Raises:
        InputError: an image that cannot be read, or NaN or Inf in the model's output.
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
    output = codec_output(model(padded))
    x_hat, likelihoods = output["x_hat"], output["likelihoods"]
    if x_hat.shape != padded.shape:
        raise InputError(
            f"{label}: the model turned {tuple(padded.shape)} into {tuple(x_hat.shape)}; "
            f"give `pad` a multiple of its total stride (now {pad})"
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
    model: nn.Module,
    picture: Picture,
    index: int,
    pad: int,
    device: torch.device | str,
    codec: Codec | None,
) -> ImageResult:
    label = Path(picture).name if isinstance(picture, (str, Path)) else f"image {index}"
    x = (load_image(picture) if isinstance(picture, (str, Path)) else samples_of(picture, label)).to(device)
    if codec is not None and not isinstance(picture, (str, Path)):
        x = to_pixels(x).div(255.0)  # a file holds 8-bit samples
    x = x.reshape(1, *x.shape[-3:])
    height, width = x.shape[-2:]
    x_hat, rate = _decode(model, x, label, pad)
    real = rate
    if codec is not None:
        pixels, decoded = ((image[0] * 255).round().to("cpu", torch.uint8) for image in (x, x_hat))
        data = codec.encode(pixels)
        if not torch.equal(codec.decode(data), decoded):
            raise InputError(
                f"{label}: its file does not decode to the pixels of the quantized network; this is a "
                "defect, please report it"
            )
        real = 8 * len(data) / (height * width)
    error = mse(x, x_hat)
    return ImageResult(label, width, height, real, rate, error, psnr_from_mse(error), ms_ssim(x, x_hat))
