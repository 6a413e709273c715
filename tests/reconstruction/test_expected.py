"""What is expected of a calibration, loop by loop, against the loops that come."""

import io

import pytest
import torch

from licq.reconstruction.api import quantize
from licq.reconstruction.config import PtqConfig
from licq.reconstruction.expected import expected_bit_search, expected_loops
from licq.reconstruction.state import StateFolder
from licq.support.work import Item, working
from tests.tiny_codecs import images, tiny_codec

SHORT = {"joint_iters": 1, "stress": False}


@pytest.mark.parametrize(
    "knobs",
    [
        SHORT,
        SHORT | {"loss": "mse", "iters": 2, "unit": "stage"},
        SHORT | {"range_search": "powell", "search_evals": 3, "balance": 0.0, "round_init": "nearest"},
    ],
    ids=["licq", "units", "powell"],
)
def test_every_loop_that_is_expected_comes(knobs):
    model, config = tiny_codec("balle2018"), PtqConfig.from_preset(**knobs)
    loops = expected_loops(config, 2, 64, model)
    assert all(cost > 0 for _, cost in loops)
    with working("test", [Item("", *loop) for loop in loops], stream=io.StringIO()) as work:
        quantize(model, images(2), config, lmbda=0.01)
    # a loop that did not come would have lost its cost
    assert [(item.kind, item.share) for item in work.items] == [(kind, 1.0) for kind, _ in loops]
    assert [(item.kind, item.cost) for item in work.items] == loops


def test_what_a_folder_has_is_not_expected_again(tmp_path):
    config = PtqConfig.from_preset(iters=2, unit="layer")
    whole = dict(expected_loops(config, 80, 256, 10))
    state = StateFolder(tmp_path, "identity", False)
    for name in ("start", "000", "001"):
        state.save(name, {"seconds": 1.0}, {"x": torch.zeros(1)})
    rest = dict(expected_loops(config, 80, 256, 10, tmp_path))
    assert whole.keys() - rest.keys() == {"compensating rounding"}
    assert rest["units"] == pytest.approx(0.8 * whole["units"]) and rest["joint pass"] == whole["joint pass"]
    state.save("joint", {"done": True, "fact": {}}, {"x": torch.zeros(1)})
    assert "joint pass" not in dict(expected_loops(config, 80, 256, 10, tmp_path))


def test_costs_grow_with_crops_their_sides_and_layers():
    config = PtqConfig.from_preset()
    total = {
        case: sum(cost for _, cost in expected_loops(config, *case, 10))
        for case in ((40, 256), (80, 256), (40, 512))
    }
    assert total[40, 256] < total[80, 256] < total[40, 512] < 4 * total[40, 256]
    assert expected_bit_search(config, 40, 256, 10, 5) < expected_bit_search(config, 40, 256, 20, 5)
