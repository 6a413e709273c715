"""Rewrites of a program that leave its results as they are, to the bit, and bring elementwise operations next
to the products.

Every pass gives a new program; boundaries and outputs keep their values' numbers.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from licq.integer.lowering import Input
from licq.integer.program import Boundary, Operation, Program
from licq.integer.reference import layout_function

_PARAMETERS = ("mantissa", "shift", "low", "high", "refinement")
_UNARY = ("rescale", "leaky", "clamp", "neg", "abs", "square", "table")
_ELEMENTWISE = (*_UNARY, "add", "product", "mask")
_PRODUCTS = ("conv", "deconv", "linear")
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
    program = without_idle_rescales(program)
    program = with_split_products(program)
    program = with_early_elementwise(program)
    return without_unused(with_attention(program))


def _with(program: Program, operations: list[Operation]) -> Program:
    return Program(operations, program.values, program.inputs, program.outputs, program.boundaries)


def _named(program: Program) -> set[int]:
    """Values that something outside the operations refers to."""
    of_boundaries = {getattr(boundary, name) for boundary in program.boundaries for name in _NUMBERS}
    return {*program.outputs.values(), *(of_boundaries - {None})}


def _readers(operations: Iterable[Operation]) -> dict[int, list[Operation]]:
    readers: dict[int, list[Operation]] = {}
    for operation in operations:
        for number in operation.inputs:
            readers.setdefault(number, []).append(operation)
    return readers


def without_duplicates(program: Program) -> Program:
    """Operations of one kind on the same values with the same facts run once; boundaries and outputs follow.

    So two roundings of one latent about one mean, one for the decoder and one for the estimate of the rate,
    are one.
    """
    alias: dict[int, int] = {}
    first: dict[tuple, Operation] = {}
    operations = []
    for operation in program.operations:
        operation = replace(operation, inputs=tuple(alias.get(number, number) for number in operation.inputs))
        key = (operation.kind, operation.inputs, _digest(operation.facts))
        known = first.get(key) if operation.kind != "input" else None
        if known is None:
            first[key] = operation
            operations.append(operation)
        else:
            alias.update(zip(operation.outputs, known.outputs, strict=True))

    def renamed(boundary: Boundary) -> Boundary:
        changes = {
            name: alias.get(number, number)
            for name in _NUMBERS
            if (number := getattr(boundary, name)) is not None
        }
        return replace(boundary, **changes)

    outputs = {name: alias.get(number, number) for name, number in program.outputs.items()}
    return Program(
        operations,
        program.values,
        program.inputs,
        outputs,
        [renamed(boundary) for boundary in program.boundaries],
    )


_NUMBERS = ("latent", "symbols", "decoded", "means", "scales", "weights")


def _digest(part: Any) -> Any:
    """Something hashable that is equal for equal facts."""
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
    kept = []
    for operation in reversed(program.operations):
        if operation.kind == "input" or needed.intersection(operation.outputs):
            needed.update(operation.inputs)
            kept.append(operation)
    return _with(program, kept[::-1])


def without_idle_rescales(program: Program) -> Program:
    """Without rescales by 1 that clip nothing."""
    alias: dict[int, int] = {}
    named, operations = _named(program), []
    for operation in program.operations:
        operation = replace(operation, inputs=tuple(alias.get(number, number) for number in operation.inputs))
        if operation.kind == "rescale" and _is_idle(program, operation) and operation.outputs[0] not in named:
            alias[operation.outputs[0]] = operation.inputs[0]
        else:
            operations.append(operation)
    return _with(program, operations)


def _is_idle(program: Program, operation: Operation) -> bool:
    facts, numbers = operation.facts, program.values[operation.inputs[0]].range
    one = torch.equal(facts["mantissa"].double(), torch.exp2(facts["shift"].double())) and bool(
        (torch.as_tensor(facts["refinement"]) == 1).all()
    )
    return one and (
        facts["low"] is None
        or (int(facts["low"].max()) <= numbers.low and numbers.high <= int(facts["high"].min()))
    )


def with_split_products(program: Program) -> Program:
    """A layer whose outputs are cut into parts at once (queries, keys and values; scales and means) becomes a
    layer for each part."""
    readers, named, operations = _readers(program.operations), _named(program), []
    replaced: set[int] = set()
    for operation in program.operations:
        if operation.outputs and operation.outputs[0] in replaced:
            continue  # the cut of a layer that is cut already
        cut = readers.get(operation.outputs[0], []) if operation.outputs else []
        if (
            operation.kind in _PRODUCTS
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
                facts = dict(operation.facts, weight=operation.facts["weight"][rows])
                facts["bias"] = None if facts["bias"] is None else facts["bias"][rows]
                operations.append(replace(operation, outputs=(number,), facts=facts))
        else:
            operations.append(operation)
    return _with(program, operations)


def _channel_dim(program: Program, operation: Operation) -> int:
    return len(program.values[operation.outputs[0]].shape) - 1 if operation.kind == "linear" else 1


def _cuts_channels(program: Program, product: Operation, cut: Operation) -> bool:
    if (
        cut.kind != "layout"
        or cut.facts["name"] not in ("chunk", "split")
        or product.facts.get("groups", 1) != 1
    ):
        return False
    arguments, options = cut.facts["arguments"], cut.facts["options"]
    dim = options.get("dim", arguments[2] if len(arguments) > 2 else 0)
    return dim % len(program.values[cut.inputs[0]].shape) == _channel_dim(program, product)


def with_early_elementwise(program: Program) -> Program:
    """Elementwise operations on one value move in front of the layout functions that stand before them, as
    far as they can.

    So a layer's results are requantized as they are made, and what is moved about is small.
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
    if operation.kind not in _UNARY or len(operation.inputs) != 1:
        return [operation]
    chain: list[Operation] = []  # from the operation upwards
    number = operation.inputs[0]
    while (layout := producers.get(number)) is not None and _is_move(layout):
        chain.append(layout)
        number = layout.inputs[0]
    for depth in range(len(chain), 0, -1):
        layouts = chain[:depth][::-1]
        source = layouts[0].inputs[0]
        facts = _parameters_before(
            operation, layouts, program.values[source].shape, _channels_of(source, program, producers)
        )
        if facts is None:
            continue
        numbers = program.values[operation.outputs[0]].range
        steps = [
            replace(
                operation,
                inputs=(source,),
                outputs=(program.value(program.values[source].shape, numbers),),
                facts=facts,
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


def _is_move(operation: Operation) -> bool:
    return (
        operation.kind == "layout"
        and operation.facts["name"] in _MOVES
        and len(operation.inputs) == len(operation.outputs) == 1
    )


def _pads(layout: Operation) -> bool:
    return layout.facts["name"] == "pad"


def _channels_of(number: int, program: Program, producers: dict[int, Operation]) -> int:
    """The dimension of a value that holds channels."""
    operation = producers[number]
    while operation.kind in _ELEMENTWISE:
        operation = producers[operation.inputs[0]]
    return (
        1
        if operation.kind in ("conv", "deconv", "conv3d", "gdn", "input")
        else len(program.values[number].shape) - 1
    )


def _parameters_before(
    operation: Operation, layouts: list[Operation], shape: tuple[int, ...], dim: int
) -> dict[str, Any] | None:
    """The operation's parameters in front of layout functions: numbers, or along dimension `dim` of `shape`;
    None where there are none.

    A pad brings zeros in, so the operation must leave them as they are.
    """
    facts = operation.facts
    stated = {name: torch.as_tensor(facts[name]) for name in _PARAMETERS if facts.get(name) is not None}
    if any(_pads(layout) for layout in layouts):
        constant = all(
            layout.facts["options"].get("mode", "constant") == "constant"
            for layout in layouts
            if _pads(layout)
        )
        keeps_zero = operation.kind in ("rescale", "leaky", "neg", "abs", "square")
        inside = "low" not in stated or (int(stated["low"].max()) <= 0 <= int(stated["high"].min()))
        if not (constant and keeps_zero and inside):
            return None
    before = {name: part.reshape(()) for name, part in stated.items() if part.numel() == 1}
    varying = {name: part for name, part in stated.items() if part.numel() > 1}
    if not varying:
        return {**facts, **before}
    view = [-1 if d == dim else 1 for d in range(len(shape))]
    # where each number comes from: its place among the channels, from 1 on; pads bring 0
    came_from = torch.arange(1, shape[dim] + 1, dtype=torch.int16).reshape(view).expand(shape)
    for layout in layouts:
        arguments = [came_from if isinstance(part, Input) else part for part in layout.facts["arguments"]]
        came_from = layout_function(layout.facts["name"])(*arguments, **layout.facts["options"])
    found = _along(came_from, varying, shape[dim])
    return (
        None
        if found is None
        else {**facts, **before, **{name: part.reshape(view) for name, part in found.items()}}
    )


def with_attention(program: Program) -> Program:
    """Scores, softmax and weighted sum become one operation `attention` on queries, keys (transposed) and
    values.

    Its facts hold the operations that it stands for, under `steps`: matmul, rescale, softmax, rescale,
    matmul.
    """
    producers, readers, named = program.producers(), _readers(program.operations), _named(program)

    def only_reader(operation: Operation, kind: str) -> Operation | None:
        number = operation.outputs[0]
        found = readers.get(number, [])
        return found[0] if number not in named and len(found) == 1 and found[0].kind == kind else None

    fused: dict[int, Operation] = {}  # by the place of the last operation
    inside: set[int] = set()
    for softmax in program.operations:
        if softmax.kind != "softmax":
            continue
        scores = producers[softmax.inputs[0]]
        products = producers[scores.inputs[0]] if scores.kind == "rescale" else None
        if (
            products is None
            or products.kind != "matmul"
            or only_reader(products, "rescale") is None
            or only_reader(scores, "softmax") is None
        ):
            continue
        weights = only_reader(softmax, "rescale")
        output = weights and only_reader(weights, "matmul")
        if output is None or output.inputs[0] != weights.outputs[0]:
            continue
        steps = [products, scores, softmax, weights, output]
        fused[id(output)] = Operation(
            "attention", (*products.inputs, output.inputs[1]), output.outputs, {"steps": steps}, softmax.node
        )
        inside.update(id(step) for step in steps)
    operations = [
        fused.get(id(op), op) for op in program.operations if id(op) in fused or id(op) not in inside
    ]
    return _with(program, operations)


def _along(came_from: Tensor, parameters: dict[str, Tensor], size: int) -> dict[str, Tensor] | None:
    """Each parameter by place, (size,). They broadcast to `came_from`, which holds places + 1, or 0; None
    where values clash."""
    full = {
        name: part.reshape((1,) * (came_from.ndim - part.ndim) + part.shape)
        for name, part in parameters.items()
    }
    varies = [any(part.shape[d] > 1 for part in full.values()) for d in range(came_from.ndim)]
    sample = came_from[tuple(slice(None) if yes else slice(0, 1) for yes in varies)]
    # the sample is enough, where places vary only as the parameters do
    if not (bool((sample > 0).all()) and bool(((came_from == sample) | (came_from == 0)).all())):
        sample = came_from
    places = sample.flatten().long()
    inside = places > 0
    places = places[inside] - 1
    found = {}
    for name, part in full.items():
        values = part.expand_as(sample).flatten()[inside]
        if not len(values):
            return None
        result = values[:1].expand(size).clone()  # also for places that nothing reads
        result[places] = values
        if not torch.equal(result[places], values):
            return None
        found[name] = result
    return found
