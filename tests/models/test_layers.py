"""The likelihood of codecs whose y_hat is round(y), against the normal distribution of SciPy."""

import numpy as np
import pytest
import torch
from compressai.entropy_models import GaussianConditional
from scipy.stats import norm

from licq.models.layers import TabulatedBottleneck, WholeGaussianConditional
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


# ------------------------------------------------------------------------------- the tables of another coder

ROW = [0, 3, 1000, 40000, 65000, 65528, 65536]  # of -2 .. 2, and 8 for all others


def tabulated() -> TabulatedBottleneck:
    """Two channels with medians 0.3 and -1.7; the second channel's row is shorter."""
    bottleneck = TabulatedBottleneck(2).eval()
    short = [0, 65000, 65534, 65536, 0, 0, 0]
    bottleneck.load_state_dict(
        {
            **bottleneck.state_dict(),
            "_quantized_cdf": torch.tensor([ROW, short]),
            "_cdf_length": torch.tensor([7, 4]),
            "_offset": torch.tensor([-2, 1]),
            "medians": torch.tensor([0.3, -1.7]),
        }
    )
    return bottleneck


def test_tabulated_likelihood_is_the_frequency_of_the_bin():
    z = torch.tensor([[-2.4, 0.9, 2.3], [0.2, -0.71, 0.0]]).reshape(1, 2, 1, 3)
    z_hat, likelihood = tabulated()(z)
    torch.testing.assert_close(z_hat[0, 0, 0], torch.tensor([-2.7, 1.3, 2.3]))
    torch.testing.assert_close(z_hat[0, 1, 0], torch.tensor([0.3, -0.7, 0.3]))
    expected = torch.tensor([[4, 25000, 528], [534, 65000, 534]]) / 65536
    expected[0, 0] = 8 / 65536 / 4  # -3 is the first integer on one side of the row
    torch.testing.assert_close(likelihood[0, :, 0], expected, rtol=1e-5, atol=0)


def test_tabulated_probabilities_of_all_integers_add_up_to_one():
    for bottleneck in (tabulated(), TabulatedBottleneck(2)):
        z_hat = torch.arange(-60.0, 61).repeat(1, 2, 1) + bottleneck.medians[:, None]
        bottleneck.use_likelihood_bound = False
        torch.testing.assert_close(bottleneck.likelihood(z_hat).sum(-1), torch.ones(1, 2), rtol=1e-5, atol=0)


def test_tabulated_rate_has_the_gradient_of_its_neighbours():
    bottleneck = tabulated()
    z_hat = (torch.arange(-9.0, 8).repeat(1, 2, 1) + bottleneck.medians[:, None]).requires_grad_()
    bits = -bottleneck.likelihood(z_hat).log2()
    (gradient,) = torch.autograd.grad(bits.sum(), z_hat)
    torch.testing.assert_close(gradient[..., 1:-1], (bits[..., 2:] - bits[..., :-2]).detach() / 2)
    assert (gradient[..., 0] < 0).all() and (gradient[..., -1] > 0).all()  # outside it leads back


def test_tabulated_training_adds_noise():
    z = torch.zeros(1, 2, 50)
    z_hat, likelihood = tabulated().train()(z)
    assert z_hat.unique().numel() > 50 and float(z_hat.abs().max()) <= 0.5 and bool((likelihood > 0).all())


@pytest.mark.parametrize("row", [[0, 9, 9, 65536], [0, 65535], [1, 5, 65536]])
def test_tabulated_refuses_rows_that_are_no_distribution(row):
    state = {**tabulated().state_dict(), "_quantized_cdf": torch.tensor([row, row])}
    state["_cdf_length"] = torch.tensor([len(row), len(row)])
    with pytest.raises(RuntimeError, match="do not rise|other sizes"):
        TabulatedBottleneck(2).load_state_dict(state)
