"""Whole codecs, quantized: what is integer, that learning and frozen forwards agree to the bit, that ranges
are static."""

from functools import lru_cache

import pytest
import torch
from compressai.layers import MaskedConv2d
from torch import Tensor, nn

from licq.models import create_model
from licq.models.vbr import OffsetNet, RateFunction
from licq.quant.config import QuantConfig
from licq.quant.functions import QuantMatMul
from licq.quant.layers import PLAIN_LAYERS
from licq.quant.model import QuantModel
from licq.quant.qtensor import QTensor
from licq.support.errors import InputError
from tests.tiny_codecs import SIZES, images, tiny_codec

TRANSFORMERS = ("lu2022", "tic")
EVERY_CODEC = list(SIZES)


def quantized(model: nn.Module, **options) -> QuantModel:
    """Calibrated on two images of 64x64, not frozen."""
    codec = QuantModel(model, QuantConfig(**options))
    codec.observe([images(2)])
    return codec


@torch.no_grad()
def run(codec: nn.Module, x: Tensor) -> dict[str, Tensor]:
    out = codec(x)
    return {"x_hat": out["x_hat"], **out["likelihoods"]}


def run_and_watch(codec: QuantModel, x: Tensor) -> tuple[dict[str, Tensor], dict[str, list[QTensor]]]:
    """The outputs, and every quantized tensor that any node returned."""
    seen: dict[str, list[QTensor]] = {name: [] for name in codec.nodes}

    def watch(name):
        def hook(module, args, output):
            outputs = output if isinstance(output, tuple) else (output,)
            seen[name] += [each for each in outputs if isinstance(each, QTensor)]

        return hook

    hooks = [node.register_forward_hook(watch(name)) for name, node in codec.nodes.items()]
    out = run(codec, x)
    for hook in hooks:
        hook.remove()
    return out, seen


class Prepared:
    """A codec taken through calibration, a learning-mode forward and freezing, with what was seen on the
    way."""

    def __init__(self, name: str):
        self.source = tiny_codec(name)
        self.before = {key: value.clone() for key, value in self.source.state_dict().items()}
        self.codec = quantized(self.source)
        layers = [
            node
            for node in self.codec.nodes.values()
            if isinstance(node, PLAIN_LAYERS) and not node.input_grid.exact
        ]
        for node in layers[::2]:  # every other layer with split channels
            channels = torch.arange(len(node.input_grid.low)) % 3 == 0
            node.input_grid.split(channels if node.input_grid.bits == 8 else torch.zeros_like(channels))
            node.start_weights()
        self.image = images(1, seed=5)
        self.learning, self.learning_nodes = run_and_watch(self.codec, self.image)
        self.codec.freeze()
        self.frozen, self.frozen_nodes = run_and_watch(self.codec, self.image)


prepared = lru_cache(maxsize=None)(Prepared)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", EVERY_CODEC)
def test_the_whole_codec_is_integer_and_the_report_says_so(name):
    coverage = prepared(name).codec.coverage()
    assert coverage["kept_in_float"] == []
    rate_only = {
        "balle2018-vbr": ["gayn2zqstep"],
        "minnen2018-mean-vbr": ["gayn2zqstep"],
        "minnen2018-vbr": ["scale_to_context"],
    }
    assert list(coverage["left_alone"]) == rate_only.get(name, [])
    model = "gaussian_mixture" if name == "chen2021" else "gaussian_conditional"
    assert coverage["quantized"]["entropy_bottleneck"] == coverage["quantized"][model] == 1
    source = tiny_codec(name)
    # of a variable-rate codec's own: tables, and constants of each rate
    apart = {
        id(m)
        for part in source.modules()
        if isinstance(part, (OffsetNet, RateFunction))
        for m in part.modules()
    }
    kinds = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)
    layers = sum(isinstance(m, kinds) and id(m) not in apart for m in source.modules())
    assert (
        sum(coverage["quantized"].get(kind, 0) for kind in ("conv", "conv3d", "deconv", "linear")) == layers
    )


