"""What happens when a PyTorch function is called on a quantized tensor: handlers by name, operations in
place.

`quant.layout` and `quant.arithmetic` hold the handlers.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor

from licq.quant.qtensor import QTensor
from licq.quant.symbols import Recorder
from licq.quant.torch_functions import function_name, is_in_place, out_of_place


class Forward(Protocol):
    """The running forward of a quantized codec, as handlers know it; `quant.runtime.Runtime` is one."""

    tracer: Recorder | None
    calling: str
    observing: bool

    def function(self, kind: str, options: dict[str, Any], inputs: tuple) -> QTensor:
        """Run the node of a function at this place of the forward."""
        ...

    def skip_function(self, kind: str) -> None:
        """Count a call of a function whose node is not needed here."""
        ...

    def in_float(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """Run a function that has no integer algorithm here."""
        ...

    def one_scale_along(self, x: QTensor, dims: Iterable[int]) -> QTensor:
        """x with a scale that does not vary along these dimensions."""
        ...

    def constant(self, value: Tensor) -> QTensor:
        """A constant tensor on a grid of its own."""
        ...


Handler = Callable[[Forward, Callable, tuple, dict], Any]
HANDLERS: dict[str, Handler] = {}


def handles(*names: str):
    """Register a handler for the torch functions and tensor methods of these names."""

    def register(handler: Handler) -> Handler:
        for name in names:
            HANDLERS[name] = handler
        return handler

    return register


def dispatch(runtime: Forward, function: Callable, args: tuple, kwargs: dict):
    """Run a torch function whose arguments hold quantized tensors."""
    for position, key in enumerate(("input", "other")):
        if len(args) == position and key in kwargs:
            args, kwargs = (
                (*args, kwargs[key]),
                {name: value for name, value in kwargs.items() if name != key},
            )
    name = function_name(function)
    outer, runtime.calling = runtime.calling, name
    if not is_in_place(function, kwargs):
        result = _run(runtime, name, function, args, kwargs)
    elif isinstance(args[0], QTensor):
        result = args[0]
        result.overwrite(_result_of_in_place(runtime, name, function, args, kwargs), name)
    elif function.__name__.startswith("__i"):  # t += x only names the sum t
        result = _run(runtime, name, function, args, kwargs)
    else:  # an ordinary tensor is written to
        result = runtime.in_float(function, args, kwargs)
    runtime.calling = outer
    return result


def _run(runtime: Forward, name: str, function: Callable, args: tuple, kwargs: dict):
    handler = HANDLERS.get(name)
    return (
        runtime.in_float(function, args, kwargs)
        if handler is None
        else handler(runtime, function, args, kwargs)
    )


def _result_of_in_place(
    runtime: Forward, name: str, function: Callable, args: tuple, kwargs: dict
) -> QTensor:
    """What a function in place will write into its first argument, which is not changed here."""
    if name == "__setitem__":
        return HANDLERS[name](runtime, function, args, kwargs)  # it gives what x becomes
    instead = out_of_place(function, name)
    if instead is not None:
        return _run(
            runtime, name, instead, args, {key: value for key, value in kwargs.items() if key != "inplace"}
        )
    written = QTensor(args[0].real().clone(), None, runtime)
    runtime.in_float(function, (written, *args[1:]), kwargs)
    return written


def arguments(args: tuple, kwargs: dict, names: Iterable[str]) -> dict[str, Any]:
    """The given arguments behind the first one, by name."""
    return {**dict(zip(names, args[1:])), **kwargs}
