"""What a unit has learned, in files: a killed calibration goes on behind the last finished unit."""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from licq.support.errors import InputError
from licq.support.files import atomic_path


def fingerprint(model: nn.Module, images: Tensor, *settings: object) -> str:
    """SHA-256 of all that a calibration depends on: weights, images, settings (JSON)."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    digest.update(images.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class StateFolder:
    """The files of one calibration. `folder` None keeps nothing."""

    def __init__(self, folder: Path | None, identity: str, resume: bool):
        self.folder, self.identity = folder, identity
        if folder is None:
            return
        if not resume:
            for path in folder.glob("*.safetensors"):
                path.unlink()
        for path in sorted(folder.glob("*.safetensors")):
            if self._open(path)[0].get("identity") != identity:
                raise InputError(
                    f"{path} belongs to a calibration with other settings, images or weights; "
                    "repeat those, leave --resume out to start anew, or choose another --out"
                )

    def load(self, name: str) -> tuple[dict, dict[str, Tensor]] | None:
        """(facts, tensors) stored under a name, or None."""
        path = None if self.folder is None else self.folder / f"{name}.safetensors"
        if path is None or not path.is_file():
            return None
        return self._open(path)

    def save(self, name: str, facts: dict, tensors: dict[str, Tensor]) -> None:
        if self.folder is None:
            return
        metadata = {"identity": self.identity, "facts": json.dumps(facts)}
        # safetensors takes no tensor that shares memory with another, and none without elements is lost by
        # this
        contents = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
        with atomic_path(self.folder / f"{name}.safetensors") as temporary:
            save_file(contents, os.fspath(temporary), metadata)

    def _open(self, path: Path) -> tuple[dict, dict[str, Tensor]]:
        try:
            with safe_open(os.fspath(path), "pt") as stored:
                metadata = stored.metadata() or {}
                tensors = {key: stored.get_tensor(key) for key in stored.keys()}
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path} cannot be read ({error}); delete it, or leave --resume out to start anew"
            ) from error
        return {"identity": metadata.get("identity"), **json.loads(metadata.get("facts", "{}"))}, tensors


def learned(nodes: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Every parameter that nodes may learn, by the node's name, the knob and a number."""
    return {
        f"{name}|{knob}|{number}": parameter
        for name, node in nodes.items()
        for knob, parameters in node.learnable().items()
        for number, parameter in enumerate(parameters)
    }


@torch.no_grad()
def restore(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    """Write stored values into parameters of the same names."""
    for key, parameter in parameters.items():
        parameter.copy_(values[key].to(parameter))


def snapshot(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """A copy of the parameters' values."""
    return {key: parameter.detach().clone() for key, parameter in parameters.items()}
