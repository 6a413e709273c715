"""The forward passes of a rewritten codec: nodes compute, observe, or replay what was recorded.

A node is a `QuantModule`: one multiply-accumulate layer, normalization, table ... A `QuantBlock` is a
residual or attention block around several nodes. Functions without a module (`a + b`, `torch.sigmoid(x)`, `q
@ k`) get a node at the first observed forward. Its name is the name of the module that runs, the function's
name, and a number that counts the function's calls in that module's forward.
"""

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from licq.quant import (
    arithmetic,
    assignment,
    attention,
    comparisons,
    layout,
    own_weights,
    reductions,
    resampling,
)
from licq.quant.config import QuantConfig
from licq.quant.dispatch import dispatch
from licq.quant.fixedpoint import fixed_point_scale, round_ste
from licq.quant.qtensor import QTensor, to_real
from licq.quant.storage import Origins
from licq.quant.symbols import Symbol
from licq.quant.torch_functions import function_name
from licq.support.errors import InputError

MakeFunction = Callable[[str, dict[str, Any], QuantConfig], Any]
"""(kind, options, config) -> the node of a function."""

Call = tuple[str, int]
"""A node or block by name, and the number of the call in one forward."""


HANDLER_MODULES = (
    arithmetic,
    assignment,
    attention,
    comparisons,
    layout,
    own_weights,
    reductions,
    resampling,
)
"""Imported for the handlers that they register."""


class StopForward(Exception):
    """Ends a forward early: what was to be recorded of it is there."""


class Named(Protocol):
    """A node or a block."""

    name: str


