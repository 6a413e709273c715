"""Weights that keep a layer's outputs in flat areas, where rounding errors do not average out.

On a photograph the rounding of a layer's inputs is noise: it differs from position to position. In a flat
area every position has the same inputs, so it has the same error, and the next layer adds that up over its
taps. The errors of a dozen pictures are few against a layer's weights. A small change of the weights takes
them back, and hardly shows on photographs: it is found by least squares on both, before the weights are
rounded.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from licq.quant.layers import QuantLinear
from licq.quant.mac import QuantMAC
from licq.quant.model import QuantModel
from licq.quant.qtensor import QTensor
from licq.quant.runtime import detached
from licq.reconstruction.columns import columns, output_size, phases
from licq.reconstruction.targets import tensor_of

WEIGHT = 0.1  # of the error in flat areas beside that on photographs
_POSITIONS = 64  # of each flat picture; most lie inside, some at a border
_DAMPING = 1e-3  # of the mean diagonal
_ROWS = 1024  # of a matrix that are taken in float64 at a time
_REFINEMENTS = 6
_EXACT = 1e-6  # what may be left of an equation's right side


class Area(NamedTuple):
    """What the weights of one phase of a layer meet in flat areas.

    inputs: (D, n), what the layer's weights are multiplied with at n positions: integers of its quantizer.
    outputs: (outputs, n), what the products should sum to.
    """

    inputs: Tensor
    outputs: Tensor


@torch.no_grad()
def in_order(
    qmodel: QuantModel, names: Sequence[str], pictures: Tensor, start: Callable[[str, Sequence[Area]], None]
) -> None:
    """Call `start` for each layer, in their order, with its areas behind a quantized prefix.

    One forward in float gives the outputs, one on integers the inputs: a layer is started where that forward
    comes to it, and then takes part in it. Latents are rounded as in float there: an error that rounds one to
    the other side is none that weights behind it could or should take back.

    Args:
        names: layers in the order of execution. All layers before them have been started.
        pictures: flat ones, (n, 3, H, W).
        start: (name, an area for each phase) -> None; called for layers that run once.
    """
    layers = {name: qmodel.layers[name] for name in names}
    last = (names[-1], 0)
    boundaries = {name: node for name, node in qmodel.nodes.items() if node.gives_latents}
    latents = {(name, call) for name, node in boundaries.items() for call in range(node.calls)}
    qmodel.quantize_nodes(False)
    with qmodel.runtime.recording({*((name, 0) for name in names), *latents}, stop_after=last) as targets:
        qmodel(pictures)
    qmodel.quantize_nodes(True)
    in_float = {call: detached(output) for call, output in targets.items() if call in latents}

    def watch(name: str, node: QuantMAC):
        def hook(_, inputs):
            start(name, _areas(node, inputs[0], tensor_of(targets[name, 0]), len(pictures)))

        return node.register_forward_pre_hook(hook)

    hooks = [watch(name, node) for name, node in layers.items() if node.calls == 1]
    try:
        with qmodel.runtime.replaying(in_float), qmodel.runtime.recording([], stop_after=last):
            qmodel(pictures)
    finally:
        for hook in hooks:
            hook.remove()
        qmodel.quantize_nodes(False)


def _areas(node: QuantMAC, x: QTensor, y: Tensor, count: int) -> list[Area]:
    """The areas of a layer's phases.

    Args:
        x: the layer's inputs on flat pictures, behind a quantized prefix.
        y: its outputs on them in float.
        count: of the pictures.
    """
    x_int, bias = node.weighted_numbers(x), node.float_bias()
    y = y.movedim(node.channel_dim, 0)
    if bias is not None:
        y = y - bias.reshape(-1, *[1] * (y.ndim - 1))
    if isinstance(node, QuantLinear):
        rows = x_int.reshape(-1, x_int.shape[-1])  # of windows, whose order is that of the pictures
        at = _spread(len(rows), count * _POSITIONS)
        return [Area(rows[at].T, y.flatten(1)[:, at])]
    size, areas = output_size(node, x_int), []
    for phase in phases(node):
        lengths = [len(range(f, n, s)) for f, n, s in zip(phase.first, size, phase.step)]
        positions = torch.unravel_index(_spread(math.prod(lengths), _POSITIONS), lengths)
        at = [index * s + f for index, s, f in zip(positions, phase.step, phase.first)]
        inputs = torch.cat([columns(node, image[0], phase, at) for image in x_int.split(1)], 1)
        areas.append(Area(inputs, y[(slice(None), slice(None), *at)].flatten(1)))
    return areas


def _spread(count: int, limit: int) -> Tensor:
    """At most `limit` of `count` indices, evenly spread."""
    return torch.arange(count) if count <= limit else torch.linspace(0, count - 1, limit).long()


def towards(weight: Tensor, moment: Tensor, area: Area) -> tuple[Tensor, Tensor]:
    """Real weights that give an area's outputs, and hardly other ones elsewhere.

    The change d has the smallest d H d^T + `WEIGHT` / n |(w + d) X - Y|^2.

    Args:
        weight: w, (outputs, D).
        moment: H of photographs, (D, D); it becomes the second result.
        area: X and Y, in the units in which w meets X.

    Returns:
        (w + d, H with the area's positions added).
    """
    x, y, counts = _different(area)
    share = WEIGHT / counts.sum()
    damping = _DAMPING * float(moment.diagonal().mean().clamp(min=1e-12))
    together = moment.addmm_(x * counts, x.T, alpha=float(share))
    error = weight.double() @ x.double() - y.double()
    right = (x.double() * (share * counts)) @ error.T
    return weight - _solved(together, damping, right).T.to(weight), together


def _different(area: Area) -> tuple[Tensor, Tensor, Tensor]:
    """(X, Y, how often each position is met): positions with equal inputs are taken once, with their mean
    output.

    Most of a flat area is of one kind.
    """
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(len(area.inputs), generator=generator, dtype=torch.float64).to(area.inputs.device)
    _, kind, counts = torch.unique(weights @ area.inputs.double(), return_inverse=True, return_counts=True)
    numbers = torch.arange(len(kind)).to(kind)
    first = numbers[: len(counts)].scatter_reduce(0, kind, numbers, "amin", include_self=False)
    outputs = area.outputs.new_zeros(len(area.outputs), len(counts)).index_add_(1, kind, area.outputs)
    return area.inputs[:, first], outputs / counts, counts.to(area.inputs)


def _solved(matrix: Tensor, damping: float, right: Tensor) -> Tensor:
    """The solution of (matrix + damping) d = right, float64.

    The factor is one of float32. What that leaves of the right side is solved again until it is next to
    nothing. Where it does not shrink, the matrix is too close to singular for float32, and float64 has to do.
    """
    damped = matrix.clone()
    damped.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(damped)
    del damped
    if not failed:
        solution, rest = torch.zeros_like(right), right
        start = size = float(torch.linalg.vector_norm(right))
        for _ in range(_REFINEMENTS):
            solution += torch.cholesky_solve(rest.to(factor), factor).double()
            rest = right - _times(matrix, solution) - damping * solution
            before, size = size, float(torch.linalg.vector_norm(rest))
            if size <= _EXACT * start:
                return solution
            if not size < before / 2:
                break
    del factor
    wide = matrix.double()
    wide.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(wide)
    # no photograph shows the layer anything: then the damping is next to nothing
    return torch.linalg.solve(wide, right) if failed else torch.cholesky_solve(right, factor)


def _times(matrix: Tensor, x: Tensor) -> Tensor:
    """matrix @ x in float64; of a wide layer a float64 copy of the matrix would take gigabytes."""
    return torch.cat([rows.double() @ x for rows in matrix.split(_ROWS)])