@pytest.mark.parametrize("name", EVERY_CODEC)
def test_frozen_and_learning_forwards_agree_to_the_bit_at_every_node(name):
    ready = prepared(name)
    assert ready.learning_nodes.keys() == ready.frozen_nodes.keys()
    for node, outputs in ready.learning_nodes.items():
        assert len(outputs) == len(ready.frozen_nodes[node]) > 0, node
        for a, b in zip(outputs, ready.frozen_nodes[node]):
            assert torch.equal(a.q.double(), b.q.double()), node
            assert torch.equal(a.full_scale(), b.full_scale()), node
    assert torch.equal(ready.learning["y"], ready.frozen["y"]) and torch.equal(
        ready.learning["z"], ready.frozen["z"]
    )
    # the frozen model's pixels are the learning model's x_hat, rounded
    exact = ready.learning["x_hat"].double() * 255
    pixels = ready.frozen["x_hat"].double() * 255
    assert float((pixels - exact.clamp(0, 255)).abs().max()) <= 0.5 + 1e-3


@pytest.mark.parametrize("name", EVERY_CODEC)
def test_nothing_but_whole_numbers_flows_between_nodes(name):
    for node, outputs in prepared(name).frozen_nodes.items():
        for output in outputs:
            assert output.is_integer, node
            assert torch.equal(output.q, output.q.round()), node
            assert float(output.q.double().abs().max()) < 2**31, node
            assert bool((output.scale > 0).all()) and bool(torch.isfinite(output.scale).all()), node
    pixels = prepared(name).frozen["x_hat"].double() * 255
    assert float((pixels - pixels.round()).abs().max()) < 1e-4
    assert 0 <= float(pixels.min()) and float(pixels.max()) <= 255


@pytest.mark.parametrize("name", EVERY_CODEC)
def test_the_source_model_is_not_changed(name):
    ready = prepared(name)
    after = ready.source.state_dict()
    assert after.keys() == ready.before.keys()
    assert all(torch.equal(after[key], ready.before[key]) for key in after)
    assert not any(module.__class__.__module__.startswith("quant") for module in ready.source.modules())
    assert all(parameter.requires_grad for parameter in ready.source.parameters())


def test_weights_under_the_mask_of_the_source_stay_as_they_were():
    """CompressAI's own layer zeroes them in forward; quantizing must not."""
    source = tiny_codec("minnen2018")
    layer = next(module for module in source.modules() if isinstance(module, MaskedConv2d))
    with torch.no_grad():
        layer.weight.fill_(0.5)
    run(quantized(source), images(1))
    assert bool((layer.weight == 0.5).all())


@pytest.mark.parametrize("name", EVERY_CODEC)
def test_outputs_depend_on_no_other_image_and_on_no_earlier_forward(name):
    ready = prepared(name)
    loud = (images(2, seed=9) > 0.5).float()
    together = run(ready.codec, torch.cat([loud[:1], ready.image, loud[1:]]))
    assert torch.equal(together["x_hat"][1:2], ready.frozen["x_hat"])
    for key in ("y", "z"):
        # the estimate of the rate is float arithmetic, whose last bit may depend on how many are computed at
        # once
        torch.testing.assert_close(together[key][1:2], ready.frozen[key], rtol=1e-5, atol=1e-7)
    assert same(run(ready.codec, ready.image), ready.frozen)


@pytest.mark.parametrize("name", EVERY_CODEC)
def test_no_forward_changes_a_stored_number(name):
    codec = prepared(name).codec
    before = {key: value.clone() for key, value in codec.state_dict().items()}
    run(codec, (images(1, seed=11) > 0.4).float())
    after = codec.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", EVERY_CODEC)
@pytest.mark.parametrize("size", [(64, 128)])
def test_images_of_other_sizes_than_in_calibration_work(name, size):
    codec = prepared(name).codec
    out = run(codec, images(1, *size))
    assert out["x_hat"].shape == (1, 3, *size)
    assert out["y"].shape[2:] == (size[0] // 16, size[1] // 16)
    assert all(bool(torch.isfinite(value).all()) for value in out.values())


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("balle2018", 16),
        ("balle2018", 12),
        ("minnen2018", 12),
        pytest.param("lu2022", 16, marks=pytest.mark.slow),
        pytest.param("tic", 16, marks=pytest.mark.slow),
    ],
)
def test_many_bits_are_close_to_the_float_codec(name, bits):
    source = tiny_codec(name)
    codec = quantized(source, w_bits=bits, a_bits=bits)
    codec.freeze()
    close_to_float(run(codec, images(1)), run(source, images(1)), 0.05)


