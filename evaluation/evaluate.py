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

FLOAT, QUANTIZED, COUNTING = "float codec", "quantized codec", "counting"  # kinds of loops

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
        """The codec's objective J = R + lambda * D of this image, R the estimate in bpp; D is the MSE on
        0..255, or 1 - MS-SSIM.

        CompressAI writes the first as lambda * 255^2 * mse with mse on 0..1: the same number. A float codec
        has only the estimate, so J is of the estimate for every codec.
        """
        if metric == "mse":
            return self.bpp_estimated + lmbda * self.mse
        if metric != "ms-ssim":
            raise InputError(f"`metric` is {metric!r}; choose mse or ms-ssim")
        if self.ms_ssim is None:
            raise InputError(f"{self.name} is too small for MS-SSIM; leave it out, or give `metric` mse")
        return self.bpp_estimated + lmbda * (1.0 - self.ms_ssim)


@dataclass(frozen=True)
class Report:
    """What `evaluate` has measured.

    name:       of the data set.
    per_image:  one result an image, in the order of the images.
    bpp_source: "estimate" (likelihoods) or "bitstream" (bytes that were written and decoded).
    seconds:    that it took.
    clipped:    of each node of a quantized codec that clips, the share of its input values that it clips;
        None where that was not counted.
    no_files:   why a quantized codec's rate is the estimate; None where it is that of files, where nobody
        asked for files, and for a float codec.
    """

    name: str
    per_image: tuple[ImageResult, ...]
    bpp_source: str
    seconds: float
    clipped: dict[str, float] | None = None
    no_files: str | None = None

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
            **({} if self.no_files is None else {"no_files": self.no_files}),
        }

    @classmethod
    def from_dict(cls, stored: dict) -> "Report":
        """The report that `to_dict` was of. A PSNR that JSON could not hold (null) was infinite."""
        images = tuple(
            ImageResult(**{**image, "psnr": math.inf if image["psnr"] is None else image["psnr"]})
            for image in stored["images"]
        )
        return cls(
            stored["name"],
            images,
            stored["bpp_source"],
            stored["seconds"],
            stored.get("clipped"),
            stored.get("no_files"),
        )

    @classmethod
    def joined(cls, reports: Sequence["Report"]) -> "Report":
        """One codec's reports on parts of a data set, in their order, as one."""
        images = tuple(image for report in reports for image in report.per_image)
        first = reports[0]
        seconds = sum(report.seconds for report in reports)
        return cls(first.name, images, first.bpp_source, seconds, no_files=first.no_files)


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

    A frozen quantized codec is measured by its integer program on the CPU: each image is encoded, its file
    decoded, and the decoder's numbers are compared with the encoder's (`Codec.measure`). The rate is that of
    the file, and the estimate from the likelihoods stands beside it. Where a codec has no files, its forward
    runs and the rate is the estimate. `Report.bpp_source` says which, `Report.no_files` why.

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
        real: True asks for files, False for the forward and the estimate alone; default files of a frozen
            `QuantModel` on the CPU whose forward has a bitstream, else the estimate.
        count_clipped: also count the values that the quantizers of a `QuantModel` clip, for `Report.clipped`.
            The forward, which simulates the integers on float kernels, then runs beside the program.
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
    no_files = None
    if codec is None and real is not False:
        codec, no_files = _codec_of(model, pad, None if real else device)
        if codec is None and real:
            why = f" ({no_files})" if no_files else ""
            raise InputError(f"this codec has no files{why}: give a frozen `QuantModel`, or leave out `real`")
    if codec is not None:
        codec.settle_rate()
    started = time.monotonic()
    nodes = model.nodes if count_clipped and isinstance(model, QuantModel) else {}

    def each(what: str, kind: str):
        bar = progress_bar(pictures, desc=what, unit="image", enabled=progress, leave=False, kind=kind)
        return enumerate(bar)

    with _evaluating(model):
        with counting({} if codec else nodes) as counter:
            results = [
                _evaluate_one(model, picture, index, pad, device, codec)
                for index, picture in each(
                    f"evaluating on {name}", QUANTIZED if isinstance(model, QuantModel) else FLOAT
                )
            ]
        if codec and nodes:
            with counting(nodes) as counter:
                for index, picture in each("counting what is clipped", COUNTING):
                    _decode(model, _image(picture, index)[1].to(device), str(index), pad)
    clipped = counter.shares() if nodes else None
    source = "bitstream" if codec else "estimate"
    return Report(name, tuple(results), source, time.monotonic() - started, clipped, no_files)


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


