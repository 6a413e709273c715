"""What .licq files name a model by. No torch is needed for a model of this version."""

import json
from pathlib import Path

import safetensors

from licq.codec.container import MODEL_BYTES
from licq.support.errors import InputError
from licq.support.files import sha256


def names_of(model: Path) -> tuple[bytes, bytes]:
    """First bytes of a model's identity and, for files of earlier versions, of the SHA-256 of its own file.

    Raises:
        InputError: no such file, or none of a quantized model.
    """
    identity = _stated(model)
    if identity is None:
        from licq.quant.serialization import read_identity

        identity = read_identity(model)
    return bytes.fromhex(identity)[:MODEL_BYTES], bytes.fromhex(sha256(model))[:MODEL_BYTES]


def _stated(model: Path) -> str | None:
    """The identity in the file's own header; None where that is to be looked for by other means."""
    try:
        with safetensors.safe_open(model, "numpy") as stream:
            identity = json.loads((stream.metadata() or {}).get("licq", "{}")).get("identity")
        return identity if len(bytes.fromhex(identity)) >= MODEL_BYTES else None
    except (safetensors.SafetensorError, InputError, OSError, ValueError, TypeError, AttributeError):
        return None