@pytest.mark.parametrize(
    "name",
    ["minnen2018", "cheng2020-anchor", *(pytest.param(n, marks=pytest.mark.slow) for n in TRANSFORMERS)],
)
def test_nodes_switched_to_float_are_the_source_model(name):
    source = tiny_codec(name)
    codec = quantized(source)
    codec.quantize_nodes(False)
    expected, out = run(source, images(1)), run(codec, images(1))
    for key in expected:
        largest = float(expected[key].abs().max())
        torch.testing.assert_close(out[key], expected[key], rtol=1e-4, atol=1e-4 * largest)


def close_to_float(out: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Rate within a share of the float codec's, pixels within 3/2 of a level plus that share, on average."""
    for key in ("y", "z"):
        bits, wanted = (float(-values[key].double().log2().sum()) for values in (out, expected))
        assert bits == pytest.approx(wanted, rel=tolerance, abs=2), key
    pixels, wanted = (values["x_hat"].clamp(0, 1) for values in (out, expected))
    assert float((pixels - wanted).abs().mean()) <= 1.5 / 255 + tolerance * float(wanted.std())


@pytest.mark.parametrize("name", ["balle2018", "minnen2018", pytest.param("tic", marks=pytest.mark.slow)])
def test_thirty_two_bits_on_both_sides_are_close_to_the_float_codec(name):
    source = tiny_codec(name)
    codec = quantized(source, w_bits=32, a_bits=32)
    codec.freeze()
    close_to_float(run(codec, images(1)), run(source, images(1)), 0.02)


ABLATIONS = {
    "weights only": {"w_bits": 8, "a_bits": 32},
    "activations only": {"w_bits": 32, "a_bits": 8},
    "strict 8 bits": {"strict_int8": True},
    "8-bit bias": {"bias_bits": 8},
    "tensor scales": {"a_granularity": "tensor", "w_granularity": "tensor"},
    "full fold": {"transform": "fold"},
    "found ranges": {"w_range": "mse", "a_range": "percentile99.9"},
}


@pytest.mark.parametrize("options", ABLATIONS.values(), ids=ABLATIONS)
@pytest.mark.parametrize(
    "name",
    [
        "minnen2018",
        pytest.param("lu2022", marks=pytest.mark.slow),
        pytest.param("cheng2020", marks=pytest.mark.slow),
    ],
)
def test_ablations_run_frozen_like_learning_and_not_far_from_float(name, options):
    source = tiny_codec(name)
    codec = quantized(source, **options)
    learning = run(codec, images(1))
    codec.freeze()
    frozen = run(codec, images(1))
    assert torch.equal(learning["y"], frozen["y"]) and torch.equal(learning["z"], frozen["z"])
    close_to_float(frozen, run(source, images(1)), 0.2)


def test_equal_seeds_and_images_give_equal_models():
    first, second = (quantized(tiny_codec("minnen2018")) for _ in range(2))
    first.freeze()
    second.freeze()
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert same(run(first, images(1)), run(second, images(1)))


def test_thawed_models_learn_again_and_freeze_to_the_same_numbers():
    codec = quantized(tiny_codec("minnen2018"))
    codec.freeze()
    frozen = run(codec, images(1))
    codec.thaw()
    weight = next(node for node in codec.nodes.values() if node.kind == "conv").module.weight.requires_grad_()
    out = codec(images(1))
    (out["x_hat"].square().mean() - out["likelihoods"]["y"].log().mean()).backward()
    assert float(weight.grad.abs().sum()) > 0
    codec.freeze()
    assert same(run(codec, images(1)), frozen)


def test_training_mode_brings_no_noise():
    codec = quantized(tiny_codec("balle2018")).train()
    assert same(run(codec, images(1)), run(codec, images(1)))


class Unseen(nn.Module):
    """A codec no registry knows, with a function that has no integer form and a path of its own for bright
    images."""

    def __init__(self, branch: bool):
        super().__init__()
        self.branch = branch
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.odd = nn.Bilinear(2, 2, 2)
        self.last = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        y = torch.sinc(self.conv(x))
        if self.branch and x.q.mean() > 200:
            y = torch.sigmoid(y)
        return {"x_hat": self.last(y), "likelihoods": {"y": torch.ones(1)}}


def test_what_stays_in_float_is_named_with_its_place():
    codec = quantized(Unseen(False))
    codec.freeze()
    run(codec, images(1))
    coverage = codec.coverage()
    assert coverage["kept_in_float"] == [{"function": "sinc", "in": "the codec's own forward"}]
    assert not coverage["left_alone"]  # `odd`, which has no integer layer, does not run


def test_a_path_not_taken_in_calibration_is_refused_by_name():
    codec = quantized(Unseen(True))
    with pytest.raises(InputError, match="sigmoid0 was not met in calibration"):
        run(codec, torch.ones(1, 3, 64, 64))


def test_a_model_without_layers_is_refused():
    class Nothing(nn.Module):
        def forward(self, x):
            return {"x_hat": x, "likelihoods": {}}

    with pytest.raises(InputError, match="no layer that can be quantized"):
        quantized(Nothing())


# ---------------------------------------------------------------------------------------------------- latents


def test_layers_that_read_latents_hold_other_images_larger_ones():
    """What only y_hat or z_hat enters has latent_bits and room; the layer behind it has a_bits."""
    torch.manual_seed(0)
    qmodel = QuantModel(create_model("minnen2018", N=4, M=6).eval(), QuantConfig())
    qmodel.observe([torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))])
    bits = {name: node.input_grid.bits for name, node in qmodel.nodes.items() if hasattr(node, "input_grid")}
    latent = {name for name, width in bits.items() if width == 14}
    assert latent == {"g_s.0", "h_s.0", "context_prediction"}
    assert {width for name, width in bits.items() if name not in latent} == {8}
    strict = QuantModel(create_model("minnen2018", N=4, M=6).eval(), QuantConfig(strict_int8=True))
    strict.observe([torch.rand(1, 3, 64, 64)])
    assert strict.nodes["g_s.0"].input_grid.bits == 8
    assert [QuantConfig(a_bits=bits, strict_int8=True).carrier_bits for bits in (6, 8, 10, 32)] == [
        8,
        8,
        10,
        8,
    ]


