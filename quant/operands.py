"""Nodes of elementwise functions of two operands: sums and products, of skip paths and gates."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from licq.quant.config import QuantConfig
from licq.quant.fixedpoint import round_half_away, round_ste
from licq.quant.functions import QuantFunction
from licq.quant.primitives import add, constant, product
from licq.quant.qtensor import QTensor
from licq.quant.quantizer import Quantizer
from licq.quant.storage import store, stored_operands


def newly_stored(node: QuantFunction, inputs: tuple) -> list[int]:
    """The operands that this call reads from memory and earlier calls did not; the node's options have them
    all."""
    known = node.options.setdefault("stored", [])
    new = [number for number in stored_operands(inputs) if number not in known]
    known.extend(new)
    return new


def learned_ranges(grids: Iterable[Quantizer]) -> dict[str, list]:
    """`QuantModule.learnable` of the quantizers of stored tensors."""
    parameters = [grid.log_n for grid in grids if not grid.exact]
    return {"range_a": parameters} if parameters else {}


class QuantAdd(QuantFunction):
    """a + b as wide activations of one scale; b may be a constant, a float tensor or number.

    Args:
        stored: under `strict_int8`, the numbers of the operands that are read from memory (`quant.storage`).
            They have a quantizer each, `stored0` and `stored1`, with a scale for each channel.
    """

    kind = "add"

    def __init__(self, config: QuantConfig, stored: Sequence[int] | None = None):
        super().__init__(config, **({} if stored is None else {"stored": list(stored)}))
        self.grid = self.wide_quantizer()
        for number in stored or ():
            setattr(self, f"stored{number}", self.wide_quantizer())

    def real(self, a: Tensor, b: Tensor | float) -> Tensor:
        return a + b

    def find_stored(self, inputs: tuple) -> None:
        for number in newly_stored(self, inputs):
            grid = self.wide_quantizer().to(inputs[number].device)
            store(grid, inputs[number], self.config.carrier_bits)
            setattr(self, f"stored{number}", grid)

    def observe(self, inputs: tuple, output: Any) -> None:
        self.grid.observe(output)
        for number, x in enumerate(inputs):
            if isinstance(x, QTensor):
                self.grid.observe(x.real())
                if number in self.options.get("stored", ()):
                    getattr(self, f"stored{number}").observe(x.real())

    def integer(self, a: QTensor, b: QTensor | Tensor | float) -> QTensor:
        a = self._operand(0, a)
        scale, qmin, qmax = self.grid.parameters_of_grid()
        if isinstance(b, QTensor):
            b_q = self._operand(1, b).q
        elif isinstance(b, Tensor):
            b_q = constant(round_ste((b.double() / scale).float()), self.runtime.tracer)
        else:
            b_q = constant(round_half_away(b / scale.detach()).float(), self.runtime.tracer)
        return a.like(self.combined(a.q, b_q, int(qmin), int(qmax)), scale)

    def combined(self, a: Tensor, b: Tensor, low: int, high: int) -> Tensor:
        """The result of both operands, on the one grid whose ends are low and high."""
        return add(a, b, low, high)

    def _operand(self, number: int, x: QTensor) -> QTensor:
        if number in self.options.get("stored", ()):
            x = getattr(self, f"stored{number}")(x)
        return self.grid(x)

    def learnable(self) -> dict[str, list]:
        return learned_ranges(getattr(self, f"stored{n}") for n in self.options.get("stored", ()))


class QuantMul(QuantFunction):
    """a * b elementwise; both factors and the product are wide activations.

    Args:
        stored: under `strict_int8`, the numbers of the factors that are read from memory (`quant.storage`).
    """

    kind = "mul"

    def __init__(self, config: QuantConfig, stored: Sequence[int] | None = None):
        super().__init__(config, **({} if stored is None else {"stored": list(stored)}))
        self.grid_a, self.grid_b, self.grid_out = (
            self.wide_quantizer(),
            self.wide_quantizer(),
            self.wide_quantizer(),
        )

    def real(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b

    def wraps(self, index: int) -> bool:
        return True

    def find_stored(self, inputs: tuple) -> None:
        for number in newly_stored(self, inputs):
            store((self.grid_a, self.grid_b)[number], inputs[number], self.config.carrier_bits)

    def observe(self, inputs: tuple, output: Any) -> None:
        for grid, x in zip(
            (self.grid_a, self.grid_b, self.grid_out), (inputs[0].real(), inputs[1].real(), output)
        ):
            grid.observe(x)

    def integer(self, a: QTensor, b: QTensor) -> QTensor:
        a, b = self.grid_a(a), self.grid_b(b)
        q = product(a.q, b.q, wide=True)  # up to 30 bits
        return self.grid_out(a.like(q, a.unit * b.unit))

    def learnable(self) -> dict[str, list]:
        grids = self.grid_a, self.grid_b
        return learned_ranges(grids[number] for number in self.options.get("stored", ()))
