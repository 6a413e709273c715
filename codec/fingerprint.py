"""Hashes of what a codec computes for some images in this process; `licq verify` runs it in several.

Jobs are a JSON list, and are done one after the other. A job is an object:

    model    a quantized model's file, or null
    level    the rate of a variable-rate model, or null
    plugin   the Python file that registers the model's codec, or null
    float    [file, architecture, quality or level] of a float codec, or null
    images   files
    threads, batch, device    numbers and a name
    tile     side of the tiles of large images, or null
    reference    whether the reference runs and not the compiled kernels
    keep     a folder in which the first job leaves files and latents for the others
    base     whether this is the first job
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from compressai.entropy_models import EntropyBottleneck, GaussianConditional, GaussianMixtureConditional
from torch import Tensor, nn

from licq.codec.api import Codec
from licq.data.images import load_pixels
from licq.data.padding import pad_to_multiple
from licq.integer.execution import usable
from licq.models.checkpoints import load_checkpoint
from licq.models.layers import RoundAboutMeans, TabulatedBottleneck
from licq.models.registry import get_architecture
from licq.quant.model import QuantModel
from licq.support.errors import InputError


def digest(*tensors: Tensor) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the tensors' bytes."""
    sha256 = hashlib.sha256()
    for tensor in tensors:
        sha256.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha256.hexdigest()[:16]


def with_copies(x: Tensor, batch: int) -> Tensor:
    """(batch, ...): x (1, ...) and copies of it that are shifted sideways."""
    return torch.cat([x, *(x.roll(7 * copy, -1) for copy in range(1, batch))])


# ---------------------------------------------------------------------------------------------- integer codec


def of_integers(codec: Codec, image: Tensor, stream: Path, job: dict[str, Any]) -> dict[str, str]:
    """Hashes of what the integer codec computes for an image, uint8 (3, H, W).

    Args:
        stream: where the first job writes its file, which all jobs decode.

    Returns:
        "symbols", "indexes" (what the densities follow from), "pixels", and where the codec has files "file"
        and "decoded": the file, and the pixels that the first job's file decodes to.
    """
    computed = codec.inspect(image, job["batch"], job["device"])
    densities = (
        tensor.to(torch.int64)
        for latent in computed["latents"]
        for name, tensor in latent.items()
        if name != "symbols"
    )
    result = {
        "symbols": digest(*(latent["symbols"].to(torch.int64) for latent in computed["latents"])),
        "indexes": digest(*densities),
        "pixels": digest(computed["pixels"]),
    }
    if job["batch"] > 1 or job["device"] != "cpu":
        return result
    try:
        data = codec.encode(image)
    except InputError:
        return result
    if job["base"]:
        stream.write_bytes(data)
    result["file"] = hashlib.sha256(data).hexdigest()[:16]
    try:
        result["decoded"] = digest(codec.decode(stream.read_bytes()))
    except InputError as error:
        result["decoded"] = str(error)
    return result


# ------------------------------------------------------------------------------------------------ float codec


class Tape:
    """The latents of a float codec. The first job records them; in the others the decoder gets these.

    Args:
        recorded: of the first job; None in the first job.
    """

    def __init__(self, model: nn.Module, recorded: list[Tensor] | None):
        self.model, self.recorded = model, recorded
        self.latents: list[Tensor] = []
        self.indexes: list[Tensor] = []

    def _pass(self, value: Tensor) -> Tensor:
        if self.recorded is not None:
            value = self.recorded[len(self.latents)].to(value)
        self.latents.append(value.detach())
        return value

    @contextmanager
    def running(self) -> Iterator[None]:
        """While this lasts, the model's forward passes its latents through the tape."""
        hooks = []
        for module in self.model.modules():
            if isinstance(module, (EntropyBottleneck, TabulatedBottleneck, GaussianConditional)):
                hooks.append(module.register_forward_hook(self._entropy_model, with_kwargs=True))
            elif isinstance(module, RoundAboutMeans):
                hooks.append(module.register_forward_hook(self._rounding))
            if isinstance(module, GaussianConditional):
                vars(module)["quantize"] = self._through(module.quantize)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module in self.model.modules():
                if isinstance(module, GaussianConditional):
                    del vars(module)["quantize"]

    def _through(self, quantize: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: self._pass(quantize(*args, **kwargs))

    def _rounding(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return self._pass(output)

    def _entropy_model(self, module: nn.Module, args: tuple, kwargs: dict, output: tuple) -> tuple:
        if isinstance(module, GaussianConditional) and not isinstance(module, GaussianMixtureConditional):
            self.indexes.append(module.build_indexes(args[1]))
        return self._pass(output[0]), *output[1:]


def of_floats(model: nn.Module, image: Tensor, latents_file: Path, job: dict[str, Any]) -> dict[str, str]:
    """Hashes of the scale indexes and pixels that this job computes from the first job's latents.

    Args:
        image: uint8 (3, H, W).
        latents_file: where the first job leaves its latents.
    """
    x, _ = pad_to_multiple(image[None].float() / 255)
    recorded = None if job["base"] else torch.load(latents_file, weights_only=True)
    batch = with_copies(x, job["batch"]).to(job["device"])
    if recorded is not None and job["batch"] > 1:
        recorded = [with_copies(part, job["batch"]) if part.shape[0] == 1 else part for part in recorded]
    tape = Tape(model, recorded)
    with torch.no_grad(), tape.running():
        x_hat = model(batch)["x_hat"][:1]
    if job["base"]:
        torch.save([part.cpu() for part in tape.latents], latents_file)
    return {
        "indexes": digest(*(part[:1] for part in tape.indexes)),
        "pixels": digest((x_hat.clamp(0, 1) * 255).round().to(torch.uint8)),
    }


@lru_cache(maxsize=1)
def _quantized(path: str) -> QuantModel:
    return QuantModel.load(path)


@lru_cache(maxsize=1)
def _float(path: str, arch: str, quality: int, device: str) -> nn.Module:
    return load_checkpoint(path, arch, quality).to(device)


def _use_kernels(reference: bool) -> None:
    if reference:
        os.environ["LICQ_KERNELS"] = "reference"
    else:
        os.environ.pop("LICQ_KERNELS", None)
    usable.cache_clear()


def run(job: dict[str, Any]) -> dict[str, Any]:
    """The result of a job: versions, and hashes of each image under "integer" and "float"."""
    torch.set_num_threads(job["threads"])
    _use_kernels(job["reference"])
    if job["plugin"]:
        get_architecture(job["plugin"])
    folder = Path(job["keep"])
    codec = Codec(_quantized(job["model"]), None, job["threads"], tile=job["tile"]) if job["model"] else None
    if codec and job["level"] is not None:
        network: Any = codec.model.model
        network.set_level(job["level"])
    model = _float(*job["float"], job["device"]) if job["float"] else None
    result: dict[str, Any] = {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "integer": [],
        "float": [],
    }
    for index, path in enumerate(job["images"]):
        image = torch.from_numpy(load_pixels(path)).permute(2, 0, 1)
        if codec:
            result["integer"].append(of_integers(codec, image, folder / f"{index}.licq", job))
        if model is not None:
            result["float"].append(of_floats(model, image, folder / f"{index}.pt", job))
        print(".", end="", flush=True)
    return result


def main(jobs_file: str, results_file: str) -> None:
    """Do the jobs of a file and write their results into another."""
    results = [run(job) for job in json.loads(Path(jobs_file).read_text())]
    Path(results_file).write_text(json.dumps(results))
