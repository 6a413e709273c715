"""Codecs of a few channels with random weights whose latents move, and 8-bit images for them."""

import torch
from torch import Tensor, nn

from licq.models.registry import create_model

_SWIN = {"N": 8, "M": 8, "depths": (2, 1, 1, 1, 1), "num_heads": (2, 2, 2, 2, 2), "window_size": 4}
SIZES = {
    "balle2018": {"N": 6, "M": 8},
    "minnen2018-mean": {"N": 6, "M": 8},
    "minnen2018": {"N": 6, "M": 8},
    "cheng2020-anchor": {"N": 6},
    "cheng2020": {"N": 6},
    "cheng2019": {"N": 6},
    "chen2021": {"M": 8, "N2": 6},
    "qvrf-balle2018": {"N": 6, "M": 8},
    "qvrf-minnen2018": {"N": 6, "M": 8},
    "qvrf-cheng2020": {"N": 6},
    "balle2018-vbr": {"N": 6, "M": 8},
    "minnen2018-mean-vbr": {"N": 6, "M": 8},
    "minnen2018-vbr": {"N": 6, "M": 8},
    "lu2022": {"N": 8, "M": 16, "depths": (1, 1, 1, 1, 1, 1), "num_heads": (2, 2, 2, 2, 2, 2)},
    "tic": {**_SWIN, "causal_heads": 2},
}


OF_THE_RATE = ("gayn2zqstep", "QuantABCD", "scale_to_context")  # small networks of variable-rate codecs


def tiny_codec(name: str, seed: int = 0) -> nn.Module:
    """An untrained codec with weights and biases under which latents spread over a few units."""
    torch.manual_seed(seed)
    model = create_model(name, **SIZES[name])
    gain = {
        "balle2018": 3.0,
        "minnen2018-mean": 3.0,
        "minnen2018": 3.0,
        "lu2022": 0.4,
        "tic": 0.4,
        "chen2021": 0.7,
    }.get(name.removeprefix("qvrf-").removesuffix("-vbr"), 1.0)
    draw = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw)
        with torch.no_grad():
            if key.endswith("quantiles"):
                parameter[:, 0, 1] += 0.3
            elif (
                "entropy_bottleneck" in key
                or "entropy_func" in key
                or key.endswith(("beta", "gamma", "Gain"))
                or key.startswith(OF_THE_RATE)
            ):
                continue
            elif ".norm" in key:
                parameter.add_(0.2 * noise)
            elif parameter.ndim > 1:
                parameter.copy_(noise * (gain * parameter.shape[0] / parameter.numel()) ** 0.5)
            else:
                parameter.copy_(0.2 * noise)
    return model.eval()


def images(count: int, height: int = 64, width: int = 64, seed: int = 0) -> Tensor:
    """(count, 3, height, width), 8-bit samples over 255, smooth with some noise."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, height // 16, width // 16, generator=draw)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    noise = torch.rand(count, 3, height, width, generator=draw)
    return ((0.8 * smooth + 0.2 * noise) * 255).round() / 255
