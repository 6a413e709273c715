"""What a codec computes for some images under the conditions of this process, as hashes; `evaluation.verify`
runs it many times.

    python -m codec.fingerprint JOB.json RESULT.json

A job: {"model": a quantized model's file or null, "level": rate of a variable-rate one or null, "float":
[file, architecture, quality or level] or null, "images": [files], "threads": N, "batch": N, "tile": side or
null, "device": name, "keep": folder, "base": whether this process makes what the others compare with}.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from compressai.entropy_models import EntropyBottleneck, GaussianConditional, GaussianMixtureConditional
from torch import Tensor, nn

from licq.codec.api import Codec
from licq.data.images import load_pixels
from licq.data.padding import pad_to_multiple
from licq.models.checkpoints import load_checkpoint
from licq.models.layers import RoundAboutMeans
from licq.support.errors import InputError


def digest(*tensors: Tensor) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def with_copies(x: Tensor, batch: int) -> Tensor:
    """x (1, ...) and shifted copies of it, `batch` together."""
    return torch.cat([x, *(x.roll(7 * place, -1) for place in range(1, batch))])


# ---------------------------------------------------------------------------------------------- integer codec


def of_integers(codec: Codec, image: Tensor, stream: Path, job: dict[str, Any]) -> dict[str, str]:
    """Hashes of symbols, densities, file and pixels, and of the pixels that the first process's file decodes
    to; without the last two of a codec without files."""
    found = codec.inspect(image, job["batch"], job["device"])
    result = {
        "symbols": digest(*(part["symbols"].to(torch.int64) for part in found["latents"])),
        "indexes": digest(
            *(
                tensor.to(torch.int64)
                for part in found["latents"]
                for name, tensor in part.items()
                if name != "symbols"
            )
        ),
        "pixels": digest(found["pixels"]),
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
    """The latents of a float codec: recorded in the first process, handed to the decoder's half of the
    others."""

    def __init__(self, model: nn.Module, played: list[Tensor] | None):
        self.model, self.played = model, played
        self.latents: list[Tensor] = []
        self.indexes: list[Tensor] = []

    def _pass(self, value: Tensor) -> Tensor:
        if self.played is not None:
            value = self.played[len(self.latents)].to(value)
        self.latents.append(value.detach())
        return value

    @contextmanager
    def running(self) -> Iterator[None]:
        hooks = []
        for module in self.model.modules():
            if isinstance(module, (EntropyBottleneck, GaussianConditional)):
                hooks.append(module.register_forward_hook(self._entropy_model, with_kwargs=True))
            elif isinstance(module, RoundAboutMeans):
                hooks.append(module.register_forward_hook(lambda module, args, output: self._pass(output)))
            if isinstance(module, GaussianConditional):
                plain = module.quantize
                module.quantize = lambda *args, plain=plain, **kwargs: self._pass(plain(*args, **kwargs))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module in self.model.modules():
                if isinstance(module, GaussianConditional):
                    del module.quantize

    def _entropy_model(self, module: nn.Module, args: tuple, kwargs: dict, output: tuple) -> tuple:
        if isinstance(module, GaussianConditional) and not isinstance(module, GaussianMixtureConditional):
            self.indexes.append(module.build_indexes(args[1]))
        return self._pass(output[0]), *output[1:]


def of_floats(model: nn.Module, image: Tensor, kept: Path, job: dict[str, Any]) -> dict[str, str]:
    """Hashes of the scale indexes and pixels that this process's decoder has for the latents of the first
    process."""
    x, _ = pad_to_multiple(image[None].float() / 255)
    played = None if job["base"] else torch.load(kept, weights_only=True)
    batch = with_copies(x, job["batch"]).to(job["device"])
    if played is not None and job["batch"] > 1:
        played = [with_copies(part, job["batch"]) if part.shape[0] == 1 else part for part in played]
    tape = Tape(model, played)
    with torch.no_grad(), tape.running():
        x_hat = model(batch)["x_hat"][:1]
    if job["base"]:
        torch.save([part.cpu() for part in tape.latents], kept)
    return {
        "indexes": digest(*(part[:1] for part in tape.indexes)),
        "pixels": digest((x_hat.clamp(0, 1) * 255).round().to(torch.uint8)),
    }


def run(job: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(job["threads"])
    folder = Path(job["keep"])
    codec = Codec.load(job["model"], job["threads"], tile=job["tile"]) if job["model"] else None
    if codec and job["level"] is not None:
        codec.model.model.set_level(job["level"])
    model = load_checkpoint(*job["float"]).to(job["device"]) if job["float"] else None
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "integer": [],
        "float": [],
    }
    for place, path in enumerate(job["images"]):
        image = torch.from_numpy(load_pixels(path)).permute(2, 0, 1)
        if codec:
            found["integer"].append(of_integers(codec, image, folder / f"{place}.licq", job))
        if model is not None:
            found["float"].append(of_floats(model, image, folder / f"{place}.pt", job))
        print(".", end="", flush=True)
    return found


if __name__ == "__main__":
    result = run(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(result))