def _codec_of(
    model: nn.Module, multiple: int, device: torch.device | str | None = None
) -> tuple[Codec | None, str | None]:
    """What writes files of a model; (None, why) where it is not frozen, has no bitstream, or is on another
    device than the CPU; (None, None) of a float codec.

    Args:
        device: that of the evaluation; None: files are wanted wherever the model is.

    Raises:
        InputError: its files do not decode to its own pixels.
    """
    if not isinstance(model, QuantModel):
        return None, None
    if not model.frozen:
        return None, "it is not frozen"
    if device is not None and torch.device(device).type != "cpu":
        return None, f"files are written on the CPU, and this evaluation ran on {device}"
    try:
        codec = Codec(model, bytes(MODEL_BYTES), multiple=multiple)
        codec.settle_rate()
    except InputError as error:
        return None, str(error)
    # not checked yet, or without files, perhaps as it was padded then
    if "none" in model.checked.get("files", {"none": ""}):
        codec.check(torch.zeros((3, multiple, multiple), dtype=torch.uint8))
    why = model.checked["files"].get("none")
    return (None, why) if why else (codec, None)


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
    codec, _ = _codec_of(model, pad, device)
    with _evaluating(model.to(device)):
        if codec is not None:
            return codec.decode(codec.encode(_samples(load_image(path)))).float()
        return to_pixels(_decode(model, load_image(path)[None].to(device), path.name, pad)[0])[0].cpu()


def _samples(x: Tensor) -> Tensor:
    """uint8 of an image in 0..1, on the CPU."""
    return to_pixels(x).to("cpu", torch.uint8)


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


def _image(picture: Picture, index: int) -> tuple[str, Tensor]:
    """What an image is called, and its samples (1, 3, H, W) in 0..1."""
    if isinstance(picture, (str, Path)):
        label, x = Path(picture).name, load_image(picture)
    else:
        label = f"image {index}"
        x = samples_of(picture, label)
    return label, x.reshape(1, *x.shape[-3:])


def _evaluate_one(
    model: nn.Module,
    picture: Picture,
    index: int,
    pad: int,
    device: torch.device | str,
    codec: Codec | None,
) -> ImageResult:
    label, x = _image(picture, index)
    height, width = x.shape[-2:]
    if codec is None:
        x = x.to(device)
        x_hat, rate = _decode(model, x, label, pad)
        real = rate
    else:
        pixels = _samples(x[0])
        x = pixels[None] / 255.0  # a file holds 8-bit samples
        try:
            measured = codec.measure(pixels)
        except InputError as error:
            raise InputError(f"{label}: {error}") from error
        x_hat, bits = measured.pixels[None] / 255.0, measured.estimated_bits
        real = 8 * len(measured.data) / (height * width)
        if bits is None:  # the forward estimates the rate of other symbols
            own, rate = _decode(model, x.to(device), label, pad)
            if not torch.equal(_samples(own[0]), measured.pixels):
                raise InputError(
                    f"{label}: its file does not decode to the pixels of the quantized network; this is a "
                    "defect, please report it"
                )
        else:
            rate = bits / (height * width)
    error = mse(x, x_hat)
    return ImageResult(label, width, height, real, rate, error, psnr_from_mse(error), ms_ssim(x, x_hat))
