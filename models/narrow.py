"""A narrower codec from a trained one, as a start for training.

Channels go one at a time, always the one whose part that the others do not predict costs the next layer
least; what they do predict is folded into that layer's weights (least squares, as in Luo et al., "ThiNet",
ICCV 2017, without its sampling), and the mean energy of the channels that are gone into the offsets of GDN.
Latents stay by their share of the rate.
"""

from collections.abc import Iterable

import torch
from compressai.layers import GDN
from torch import Tensor, nn


class Moments:
    """First and second moments of channels over batches, images and positions."""

    def __init__(self) -> None:
        self.count, self.sum, self.products = 0, 0.0, 0.0

    def add(self, x: Tensor) -> None:
        rows = x.detach().transpose(0, 1).flatten(1).double()
        self.count += rows.shape[1]
        self.sum = self.sum + rows.sum(1)
        self.products = self.products + rows @ rows.T

    @property
    def mean(self) -> Tensor:
        return self.sum / self.count

    @property
    def energy(self) -> Tensor:
        return self.products.diagonal() / self.count

    @property
    def covariance(self) -> Tensor:
        return self.products / self.count - torch.outer(self.mean, self.mean)


def _regularized(covariance: Tensor) -> Tensor:
    return covariance + (1e-6 * covariance.diagonal().mean() + 1e-12) * torch.eye(
        len(covariance), dtype=covariance.dtype
    )


def choose_channels(covariance: Tensor, effect: Tensor, count: int) -> list[int]:
    """The `count` channels to keep, ascending.

    covariance: (C, C). effect: (C,), squared norms of the weights that read each channel. The variance of a
    channel that the others leave unexplained is the inverse of its entry in the inverse covariance.
    """
    kept = list(range(len(covariance)))
    precision = torch.linalg.inv(_regularized(covariance))
    while len(kept) > count:
        out = int((effect[kept] / precision.diagonal()).argmin())
        column = precision[:, out]
        precision = precision - torch.outer(column, column) / column[out]
        rest = [index for index in range(len(kept)) if index != out]
        precision, kept = precision[rest][:, rest], [kept[index] for index in rest]
    return kept


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))


def _weight(conv: nn.Module) -> Tensor:
    """(out, in, height, width) of either kind of convolution, in float64."""
    weight = conv.weight.detach().double()
    return weight.transpose(0, 1) if isinstance(conv, nn.ConvTranspose2d) else weight


def _effect(conv: nn.Module) -> Tensor:
    return _weight(conv).square().sum((0, 2, 3))


class _Narrower:
    def __init__(self, wide: nn.Module, narrow: nn.Module, moments: dict[str, Moments]):
        self.wide, self.narrow, self.moments = wide, narrow, moments
        self.state: dict[str, Tensor] = {}

    def conv(self, name: str, inputs: list[int] | None, outputs: list[int] | None) -> None:
        conv = self.wide.get_submodule(name)
        weight, bias = _weight(conv), conv.bias.detach().double()
        if inputs is not None:
            gone = [index for index in range(weight.shape[1]) if index not in set(inputs)]
            moments = self.moments[name]
            inner = _regularized(moments.covariance[inputs][:, inputs])
            slopes = torch.linalg.solve(inner, moments.covariance[inputs][:, gone]).T
            offsets = moments.mean[gone] - slopes @ moments.mean[inputs]
            # a transposed convolution reads, at each of its output positions, one in stride^2 of the taps
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

    def gdn(self, name: str, kept: list[int]) -> None:
        gdn = self.wide.get_submodule(name)
        beta, gamma = (
            reparam(part).detach().double()
            for reparam, part in ((gdn.beta_reparam, gdn.beta), (gdn.gamma_reparam, gdn.gamma))
        )
        gone = [index for index in range(len(beta)) if index not in set(kept)]
        beta = beta[kept] + gamma[kept][:, gone] @ self.moments[name].energy[gone]
        narrow = self.narrow.get_submodule(name)
        self.state[f"{name}.beta"] = narrow.beta_reparam.init(beta.float())
        self.state[f"{name}.gamma"] = narrow.gamma_reparam.init(gamma[kept][:, kept].float())

    def chain(self, prefix: str, inputs: list[int] | None, outputs: list[int] | None) -> None:
        layers = self.wide.get_submodule(prefix)
        convs = [index for index, layer in enumerate(layers) if _is_conv(layer)]
        for index, following in zip(convs, [*convs[1:], None], strict=True):
            kept = outputs
            if following is not None:
                name = f"{prefix}.{following}"
                width = self.narrow.get_submodule(name).in_channels
                kept = choose_channels(self.moments[name].covariance, _effect(layers[following]), width)
            self.conv(f"{prefix}.{index}", inputs, kept)
            if index + 1 < len(layers) and isinstance(layers[index + 1], GDN):
                self.gdn(f"{prefix}.{index + 1}", kept)
            inputs = kept


def narrow(wide: nn.Module, target: nn.Module, batches: Iterable[Tensor]) -> set[str]:
    """Fill `target` from `wide`, both of CompressAI's hyperprior kinds, with statistics from batches (B, 3,
    H, W) in 0..1.

    Gives the names of what it filled. Their analysis, synthesis and hyper analysis must have equal layers; a
    hyper synthesis or context model that only one of them has keeps the target's own values.
    """
    moments: dict[str, Moments] = {}
    hooks = []
    for name, module in wide.named_modules():
        if _is_conv(module) or isinstance(module, GDN):
            moments[name] = Moments()
            hooks.append(
                module.register_forward_pre_hook(lambda _, inputs, into=moments[name]: into.add(inputs[0]))
            )
    rates = {"y": 0.0, "z": 0.0}
    wide.eval()
    with torch.no_grad():
        for x in batches:
            for key, likelihoods in wide(x)["likelihoods"].items():
                rates[key] = rates[key] - likelihoods.log2().sum((0, 2, 3))
    for hook in hooks:
        hook.remove()

    work = _Narrower(wide, target, moments)
    y, z = (
        sorted(rates[key].topk(count).indices.tolist()) for key, count in (("y", target.M), ("z", target.N))
    )
    work.chain("g_a", None, y)
    work.chain("g_s", y, None)
    work.chain("h_a", y, z)
    if all(hasattr(model, "context_prediction") for model in (wide, target)):
        first, half = wide.entropy_parameters[0], 2 * wide.M
        covariance, effect = moments["entropy_parameters.0"].covariance, _effect(first)
        hyper = choose_channels(covariance[:half, :half], effect[:half], 2 * target.M)
        context = choose_channels(covariance[half:, half:], effect[half:], 2 * target.M)
        work.chain("h_s", z, hyper)
        work.conv("context_prediction", y, context)
        work.chain(
            "entropy_parameters",
            hyper + [half + index for index in context],
            y + [wide.M + index for index in y],
        )
    for name, tensor in wide.state_dict().items():
        if name.startswith("entropy_bottleneck.") and tensor.ndim == 3:
            work.state[name] = tensor[z]
    target.load_state_dict(
        {**target.state_dict(), **{name: tensor.float() for name, tensor in work.state.items()}}
    )
    return set(work.state)
