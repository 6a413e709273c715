"""Flat pictures: ranges hold them, and compensated rounding keeps the layers' outputs on them."""

import pytest
import torch

from licq.quant.clipping import counting
from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.reconstruction.api import quantize
from licq.reconstruction.config import PtqConfig
from licq.reconstruction.flat_areas import WEIGHT, Area, towards
from licq.reconstruction.gptq import compensate_rounding
from licq.reconstruction.stress import flat
from tests.tiny_codecs import images, tiny_codec


def dull(count: int = 2) -> torch.Tensor:
    """Grey crops of low contrast, as photographs of fog are."""
    return torch.round((0.45 + 0.1 * images(count)) * 255) / 255


def test_flat_pictures_are_8_bit_samples_of_all_corners_of_the_colours():
    pictures = flat(torch.rand(2, 3, 48, 80))
    assert pictures.shape == (12, 3, 48, 80) and torch.equal(pictures * 255, (pictures * 255).round())
    plain = pictures[:9].flatten(2)
    assert torch.equal(plain.amin(2), plain.amax(2))
    assert len({tuple(colour.tolist()) for colour in plain[:, :, 0]}) == 9
    smooth = pictures[9:]
    assert float(smooth.diff(dim=-1).abs().max()) < 0.03 and float(smooth.std()) > 0.2
    crops = torch.rand(5, 5, 32, 32)
    assert torch.equal(flat(crops)[:, 3:], crops[torch.arange(12) % 5, 3:])


def test_no_flat_picture_is_clipped_though_the_crops_are_dull():
    shares = {}
    for knob in (True, False):
        qmodel = quantize(
            tiny_codec("minnen2018-mean"),
            dull(),
            PtqConfig.from_preset("nearest", flat=knob),
            lmbda=0.01,
            progress=False,
        )
        with torch.no_grad(), counting(qmodel.nodes) as counter:
            qmodel(flat(dull())[:9])
        shares[knob] = counter.shares()
    # behind a quantized prefix the largest values may be a step beyond those of the float codec
    assert max(shares[True].values(), default=0.0) < 0.03 < 0.1 < max(shares[False].values()), shares


def test_ranges_that_an_estimator_sets_do_not_look_at_flat_pictures():
    ranges = {}
    for knob in (True, False):
        for spec in ("percentile99", "max"):
            qmodel = QuantModel(tiny_codec("balle2018"), QuantConfig(a_range=spec, transform="fold"))
            qmodel.observe([dull()], [flat(dull())] if knob else [])
            ranges[knob, spec] = qmodel.nodes["g_s.2"].input_grid.parameters_of_grid()[0].detach()
    assert torch.equal(ranges[True, "percentile99"], ranges[False, "percentile99"])
    assert float((ranges[True, "max"] / ranges[False, "max"]).max()) > 1.2


def test_a_method_says_whether_its_ranges_may_clip():
    assert not PtqConfig.from_preset("licq").clips and not PtqConfig.from_preset("nearest").clips
    for preset, knobs in (("rdo-ptq", {}), ("nearest", {"flat": False}), ("nearest", {"a_range": "mse"})):
        assert PtqConfig.from_preset(preset, **knobs).clips


def test_the_change_of_the_weights_is_the_least_squares_one():
    draw = torch.Generator().manual_seed(0)
    weight, photographs = torch.randn(3, 7, generator=draw), torch.randn(7, 50, generator=draw)
    area = Area(torch.randn(7, 4, generator=draw), torch.randn(3, 4, generator=draw))
    moment = photographs @ photographs.T / 50
    ours, together = towards(weight, moment.clone(), area)
    # the same as one regression: rows of photographs ask for no change, rows of the area for its outputs
    share = (WEIGHT / 4) ** 0.5
    damping = (1e-3 * moment.diagonal().mean()).sqrt() * torch.eye(7)
    rows = torch.cat([photographs.T / 50**0.5, share * area.inputs.T, damping]).double()
    errors = share * (area.outputs - weight @ area.inputs).T.double()
    targets = torch.cat([torch.zeros(50, 3), errors, torch.zeros(7, 3)])
    change = torch.linalg.lstsq(rows, targets.double()).solution.T
    assert torch.allclose(ours.double(), weight + change, atol=1e-5)
    assert torch.allclose(together, moment + WEIGHT / 4 * area.inputs @ area.inputs.T, atol=1e-5)


@pytest.mark.parametrize("name", ["balle2018", "lu2022"])
def test_compensated_rounding_keeps_the_outputs_of_flat_areas(name):
    crops, errors = images(2), {}
    pictures = flat(crops)[:4]
    layer = {"balle2018": "g_a.4", "lu2022": "g_a2"}[name]
    for knob in (True, False):
        qmodel = QuantModel(tiny_codec(name), QuantConfig(a_bits=6, rounding="learned_offset"))
        qmodel.observe([crops], [pictures])
        compensate_rounding(qmodel, [crops], [pictures] if knob else [], progress=False)
        outputs = []
        for quantized in (False, True):
            qmodel.quantize_nodes(quantized)
            call = (layer, 0)
            with torch.no_grad(), qmodel.runtime.recording([call], stop_after=call) as record:
                qmodel(pictures)
            outputs.append(record[call].real())
        errors[knob] = float((outputs[0] - outputs[1]).square().mean())
    assert errors[True] < 0.4 * errors[False], errors


def test_layers_with_masks_stay_causal():
    qmodel = QuantModel(tiny_codec("minnen2018"), QuantConfig(rounding="learned_offset"))
    crops = images(2)
    qmodel.observe([crops], [flat(crops)])
    compensate_rounding(qmodel, [crops], [flat(crops)], progress=False)
    qmodel.freeze()
    node = qmodel.nodes["context_prediction"]
    mask = node.weight_quantizer.mask.expand(node.weight_int.shape)
    assert not bool(node.weight_int[mask == 0].any())


def test_a_layer_that_photographs_show_nothing_keeps_its_flat_areas_too():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(5, 40, generator=generator) * 50
    inputs = torch.randint(0, 256, (40, 3), generator=generator).float().repeat(1, 20)
    outputs = weight.double() @ inputs.double() + 100
    ours, _ = towards(weight, torch.zeros(40, 40), Area(inputs, outputs))
    assert torch.allclose(ours.double() @ inputs.double(), outputs, rtol=1e-4, atol=1.0)
