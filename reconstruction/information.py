"""How much the code length rises with noise at a codec's boundaries, and how much noise rounding lets pass.

A code length is c(k; sigma) of a symbol k. Noise of small variance v in the scale sigma raises it by v/2
times the second derivative of c. Noise in a latent, or in its mean, makes some symbols other ones: those near
a boundary between two symbols. It raises the code length by v/2 times c(k+1) - 2 c(k) + c(k-1) for each of
these. Both are taken at the symbols that happen. Their squared gradients (the empirical Fisher information)
would take each improbable symbol for a large curvature. Expectations under the entropy model do not know that
improbable symbols happen more often than it says.

Rounding is not straight-through for noise, either. Only values near a boundary change with y, and what is
always rounded to its mean changes with the mean.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from licq.quant.boundaries import (
    QuantBoundary,
    QuantEntropyBottleneck,
    QuantGaussianConditional,
    QuantGaussianMixture,
    QuantRound,
    QuantVariableBottleneck,
)
from licq.quant.model import QuantModel
from licq.quant.qtensor import QTensor

NEAR = 0.125
"""A value so near to a boundary between two symbols counts as one that noise can carry over it."""

_RATIO = 0.05  # of a scale: the step of finite differences


@dataclasses.dataclass
class Information:
    """What `watching` has collected of one forward."""

    terms: list[tuple[Tensor, Tensor]] = dataclasses.field(default_factory=list)
    """(what the code length depends on, its curvature in nats), of the same shape."""

    def random_sum(self, generator: torch.Generator) -> Tensor | float:
        """A scalar whose squared gradients are in expectation the diagonal of the code length's Hessian, in
        nats (Hutchinson 1990)."""
        total: Tensor | float = 0.0
        for values, curvature in self.terms:
            total = total + (random_signs(values, generator) * curvature.sqrt() * values).sum()
        return total


def random_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """-1 and 1 of the shape of `like`."""
    return torch.randint(0, 2, like.shape, generator=generator).to(like) * 2 - 1


@contextlib.contextmanager
def watching(qmodel: QuantModel) -> Iterator[Information]:
    """While it lasts, boundaries of a codec in its float state give gradients that say what noise does.

    Latents have the gradients of `passed_by_rounding`. Likelihoods of Gaussian conditionals and of factorized
    densities have none: what they depend on is collected instead. Those of other entropy models keep theirs.
    """
    found = Information()

    def hook(node: QuantBoundary, args: tuple, output: Any) -> Any:
        if isinstance(node, QuantVariableBottleneck):
            return output  # its steps have another size in each image
        inputs = [_plain(part) for part in args]
        latent, *likelihoods = output if isinstance(output, tuple) else (output,)
        means = _means(node, inputs)
        terms = _terms(node, inputs, means)
        found.terms += terms
        passed = passed_by_rounding(inputs[0], means, _plain(latent))
        new = QTensor(passed, None, node.runtime, latent=True)
        if not likelihoods:
            return new
        return (new, *(part.detach() if terms else part for part in likelihoods))

    hooks = [node.register_forward_hook(hook) for node in qmodel.modules() if isinstance(node, QuantBoundary)]
    try:
        yield found
    finally:
        for handle in hooks:
            handle.remove()


def _plain(x: Any) -> Tensor:
    return x.real() if isinstance(x, QTensor) else x


def _means(node: QuantBoundary, inputs: list[Tensor]) -> Tensor | None:
    """What is subtracted before rounding."""
    if isinstance(node, QuantEntropyBottleneck):
        return node._medians_for(inputs[0])
    if isinstance(node, QuantGaussianMixture) or getattr(node, "rounds_whole", False):
        return None
    at = 1 if isinstance(node, QuantRound) else 2
    return inputs[at] if len(inputs) > at else None


def nearness(y: Tensor, means: Tensor | None) -> Tensor:
    """Density at the nearest boundary between two symbols, estimated from each value: 1 / (2 NEAR) or 0.

    Its mean is 1 where y - means is spread evenly, and 0 where it is always near to integers.
    """
    residual = (y if means is None else y - means).detach()
    return ((residual - torch.round(residual)).abs() > 0.5 - NEAR).to(y) / (2 * NEAR)


def passed_by_rounding(y: Tensor, means: Tensor | None, y_hat: Tensor) -> Tensor:
    """y_hat with gradients that are the root of what its error from y takes of noise in y and in the means.

    Where the residual is spread evenly between symbols the error takes all noise in y and nothing of that in
    the means. Where it is always rounded to zero it is the other way round.
    """
    near = nearness(y, means)
    passed = y_hat.detach() + near.sqrt() * (y - y.detach())
    if means is None or not means.requires_grad:
        return passed
    dims = [dim for dim in range(y.ndim) if dim != 1]
    held = (1 - near.mean(dims, keepdim=True)).clamp(min=0)
    return passed + held.sqrt() * (means - means.detach())


@torch.no_grad()
def _curvature(length: Callable[[float], Tensor], step: Tensor | float) -> Tensor:
    """The second derivative at 0 from the values at -1, 0, 1; what is negative counts as 0."""
    return ((length(1) + length(-1) - 2 * length(0)) / step**2).clamp(min=0)


def _terms(node: QuantBoundary, inputs: list[Tensor], means: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    y = inputs[0]
    if isinstance(node, QuantEntropyBottleneck):
        assert means is not None
        z_hat = torch.round(y - means) + means
        lengths = _curvature(lambda k: -torch.log(node._likelihood_of(z_hat + k)), 1.0)
        return [(y, nearness(y, means) * lengths)]
    if not isinstance(node, QuantGaussianConditional) or isinstance(node, QuantGaussianMixture):
        return []
    about = inputs[2] if len(inputs) > 2 else None
    location = y if about is None else y - about
    symbols = torch.round(y if means is None else y - means)
    whole = about if means is None else None  # of which the likelihood of whole symbols is
    bound = node.module.lower_bound_scale.bound
    assert isinstance(bound, Tensor)
    free = inputs[1] > bound.to(y)
    sigma = torch.where(free, inputs[1], bound.to(y)).detach()

    def length(symbols: Tensor, sigma: Tensor) -> Tensor:
        return -torch.log(node._likelihood_of(symbols, sigma, whole))

    of_location = nearness(y, means) * _curvature(lambda k: length(symbols + k, sigma), 1.0)
    of_scale = _curvature(lambda k: length(symbols, sigma * (1 + _RATIO * k)), _RATIO * sigma)
    return [(location, of_location), (inputs[1], torch.where(free, of_scale, 0.0))]
