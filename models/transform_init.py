"""A start for training lu2022: the transforms as a hierarchical principal component analysis, the rest near zero.

Without it a small budget is spent on finding a transform at all. The blocks of TinyLIC are shortcuts around small
branches, so with the branches at zero g_a and g_s are products of their four strided (transposed) convolutions. Each is
set to the principal components of 2x2 patches of the stage before (orthonormal, most energy first), g_s to the
transposes: a linear transform codec, like a KLT over 16x16 pixels. Training then bends it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.lu2022 import TinyLIC


@torch.no_grad()
def initialize_transforms(model: TinyLIC, images: Tensor, lmbda: float) -> None:
    """Set g_a, g_s and the last biases of the entropy parameters in place.

    Args:
        model: freshly made.
        images: (B, 3, H, W) in 0..1, a sample of the training data.
        lmbda: weight of 255^2 * mse against bits per pixel. At high rate the best uniform step obeys
            dD/dR = -2 ln2 D = -1 / lambda with D = step^2 / 12, in units of 1/255; y is scaled so that this step is 1.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(("attn.proj.weight", "attn.proj.bias", "mlp.fc2.weight", "mlp.fc2.bias")):
            nn.init.zeros_(parameter)
    mean = images.mean(dim=(0, 2, 3))
    x = images - mean[:, None, None]
    step = math.sqrt(12 / (2 * math.log(2) * lmbda)) / 255
    analysis = [model.g_a0, model.g_a2, model.g_a4, model.g_a6]
    synthesis = [model.g_s7, model.g_s5, model.g_s3, model.g_s1]
    for index, (conv, deconv) in enumerate(zip(analysis, synthesis)):
        outputs, inputs, kernel, _ = conv.weight.shape
        components, x = principal_components(x, outputs)
        # every transform block is x + (x + branches) with its branches at zero: it doubles, the filters halve
        gain = 1 / step if index == 3 else 1.0
        first = kernel // 2  # the tap that meets the even pixel of a pair
        window = (slice(None), slice(None), slice(first, first + 2), slice(first, first + 2))
        conv.weight.normal_(std=1e-3)
        deconv.weight.normal_(std=1e-3)
        conv.weight[window] += components.reshape(-1, inputs, 2, 2) * gain / 2
        deconv.weight[window] += components.reshape(-1, inputs, 2, 2) / gain / 2
        nn.init.zeros_(conv.bias)
        nn.init.zeros_(deconv.bias)
    model.g_a0.bias -= model.g_a0.weight.sum((2, 3)) @ mean
    model.g_s7.bias += mean

    # y has these deviations now; an entropy model that starts at the bound of its scales would see no gradient
    deviations = (x / step).pow(2).mean(dim=(0, 2, 3)).sqrt().split(model.slices)
    for index, deviation in enumerate(deviations, 1):
        last = getattr(model, f"entropy_parameters_{index}")[-1]
        last.weight.mul_(0.1)
        last.bias[: len(deviation)] = deviation.clamp(min=0.3)
        last.bias[len(deviation) :] = 0


def principal_components(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(components, coefficients) of 2x2 patches of x (B, C, H, W): (count, 4C) orthonormal rows and (B, count, H/2, W/2).

    With more components than the 4C dimensions the rest are zero.
    """
    patches = F.unfold(x, 2, stride=2)
    dimensions = patches.shape[1]
    rows = patches.transpose(0, 1).reshape(dimensions, -1)
    _, vectors = torch.linalg.eigh((rows @ rows.T / rows.shape[1]).double())
    components = vectors.flip(1).T[:count].float()
    if count > dimensions:
        components = torch.cat([components, components.new_zeros(count - dimensions, dimensions)])
    coefficients = torch.einsum("kd,bdn->bkn", components, patches)
    return components, coefficients.reshape(x.shape[0], count, x.shape[2] // 2, x.shape[3] // 2)
