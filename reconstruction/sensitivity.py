"""How much J rises with noise at the output of each layer, and the predicted loss of a quantized codec.

Rounding noise is small and white, so J rises by half its variance times the diagonal of J's Hessian. Both
halves of J have a Gauss-Newton term that needs first derivatives only: E[(d v.u / d a)^2] for random signs v
(Hutchinson 1990). Distortion: u are the pixels of x_hat, times the root of the distortion's curvature in a
pixel. Rate: u are latents, means and scales, times the roots of their code length's curvatures
(`reconstruction.information`).
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from licq.quant.config import FLOAT_BITS
from licq.quant.layers import PLAIN_LAYERS, QuantConvTranspose2d
from licq.quant.mac import QuantMAC
from licq.quant.model import QuantModel
from licq.quant.outputs import codec_output
from licq.quant.runtime import Call
from licq.reconstruction.information import random_signs, watching
from licq.reconstruction.objective import Objective
from licq.reconstruction.targets import tensor_of
from licq.support.progress import progress as progress_bar

PROBES = 2  # random sign images for each batch


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Of one multiply-accumulate layer."""

    curvature: Tensor
    """(outputs,) diagonal of the Hessian of J, or of the layer's relative squared error: summed over an
    output channel's positions, mean over images."""

    macs: float
    """Multiply-accumulate operations of the layer for one image."""

    energy: Tensor | None = None
    """(inputs,) mean square of each input channel, for a layer whose inputs stay in float. Other layers'
    input quantizers have observed it."""


def measure_sensitivities(
    qmodel: QuantModel,
    batches: Sequence[Tensor],
    objective: Objective | None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Sensitivity]:
    """The sensitivity of every convolution and linear layer of an observed model, on its float state.

    Args:
        batches: images (B, 3, H, W) in 0..1, all of one size.
        objective: J; None: each layer has the squared error of its own output, relative to the output's mean
            square, and all layers count alike.
        seed: of the random signs.
    """
    qmodel.quantize_nodes(False)
    layers = {name: node for name, node in qmodel.nodes.items() if isinstance(node, PLAIN_LAYERS)}
    calls = [(name, call) for name, node in layers.items() for call in range(node.calls)]
    generator = torch.Generator().manual_seed(seed)
    curvature: dict[str, Tensor] = {}
    macs: dict[str, float] = {}
    energies: dict[str, list[Tensor]] = {
        name: [] for name, node in layers.items() if node.config.a_bits == FLOAT_BITS
    }
    for number, batch in enumerate(
        progress_bar(batches, desc="measuring sensitivities", unit="batch", enabled=progress, leave=False)
    ):
        with _input_energies({name: layers[name] for name in energies}, energies):
            squares = (
                _squared_gradients(qmodel, batch, objective, calls, generator)
                if objective
                else _relative_errors(qmodel, batch, calls)
            )
        for (name, _), square in squares:
            node = layers[name]
            dim = node.channel_dim % square.ndim
            curvature[name] = curvature.get(name, 0) + square.movedim(dim, 0).flatten(1).sum(1).double()
            if not number:
                macs[name] = macs.get(name, 0.0) + operations(node, square)
    images = sum(map(len, batches))
    means = {name: torch.stack(seen).mean(0) for name, seen in energies.items() if seen}
    return {
        name: Sensitivity(value / images, macs[name], means.get(name)) for name, value in curvature.items()
    }


