"""From a frozen `QuantModel` to a `Program`: the codec's forward runs once on symbols instead of numbers.

Layout functions of the forward are recorded as they are called; a node writes the operations that its
`integer` would compute. A program is of one image size (and one rate), because windows, paddings and masks
follow from it; the weights in it do not.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from licq.integer.program import Boundary, Operation, Program, Range
from licq.quant.boundaries import (
    QuantEntropyBottleneck,
    QuantGaussianConditional,
    QuantGaussianMixture,
    QuantOffsets,
    QuantRound,
    QuantVariableBottleneck,
    QuantWholeOffsets,
)
from licq.quant.config import FLOAT_BITS
from licq.quant.fixedpoint import quantize_multiplier, round_half_away
from licq.quant.functions import (
    QuantAdd,
    QuantCarrier,
    QuantLeakyReLU,
    QuantMatMul,
    QuantMul,
    QuantSoftmax,
    QuantTable,
)
from licq.quant.grid import Grid
from licq.quant.integer_functions import LEVEL_UNIT, MASKED, SOFTMAX_STEP, SOFTMAX_UNIT
from licq.quant.model import PIXEL, QuantModel
from licq.quant.modules import QuantConvTranspose2d, QuantLinear, QuantMAC, QuantModule
from licq.quant.norms import QuantGDN, QuantLayerNorm
from licq.quant.qtensor import QTensor, function_name
from licq.quant.runtime import Runtime
from licq.support.errors import InputError

LAYOUT = frozenset(
    {
        "permute",
        "transpose",
        "t",
        "unsqueeze",
        "squeeze",
        "movedim",
        "chunk",
        "split",
        "narrow",
        "select",
        "__getitem__",
        "expand",
        "unbind",
        "flip",
        "contiguous",
        "clone",
        "reshape",
        "view",
        "flatten",
        "unflatten",
        "roll",
        "index_select",
        "repeat_interleave",
        "pad",
        "pixel_shuffle",
        "pixel_unshuffle",
        "unfold",
        "cat",
        "stack",
        "zeros_like",
        "max_pool2d",
        "upsample_nearest2d",
    }
)
_WITH_ZEROS = {"pad", "unfold", "zeros_like"}
_FACTS = {
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


class Symbol(Tensor):
    """Stands for a value of the program while the codec's forward runs: a shape, no numbers."""

    number: int
    tracer: "Tracer"

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function == Tensor.device.__get__:  # what the forward makes beside it holds numbers
            return torch.device("cpu")
        if function_name(function) in _FACTS or getattr(function, "__name__", "") in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        tracer = next(
            part.tracer for part in _flat((args, tuple(kwargs.values()))) if isinstance(part, Symbol)
        )
        return tracer.called(function, args, kwargs)


def _flat(parts: Any) -> Iterator[Any]:
    for part in parts:
        if isinstance(part, (list, tuple)):
            yield from _flat(part)
        else:
            yield part


def _replaced(parts: Any, replace: Callable[[Any], Any]) -> Any:
    if isinstance(parts, (list, tuple)) and not isinstance(parts, torch.Size):
        return type(parts)(_replaced(part, replace) for part in parts)
    return replace(parts)


def lower(model: QuantModel, height: int, width: int, batch: int = 1) -> Program:
    """The program of a frozen model for images of height x width, multiples of what the codec asks for.

    A variable-rate codec is lowered at the rate that it is set to.

    Raises:
        InputError: the model is not frozen, or a part of it has no integer form.
    """
    if not model.frozen:
        raise InputError("only a frozen model can be lowered; call freeze() after calibration")
    runtime = model.runtime
    tracer = Tracer(runtime)
    runtime.begin()
    runtime.tracer = tracer
    try:
        pixels = tracer.input("pixels", (batch, 3, height, width), Range(0, 255))
        scale = torch.as_tensor(PIXEL, dtype=torch.float64)
        with torch.no_grad():
            output = model.model(QTensor(pixels, scale, runtime, pixels=True))
            tracer.node = "x_hat"
            x_hat = output["x_hat"]
            samples = tracer.rescale(x_hat.q, x_hat.full_scale() * 255, 0, 255)
    finally:
        runtime.tracer = None
    tracer.program.outputs["pixels"] = samples.number
    return tracer.program


