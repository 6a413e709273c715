"""What is known of a quantized tensor beside its numbers: how the forward has written it.

Forwards write rounding with a straight-through gradient as a formula,
x - means + (round(x - means) - (x - means)) + means.
In integers the terms cancel, and what is left is the rounding at a boundary (`quant.boundaries`).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from licq.quant.qtensor import QTensor, Same


@dataclass(frozen=True)
class Difference:
    """a - b."""

    a: QTensor
    b: QTensor | Tensor


@dataclass(frozen=True)
class Rounded:
    """round(x - means), of which `decoded` is round(x - means) + means."""

    means: QTensor | Tensor
    decoded: QTensor


@dataclass(frozen=True)
class Taken:
    """x[index], where the index holds no tensors."""

    x: QTensor
    index: Any


@dataclass(frozen=True)
class Fixed:
    """A tensor that does not depend on the image."""

    values: Tensor


def snapshot(x: QTensor | Tensor) -> QTensor | Tensor | None:
    """x, which operations in place on x leave as it is; None where its numbers are not computed yet."""
    if not isinstance(x, QTensor):
        return x
    return None if x.repeated is not None or not x.readable else x.same()


def is_same(x: Any, y: Any) -> bool:
    """Whether both are one tensor."""
    x, y = _origin(x), _origin(y)
    if isinstance(x, QTensor) and isinstance(y, QTensor):
        if not (x.readable and y.readable) or x.repeated is not None or y.repeated is not None:
            return False
        return x.q is y.q and x.scale is y.scale
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return x is y or (
            x.data_ptr() == y.data_ptr()
            and (x.shape, x.stride(), x.dtype, x.device) == (y.shape, y.stride(), y.dtype, y.device)
            and x.numel() > 0
        )
    return False


def _origin(x: Any) -> Any:
    while isinstance(x, QTensor) and isinstance(x.formula, Same):
        x = x.formula.x
    return x


def sum_of(a: Any, b: Any) -> QTensor | None:
    """a + b where terms cancel; None: they do not."""
    for first, second in ((a, b), (b, a)):
        formula = first.formula if isinstance(first, QTensor) else None
        if isinstance(formula, Same):
            formula = formula.x.formula
        if isinstance(formula, Difference) and is_same(formula.b, second):
            return formula.a.same()
        if isinstance(formula, Rounded) and is_same(formula.means, second):
            return formula.decoded.same()
    return None


def difference_of(a: Any, b: Any) -> QTensor | None:
    """a - b where terms cancel; None: they do not."""
    formula = b.formula if isinstance(b, QTensor) else None
    if isinstance(formula, Same):
        formula = formula.x.formula
    if isinstance(formula, Difference) and is_same(formula.a, a) and isinstance(formula.b, QTensor):
        return formula.b.same()
    return None


def note_difference(result: Any, a: Any, b: Any) -> Any:
    """`result`, with the note that it is a - b."""
    if isinstance(result, QTensor) and isinstance(a, QTensor) and isinstance(b, (QTensor, Tensor)):
        first, second = snapshot(a), snapshot(b)
        if isinstance(first, QTensor) and second is not None:
            result.formula = Difference(first, second)
    return result


def fixed_values(x: Any) -> Any:
    """The values of a tensor that does not depend on the image; any other x as it is."""
    return x.formula.values if isinstance(x, QTensor) and isinstance(x.formula, Fixed) else x


def is_zero(x: Any) -> bool:
    """Whether x is 0 whatever the image."""
    values = fixed_values(x)
    return isinstance(values, Tensor) and values is not x and not bool(torch.any(values != 0))
