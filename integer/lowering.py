"""From a frozen `QuantModel` to a `Program`: the codec's forward runs once on symbols instead of numbers.

Nodes write themselves down through `quant.primitives`. Layout functions of the forward are recorded as they
are called. A program is of one image size (and one rate), because windows, paddings and masks follow from it;
the weights in it do not.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from licq.integer.program import Program
from licq.quant import operations as ops
from licq.quant import primitives
from licq.quant.model import PIXEL, QuantModel
from licq.quant.operations import Boundary, Operand, Operation, Range
from licq.quant.outputs import codec_output
from licq.quant.qtensor import QTensor
from licq.quant.runtime import Runtime
from licq.quant.symbols import Symbol, flat
from licq.quant.torch_functions import function_name
from licq.support.cli import explain
from licq.support.errors import InputError

LAYOUT = frozenset(
    "permute transpose t unsqueeze squeeze movedim chunk split narrow select __getitem__ expand unbind flip "
    "contiguous clone reshape view flatten unflatten roll index_select repeat_interleave pad pixel_shuffle "
    "pixel_unshuffle unfold cat stack zeros_like max_pool2d upsample_nearest2d amax amin gather "
    "take_along_dim".split()
)
"""Functions that move numbers, and choose among them, but compute none."""

_WITH_ZEROS = ("pad", "unfold", "zeros_like")


def lower(model: QuantModel, height: int, width: int, batch: int = 1) -> Program:
    """The program of a frozen model for images of height x width, multiples of what the codec asks for.

    A variable-rate codec is lowered at the rate that it is set to.

    Raises:
        InputError: the model is not frozen, a part of it has no integer form, or its forward cannot run on
            symbols: it works with tensors of an earlier image.
    """
    if not model.frozen:
        raise InputError("only a frozen model can be lowered; call freeze() after calibration")
    if (why := model.config.why_no_files) is not None:
        raise InputError(f"{why}, so the model cannot be lowered")
    runtime = model.runtime
    assert isinstance(runtime, Runtime)  # torch types what a module holds as Tensor | Module
    tracer = Tracer(runtime)
    runtime.begin()
    runtime.tracer = tracer
    try:
        pixels = tracer.input("pixels", (batch, 3, height, width), Range(0, 255))
        scale = torch.as_tensor(PIXEL, dtype=torch.float64)
        with torch.no_grad():
            x_hat = _forward(model, QTensor(pixels, scale, runtime, pixels=True))
            tracer.node = "x_hat"
            limits = torch.tensor(0), torch.tensor(255)
            samples = primitives.rescale(x_hat.q, x_hat.full_scale() * 255, *limits)
            assert isinstance(samples, Symbol)
    finally:
        runtime.tracer = None
    tracer.program.outputs["pixels"] = samples.number
    return tracer.program


def _forward(model: QuantModel, image: QTensor) -> QTensor:
    """x_hat of the codec's own forward, on symbols.

    Raises:
        InputError: a part of it has no integer form. Whatever its code raises on symbols names the module.
    """
    try:
        x_hat = codec_output(model.model(image))["x_hat"]
    except Exception as error:
        if explain(error) is not None:
            raise
        said = " ".join(str(error).split())[:200]
        raise InputError(
            f"the model cannot be lowered: {model.runtime.where}: {type(error).__name__}: {said}"
        ) from error
    if not isinstance(x_hat, QTensor) or not x_hat.is_integer or not isinstance(x_hat.q, Symbol):
        raise InputError("x_hat does not follow from the image in integers, so the model cannot be lowered")
    return x_hat


class Tracer:
    """Writes a program while the codec's forward runs; a `quant.symbols.Recorder`.

    node: the layer or function of the codec that runs.
    """

    def __init__(self, runtime: Runtime):
        self.runtime = runtime
        self.program = Program()
        self.node = ""

    def input(self, name: str, shape: tuple[int, ...], numbers: Range) -> Symbol:
        """A value that is given from outside."""
        return Symbol.of(self.program.input(name, shape, numbers), shape, self)

    def emit(self, operation: Operation, shape: tuple[int, ...], numbers: Range) -> Symbol:
        operation = replace(operation, node=self.node)
        return Symbol.of(self.program.add(operation, tuple(shape), numbers), tuple(shape), self)

    def range_of(self, symbol: Symbol) -> Range:
        return self.program.values[symbol.number].range

    def mark(self, boundary: Boundary) -> None:
        self.program.boundaries.append(boundary)

    def called(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """Write down a function of symbols that a forward, or a layout handler of `quant`, has called.

        Raises:
            InputError: the function computes, and has no integer form.
        """
        name = function_name(function)
        self.node = self.runtime.path
        if name in LAYOUT:
            return self._layout(name, function, args, kwargs)
        if name == "sum":
            return self._sum(args, kwargs)
        where = self.node or "the forward of the codec"
        raise InputError(f"{name} in {where} has no integer form, so the model cannot be lowered")

    def _sum(self, args: tuple, kwargs: dict) -> Symbol:
        x = args[0]
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        keepdim = kwargs.get("keepdim", args[2] if len(args) > 2 else False)
        shape = torch.empty(x.shape, device="meta").sum(dim, keepdim).shape
        count = x.numel() // max(1, shape.numel())
        numbers = Range(x.range.low * count, x.range.high * count)
        return self.emit(ops.Sum((x.number,), dim=dim, keepdim=keepdim), shape, numbers)

    def _layout(self, name: str, function: Callable, args: tuple, kwargs: dict) -> Any:
        symbols = [part for part in flat(args) if isinstance(part, Symbol)]
        shaped = _on_shapes(name, function, args, kwargs)
        numbers = symbols[0].range
        for other in symbols[1:]:
            numbers = numbers.union(other.range)
        if name in _WITH_ZEROS:
            numbers = Range(0, 0) if name == "zeros_like" else numbers.with_zero
        parts = shaped if isinstance(shaped, (list, tuple)) else [shaped]
        outputs = tuple(self.program.value(tuple(part.shape), numbers) for part in parts)
        # in place of the symbols: their positions among the operation's inputs
        order = iter(range(len(symbols)))
        arguments = _replaced(args, lambda a: Operand(next(order)) if isinstance(a, Symbol) else a)
        inputs = tuple(symbol.number for symbol in symbols)
        layout = ops.Layout(inputs, outputs, self.node, name=name, arguments=arguments, options=dict(kwargs))
        self.program.operations.append(layout)
        results = [
            Symbol.of(number, tuple(part.shape), self) for number, part in zip(outputs, parts, strict=True)
        ]
        return type(shaped)(results) if isinstance(shaped, (list, tuple)) else results[0]


def _on_shapes(name: str, function: Callable, args: tuple, kwargs: dict) -> Any:
    """What a layout function gives, on tensors without numbers."""
    shapes = _replaced(args, lambda a: torch.empty(a.shape, device="meta") if isinstance(a, Symbol) else a)
    with torch._C.DisableTorchFunctionSubclass():
        if name == "index_select":
            index = torch.empty(args[2].shape, dtype=torch.int64, device="meta")
            return shapes[0].index_select(args[1], index)
        if name in ("gather", "take_along_dim"):
            shapes = _replaced(shapes, lambda a: a.to("meta") if isinstance(a, Tensor) else a)
            kwargs = {
                key: part.to("meta") if isinstance(part, Tensor) else part for key, part in kwargs.items()
            }
        return function(*shapes, **kwargs)


def _replaced(parts: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(parts, (list, tuple)) and not isinstance(parts, torch.Size):
        return type(parts)(_replaced(part, change) for part in parts)
    return change(parts)
