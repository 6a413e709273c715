"""Ranges of stored tensors shrink where photographs gain and harder pictures do not lose."""

import torch

from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.reconstruction.objective import Objective
from licq.reconstruction.state import StateFolder
from licq.reconstruction.tighten import tighten_ranges
from tests.reconstruction.test_stored_tensors import _Skip

_OBJECTIVE = Objective(0.01)
_SOFT, _HARD = (
    torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 0.3,
    torch.ones(1, 3, 64, 64),
)


def _tightened(harder: torch.Tensor, folder=None) -> tuple[QuantModel, dict]:
    qmodel = QuantModel(_Skip().eval(), QuantConfig(strict_int8=True))
    qmodel.observe([_SOFT], [_HARD])
    state = StateFolder(folder, "", folder is not None)
    return qmodel, tighten_ranges(qmodel, [_SOFT], [harder], _OBJECTIVE, {}, state, progress=False)


def test_a_range_that_no_picture_needs_shrinks():
    _, found = _tightened(_SOFT)
    assert found["ranges"]["second input"] <= 0.8 and found["j_after"] < found["j_before"]
    _, held = _tightened(_HARD)
    assert held["ranges"] == {}  # white would be clipped


def test_a_repeated_calibration_takes_what_was_found(tmp_path):
    first, found = _tightened(_SOFT, tmp_path)
    again, same = _tightened(_HARD, tmp_path)  # nothing is tried again
    assert same == found
    for a, b in zip(first.state_dict().items(), again.state_dict().items()):
        assert a[0] == b[0] and torch.allclose(a[1], b[1])


def test_wide_activations_keep_their_room():
    for a_bits in (8, 16, 32):
        qmodel = QuantModel(_Skip().eval(), QuantConfig(a_bits=a_bits))
        qmodel.observe([_SOFT], [_HARD])
        state = StateFolder(None, "", False)
        found = tighten_ranges(qmodel, [_SOFT], [_SOFT], _OBJECTIVE, {}, state, progress=False)
        assert all(name.endswith(" input") for name in found["ranges"])
        assert float(qmodel.functions["add0"].grid.log_n) == 0
