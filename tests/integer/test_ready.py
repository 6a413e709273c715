"""Ready programs: NumPy's layout functions beside PyTorch's, memory, and attention in pieces."""

import numpy as np
import pytest
import torch

from licq.integer import ready
from licq.integer.arrays import LAYOUT, viewed
from licq.integer.attention import distinct
from licq.integer.fast import FastProgram
from licq.integer.library import library
from licq.integer.lowering import LAYOUT as RECORDED
from licq.integer.lowering import lower
from licq.integer.memory import memory_offsets
from licq.integer.passes import optimize, with_folded_constants
from licq.integer.program import Program
from licq.integer.reference import layout_function, run
from licq.quant import operations as ops
from licq.quant.operations import Range
from tests.frozen_codecs import frozen
from tests.tiny_codecs import images

needs_kernels = pytest.mark.skipif(library() is None, reason="the package was installed without a C compiler")

CALLS = [
    ("permute", (0, 2, 3, 1), {}),
    ("permute", ((3, 2, 0, 1),), {}),
    ("transpose", (-1, 1), {}),
    ("unsqueeze", (-1,), {}),
    ("unsqueeze", (1,), {}),
    ("squeeze", (0,), {}),
    ("squeeze", (1,), {}),
    ("squeeze", (), {}),
    ("movedim", (1, -1), {}),
    ("movedim", ((0, 1), (2, 0)), {}),
    ("chunk", (3, 1), {}),
    ("chunk", (4,), {"dim": 2}),
    ("split", (5, 2), {}),
    ("split", ([2, 10],), {"dim": 1}),
    ("narrow", (2, 1, 3), {}),
    ("select", (1, 2), {}),
    ("__getitem__", ((slice(None), 3, slice(1, None, 2), ...),), {}),
    ("__getitem__", ((0, None, slice(2, 5)),), {}),
    ("expand", (4, -1, 4, 6), {}),
    ("expand", ((2, 3, 12, 4, 6),), {}),
    ("unbind", (1,), {}),
    ("flip", ((1, 3),), {}),
    ("contiguous", (), {}),
    ("clone", (), {}),
    ("reshape", (1, 3, -1, 6), {}),
    ("reshape", ((-1, 24),), {}),
    ("view", (12, 24), {}),
    ("flatten", (1,), {}),
    ("flatten", (0, 1), {}),
    ("unflatten", (1, (3, 4)), {}),
    ("roll", (), {"shifts": (1, -2), "dims": (2, 3)}),
    ("roll", (2, 1), {}),
    ("index_select", (3, torch.tensor([5, 0, 0, 2])), {}),
    ("repeat_interleave", (2, 1), {}),
    ("pad", ([1, 2, 0, 3],), {}),
    ("pad", ([-1, 2, 1, -2],), {"mode": "constant", "value": None}),
    ("pixel_shuffle", (2,), {}),
    ("pixel_unshuffle", (2,), {}),
    ("unfold", (3,), {"dilation": 1, "padding": 1, "stride": 1}),
    ("unfold", ((3, 2),), {"dilation": (1, 2), "padding": (0, 1), "stride": 2}),
    ("zeros_like", (), {}),
]


def plain(part):
    return part.numpy() if isinstance(part, torch.Tensor) else part


@pytest.mark.parametrize(("name", "arguments", "options"), CALLS, ids=str)
def test_layout_functions_are_pytorchs(name, arguments, options):
    x = torch.randint(-100, 100, (1, 12, 4, 6), generator=torch.Generator().manual_seed(0), dtype=torch.int16)
    for source in (x, x.movedim(1, -1).contiguous().movedim(-1, 1)):  # channels last in memory, too
        if name == "view" and not source.is_contiguous():
            continue
        given = source.double() if name == "unfold" else source
        expected = layout_function(name)(given, *arguments, **options)
        found = LAYOUT[name](source.numpy(), *map(plain, arguments), **options)
        many = isinstance(expected, (list, tuple))
        assert isinstance(found, (list, tuple)) == many
        for a, b in zip(expected if many else [expected], found if many else [found], strict=True):
            assert b.dtype == np.int16 and torch.equal(a.to(torch.int16), torch.from_numpy(b.copy()))


def test_joining_functions_are_pytorchs():
    parts = [torch.arange(12).reshape(3, 4), -torch.arange(12).reshape(3, 4)]
    for name, dim in (("cat", 1), ("cat", -1), ("stack", 1)):
        found = LAYOUT[name]([part.numpy() for part in parts], dim)
        assert torch.equal(layout_function(name)(parts, dim), torch.from_numpy(found))


