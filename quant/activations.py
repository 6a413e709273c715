"""Activation layers with parameters of their own, on integers."""

import torch
from torch import Tensor, nn

from licq.quant.config import QuantConfig
from licq.quant.modules import QuantModule, replaces
from licq.quant.primitives import add, clamp, constant, product, rescale
from licq.quant.qtensor import QTensor

_MIN_SLOPE = 2.0**-40
"""A slope of zero has no multiplier. This one rounds every number of an int32 accumulator to zero."""


@replaces(nn.PReLU)
class QuantPReLU(QuantModule):
    """max(x, 0) + slope * min(x, 0), in the accumulator: negative numbers are rescaled by the slope of their
    channel.

    PReLU (He et al. 2015, eq. 1). The result has the scales of x, so there is no range to observe.
    """

    kind = "prelu"

    def __init__(self, module: nn.PReLU, config: QuantConfig):
        super().__init__(config)
        self.module = module

    def real(self, x: Tensor) -> Tensor:
        return self.module(x)

    def integer(self, x: QTensor) -> QTensor:
        if not x.is_integer:
            return x.like(self.real(x.real()), None)
        slope = self.module.weight.detach().double()
        if slope.numel() > 1:
            slope = slope.reshape(1, -1, *[1] * (x.ndim - 2))
        negative = rescale(clamp(x.q, None, 0), slope.abs().clamp(min=_MIN_SLOPE))
        if bool((slope < 0).any()):
            sign = torch.where(slope < 0, -1.0, 1.0).float()
            negative = product(negative, constant(sign, self.runtime.tracer))
        return x.like(add(clamp(x.q, 0, None), negative), x.scale)
