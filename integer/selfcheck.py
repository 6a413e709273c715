"""Whether the compiled kernels give the reference's numbers on this machine, on the largest numbers that they
must take.

Run once when kernels are about to be used (design, section 4); takes some hundredths of a second.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from licq.integer.fast import FastProgram
from licq.integer.program import Program
from licq.integer.reference import run
from licq.quant import operations as ops
from licq.quant.fixedpoint import quantize_multiplier
from licq.quant.integer_functions import softmax_table
from licq.quant.operations import Range

Check = tuple[str, Program, dict[str, Tensor]]


def first_difference() -> str | None:
    """The kind of the first operation of which a kernel differs from the reference; None: all agree."""
    for kind, program, inputs in _checks():
        expected, computed = run(program, inputs), FastProgram(program)(inputs)
        if any(not torch.equal(tensor, computed[name]) for name, tensor in expected.items()):
            return kind
    return None


def extremes(shape: tuple[int, ...], low: int, high: int, seed: int = 0) -> Tensor:
    """Integers of which half are at the ends of the range."""
    draw = torch.Generator().manual_seed(seed)
    numbers = torch.randint(low, high + 1, shape, generator=draw)
    ends = torch.randint(0, 4, shape, generator=draw)
    return torch.where(ends == 0, low, torch.where(ends == 1, high, numbers))


def _checks() -> Iterator[Check]:
    for numbers in ((-127, 127), (0, 255), (-8191, 8191)):
        for kind in (ops.Conv2d, ops.ConvTranspose2d):
            yield _product(kind, numbers)
    for kind, kernel, stride, inputs in (
        (ops.Conv2d, 3, 1, 114),
        (ops.Conv2d, 5, 2, 40),
        (ops.Conv2d, 5, 2, 3),
        (ops.ConvTranspose2d, 5, 2, 114),
    ):
        yield _product(
            kind, (-255, 255), kernel, stride, inputs
        )  # for `winograd.c`, with 114 inputs the largest sums that it takes
    for per_channel in (False, True):
        for largest in (2**31 - 1, 2**20):
            yield _rescale(per_channel, largest)
    yield _leaky()
    for inverse in (False, True):
        yield _gdn(inverse)
    yield _layer_norm()
    yield _attention()


def _given(program: Program, out: int, kind: str, **inputs: Tensor) -> Check:
    program.outputs["out"] = out
    return (
        kind,
        program,
        {name: tensor.to(program.values[program.inputs[name]].dtype) for name, tensor in inputs.items()},
    )


def _product(
    kind: type[ops.Convolution],
    numbers: tuple[int, int],
    kernel: int = 3,
    stride: int = 2,
    inputs: int = 37,
) -> Check:
    """A product some of whose sums are the largest and the smallest that its range allows."""
    shape, outputs, pad = (1, inputs, 9, 11), 19, kernel // 2
    program = Program()
    weight = extremes((outputs, inputs, kernel, kernel), -127, 127, seed=1).to(torch.int8)
    weight[0], weight[1] = 127, -127
    if kind is ops.Conv2d:
        options: dict[str, Any] = {}
        out_shape = F.conv2d(torch.empty(shape), weight.float(), None, stride, pad).shape
    else:
        options = {"output_padding": (stride - 1, stride - 1)}
        out_shape = F.conv_transpose2d(
            torch.empty(shape), weight.float().transpose(0, 1), None, stride, pad, stride - 1
        ).shape
    bound = int(weight.long().abs().flatten(1).sum(1).max()) * max(-numbers[0], numbers[1]) + 2**20
    x = program.input("x", shape, Range(*numbers))
    bias = extremes((outputs,), -(2**20), 2**20, seed=2)
    operation = kind(
        (x,),
        weight=weight,
        bias=bias,
        bound=bound,
        stride=(stride, stride),
        padding=(pad, pad),
        dilation=(1, 1),
        groups=1,
        **options,
    )
    out = program.add(operation, tuple(out_shape), Range(-bound, bound))
    given = extremes(shape, *numbers, seed=3)
    given[:, :, :5, :5], given[:, :, :5, 6:] = numbers[0], numbers[1]
    return _given(program, out, kind.kind, x=given)


def _rescale(per_channel: bool, largest: int) -> Check:
    """Numbers up to the largest, and ties, which the powers of two make. Small ones allow a multiplier
    without ties (`integer.exactness`)."""
    shape = (1, 5, 20, 30)
    program = Program()
    x = program.input("x", shape, Range(-largest, largest))
    multiplier = torch.tensor(
        [2.0**-1, 2.0**-16, 3 * 2.0**-18, 0.3, 1e-7 if largest > 2**20 else 1e-4], dtype=torch.float64
    )[: 5 if per_channel else 1]
    mantissa, shift = (part.reshape(1, -1, 1, 1) for part in quantize_multiplier(multiplier))
    rescale = ops.Rescale(
        (x,),
        mantissa=mantissa,
        shift=shift,
        low=torch.tensor(-32767),
        high=torch.tensor(32767),
        refinement=torch.tensor(1),
    )
    out = program.add(rescale, shape, Range(-32767, 32767))
    numbers = extremes(shape, -largest, largest)
    numbers[:, :, :10] = extremes((1, 5, 10, 30), -(2**17), 2**17)
    return _given(program, out, "rescale", x=numbers)


def _leaky() -> Check:
    shape = (1, 5, 20, 31)
    program = Program()
    x = program.input("x", shape, Range(-(2**31) + 1, 2**31 - 1))
    mantissa, shift = quantize_multiplier(torch.tensor(0.01, dtype=torch.float64))
    out = program.add(ops.Leaky((x,), mantissa=mantissa, shift=shift), shape, Range(-(2**25), 2**31 - 1))
    numbers = extremes(shape, -(2**31) + 1, 2**31 - 1)
    numbers[:, :, :10] = -torch.arange(1550).reshape(1, 5, 10, 31)
    return _given(program, out, "leaky", x=numbers)


def _gdn(inverse: bool) -> Check:
    shape = (1, 6, 20, 31)
    program = Program()
    x = program.input("x", shape, Range(-32767, 32767))
    norm = program.input("norm", shape, Range(0, 2**31 - 1))
    mantissa, shift = (
        part.reshape(1, -1, 1, 1)
        for part in quantize_multiplier(
            torch.logspace(-3, 1, 6, dtype=torch.float64) * (2.0**-14 if inverse else 2.0**14)
        )
    )
    ends: dict[str, Any] = {
        name: torch.full((1, 6, 1, 1), sign * 32767) for name, sign in (("low", -1), ("high", 1))
    }
    gdn = ops.Gdn((x, norm), mantissa=mantissa, shift=shift, inverse=inverse, algorithm="gdn", **ends)
    out = program.add(gdn, shape, Range(-32767, 32767))
    norms = (
        torch.exp2(torch.rand(shape, generator=torch.Generator().manual_seed(4)) * 31)
        .long()
        .clamp(max=2**31 - 1)
    )
    norms[:, :, 0], norms[:, :, 1] = torch.arange(31) ** 2, 2**31 - 1
    return _given(program, out, "gdn", x=extremes(shape, -32767, 32767), norm=norms)


def _layer_norm() -> Check:
    shape = (1, 30, 24)
    program = Program()
    x = program.input("x", shape, Range(-32767, 32767))
    mantissa, shift = quantize_multiplier(torch.logspace(-4, -1, 24, dtype=torch.float64))
    mantissa = mantissa * torch.where(torch.arange(24) % 3 == 0, -1, 1)
    ends: dict[str, Any] = {
        name: torch.full((24,), sign * 32767) for name, sign in (("low", -1), ("high", 1))
    }
    layer_norm = ops.LayerNorm(
        (x,), eps=3.7, mantissa=mantissa, shift=shift, offset=torch.arange(24) - 12, **ends
    )
    out = program.add(layer_norm, shape, Range(-32767, 32767))
    numbers = extremes(shape, -32767, 32767)
    numbers[:, 0], numbers[:, 1] = 5, torch.arange(24)
    return _given(program, out, "layer_norm", x=numbers)


def _attention() -> Check:
    batch, heads, queries, keys, inner = 3, 2, 18, 21, 5
    program = Program()
    q = program.input("q", (batch, heads, queries, inner), Range(-127, 127))
    k = program.input("k", (batch, heads, inner, keys), Range(-127, 127))
    v = program.input("v", (batch, heads, keys, inner), Range(-127, 127))
    values = [program.value((batch, heads, queries, keys), Range(-(2**17), 2**17)) for _ in range(4)]
    offset = extremes((batch, heads, queries, keys), -500, 500, seed=6)
    offset[:, :, :, 3] = -(2**22)

    def rescale(source: int, result: int, multiplier: list[float], low: int, high: int) -> ops.Rescale:
        mantissa, shift = (
            part.reshape(-1, 1, 1)
            for part in quantize_multiplier(torch.tensor(multiplier, dtype=torch.float64))
        )
        limits: dict[str, Any] = {"low": torch.tensor(low), "high": torch.tensor(high)}
        one = torch.tensor(1)
        return ops.Rescale((source,), (result,), mantissa=mantissa, shift=shift, refinement=one, **limits)

    bound = 127 * 255 * keys
    softmax = ops.Softmax(
        (values[1],), (values[2],), table=softmax_table(), offset=offset, kinds=None, blank=None, dim=-1
    )
    attention = ops.Attention(
        (q, k, v),
        products=ops.MatMul((q, k), (values[0],), bound=127 * 127 * inner),
        scores=rescale(values[0], values[1], [0.01, 0.4], -32767, 32767),
        softmax=softmax,
        weights=rescale(values[2], values[3], [2.0**-8, 0.004], 0, 255),
        output=ops.MatMul((values[3], v), bound=bound),
    )
    out = program.add(attention, (batch, heads, queries, inner), Range(-bound, bound))
    inputs = {
        name: extremes(program.values[program.inputs[name]].shape, -127, 127, seed=seed)
        for seed, name in enumerate("qkv")
    }
    return _given(program, out, "attention", **inputs)
