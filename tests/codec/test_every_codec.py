"""Every architecture goes the whole way: observed, split, balanced, rounded, learned, frozen, at few bits."""

import pytest
import torch

from licq.models.registry import list_models
from licq.reconstruction.api import quantize
from licq.reconstruction.config import PtqConfig
from tests.tiny_codecs import SIZES, images, tiny_codec

QUICK = ("balle2018", "qvrf-balle2018")


def test_every_architecture_has_a_tiny_codec():
    assert set(SIZES) >= {
        "balle2018",
        "minnen2018",
        "minnen2018-mean",
        "cheng2019",
        "cheng2020",
        "cheng2020-anchor",
        "lu2022",
        "tic",
        "chen2021",
    }
    assert {name for name in list_models() if name.startswith("qvrf-") or name.endswith("-vbr")} <= set(SIZES)


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SIZES]
)
def test_quantized_codec_is_finite_and_integer(name, bits):
    model, x = tiny_codec(name), images(4)
    crops = x
    if hasattr(model, "with_planes"):
        with torch.no_grad():
            crops = model.with_planes(x, torch.tensor([1, 8, 3, 6]), torch.full((4,), 0.01))
    config = PtqConfig.from_preset("licq", w_bits=bits, a_bits=bits, joint_iters=2, measured=2, observed=4)
    codec = quantize(model, crops, config, lmbda=0.01, progress=False)
    with torch.no_grad():
        out = codec(x[:1])
    assert torch.isfinite(out["x_hat"]).all() and all(
        torch.isfinite(p).all() and p.min() > 0 for p in out["likelihoods"].values()
    )
    coverage = codec.coverage()
    assert not coverage["kept_in_float"] and not coverage["beyond_int32"]
    assert all("constant of each rate" in reason for reason in coverage["left_alone"].values())
