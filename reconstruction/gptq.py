"""Where learned rounding starts: weights are rounded one input at a time, and those still to come compensate.

Frantar et al. 2023 (GPTQ, arXiv 2210.17323), after Optimal Brain Surgeon. With H = X X^T of a layer's inputs,
rounding column j of the weights by an error e costs least when the columns behind it move by
-e [H^-1]_jk / [H^-1]_jj. This is a closed form without steps, so it takes seconds where learned rounding
takes minutes. X holds the integers of the layer's input quantizer. The inputs of neighbouring positions of an
image are alike, so much of the error can be compensated.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from licq.quant import fused_rows
from licq.quant.config import FLOAT_BITS
from licq.quant.fixedpoint import int_range, round_half_away
from licq.quant.layers import PLAIN_LAYERS, QuantLinear
from licq.quant.mac import QuantMAC
from licq.quant.model import QuantModel
from licq.quant.qtensor import QTensor
from licq.quant.rounding import ROUNDINGS
from licq.quant.weights import per_output
from licq.reconstruction.columns import columns, output_size, phases
from licq.reconstruction.flat_areas import Area, in_order, towards
from licq.support.errors import InputError
from licq.support.progress import progress as progress_bar

MEMORY = 1 << 29  # bytes of matrices H held at a time
POSITIONS = 20_480  # of all images that enter H, where there are so many
DAMPING = 0.1  # of H's mean diagonal: what a few crops say about rare directions is not believed
_COLUMNS = 4  # or so many for each of its rows, if these are more
_RARE = 4  # with fewer positions than one for so many rows H says too little
_BLOCK = 128
_ROWS = 256  # of H that one product adds to
_IMAGE = 2  # layers that take as long to start as an image takes, about
_LARGE = 256  # rows of H from which float32 must do: damped as it is, it is far from singular


@torch.no_grad()
def compensate_rounding(
    qmodel: QuantModel,
    batches: Sequence[Tensor],
    flat: Sequence[Tensor] = (),
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Start the rounding of every convolution and linear layer of an observed model at GPTQ's integers.

    Layers with groups keep rounding to nearest. So do layers that the images show at much fewer positions
    than an output has weights: H says too little there. Layers that learn offsets (eq. 14) or weights can
    start anywhere. AdaRound cannot, for it only chooses between the two neighbours.

    Args:
        batches: images (B, 3, H, W) in 0..1, from which the inputs of the layers come; on the float codec.
        flat: flat pictures (B, 3, H, W), on whose areas the layers' outputs stay those of the float codec;
            see `reconstruction.flat_areas`.
        seed: of the positions that are drawn where there are more than enough.

    Raises:
        InputError: the scheme of rounding cannot start there.
    """
    layers: dict[str, QuantMAC] = {
        name: node
        for name, node in qmodel.nodes.items()
        if isinstance(node, PLAIN_LAYERS)
        and node.groups == 1
        and FLOAT_BITS not in (node.config.w_bits, node.config.a_bits)
    }
    for node in layers.values():
        if not node.weight_quantizer.rounding.starts_anywhere:
            able = " or ".join(name for name, scheme in ROUNDINGS.items() if scheme.starts_anywhere)
            raise InputError(
                f"`rounding` {node.config.rounding} cannot start at GPTQ's numbers; choose {able}"
            )
    qmodel.quantize_nodes(False)
    images = sum(map(len, batches))
    positions = _positions(qmodel, layers, batches[0][:1])
    layers = {
        name: node
        for name, node in layers.items()
        if _RARE * images * positions[name] >= min(len(phase.weights(node)) for phase in phases(node))
    }
    groups = list(_groups(layers))
    bar = progress_bar(
        total=len(groups) * (_IMAGE * images + bool(flat)) + len(layers),
        desc="compensating rounding",
        unit="step",
        enabled=progress,
        leave=False,
    )
    with bar:
        for group in groups:
            generator = torch.Generator().manual_seed(seed)
            moments = {name: _Moment(node, images, generator) for name, node in group.items()}
            hooks = [node.register_forward_pre_hook(moments[name].watch) for name, node in group.items()]
            try:
                for batch in batches:
                    qmodel(batch)
                    bar.update(_IMAGE * len(batch))
            finally:
                for hook in hooks:
                    hook.remove()

            def start(name: str, areas: Sequence[Area] | None = None, moments=moments) -> None:
                if name in moments:
                    _start_rounding(qmodel.layers[name], moments.pop(name), areas)
                    bar.update()

            if flat:
                in_order(qmodel, list(group), torch.cat(list(flat)), start)
                bar.update()
            for name in group:
                start(name)


