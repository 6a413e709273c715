"""Nodes that choose between two tensors: minimum, maximum, `torch.where`."""

from typing import Any

import torch
from torch import Tensor

from licq.quant.config import QuantConfig
from licq.quant.fixedpoint import round_half_away, round_ste
from licq.quant.functions import QuantFunction
from licq.quant.operands import QuantAdd
from licq.quant.primitives import add, clamp, constant, mask, product, subtract
from licq.quant.qtensor import QTensor

_BEYOND = 24.0
"""An infinite number, as masks have them, counts as this much past the finite ones: exp(-24) is 4e-11."""


class QuantMaximum(QuantAdd):
    """The larger of a and b, as wide activations of one scale: b + max(a - b, 0)."""

    kind = "maximum"

    def real(self, a: Tensor, b: Tensor | float) -> Tensor:
        return torch.maximum(a, torch.as_tensor(b, dtype=a.dtype, device=a.device))

    def observe(self, inputs: tuple, output: Any) -> None:
        super().observe(inputs, output)
        if not isinstance(inputs[1], QTensor):
            self.grid.observe(torch.as_tensor(inputs[1], dtype=output.dtype, device=output.device))

    def combined(self, a: Tensor, b: Tensor, low: int, high: int) -> Tensor:
        return add(b, clamp(subtract(a, b), 0, None))


class QuantMinimum(QuantMaximum):
    """The smaller of a and b: b + min(a - b, 0)."""

    kind = "minimum"

    def real(self, a: Tensor, b: Tensor | float) -> Tensor:
        return torch.minimum(a, torch.as_tensor(b, dtype=a.dtype, device=a.device))

    def combined(self, a: Tensor, b: Tensor, low: int, high: int) -> Tensor:
        return add(b, clamp(subtract(a, b), None, 0))


class QuantWhere(QuantFunction):
    """a where `condition`, else b, as wide activations of one scale.

    The condition is a comparison, or a constant; a and b may be constants, tensors or numbers.
    """

    kind = "where"

    def __init__(self, config: QuantConfig):
        super().__init__(config)
        self.grid = self.wide_quantizer()

    def wraps(self, index: int) -> bool:
        return False

    def real(self, condition: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
        return torch.where(condition.bool(), a, b).float()

    def observe(self, inputs: tuple, output: Any) -> None:
        finite = output[output.isfinite()]
        self.grid.observe(finite.reshape(1, -1))
        low, high = float(finite.min()) - _BEYOND, float(finite.max()) + _BEYOND
        for x in inputs[1:]:  # what is not chosen has to fit as well
            values = x.real() if isinstance(x, QTensor) else torch.as_tensor(x, device=output.device)
            values = values.to(output.dtype).reshape(1, -1)
            self.grid.observe(torch.where(values.isinf(), values.clamp(low, high), values))

    def integer(
        self, condition: QTensor | Tensor, a: QTensor | Tensor | float, b: QTensor | Tensor | float
    ) -> QTensor:
        like = next(x for x in (condition, a, b) if isinstance(x, QTensor))
        first, second = self._numbers(a), self._numbers(b)
        if isinstance(condition, QTensor):
            q = add(product(subtract(first, second), condition.q), second)
        else:
            chosen = condition.float()
            q = add(mask(first, chosen), mask(second, 1 - chosen))
        return like.like(q, self.grid.parameters_of_grid()[0])

    def _numbers(self, x: QTensor | Tensor | float) -> Tensor:
        if isinstance(x, QTensor):
            return self.grid(x).q
        scale, qmin, qmax = self.grid.parameters_of_grid()
        steps = (
            round_ste((x.double() / scale).float())
            if isinstance(x, Tensor)
            else round_half_away(x / scale.detach()).float()
        )
        return constant(clamp(steps, qmin, qmax), self.runtime.tracer)
