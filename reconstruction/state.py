"""What a calibration has learned, in files: a killed calibration goes on behind the last finished unit."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from licq.quant.modules import QuantModule
from licq.support.errors import InputError
from licq.support.files import atomic_path


def fingerprint(model: nn.Module, images: Iterable[Tensor], *settings: object) -> str:
    """SHA-256 of all that a calibration depends on: weights, images, settings (JSON)."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    for image in images:
        digest.update(image.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class StateFolder:
    """The files of one calibration, one of each finished part.

    Args:
        folder: where they are; None keeps nothing.
        identity: `fingerprint` of the calibration; it is written into each file.
        resume: True reads what an earlier process has left, False deletes it.

    Raises:
        InputError: a file there cannot be read, or belongs to another calibration.
    """

    def __init__(self, folder: Path | None, identity: str, resume: bool):
        self.folder, self.identity = folder, identity
        if folder is None:
            return
        if not resume:
            for path in folder.glob("*.safetensors"):
                path.unlink()
        for path in sorted(folder.glob("*.safetensors")):
            if self._open(path)[0] != identity:
                raise InputError(
                    f"{path} belongs to a calibration with other settings, images or weights; "
                    "repeat those, leave `resume` out to start anew, or choose another `folder`"
                )

    def load(self, name: str) -> tuple[dict, dict[str, Tensor]] | None:
        """(record, tensors) stored under a name, or None."""
        path = None if self.folder is None else self.folder / f"{name}.safetensors"
        if path is None or not path.is_file():
            return None
        return self._open(path)[1:]

    def save(self, name: str, record: dict, tensors: Mapping[str, Tensor]) -> None:
        """Store a record, of what JSON can hold, and tensors under a name."""
        if self.folder is None:
            return
        metadata = {"identity": self.identity, "facts": json.dumps(record)}
        # A copy each: safetensors refuses tensors that share memory.
        contents = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
        with atomic_path(self.folder / f"{name}.safetensors") as temporary:
            save_file(contents, os.fspath(temporary), metadata)

    def _open(self, path: Path) -> tuple[str | None, dict, dict[str, Tensor]]:
        """(identity, record, tensors) of a file."""
        try:
            with safe_open(os.fspath(path), "pt") as stored:
                metadata = stored.metadata() or {}
                tensors = {key: stored.get_tensor(key) for key in stored.keys()}
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path} cannot be read ({error}); delete it, or leave `resume` out to start anew"
            ) from error
        return metadata.get("identity"), json.loads(metadata.get("facts", "{}")), tensors


def stored_records(folder: Path | None) -> dict[str, dict]:
    """The records of a folder's finished parts by name, whatever calibration they belong to; of files that
    cannot be read none."""
    records = {}
    for path in sorted(folder.glob("*.safetensors")) if folder is not None else ():
        try:
            with safe_open(os.fspath(path), "pt") as stored:
                records[path.stem] = json.loads((stored.metadata() or {}).get("facts", "{}"))
        except (OSError, SafetensorError):
            continue
    return records


def learned(nodes: Mapping[str, QuantModule]) -> dict[str, nn.Parameter]:
    """Every parameter that nodes may learn, by "node|knob|number": names of tensors in a `StateFolder`."""
    return {
        f"{name}|{knob}|{number}": parameter
        for name, node in nodes.items()
        if not node.stays_float
        for knob, parameters in node.learnable().items()
        for number, parameter in enumerate(parameters)
    }


def node_of(key: str) -> str:
    """The node's name in a key of `learned`."""
    return key.split("|")[0]


def knob_of(key: str) -> str:
    """The knob in a key of `learned`, one of `config.KNOBS`."""
    return key.split("|")[1]


@torch.no_grad()
def restore(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Write stored values into parameters of the same names."""
    for key, parameter in parameters.items():
        parameter.copy_(values[key].to(parameter))


def snapshot(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """A copy of the parameters' values."""
    return {key: parameter.detach().clone() for key, parameter in parameters.items()}
