"""What happens when a rewritten codec runs: which node stands where, and whether it computes, watches or
replays.

A node is a `QuantModule` (one multiply-accumulate layer, normalization, table ...) or a `QuantBlock` (a
residual, attention ... block around several). Functions without a module of their own (`a + b`,
`torch.sigmoid(x)`, `q @ k`) get a node at the first observed forward, named after the module they stand in
and their place in its forward.
"""

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from licq.quant import arithmetic, layout
from licq.quant.config import QuantConfig
from licq.quant.dispatch import dispatch
from licq.quant.fixedpoint import fixed_point_scale, round_ste
from licq.quant.qtensor import QTensor, to_real
from licq.quant.torch_functions import function_name
from licq.support.errors import InputError

MakeFunction = Callable[[str, dict[str, Any], QuantConfig], Any]
"""(kind, options, config) -> the node of a function."""

Call = tuple[str, int]  # a node or block by name, and which of its calls in one forward


HANDLER_MODULES = (arithmetic, layout)
"""Imported for the handlers that they register."""


class StopForward(Exception):
    """What was wanted of this forward is there; the rest is not needed."""


class Runtime:
    """The state of the forward passes of one rewritten codec.

    Args:
        make_function: makes the nodes of functions; None: functions are met that have nodes already.
    """

    def __init__(self, config: QuantConfig, make_function: MakeFunction | None = None):
        self.config = config
        self.make_function = make_function
        self.nodes: dict[str, nn.Module] = {}  # every leaf node, in the order of first execution
        self.functions = nn.ModuleDict()  # nodes of functions, by name with "/" for "."
        self.kept_in_float: Counter[tuple[str, str]] = (
            Counter()
        )  # (function, module it stands in) -> calls seen
        self.observing = False
        # while a unit learns: (whole numbers, the same without rounding and clipping) -> some of both
        self.dropping: Any = None
        self.tracer: Any = None  # where the forward is written down as a program: see integer/lowering.py
        self.calling = ""  # the torch function that runs, for the message where it fails
        self._path: list[str] = [""]
        self._counts: list[Counter[str]] = [Counter()]
        self._calls: Counter[str] = Counter()
        self._replay: dict[Call, Any] = {}
        self._record: dict[Call, Any] | None = None
        self._wanted: Callable[[Call], bool] = lambda call: False
        self._stop_before: Call | None = None
        self._stop_after: Call | None = None
        self._trace: list[tuple[str, Call]] | None = None
        introduce_to_einops()

    # ------------------------------------------------------------------------------------ where a call stands

    def attach(self, model: nn.Module) -> None:
        """Have every module that is not a node tell when its forward begins and ends."""
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
        return self._path[-1]

    @property
    def where(self) -> str:
        """The module that runs, for a reader."""
        return self.path or "the codec's own forward"

    def begin(self) -> None:
        """A forward of the whole codec starts."""
        self._path, self._counts, self._calls = [""], [Counter()], Counter()
        self.calling = ""

    # ----------------------------------------------------------------------------------------- running a node

    def execute(self, node: nn.Module, inputs: tuple, run: Callable[[], Any]) -> Any:
        """The output of a node: replayed where it was recorded before, or computed by `run`."""
        call = (node.name, self._calls[node.name])
        self._calls[node.name] += 1
        if call == self._stop_before:
            raise StopForward
        if self._trace is not None:
            self._trace.append(("begin", call))
        output = self._replay[call] if call in self._replay else run()
        if self._trace is not None:
            self._trace.append(("end", call))
        replayed, recorded = call in self._replay, self._record is not None and self._wanted(call)
        if recorded:
            self._record[call] = output
        if call == self._stop_after:
            raise StopForward
        # the forward may change it in place, but what is kept stays as it is
        return _same(output) if replayed or recorded else output

    @contextmanager
    def replaying(self, outputs: dict[Call, Any]) -> Iterator[None]:
        """Within it, these calls return these outputs and compute nothing."""
        before, self._replay = self._replay, outputs
        try:
            yield
        finally:
            self._replay = before

    @contextmanager
    def recording(
        self,
        wanted: Container[Call] | None = None,
        stop_before: Call | None = None,
        stop_after: Call | None = None,
    ) -> Iterator[dict[Call, Any]]:
        """Collect the outputs of the wanted calls (None: all); at a stop the forward ends there, quietly."""
        record: dict[Call, Any] = {}
        self._record, self._wanted = record, (lambda call: True) if wanted is None else wanted.__contains__
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
        """Run the node of a function at this place of the forward."""
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

    def add_function(self, name: str, kind: str, options: dict[str, Any]) -> None:
        assert self.make_function is not None
        node = self.make_function(kind, options, self.config)
        node.bind(self, name)
        self.functions[name.replace(".", "/")] = node
        self.nodes[name] = node

    def remove_function(self, name: str) -> None:
        del self.functions[name.replace(".", "/")], self.nodes[name]

    def one_scale_along(self, x: QTensor, dims: Iterable[int]) -> QTensor:
        """x with a scale that does not vary along these dimensions: as it is, or per tensor in carrier bits.

        Whether the carrier is needed shows only on whole numbers, so while observing every such place gets
        one.
        """
        varies = x.is_integer and x.scale.ndim and any(x.scale.shape[dim] > 1 for dim in dims)
        if self.observing or varies:
            return self.function("carrier", {}, (x,))
        self._counts[-1]["carrier"] += 1  # the places keep their names
        return x

    def constant(self, value: Tensor) -> QTensor:
        """A constant tensor on a grid of its own, carrier bits wide."""
        qmax = 2 ** (self.config.carrier_bits - 1) - 1
        scale = fixed_point_scale(value.detach().abs().amax().double() / qmax, self.config.frac_bits)
        return QTensor(round_ste((value / scale).float()), scale, self)

    def dispatch(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """Run a torch function whose arguments hold quantized tensors."""
        return dispatch(self, function, args, kwargs)

    def in_float(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """A function with no integer algorithm here: it runs on real numbers, and the report says so."""
        if self.tracer is not None:
            raise InputError(
                f"{function_name(function)} in {self.where} has no integer form, so the model cannot be lowered"
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
    """Where einops is installed, have it treat quantized tensors as PyTorch's; without that it refuses
    them."""
    try:
        from einops import _backends

        _backends._type2backend.setdefault(QTensor, _backends.get_backend(torch.empty(0)))
    except (ImportError, AttributeError):
        pass


def _same(output: Any) -> Any:
    """The output of a node in other objects of the same values."""
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