def test_every_layout_function_is_there_but_six():
    by_torch = "max_pool2d upsample_nearest2d amax amin gather take_along_dim"
    assert RECORDED - LAYOUT.keys() == set(by_torch.split())
    with pytest.raises(NotImplementedError):
        LAYOUT["pad"](np.zeros((1, 2)), [1, 1], mode="replicate")


def test_another_shape_of_the_same_memory_or_none():
    x = np.arange(24).reshape(2, 3, 4)
    for source, shape in ((x, (6, 4)), (x.transpose(1, 0, 2), (3, 2, 2, 2))):
        view = viewed(source, shape)
        assert np.shares_memory(view, x) and np.array_equal(view, source.reshape(shape))
    assert viewed(x.transpose(1, 0, 2), (6, 4)) is None


@pytest.mark.parametrize("seed", range(5))
def test_values_that_are_needed_at_the_same_time_do_not_share_memory(seed):
    draw = np.random.default_rng(seed)

    class Some(ready.Launch):
        def __init__(self, reads, write):
            self.reads, self.writes = tuple(reads), (write,)
            self.may_give_views = bool(draw.integers(3) == 0)
            self.uses_program_memory = bool(draw.integers(4))

        def run(self, program, values, inputs):
            raise AssertionError

    launches = [Some(draw.choice(n, min(n, 2), replace=False).tolist() if n else [], n) for n in range(40)]
    outputs, sizes = {39, 17}, {n: int(draw.integers(1, 5000)) for n in range(40)}
    offsets, total = memory_offsets(launches, outputs, sizes)
    owners: dict[int, set[int]] = {}
    for launch in launches:
        (number,) = launch.writes
        owners[number] = set().union(*(owners[n] for n in launch.reads)) if launch.may_give_views else set()
        owners[number] |= {number} if launch.uses_program_memory else set()
    alive: dict[int, set[int]] = {n: set() for n in range(40)}  # launches in which an owner's bytes count
    for position, launch in enumerate(launches):
        for number in (*launch.reads, *launch.writes):
            for owner in owners[number]:
                alive[owner].update(range(owner, 40 if number in outputs else position + 1))
    assert not outputs & offsets.keys()
    for a in offsets:
        assert offsets[a] % ready.ALIGNED == 0 and offsets[a] + sizes[a] + ready.SLACK <= total
        for b in offsets:
            if a < b and alive[a] & alive[b]:
                assert offsets[a] + sizes[a] <= offsets[b] or offsets[b] + sizes[b] <= offsets[a]


@needs_kernels
@pytest.mark.parametrize("name", ["lu2022", pytest.param("tic", marks=pytest.mark.slow)])
def test_attention_in_pieces_gives_the_same_numbers(name, monkeypatch):
    program = optimize(lower(frozen(name), 128, 128))
    pixels = {"pixels": (images(1, 128, 128, 3) * 255).round().to(torch.uint8)}
    expected = FastProgram(program, 1)(pixels)
    for numbers in (1, 5000):
        monkeypatch.setattr(ready, "_NUMBERS_AT_A_TIME", numbers)
        assert torch.equal(FastProgram(program, 1)(pixels)["pixels"], expected["pixels"])


def test_windows_that_are_alike_are_one_kind():
    offset = torch.tensor([[1, 2], [3, 4], [1, 2], [3, 4], [1, 2]])
    blank = torch.tensor([[0], [0], [0], [1], [0]])
    first, same = distinct(offset, blank)
    assert first.tolist() == [0, 1, 3] and same.tolist() == [0, 1, 0, 2, 0]
    assert torch.equal(offset[first][same], offset) and torch.equal(blank[first][same], blank)
    assert distinct(offset, None)[0].tolist() == [0, 1]


def test_operations_on_constants_become_constants():
    program = Program()
    x = program.input("x", (1, 3), Range(0, 9))
    one = program.add(ops.Constant(value=torch.tensor([[1, 2, 3]])), (1, 3), Range(1, 3))
    negative = program.add(ops.Neg((one,)), (1, 3), Range(-3, -1))
    program.outputs["out"] = program.add(ops.Add((x, negative), low=None, high=None), (1, 3), Range(-3, 8))
    folded = with_folded_constants(program)
    assert [operation.kind for operation in folded.operations] == ["input", "constant", "constant", "add"]
    given = {"x": torch.tensor([[5, 5, 5]], dtype=torch.uint8)}
    assert run(folded, given)["out"].tolist() == run(program, given)["out"].tolist() == [[4, 3, 2]]
