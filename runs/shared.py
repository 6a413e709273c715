"""Results that several runs need and one has measured, in a folder that they share."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import __version__ as pillow

from licq.runs.folder import read_json
from licq.support.determinism import versions
from licq.support.files import write_json


def shared(folder: str | Path | None, what: dict[str, Any], compute: Callable[[], Any]) -> Any:
    """The result that the folder has for `what`, or what `compute` gives now, kept there as JSON; `folder`
    None keeps nothing.

    `what` names everything that the result depends on, apart from versions and the number of threads, which
    are added here.
    """
    if folder is None:
        return compute()
    key = {**what, "versions": versions() | {"pillow": pillow}, "threads": torch.get_num_threads()}
    path = Path(folder) / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}.json"
    stored = read_json(path)
    if stored is None:
        stored = {"key": key, "result": compute()}
        write_json(path, stored)
    return stored["result"]
