"""The codec's own objective, J = R + lambda * D, per image and differentiable."""

from collections.abc import Callable, Iterable
from typing import cast

import torch
from pytorch_msssim import ms_ssim
from torch import Tensor

from licq.quant import unchanged
from licq.quant.outputs import codec_output
from licq.support.errors import InputError

MS_SSIM_SIDE = 161  # pixels: the smallest side that MS-SSIM's five scales fit into


def rate(output: dict, x: Tensor) -> Tensor:
    """R: bits per pixel of each image, (B,): -log2 of the likelihoods of every latent, summed."""
    pixels = x.shape[-1] * x.shape[-2]
    likelihoods = codec_output(output)["likelihoods"]
    bits = sum(-torch.log2(p).flatten(1).sum(1) for p in likelihoods.values())
    return cast(Tensor, bits) / pixels


class Objective:
    """J of each image.

    Images (B, 5, H, W) of a variable-rate codec bring their own lambda in the fifth channel
    (`models.qvrf.VariableRate`).

    Args:
        lmbda: weight of the distortion, of images that do not bring their own.
        metric: "mse": D = 255^2 * mse with samples in 0..1; "ms-ssim": D = 1 - MS-SSIM.

    Raises:
        InputError: a lambda that is not positive, an unknown metric.
    """

    def __init__(self, lmbda: float, metric: str = "mse"):
        if metric not in ("mse", "ms-ssim"):
            raise InputError(f"`metric` {metric} is unknown; choose mse or ms-ssim")
        if not lmbda > 0:
            raise InputError(
                f"`lmbda` {lmbda} is not positive; give the lambda that the codec was trained with"
            )
        self.lmbda, self.metric = lmbda, metric

    def distortion(self, output: dict, x: Tensor) -> Tensor:
        """lambda * D of each image, (B,); the reconstruction is clipped to 0..1 as a decoder does."""
        return self.unclipped_distortion(output["x_hat"].clamp(0, 1), x)

    def unclipped_distortion(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """lambda * D of each image, (B,), for x_hat as it is."""
        lmbda = self.lmbda
        if x.shape[1] > 3:
            x, lmbda = x[:, :3], x[:, 4, 0, 0].detach()
        if self.metric == "mse":
            return lmbda * 255**2 * (x_hat - x).square().flatten(1).mean(1)
        return lmbda * (1 - ms_ssim(x_hat, x, data_range=1.0, size_average=False))

    def __call__(self, output: dict, x: Tensor) -> Tensor:
        """J of each image, (B,). output: {"x_hat", "likelihoods"} of a codec; x: (B, 3, H, W) in 0..1."""
        return rate(output, x) + self.distortion(output, x)


@torch.no_grad()
def mean_cost(codec: Callable[[Tensor], dict], batches: Iterable[Tensor], objective: Objective) -> float:
    """Mean J over all images of the batches, summed in double precision."""
    with unchanged.everything():
        return float(torch.cat([objective(codec(batch), batch) for batch in batches]).double().mean())
