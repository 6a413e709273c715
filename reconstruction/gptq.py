"""Where learned rounding starts: weights rounded one input at a time, each error made good by those still to come.

Frantar et al. 2023 (GPTQ, arXiv 2210.17323), after Optimal Brain Surgeon: with H = X X^T of a layer's inputs, rounding
column j of the weights by an error e costs least when the columns behind it move by -e [H^-1]_jk / [H^-1]_jj. Closed form and
without steps, so it takes seconds where learned rounding takes minutes. Inputs are the layer's own whole numbers; the
inputs of neighbouring positions of an image are alike, which leaves much that can be made good.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.config import FLOAT_BITS
from quant.fixedpoint import int_range, round_half_away
from quant.model import QuantModel
from quant.modules import QuantConv2d, QuantConvTranspose2d, QuantLinear, QuantMAC
from quant.qtensor import QTensor
from quant.rounding import LearnedOffset, StraightThrough
from support.errors import InputError
from support.progress import progress as progress_bar

MEMORY = 1 << 29  # bytes of matrices H held at a time
POSITIONS = 4096  # of an image that enter H, at most
DAMPING = 0.1  # of H's mean diagonal: what a few crops say about rare directions is not believed
_BLOCK = 128


@torch.no_grad()
def compensate_rounding(qmodel: QuantModel, batches: Sequence[Tensor], seed: int = 0, progress: bool = True) -> None:
    """Start the rounding of every convolution and linear layer of an observed model at GPTQ's whole numbers.

    Layers with groups keep rounding to nearest, so do those that the images show at fewer positions than an output has
    weights: H says too little there. Layers that learn offsets (eq. 14) or weights can start anywhere; AdaRound
    cannot, for it only chooses between the two neighbours.

    Args:
        batches: images (B, 3, H, W) in 0..1, from which the inputs of the layers come; on the float codec.

    Raises:
        InputError: the scheme of rounding cannot start there.
    """
    layers = {
        name: node
        for name, node in qmodel.nodes.items()
        if isinstance(node, (QuantConv2d, QuantConvTranspose2d, QuantLinear))
        and node.groups == 1
        and FLOAT_BITS not in (node.config.w_bits, node.config.a_bits)
    }
    for node in layers.values():
        if not isinstance(node.weight_quantizer.rounding, (LearnedOffset, StraightThrough)):
            raise InputError(f"round_init gptq does not go with rounding {node.config.rounding}; choose learned_offset or ste")
    qmodel.quantize_nodes(False)
    groups = list(_groups(layers))
    bar = progress_bar(total=len(groups) * len(batches) + len(layers), desc="compensating rounding", unit="step",
                       enabled=progress, leave=False)  # fmt: skip
    with bar:
        for group in groups:
            generator = torch.Generator().manual_seed(seed)
            moments = {name: _Moment(node, generator) for name, node in group.items()}
            hooks = [node.register_forward_pre_hook(moments[name].watch) for name, node in group.items()]
            try:
                for batch in batches:
                    qmodel(batch)
                    bar.update()
            finally:
                for hook in hooks:
                    hook.remove()
            for name, node in group.items():
                moment = moments.pop(name)
                if moment.count >= node.float_weight()[0].numel():
                    _start_rounding(node, moment.value())
                bar.update()


def _groups(layers: dict[str, QuantMAC]) -> Iterator[dict[str, QuantMAC]]:
    group: dict[str, QuantMAC] = {}
    size = 0
    for name, node in layers.items():
        own = 4 * node.float_weight()[0].numel() ** 2
        if group and size + own > MEMORY:
            yield group
            group, size = {}, 0
        group[name] = node
        size += own
    if group:
        yield group


class _Moment:
    """H = mean of x x^T over the columns x that a layer's weights meet, in whole numbers of its input grid."""

    def __init__(self, node: QuantMAC, generator: torch.Generator):
        self.node, self.generator, self.total, self.count = node, generator, 0.0, 0

    def watch(self, _, inputs: tuple) -> None:
        x = inputs[0]
        values = x.real() if isinstance(x, QTensor) else x
        whole = self.node.input_grid(QTensor(values, None, self.node.runtime)).q
        if isinstance(self.node, QuantLinear):
            rows = whole.reshape(-1, whole.shape[-1])
            self._add(rows[self._some(len(rows), POSITIONS * len(whole))].T)
            return
        height, width = output_size(self.node, whole)
        for image in whole.split(1):
            self._add(columns(self.node, image, self._some(height * width, POSITIONS))[0])

    def _some(self, count: int, most: int) -> Tensor:
        if count <= most:
            return torch.arange(count)
        return torch.randint(count, (most,), generator=self.generator)

    def _add(self, found: Tensor) -> None:
        self.total = self.total + found @ found.T
        self.count += found.shape[1]

    def value(self) -> Tensor:
        return self.total / max(self.count, 1)


