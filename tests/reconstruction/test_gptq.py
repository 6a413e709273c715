"""Compensated rounding against brute force, and its columns against the layers' own products."""

import itertools

import pytest
import torch
from torch import nn

from licq.quant.config import QuantConfig
from licq.quant.layers import QuantConv2d, QuantConv3d, QuantConvTranspose2d
from licq.quant.model import QuantModel
from licq.reconstruction import steps
from licq.reconstruction.api import quantize
from licq.reconstruction.columns import columns, output_size, phases
from licq.reconstruction.config import PtqConfig
from licq.reconstruction.gptq import compensate_rounding, gptq, turned
from licq.support.errors import InputError
from tests.tiny_codecs import images, tiny_codec

LAYERS = [
    nn.Conv2d(3, 5, 3, padding=1),
    nn.Conv2d(4, 2, 5, stride=2, padding=2),
    nn.Conv2d(2, 3, (3, 5), stride=(2, 1), padding=(1, 4), dilation=(1, 2)),
    nn.Conv2d(3, 4, (4, 3), padding="same", dilation=(1, 2)),
    nn.Conv2d(3, 4, 3, stride=2, padding="valid"),
    nn.ConvTranspose2d(3, 4, 5, stride=2, padding=2, output_padding=1),
    nn.ConvTranspose2d(2, 3, (3, 4), stride=(2, 3), padding=(1, 0), output_padding=(0, 2)),
    nn.ConvTranspose2d(2, 3, 3, stride=1, padding=1, dilation=2),
    nn.ConvTranspose2d(2, 3, 9, stride=4, padding=4, output_padding=3),
    nn.ConvTranspose2d(2, 3, 2, stride=3, padding=0),
    nn.Conv3d(2, 3, (3, 2, 4), stride=(1, 2, 1), padding=(1, 0, 2)),
]


def node_of(layer):
    kinds = {nn.Conv2d: QuantConv2d, nn.Conv3d: QuantConv3d, nn.ConvTranspose2d: QuantConvTranspose2d}
    return kinds[type(layer)](layer, QuantConfig())


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_columns_times_weights_are_the_layer(layer):
    node = node_of(layer)
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(
        -9, 10, (2, layer.in_channels) + (5, 7, 9)[-len(layer.kernel_size) :], generator=draw
    ).double()
    weight = torch.randint(-9, 10, node.float_weight().shape, generator=draw).double()
    whole = node.product(x, weight)
    assert output_size(node, x) == whole.shape[2:]
    ours = torch.full_like(whole, torch.nan)
    flat, seen = weight.flatten(1), []
    for phase in phases(node):
        at = torch.cartesian_prod(
            *(torch.arange(f, n, s) for f, n, s in zip(phase.first, whole.shape[2:], phase.step))
        ).T
        seen += phase.weights(node).tolist()
        for image in range(2):
            ours[(image, slice(None), *at)] = flat[:, phase.weights(node)] @ columns(
                node, x[image], phase, at
            )
    assert sorted(seen) == list(range(flat.shape[1]))
    untouched = torch.isnan(ours)  # output rows that no tap meets, where the stride is larger than the kernel
    assert torch.equal(ours[~untouched], whole[~untouched]) and not whole[untouched].any()


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_largest_sum_is_the_product_with_ones(layer):
    """Of an input of ones, away from the padding: what an output position can sum up at most."""
    node = node_of(layer)
    products = torch.rand(node.float_weight().shape, generator=torch.Generator().manual_seed(0)).double()
    ones = torch.ones(1, layer.in_channels, *[24] * len(layer.kernel_size), dtype=torch.float64)
    sums = node.product(ones, products).transpose(0, 1).flatten(1).amax(1)
    torch.testing.assert_close(node.largest_sum(products), sums)


def error(difference: torch.Tensor, moment: torch.Tensor) -> float:
    return float(((difference @ moment) * difference).sum())


def correlated(size: int, seed: int, rank: int | None = None) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(size, rank or 4 * size, generator=draw) + 2 * torch.randn(
        1, rank or 4 * size, generator=draw
    )
    return x @ x.T / x.shape[1]


@pytest.mark.parametrize("seed", range(6))
def test_error_is_near_the_least_of_all_and_below_nearest(seed):
    """Five weights: every combination of the four integers around each is tried."""
    moment = correlated(5, seed)
    weight = torch.randn(1, 5, generator=torch.Generator().manual_seed(100 + seed)) * 4
    around = [[float(w.floor()) + k for k in (-1, 0, 1, 2)] for w in weight[0]]
    least = min(error(torch.tensor([c]) - weight, moment) for c in itertools.product(*around))
    found = error(gptq(weight, moment, (-127, 127), damping=1e-6) - weight, moment)
    assert least - 1e-6 <= found <= max(4 * least, least + 0.3)
    many = torch.randn(200, 5, generator=torch.Generator().manual_seed(seed)) * 4
    assert error(gptq(many, moment, (-127, 127)) - many, moment) < 0.7 * error(many.round() - many, moment)


def test_uncorrelated_inputs_leave_rounding_to_nearest():
    weight = torch.randn(7, 30, generator=torch.Generator().manual_seed(0)) * 5
    assert torch.equal(gptq(weight, torch.diag(torch.rand(30) + 0.1), (-127, 127)), weight.round())