def test_whole_symbols_enter_the_synthesis_exactly():
    """balle2018 has no means: y_hat is whole, and its grid holds it without a rounding."""
    torch.manual_seed(0)
    qmodel = QuantModel(create_model("balle2018", N=4, M=6).eval(), QuantConfig())
    qmodel.observe([torch.rand(1, 3, 64, 64)])
    grid = qmodel.nodes["g_s.0"].input_grid
    assert grid.exact and not qmodel.nodes["g_s.0"].learnable().get("range_a")
    symbols = torch.arange(-40.0, 41.0).reshape(1, 1, 9, 9).expand(1, 6, 9, 9)
    scale, qmin, qmax = grid.parameters_of_grid()
    codes = symbols / scale.reshape(1, -1, 1, 1)
    assert torch.equal(codes, codes.round())
    assert bool((qmax * scale >= 4).all())


def test_accumulators_beyond_32_bits_are_named():
    torch.manual_seed(0)
    for bits, expected in ((8, False), (16, True)):
        qmodel = QuantModel(create_model("balle2018", N=8, M=8).eval(), QuantConfig(w_bits=bits, a_bits=bits))
        qmodel.observe([torch.rand(1, 3, 64, 64)])
        qmodel.freeze()
        assert bool(qmodel.coverage()["beyond_int32"]) is expected


def test_attention_has_the_zero_points_that_are_asked_for_and_names_its_sums():
    for bits, symmetry in ((8, "symmetric"), (16, "asymmetric")):
        qmodel = quantized(tiny_codec("lu2022"), w_bits=bits, a_bits=bits, a_symmetry=symmetry)
        qmodel.freeze()
        products = {name: node for name, node in qmodel.nodes.items() if isinstance(node, QuantMatMul)}
        assert products and bool(products.keys() & qmodel.coverage()["beyond_int32"].keys()) is (bits == 16)
        for node in products.values():
            for grid in (node.grid_a, node.grid_b):
                shifted = grid.qmin != -grid.qmax
                assert not shifted.any() if symmetry == "symmetric" else shifted.any()
