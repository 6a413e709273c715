"""Nodes of convolutions and linear layers whose weights a forward passes itself."""

from typing import Any

import torch
from torch import Tensor, nn

from licq.quant.config import QuantConfig
from licq.quant.functions import FUNCTIONS
from licq.quant.layers import QuantConv2d, QuantConvTranspose2d, QuantLinear
from licq.quant.mac import QuantMAC
from licq.quant.qtensor import QTensor
from licq.support.errors import InputError


class OwnWeights(QuantMAC):
    """A layer of which the forward passes the weight and the bias with each call.

    They are constants, so the node copies them. The options are what PyTorch's function of the layer was
    called with, and the shape of the weight.
    """

    options: dict[str, Any]

    def __init__(self, config: QuantConfig, **options: Any):
        super().__init__(self.layer(**options), config)
        for parameter in self.module.parameters():
            parameter.requires_grad_(False)
        self.options = options
        self.given: list[Tensor | None] | None = None

    @staticmethod
    def layer(**options: Any) -> nn.Module:
        """The module that holds the weights."""
        raise NotImplementedError

    @torch.no_grad()
    def _same(self, *given: Tensor | None) -> None:
        """Refuse weights that are not those of the call before: they are none of the codec's constants."""
        if self.given is None:
            self.given = [None if part is None else part.detach().clone() for part in given]
        for before, now in zip(self.given, given):
            if before is None or now is None:
                continue
            if before is not now and not torch.allclose(before.to(now.device), now.detach(), rtol=1e-4):
                raise InputError(
                    f"licq cannot run this network: the weights of {self.kind} "
                    "differ between calls; write them so that they depend on parameters alone"
                )

    def real(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        self._same(weight, bias)
        for name, given in (("weight", weight), ("bias", bias)):
            own = getattr(self.module, name)
            if given is not None and not torch.equal(own, given):
                own.data.copy_(given)
        return super().real(x)

    def integer(self, x: QTensor, weight: Tensor, bias: Tensor | None = None) -> QTensor:
        self._same(weight, bias)
        return super().integer(x)


class OwnConv2d(OwnWeights, QuantConv2d):
    """F.conv2d."""

    kind = "conv2d"

    @staticmethod
    def layer(
        *, shape: list[int], bias: bool, stride: Any, padding: Any, dilation: Any, groups: int
    ) -> nn.Module:
        outputs, inputs, *kernel = shape
        padding = padding if isinstance(padding, str) else tuple(padding)
        return nn.Conv2d(
            inputs * groups,
            outputs,
            (kernel[0], kernel[1]),
            tuple(stride),
            padding,
            tuple(dilation),
            groups,
            bias,
        )


class OwnConvTranspose2d(OwnWeights, QuantConvTranspose2d):
    """F.conv_transpose2d."""

    kind = "conv_transpose2d"

    @staticmethod
    def layer(
        *,
        shape: list[int],
        bias: bool,
        stride: Any,
        padding: Any,
        dilation: Any,
        groups: int,
        output_padding: Any,
    ) -> nn.Module:
        inputs, outputs, *kernel = shape
        return nn.ConvTranspose2d(
            inputs,
            outputs * groups,
            (kernel[0], kernel[1]),
            tuple(stride),
            tuple(padding),
            tuple(output_padding),
            groups,
            bias,
            tuple(dilation),
        )


class OwnLinear(OwnWeights, QuantLinear):
    """F.linear, and products with a constant matrix."""

    kind = "linear"

    @staticmethod
    def layer(*, shape: list[int], bias: bool) -> nn.Module:
        return nn.Linear(shape[1], shape[0], bias)


FUNCTIONS.update({cls.kind: cls for cls in (OwnConv2d, OwnConvTranspose2d, OwnLinear)})  # type: ignore[misc]