def test_limits_and_masks_are_kept_and_made_good():
    moment = correlated(300, 1)
    weight = torch.randn(9, 300, generator=torch.Generator().manual_seed(0)) * 5
    mask = torch.rand(9, 300, generator=torch.Generator().manual_seed(1)) < 0.6
    weight = weight * mask
    w_int = gptq(weight, moment, (-7, 7), mask)
    assert w_int.abs().max() == 7 and not w_int[~mask].any() and torch.equal(w_int, w_int.round())
    assert error(w_int - weight, moment) < 0.5 * error(weight.round().clamp(-7, 7) - weight, moment)


def test_inputs_that_never_spoke_do_no_harm():
    moment = correlated(12, 3, rank=4)
    moment[5], moment[:, 5] = 0, 0
    weight = torch.randn(3, 12, generator=torch.Generator().manual_seed(0)) * 5
    w_int = gptq(weight, moment, (-127, 127))
    assert torch.isfinite(w_int).all() and torch.equal(w_int[:, 5], weight[:, 5].round())
    assert torch.equal(gptq(weight, torch.zeros(12, 12), (-127, 127)), weight.round())


@pytest.mark.parametrize("arch", ["minnen2018", pytest.param("lu2022", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rounding", ["learned_offset", "ste"])
def test_layers_of_a_codec_give_less_error(arch, rounding):
    """Each layer alone, weights in 4 bits: squared error of its output on the calibration images."""
    data = list(images(4, 128, 128).split(2))

    def errors(compensated: bool) -> dict[str, float]:
        qmodel = QuantModel(tiny_codec(arch), QuantConfig(w_bits=4, a_bits=12, rounding=rounding))
        qmodel.observe(data)
        if compensated:
            compensate_rounding(qmodel, data, progress=False)
        found = {}
        names = [
            name
            for name, node in qmodel.nodes.items()
            if node.kind in ("conv", "deconv", "linear") and node.groups == 1
        ]
        calls = [(name, 0) for name in names]
        with torch.no_grad():
            qmodel.quantize_nodes(False)
            with qmodel.runtime.recording(calls) as real:
                qmodel(data[0])
            for name in names:
                qmodel.quantize_nodes(False)
                qmodel.quantize_nodes(True, [name])
                with qmodel.runtime.recording([(name, 0)], stop_after=(name, 0)) as ours:
                    qmodel(data[0])
                found[name] = float((ours[(name, 0)].real() - real[(name, 0)].real()).square().mean())
        return found

    nearest, ours = errors(False), errors(True)
    ratios = [ours[name] / nearest[name] for name in nearest if nearest[name] > 1e-12]
    assert sorted(ratios)[len(ratios) // 2] < 0.8
    assert sum(ratio < 1 for ratio in ratios) > 0.7 * len(ratios)


def test_turned_images_are_the_four_of_a_mirror_and_a_quarter_turn():
    image = torch.arange(3 * 4 * 6.0).reshape(1, 3, 4, 6)
    found = turned([image])
    assert [tuple(x.shape[-2:]) for x in found] == [(4, 6), (4, 6), (6, 4), (6, 4)]
    assert torch.equal(found[0], image) and torch.equal(found[1], image.flip(-1))
    assert torch.equal(found[2], torch.rot90(image, 1, (-2, -1))) and torch.equal(
        found[3], torch.rot90(image.flip(-1), 1, (-2, -1))
    )


def test_quantize_compensates_on_turned_images_and_balances(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        steps, "compensate_rounding", lambda qmodel, batches, *rest: seen.update(images=len(batches))
    )
    monkeypatch.setattr(
        steps, "balance_scales", lambda qmodel, sensitivities, share, progress: seen.update(share=share)
    )
    knobs = {"joint_iters": 0, "batch": 2}
    quantize(tiny_codec("balle2018"), images(4), PtqConfig.from_preset(**knobs), lmbda=0.01, progress=False)
    assert seen == {"images": 8, "share": 0.3}
    config = PtqConfig.from_preset(observed=3, **knobs)
    quantize(
        tiny_codec("balle2018"), images(4), config, lmbda=0.01, progress=False
    )  # enough of them: as they are
    assert seen["images"] == 2
    seen.clear()
    config = PtqConfig.from_preset(round_init="nearest", balance=0.0, **knobs)
    quantize(tiny_codec("balle2018"), images(4), config, lmbda=0.01, progress=False)
    assert seen == {}


def test_masked_weights_stay_masked_and_adaround_is_refused():
    qmodel = QuantModel(tiny_codec("minnen2018"), QuantConfig(rounding="learned_offset"))
    qmodel.observe(images(2).split(2))
    compensate_rounding(qmodel, images(2).split(2), progress=False)
    qmodel.freeze()
    node = qmodel.nodes["context_prediction"]
    assert not node.weight_int[(node.weight_quantizer.mask == 0).expand(node.weight_int.shape)].any()
    adaround = QuantModel(tiny_codec("balle2018"), QuantConfig(rounding="adaround"))
    adaround.observe(images(2).split(2))
    with pytest.raises(InputError, match="adaround"):
        compensate_rounding(adaround, images(2).split(2), progress=False)