class Tracer:
    """Writes a program while the codec's forward runs."""

    def __init__(self, runtime: Runtime):
        self.runtime = runtime
        self.program = Program()
        self.node = ""

    # --------------------------------------------------------------------------------------------- operations

    def symbol(self, number: int) -> Symbol:
        symbol = torch.Tensor._make_subclass(
            Symbol, torch.empty(self.program.values[number].shape, device="meta")
        )
        symbol.number, symbol.tracer = number, self
        return symbol

    def range_of(self, symbol: Symbol) -> Range:
        return self.program.values[symbol.number].range

    def emit(
        self, kind: str, inputs: tuple[Symbol, ...], shape: tuple[int, ...], numbers: Range, **facts: Any
    ) -> Symbol:
        return self.symbol(
            self.program.add(kind, tuple(x.number for x in inputs), tuple(shape), numbers, self.node, **facts)
        )

    def input(self, name: str, shape: tuple[int, ...], numbers: Range) -> Symbol:
        return self.symbol(self.program.input(name, shape, numbers))

    def constant(self, numbers: Tensor) -> Symbol:
        """A tensor of whole numbers."""
        value = numbers.detach().to(torch.int64)
        return self.emit("constant", (), value.shape, Range.of(value), value=value)

    def rescale(
        self, x: Symbol, multiplier: Tensor, low: Any = None, high: Any = None, refinement: Any = 1
    ) -> Symbol:
        """round_half_away(x multiplier), clipped to low .. high (numbers or tensors), times `refinement`.

        multiplier: positive real numbers that broadcast to x.
        """
        mantissa, shift = quantize_multiplier(multiplier)
        reach = _rescaled(self.range_of(x), multiplier)
        if low is not None:
            low, high = (torch.as_tensor(end).detach().to(torch.int64) for end in (low, high))
            refinement = torch.as_tensor(refinement).to(torch.int64)
            lowest, highest = (end.clamp(reach.low, reach.high) * refinement for end in (low, high))
            reach = Range(int(lowest.min()), int(highest.max()))
        return self.emit(
            "rescale",
            (x,),
            x.shape,
            reach,
            mantissa=mantissa,
            shift=shift,
            low=low,
            high=high,
            refinement=refinement,
        )

    def elementwise(self, kind: str, x: Symbol, numbers: Range, **facts: Any) -> Symbol:
        return self.emit(kind, (x,), x.shape, numbers, **facts)

    # ----------------------------------------------------------------------- functions of the codec's forward

    def called(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """A PyTorch function of a symbol, called by the codec's forward or by the layout handlers of
        `quant.qtensor`."""
        name = function_name(function)
        self.node = self.runtime.path
        if name in LAYOUT:
            return self._layout(name, function, args, kwargs)
        x = next(part for part in _flat(args) if isinstance(part, Symbol))
        numbers = self.range_of(x)
        if name == "neg":
            return self.elementwise("neg", x, Range(-numbers.high, -numbers.low))
        if name == "abs":
            return self.elementwise("abs", x, Range(0, numbers.largest))
        if name == "clamp" and not isinstance(kwargs.get("min"), Tensor) and not args[1:]:
            low, high = kwargs.get("min"), kwargs.get("max")
            return self._clamp(x, low, high)
        if name in ("maximum", "minimum"):
            bound = args[1] if args[0] is x else args[0]
            return self._clamp(x, bound, None) if name == "maximum" else self._clamp(x, None, bound)
        if name == "mul" and isinstance(args[1], Tensor) and not isinstance(args[1], Symbol):
            return self.elementwise(
                "mask", x, numbers.union(Range(0, 0)), mask=args[1].detach().to(torch.int64)
            )
        if name == "sum":
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            keepdim = kwargs.get("keepdim", args[2] if len(args) > 2 else False)
            shape = torch.empty(x.shape, device="meta").sum(dim, keepdim).shape
            count = x.numel() // max(1, shape.numel())
            return self.emit(
                "sum", (x,), shape, Range(numbers.low * count, numbers.high * count), dim=dim, keepdim=keepdim
            )
        raise InputError(
            f"{name} in {self.node or 'the forward of the codec'} has no integer form, so the model cannot be lowered"
        )

    def _clamp(self, x: Symbol, low: Any, high: Any) -> Symbol:
        numbers = self.range_of(x)
        lowest, highest = numbers.low, numbers.high
        if low is not None:
            low = torch.as_tensor(low).to(torch.int64)
            lowest, highest = max(lowest, int(low.min())), max(highest, int(low.max()))
        if high is not None:
            high = torch.as_tensor(high).to(torch.int64)
            lowest, highest = min(lowest, int(high.min())), min(highest, int(high.max()))
        return self.elementwise("clamp", x, Range(lowest, highest), low=low, high=high)

    def _layout(self, name: str, function: Callable, args: tuple, kwargs: dict) -> Any:
        symbols = [part for part in _flat(args) if isinstance(part, Symbol)]
        shapes = _replaced(
            args, lambda a: torch.empty(a.shape, device="meta") if isinstance(a, Symbol) else a
        )
        with torch._C.DisableTorchFunctionSubclass():
            shaped = (
                function(*shapes, **kwargs)
                if name != "index_select"
                else torch.empty(shapes[0].shape, device="meta").index_select(
                    args[1], torch.empty(args[2].shape, dtype=torch.int64, device="meta")
                )
            )
        numbers = self.range_of(symbols[0])
        for other in symbols[1:]:
            numbers = numbers.union(self.range_of(other))
        if name in _WITH_ZEROS:
            numbers = Range(0, 0) if name == "zeros_like" else numbers.union(Range(0, 0))
        parts = shaped if isinstance(shaped, (list, tuple)) else [shaped]
        outputs = [self.program.value(tuple(part.shape), numbers) for part in parts]
        # in place of the symbols: their places among the operation's inputs
        order = iter(range(len(symbols)))
        arguments = _replaced(args, lambda a: Input(next(order)) if isinstance(a, Symbol) else a)
        facts = {"name": name, "arguments": arguments, "options": dict(kwargs)}
        self.program.operations.append(
            Operation("layout", tuple(s.number for s in symbols), tuple(outputs), facts, self.node)
        )
        results = [self.symbol(number) for number in outputs]
        return type(shaped)(results) if isinstance(shaped, (list, tuple)) else results[0]

    # -------------------------------------------------------------------------------------------------- nodes

    def run(self, node: QuantModule, inputs: tuple, kwargs: dict) -> Any:
        """What `node.integer(*inputs, **kwargs)` computes, as operations."""
        self.node = node.name
        if not node.quantized:
            raise InputError(
                f"{node.name} is kept in float, so the model cannot be lowered; quantize it with all nodes"
            )
        for kind in type(node).__mro__:
            if kind in _NODES:
                return _NODES[kind](self, node, *inputs, **kwargs)
        raise InputError(
            f"{node.name}: {type(node).__name__} has no integer operations, so the model cannot be lowered"
        )

    def on_grid(self, grid: Grid, x: QTensor) -> QTensor:
        """`grid(x)`."""
        if grid.bits == FLOAT_BITS:
            raise InputError(
                f"{self.node} has 32-bit inputs or weights, so the model cannot be lowered; use at most 16 bits"
            )
        scale, qmin, qmax, fine = grid.parameters_for(x.ndim)
        refinement = grid.refinement
        if refinement == 1 and x.is_integer and x.scale is scale:
            return x
        step = scale if refinement == 1 else scale / fine
        if not x.is_integer:  # a constant
            if grid.border is not None:
                raise InputError(
                    f"{self.node}: a constant meets a learned border, so the model cannot be lowered; leave border out"
                )
            q = round_half_away((x.q / step).float()).double().clamp_(min=-(2.0**52))
            q = torch.minimum(torch.maximum(q, qmin.double()), qmax.double()) * (refinement / fine)
            return x.like(self.constant(q), scale / refinement if refinement > 1 else scale)
        multiplier = x.scale / step
        if multiplier.ndim not in (0, x.ndim):
            multiplier = multiplier.reshape((1,) * (x.ndim - multiplier.ndim) + multiplier.shape)
        numbers = x.q
        if grid.border is not None:
            numbers = self.add(numbers, self.constant(-grid.border_in(x.scale, step, x.ndim)))
        q = self.rescale(numbers, multiplier, qmin, qmax, refinement / fine)
        return x.like(q, scale if refinement == 1 else scale / refinement)

    def add(self, a: Symbol, b: Symbol, low: int | None = None, high: int | None = None) -> Symbol:
        first, second = self.range_of(a), self.range_of(b)
        numbers = Range(first.low + second.low, first.high + second.high)
        if low is not None:
            numbers = Range(*(min(max(end, low), high) for end in (numbers.low, numbers.high)))
        return self.emit("add", (a, b), torch.broadcast_shapes(a.shape, b.shape), numbers, low=low, high=high)

    def product(self, a: Symbol, b: Symbol) -> Symbol:
        first, second = self.range_of(a), self.range_of(b)
        ends = [x * y for x in (first.low, first.high) for y in (second.low, second.high)]
        return self.emit(
            "product", (a, b), torch.broadcast_shapes(a.shape, b.shape), Range(min(ends), max(ends))
        )


def _rescaled(numbers: Range, multiplier: Tensor) -> Range:
    """What round_half_away(x multiplier) can be, with a share of 2^-20 for the rounding of the multiplier."""
    least, most = float(multiplier.min()) * (1 - 2.0**-20), float(multiplier.max()) * (1 + 2.0**-20)

    def highest(end: int) -> int:
        return round(end * most + 0.5) if end > 0 else -max(0, round(-end * least - 0.5))

    return Range(-highest(-numbers.low), highest(numbers.high))


class Input:
    """Input number `index` of an operation, among the arguments of its layout function."""

    def __init__(self, index: int):
        self.index = index

    def __repr__(self) -> str:
        return f"input {self.index}"


# -------------------------------------------------------------------------------------- the nodes' operations


def _shape_of(node: QuantMAC, x: Tensor) -> torch.Size:
    like = torch.empty(x.shape, device="meta")
    return node.product(like, node.weight_int.to("meta").float()).shape


def _multiply_accumulate(tracer: Tracer, node: QuantMAC, x: QTensor) -> QTensor:
    if node.weight_int is None:
        raise InputError(
            f"{node.name} has 32-bit inputs or weights, so the model cannot be lowered; use at most 16 bits"
        )
    x = tracer.on_grid(node.input_grid, x)
    shape = _shape_of(node, x.q)
    scale_shape = [1] * len(shape)
    scale_shape[node.channel_dim % len(shape)] = -1
    bound = int(node.bound)
    q = tracer.emit(
        node.kind,
        (x.q,),
        shape,
        Range(-bound, bound),
        weight=node.weight_int,
        bias=_whole(node.bias_int),
        bound=bound,
        **_convolution(node),
    )
    return x.like(q, node.out_scale.reshape(scale_shape))


def _whole(numbers: Tensor | None) -> Tensor | None:
    return None if numbers is None else numbers.detach().to(torch.int64)


def _convolution(node: QuantMAC) -> dict[str, Any]:
    if isinstance(node, QuantLinear):
        return {}
    m = node.module
    facts = {"stride": m.stride, "padding": m.padding, "dilation": m.dilation, "groups": m.groups}
    if isinstance(node, QuantConvTranspose2d):
        facts["output_padding"] = m.output_padding
    return facts


def _gdn(tracer: Tracer, node: QuantGDN, x: QTensor) -> QTensor:
    if node.weight_int is None:
        raise InputError(
            f"{node.name} has 32-bit inputs or weights, so the model cannot be lowered; use at most 16 bits"
        )
    numbers = tracer.range_of(x.q)
    magnitude = tracer.on_grid(
        node.input_grid, x.like(tracer.elementwise("abs", x.q, Range(0, numbers.largest)), x.scale)
    ).q
    if node.power == 2:
        magnitude = tracer.elementwise("square", magnitude, Range(0, tracer.range_of(magnitude).largest ** 2))
    bias = _whole(node.bias_int)
    facts = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    norm = tracer.emit(
        "conv",
        (magnitude,),
        x.shape,
        Range(0, int(node.bound)),
        weight=node.weight_int,
        bias=bias,
        bound=int(node.bound),
        **facts,
    )
    carried = tracer.on_grid(node.x_grid, x)
    out_scale, low, high = (t.reshape(1, -1, 1, 1) for t in node.out_grid.parameters_of_grid())
    low, high = _whole(low), _whole(high)
    q = tracer.emit(
        "gdn",
        (carried.q, norm),
        x.shape,
        Range(int(low.min()), int(high.max())),
        mantissa=node.mantissa,
        shift=node.shift,
        low=low,
        high=high,
        inverse=bool(node.module.inverse),
        algorithm=node.algorithm,
    )
    return x.like(q, out_scale)


def _layer_norm(tracer: Tracer, node: QuantLayerNorm, x: QTensor) -> QTensor:
    x = tracer.on_grid(node.grid_in, x)
    scale, low, high = node.grid_out.parameters_of_grid()
    low, high = _whole(low), _whole(high)
    eps = float(node.module.eps / x.scale**2)
    q = tracer.elementwise(
        "layer_norm",
        x.q,
        Range(int(low.min()), int(high.max())),
        eps=eps,
        mantissa=node.gain_mantissa,
        shift=node.gain_shift,
        offset=_whole(node.offset),
        low=low,
        high=high,
    )
    return x.like(q, scale.reshape([1] * (x.ndim - 1) + [-1]))


def _carrier(tracer: Tracer, node: QuantCarrier, x: QTensor) -> QTensor:
    return tracer.on_grid(node.grid, x)


def _add(tracer: Tracer, node: QuantAdd, a: QTensor, b: QTensor | Tensor | float) -> QTensor:
    a = tracer.on_grid(node.grid, a)
    scale, low, high = node.grid.parameters_of_grid()
    if isinstance(b, QTensor):
        other = tracer.on_grid(node.grid, b).q
    elif isinstance(b, Tensor):
        other = tracer.constant(round_half_away((b.double() / scale).float()))
    else:
        other = tracer.constant(round_half_away(b / scale))
    return a.like(tracer.add(a.q, other, int(low), int(high)), scale)


def _mul(tracer: Tracer, node: QuantMul, a: QTensor, b: QTensor) -> QTensor:
    a, b = tracer.on_grid(node.grid_a, a), tracer.on_grid(node.grid_b, b)
    return tracer.on_grid(node.grid_out, a.like(tracer.product(a.q, b.q), a.scale * b.scale))


def _matmul(tracer: Tracer, node: QuantMatMul, a: QTensor, b: QTensor) -> QTensor:
    a, b = tracer.on_grid(node.grid_a, a), tracer.on_grid(node.grid_b, b)
    bound = tracer.range_of(a.q).largest * tracer.range_of(b.q).largest * a.shape[-1]
    shape = torch.matmul(torch.empty(a.shape, device="meta"), torch.empty(b.shape, device="meta")).shape
    return a.like(
        tracer.emit("matmul", (a.q, b.q), shape, Range(-bound, bound), bound=bound), a.scale * b.scale
    )


def _softmax(
    tracer: Tracer,
    node: QuantSoftmax,
    scores: QTensor,
    bias: Tensor | None = None,
    kinds: Tensor | None = None,
) -> QTensor:
    scores = tracer.on_grid(node.grid, scores)
    offset = blank = None
    if bias is not None:
        masked = torch.isinf(bias)
        offset = round_half_away(bias.masked_fill(masked, 0.0) / SOFTMAX_STEP).masked_fill(masked, MASKED)
        blank = masked.all(node.dim, keepdim=True)
        blank = blank if bool(blank.any()) else None
    q = tracer.elementwise(
        "softmax",
        scores.q,
        Range(0, round(1 / SOFTMAX_UNIT)),
        table=node.table,
        offset=_whole(offset),
        kinds=kinds,
        blank=blank,
        dim=node.dim,
    )
    if node.levels is not None:
        levels = node.levels.detach().to(torch.int64)
        return scores.like(
            tracer.elementwise("table", q, Range.of(levels), table=levels, first=0),
            torch.as_tensor(LEVEL_UNIT, dtype=torch.float64),
        )
    return scores.like(q, torch.as_tensor(SOFTMAX_UNIT, dtype=torch.float64))


def _leaky_relu(tracer: Tracer, node: QuantLeakyReLU, x: QTensor) -> QTensor:
    numbers = tracer.range_of(x.q)
    if node.slope == 0:
        return x.like(tracer._clamp(x.q, 0, None), x.scale)
    mantissa, shift = quantize_multiplier(torch.as_tensor(node.slope, dtype=torch.float64))
    low = min(0, round(numbers.low * node.slope * (1 + 2.0**-20) - 0.5)) if numbers.low < 0 else numbers.low
    return x.like(
        tracer.elementwise("leaky", x.q, Range(low, max(numbers.high, 0)), mantissa=mantissa, shift=shift),
        x.scale,
    )


def _table(tracer: Tracer, node: QuantTable, x: QTensor) -> QTensor:
    x = tracer.on_grid(node.grid_in, x)
    first = int(node.grid_in.parameters_of_grid()[1])
    table = node.table.detach().to(torch.int64)
    return x.like(
        tracer.elementwise("table", x.q, Range.of(table), table=table, first=first),
        node.grid_out.parameters_of_grid()[0],
    )


# ------------------------------------------------------------------------------------------------- boundaries


def _to_symbols(tracer: Tracer, x: Symbol, means: Symbol | None, unit: float) -> tuple[Symbol, Symbol]:
    residual = (
        x
        if means is None
        else tracer.add(x, tracer.elementwise("neg", means, _negative(tracer.range_of(means))))
    )
    symbols = tracer.rescale(residual, torch.as_tensor(unit, dtype=torch.float64))
    values = _from_symbols(tracer, symbols, unit)
    return symbols, values if means is None else tracer.add(values, means)


def _from_symbols(tracer: Tracer, symbols: Symbol, unit: float) -> Symbol:
    return tracer.rescale(symbols, torch.as_tensor(1 / unit, dtype=torch.float64))


def _negative(numbers: Range) -> Range:
    return Range(-numbers.high, -numbers.low)


def _round(tracer: Tracer, node: QuantRound, x: QTensor, means: QTensor | Tensor | None = None) -> QTensor:
    x = tracer.on_grid(node.grid, x)
    if isinstance(means, Tensor):
        means = QTensor(means, None, node.runtime)
    mean = None if means is None else tracer.on_grid(node.grid, means).q
    symbols, values = _to_symbols(tracer, x.q, mean, node.unit)
    tracer.program.boundaries.append(
        Boundary("round", node.name, x.q.number, symbols.number, values.number, means=_number(mean))
    )
    return QTensor(values, x.scale, x.runtime, latent=True)


def _number(symbol: Symbol | None) -> int | None:
    return None if symbol is None else symbol.number


def _no_likelihood(symbol: Symbol) -> Tensor:
    return torch.empty(symbol.shape, device="meta")


def _entropy_bottleneck(tracer: Tracer, node: QuantEntropyBottleneck, z: QTensor) -> tuple[QTensor, Tensor]:
    z = tracer.on_grid(node.grid, z)
    medians = tracer.constant(
        round_half_away(node._medians_for(torch.empty(z.shape, device="meta")) / node.unit)
    )
    symbols, values = _to_symbols(tracer, z.q, medians, node.unit)
    tracer.program.boundaries.append(
        Boundary(
            "entropy_bottleneck", node.name, z.q.number, symbols.number, values.number, means=medians.number
        )
    )
    return QTensor(values, z.scale, z.runtime, latent=True), _no_likelihood(values)


def _variable_bottleneck(
    tracer: Tracer, node: QuantVariableBottleneck, z: QTensor, step: Tensor
) -> tuple[QTensor, Tensor]:
    z, step = tracer.on_grid(node.grid, z), step.double()
    medians = tracer.constant(
        round_half_away(node._medians_for(torch.empty(z.shape, device="meta")) / node.unit)
    )
    symbols = tracer.rescale(_difference(tracer, z.q, medians), node.unit / step)
    values = tracer.add(tracer.rescale(symbols, step / node.unit), medians)
    tracer.program.boundaries.append(
        Boundary(
            "entropy_bottleneck",
            node.name,
            z.q.number,
            symbols.number,
            values.number,
            means=medians.number,
            step=step,
        )
    )
    return QTensor(values, z.scale, z.runtime, latent=True), _no_likelihood(values)


def _gaussian(
    tracer: Tracer, node: QuantGaussianConditional, y: QTensor, scales: QTensor, means: QTensor | None = None
):
    mean = None if means is None else tracer.on_grid(node.grid, means).q
    y = tracer.on_grid(node.grid, y)
    symbols, values = _to_symbols(tracer, y.q, None if node.rounds_whole else mean, node.unit)
    scale = tracer.on_grid(node.grid, scales).q
    tracer.program.boundaries.append(
        Boundary(
            "gaussian",
            node.name,
            y.q.number,
            symbols.number,
            values.number,
            means=_number(mean),
            scales=scale.number,
            whole=node.rounds_whole,
        )
    )
    return QTensor(values, y.scale, y.runtime, latent=True), _no_likelihood(values)


def _mixture(
    tracer: Tracer, node: QuantGaussianMixture, y: QTensor, scales: QTensor, means: QTensor, weights: QTensor
):
    y = tracer.on_grid(node.grid, y)
    symbols, values = _to_symbols(tracer, y.q, None, node.unit)
    scales, means, weights = (tracer.on_grid(node.grid, part).q.number for part in (scales, means, weights))
    tracer.program.boundaries.append(
        Boundary(
            "mixture",
            node.name,
            y.q.number,
            symbols.number,
            values.number,
            means=means,
            scales=scales,
            weights=weights,
            whole=True,
        )
    )
    return QTensor(values, y.scale, y.runtime, latent=True), _no_likelihood(values)


def _one_gain(gain: Tensor) -> Tensor:
    if gain.numel() > 1:
        raise InputError("a program has one rate: lower a model that is set to it, for images without planes")
    return gain.double()


def _difference(tracer: Tracer, a: Symbol, b: Symbol) -> Symbol:
    return tracer.add(a, tracer.elementwise("neg", b, _negative(tracer.range_of(b))))


def _moves(tracer: Tracer, node: QuantOffsets, symbols: Symbol, scales: QTensor, gain: Tensor) -> Symbol:
    """`QuantOffsets.offsets`."""
    index = tracer.on_grid(node.scale_grid, scales * gain)
    table = node.table(float(gain)).to(torch.int64)
    first = int(node.scale_grid.parameters_of_grid()[1])
    offsets = tracer.elementwise("table", index.q, Range.of(table), table=table, first=first)
    return tracer.product(offsets, tracer._clamp(symbols, -1, 1))


def _offsets(
    tracer: Tracer, node: QuantOffsets, y: QTensor, scales: QTensor, gain: Tensor, means: QTensor | None
) -> QTensor:
    y, gain = tracer.on_grid(node.grid, y), _one_gain(gain)
    mean = None if means is None else tracer.on_grid(node.grid, means).q
    symbols = tracer.rescale(y.q if mean is None else _difference(tracer, y.q, mean), gain * node.unit)
    moved = tracer.add(_from_symbols(tracer, symbols, node.unit), _moves(tracer, node, symbols, scales, gain))
    values = tracer.rescale(moved, 1 / gain)
    values = values if mean is None else tracer.add(values, mean)
    tracer.program.boundaries.append(
        Boundary("offsets", node.name, y.q.number, symbols.number, values.number, means=_number(mean))
    )
    return QTensor(values, y.scale, y.runtime, latent=True)


def _whole_offsets(
    tracer: Tracer, node: QuantWholeOffsets, symbols: QTensor, scales: QTensor, gain: Tensor, means: QTensor
) -> QTensor:
    symbols, mean, gain = (
        tracer.on_grid(node.grid, symbols),
        tracer.on_grid(node.grid, means).q,
        _one_gain(gain),
    )
    residual = _difference(tracer, symbols.q, tracer.rescale(mean, gain))
    nearest = tracer.rescale(residual, torch.as_tensor(node.unit, dtype=torch.float64))
    is_near = tracer.elementwise(
        "table", tracer._clamp(nearest, -1, 1), Range(0, 1), table=torch.tensor([0, 1, 0]), first=-1
    )
    half = round(0.5 / node.unit)
    near = tracer._clamp(tracer.product(residual, is_near), -half, half)
    shares = node.shares().to(torch.int64)
    index = tracer.on_grid(node.scale_grid, scales * gain)
    share = tracer.elementwise(
        "table", index.q, Range.of(shares), table=shares, first=int(node.scale_grid.parameters_of_grid()[1])
    )
    kept = tracer.rescale(
        tracer.product(near, share), torch.as_tensor(2.0**-node.share_bits, dtype=torch.float64)
    )
    moved = tracer.add(
        _difference(tracer, residual, near), tracer.add(kept, _moves(tracer, node, nearest, scales, gain))
    )
    return QTensor(
        tracer.add(tracer.rescale(moved, 1 / gain), mean), symbols.scale, symbols.runtime, latent=True
    )


_NODES: dict[type[QuantModule], Callable] = {
    QuantMAC: _multiply_accumulate,
    QuantGDN: _gdn,
    QuantLayerNorm: _layer_norm,
    QuantCarrier: _carrier,
    QuantAdd: _add,
    QuantMul: _mul,
    QuantMatMul: _matmul,
    QuantSoftmax: _softmax,
    QuantLeakyReLU: _leaky_relu,
    QuantTable: _table,
    QuantRound: _round,
    QuantEntropyBottleneck: _entropy_bottleneck,
    QuantVariableBottleneck: _variable_bottleneck,
    QuantGaussianConditional: _gaussian,
    QuantGaussianMixture: _mixture,
    QuantOffsets: _offsets,
    QuantWholeOffsets: _whole_offsets,
}