def turned(batches: Sequence[Tensor]) -> list[Tensor]:
    """The images, their mirror images, and both turned by a quarter.

    H of ten crops alone is met too well by the rounding.
    """
    views = []
    for batch in batches:
        mirrored = batch.flip(-1)
        views += [batch, mirrored, batch.transpose(-1, -2).flip(-2), mirrored.transpose(-1, -2).flip(-2)]
    return views


def _positions(qmodel: QuantModel, layers: dict[str, QuantMAC], image: Tensor) -> dict[str, int]:
    """At how many output positions one image shows each layer."""
    calls = [(name, call) for name, node in layers.items() for call in range(node.calls)]
    with qmodel.runtime.recording(calls) as record:
        qmodel(image)
    positions = dict.fromkeys(layers, 0)
    for (name, _), output in record.items():
        positions[name] += output.numel() // layers[name].outputs
    return positions


def _groups(layers: dict[str, QuantMAC]) -> Iterator[dict[str, QuantMAC]]:
    """The layers in groups whose matrices H fit into `MEMORY`."""
    group: dict[str, QuantMAC] = {}
    size = 0
    for name, node in layers.items():
        layer_size = sum(4 * len(phase.weights(node)) ** 2 for phase in phases(node))
        if group and size + layer_size > MEMORY:
            yield group
            group, size = {}, 0
        group[name] = node
        size += layer_size
    if group:
        yield group


