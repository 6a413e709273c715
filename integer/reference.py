"""What each operation means: a few lines of PyTorch, exact on any device (design, section 4).

Products run as ordinary convolutions on integers held as floats: float32 where the proven range of the result
stays below 2^24, so that no order of summation rounds, else float64. Values are stored in the integer type
that the program proves to be enough, so a wrong proof would show.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from licq.integer.program import Program
from licq.quant import operations as ops
from licq.quant.fixedpoint import EXACT_FLOAT32, requantize
from licq.quant.integer_functions import fixed_softmax, integer_gdn, integer_layer_norm
from licq.quant.operations import Operand, Operation
from licq.support.determinism import exact_products

_IN_FLOAT = {"unfold", "max_pool2d", "upsample_nearest2d"}
"""Layout functions that PyTorch lacks for integers."""

Meaning = Mapping[type[Operation], Callable]
"""For each kind of operation a function: (operation, its inputs) -> its result, or a list of its results."""


def run(
    program: Program, inputs: Mapping[str, Tensor], keep: bool = False
) -> dict[str, Tensor] | dict[int, Tensor]:
    """The outputs of a program by name; with `keep`, every value by number.

    inputs: integers by name, of the shapes and ranges that the program states, on the device of its constants
    (`Program.to`).
    """
    with exact_products(next((x.device for x in inputs.values()), torch.device("cpu"))):
        return interpret(
            program, inputs, MEANING, lambda number, tensor: tensor.to(program.values[number].dtype), keep
        )


def interpret(
    program: Program,
    inputs: Mapping[str, Tensor],
    meaning: Meaning,
    stored: Callable[[int, Tensor], Tensor] = lambda number, tensor: tensor,
    keep: bool = False,
) -> dict[Any, Tensor]:
    """The outputs of a program by name, with operations that mean what `meaning` says; with `keep`, every
    value by number.

    stored: (number, result) -> what later operations read under that number.
    """
    numbers = {number: name for name, number in program.inputs.items()}
    last = _last_use(program)
    values: dict[int, Tensor] = {}
    for position, operation in enumerate(program.operations):
        for number, tensor in results_of(operation, values, inputs, numbers, meaning):
            values[number] = stored(number, tensor)
        if not keep:
            for number in operation.inputs:
                if last[number] == position:
                    values.pop(number, None)
    return values if keep else {name: values[number] for name, number in program.outputs.items()}


def results_of(
    operation: Operation,
    values: Mapping[int, Tensor],
    inputs: Mapping[str, Tensor],
    names: Mapping[int, str],
    meaning: Meaning,
) -> Iterator[tuple[int, Tensor]]:
    """(number, tensor) of each result of an operation on `values`; an input's is that of its name."""
    if isinstance(operation, ops.Input):
        outputs = [inputs[names[operation.outputs[0]]]]
    else:
        result = meaning[type(operation)](operation, *(values[number] for number in operation.inputs))
        outputs = list(result) if isinstance(result, (list, tuple)) else [result]
    return zip(operation.outputs, outputs, strict=True)


def _last_use(program: Program) -> dict[int, int]:
    last = {
        number: position
        for position, operation in enumerate(program.operations)
        for number in (*operation.inputs, *operation.outputs)
    }
    return {**last, **dict.fromkeys(program.outputs.values(), len(program.operations))}


# ------------------------------------------------------------------------------------------------ elementwise


def _clipped(x: Tensor, low: ops.Ends, high: ops.Ends) -> Tensor:
    if low is not None:
        x = torch.maximum(x, low) if isinstance(low, Tensor) else x.clamp(min=low)
    if high is not None:
        x = torch.minimum(x, high) if isinstance(high, Tensor) else x.clamp(max=high)
    return x


def _rescale(operation: ops.Rescale, x: Tensor) -> Tensor:
    out = requantize(x.to(torch.int64), operation.mantissa, operation.shift)
    if operation.low is None:
        return out
    return _clipped(out, operation.low, operation.high) * operation.refinement


def _leaky(operation: ops.Leaky, x: Tensor) -> Tensor:
    x = x.to(torch.int64)
    return torch.where(x < 0, requantize(x, operation.mantissa, operation.shift), x)


def _table(operation: ops.Table, x: Tensor) -> Tensor:
    table = operation.table
    return table[(x.to(torch.int64) - operation.first).clamp(0, len(table) - 1)]


def _gdn(operation: ops.Gdn, x: Tensor, norm: Tensor) -> Tensor:
    out = integer_gdn(x, norm, operation.mantissa, operation.shift, operation.inverse, operation.algorithm)
    return _clipped(out, operation.low.double(), operation.high.double())


# -------------------------------------------------------------------------------------- sums along dimensions


def float_type(operation: ops.MultiplyAccumulate | ops.MatMul) -> torch.dtype:
    """The floating-point type in which the sums of an operation's products are exact."""
    return torch.float32 if operation.bound < EXACT_FLOAT32 else torch.float64


