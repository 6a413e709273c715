"""Weights as integers: their scales (eqs. 3, 4, 15) and the scheme that rounds them (eq. 14)."""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from licq.quant.config import QuantConfig
from licq.quant.fixedpoint import SCALES, int_range, power_of_two_scale
from licq.quant.ranges import RangeSpec
from licq.quant.rounding import Rounding, make_rounding
from licq.quant.transforms import range_groups


def per_output(scale: Tensor, w: Tensor) -> Tensor:
    """A scale (outputs,) or (), shaped to broadcast against a weight (outputs, inputs, ...)."""
    return scale.reshape(-1, *[1] * (w.ndim - 1)) if scale.ndim else scale


class _ScaleSTE(torch.autograd.Function):
    """exp(log_n) * largest / qmax, not below min_scale, as a scale of `make`; no gradient where it is
    below."""

    @staticmethod
    def forward(ctx, log_n, largest, qmax, min_scale, make):
        scale = torch.exp(log_n.double()) * largest / qmax
        slope = scale
        if min_scale is not None:
            above = scale > min_scale
            slope = torch.where(above, scale, torch.where(scale == min_scale, scale / 2, 0.0))
            scale = torch.maximum(scale, min_scale)
        ctx.save_for_backward(slope)
        ctx.shape, ctx.dtype = log_n.shape, log_n.dtype
        return make(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        return (grad * slope).sum_to_size(ctx.shape).to(ctx.dtype), None, None, None, None


class WeightQuantizer(nn.Module):
    """Integer weights and their scale (eqs. 3, 4, 14 and 15); the first dimension is the output channel.

    In all methods, w is a (folded) weight (outputs, inputs, ...). `min_scale` is the smallest scale with
    which sums fit their accumulator, (outputs,), or None.

    Args:
        mask: 0 and 1, of the weight's shape, or None.
    """

    group: Tensor | None
    log_n: nn.Parameter
    mask: Tensor | None

    def __init__(self, config: QuantConfig, mask: Tensor | None):
        super().__init__()
        self.bits, self.frac_bits = config.w_bits, config.frac_bits
        self.make_scale = SCALES[config.w_scales]
        self.per_channel = config.w_granularity != "tensor"
        self.group_count = (
            int(config.w_granularity.removeprefix("groups"))
            if config.w_granularity.startswith("groups")
            else 0
        )
        self.spec = RangeSpec.parse(config.w_range)
        self.rounding_name = config.rounding
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("group", None)  # of each output channel, where they share scales
        self.log_n = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.rounding: Rounding | None = None
        # the weights that were measured last, their version and `_largest`
        self._known: tuple[Tensor, int, Tensor] | None = None

    def initialize(self, w: Tensor, min_scale: Tensor | None = None) -> None:
        """Set the ranges and start the rounding scheme for the weights w."""
        w = w.detach()
        estimate = self.spec.estimate(w, 0 if self.per_channel else None, self.bits, True).to(w)
        self.group = range_groups(estimate, self.group_count) if self.group_count else None
        ratio = self._of_groups(estimate) / self._of_groups(self._largest(w))
        self.log_n = nn.Parameter(torch.log(ratio.clamp(1e-3, 1.0)), requires_grad=False)
        if self.make_scale is power_of_two_scale and self.spec.method != "max":
            self._choose_power(w, min_scale)
        self.set_rounding(self.rounding_name, w, min_scale)

    def _choose_power(self, w: Tensor, min_scale: Tensor | None) -> None:
        """Choose the power of two below or above the estimate, whichever has the smaller squared error."""
        qmax, upper = int_range(self.bits)[1], self.log_n.data
        errors = []
        for log_n in (upper, upper - math.log(2)):
            self.log_n.data = log_n
            scale = per_output(self.scale(w, min_scale), w)
            error = ((w / scale).round().clamp(-qmax, qmax) * scale - w).square().flatten(1).sum(1)
            if self.group is not None:
                error = error.new_zeros(len(upper)).index_add_(0, self.group, error)
            errors.append(error if upper.ndim else error.sum())
        self.log_n.data = torch.where(errors[1] < errors[0], upper - math.log(2), upper)

    def set_rounding(self, name: str, w: Tensor, min_scale: Tensor | None = None) -> Rounding:
        """Start a rounding scheme at the weights w, and return it."""
        self.rounding_name = name
        rounding = make_rounding(name, self.in_steps(w, min_scale), self.mask)
        rounding.requires_grad_(False)
        self.rounding = rounding
        return rounding

    def rounding_parameters(self) -> list[nn.Parameter]:
        """What the rounding scheme learns."""
        return [] if self.rounding is None else list(self.rounding.parameters())

    @torch.no_grad()
    def in_steps(self, w: Tensor, min_scale: Tensor | None = None) -> Tensor:
        """w / s_w, float32."""
        return (w / per_output(self.scale(w, min_scale), w)).float()

    def _largest(self, w: Tensor) -> Tensor:
        if w.requires_grad or w.is_inference():
            return self._measured_largest(w)
        if self._known is None or self._known[0] is not w or self._known[1] != w._version:
            self._known = w, w._version, self._measured_largest(w)
        return self._known[2]

    def _measured_largest(self, w: Tensor) -> Tensor:
        largest = w.abs().flatten(1).amax(1) if self.per_channel else w.abs().amax()
        # the scale of a channel of zeros is not far below the other scales, so that its bias does not
        # overflow
        return largest.clamp(min=float(largest.detach().max().clamp(min=1e-12)) * 2**-12)

    def _of_groups(self, values: Tensor) -> Tensor:
        """The largest value of each group of output channels; `values` where there are no groups."""
        if self.group is None:
            return values
        return values.new_zeros(int(self.group.max()) + 1).scatter_reduce(
            0, self.group, values, "amax", include_self=False
        )

    def scale(self, w: Tensor, min_scale: Tensor | None = None) -> Tensor:
        """s_w of eqs. 3 and 15, not below `min_scale`: (outputs,) or (), float64."""
        qmax = int_range(self.bits)[1]
        largest = self._of_groups(self._largest(w).double())
        if min_scale is not None:
            # upwards: rounding to nearest could end below it
            min_scale = torch.ceil(min_scale * 2.0**self.frac_bits) * 2.0**-self.frac_bits
            min_scale = self._of_groups(min_scale) if largest.ndim else min_scale.max()
        if largest.requires_grad:
            scale = torch.exp(self.log_n.double()) * largest / qmax
            scale = scale if min_scale is None else torch.maximum(scale, min_scale)
            scale = self.make_scale(scale, self.frac_bits)
        else:
            make = partial(self.make_scale, frac_bits=self.frac_bits)
            scale = _ScaleSTE.apply(self.log_n, largest, qmax, min_scale, make)
        return scale if self.group is None else scale[self.group]

    def forward(self, w: Tensor, min_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(w_int of w's shape, s_w). Not before `initialize`."""
        assert self.rounding is not None
        scale = self.scale(w, min_scale)
        qmin, qmax = int_range(self.bits)
        w_int = self.rounding.quantized(w, scale, qmin, qmax)
        if w_int is None:
            w_int = self.rounding((w / per_output(scale, w)).float()).clamp(qmin, qmax)
        return w_int, scale
