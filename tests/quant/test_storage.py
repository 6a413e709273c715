"""`strict_int8`: what is stored between layers has 8 bits, what is in registers has more."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from licq.integer.lowering import lower
from licq.integer.program import Program
from licq.integer.reference import run
from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.quant.operations import MultiplyAccumulate, Operation
from tests.tiny_codecs import images, tiny_codec


class _Gated(nn.Module):
    """A gate x * conv(x) and a skip, whose channels have very different ranges."""

    def __init__(self):
        super().__init__()
        self.first, self.gate = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.second, self.last = nn.Conv2d(4, 4, 3, padding=1), nn.ConvTranspose2d(4, 3, 4, 2, 1)
        self.down = nn.Conv2d(3, 3, 2, 2)
        with torch.no_grad():
            self.first.weight *= torch.tensor([1.0, 8.0, 64.0, 512.0]).reshape(-1, 1, 1, 1)
            self.last.weight /= torch.tensor([1.0, 8.0, 64.0, 512.0]).reshape(-1, 1, 1, 1)
            for layer in (self.gate, self.second):
                layer.weight.copy_(torch.eye(4)[:, :, None, None].expand_as(layer.weight) / 9)

    def forward(self, x):
        x = self.first(self.down(x))
        gated = x * torch.sigmoid(self.gate(x))
        return {"x_hat": self.last(gated + self.second(gated)), "likelihoods": {"y": torch.ones(1, 1)}}


def _strict(network: nn.Module, **options) -> QuantModel:
    codec = QuantModel(network.eval(), QuantConfig(strict_int8=True, **options))
    codec.observe(images(4).split(2))
    return codec


def _wide_stored(program: Program) -> list[str]:
    """Nodes that read from memory what may need more than 8 bits, boundaries of the codec aside.

    A value is of the latest layer that it comes from. One is read from memory where a layer multiplies it, or
    where a function also reads a value of a later layer.
    """
    producers = program.producers()
    layer: dict[int, int] = {}
    layers, wide = 0, []
    boundaries = {boundary.node for boundary in program.boundaries}
    latents = {boundary.decoded for boundary in program.boundaries}

    def codes(number: int) -> int:
        """How many values a channel of this may have."""
        operation, numbers = producers[number], program.values[number].range
        if operation.kind == "rescale" and operation.low is not None:
            return int((operation.high - operation.low).max()) + 1
        return numbers.high - numbers.low + 1

    def made_of(number: int) -> Iterator[int]:
        """The value, and what functions of one operand have made it of: any of these may be stored."""
        yield number
        while is_unary(producers[number]):
            number = producers[number].inputs[0]
            yield number

    def is_unary(operation: Operation) -> bool:
        return operation.kind == "layout" or (len(operation.inputs) == 1 and not is_product(operation))

    def is_product(operation: Operation) -> bool:
        return isinstance(operation, MultiplyAccumulate) or operation.kind == "matmul"

    for operation in program.operations:
        latest = max((layer[number] for number in operation.inputs), default=0)
        for number in operation.inputs:
            if operation.kind == "layout" or operation.node in boundaries:
                continue
            if is_product(operation) or layer[number] < latest:
                chain = list(made_of(number))
                if min(map(codes, chain)) > 256 and not latents.intersection(chain):
                    wide.append(f"{operation.node}: {producers[number].kind} {program.values[number].range}")
        layers += is_product(operation)
        layer.update(dict.fromkeys(operation.outputs, layers if is_product(operation) else latest))
    return wide


@pytest.mark.parametrize("name", ["gated", "minnen2018", "cheng2020", "lu2022", "tic"])
def test_no_program_reads_more_than_8_bits_from_memory(name):
    codec = _strict(_Gated() if name == "gated" else tiny_codec(name))
    assert all(layer.input_grid.split_steps is None for layer in codec.layers.values())
    codec.freeze()
    program = lower(codec, 64, 64)
    assert _wide_stored(program) == []
    pixels = (images(1, seed=3) * 255).round().to(torch.uint8)
    found = run(program, {"pixels": pixels})["pixels"]
    assert torch.equal(found, (codec(pixels / 255)["x_hat"] * 255).round().to(found.dtype))


def test_a_gate_reads_its_first_factor_from_memory_and_its_second_from_registers():
    """x waits for the sums of the gate's convolution; sigmoid's result and the product do not wait."""
    codec = _strict(_Gated())
    gate, skip = codec.functions["mul0"], codec.functions["add0"]
    assert gate.options == skip.options == {"stored": [0]}
    assert (gate.grid_a.bits, gate.grid_a.low.numel()) == (8, 4)
    assert (gate.grid_b.bits, gate.grid_out.bits, codec.functions["sigmoid0"].grid_in.bits) == (16, 16, 12)
    assert (skip.stored0.bits, skip.stored0.low.numel(), skip.grid.bits) == (8, 4, 16)


def test_small_channels_of_a_stored_tensor_keep_their_values():
    """With one scale for the tensor, the smallest of channels 1 : 8 : 64 : 512 would have a few codes."""
    codec = _strict(_Gated())
    stored = codec.functions["add0"].stored0
    step = stored.parameters_of_grid()[0]
    assert float(step.max() / step.min()) > 64


def test_a_saved_program_keeps_what_is_stored(tmp_path):
    codec = _strict(_Gated())
    codec.freeze()
    codec.save(tmp_path / "model.safetensors")
    loaded = QuantModel.load(tmp_path / "model.safetensors", model=_Gated())
    image = images(1, seed=3)
    assert torch.equal(loaded(image)["x_hat"], codec(image)["x_hat"])
    assert loaded.functions["mul0"].options == {"stored": [0]}


def test_a_sum_that_runs_twice_stores_what_either_call_reads_from_memory():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.sum = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), _Sum()

        def forward(self, x):
            a, b = self.one(x), self.two(x)
            return {
                "x_hat": self.two(self.sum(a, b) + self.sum(b, a)),
                "likelihoods": {"y": torch.ones(1, 1)},
            }

    assert _strict(Twice()).functions["sum/add0"].options == {"stored": [0, 1]}


class _Sum(nn.Module):
    def forward(self, a, b):
        return a + b
