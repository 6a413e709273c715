"""What RDO-PTQ's preset needs: whole images for ranges, room by bits, rounds of Algorithm 1."""

import numpy as np
import pytest
import torch
from PIL import Image

from licq.data.calibration import sample_crops, whole_images
from licq.quant.mac import QuantMAC
from licq.quant.model import QuantModel
from licq.quant.quantizer import room
from licq.reconstruction import unit_pass
from licq.reconstruction.api import quantize
from licq.reconstruction.config import PtqConfig
from licq.reconstruction.crops import given_images
from licq.support.errors import InputError
from tests.reconstruction.test_driver import codec, images, method
from tests.tiny_codecs import tiny_codec

DRAWN = {
    "num_images": 1,
    "crop": 64,
    "crops_per_image": 1,
    "crop_reductions": (1,),
    "lmbda": 0.01,
    "progress": False,
}


@pytest.fixture
def photo(tmp_path):
    """A dark picture, of which one corner is bright."""
    pixels = np.full((192, 192, 3), 40, np.uint8)
    pixels[:, :, 0] += np.arange(192, dtype=np.uint8) // 4
    pixels[170:, 170:] = 255
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_ranges_hold_what_crops_do_not_show(photo):
    model = tiny_codec("balle2018")
    config = PtqConfig.from_preset("nearest", flat=False)
    alone = quantize(model, [photo], config, **DRAWN)
    whole = whole_images([photo], 1)
    assert config.reconstruction.whole
    without = quantize(model, [photo], PtqConfig.from_preset("nearest", flat=False, whole=False), **DRAWN)
    with torch.no_grad():
        reached = model.g_a[0](whole[0][None].float() / 255)  # behind the first layer, before its GDN
        inputs = model.g_a[1](reached).abs().amax()
    limit, shorter = (
        float((node.input_grid.scale * node.input_grid.qmax).max())
        for node in (alone.nodes["g_a.2"], without.nodes["g_a.2"])
    )
    assert limit >= 0.99 * float(inputs) > shorter


def test_crops_with_their_images_are_quantized_as_the_files_are(photo):
    model, config = tiny_codec("balle2018"), PtqConfig.from_preset("nearest")
    files = quantize(model, iter([photo]), config, **DRAWN)
    crops = sample_crops([photo], 1, 64)
    given = quantize(model, crops, config, whole=whole_images([photo], 1), lmbda=0.01, progress=False)
    a, b = files.state_dict(), given.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_more_bits_have_more_room():
    assert [room(bits) for bits in (4, 8, 12, 16)] == [1, 1, 2, 4]
    tops = []
    for bits in (8, 16):
        qmodel = QuantModel(codec("balle2018"), method(quant={"a_bits": bits}).quant)
        qmodel.observe([images(1)])
        node = qmodel.nodes["g_a.2"]
        assert isinstance(node, QuantMAC)
        tops.append(float(node.input_grid.high.max()))
    assert tops[1] == pytest.approx(4 * tops[0])


@pytest.mark.parametrize(
    "scores, rounds, kept",
    [
        ([8.0, 4.0, 2.0, 1.999, 0.0], 3, True),  # less than a hundredth: the end
        ([8.0, 9.0, 1.0], 1, False),
        ([0.0, 0.0, 0.0], 1, True),
    ],
)
def test_rounds_end_where_the_loss_has_converged(monkeypatch, scores, rounds, kept):
    left = iter(scores)
    monkeypatch.setattr(unit_pass.UnitPass, "_score", lambda *_: next(left))
    monkeypatch.setattr(unit_pass.UnitPass, "learn", lambda *_: None)
    monkeypatch.setattr(unit_pass.Engine, "measure", lambda *_: (1.0, 1.0))
    knobs = {"unit": "network", "iters": 1, "joint_iters": 0, "split": 0.0, "flat": False, "measured": 1}
    qmodel = quantize(codec("balle2018"), images(1), method(rounds=4, **knobs), lmbda=0.01, progress=False)
    (unit,) = qmodel.history["units"]
    assert (unit["rounds"], unit["kept"]) == (rounds, kept)


def test_rounds_are_counted_from_one():
    with pytest.raises(InputError, match="rounds"):
        method(rounds=0)


def test_a_learned_range_of_inputs_may_widen():
    """Ranges of a third of the values clip most of them: learning opens them again."""
    config = method(
        quant={"a_headroom": 0.3, "a_scales": "simulated"},
        learn=("range_a",), unit="network", loss="rd_direct", iters=20, tail_share=1.0, joint_iters=0,
        lr_range=0.05, split=0.0, flat=False,
    )  # fmt: skip
    qmodel = quantize(tiny_codec("balle2018"), images(1), config, lmbda=0.01, progress=False)
    learned = torch.cat(
        [n.input_grid.log_n.flatten() for n in qmodel.nodes.values() if isinstance(n, QuantMAC)]
    )
    assert float(learned.max()) > 0.2


@pytest.mark.parametrize(
    "image", [torch.rand(3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.uint8), torch.zeros(3, 3), "a.png"]
)
def test_whole_images_that_are_none_are_refused(image):
    with pytest.raises(InputError, match="whole"):
        given_images([image])