@contextlib.contextmanager
def _input_energies(layers: dict[str, QuantMAC], energies: dict[str, list[Tensor]]) -> Iterator[None]:
    """While it lasts, each call of a layer appends the mean square of its input channels."""

    def watch(name: str, dim: int):
        def hook(node, args):
            x = tensor_of(args[0]).detach()
            energies[name].append(x.movedim(dim, 0).flatten(1).square().mean(1).double())

        return hook

    hooks = [node.register_forward_pre_hook(watch(name, node.channel_dim)) for name, node in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _relative_errors(qmodel: QuantModel, batch: Tensor, calls: Sequence[Call]) -> list[tuple[Call, Tensor]]:
    """The diagonal of the Hessian of each output's own mean squared error over its mean square."""
    with qmodel.runtime.recording(calls) as record:
        qmodel(batch)
    outputs = {call: tensor_of(record[call]) for call in calls if call in record}
    return [
        (call, torch.full_like(a, 2 / (a[0].numel() * float(a.square().mean().clamp(min=1e-12)))))
        for call, a in outputs.items()
    ]


def _squared_gradients(
    qmodel: QuantModel, batch: Tensor, objective: Objective, calls: Sequence[Call], generator: torch.Generator
) -> list[tuple[Call, Tensor]]:
    """The diagonal of J's Hessian at the outputs of these calls, as far as J depends on them.

    A function of its own, so that its graph is freed on return.
    """
    with torch.enable_grad(), watching(qmodel) as boundaries, qmodel.runtime.recording(calls) as record:
        output = qmodel(batch.clone().requires_grad_(True))
        outputs = {call: tensor_of(record[call]) for call in calls if call in record}
        outputs = {call: tensor for call, tensor in outputs.items() if tensor.requires_grad}
        tensors = list(outputs.values())
        squares = [torch.zeros_like(tensor) for tensor in tensors]
        nats = 1 / (batch.shape[-1] * batch.shape[-2] * math.log(2))  # a nat of an image in bits per pixel
        x_hat = output["x_hat"].clamp(0, 1)
        likelihoods = codec_output(output)["likelihoods"].values()
        for _ in range(PROBES):
            signs = random_signs(x_hat, generator)
            per_pixel = _distortion_curvature(objective, x_hat.detach(), batch, signs)
            probe = (signs * x_hat * per_pixel.sqrt().reshape(-1, 1, 1, 1)).sum()
            lengths = boundaries.random_sum(generator)
            for p in likelihoods:
                if p.requires_grad:  # no boundary knows its expectation
                    lengths = lengths + (random_signs(p, generator) * torch.log(p)).sum()
            _add_squares(squares, probe + math.sqrt(nats) * lengths, tensors, 1 / PROBES)
    return list(zip(outputs, squares))


def _add_squares(squares: list[Tensor], scalar: Tensor, tensors: list[Tensor], factor: float) -> None:
    if not tensors or not scalar.requires_grad:
        return
    gradients = torch.autograd.grad(scalar, tensors, retain_graph=True, allow_unused=True)
    for square, gradient in zip(squares, gradients):
        if gradient is not None:
            square.addcmul_(gradient, gradient, value=factor)


@torch.no_grad()
def _distortion_curvature(
    objective: Objective, x_hat: Tensor, x: Tensor, signs: Tensor, step: float = 4 / 255
) -> Tensor:
    """(B,): the mean second derivative of lambda * D in a sample of x_hat.

    By a symmetric difference along the signs.
    """

    def distortion(sign: float) -> Tensor:
        # not clipped as a decoder does: at a black or white pixel the clipping would count as curvature
        return objective.unclipped_distortion(x_hat + sign * step * signs, x).double()

    second = (distortion(1) + distortion(-1) - 2 * distortion(0)) / step**2
    return (second.clamp(min=0) / x_hat[0].numel()).to(x_hat.dtype)


def operations(node: QuantMAC, output: Tensor) -> float:
    """Multiply-accumulate operations by which a layer makes an output of this shape, for one image of the
    batch."""
    positions = output[0].numel() / output.shape[node.channel_dim % output.ndim]
    return positions * taps(node) * node.float_weight().shape[1] * node.outputs


def taps(node: QuantMAC) -> float:
    """How many elements of the kernel meet an output position."""
    weight = node.float_weight()
    meeting = weight[0, 0].numel() if weight.ndim > 2 else 1
    if isinstance(node, QuantConvTranspose2d):
        meeting /= math.prod(cast(nn.ConvTranspose2d, node.module).stride)
    return meeting


def kernel_power(node: QuantMAC) -> Tensor:
    """(outputs, inputs / groups), float64: by how much white noise in an input channel shows in an output
    channel."""
    weight = node.float_weight()
    return (weight.square().flatten(2).mean(2) if weight.ndim > 2 else weight.square()).double() * taps(node)


@torch.no_grad()
def input_noise(node: QuantMAC, sensitivity: Sensitivity) -> Tensor:
    """(inputs,): the rise of J by rounding each input channel.

    s_x^2 / 12 through the squared weights, with the channel's own step s_x.
    """
    power = sensitivity.curvature[:, None] * kernel_power(node)
    per_input = power.reshape(node.groups, -1, power.shape[1]).sum(1).flatten()
    scale = node.input_grid.parameters_of_grid()[0] / node.input_grid.fine
    return 0.5 * scale.square() / 12 * per_input


@torch.no_grad()
def weight_noise(node: QuantMAC, sensitivity: Sensitivity) -> Tensor:
    """(outputs,): the rise of J by rounding the weights to nearest.

    s_w^2 / 12 through the mean squares of the inputs.
    """
    weight, reference = node.folded_weight()
    step = node.weight_quantizer.scale(weight, node.min_scale(reference)).expand(node.outputs)
    grid = node.input_grid
    if sensitivity.energy is not None:
        energy = sensitivity.energy
    else:
        energy = grid.energy.double() / (grid.parameters_of_grid()[0] / reference).square()
    total = node.per_input(energy.expand(weight.shape[1] * node.groups), weight).flatten(1).sum(1)
    return 0.5 * sensitivity.curvature * step.square() / 12 * total * taps(node)


def predicted_losses(
    qmodel: QuantModel, sensitivities: dict[str, Sensitivity]
) -> dict[str, dict[str, float]]:
    """The rise of J that rounding noise makes, without clipping.

    Returns:
        {layer: {"inputs": by rounding its inputs, "weights": by rounding its weights to nearest}}.
    """
    losses, nodes = {}, qmodel.layers
    for name, sensitivity in sensitivities.items():
        node = nodes[name]
        config = node.config
        losses[name] = {
            "inputs": 0.0
            if FLOAT_BITS == config.a_bits or node.input_grid.exact
            else float(input_noise(node, sensitivity).sum()),
            "weights": 0.0 if config.w_bits == FLOAT_BITS else float(weight_noise(node, sensitivity).sum()),
        }
    return losses
