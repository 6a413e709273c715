"""A narrower codec from a trained one, as the start of its training.

Channels are removed one at a time. The others predict a part of each channel; the next one to go is the
channel whose other part matters least to the following layer. What the others predict of it is folded into
that layer's weights by least squares (as in Luo et al., "ThiNet", ICCV 2017, without its sampling). The mean
energy of removed channels is folded into the offsets of GDN. Of the latents, the channels with the largest
shares of the rate stay.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from compressai.layers import GDN
from torch import Tensor, nn


class Moments:
    """First and second moments of C channels, over batches, images and positions, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.sum = self.products = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Count a batch (B, C, H, W)."""
        rows = x.detach().transpose(0, 1).flatten(1).double()
        self.count += rows.shape[1]
        self.sum = self.sum + rows.sum(1)
        self.products = self.products + rows @ rows.T

    @property
    def mean(self) -> Tensor:
        """(C,)."""
        return self.sum / self.count

    @property
    def energy(self) -> Tensor:
        """Mean squares, (C,)."""
        return self.products.diagonal() / self.count

    @property
    def covariance(self) -> Tensor:
        """(C, C)."""
        return self.products / self.count - torch.outer(self.mean, self.mean)


def _regularized(covariance: Tensor) -> Tensor:
    return covariance + (1e-6 * covariance.diagonal().mean() + 1e-12) * torch.eye(
        len(covariance), dtype=covariance.dtype
    )


def choose_channels(covariance: Tensor, effect: Tensor, count: int) -> list[int]:
    """Which channels stay.

    The variance of a channel that the others do not predict is the inverse of its diagonal entry in the
    inverse covariance.

    Args:
        covariance: of the channels, (C, C).
        effect: the squared norms of the weights that read each channel, (C,).
        count: of channels that stay.

    Returns:
        Their indexes, ascending.
    """
    channels = list(range(len(covariance)))
    precision = torch.linalg.inv(_regularized(covariance))
    while len(channels) > count:
        weakest = int((effect[channels] / precision.diagonal()).argmin())
        column = precision[:, weakest]
        precision = precision - torch.outer(column, column) / column[weakest]
        rest = [index for index in range(len(channels)) if index != weakest]
        precision, channels = precision[rest][:, rest], [channels[index] for index in rest]
    return channels


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))


def _weight(conv: Any) -> Tensor:
    """The weights (out, in, height, width) of either kind of convolution, in float64."""
    weight = conv.weight.detach().double()
    return weight.transpose(0, 1) if isinstance(conv, nn.ConvTranspose2d) else weight


def _effect(conv: Any) -> Tensor:
    """The squared norms of the weights that read each input channel."""
    return _weight(conv).square().sum((0, 2, 3))


class _Narrower:
    """The narrow codec's tensors, layer by layer, in `state`.

    Args:
        wide, narrow: the codecs.
        moments: of the inputs of the wide codec's convolutions and GDNs, by name.
    """

    def __init__(self, wide: nn.Module, narrow: nn.Module, moments: dict[str, Moments]):
        self.wide, self.narrow, self.moments = wide, narrow, moments
        self.state: dict[str, Tensor] = {}

    def conv(self, name: str, inputs: list[int] | None, outputs: list[int] | None) -> None:
        """A convolution that reads and writes these channels; None: all."""
        conv: Any = self.wide.get_submodule(name)
        weight, bias = _weight(conv), conv.bias.detach().double()
        if inputs is not None:
            gone = [index for index in range(weight.shape[1]) if index not in set(inputs)]
            moments = self.moments[name]
            inner = _regularized(moments.covariance[inputs][:, inputs])
            slopes = torch.linalg.solve(inner, moments.covariance[inputs][:, gone]).T
            offsets = moments.mean[gone] - slopes @ moments.mean[inputs]
            # at each output position, a transposed convolution reads one in stride^2 of its taps
            share = conv.stride[0] ** -2 if isinstance(conv, nn.ConvTranspose2d) else 1
            bias = bias + share * torch.einsum("oghw,g->o", weight[:, gone], offsets)
            weight = weight[:, inputs] + torch.einsum("oghw,gi->oihw", weight[:, gone], slopes)
        if outputs is not None:
            weight, bias = weight[outputs], bias[outputs]
        if isinstance(conv, nn.ConvTranspose2d):
            weight = weight.transpose(0, 1)
        mask = getattr(self.narrow.get_submodule(name), "mask", None)
        self.state[f"{name}.weight"] = weight if mask is None else weight * mask
        self.state[f"{name}.bias"] = bias

    def gdn(self, name: str, channels: list[int]) -> None:
        """A GDN of these channels."""
        gdn: Any = self.wide.get_submodule(name)
        beta, gamma = (
            reparam(part).detach().double()
            for reparam, part in ((gdn.beta_reparam, gdn.beta), (gdn.gamma_reparam, gdn.gamma))
        )
        gone = [index for index in range(len(beta)) if index not in set(channels)]
        beta = beta[channels] + gamma[channels][:, gone] @ self.moments[name].energy[gone]
        narrow: Any = self.narrow.get_submodule(name)
        self.state[f"{name}.beta"] = narrow.beta_reparam.init(beta.float())
        self.state[f"{name}.gamma"] = narrow.gamma_reparam.init(gamma[channels][:, channels].float())

    def chain(self, prefix: str, inputs: list[int] | None, outputs: list[int] | None) -> None:
        """A sequence of layers that reads and writes these channels; None: all."""
        layers: Any = self.wide.get_submodule(prefix)
        convs = [index for index, layer in enumerate(layers) if _is_conv(layer)]
        for index, following in zip(convs, [*convs[1:], None], strict=True):
            channels = outputs
            if following is not None:
                name = f"{prefix}.{following}"
                reader: Any = self.narrow.get_submodule(name)
                channels = choose_channels(
                    self.moments[name].covariance, _effect(layers[following]), reader.in_channels
                )
            self.conv(f"{prefix}.{index}", inputs, channels)
            if channels is not None and index + 1 < len(layers) and isinstance(layers[index + 1], GDN):
                self.gdn(f"{prefix}.{index + 1}", channels)
            inputs = channels


def narrow(wide: nn.Module, target: nn.Module, batches: Iterable[Tensor]) -> set[str]:
    """Fill a narrow codec from a wide one, both hyperprior codecs of CompressAI's kinds.

    Their analysis, synthesis and hyper analysis must have the same layers. A hyper synthesis or context model
    that only one of them has keeps the values of `target`.

    Args:
        wide: trained.
        target: gets the weights.
        batches: images (B, 3, H, W) in 0..1, for statistics.

    Returns:
        The names of the tensors that were filled.
    """
    moments: dict[str, Moments] = {}
    hooks = []
    for name, module in wide.named_modules():
        if _is_conv(module) or isinstance(module, GDN):
            moments[name] = Moments()
            hooks.append(module.register_forward_pre_hook(partial(_count, moments[name])))
    rates: dict[str, Tensor] = {"y": torch.zeros(()), "z": torch.zeros(())}
    wide.eval()
    with torch.no_grad():
        for x in batches:
            for key, likelihoods in wide(x)["likelihoods"].items():
                rates[key] = rates[key] - likelihoods.log2().sum((0, 2, 3))
    for hook in hooks:
        hook.remove()

    source, narrower, state = _any(wide), _any(target), _Narrower(wide, target, moments)
    y, z = (
        sorted(rates[key].topk(count).indices.tolist())
        for key, count in (("y", narrower.M), ("z", narrower.N))
    )
    state.chain("g_a", None, y)
    state.chain("g_s", y, None)
    state.chain("h_a", y, z)
    if all(hasattr(model, "context_prediction") for model in (wide, target)):
        first, half = source.entropy_parameters[0], 2 * source.M
        covariance, effect = moments["entropy_parameters.0"].covariance, _effect(first)
        hyper = choose_channels(covariance[:half, :half], effect[:half], 2 * narrower.M)
        context = choose_channels(covariance[half:, half:], effect[half:], 2 * narrower.M)
        state.chain("h_s", z, hyper)
        state.conv("context_prediction", y, context)
        state.chain(
            "entropy_parameters",
            hyper + [half + index for index in context],
            y + [source.M + index for index in y],
        )
    filled = state.state
    for name, tensor in wide.state_dict().items():
        if name.startswith("entropy_bottleneck.") and tensor.ndim == 3:
            filled[name] = tensor[z]
    target.load_state_dict(
        {**target.state_dict(), **{name: tensor.float() for name, tensor in filled.items()}}
    )
    return set(filled)


def _any(model: nn.Module) -> Any:
    """The model without a type: its sizes and layers are attributes that nn.Module does not declare."""
    return model


def _count(moments: Moments, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """A hook that counts what a layer reads."""
    moments.add(inputs[0])
