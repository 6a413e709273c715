"""CompressAI's pretrained models: downloaded once, and never used without a check of their hash.

CompressAI lists their addresses in `compressai.zoo.image.model_urls` and `image_vbr.model_urls`. The last
eight characters of a file's name are the first of its SHA-256, by PyTorch Hub's convention.
"""

import http.client
import os
import re
import shutil
import ssl
import sys
import urllib.error
import urllib.request
from pathlib import Path

import torch
from compressai.zoo import image as zoo_image
from compressai.zoo import image_vbr as zoo_image_vbr

from licq.models.registry import get_architecture, list_models
from licq.support.errors import InputError
from licq.support.files import atomic_path, sha256

TIMEOUT_S = 30
_NETWORK_ERRORS = (
    urllib.error.URLError,
    http.client.HTTPException,
    TimeoutError,
    ConnectionError,
    ssl.SSLError,
)


def cache_dir() -> Path:
    """$LICQ_CACHE/checkpoints, or else the folder of PyTorch Hub, into which CompressAI downloads too."""
    cache = os.environ.get("LICQ_CACHE")
    return (Path(cache) if cache else Path(torch.hub.get_dir())) / "checkpoints"


def pretrained_url(arch: str, quality: int, metric: str = "mse") -> str:
    """The address at which CompressAI publishes a model.

    Raises:
        InputError: it publishes none for this architecture, metric or quality.
    """
    architecture = get_architecture(arch)
    table = zoo_image.model_urls.get(architecture.zoo or "", {})
    if architecture.variable and architecture.zoo:  # one file for all qualities
        urls = zoo_image_vbr.model_urls[architecture.zoo]
        table = {metric: dict.fromkeys(architecture.official, url) for metric, url in urls.items()}
    if not table:
        published = [name for name in list_models() if get_architecture(name).zoo]
        raise InputError(
            f"there is no pretrained {arch}, only {', '.join(published)}; give a file as `checkpoint`"
        )
    if metric not in table:
        raise InputError(
            f"there is no pretrained {arch} for metric {metric!r}; choose from {', '.join(table)}"
        )
    if quality not in table[metric]:
        known = ", ".join(map(str, table[metric]))
        raise InputError(
            f"there is no pretrained {arch} of quality {quality!r}; choose `quality` from {known}"
        )
    return table[metric][quality]


def pretrained_checkpoint(arch: str, quality: int, metric: str = "mse") -> Path:
    """The file of a pretrained model, from the cache or else downloaded. Its hash is checked in both cases.

    Raises:
        InputError: no such model, no network, or a file whose SHA-256 is not the one in its name.
    """
    url = pretrained_url(arch, quality, metric)
    path = cache_dir() / url.rpartition("/")[2]
    if path.is_file():
        digest = sha256(path)
        if not digest.startswith(expected_hash(path.name)):
            raise InputError(
                f"{path} is damaged: its SHA-256 begins with {digest[:8]}, not {expected_hash(path.name)}; "
                "delete it and run again"
            )
        return path
    _download(url, path)
    return path


def expected_hash(name: str) -> str:
    """The beginning of the SHA-256 that a file's name states: `mbt2018-1-3f36cd77.pth.tar` -> `3f36cd77`.

    Raises:
        ValueError: the name states none.
    """
    match = re.search(r"-([0-9a-f]{8,64})\.", name)
    if match is None:
        raise ValueError(f"no hash in the name {name!r}")
    return match[1]


def _download(url: str, path: Path) -> None:
    """Download a file. It appears at `path` only when its hash is right."""
    print(f"downloading {url}", file=sys.stderr)
    with atomic_path(path) as temporary:
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response, open(temporary, "wb") as stream:
                shutil.copyfileobj(response, stream)
        except _NETWORK_ERRORS as error:
            reason = getattr(error, "reason", error)
            raise InputError(
                f"cannot download {url} ({' '.join(str(reason).split())}); put the file at {path} and run "
                "again"
            ) from error
        digest = sha256(temporary)
        if not digest.startswith(expected_hash(path.name)):
            raise InputError(
                f"the download of {url} has a SHA-256 that begins with {digest[:8]}, not "
                f"{expected_hash(path.name)}; try again or put the right file at {path}"
            )
