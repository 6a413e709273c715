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
    b: "QTensor | Written"


@dataclass(frozen=True)
class Rounded:
    """round(x - means), of which `decoded` is round(x - means) + means."""

    means: "QTensor | Written"
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


@dataclass(frozen=True)
class Written:
    """An ordinary tensor, and the values that it had when it was noted."""

    tensor: Tensor
    values: Tensor


def snapshot(x: QTensor | Tensor) -> QTensor | Written | None:
    """x, which operations in place on x leave as it is; None where its numbers are not computed yet."""
    if not isinstance(x, QTensor):
        return Written(x, x.clone())
    return None if x.repeated is not None or not x.readable else x.same()


def is_same(noted: QTensor | Written, y: Any) -> bool:
    """Whether y is the tensor that was noted, and still holds the values that it had then."""
    if isinstance(noted, Written):
        x = noted.tensor
        return (
            isinstance(y, Tensor)
            and x.data_ptr() == y.data_ptr()
            and (x.shape, x.stride(), x.dtype, x.device) == (y.shape, y.stride(), y.dtype, y.device)
            and torch.equal(noted.values, y)
        )
    x, y = _origin(noted), _origin(y)
    return (
        isinstance(y, QTensor)
        and x.readable
        and y.readable
        and x.repeated is None
        and y.repeated is None
        and x.q is y.q
        and x.scale is y.scale
    )


def _origin(x: Any) -> Any:
    while isinstance(x, QTensor) and isinstance(x.formula, Same):
        x = x.formula.x
    return x


def sum_of(a: Any, b: Any) -> QTensor | None:
    """a + b where terms cancel; None: they do not."""
    for first, second in ((a, b), (b, a)):
        formula = _formula(first)
        if isinstance(formula, Difference) and formula.a.shape == first.shape and is_same(formula.b, second):
            return formula.a.same()
        if isinstance(formula, Rounded) and is_same(formula.means, second):
            return formula.decoded.same()
    return None


def difference_of(a: Any, b: Any) -> QTensor | None:
    """a - b where terms cancel; None: they do not."""
    formula = _formula(b)
    if isinstance(formula, Difference) and isinstance(formula.b, QTensor):
        if formula.b.shape == b.shape and is_same(formula.a, a):
            return formula.b.same()
    return None


def _formula(x: Any) -> Any:
    """The formula of x, of what it has been before it was cut off from autograd."""
    formula = x.formula if isinstance(x, QTensor) else None
    return formula.x.formula if isinstance(formula, Same) else formula


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