def _products(multiply: Callable[[Any, Tensor, Tensor], Tensor], channel_dim: int) -> Callable:
    def compute(operation: ops.MultiplyAccumulate, x: Tensor) -> Tensor:
        dtype = float_type(operation)
        out = multiply(operation, x.to(dtype), operation.weight.to(dtype)).to(torch.int64)
        if operation.bias is not None:
            shape = [1] * out.ndim
            shape[channel_dim] = -1
            out += operation.bias.reshape(shape)
        return out

    return compute


def _convolved(convolve: Callable[..., Tensor]) -> Callable:
    def multiply(conv: ops.Convolution, x: Tensor, weight: Tensor) -> Tensor:
        return convolve(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)

    return _products(multiply, 1)


def _deconvolved(operation: ops.ConvTranspose2d, x: Tensor, weight: Tensor) -> Tensor:
    """weight: (outputs, inputs / groups, height, width)."""
    groups, padding = operation.groups, operation.padding
    assert not isinstance(padding, str)  # transposed convolutions have none by name
    outputs, per_group, *kernel = weight.shape
    weight = weight.reshape(groups, outputs // groups, per_group, *kernel).transpose(1, 2)
    weight = weight.reshape(-1, outputs // groups, *kernel)
    return F.conv_transpose2d(
        x,
        weight,
        None,
        operation.stride,
        padding,
        operation.output_padding,
        groups,
        operation.dilation,
    )


def _matmul(operation: ops.MatMul, a: Tensor, b: Tensor) -> Tensor:
    dtype = float_type(operation)
    return a.to(dtype) @ b.to(dtype)


def _softmax(operation: ops.Softmax, q: Tensor) -> Tensor:
    kinds, blank = operation.kinds, operation.blank
    offset = None if operation.offset is None else operation.offset.float()
    p = fixed_softmax(q.float(), operation.table, offset, kinds, operation.dim)
    if blank is not None:
        p = p.masked_fill(blank if kinds is None else blank.index_select(0, kinds), 0.0)
    return p


def _layer_norm(operation: ops.LayerNorm, x: Tensor) -> Tensor:
    mantissa = operation.mantissa
    normalized = integer_layer_norm(x, operation.eps).to(torch.int64)
    out = requantize(normalized, mantissa.abs(), operation.shift) * mantissa.sign() + operation.offset
    return _clipped(out, operation.low, operation.high)


def _attention(operation: ops.Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = _rescale(operation.scores, _matmul(operation.products, q, k).to(torch.int64))
    weights = _rescale(operation.weights, _softmax(operation.softmax, scores))
    return _matmul(operation.output, weights, v)


# ----------------------------------------------------------------------------------------------------- layout


def _layout(operation: ops.Layout, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
    as_float = operation.name in _IN_FLOAT or (
        operation.name == "pad" and operation.options.get("mode", "constant") != "constant"
    )
    arguments = _filled(operation.arguments, [x.double() if as_float else x for x in inputs])
    return layout_function(operation.name)(*arguments, **operation.options)


def _filled(parts: Any, inputs: list[Tensor]) -> Any:
    if isinstance(parts, (list, tuple)) and not isinstance(parts, torch.Size):
        return type(parts)(_filled(part, inputs) for part in parts)
    if isinstance(parts, Operand):
        return inputs[parts.index]
    return parts


def layout_function(name: str) -> Callable:
    """PyTorch's function of that name."""
    for owner in (F, torch.Tensor, torch):
        if hasattr(owner, name):
            return getattr(owner, name)
    raise ValueError(f"PyTorch has no function {name!r}")


MEANING: Meaning = {
    ops.Constant: lambda operation: operation.value,
    ops.Rescale: _rescale,
    ops.Conv2d: _convolved(F.conv2d),
    ops.Conv3d: _convolved(F.conv3d),
    ops.ConvTranspose2d: _products(_deconvolved, 1),
    ops.Linear: _products(lambda operation, x, weight: F.linear(x, weight), -1),
    ops.MatMul: _matmul,
    ops.Add: lambda operation, a, b: _clipped(
        a.to(torch.int64) + b.to(torch.int64), operation.low, operation.high
    ),
    ops.Product: lambda operation, a, b: a.to(torch.int64) * b.to(torch.int64),
    ops.Neg: lambda operation, x: -x.to(torch.int64),
    ops.Abs: lambda operation, x: x.to(torch.int64).abs(),
    ops.Square: lambda operation, x: x.to(torch.int64).square(),
    ops.Sum: lambda operation, x: x.to(torch.int64).sum(operation.dim, operation.keepdim),
    ops.Clamp: lambda operation, x: _clipped(x.to(torch.int64), operation.low, operation.high),
    ops.Mask: lambda operation, x: x.to(torch.int64) * operation.mask,
    ops.Leaky: _leaky,
    ops.Table: _table,
    ops.Softmax: _softmax,
    ops.Attention: _attention,
    ops.LayerNorm: _layer_norm,
    ops.Gdn: _gdn,
    ops.Layout: _layout,
}
