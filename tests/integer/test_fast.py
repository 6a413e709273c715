"""The compiled kernels give the reference's numbers, and the passes leave every result as it is."""

import math
from fractions import Fraction

import pytest
import torch

from licq.integer.exactness import gdn_fits_float32, tie_free_multiplier
from licq.integer.execution import executable, usable
from licq.integer.fast import FastProgram
from licq.integer.groups import Group
from licq.integer.library import library
from licq.integer.lowering import Tracer, lower
from licq.integer.passes import optimize
from licq.integer.products import pack
from licq.integer.program import Program
from licq.integer.reference import run
from licq.integer.selfcheck import extremes, first_difference
from licq.integer.winograd import windows
from licq.models.registry import list_models
from licq.quant import operations as ops
from licq.quant import primitives
from licq.quant.config import QuantConfig
from licq.quant.fixedpoint import quantize_multiplier
from licq.quant.operations import Operand, Range
from licq.quant.runtime import Runtime
from tests.frozen_codecs import frozen, settings
from tests.tiny_codecs import images

needs_kernels = pytest.mark.skipif(library() is None, reason="the package was installed without a C compiler")


def pixels(count=1, height=64, width=64, seed=5):
    return {"pixels": (images(count, height, width, seed) * 255).round().to(torch.uint8)}


def assert_same(program, fast, inputs):
    expected = run(program, inputs, keep=True)
    for number, tensor in fast(inputs, keep=True).items():
        assert torch.equal(tensor, expected[number].to(torch.int64)), fast.program.producers()[number]


@needs_kernels
@pytest.mark.parametrize("name", list_models())
def test_kernels_and_passes_give_the_references_numbers(name):
    whole = lower(frozen(name), 64, 64)
    program = optimize(whole)
    inputs = pixels()
    before, after = run(whole, inputs, keep=True), run(program, inputs, keep=True)
    for boundary in program.boundaries:
        assert torch.equal(before[boundary.symbols], after[boundary.symbols]) and torch.equal(
            before[boundary.decoded], after[boundary.decoded]
        )
    assert torch.equal(before[whole.outputs["pixels"]], after[program.outputs["pixels"]])
    for made in (program, whole):
        fast = FastProgram(made)
        assert_same(made, fast, inputs)
        found = fast(inputs)
        again = fast(pixels(seed=6))  # in the same memory
        assert all(
            torch.equal(found[key].long(), after[number].long()) for key, number in made.outputs.items()
        )
        assert all(
            torch.equal(tensor.long(), again[key].long()) for key, tensor in run(made, pixels(seed=6)).items()
        )


@needs_kernels
@pytest.mark.parametrize(("name", "config"), settings())
def test_every_setting_of_the_quantizer(name, config):
    program = optimize(lower(frozen(name, **config), 64, 64))
    assert_same(program, FastProgram(program), pixels())


@needs_kernels
@pytest.mark.parametrize("name", ["cheng2020", pytest.param("tic", marks=pytest.mark.slow)])
def test_batches_sizes_and_threads(name):
    codec = frozen(name)
    program = optimize(lower(codec, 64, 192, batch=2))
    for threads in (1, 2, 3):
        assert_same(program, FastProgram(program, threads), pixels(2, 64, 192))


def test_nothing_of_a_codec_but_layouts_is_left_to_the_reference():
    for name, config in (
        ("minnen2018", {}),
        ("cheng2020", {}),
        ("minnen2018", {"split": True, "latent_bits": 8}),
    ):
        program = optimize(lower(frozen(name, **config), 64, 64))
        fast = FastProgram(program) if library() is not None else pytest.skip("no compiled kernels")
        assert {entry.kind for entry in fast.plan if not isinstance(entry, Group)} <= {
            "layout",
            "neg",
            "input",
        }


# ------------------------------------------------------------------------------------------ single operations


