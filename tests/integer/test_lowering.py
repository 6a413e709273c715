"""The program of a frozen model computes what the model computes, to the last bit, for every architecture."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from licq.integer.lowering import lower
from licq.integer.passes import without_duplicates
from licq.integer.reference import run
from licq.models.registry import get_architecture, list_models
from licq.quant.config import QuantConfig
from licq.quant.fixedpoint import INT32
from licq.quant.model import QuantModel
from licq.support.determinism import exact_products
from licq.support.errors import InputError
from tests.frozen_codecs import frozen, make_frozen, settings
from tests.tiny_codecs import images, tiny_codec


def assert_program_equals_model(codec, x):
    """Every latent at its boundary and every pixel; values stay inside the ranges that the program proves."""
    with torch.no_grad(), codec.runtime.recording() as record:
        expected = codec(x)
    program = lower(codec, *x.shape[2:], batch=len(x))
    values = run(program, {"pixels": (x * 255).round().to(torch.uint8)}, keep=True)
    assert torch.equal(values[program.outputs["pixels"]].float() / 255, expected["x_hat"])
    calls = {}
    for boundary in program.boundaries:
        call = calls[boundary.node] = calls.get(boundary.node, -1) + 1
        output = record[(boundary.node, call)]
        decoded = output[0] if isinstance(output, tuple) else output
        assert torch.equal(values[boundary.decoded].double(), decoded.q.double())
        if boundary.kind == "gaussian":
            node = codec.get_submodule(f"model.{boundary.node}")
            scales = values[boundary.scales].float() * node.unit
            means = values[boundary.means].float() * node.unit if boundary.whole else None
            assert torch.equal(
                node._likelihood_of(values[boundary.symbols].float(), scales, means), output[1]
            )
    for number, tensor in values.items():
        stated = program.values[number].range
        assert stated.low <= int(tensor.min()) and int(tensor.max()) <= stated.high
        assert tensor.dtype == stated.dtype and tuple(tensor.shape) == program.values[number].shape
    return program


@pytest.mark.parametrize("name", list_models())
def test_program_equals_the_model(name):
    program = assert_program_equals_model(frozen(name), images(1, seed=5))
    assert all(numbers.largest < 2**53 for _, numbers in program.beyond_int32())
    assert not any(
        isinstance(part, nn.Module)
        for operation in program.operations
        for part in operation.attributes().values()
    )


@pytest.mark.parametrize(("name", "config"), settings())
def test_every_setting_of_the_quantizer_lowers(name, config):
    assert_program_equals_model(frozen(name, **config), images(1, seed=5))


@pytest.mark.parametrize("name", ["cheng2020", "lu2022", "tic"])
def test_other_sizes_and_batches(name):
    codec = frozen(name)
    assert_program_equals_model(codec, images(2, 64, 128, seed=6))
    assert_program_equals_model(codec, images(1, 192, 64, seed=7))


@pytest.mark.parametrize("name", [name for name in list_models() if get_architecture(name).variable])
def test_a_program_for_each_rate(name):
    codec = make_frozen(name)
    for level in (1, 3.5, 8):
        codec.model.set_level(level)
        assert_program_equals_model(codec, images(1, seed=8))


def test_the_program_of_a_loaded_file_is_the_same(tmp_path):
    codec = frozen("lu2022")
    codec.save(tmp_path / "model.safetensors")
    loaded = QuantModel.load(tmp_path / "model.safetensors")
    x = images(1, seed=9)
    ours, theirs = assert_program_equals_model(codec, x), assert_program_equals_model(loaded, x)
    assert [repr(operation) for operation in ours.operations] == [
        repr(operation) for operation in theirs.operations
    ]


def test_a_part_computes_what_the_whole_does():
    codec = frozen("minnen2018-mean")
    program = lower(codec, 64, 64)
    x = (images(1, seed=3) * 255).round().to(torch.uint8)
    values = run(program, {"pixels": x}, keep=True)
    y = next(boundary for boundary in program.boundaries if boundary.kind == "gaussian")
    synthesis = program.part({"y_hat": y.decoded}, {"pixels": program.outputs["pixels"]})
    assert torch.equal(
        run(synthesis, {"y_hat": values[y.decoded]})["pixels"], values[program.outputs["pixels"]]
    )
    assert len(synthesis.operations) < len(program.operations) / 2
    with pytest.raises(ValueError, match="pixels is needed"):
        program.part({"y_hat": y.decoded}, {"scales": y.scales})


def test_eight_bit_codecs_stay_inside_int32():
    for name in ("minnen2018", "lu2022", "cheng2020"):
        program = lower(frozen(name), 64, 64)
        assert not [
            op for op, _ in program.beyond_int32() if op.kind in ("conv", "deconv", "linear", "matmul")
        ]
        assert all(
            program.values[output].range.largest <= INT32
            for op in program.operations
            if op.kind == "rescale"
            for output in op.outputs
        )


def test_what_is_no_integer_program_is_refused():
    codec = QuantModel(tiny_codec("balle2018"), QuantConfig())
    with pytest.raises(InputError, match="freeze"):
        lower(codec, 64, 64)
    with pytest.raises(InputError, match="at most 16 bits"):
        lower(frozen("balle2018", w_bits=32), 64, 64)
    codec = make_frozen("balle2018")
    codec.quantize_nodes(False, ["g_s.0"])
    with pytest.raises(InputError, match="kept in float"):
        lower(codec, 64, 64)


@pytest.mark.parametrize(
    "name",
    [
        "balle2018",
        "minnen2018",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("lu2022", "tic", "chen2021", "balle2018-vbr")
        ),
    ],
)
def test_on_a_gpu_every_number_is_there(name):
    """No GPU is needed: tensors without data, on a pretended one, through the reference; a constant left on
    the CPU would be an error."""
    program = lower(frozen(name), 64, 64)
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = run(
            program.to("cuda"), {"pixels": torch.empty((1, 3, 64, 64), dtype=torch.uint8, device="cuda")}
        )
    assert found["pixels"].device.type == "cuda" and found["pixels"].shape == (1, 3, 64, 64)


def test_products_on_a_gpu_leave_cudnn_and_tf32_out():
    before = torch.backends.cudnn.enabled, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    with exact_products(torch.device("cuda")):
        assert not torch.backends.cudnn.enabled and torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.enabled == before[0]
    torch.set_float32_matmul_precision(before[1])


def test_what_a_pass_has_decoded_stays_what_it_is():
    """At the positions that later passes read, the first roundings of a latent are the last one: a decoder
    has only one of them."""
    network = tiny_codec("lu2022")
    with torch.no_grad():  # so that the sums of later passes have coarser steps
        network.sc_transform_2.weight *= 3
        network.sc_transform_3.weight *= 9
    codec = QuantModel(network, QuantConfig(strict_int8=True))
    codec.observe(images(4).split(2))
    codec.freeze()
    program = without_duplicates(lower(codec, 256, 256))
    values = run(program, {"pixels": (images(1, 256, 256, seed=8) * 255).round().to(torch.uint8)}, keep=True)
    final = {boundary.latent: boundary.decoded for boundary in program.boundaries}
    masks = {
        operation.inputs[0]: operation.mask for operation in program.operations if operation.kind == "mask"
    }
    passes = [
        boundary
        for boundary in program.boundaries
        if boundary.decoded in masks and boundary.decoded != final[boundary.latent]
    ]
    assert len(passes) == 5
    for boundary in passes:
        known = masks[boundary.decoded]
        assert 0 < int(known.sum()) and torch.equal(
            values[boundary.decoded] * known, values[final[boundary.latent]] * known
        )
