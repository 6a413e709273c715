"""The likelihood of codecs whose y_hat is round(y), against the normal distribution of SciPy."""

import numpy as np
import pytest
import torch
from compressai.entropy_models import GaussianConditional
from scipy.stats import norm

from licq.models.layers import WholeGaussianConditional
from licq.models.registry import create_model
from tests.formula import fill_by_formula, image_by_formula


def latents():
    draw = torch.Generator().manual_seed(0)
    y, means = (5 * torch.randn((2, 3, 4, 5), generator=draw) for _ in range(2))
    return y, torch.rand((2, 3, 4, 5), generator=draw) * 4 + 0.2, means


def test_likelihood_is_that_of_the_decodable_symbol():
    y, scales, means = latents()
    y_hat, likelihood = WholeGaussianConditional(None).eval()(y, scales, means)
    assert torch.equal(y_hat, y.round())
    whole, center, spread = (part.double().numpy() for part in (y.round(), means, scales))
    expected = norm.cdf((whole - center + 0.5) / spread) - norm.cdf((whole - center - 0.5) / spread)
    np.testing.assert_allclose(likelihood.numpy(), np.maximum(expected, 1e-9), rtol=1e-3, atol=1e-7)


def test_training_and_the_published_estimate_are_compressais():
    y, scales, means = latents()
    ours, theirs = WholeGaussianConditional(None), GaussianConditional(None)
    for training in (True, False):
        ours.of_residual = not training
        results = []
        for module in (ours, theirs):
            torch.manual_seed(1)
            results.append(module.train(training)(y, scales, means))
        assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize(
    "name",
    ["minnen2018", "cheng2020", "cheng2020-anchor", "cheng2019", "tic", "qvrf-minnen2018", "qvrf-cheng2020"],
)
def test_autoregressive_codecs_estimate_what_they_decode(name):
    """Bits of the estimate are those of the integers that g_s gets, under means and scales that the
    context model makes of them."""
    small = {"N": 8} if "cheng" in name else {"N": 8, "M": 8}
    tic = {"depths": (1, 1, 1, 1, 1), "num_heads": (2, 2, 2, 2, 2), "causal_heads": 2}
    model = fill_by_formula(create_model(name, **small, **(tic if name == "tic" else {})))
    seen = {}
    model.gaussian_conditional.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(args=args, **kwargs), with_kwargs=True
    )
    with torch.no_grad():
        out = model(image_by_formula(64, 64))
    y, scales = seen["args"]
    whole, center, spread = (
        part.double().numpy() for part in (y.round(), seen["means"], scales.clamp(min=0.11))
    )
    expected = norm.cdf((whole - center + 0.5) / spread) - norm.cdf((whole - center - 0.5) / spread)
    np.testing.assert_allclose(
        out["likelihoods"]["y"].numpy(), np.maximum(expected, 1e-9), rtol=1e-2, atol=1e-6
    )
