"""What each operation means: a few lines of PyTorch, exact on any device (design, section 4).

Products run as ordinary convolutions on whole numbers held as floats: float32 where the proven range of the
result stays below 2^24, so that no order of summation rounds, else float64. Values are kept in the integer
type that the program proves to be enough, so a wrong proof would show.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from licq.integer.lowering import Input
from licq.integer.program import Operation, Program
from licq.quant.fixedpoint import requantize
from licq.quant.integer_functions import fixed_softmax, integer_gdn, integer_layer_norm
from licq.support.determinism import exact_products

EXACT_FLOAT32 = 2**24
_IN_FLOAT = {
    "unfold",
    "max_pool2d",
    "upsample_nearest2d",
}  # layout functions that PyTorch lacks for whole numbers


def run(
    program: Program, inputs: Mapping[str, Tensor], keep: bool = False
) -> dict[str, Tensor] | dict[int, Tensor]:
    """The outputs of a program by name; with `keep`, every value by number.

    inputs: whole numbers by name, of the shapes and ranges that the program states, on the device of its
    constants (`Program.to`).
    """
    with exact_products(next((x.device for x in inputs.values()), torch.device("cpu"))):
        return interpret(
            program, inputs, MEANING, lambda number, tensor: tensor.to(program.values[number].dtype), keep
        )


def interpret(
    program: Program,
    inputs: Mapping[str, Tensor],
    meaning: Mapping[str, Callable],
    stored: Callable[[int, Tensor], Tensor] = lambda number, tensor: tensor,
    keep: bool = False,
) -> dict[Any, Tensor]:
    """`run`, with a meaning of one's own for each kind of operation; `stored` makes of a result what is kept
    under its number."""
    numbers = {number: name for name, number in program.inputs.items()}
    last = _last_use(program)
    values: dict[int, Tensor] = {}
    for place, operation in enumerate(program.operations):
        for number, tensor in results_of(operation, values, inputs, numbers, meaning):
            values[number] = stored(number, tensor)
        if not keep:
            for number in operation.inputs:
                if last[number] == place:
                    values.pop(number, None)
    return values if keep else {name: values[number] for name, number in program.outputs.items()}


def results_of(
    operation: Operation,
    values: Mapping[int, Tensor],
    inputs: Mapping[str, Tensor],
    names: Mapping[int, str],
    meaning: Mapping[str, Callable],
) -> Iterator[tuple[int, Tensor]]:
    """(number, tensor) of each result of an operation on `values`; an input's is that of its name."""
    if operation.kind == "input":
        outputs = [inputs[names[operation.outputs[0]]]]
    else:
        result = meaning[operation.kind](operation, *(values[number] for number in operation.inputs))
        outputs = list(result) if isinstance(result, (list, tuple)) else [result]
    return zip(operation.outputs, outputs, strict=True)


def _last_use(program: Program) -> dict[int, int]:
    last = {
        number: place
        for place, operation in enumerate(program.operations)
        for number in (*operation.inputs, *operation.outputs)
    }
    return {**last, **dict.fromkeys(program.outputs.values(), len(program.operations))}


def _constant(operation: Operation) -> Tensor:
    return operation.facts["value"]


def _rescale(operation: Operation, x: Tensor) -> Tensor:
    facts = operation.facts
    out = requantize(x.to(torch.int64), facts["mantissa"], facts["shift"])
    if facts["low"] is not None:
        out = torch.minimum(torch.maximum(out, facts["low"]), facts["high"]) * facts["refinement"]
    return out


def float_type(operation: Operation) -> torch.dtype:
    """The floating-point type in which the sums of an operation's products are exact."""
    return torch.float32 if operation.facts["bound"] < EXACT_FLOAT32 else torch.float64


def _products(multiply: Callable[[Operation, Tensor, Tensor], Tensor], channel_dim: int) -> Callable:
    def compute(operation: Operation, x: Tensor) -> Tensor:
        weight, bias = operation.facts["weight"], operation.facts["bias"]
        dtype = float_type(operation)
        out = multiply(operation, x.to(dtype), weight.to(dtype)).to(torch.int64)
        if bias is not None:
            shape = [1] * out.ndim
            shape[channel_dim] = -1
            out += bias.reshape(shape)
        return out

    return compute


def _conv(operation: Operation, x: Tensor, weight: Tensor) -> Tensor:
    facts = operation.facts
    convolve = F.conv3d if operation.kind == "conv3d" else F.conv2d
    return convolve(x, weight, None, facts["stride"], facts["padding"], facts["dilation"], facts["groups"])


