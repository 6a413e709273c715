"""Convolutions and linear layers on integers."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from compressai.layers import MaskedConv2d
from torch import Tensor, nn

from licq.models.layers import MaskedConv3d, MultistageMaskedConv2d
from licq.quant import operations as ops
from licq.quant.config import QuantConfig
from licq.quant.mac import QuantMAC
from licq.quant.modules import replaces
from licq.quant.operations import MultiplyAccumulate


@replaces(nn.Conv2d, MaskedConv2d, MultistageMaskedConv2d)
class QuantConv2d(QuantMAC):
    """Conv2d, also with a mask (MaskedConv2d, MultistageMaskedConv2d), with groups, and with another padding
    than zeros, which stands in front of the node."""

    kind = "conv"
    module: nn.Conv2d | nn.Conv3d
    convolve: Callable[..., Tensor] = staticmethod(F.conv2d)
    on_integers: type[ops.Convolution] = ops.Conv2d

    def __init__(self, module: nn.Conv2d | nn.Conv3d, config: QuantConfig):
        super().__init__(module, config)
        self.padding_mode, self.sides = module.padding_mode, list(module._reversed_padding_repeated_twice)
        if self.padding_mode != "zeros":
            module.padding = (0,) * len(module.kernel_size)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        if self.padding_mode != "zeros":
            inputs = (F.pad(inputs[0], self.sides, mode=self.padding_mode), *inputs[1:])
        return super().forward(*inputs, **kwargs)

    @property
    def groups(self) -> int:
        return self.module.groups

    @property
    def outputs(self) -> int:
        return self.module.out_channels

    def real(self, x: Tensor) -> Tensor:
        # the mask is applied to the weight, not written into the parameter as CompressAI's layer does
        m = self.module
        return self.convolve(x, self.float_weight(), m.bias, m.stride, m.padding, m.dilation, m.groups)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.product_with_bias(x, weight, None)

    def product_with_bias(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        m = self.module
        return self.convolve(x, weight, bias, m.stride, m.padding, m.dilation, m.groups)

    def window(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(self.module.kernel_size), tuple(self.module.dilation)

    def product_gradient(
        self, grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        m = self.module
        padding = m.padding
        if isinstance(padding, str):
            y = x.detach().requires_grad_(needs[0]), weight.detach().requires_grad_(needs[1])
            with torch.enable_grad():
                wanted = [t for t, need in zip(y, needs) if need]
                found = iter(torch.autograd.grad(self.product(*y), wanted, grad))
            return tuple(next(found) if need else None for need in needs)  # type: ignore[return-value]
        return torch.ops.aten.convolution_backward(
            grad, x, weight, None, m.stride, padding, m.dilation, False, [0], m.groups, [*needs, False]
        )[:2]

    def operation(self, weight: Tensor, bias: Tensor | None, bound: int) -> MultiplyAccumulate:
        m = self.module
        return self.on_integers(
            weight=weight,
            bias=bias,
            bound=bound,
            stride=m.stride,
            padding=m.padding,
            dilation=m.dilation,
            groups=m.groups,
        )


@replaces(nn.Conv3d, MaskedConv3d)
class QuantConv3d(QuantConv2d):
    """Conv3d, also with a mask (MaskedConv3d)."""

    kind = "conv3d"
    convolve = staticmethod(F.conv3d)
    on_integers = ops.Conv3d


@replaces(nn.ConvTranspose2d)
class QuantConvTranspose2d(QuantMAC):
    """ConvTranspose2d; its weight is (inputs, outputs / groups, kh, kw)."""

    kind = "deconv"
    module: nn.ConvTranspose2d

    @property
    def groups(self) -> int:
        return self.module.groups

    @property
    def outputs(self) -> int:
        return self.module.out_channels

    def canonical(self, weight: Tensor) -> Tensor:
        inputs, per_group, *kernel = weight.shape
        grouped = weight.reshape(self.module.groups, inputs // self.module.groups, per_group, *kernel)
        return grouped.transpose(1, 2).reshape(-1, inputs // self.module.groups, *kernel)

    def _original(self, weight: Tensor) -> Tensor:
        outputs, per_group, *kernel = weight.shape
        grouped = weight.reshape(self.module.groups, outputs // self.module.groups, per_group, *kernel)
        return grouped.transpose(1, 2).reshape(-1, outputs // self.module.groups, *kernel)

    def largest_sum(self, products: Tensor) -> Tensor:
        """(outputs,): the largest sum at an output position, where only taps of one residue of the stride
        meet.

        Args:
            products: the largest product of each weight, in the canonical shape.
        """
        sums = products.sum(1)
        for axis, (size, stride, dilation) in enumerate(
            zip(self.module.kernel_size, self.module.stride, self.module.dilation), 1
        ):
            residues = (torch.arange(size, device=sums.device) * dilation) % stride
            shape = [*sums.shape[:axis], stride, *sums.shape[axis + 1 :]]
            sums = sums.new_zeros(shape).index_add_(axis, residues, sums)
        return sums.flatten(1).amax(1)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.product_with_bias(x, weight, None)

    def product_with_bias(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        m = self.module
        assert not isinstance(m.padding, str)  # ConvTranspose2d takes numbers only
        return F.conv_transpose2d(
            x, self._original(weight), bias, m.stride, m.padding, m.output_padding, m.groups, m.dilation
        )

    def window(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        m = self.module
        sides = (
            dilation * (size - 1) // stride + 1
            for size, stride, dilation in zip(m.kernel_size, m.stride, m.dilation)
        )
        return tuple(sides), (1,) * len(m.kernel_size)

    def product_gradient(
        self, grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        m = self.module
        of_x, of_weight, _ = torch.ops.aten.convolution_backward(
            grad,
            x,
            self._original(weight),
            None,
            m.stride,
            m.padding,
            m.dilation,
            True,
            m.output_padding,
            m.groups,
            [*needs, False],
        )
        return of_x, self.canonical(of_weight) if needs[1] else None

    def operation(self, weight: Tensor, bias: Tensor | None, bound: int) -> MultiplyAccumulate:
        m = self.module
        return ops.ConvTranspose2d(
            weight=weight,
            bias=bias,
            bound=bound,
            stride=m.stride,
            padding=m.padding,
            dilation=m.dilation,
            groups=m.groups,
            output_padding=m.output_padding,
        )


@replaces(nn.Linear)
class QuantLinear(QuantMAC):
    """Linear on the last dimension."""

    kind = "linear"
    module: nn.Linear
    channel_dim = -1

    @property
    def outputs(self) -> int:
        return self.module.out_features

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def product_with_bias(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def window(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (), ()

    def product_gradient(
        self, grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        return (
            grad @ weight if needs[0] else None,
            grad.flatten(0, -2).T @ x.flatten(0, -2) if needs[1] else None,
        )

    def operation(self, weight: Tensor, bias: Tensor | None, bound: int) -> MultiplyAccumulate:
        return ops.Linear(weight=weight, bias=bias, bound=bound)


PLAIN_LAYERS = (QuantConv2d, QuantConvTranspose2d, QuantLinear)
"""Layers with weights; GDN and the products of attention are none."""