class _Moment:
    """H = mean of x x^T over the columns x that the weights of each phase meet, in integers of the quantized
    input.

    Args:
        images: that will be shown; at each, so many positions are drawn that all together are enough.
    """

    def __init__(self, node: QuantMAC, images: int, generator: torch.Generator):
        self.node, self.generator = node, generator
        self.phases = phases(node)
        self.weights = [phase.weights(node) for phase in self.phases]
        # positions of an image, for each phase
        self.limits = [-(-max(POSITIONS, _COLUMNS * len(weights)) // images) for weights in self.weights]
        self.totals: list[Tensor | None] = [None] * len(self.phases)
        self.counts = [0] * len(self.phases)

    def watch(self, _, inputs: tuple) -> None:
        """A forward pre-hook."""
        x = inputs[0]
        values = x.real() if isinstance(x, QTensor) else x
        if isinstance(self.node, QuantLinear):
            rows = values.reshape(-1, values.shape[-1])
            drawn = rows[self._drawn(len(rows), self.limits[0] * len(values))]
            self._add(0, self._integers(drawn).T)
            return
        x_int = self._integers(values)
        size = output_size(self.node, x_int)
        for number, phase in enumerate(self.phases):
            lengths = [len(range(f, n, s)) for f, n, s in zip(phase.first, size, phase.step)]
            for image in x_int.split(1):
                drawn = torch.unravel_index(self._drawn(math.prod(lengths), self.limits[number]), lengths)
                at = [index * s + f for index, s, f in zip(drawn, phase.step, phase.first)]
                self._add(number, columns(self.node, image[0], phase, at))

    def _integers(self, values: Tensor) -> Tensor:
        return self.node.weighted_numbers(QTensor(values, None, self.node.runtime))

    def _drawn(self, count: int, limit: int) -> Tensor:
        """All of `count` indices, or `limit` of them drawn with replacement."""
        if count <= limit:
            return torch.arange(count)
        return torch.randint(count, (limit,), generator=self.generator)

    def _add(self, number: int, x: Tensor) -> None:
        total = self.totals[number]
        if total is None:
            total = self.totals[number] = x.new_zeros(len(x), len(x))
        for start in range(0, len(x), _ROWS):  # the lower half, and a little more
            stop = min(start + _ROWS, len(x))
            total[start:stop, :stop].addmm_(x[start:stop], x[:stop].T)
        self.counts[number] += x.shape[1]

    def take_mean(self, number: int) -> Tensor:
        """H of a phase, which is not kept here: of a wide layer it takes gigabytes."""
        total = self.totals[number]
        assert total is not None
        self.totals[number] = None
        total.div_(self.counts[number])
        for start in range(0, len(total), _ROWS):
            stop = min(start + _ROWS, len(total))
            total[:start, start:stop] = total[start:stop, :start].T
            square = total[start:stop, start:stop]
            square.copy_(square.tril() + square.tril(-1).T)
        return total


def _start_rounding(node: QuantMAC, moment: _Moment, areas: Sequence[Area] | None) -> None:
    """areas: what each phase meets in flat areas, and what it should give."""
    quantizer = node.weight_quantizer
    weight, reference = node.folded_weight()
    scale = quantizer.scale(weight, node.min_scale(reference))
    unit = per_output(scale * reference / node.input_grid.refinement, weight.flatten(1))  # of the accumulator
    real = (weight / per_output(scale, weight)).float()
    flat = real.flatten(1)
    mask = None if quantizer.mask is None else (quantizer.mask != 0).expand(weight.shape).flatten(1)
    limits = int_range(quantizer.bits)
    w_int = round_half_away(flat).clamp(*limits)
    for number, (weights, count) in enumerate(zip(moment.weights, moment.counts)):
        if count * _RARE >= len(weights):
            at = weights.to(flat.device)
            start, h = flat[:, at], moment.take_mean(number)
            if areas is not None and mask is None:
                area = areas[number]
                start, h = towards(start, h, Area(area.inputs, area.outputs / unit))
            w_int[:, at] = gptq(start, h, limits, None if mask is None else mask[:, at])
    w_int = w_int.reshape(weight.shape)
    quantizer.rounding.start_at(w_int, real)


def gptq(
    weight: Tensor,
    moment: Tensor,
    limits: tuple[int, int],
    mask: Tensor | None = None,
    damping: float = DAMPING,
) -> Tensor:
    """Integers near real weights, with a small error in (w_int - w) H (w_int - w)^T.

    Args:
        weight: w, (outputs, D), in units of the weight's step.
        moment: H, (D, D).
        limits: smallest and largest integer.
        mask: (outputs, D) False where a weight stays 0.
        damping: added to H's diagonal, as a share of its mean.

    Returns:
        w_int, (outputs, D).
    """
    if mask is not None and not mask.any(0).all():
        free = mask.any(0)
        w_int = torch.zeros_like(weight)
        w_int[:, free] = gptq(weight[:, free], moment[free][:, free], limits, mask[:, free], damping)
        return w_int
    h = moment.float() if len(moment) > _LARGE else moment.double()
    alive = h.diagonal() > 0
    more = damping * h.diagonal()[alive].mean() if alive.any() else 1.0
    order = h.diagonal().argsort(descending=True, stable=True)
    # H = R R^T with R upper triangular, from the Cholesky factor in reverse order. The error is
    # |(w_int - w) R|^2, and column j of that depends on columns up to j alone: w_int[j] takes back what these
    # have made of it.
    backwards = order.flip(0)
    h = h[backwards][:, backwards]
    h.diagonal().add_(more)
    h = torch.linalg.cholesky(h)
    shares = h.flip(0, 1).to(weight.dtype)
    del h
    shares.div_(shares.diagonal().clone())
    work = weight[:, order].T.contiguous()  # (D, outputs)
    mask = None if mask is None else mask[:, order].T
    w_int, errors = torch.empty_like(work), torch.empty_like(work)
    for start in range(0, len(work), _BLOCK):
        block = slice(start, start + _BLOCK)
        target = torch.addmm(work[block], shares[:start, block].T, errors[:start])
        _round_block(
            target,
            work[block],
            shares[block, block].contiguous(),
            limits,
            None if mask is None else mask[block],
            w_int[block],
            errors[block],
        )
    result = torch.empty_like(weight)
    result[:, order] = w_int.T
    return result


def _round_block(
    target: Tensor,
    work: Tensor,
    within: Tensor,
    limits: tuple[int, int],
    mask: Tensor | None,
    w_int: Tensor,
    errors: Tensor,
) -> None:
    """The columns of a block, one after the other; arguments as in `fused_rows.compensated_block`."""
    if fused_rows.compensated_block(target, work, within, limits, mask, w_int, errors):
        return
    for j in range(len(work)):
        column = round_half_away(target[j]).clamp_(*limits)
        w_int[j] = column if mask is None else torch.where(mask[j], column, 0.0)
        errors[j] = work[j] - w_int[j]
        target[j + 1 :].addr_(within[j, j + 1 :], errors[j])
