"""Offsets of y_hat in codecs of variable rate, from tables over the scale."""

from typing import Any

import torch
from torch import Tensor

from licq.models.vbr import OffsetNet, WholeOffsetNet
from licq.quant.boundaries import QuantBoundary
from licq.quant.config import QuantConfig
from licq.quant.fixedpoint import round_half_away
from licq.quant.modules import replaces
from licq.quant.primitives import add, boundary, clamp, product, rescale, subtract, table
from licq.quant.qtensor import QTensor
from licq.quant.quantizer import Quantizer
from licq.support.errors import InputError


@replaces(OffsetNet)
class QuantOffsets(QuantBoundary):
    """`models.vbr.OffsetNet`: y_hat with offsets from a table over the scale. Each gain has its own table.

    A table is made when its gain first occurs, with the same bits on every machine. So it is not in the
    model's file.
    """

    kind = "offsets"
    module: OffsetNet

    def __init__(self, module: OffsetNet, config: QuantConfig):
        super().__init__(module, config)
        self.scale_grid = Quantizer(config.table_bits, config.frac_bits, headroom=1.25, symmetry="one_sided")
        self._tables: dict[float, Tensor] = {}

    def wraps(self, index: int) -> bool:
        return index != 2

    def forward(self, y, scales, means, gain):
        return super().forward(y, scales, gain, means)

    def real(self, y: Tensor, scales: Tensor, gain: Tensor, means: Tensor | None) -> Tensor:
        return self.module(y, scales, means, gain)

    def observe(self, inputs: tuple, output: Any) -> None:
        _, scales, gain, _ = inputs
        self.scale_grid.observe(scales.real() * gain)

    def table(self, gain: float) -> Tensor:
        """The offset for every integer of the scale's quantizer, in units of `unit`."""
        if gain not in self._tables:
            step, low, high = self.scale_grid.parameters_of_grid()
            scales = torch.arange(int(low), int(high) + 1, device=step.device) * step.detach()
            self._tables[gain] = round_half_away(
                self.module.table(scales, gain).to(step.device) / self.unit
            ).float()
        return self._tables[gain]

    @torch.no_grad()
    def offsets(self, symbols: Tensor, scales: QTensor, gain: Tensor) -> Tensor:
        """What is added to the symbols, in units of `unit`; 0 where a symbol is 0. gain: float64."""
        index, first = self.scale_grid(scales * gain).q, self._first_scale()
        tables = [self.table(float(value)) for value in gain.flatten()]
        if len(tables) == 1:
            offsets = table(index, tables[0], first)
        else:  # an image each
            offsets = torch.cat([table(part, one, first) for one, part in zip(tables, index.split(1))])
        return product(offsets, clamp(symbols, -1, 1))

    def _first_scale(self) -> int:
        """The smallest integer of the scale's quantizer."""
        return int(self.scale_grid.parameters_of_grid()[1])

    def _gain(self, gain: Tensor) -> Tensor:
        """The gain in float64.

        Raises:
            InputError: several gains, while the forward is written down as a program.
        """
        if self.runtime.tracer is not None and gain.numel() > 1:
            raise InputError(
                "a program has one rate: lower a model that is set to it, for images without planes"
            )
        return gain.double()

    def integer(self, y: QTensor, scales: QTensor, gain: Tensor, means: QTensor | None) -> QTensor:
        y, mean, gain = self.grid(y), None if means is None else self.grid(means).q, self._gain(gain)
        symbols = rescale(y.q if mean is None else subtract(y.q, mean), gain * self.unit)
        moved = add(rescale(symbols, 1 / self.unit), self.offsets(symbols, scales, gain))
        values = rescale(moved, 1 / gain)
        values = values if mean is None else add(values, mean)
        boundary("offsets", self.name, y.q, symbols, values, means=mean)
        return self.latent(values, y)

    def freeze(self) -> None:
        super().freeze()
        self._tables = {}

    def thaw(self) -> None:
        super().thaw()
        self._tables = {}


@replaces(WholeOffsetNet)
class QuantWholeOffsets(QuantOffsets):
    """`models.vbr.WholeOffsetNet`: y_hat from symbols that are rounded already, moved by shares in units of
    2^-12."""

    kind = "whole_offsets"
    module: WholeOffsetNet
    share_bits = 12

    def shares(self) -> Tensor:
        """The share for every integer of the scale's quantizer."""
        step, low, high = self.scale_grid.parameters_of_grid()
        scales = torch.arange(int(low), int(high) + 1, device=step.device) * step.detach().double()
        return round_half_away(self.module.shares(scales) * 2**self.share_bits).float()

    def integer(self, symbols: QTensor, scales: QTensor, gain: Tensor, means: QTensor) -> QTensor:
        symbols, mean, gain = self.grid(symbols), self.grid(means).q, self._gain(gain)
        residual = subtract(symbols.q, rescale(mean, gain))
        nearest = rescale(residual, self.unit)
        sign = clamp(nearest, -1, 1)
        is_near, is_far = (
            table(sign, torch.tensor(ones, dtype=torch.float32, device=mean.device), -1)
            for ones in ([0, 1, 0], [1, 0, 1])
        )
        half = round(0.5 / self.unit)
        near = clamp(product(residual, is_near), -half, half)
        with torch.no_grad():
            share = table(self.scale_grid(scales * gain).q, self.shares(), self._first_scale())
        moved_near = rescale(product(near, share), 2.0**-self.share_bits)
        moved_far = add(product(residual, is_far), self.offsets(nearest, scales, gain))
        values = rescale(add(moved_near, moved_far), 1 / gain)
        return self.latent(add(values, mean), symbols)
