"""What a frozen model makes of one made-up image: told by its file, and asked again where the network's code
is the user's."""

import hashlib

import torch
from torch import Tensor

from licq.quant.rewritten import RewrittenCodec
from licq.support.errors import InputError

_MAX_SIDE = 2**12


def probe_image(height: int, width: int) -> Tensor:
    """(1, 3, height, width) in 0..1, 8-bit samples that are the same everywhere."""
    y, x = torch.arange(height)[:, None], torch.arange(width)
    planes = [(7 * y * y + 13 * (c + 1) * x + (c + 3) * x * y // 5 + 31 * c) % 256 for c in range(3)]
    return torch.stack(planes)[None] / 255


@torch.no_grad()
def probe(model: RewrittenCodec, height: int, width: int) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the pixels of `probe_image`."""
    device = next(model.buffers()).device
    x_hat = model(probe_image(height, width).to(device))["x_hat"]
    return hashlib.sha256((x_hat * 255).round().to("cpu", torch.uint8).numpy().tobytes()).hexdigest()[:16]


def check_probe(model: RewrittenCodec, name: str) -> None:
    """Check that a loaded model computes what the saved one did, where its file says what that was.

    Raises:
        InputError: it does not: the network was built in another way, or keeps numbers that are in no file.
    """
    stated = model.checked.get("repeatable") or {}
    if "pixels" not in stated:
        return
    height, width = stated["height"], stated["width"]
    if not (0 < height <= _MAX_SIDE and 0 < width <= _MAX_SIDE):
        raise InputError(
            f"{name} is damaged (it was checked on {width}x{height} pixels); copy or make it again"
        )
    if probe(model, height, width) != stated["pixels"]:
        raise InputError(
            f"{name} gives other pixels in this {type(model.model).__name__} than in the one that was "
            "quantized; build `model` with the same arguments and code, and keep every number that it "
            "computes with in a parameter or buffer"
        )