def _deconv(operation: Operation, x: Tensor, weight: Tensor) -> Tensor:
    """weight: canonical, (outputs, inputs / groups, height, width)."""
    facts = operation.facts
    outputs, per_group, *kernel = weight.shape
    weight = weight.reshape(facts["groups"], outputs // facts["groups"], per_group, *kernel).transpose(1, 2)
    weight = weight.reshape(-1, outputs // facts["groups"], *kernel)
    return F.conv_transpose2d(
        x,
        weight,
        None,
        facts["stride"],
        facts["padding"],
        facts["output_padding"],
        facts["groups"],
        facts["dilation"],
    )


def _matmul(operation: Operation, a: Tensor, b: Tensor) -> Tensor:
    dtype = float_type(operation)
    return a.to(dtype) @ b.to(dtype)


def _add(operation: Operation, a: Tensor, b: Tensor) -> Tensor:
    out = a.to(torch.int64) + b.to(torch.int64)
    return (
        out if operation.facts["low"] is None else out.clamp(operation.facts["low"], operation.facts["high"])
    )


def _clamp(operation: Operation, x: Tensor) -> Tensor:
    low, high = operation.facts["low"], operation.facts["high"]
    out = x.to(torch.int64)
    out = out if low is None else torch.maximum(out, low)
    return out if high is None else torch.minimum(out, high)


def _leaky(operation: Operation, x: Tensor) -> Tensor:
    x = x.to(torch.int64)
    return torch.where(x < 0, requantize(x, operation.facts["mantissa"], operation.facts["shift"]), x)


def _table(operation: Operation, x: Tensor) -> Tensor:
    table = operation.facts["table"]
    return table[(x.to(torch.int64) - operation.facts["first"]).clamp(0, len(table) - 1)]


def _softmax(operation: Operation, q: Tensor) -> Tensor:
    facts = operation.facts
    kinds, blank = facts["kinds"], facts["blank"]
    offset = None if facts["offset"] is None else facts["offset"].float()
    p = fixed_softmax(q.float(), facts["table"], offset, kinds, facts["dim"])
    if blank is not None:
        p = p.masked_fill(blank if kinds is None else blank.index_select(0, kinds), 0.0)
    return p


def _layer_norm(operation: Operation, x: Tensor) -> Tensor:
    facts = operation.facts
    low, high, mantissa, shift, offset = (
        facts[key] for key in ("low", "high", "mantissa", "shift", "offset")
    )
    out = (
        requantize(integer_layer_norm(x, facts["eps"]).to(torch.int64), mantissa.abs(), shift)
        * mantissa.sign()
        + offset
    )
    return torch.minimum(torch.maximum(out, low), high)


def _gdn(operation: Operation, x: Tensor, norm: Tensor) -> Tensor:
    facts = operation.facts
    out = integer_gdn(x, norm, facts["mantissa"], facts["shift"], facts["inverse"], facts["algorithm"])
    return torch.minimum(torch.maximum(out, facts["low"].double()), facts["high"].double())


def _attention(operation: Operation, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    products, scores, softmax, weights, output = operation.facts["steps"]
    p = _softmax(softmax, _rescale(scores, _matmul(products, q, k).to(torch.int64)))
    return _matmul(output, _rescale(weights, p), v)


def _layout(operation: Operation, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
    facts = operation.facts
    as_float = facts["name"] in _IN_FLOAT or (
        facts["name"] == "pad" and facts["options"].get("mode", "constant") != "constant"
    )
    arguments = _filled(facts["arguments"], [x.double() if as_float else x for x in inputs])
    return layout_function(facts["name"])(*arguments, **facts["options"])


def _filled(parts: Any, inputs: list[Tensor]) -> Any:
    if isinstance(parts, (list, tuple)) and not isinstance(parts, torch.Size):
        return type(parts)(_filled(part, inputs) for part in parts)
    if isinstance(parts, Input):
        return inputs[parts.index]
    return parts


def layout_function(name: str) -> Callable:
    for owner in (F, torch.Tensor, torch):
        if hasattr(owner, name):
            return getattr(owner, name)
    raise ValueError(f"PyTorch has no function {name!r}")


MEANING: dict[str, Callable] = {
    "constant": _constant,
    "rescale": _rescale,
    "conv": _products(_conv, 1),
    "conv3d": _products(_conv, 1),
    "deconv": _products(_deconv, 1),
    "linear": _products(lambda operation, x, weight: F.linear(x, weight), -1),
    "matmul": _matmul,
    "add": _add,
    "product": lambda operation, a, b: a.to(torch.int64) * b.to(torch.int64),
    "neg": lambda operation, x: -x.to(torch.int64),
    "abs": lambda operation, x: x.to(torch.int64).abs(),
    "square": lambda operation, x: x.to(torch.int64).square(),
    "sum": lambda operation, x: x.to(torch.int64).sum(operation.facts["dim"], operation.facts["keepdim"]),
    "clamp": _clamp,
    "mask": lambda operation, x: x.to(torch.int64) * operation.facts["mask"],
    "leaky": _leaky,
    "table": _table,
    "softmax": _softmax,
    "attention": _attention,
    "layer_norm": _layer_norm,
    "gdn": _gdn,
    "layout": _layout,
}
