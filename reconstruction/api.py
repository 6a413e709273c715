"""One call from a float codec to a quantized one."""

import resource
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from licq.quant.bits import Bits
from licq.quant.model import QuantModel
from licq.quant.network_checks import check_network, unwrapped
from licq.reconstruction.calibration import Calibration, device_of, run_steps
from licq.reconstruction.config import PtqConfig
from licq.reconstruction.crops import (
    Images,
    calibration_crops,
    calibration_images,
    given_crops,
    given_images,
    listed,
)
from licq.reconstruction.expected import expected_loops, pixels_of
from licq.reconstruction.objective import Objective
from licq.reconstruction.repeatability import check_frozen, check_source
from licq.reconstruction.state import StateFolder, fingerprint
from licq.reconstruction.steps import PREPARATION, STEPS
from licq.support.determinism import plain_torch
from licq.support.errors import InputError
from licq.support.work import Item, working


@plain_torch(learning=True)
def quantize(
    model: nn.Module,
    images: Images,
    config: PtqConfig | None = None,
    *,
    lmbda: float,
    metric: str = "mse",
    bits: Bits | None = None,
    device: torch.device | str | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    num_images: int = 10,
    crop: int = 256,
    crops_per_image: int = 8,
    crop_reductions: Sequence[int] = (1, 2),
    whole: Sequence[Tensor] | None = None,
) -> QuantModel:
    """Quantize a learned image codec on calibration images, without training data or labels.

    With the preset "rdo-ptq" this is Algorithm 1 of Shi, Lu and Ma, "Rate-Distortion Optimized Post-Training
    Quantization for Learned Image Compression" (IEEE TCSVT 34(5), 2024; arXiv 2211.02854). The default,
    "licq", compensates rounding (GPTQ), then learns ranges, rounding and biases of all layers together on
    eq. 12.

    What the caller has set for all of PyTorch (`no_grad`, `inference_mode`, autocast, a default type or
    device) changes nothing: see `support.determinism.plain_torch`.

    Args:
        model: the float codec, in evaluation mode. Its forward maps (B, 3, H, W) in 0..1 to {"x_hat": (B, 3,
            H, W), "likelihoods": {name: likelihoods of a latent's elements}}; a list of them or one tensor
            also serves. It is not changed. One in `nn.DataParallel` counts as itself.
        images: a folder of images, a list of files, the name of a data set ("kodak", "photos-calib" ...), or
            crops. Of files, crops are drawn as the command line draws them, seeded by
            `config.reconstruction.seed`. Crops are taken as they are: a tensor or a numpy array (n, 3, H, W),
            float samples in 0..1 or uint8 in 0..255, numpy arrays also (n, H, W, 3); or a list of such images
            (3, H, W), of batches of them, or of Pillow images, all of one size. The integers see samples
            rounded to 8 bits. A variable-rate codec needs (n, 5, H, W), with the gain and the lambda of each
            crop (`models.qvrf.VariableRate.with_planes`); crops drawn from files get those of all its levels
            in turn. J is measured on the first `config.reconstruction.measured` crops.
        config: the method; default `PtqConfig.from_preset("licq")`, 8 bits for weights and activations.
        lmbda: weight of the distortion in J = R + lambda * D that the codec was trained with; R in bits per
            pixel. Crops of a variable-rate codec have their own.
        metric: "mse" (D = 255^2 * mse) or "ms-ssim" (D = 1 - MS-SSIM).
        bits: {layer: {"w_bits": b, "a_bits": b}} of single layers, with the names of `QuantModel.layers`; the
            others have those of `config`.
        device: where to run; default where the model is.
        folder: where finished parts are stored for `resume`; default nowhere.
        resume: go on behind the last finished part in `folder`. The result is that of an uninterrupted run.
        progress: show what is done and the time left.
        num_images: how many images crops are drawn from. Fewer images are used again, at other positions.
        crop: side of a drawn crop in pixels, a multiple of what the codec's inputs are (mostly 64).
        crops_per_image: crops drawn from each image.
        crop_reductions: by how much an image is made smaller before its first, second ... crop, in turn.
        whole: the images of crops in memory, (3, H, W) in uint8, of any sizes that the codec takes, for
            methods that observe ranges on whole images (`config.reconstruction.whole`). Default: those of
            `images` where these are files.

    Returns:
        A frozen `QuantModel`. Its `history` holds J in bits per pixel, a mean over crops, of the float codec
        (`j_float`), of the quantized one before learning (`j_start`), behind the units (`j_units`) and at the
        end (`j_end`); the same for each of `units` and for the `joint` pass; what channel splitting added
        (`splitting`); which ranges were made smaller (`tightened`, where the method does that); what a search
        of ranges found (`search`); the rise of J that rounding noise still makes in each layer (`predicted`);
        `seconds` in all and `seconds_by_step` of this process; and the process's peak memory
        (`peak_memory_mb`).

    Raises:
        InputError: a network that is not float32 or has no numbers yet (lazy layers, the meta device); a part
            of it that is scripted, traced or quantized already; a codec that draws random numbers, keeps
            state between images or mixes the images of a batch; images that cannot be read, or crops of a
            wrong shape, range or size; a lambda that is not positive; an unknown metric; bits of an unknown
            layer; a folder of another calibration.

    Example:
        >>> qmodel = licq.quantize(MyCodec().eval(), "my_photos/", lmbda=0.0067)
        >>> config = licq.PtqConfig.from_preset("licq", w_bits=6)
        >>> qmodel = licq.quantize(MyCodec().eval(), ["a.png", "b.png"], config, lmbda=0.0067, num_images=2)
        >>> qmodel.save("model.safetensors")
    """
    _check_float(model)
    model, config = unwrapped(model), config or PtqConfig.from_preset()
    objective = Objective(lmbda, metric)
    seed, images = config.reconstruction.seed, listed(images)
    crops = calibration_crops(model, images, metric, seed, num_images, crop, crops_per_image, crop_reductions)
    if not config.reconstruction.whole:
        whole = ()
    elif whole is None:
        whole = calibration_images(model, images, seed, num_images, crop_reductions)
    else:
        whole = given_images(whole)
    started = time.monotonic()
    check_source(model, crops, device_of(model, crops) if device is None else device)
    settings = [config.to_dict(), lmbda, metric, *([dict(bits)] if bits else [])]
    state = StateFolder(
        None if folder is None else Path(folder) / "units",
        fingerprint(model, (crops, *whole), *settings),
        resume,
    )
    calibration = Calibration(model, crops, config, objective, bits, device, whole, state, progress)
    loops = expected_loops(config, len(crops), crops.shape[-1], model, state.folder, pixels_of(whole))
    with working("quantizing", [Item("", *loop) for loop in loops], progress):
        run_steps(calibration, STEPS)
    qmodel, history = calibration.qmodel, calibration.history
    qmodel.freeze()
    qmodel.checked["repeatable"] = check_frozen(qmodel, calibration.crops)
    history["seconds_by_step"] = calibration.seconds_by_step
    history["seconds"] = time.monotonic() - started + calibration.resumed_seconds
    history["peak_memory_mb"] = peak_memory_mb(next(qmodel.parameters()).device)
    qmodel.history = history
    return qmodel


@plain_torch(learning=True)
def prepare_calibration(
    model: nn.Module,
    crops: Tensor,
    config: PtqConfig,
    objective: Objective,
    *,
    bits: Bits | None = None,
    device: torch.device | str | None = None,
    whole: Sequence[Tensor] = (),
    progress: bool = True,
) -> Calibration:
    """The steps of `quantize` before anything is learned: ranges, splitting, balance, the first rounding.

    Args:
        model, config, bits, device, whole, progress: those of `quantize`.
        crops: a tensor as `quantize` takes it.
        objective: J.

    Returns:
        The calibration; its `qmodel` is observed and not frozen.
    """
    _check_float(model)
    crops = given_crops(model, crops, objective.metric)
    calibration = Calibration(model, crops, config, objective, bits, device, whole, progress=progress)
    run_steps(calibration, PREPARATION)
    return calibration


def _check_float(model: nn.Module) -> None:
    """Raises InputError where `model` is no float network that can be quantized."""
    if isinstance(model, QuantModel):
        raise InputError("the network is a `QuantModel`, quantized already; give the float codec")
    check_network(model)


def peak_memory_mb(device: torch.device | str) -> float:
    """The most memory this process has held so far, in MB: of the GPU where it runs on one."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
