"""Symbols: what stands for the values of an integer program while the codec's forward is written down.

The forward of a frozen codec runs once on symbols instead of tensors. A symbol has a shape and no numbers.
Every PyTorch function that is called on one, and every primitive of `quant.primitives` and `quant.sums`,
appends an operation to the recorder's program.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from licq.quant.operations import Boundary, Operation, Range

_QUESTIONS = {
    "__get__",
    "dim",
    "size",
    "numel",
    "__len__",
    "stride",
    "is_floating_point",
    "nelement",
    "element_size",
}
"""Functions that ask for the shape or the type of a tensor, and compute nothing."""


class Recorder(Protocol):
    """Writes an integer program; `integer.lowering.Tracer` is one.

    node: the layer or function of the codec that runs.
    """

    node: str

    def emit(self, operation: Operation, shape: tuple[int, ...], numbers: Range) -> "Symbol":
        """Append an operation, whose inputs are numbers of values; gives the symbol of its result."""
        ...

    def range_of(self, symbol: "Symbol") -> Range:
        """The proven range of a value."""
        ...

    def mark(self, boundary: Boundary) -> None:
        """Note a place where a latent is rounded."""
        ...

    def called(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """Write down a PyTorch function of symbols; gives the symbols of its results."""
        ...


class Symbol(Tensor):
    """Stands for a value of a program: a shape, no numbers."""

    number: int
    recorder: Recorder

    @classmethod
    def of(cls, number: int, shape: tuple[int, ...], recorder: Recorder) -> "Symbol":
        """The symbol of value `number`."""
        symbol = torch.Tensor._make_subclass(cls, torch.empty(shape, device="meta"))
        symbol.number, symbol.recorder = number, recorder
        return symbol

    @property
    def range(self) -> Range:
        """The proven range of the value."""
        return self.recorder.range_of(self)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function == Tensor.device.__get__:  # what the forward makes beside it holds numbers
            return torch.device("cpu")
        name = getattr(function, "__name__", "")
        if name in _QUESTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        recorder = next(
            part.recorder for part in flat((args, tuple(kwargs.values()))) if isinstance(part, Symbol)
        )
        return recorder.called(function, args, kwargs)


def flat(parts: Any) -> Iterator[Any]:
    """The leaves of nested lists and tuples."""
    for part in parts:
        if isinstance(part, (list, tuple)):
            yield from flat(part)
        else:
            yield part


def int64(numbers: Tensor | float) -> Tensor:
    """The numbers as an operation holds them."""
    return torch.as_tensor(numbers).detach().to(torch.int64)
