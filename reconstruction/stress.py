"""Harder crops and flat pictures, for ranges that also hold what a few photographs do not show."""

import torch
import torch.nn.functional as F
from torch import Tensor

SATURATION = 2.5
CONTRAST = 2.5
_CORNERS = tuple(
    (float(red), float(green), float(blue)) for red in (0, 1) for green in (0, 1) for blue in (0, 1)
)
_GREY = (128 / 255,) * 3
# colours of _CORNERS at the four corners of each smooth picture
_SMOOTH = torch.tensor([[0, 4, 6, 7], [0, 1, 3, 7], [2, 0, 7, 5]])


def stressed(crops: Tensor) -> Tensor:
    """The crops made colourful, these with their channels rotated, and the crops made sharp: (4 n, 3, H, W)
    8-bit samples in 0..1.

    Ten photographs are mostly grey and green, and photographs of many pixels are soft. When ranges come from
    such crops alone, channels that code colour clip on red parrots (Kodak 23), others on a facade of black
    and white stripes.

    Args:
        crops: (n, 3, H, W). Channels behind the third, of a variable-rate codec's crops, stay as they are.
    """
    crops, planes = crops[:, :3], crops[:, 3:]
    grey = crops.mean(1, keepdim=True)
    strong = grey + (crops - grey) * SATURATION
    rotated = [strong, strong[:, [1, 2, 0]], strong[:, [2, 0, 1]]]
    samples = torch.round(torch.cat([*rotated, _sharp(crops)]).clamp(0, 1) * 255) / 255
    return torch.cat([samples, planes.repeat(4, 1, 1, 1)], 1)


def flat(crops: Tensor) -> Tensor:
    """Flat and smooth pictures of the crops' size, (12, 3, H, W) 8-bit samples in 0..1.

    Black, white, grey and the six saturated colours, and three pictures that go smoothly from colour to
    colour. Documents, slides and screenshots have large areas of these. There a channel that varies around 0
    on photographs stays at one value, which can lie far outside of what photographs reach.

    Args:
        crops: (n, 3, H, W). Channels behind the third, of a variable-rate codec's crops, are taken in turn.
    """
    height, width = crops.shape[-2:]
    plain = F.interpolate(torch.tensor([*_CORNERS, _GREY])[:, :, None, None], size=(height, width))
    corners = torch.tensor(_CORNERS)[_SMOOTH].movedim(-1, 1).unflatten(-1, (2, 2))
    smooth = F.interpolate(corners, size=(height, width), mode="bilinear", align_corners=True)
    samples = torch.round(torch.cat([plain, smooth]) * 255) / 255
    planes = crops[torch.arange(len(samples)) % len(crops), 3:]
    return torch.cat([samples.to(crops), planes], 1)


def _sharp(crops: Tensor) -> Tensor:
    """Strong contrast at half the size, mirrored to the old one."""
    mean = crops.mean((1, 2, 3), keepdim=True)
    strong = (mean + (crops - mean) * CONTRAST).clamp(0, 1)
    height, width = crops.shape[-2:]
    small = F.interpolate(strong, size=((height + 1) // 2, (width + 1) // 2), mode="area")
    wide = torch.cat([small, small.flip(-1)], -1)
    return torch.cat([wide, wide.flip(-2)], -2)[..., :height, :width]
