"""One image coded as a measurement: its file, what the file decodes to, and the rate that the model
estimates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from licq.codec.parts import Latent
from licq.codec.tables import STEP_OF_Z_BITS
from licq.quant.boundaries import QuantBoundary
from licq.quant.model import QuantModel
from licq.support.errors import InputError


@dataclass(frozen=True)
class MeasuredImage:
    """What `Codec.measure` has found.

    data:           the content of the .licq file.
    pixels:         what it decodes to, uint8 of the image's shape.
    estimated_bits: of the symbols under the model's likelihoods, with those of the margins; None where the
        forward estimates the rate of other symbols than those that are coded.
    """

    data: bytes
    pixels: Tensor
    estimated_bits: float | None


def estimated_bits(
    model: QuantModel, latents: Sequence[Latent], values: Sequence[Mapping[str, np.ndarray]]
) -> float | None:
    """The rate of an image in bits by the likelihoods of the entropy models, in float: the estimate of the
    quantized model's forward, to rounding.

    Args:
        latents: of the image's plan.
        values: their symbols and densities, as the plan's encoder gives them.

    Returns:
        None where the forward estimates the rate of other symbols than those that are coded.
    """
    if not all(latent.estimated for latent in latents):
        return None
    nodes = {node.name: node for node in model.nodes.values()}
    total = 0.0
    with torch.no_grad():
        for latent, integers in zip(latents, values, strict=True):
            node = nodes[latent.node]
            assert isinstance(node, QuantBoundary)
            device = next(node.module.parameters(), torch.empty(0)).device
            symbols, *densities = (
                torch.from_numpy(np.ascontiguousarray(integers[name])).to(device)
                for name in ("symbols", *latent.densities)
            )
            step = None
            if latent.step is not None:
                step = torch.full((1, 1, 1, 1), latent.step / 2**STEP_OF_Z_BITS, device=device)
            likelihoods = node.likelihood_of_coded(symbols, dict(zip(latent.densities, densities)), step)
            total -= float(torch.log2(likelihoods.double()).sum())
    return total


def check_decoded(
    latents: Sequence[Latent],
    values: Sequence[Mapping[str, np.ndarray]],
    found: Sequence[Mapping[str, np.ndarray]],
    bits: int,
) -> None:
    """Check that a decoder has the numbers of the encoder: symbols, densities and y_hat, from which the
    pixels follow.

    Args:
        values: symbols and densities, as the plan's encoder gives them.
        found: see `Coder.decode`.
        bits: means and y_hat are integers in units of 2^-bits.

    Raises:
        InputError: some differ.
    """
    for latent, own, other in zip(latents, values, found, strict=True):
        expected = dict(own)
        if "y_hat" in other:
            expected["y_hat"] = own["symbols"].astype(np.int32) << bits
            if not latent.whole and "means" in own:
                expected["y_hat"] = expected["y_hat"] + own["means"]
        for name, numbers in other.items():
            if not np.array_equal(numbers.reshape(-1), expected[name].reshape(-1)):
                raise InputError(
                    f"the decoder's {name} of {latent.node} are not the encoder's; this is a defect, please "
                    "report it"
                )