def output_size(node: QuantMAC, x: Tensor) -> tuple[int, int]:
    """Height and width of a convolution's output."""
    m = node.module
    size = []
    for axis, length in enumerate(x.shape[-2:]):
        reach = m.dilation[axis] * (m.kernel_size[axis] - 1)
        if isinstance(node, QuantConvTranspose2d):
            size.append((length - 1) * m.stride[axis] - 2 * m.padding[axis] + reach + m.output_padding[axis] + 1)
        else:
            size.append((length + 2 * m.padding[axis] - reach - 1) // m.stride[axis] + 1)
    return size[0], size[1]


def columns(node: QuantMAC, x: Tensor, positions: Tensor) -> Tensor:
    """What a convolution's flattened canonical weights are multiplied with at these output positions (row by row).

    Args:
        x: (B, inputs, H, W).
        positions: (n,) of output height * width.

    Returns:
        (B, inputs * taps, n).
    """
    m, width = node.module, output_size(node, x)[1]
    centres, steps, first, edges = (positions // width, positions % width), m.stride, [], []
    if isinstance(node, QuantConvTranspose2d):
        # the convolution that a transposed one is: zeros between the inputs, the kernel turned round
        spread = x.new_zeros(*x.shape[:2], *((size - 1) * step + 1 for size, step in zip(x.shape[-2:], m.stride)))
        spread[..., :: m.stride[0], :: m.stride[1]] = x
        x, steps = spread, (1, 1)
    for axis in (0, 1):
        reach = m.dilation[axis] * (m.kernel_size[axis] - 1)
        transposed = isinstance(node, QuantConvTranspose2d)
        before = reach - m.padding[axis] if transposed else m.padding[axis]
        taps = torch.arange(m.kernel_size[axis]) * m.dilation[axis]
        first.append(centres[axis] * steps[axis] + (reach - taps if transposed else taps)[:, None])  # (taps, n)
        edges = [before, before + (m.output_padding[axis] if transposed else 0), *edges]
    x = F.pad(x, edges)
    places = first[0][:, None] * x.shape[-1] + first[1][None]  # (rows, columns, n)
    found = x.flatten(2)[:, :, places.to(x.device)]
    return found.reshape(x.shape[0], -1, len(positions))


def _start_rounding(node: QuantMAC, moment: Tensor) -> None:
    quantizer = node.weight_quantizer
    weight, reference = node.folded_weight()
    scale = quantizer.scale(weight, node.least_scale(reference))
    real = (weight / quantizer._view(scale, weight)).float()
    kept = None if quantizer.mask is None else (quantizer.mask != 0).expand(weight.shape).flatten(1)
    whole = gptq(real.flatten(1), moment, int_range(quantizer.bits), kept).reshape(weight.shape)
    rounding = quantizer.rounding
    rounding.v.data = whole - real if isinstance(rounding, LearnedOffset) else whole.clone()


def gptq(weight: Tensor, moment: Tensor, limits: tuple[int, int], kept: Tensor | None = None, damping: float = DAMPING) -> Tensor:
    """Whole numbers (outputs, D) near real weights of that shape, with a small error in (w_int - w) H (w_int - w)^T.

    Args:
        moment: H, (D, D).
        limits: smallest and largest whole number.
        kept: (outputs, D) False where a weight is masked and stays 0.
    """
    if kept is not None and not kept.any(0).all():
        free = kept.any(0)
        whole = torch.zeros_like(weight)
        whole[:, free] = gptq(weight[:, free], moment[free][:, free], limits, kept[:, free], damping)
        return whole
    alive = moment.diagonal() > 0
    h = moment.double()
    h.diagonal().add_(damping * h.diagonal()[alive].mean() if alive.any() else 1.0)
    order = h.diagonal().argsort(descending=True, stable=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True).to(weight.dtype)
    work = weight[:, order].clone()
    kept = None if kept is None else kept[:, order]
    whole = torch.empty_like(work)
    for start in range(0, work.shape[1], _BLOCK):
        stop = min(start + _BLOCK, work.shape[1])
        errors = torch.empty_like(work[:, start:stop])
        for j in range(start, stop):
            column = round_half_away(work[:, j]).clamp(*limits)
            if kept is not None:
                column = torch.where(kept[:, j], column, 0.0)
            whole[:, j] = column
            error = (work[:, j] - column) / upper[j, j]
            work[:, j + 1:stop] -= error[:, None] * upper[j, j + 1:stop]
            errors[:, j - start] = error
        work[:, stop:] -= errors @ upper[start:stop, stop:]
    result = torch.empty_like(whole)
    result[:, order] = whole
    return result
