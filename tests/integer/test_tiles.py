"""Images in tiles: the same files and the same pixels as in one piece; and how far a network's results
reach."""

import numpy as np
import pytest
import torch

from licq.codec.api import Codec
from licq.codec.plan import Plan
from licq.codec.sizes import Sizes, analysis_part
from licq.integer.lowering import lower
from licq.integer.passes import without_duplicates
from licq.integer.program import Program
from licq.integer.reach import BATCH, reach
from licq.integer.reference import run
from licq.integer.tiles import Span, Tiled, cuts
from licq.quant import operations as ops
from licq.quant.operations import Range
from tests.codec.test_files import DIGEST, pixels
from tests.frozen_codecs import frozen
from tests.tiny_codecs import SIZES

QUICK = ("balle2018", "minnen2018", "qvrf-minnen2018")
WHOLE = "chen2021"  # attends to the whole image


def analysis(name: str, side: int, batch: int = 1):
    return analysis_part(without_duplicates(lower(frozen(name), side, side, batch)))


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SIZES]
)
def test_tiles_give_the_files_and_pixels_of_the_whole_image(name):
    image = pixels(470, 520) if name in QUICK else pixels(640, 700)
    whole, tiled = (
        Codec(frozen(name), DIGEST, threads=1, tile=None),
        Codec(frozen(name), DIGEST, threads=1, tile=64),
    )
    data = whole.encode(image)
    assert tiled.encode(image) == data
    assert torch.equal(tiled.decode(data), whole.decode(data))
    plan = next(iter(tiled._plans.values()))
    assert isinstance(plan.synthesis[0], Tiled) == (name != WHOLE)
    if name != WHOLE:
        assert len(plan.synthesis[0].rows) > 1 and len(plan.synthesis[0].columns) > 1


def test_reach_of_strided_convolutions_is_the_closed_form():
    """Four convolutions of 5x5 and stride 2: two pixels of each resolution on both sides of a position of 16
    pixels."""
    found = reach(analysis("balle2018", 256, BATCH), 256, 256, 64)
    far = 2 * (1 + 2 + 4 + 8)
    assert found.rows == found.columns == Span(far, far - 15, 64)


@pytest.mark.parametrize(
    "name",
    [
        "balle2018",
        pytest.param("cheng2019", marks=pytest.mark.slow),
        pytest.param("tic", marks=pytest.mark.slow),
        pytest.param("lu2022", marks=pytest.mark.slow),
    ],
)
def test_nothing_beyond_the_reach_matters_and_something_at_it_does(name):
    """Brute force: other pixels beyond the reach of a row of the latent leave it as it is; some within it do
    not."""
    side = 512
    program = analysis(name, side)
    far = reach(analysis(name, side, BATCH), side, side, 64).rows
    image = pixels(side, side)[None]
    latent = run(program, {"pixels": image})["latent"]
    for row in (0, 5, 16, 31):
        outside = np.r_[0 : max(0, 16 * row - far.before), min(side, 16 * row + 16 + far.after) : side]
        changed = image.clone()
        changed[:, :, outside] = pixels(side, side, seed=9)[None][:, :, outside]
        assert torch.equal(run(program, {"pixels": changed})["latent"][:, :, row], latent[:, :, row])
    changed = image.clone()
    changed[:, :, 16 * 16 - far.before : 16 * 16 + 16 + far.after] = (
        255 - changed[:, :, 16 * 16 - far.before : 16 * 16 + 16 + far.after]
    )
    assert not torch.equal(run(program, {"pixels": changed})["latent"][:, :, 16], latent[:, :, 16])


def test_an_image_that_is_too_small_to_tell_gives_no_reach():
    assert reach(analysis("balle2018", 64, BATCH), 64, 64, 64) is None


@pytest.mark.parametrize("total", [64, 512, 1600, 4096])
@pytest.mark.parametrize("span", [Span(30, 15, 64), Span(154, 139, 128), Span(0, 0, 64), Span(200, 10, 256)])
def test_what_tiles_keep_covers_an_axis_once_and_lies_inside_what_is_right(total, span):
    for tile in (64, 500, 2048):
        found = cuts(total, tile, span, 64)
        kept = np.concatenate([np.arange(cut.first, cut.last) for cut in found])
        assert np.array_equal(kept, np.arange(total))
        for cut in found:
            assert cut.start % span.period == 0 and 0 <= cut.start < cut.end <= total
            assert cut.start == 0 or cut.first - span.before >= cut.start
            assert cut.end == total or cut.last + span.after <= cut.end


def test_tiles_are_used_from_a_size_on():
    model = frozen("balle2018")
    sizes = Sizes(lambda height, width, batch: lower(model, height, width, batch), tile=256)
    assert not isinstance(Plan(lower(model, 256, 256), sizes, 1).synthesis[0], Tiled)
    assert isinstance(Plan(lower(model, 256, 320), sizes, 1).synthesis[0], Tiled)


@pytest.mark.parametrize(("kernel", "before", "after"), [(3, 1, 1), (4, 1, 2)])
def test_reach_of_a_convolution_padded_to_the_same_size(kernel, before, after):
    program = Program()
    numbers = program.input("pixels", (BATCH, 3, 64, 64), Range(0, 255))
    weight = torch.ones(2, 3, kernel, kernel, dtype=torch.int8)
    options = {"stride": (1, 1), "padding": "same", "dilation": (1, 1), "groups": 1}
    conv = ops.Conv2d((numbers,), weight=weight, bias=None, bound=255 * 3 * kernel**2, **options)
    program.outputs["out"] = program.add(conv, (BATCH, 2, 64, 64), Range(0, conv.bound))
    found = reach(program, 64, 64, 1)
    assert found.rows == found.columns == Span(before, after, 1)
    image = torch.zeros(BATCH, 3, 64, 64, dtype=torch.uint8)
    image[:, :, 30, 30] = 1  # read by the results that lie `after` before it to `before` after it
    rows = run(program, {"pixels": image})["out"][0, 0].sum(1).nonzero().flatten()
    assert rows.tolist() == list(range(30 - after, 30 + before + 1))
