"""Rewrites of a program that leave its results as they are, to the bit, and bring elementwise operations next
to the products.

Every pass gives a new program; boundaries and outputs keep their values' numbers.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import Tensor

from licq.integer.groups import PRODUCTS, constants_of
from licq.integer.program import Program
from licq.integer.reference import MEANING, layout_function
from licq.quant import operations as ops
from licq.quant.operations import Boundary, Operand, Operation

_MOVES = {
    "permute",
    "transpose",
    "t",
    "unsqueeze",
    "squeeze",
    "movedim",
    "narrow",
    "select",
    "__getitem__",
    "expand",
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
}


def optimize(program: Program) -> Program:
    """All passes."""
    program = without_idle_rescales(with_folded_constants(program))
    program = with_split_products(program)
    program = with_early_elementwise(program)
    return without_unused(with_attention(program))


def _with(program: Program, operations: list[Operation]) -> Program:
    return Program(operations, program.values, program.inputs, program.outputs, program.boundaries)


def _named(program: Program) -> set[int]:
    """Values that something outside the operations refers to."""
    of_boundaries = {number for boundary in program.boundaries for _, number in boundary.values()}
    return {*program.outputs.values(), *of_boundaries}


def _readers(operations: Iterable[Operation]) -> dict[int, list[Operation]]:
    readers: dict[int, list[Operation]] = {}
    for operation in operations:
        for number in operation.inputs:
            readers.setdefault(number, []).append(operation)
    return readers


def without_duplicates(program: Program) -> Program:
    """Without operations of the same kind, inputs and attributes as an earlier one.

    Boundaries and outputs refer to the earlier result. So two roundings of one latent about one mean, one for
    the decoder and one for the estimate of the rate, become one.
    """
    alias: dict[int, int] = {}
    first: dict[tuple, Operation] = {}
    operations = []
    for operation in program.operations:
        operation = replace(operation, inputs=tuple(alias.get(number, number) for number in operation.inputs))
        key = (type(operation), operation.inputs, _digest(operation.attributes()))
        known = None if isinstance(operation, ops.Input) else first.get(key)
        if known is None:
            first[key] = operation
            operations.append(operation)
        else:
            alias.update(zip(operation.outputs, known.outputs, strict=True))

    def renamed(boundary: Boundary) -> Boundary:
        return replace(boundary, **{name: alias.get(number, number) for name, number in boundary.values()})

    outputs = {name: alias.get(number, number) for name, number in program.outputs.items()}
    return Program(
        operations,
        program.values,
        program.inputs,
        outputs,
        [renamed(boundary) for boundary in program.boundaries],
    )


def _digest(part: Any) -> Any:
    """Something hashable that is equal for equal attributes."""
    if isinstance(part, Tensor):
        return str(part.dtype), tuple(part.shape), part.detach().contiguous().numpy().tobytes()
    if isinstance(part, dict):
        return tuple((name, _digest(value)) for name, value in sorted(part.items()))
    if isinstance(part, (list, tuple)):
        return tuple(_digest(value) for value in part)
    return repr(part)


def without_unused(program: Program) -> Program:
    """Without operations that nothing needs."""
    needed = _named(program)
    needed_operations = []
    for operation in reversed(program.operations):
        if isinstance(operation, ops.Input) or needed.intersection(operation.outputs):
            needed.update(operation.inputs)
            needed_operations.append(operation)
    return _with(program, needed_operations[::-1])


def with_folded_constants(program: Program) -> Program:
    """With constants in the place of operations on constants."""
    values, operations = constants_of(program), []
    for operation in program.operations:
        known = [values[number] for number in operation.inputs if number in values]
        if known and len(known) == len(operation.inputs) and len(operation.outputs) == 1:
            (number,) = operation.outputs
            result = MEANING[type(operation)](operation, *known)
            if not isinstance(result, (list, tuple)):
                values[number] = result.to(torch.int64)
                operation = ops.Constant((), (number,), operation.node, value=values[number])
        operations.append(operation)
    return _with(program, operations)


def without_idle_rescales(program: Program) -> Program:
    """Without rescales by 1 that clip nothing."""
    alias: dict[int, int] = {}
    named, operations = _named(program), []
    for operation in program.operations:
        operation = replace(operation, inputs=tuple(alias.get(number, number) for number in operation.inputs))
        if (
            isinstance(operation, ops.Rescale)
            and _is_idle(program, operation)
            and operation.outputs[0] not in named
        ):
            alias[operation.outputs[0]] = operation.inputs[0]
        else:
            operations.append(operation)
    return _with(program, operations)


def _is_idle(program: Program, rescale: ops.Rescale) -> bool:
    numbers = program.values[rescale.inputs[0]].range
    one = torch.equal(rescale.mantissa.double(), torch.exp2(rescale.shift.double())) and bool(
        (rescale.refinement == 1).all()
    )
    return one and (
        rescale.low is None
        or rescale.high is None
        or (int(rescale.low.max()) <= numbers.low and numbers.high <= int(rescale.high.min()))
    )


def with_split_products(program: Program) -> Program:
    """With a layer for each part, where the outputs of one layer are only cut into parts along the channels.

    Such parts are queries, keys and values, or scales and means.
    """
    readers, named, operations = _readers(program.operations), _named(program), []
    replaced: set[int] = set()
    for operation in program.operations:
        if operation.outputs and operation.outputs[0] in replaced:
            continue  # the cut of a layer that is cut already
        cut = readers.get(operation.outputs[0], []) if operation.outputs else []
        if (
            isinstance(operation, PRODUCTS)
            and len(cut) == 1
            and operation.outputs[0] not in named
            and _cuts_channels(program, operation, cut[0])
        ):
            replaced.add(cut[0].outputs[0])
            start = 0
            for number in cut[0].outputs:
                size = program.values[number].shape[_channel_dim(program, operation)]
                rows = slice(start, start + size)
                start += size
                bias = None if operation.bias is None else operation.bias[rows]
                part = replace(operation, outputs=(number,), weight=operation.weight[rows], bias=bias)
                operations.append(part)
        else:
            operations.append(operation)
    return _with(program, operations)


def _channel_dim(program: Program, operation: Operation) -> int:
    return len(program.values[operation.outputs[0]].shape) - 1 if isinstance(operation, ops.Linear) else 1


def _cuts_channels(program: Program, product: Operation, cut: Operation) -> bool:
    grouped = isinstance(product, ops.Convolution) and product.groups != 1
    if not isinstance(cut, ops.Layout) or cut.name not in ("chunk", "split") or grouped:
        return False
    dim = cut.argument(2, "dim", 0)
    return dim % len(program.values[cut.inputs[0]].shape) == _channel_dim(program, product)


def with_early_elementwise(program: Program) -> Program:
    """With elementwise operations of one value in front of the layout functions on whose results they work.

    So the results of a layer are requantized as they are computed, and layout functions move small numbers.
    """
    producers = program.producers()
    operations: list[Operation] = []
    for operation in program.operations:
        rewritten = _moved(program, operation, producers)
        operations += rewritten
        for step in rewritten:
            producers.update(dict.fromkeys(step.outputs, step))
    return _with(program, operations)


def _moved(program: Program, operation: Operation, producers: dict[int, Operation]) -> list[Operation]:
    """The operation in front of as many layout functions as it can, and these on its result."""
    if not isinstance(operation, ops.Unary) or len(operation.inputs) != 1:
        return [operation]
    chain: list[ops.Layout] = []  # from the operation upwards
    number = operation.inputs[0]
    while (layout := producers.get(number)) is not None and _is_move(layout):
        chain.append(layout)
        number = layout.inputs[0]
    for depth in range(len(chain), 0, -1):
        layouts = chain[:depth][::-1]
        source = layouts[0].inputs[0]
        parameters = _parameters_before(
            operation, layouts, program.values[source].shape, _channels_of(source, program, producers)
        )
        if parameters is None:
            continue
        numbers = program.values[operation.outputs[0]].range
        steps: list[Operation] = [
            replace(
                operation,
                inputs=(source,),
                outputs=(program.value(program.values[source].shape, numbers),),
                **parameters,
            )
        ]
        for layout in layouts:
            last = layout is layouts[-1]
            out = (
                operation.outputs[0]
                if last
                else program.value(program.values[layout.outputs[0]].shape, numbers)
            )
            steps.append(replace(layout, inputs=steps[-1].outputs, outputs=(out,)))
        return steps
    return [operation]


def _is_move(operation: Operation) -> TypeGuard[ops.Layout]:
    return (
        isinstance(operation, ops.Layout)
        and operation.name in _MOVES
        and len(operation.inputs) == len(operation.outputs) == 1
    )


def _channels_of(number: int, program: Program, producers: dict[int, Operation]) -> int:
    """The dimension of a value that holds channels."""
    operation = producers[number]
    while isinstance(operation, ops.Elementwise) and not isinstance(operation, ops.Gdn):
        operation = producers[operation.inputs[0]]
    images = isinstance(operation, (ops.Convolution, ops.Gdn, ops.Input))
    return 1 if images else len(program.values[number].shape) - 1


def _parameters_before(
    operation: ops.Unary, layouts: list[ops.Layout], shape: tuple[int, ...], dim: int
) -> dict[str, Tensor] | None:
    """The operation's parameters in front of layout functions; None where there are none.

    Each is one number, or varies along dimension `dim` of `shape`. A pad brings zeros in, so the operation
    must leave them as they are.
    """
    stated = operation.parameters()
    pads = [layout for layout in layouts if layout.name == "pad"]
    if pads:
        constant = all(pad.options.get("mode", "constant") == "constant" for pad in pads)
        if not (constant and operation.keeps_zero):
            return None
        if "low" in stated and not int(stated["low"].max()) <= 0 <= int(stated["high"].min()):
            return None
    before = {name: part.reshape(()) for name, part in stated.items() if part.numel() == 1}
    varying = {name: part for name, part in stated.items() if part.numel() > 1}
    if not varying:
        return before
    view = [-1 if d == dim else 1 for d in range(len(shape))]
    # the channel that each number comes from, counted from 1; pads bring 0
    came_from = torch.arange(1, shape[dim] + 1, dtype=torch.int16).reshape(view).expand(shape)
    for layout in layouts:
        came_from = _laid(layout, came_from)
    of_channels = _along(came_from, varying, shape[dim])
    if of_channels is None:
        return None
    return {**before, **{name: part.reshape(view) for name, part in of_channels.items()}}


def _laid(layout: ops.Layout, x: Tensor) -> Tensor:
    """What a layout function makes of x.

    x is one number repeated along most dimensions, in no memory of its own (stride 0). Functions that choose
    or shift positions along these dimensions change nothing there, so they need not copy.
    """
    if layout.name == "index_select" and len(layout.arguments) == 3:
        _, dim, index = layout.arguments
        if x.stride(dim) == 0:
            shape = [*x.shape]
            shape[dim] = len(index)
            return x.narrow(dim, 0, 1).expand(shape)
    if layout.name in ("roll", "flip"):
        dims = layout.argument(2 if layout.name == "roll" else 1, "dims")
        dims = (dims,) if isinstance(dims, int) else dims
        if dims is not None and all(x.stride(dim) == 0 for dim in dims):
            return x
    arguments = [x if isinstance(part, Operand) else part for part in layout.arguments]
    return layout_function(layout.name)(*arguments, **layout.options)


def with_attention(program: Program) -> Program:
    """Scores, softmax and weighted sum become one operation `attention` on queries, keys (transposed) and
    values."""
    producers, readers, named = program.producers(), _readers(program.operations), _named(program)

    def only_reader(operation: Operation) -> Operation | None:
        number = operation.outputs[0]
        those = readers.get(number, [])
        return those[0] if number not in named and len(those) == 1 else None

    fused: dict[int, Operation] = {}  # by the identity of the last operation
    inside: set[int] = set()
    for softmax in program.operations:
        if not isinstance(softmax, ops.Softmax):
            continue
        scores = producers[softmax.inputs[0]]
        if not isinstance(scores, ops.Rescale) or only_reader(scores) is not softmax:
            continue
        products = producers[scores.inputs[0]]
        if not isinstance(products, ops.MatMul) or only_reader(products) is not scores:
            continue
        weights = only_reader(softmax)
        if not isinstance(weights, ops.Rescale):
            continue
        output = only_reader(weights)
        if not isinstance(output, ops.MatMul) or output.inputs[0] != weights.outputs[0]:
            continue
        fused[id(output)] = ops.Attention(
            (*products.inputs, output.inputs[1]),
            output.outputs,
            softmax.node,
            products=products,
            scores=scores,
            softmax=softmax,
            weights=weights,
            output=output,
        )
        inside.update(map(id, (products, scores, softmax, weights, output)))
    operations = [
        fused.get(id(op), op) for op in program.operations if id(op) in fused or id(op) not in inside
    ]
    return _with(program, operations)


def _along(came_from: Tensor, parameters: dict[str, Tensor], size: int) -> dict[str, Tensor] | None:
    """Each parameter by channel, (size,); None where two numbers of one channel have different parameters.

    came_from: the channel + 1 that each number comes from, or 0. The parameters broadcast to it.
    """
    full = {
        name: part.reshape((1,) * (came_from.ndim - part.ndim) + part.shape)
        for name, part in parameters.items()
    }
    varies = [any(part.shape[d] > 1 for part in full.values()) for d in range(came_from.ndim)]
    # along dimensions of stride 0 one position has the numbers of all
    came_from = came_from[
        tuple(slice(None) if varies[d] or came_from.stride(d) else slice(0, 1) for d in range(came_from.ndim))
    ]
    sample = came_from[tuple(slice(None) if yes else slice(0, 1) for yes in varies)]
    # the sample is enough, where channels vary only as the parameters do
    if not (bool((sample > 0).all()) and bool(((came_from == sample) | (came_from == 0)).all())):
        sample = came_from
    channels = sample.flatten().long()
    inside = channels > 0
    channels = channels[inside] - 1
    by_channel = {}
    for name, part in full.items():
        values = part.expand_as(sample).flatten()[inside]
        if not len(values):
            return None
        result = values[:1].expand(size).clone()  # also for channels that nothing reads
        result[channels] = values
        if not torch.equal(result[channels], values):
            return None
        by_channel[name] = result
    return by_channel