class Runtime:
    """The state of the forward passes of one rewritten codec.

    Args:
        make_function: makes the nodes of functions; None: every function must have a node already.

    Attributes:
        nodes: every node that has run, by name, in the order of first execution.
        functions: the nodes of functions, by name with "/" for ".".
        kept_in_float: how often a function without integer algorithm ran, by (function, module that ran).
        observing: whether nodes show their values to their quantizers.
        act_drop: while a unit learns with QDrop (Wei et al. 2022): (integers, the same before rounding and
            clipping) -> a mix of both. None: no QDrop.
        tracer: where the forward is written down as a program (`integer.lowering`); None: it computes.
        origins: while it is found out what is stored between layers (`quant.storage`).
        calling: the PyTorch function that runs, for the message where it fails.
        number: of the forward; each has another one.
    """

    def __init__(self, config: QuantConfig, make_function: MakeFunction | None = None):
        self.config = config
        self.make_function = make_function
        self.nodes: dict[str, Any] = {}
        self.functions = nn.ModuleDict()
        self.kept_in_float: Counter[tuple[str, str]] = Counter()
        self.observing = False
        self.act_drop: Callable[[Tensor, Tensor], Tensor] | None = None
        self.tracer: Any = None
        self.origins: Origins | None = None
        self.calling = ""
        self.number = 0
        self._path: list[str] = [""]
        self._counts: list[Counter[str]] = [Counter()]
        self._calls: Counter[str] = Counter()
        self._replay: dict[Call, Any] = {}
        self._record: dict[Call, Any] | None = None
        self._is_recorded: Callable[[Call], bool] = lambda call: False
        self._stop_before: Call | None = None
        self._stop_after: Call | None = None
        self._trace: list[tuple[str, Call]] | None = None
        introduce_to_einops()

    # ----------------------------------------------------------------------------------- which module runs

    def attach(self, model: nn.Module) -> None:
        """Follow the forwards of every module that is not a node."""
        for name, module in model.named_modules():
            module.register_forward_pre_hook(self._entering(name))
            module.register_forward_hook(self._leaving, always_call=False)

    def _entering(self, name: str) -> Callable:
        def hook(module, args):
            self._path.append(name)
            self._counts.append(Counter())

        return hook

    def _leaving(self, module, args, output) -> None:
        self._path.pop()
        self._counts.pop()

    @property
    def path(self) -> str:
        """The name of the module that runs; "" for the codec."""
        return self._path[-1]

    @property
    def where(self) -> str:
        """The module that runs, for a message."""
        return self.path or "the codec's own forward"

    def begin(self) -> None:
        """Start a forward of the whole codec."""
        self._path, self._counts, self._calls = [""], [Counter()], Counter()
        self.calling = ""
        self.number += 1

    # ----------------------------------------------------------------------------------------- running a node

    def execute(self, node: Named, inputs: tuple, run: Callable[[], Any]) -> Any:
        """The output of a node: a recorded one, see `replaying`, or that of `run`."""
        self._refuse_kept(inputs, node.name)
        call = (node.name, self._calls[node.name])
        self._calls[node.name] += 1
        if call == self._stop_before:
            raise StopForward
        if self._trace is not None:
            self._trace.append(("begin", call))
        output = self._replay[call] if call in self._replay else run()
        if self._trace is not None:
            self._trace.append(("end", call))
        is_shared = call in self._replay
        if self._record is not None and self._is_recorded(call):
            self._record[call] = output
            is_shared = True
        if call == self._stop_after:
            raise StopForward
        # the forward may change its output in place, which must not change a recorded one
        return _same(output) if is_shared else output

    @contextmanager
    def replaying(self, outputs: dict[Call, Any]) -> Iterator[None]:
        """Within the context, these calls return these outputs and compute nothing."""
        before, self._replay = self._replay, outputs
        try:
            yield
        finally:
            self._replay = before

    @contextmanager
    def recording(
        self,
        calls: Container[Call] | None = None,
        stop_before: Call | None = None,
        stop_after: Call | None = None,
    ) -> Iterator[dict[Call, Any]]:
        """Collect the outputs of calls (None: of all). The forward ends without an error before `stop_before`
        or after `stop_after`."""
        record: dict[Call, Any] = {}
        self._record = record
        self._is_recorded = (lambda call: True) if calls is None else calls.__contains__
        self._stop_before, self._stop_after = stop_before, stop_after
        try:
            yield record
        except StopForward:
            pass
        finally:
            self._record, self._stop_before, self._stop_after = None, None, None

    @contextmanager
    def tracing(self) -> Iterator[list[tuple[str, Call]]]:
        """Collect ("begin" | "end", call) of every node and block, in the order of one forward."""
        self._trace = trace = []
        try:
            yield trace
        finally:
            self._trace = None

    # ---------------------------------------------------------------------------------------------- functions

    def function(self, kind: str, options: dict[str, Any], inputs: tuple) -> QTensor:
        """Run the node of a function at this point of the forward.

        Raises:
            InputError: calibration did not meet the function here.
        """
        index = self._counts[-1][kind]
        self._counts[-1][kind] += 1
        name = f"{self.path}.{kind}{index}".lstrip(".")
        key = name.replace(".", "/")
        if key not in self.functions:
            if not self.observing:
                raise InputError(
                    f"{kind} at {name} was not met in calibration, so it has no static range; "
                    "the forward must take the same path for every image"
                )
            self.add_function(name, kind, options)
            self.functions[key].to(next(x.device for x in inputs if isinstance(x, QTensor)))
        return self.functions[key](*inputs)

    def skip_function(self, kind: str) -> None:
        """Count a call of a function whose node is not needed here, so that the others keep their names."""
        self._counts[-1][kind] += 1

    def add_function(self, name: str, kind: str, options: dict[str, Any]) -> None:
        """Make the node of a function."""
        assert self.make_function is not None
        node = self.make_function(kind, options, self.config)
        node.bind(self, name)
        self.functions[name.replace(".", "/")] = node
        self.nodes[name] = node

    def remove_function(self, name: str) -> None:
        """Remove the node of a function, which then must not run any more."""
        del self.functions[name.replace(".", "/")], self.nodes[name]

    def one_scale_along(self, x: QTensor, dims: Iterable[int]) -> QTensor:
        """x with a scale that does not vary along these dimensions: x itself, or x as a wide activation with
        one scale for the tensor.

        Whether the scale varies shows only on integers, so each such call gets a node while observing.
        """
        scale = x.scale
        varies = scale is not None and scale.ndim > 0 and any(scale.shape[dim] > 1 for dim in dims)
        if self.observing or varies:
            return self.function("carrier", {}, (x,))
        self.skip_function("carrier")
        return x

    def constant(self, value: Tensor) -> QTensor:
        """A constant tensor as integers of `carrier_bits`, with a scale for its largest magnitude."""
        qmax = 2 ** (self.config.carrier_bits - 1) - 1
        scale = fixed_point_scale(value.detach().abs().amax().double() / qmax, self.config.frac_bits)
        return QTensor(round_ste((value / scale).float()), scale, self)

    def dispatch(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """Run a torch function whose arguments hold quantized tensors.

        Raises:
            InputError: one of them was kept from another forward, and this one or that one is written down.
        """
        self._refuse_kept((*args, *kwargs.values()), self.where)
        result = dispatch(self, function, args, kwargs)
        if self.origins is not None:
            self.origins.of_function(function, args, kwargs, result)
        return result

    def _refuse_kept(self, arguments: Iterable[Any], where: str) -> None:
        """Raises InputError where a program would read what another forward has computed."""
        for argument in arguments:
            if isinstance(argument, (list, tuple)):
                self._refuse_kept(argument, where)
            elif isinstance(argument, QTensor) and argument.forward != self.number:
                if self.tracer is not None or argument.readable and isinstance(argument.q, Symbol):
                    raise InputError(
                        f"{where} reads a tensor that the network has kept from an earlier forward, so the "
                        "model cannot be lowered; compute it from the image each time, or make it a buffer"
                    )

    def in_float(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """Run a function without integer algorithm on real numbers, and note that for the report.

        Raises:
            InputError: the forward is written down as a program.
        """
        if self.tracer is not None:
            raise InputError(
                f"{function_name(function)} in {self.where} has no integer form, "
                "so the model cannot be lowered"
            )
        self.kept_in_float[(function_name(function), self.where)] += 1
        return self.wrap(function(*to_real(args), **to_real(kwargs)))

    def wrap(self, output: Any) -> Any:
        """Plain tensors as quantized tensors in the real state."""
        if isinstance(output, Tensor):
            return QTensor(output, None, self) if output.is_floating_point() else output
        if isinstance(output, (list, tuple)):
            return type(output)(self.wrap(item) for item in output)
        return output


def introduce_to_einops() -> None:
    """Let einops, where it is installed, treat quantized tensors as PyTorch's. It refuses unknown types."""
    try:
        from einops import _backends

        _backends._type2backend.setdefault(QTensor, _backends.get_backend(torch.empty(0)))
    except (ImportError, AttributeError):
        pass


def _same(output: Any) -> Any:
    """The output of a node in new objects of the same values."""
    if isinstance(output, QTensor):
        return output.same()
    if isinstance(output, (list, tuple)):
        return type(output)(_same(item) for item in output)
    return output


def detached(output: Any) -> Any:
    """The output of a node cut off from autograd, for a cache."""
    if isinstance(output, (QTensor, Tensor)):
        return output.detach()
    if isinstance(output, (list, tuple)):
        return type(output)(detached(item) for item in output)
    return output
