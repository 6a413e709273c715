"""A model's identity: the hash of what decodes. A .licq file names its model by it."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from licq.models.checkpoint_files import digest_of

_PROGRAM = (
    "arch",
    "kwargs",
    "class",
    "sizes",
    "config",
    "configs",
    "functions",
    "order",
    "float_nodes",
    "grids",
    "roundings",
)
"""What of a file's header determines the program."""


def identity_of(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, 64 hexadecimal digits, over the program and the tensors that it reads.

    Two models of one identity decode the same files to the same pixels. It depends neither on how the tensors
    are packed nor on what the header says beside the program: times, memory, `extra`.

    Args:
        header: of a quantized model's file.
        tensors: on the CPU, in the types that the program uses.
    """
    program = {key: header[key] for key in _PROGRAM}
    # how often each has run depends on the calibration
    program["kept_in_float"] = sorted([function, where] for function, where, _ in header["kept_in_float"])
    content = json.dumps(program, sort_keys=True) + digest_of(tensors)
    return hashlib.sha256(content.encode()).hexdigest()