@needs_kernels
@pytest.mark.parametrize("numbers", [(-127, 127), (0, 255), (-9, 246), (-8191, 8191), (0, 65025)])
@pytest.mark.parametrize(
    ("kind", "kernel", "stride", "shape"),
    [
        (ops.Conv2d, 5, 2, (2, 7, 13, 11)),
        (ops.Conv2d, 3, 1, (1, 16, 6, 40)),
        (ops.Conv2d, 1, 1, (1, 33, 5, 7)),
        (ops.ConvTranspose2d, 5, 2, (2, 6, 5, 7)),
        (ops.ConvTranspose2d, 3, 2, (1, 5, 4, 9)),
        (ops.ConvTranspose2d, 2, 3, (1, 4, 4, 3)),
    ],
)
def test_products_of_the_largest_numbers(kind, kernel, stride, shape, numbers):
    outputs = 19
    program = Program()
    weight = extremes((outputs, shape[1], kernel, kernel), -127, 127, seed=1).to(torch.int8)
    bias = extremes((outputs,), -(2**20), 2**20, seed=2)
    options = {"stride": (stride, stride), "padding": (kernel // 2,) * 2, "dilation": (1, 1), "groups": 1}
    like = torch.empty(shape)
    if kind is ops.Conv2d:
        out_shape = torch.nn.functional.conv2d(
            like, torch.empty(weight.shape), None, stride, kernel // 2
        ).shape
    else:
        options["output_padding"] = (min(1, stride - 1),) * 2
        out_shape = torch.nn.functional.conv_transpose2d(
            like,
            torch.empty(shape[1], outputs, kernel, kernel),
            None,
            stride,
            kernel // 2,
            options["output_padding"],
        ).shape
    bound = int(weight.long().abs().flatten(1).sum(1).max()) * max(-numbers[0], numbers[1]) + 2**20
    assert bound < 2**31
    x = program.input("x", shape, Range(*numbers))
    conv = kind((x,), weight=weight, bias=bias, bound=bound, **options)
    out = program.add(conv, tuple(out_shape), Range(-bound, bound))
    program.outputs["out"] = out
    fast = FastProgram(program)
    inputs = {"x": extremes(shape, *numbers, seed=3).to(program.values[x].dtype)}
    assert_same(program, fast, inputs)
    assert any(isinstance(entry, Group) for entry in fast.plan)


class AsWithVnni:
    """The kernels, which say that there are 8-bit instructions and no Winograd: values are stored so."""

    says = {"has_vnni": 1, "has_winograd": 0}

    def __getattr__(self, name):
        return (lambda: self.says[name]) if name in self.says else getattr(library(), name)


class WithVnniAndWinograd(AsWithVnni):
    """The kernels, which say that there is all: values are stored as it is faster."""

    says = {"has_vnni": 1}


class WithoutVnni:
    """The kernels, which say that there are no 8-bit instructions: values are stored as 16 bits then."""

    def __getattr__(self, name):
        return (lambda: 0) if name == "has_vnni" else getattr(library(), name)


def layer(program, x, numbers, groups=1, padding=1):
    """A convolution 3x3 of value x of 8 channels, 16x16; the number of its result."""
    weight = extremes((8, 8 // groups, 3, 3), -127, 127, seed=groups).to(torch.int8)
    bound = 127 * 9 * (8 // groups) * max(-numbers.low, numbers.high)
    options = {"stride": (1, 1), "padding": (padding, padding), "dilation": (1, 1), "groups": groups}
    side = 14 + 2 * padding
    conv = ops.Conv2d((x,), weight=weight, bias=None, bound=bound, **options)
    return program.add(conv, (1, 8, side, side), Range(-bound, bound))


@needs_kernels
@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize(
    "ends",
    [(0, 65535), (-3, 60000), (-65000, -40), (3, 65535), (3, 200), (-200, -3), (40000, 90000), (0, 255)],
)
@pytest.mark.parametrize("others", ["none", "grouped", "output"])
def test_values_of_every_range_that_others_read_too(ends, others, eight_bits, monkeypatch):
    """Numbers that only an offset brings into 16 or 8 bits, beside readers that take them as they are, and a
    padding of zeros."""
    monkeypatch.setattr("licq.integer.fast.kernels", AsWithVnni if eight_bits else WithoutVnni)
    numbers, program = Range(*ends), Program()
    x = program.input("x", (1, 8, 16, 16), numbers)
    for padding in (0, 1):
        program.outputs[f"out{padding}"] = layer(program, x, numbers, padding=padding)
    if others == "grouped":
        program.outputs["grouped"] = layer(program, x, numbers, groups=8)
    if others == "output":
        program.outputs["x"] = x
    fast = FastProgram(program, 1)
    given = {"x": extremes((1, 8, 16, 16), *ends, seed=4).to(program.values[x].dtype)}
    assert_same(program, fast, given)
    assert all(torch.equal(tensor, fast(given)[name]) for name, tensor in run(program, given).items())


@needs_kernels
@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("ends", [(3, 32767), (-32767, -3)])
def test_the_range_of_a_rescale_holds_the_end_next_to_zero(ends, eight_bits, monkeypatch):
    """3 / 128.5 is 0, which was proved to be 1 or more, and wrapped to 255 in 8 bits."""
    monkeypatch.setattr("licq.integer.fast.kernels", AsWithVnni if eight_bits else WithoutVnni)
    for multiplier in (
        torch.tensor([1 / 128.5]),
        torch.tensor([1 / 128.5, 2.0**-12] * 4).reshape(1, 8, 1, 1),
        torch.tensor([0.1666]),
    ):
        tracer = Tracer(Runtime(QuantConfig()))
        x = tracer.input("x", (1, 8, 16, 16), Range(*ends))
        found = primitives.rescale(x, multiplier.double())
        program, given = tracer.program, {"x": extremes((1, 8, 16, 16), *ends, seed=4).to(torch.int16)}
        program.outputs["out"] = layer(program, found.number, tracer.range_of(found))
        program.outputs["small"] = found.number
        small, stated = run(program, given)["small"], tracer.range_of(found)
        assert (
            stated.low <= int(small.min()) <= stated.low + 1
            and stated.high - 1 <= int(small.max()) <= stated.high
        )
        del program.outputs["small"]
        assert_same(program, FastProgram(program, 1), given)


@needs_kernels
def test_a_product_of_a_constant_reads_it_as_it_is(monkeypatch):
    monkeypatch.setattr("licq.integer.fast.kernels", AsWithVnni)
    tracer = Tracer(Runtime(QuantConfig()))
    constant = primitives.constant(extremes((1, 8, 16, 16), -100, 100, seed=5), tracer)
    tracer.program.outputs["out"] = layer(tracer.program, constant.number, Range(-100, 100))
    assert_same(tracer.program, FastProgram(tracer.program, 1), {})


@needs_kernels
@pytest.mark.parametrize(
    ("kind", "kernel", "stride", "shape", "outputs"),
    [
        (ops.Conv2d, 3, 1, (1, 114, 9, 11), 19),
        (ops.Conv2d, 3, 1, (2, 16, 4, 8), 32),
        (ops.Conv2d, 3, 1, (3, 33, 5, 4), 3),
        (ops.Conv2d, 3, 1, (1, 1, 12, 101), 16),
        (ops.Conv2d, 5, 2, (2, 40, 13, 22), 48),
        (ops.Conv2d, 5, 2, (1, 3, 32, 31), 20),
        (ops.Conv2d, 5, 2, (2, 4, 12, 13), 17),
        (ops.Conv2d, 3, 1, (1, 7, 8, 7), 36),
        (ops.Conv2d, 5, 2, (2, 70, 8, 23), 37),
        (ops.Conv2d, 5, 2, (1, 110, 13, 15), 16),
        (ops.Conv2d, 3, 2, (1, 17, 16, 15), 33),
        (ops.ConvTranspose2d, 5, 2, (2, 100, 7, 5), 32),
        (ops.ConvTranspose2d, 5, 2, (1, 21, 8, 9), 3),
        (ops.ConvTranspose2d, 5, 2, (1, 18, 4, 4), 21),
        (ops.ConvTranspose2d, 3, 2, (1, 50, 8, 7), 16),
        (ops.Conv2d, 3, 1, (1, 18, 26, 39), 18),
        (ops.Conv2d, 5, 2, (2, 3, 66, 70), 36),
        (ops.Conv2d, 3, 2, (1, 4, 60, 50), 8),
        (ops.Conv2d, 3, 1, (1, 5, 23, 37), 7),
        (ops.ConvTranspose2d, 5, 2, (1, 21, 18, 23), 6),
    ],
)
@pytest.mark.parametrize("threads", [1, 3])
def test_winograd_of_the_largest_sums(kind, kernel, stride, shape, outputs, threads):
    program = Program()
    weight = extremes((outputs, shape[1], kernel, kernel), -128, 127, seed=1).to(torch.int8)
    weight[0], weight[1] = 127, -127
    options = {"stride": (stride, stride), "padding": (kernel // 2,) * 2, "dilation": (1, 1), "groups": 1}
    height, width = (-(-size // stride) if kind is ops.Conv2d else size * stride for size in shape[2:])
    if kind is ops.ConvTranspose2d:
        options["output_padding"] = (stride - 1,) * 2
    bound = int(weight.long().abs().flatten(1).sum(1).max()) * 255 + 2**20
    x = program.input("x", shape, Range(-255, 255))
    bias = extremes((outputs,), -(2**20), 2**20, seed=2)
    conv = kind((x,), weight=weight, bias=bias, bound=bound, **options)
    out_shape = (shape[0], outputs, height, width)
    program.outputs["out"] = program.add(conv, out_shape, Range(-bound, bound))
    numbers = extremes(shape, -255, 255, seed=3)
    numbers[0, :, :4], numbers[-1, :, -3:] = 255, -255
    fast = FastProgram(program, threads)
    assert_same(program, fast, {"x": numbers.to(torch.int16)})
    if library().has_winograd():
        assert [
            type(job).__name__ for entry in fast.launches if hasattr(entry, "jobs") for job in entry.jobs
        ] == ["Winograd"]


@needs_kernels
def test_eight_bits_are_stored_where_winograd_saves_too_little(monkeypatch):
    monkeypatch.setattr("licq.integer.fast.kernels", WithVnniAndWinograd)

    def stored(kernel, stride, low=0):
        program = Program()
        x = program.input("x", (1, 8, 16, 16), Range(low, 255))
        weight = extremes((16, 8, kernel, kernel), -127, 127).to(torch.int8)
        options = {"stride": (stride,) * 2, "padding": (kernel // 2,) * 2, "dilation": (1, 1), "groups": 1}
        bound = 255 * 127 * 8 * kernel**2
        conv = ops.Conv2d((x,), weight=weight, bias=None, bound=bound, **options)
        shape = (1, 16, 16 // stride, 16 // stride)
        program.outputs["out"] = program.add(conv, shape, Range(-bound, bound))
        fast = FastProgram(program, 1)
        given = {"x": extremes((1, 8, 16, 16), low, 255, seed=2).to(program.values[x].dtype)}
        assert torch.equal(fast(given)["out"], run(program, given)["out"])
        return fast.storage[x][0]

    winograd = torch.int16 if library().has_winograd() else torch.uint8
    assert stored(3, 1) is winograd and stored(5, 2) is winograd
    assert stored(3, 2) is torch.uint8 and stored(1, 1) is torch.uint8
    assert stored(3, 2, low=-255) is torch.int16


def test_winograd_only_where_its_sums_and_numbers_fit():
    def found(channels=8, largest=255, kernel=3, stride=1, kind=ops.Conv2d, size=16, dilation=1):
        weight = torch.full((16, channels, kernel, kernel), 127, dtype=torch.int8)
        options = {"stride": (stride,) * 2, "padding": (kernel // 2,) * 2, "dilation": (dilation,) * 2}
        if kind is ops.ConvTranspose2d:
            options["output_padding"] = (stride - 1,) * 2
        conv = kind(weight=weight, bias=None, bound=0, groups=1, **options)
        return windows(conv, largest, (1, 16, size, size))

    assert found(114).parts == [[0]] and found(116) is None  # 116 * 9 * 127 * 255 > 2^25
    assert (
        sorted(sum(found(100, kernel=5, stride=2).parts, [])) == [0, 1, 2, 3]
        and len(found(100, kernel=5, stride=2).parts) == 3
    )
    assert found(largest=327) is not None and found(largest=328) is None
    assert (
        found(kernel=1) is None
        and found(kernel=5) is None
        and found(dilation=2) is None
        and found(size=2) is None
    )
    assert (
        found(100, kernel=5, stride=2, kind=ops.ConvTranspose2d).spread == 2
        and found(kernel=7, stride=2) is None
    )


@needs_kernels
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("largest", [2**31 - 1, 2**20])
@pytest.mark.parametrize("limit", [127, 32767, None])
def test_requantization_rounds_halves_away_from_zero(per_channel, largest, limit):
    program = Program()
    channels = 5
    x = program.input("x", (1, channels, 40, 51), Range(-largest, largest))
    multiplier = torch.tensor([2.0**-1, 2.0**-16, 3 * 2.0**-18, 0.3, 1e-4], dtype=torch.float64)[
        : channels if per_channel else 1
    ]
    mantissa, shift = (part.reshape(1, -1, 1, 1) for part in quantize_multiplier(multiplier))
    ends = (
        {"low": None, "high": None}
        if limit is None
        else {"low": torch.tensor(-limit), "high": torch.tensor(limit)}
    )
    rescale = ops.Rescale((x,), mantissa=mantissa, shift=shift, refinement=torch.tensor(1), **ends)
    out = program.add(rescale, (1, channels, 40, 51), Range(-(limit or largest), limit or largest))
    program.outputs["out"] = out
    numbers = extremes((1, channels, 40, 51), -largest, largest)
    numbers[:, :, :20] = extremes(
        (1, channels, 20, 51), -(2**17), 2**17
    )  # and ties, which the powers of two make
    assert_same(program, FastProgram(program), {"x": numbers.to(torch.int32)})


@needs_kernels
@pytest.mark.parametrize("read", ["shuffled", "both"])
@pytest.mark.parametrize(("channels", "side", "kernel"), [(5, 2, 3), (16, 2, 3), (3, 3, 1), (1, 2, 5)])
def test_shuffled_pixels_are_stored_as_the_reference_has_them(channels, side, kernel, read):
    program = Program()
    batch, inputs, height, width, outputs = 2, 7, 13, 21, channels * side**2
    x = program.input("x", (batch, inputs, height, width), Range(-127, 127))
    weight, bias = (
        extremes((outputs, inputs, kernel, kernel), -127, 127, seed=1).to(torch.int8),
        extremes((outputs,), -(2**16), 2**16, seed=2),
    )
    options = {"stride": (1, 1), "padding": (kernel // 2,) * 2, "dilation": (1, 1), "groups": 1}
    shape = (batch, outputs, height, width)
    conv = ops.Conv2d((x,), weight=weight, bias=bias, bound=2**22, **options)
    sums = program.add(conv, shape, Range(-(2**22), 2**22))
    multipliers = torch.exp2(-torch.arange(outputs, dtype=torch.float64) % 7 - 9)
    mantissa, shift = (part.reshape(1, -1, 1, 1) for part in quantize_multiplier(multipliers))
    ends = {"low": torch.arange(outputs).reshape(1, -1, 1, 1) - 120, "high": torch.tensor(110)}
    rescale = ops.Rescale((sums,), mantissa=mantissa, shift=shift, refinement=torch.tensor(1), **ends)
    small = program.add(rescale, shape, Range(-120, 110))
    shuffle = ops.Layout((small,), name="pixel_shuffle", arguments=(Operand(0), side), options={})
    out = program.add(shuffle, (batch, channels, height * side, width * side), Range(-120, 110))
    program.outputs.update({"out": out} if read == "shuffled" else {"out": out, "small": small})
    fast = FastProgram(program, 2)
    assert [entry.shuffle is not None for entry in fast.plan if isinstance(entry, Group)] == [
        read == "shuffled"
    ]
    assert_same(
        program, fast, {"x": extremes((batch, inputs, height, width), -127, 127, seed=3).to(torch.int8)}
    )


def test_tie_free_multipliers_make_no_ties_and_move_no_product_over_one():
    draw = torch.Generator().manual_seed(0)
    seen = 0
    for largest, limit in ((2**24, 127), (2**16, 32767), (2**29, 255), (2**31 - 1, 1)):
        exponent = -torch.rand(200, generator=draw, dtype=torch.float64) * 26
        multiplier = torch.cat(
            [torch.exp2(exponent), torch.exp2(exponent.round()), 3 * torch.exp2(exponent.round())]
        )
        for mantissa, shift in zip(*quantize_multiplier(multiplier)):
            larger = tie_free_multiplier(mantissa, shift, largest, limit)
            if larger is None:
                continue
            seen += 1
            exact = Fraction(int(mantissa)) / Fraction(2) ** int(shift)
            # integers whose products lie at ties and next to them
            ties = torch.randint(0, min(limit, int(exact * largest)) + 1, (40,), generator=draw).tolist()
            near = {
                n
                for tie in ties
                for n in range(
                    int((tie + Fraction(1, 2)) / exact) - 1, int((tie + Fraction(1, 2)) / exact) + 3
                )
                if 0 <= n <= largest
            }
            for n in near:
                expected = math.floor(n * exact + Fraction(1, 2))
                assert min(round(float(n) * float(larger)), limit) == min(expected, limit), (
                    n,
                    mantissa,
                    shift,
                )
    assert seen > 500
    assert (
        tie_free_multiplier(torch.tensor(2**21 + 1), torch.tensor(40), 2**31 - 1, 32767) is None
        and tie_free_multiplier(torch.tensor(2**21), torch.tensor(20), 2**30) is None
    )


@needs_kernels
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("algorithm", ["gdn", "gdn1"])
def test_gdn_of_the_largest_numbers(inverse, algorithm):
    program = Program()
    shape = (1, 6, 30, 31)
    x = program.input("x", shape, Range(-32767, 32767))
    norm = program.input("norm", shape, Range(0, 2**31 - 1))
    power = 0.5 if algorithm == "gdn" else 1.0
    ratio = torch.logspace(-3, 1, 6, dtype=torch.float64) * (2.0**-14 if inverse else 2.0**14) ** (2 * power)
    mantissa, shift = (part.reshape(1, -1, 1, 1) for part in quantize_multiplier(ratio))
    ends = {name: torch.full((1, 6, 1, 1), sign * 32767) for name, sign in (("low", -1), ("high", 1))}
    gdn = ops.Gdn((x, norm), mantissa=mantissa, shift=shift, inverse=inverse, algorithm=algorithm, **ends)
    out = program.add(gdn, shape, Range(-32767, 32767))
    program.outputs["out"] = out
    draw = torch.Generator().manual_seed(4)
    norms = torch.exp2(torch.rand(shape, generator=draw) * 31).long().clamp(max=2**31 - 1)
    norms[:, :, 0] = torch.arange(31) ** 2
    norms[:, :, 1] = 2**31 - 1
    assert_same(
        program,
        FastProgram(program),
        {"x": extremes(shape, -32767, 32767).to(torch.int16), "norm": norms.to(torch.int32)},
    )


@needs_kernels
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("exponent", range(-22, 23, 3))
def test_gdn_at_and_next_to_halves(inverse, exponent):
    """Norms that are powers of four and their neighbours, gains that are powers of two and next to them:
    halves, where they are in reach."""
    program = Program()
    x_shape = (1, 8, 64, 48)
    x = program.input("x", x_shape, Range(-32767, 32767))
    norm = program.input("norm", x_shape, Range(0, 2**31 - 1))
    mantissa = torch.tensor(
        [2**21, 2**21, 2**21 + 1, 2**22 - 1, 2**21 + 2**20, 2**21, 3 * 2**20 + 1, 2**21 + 2**11]
    ).reshape(1, 8, 1, 1)
    shift = torch.full_like(mantissa, 21 + exponent)
    ends = {
        "low": torch.tensor([-32768, -127, -9, 0] * 2).reshape(1, 8, 1, 1),
        "high": torch.tensor([32767, 127, 9, 255] * 2).reshape(1, 8, 1, 1),
    }
    gdn = ops.Gdn((x, norm), mantissa=mantissa, shift=shift, inverse=inverse, algorithm="gdn", **ends)
    out = program.add(gdn, x_shape, Range(-32768, 32767))
    program.outputs["out"] = out
    assert gdn_fits_float32(gdn, program.values[x].range.largest)
    draw = torch.Generator().manual_seed(5)
    norms = (4 ** (torch.arange(48) % 16))[None] + torch.tensor([-1, 0, 1, 2])[:, None].repeat(16, 1)
    numbers = torch.randint(-32767, 32768, x_shape, generator=draw)
    small = torch.rand(x_shape, generator=draw) < 0.5
    numbers = torch.where(small, numbers % 129 - 64, numbers)
    assert_same(
        program,
        FastProgram(program),
        {"x": numbers.to(torch.int16), "norm": norms.clamp(0, 2**31 - 1).expand(x_shape).to(torch.int32)},
    )


@needs_kernels
@pytest.mark.parametrize("inverse", [False, True])
def test_gdn_where_the_gain_brings_it_as_near_to_a_half_as_it_can(inverse):
    program = Program()
    shape = (1, 8192, 4, 8)
    x, norm = (
        program.input("x", shape, Range(-32767, 32767)),
        program.input("norm", shape, Range(0, 2**31 - 1)),
    )
    draw = torch.Generator().manual_seed(6)

    def random(low, high):  # evenly in the logarithm
        return (
            low * (high / low) ** torch.rand(1, shape[1], 1, 1, generator=draw, dtype=torch.float64)
        ).floor()

    number, root, half = random(1, 32768), random(1, 2**31).sqrt(), random(1, 32768) + 0.5
    gain = half / number * (1 / root if inverse else root)
    shift = 21 - gain.log2().floor().long()
    mantissa = (gain * torch.exp2(shift.double())).round().long()
    ends = {"low": torch.full_like(mantissa, -32767), "high": torch.full_like(mantissa, 32767)}
    gdn = ops.Gdn((x, norm), mantissa=mantissa, shift=shift, inverse=inverse, algorithm="gdn", **ends)
    out = program.add(gdn, shape, Range(-32767, 32767))
    program.outputs["out"] = out
    assert gdn_fits_float32(gdn, program.values[x].range.largest)
    numbers = (number.long() * torch.tensor([1, -1, 1, -1])[:, None]).expand(shape)
    norms = (root.square().round().long() + torch.arange(-4, 4)).expand(shape).clamp(0, 2**31 - 1)
    assert_same(program, FastProgram(program), {"x": numbers.to(torch.int16), "norm": norms.to(torch.int32)})


def test_packed_weights_are_in_the_kernels_order():
    weight = torch.arange(17 * 2 * 3).reshape(17, 2, 3)
    packed = pack(weight, torch.int16)
    assert packed.shape == (2, 2, 2, 16, 2)
    for o in range(17):
        for tap in range(2):
            for i in range(3):
                assert packed[o // 16, tap, i // 2, o % 16, i % 2] == weight[o, tap, i]
    assert packed[1, :, :, 1:].abs().sum() == 0 and packed[:, :, 1, :, 1].abs().sum() == 0


@needs_kernels
def test_the_check_at_load_passes_here_and_notices_a_wrong_kernel(monkeypatch):
    assert first_difference() is None
    monkeypatch.setattr("licq.integer.products.pack", lambda weight, dtype: pack(weight, dtype).flip(0))
    assert first_difference() == "conv"


def test_without_kernels_the_reference_runs(monkeypatch):
    program = lower(frozen("balle2018"), 64, 64)
    monkeypatch.setattr("licq.integer.execution.library", lambda: None)
    usable.cache_clear()
    try:
        assert not usable()
        execute = executable(program)
    finally:
        monkeypatch.undo()
        usable.cache_clear()
    assert torch.equal(execute(pixels())["pixels"], run(program, pixels())["pixels"])
    if library() is not None:
        assert isinstance(executable(program), FastProgram)
        assert torch.equal(executable(program)(pixels())["pixels"], run(program, pixels())["pixels"])
