"""Curvatures of code lengths and what rounding lets pass, against the noise itself."""

import pytest
import torch
from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from torch import Tensor

from licq.quant.boundaries import QuantEntropyBottleneck, QuantGaussianConditional
from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.reconstruction.information import _terms, passed_by_rounding, watching
from tests.tiny_codecs import images, tiny_codec

COUNT = 200_000
NOISE = 0.08


def normal(seed: int, sigma: float = 1.0) -> Tensor:
    return sigma * torch.randn(1, 1, 1, COUNT, generator=torch.Generator().manual_seed(seed))


def gaussian() -> QuantGaussianConditional:
    return QuantGaussianConditional(GaussianConditional(None).eval(), QuantConfig())


def lengths(node: QuantGaussianConditional, y: Tensor, scales: Tensor, means: Tensor) -> Tensor:
    return -torch.log(node._likelihood_of(torch.round(y - means), scales)).double()


@pytest.mark.parametrize("sigma", [0.7, 1.0, 4.0])
@pytest.mark.parametrize("spread", [1.0, 1.4])
def test_noise_in_a_latent_a_mean_or_a_scale_raises_its_code_length(sigma: float, spread: float):
    """`spread`: by how much more the latents vary than the entropy model says."""
    node, means = gaussian(), 0.3 * normal(1)
    y, scales = means + normal(2, sigma * spread), torch.full((1, 1, 1, COUNT), sigma)
    (_, of_location), (_, of_scale) = _terms(node, [y, scales, means], means)
    plain, noise = lengths(node, y, scales, means), normal(3, NOISE * sigma)
    for of, curvature in ((0, of_location), (1, of_scale), (2, of_location)):
        moved = 0.0
        for sign in (1, -1):  # both, so that only the second derivative is left
            parts = [y, scales, means]
            parts[of] = parts[of] + sign * noise
            moved = moved + lengths(node, *parts) / 2
        rise = float((moved - plain).mean())
        predicted = 0.5 * float(curvature.double().mean()) * (NOISE * sigma) ** 2
        assert 0.75 * rise < predicted < 1.5 * rise


def test_improbable_symbols_count_as_what_they_cost():
    """All symbols are 3 standard deviations out: their squared gradients would be 9 times the curvature."""
    node = gaussian()
    y = 12.0 + torch.rand(1, 1, 1, COUNT, generator=torch.Generator().manual_seed(0)) - 0.5
    (_, of_location), _ = _terms(node, [y, torch.full_like(y, 4.0)], None)
    torch.testing.assert_close(of_location.mean(), torch.tensor(1 / 16), rtol=0.05, atol=0)


def test_a_scale_below_the_bound_has_no_curvature():
    scales = torch.tensor([0.05, 0.11, 0.5]).reshape(1, 1, 1, 3)
    y = torch.tensor([1.0, 1.0, 1.0]).reshape(1, 1, 1, 3)
    _, (_, of_scale) = _terms(gaussian(), [y, scales], None)
    assert of_scale.flatten()[:2].tolist() == [0, 0] and of_scale.flatten()[2] > 0


def test_noise_in_z_raises_the_code_length_of_its_density():
    torch.manual_seed(0)
    bottleneck = EntropyBottleneck(2, init_scale=4).eval()
    node = QuantEntropyBottleneck(bottleneck, QuantConfig())
    z = torch.cat([normal(4, 1.5), normal(5, 1.5)], 1)

    def cost(z: Tensor) -> float:
        return float(-torch.log(node.real(z)[1].detach()).double().mean())

    [(_, curvature)] = _terms(node, [z], node._medians_for(z))
    noise = torch.cat([normal(6, 0.3), normal(7, 0.3)], 1)
    predicted = 0.5 * float(curvature.mean()) * 0.3**2
    assert (cost(z + noise) + cost(z - noise)) / 2 - cost(z) == pytest.approx(predicted, rel=0.25)


@pytest.mark.parametrize("sigma", [0.05, 0.3, 3.0])
def test_rounding_lets_pass_what_changes_its_error(sigma: float):
    means, y = 0.3 * normal(1), normal(2, sigma)
    y, means = (y + means).requires_grad_(), means.requires_grad_()
    residual = (y - means).detach()
    passed = passed_by_rounding(y, means, torch.round(residual) + means.detach())
    signs = torch.sign(normal(9))
    by_y, by_means = torch.autograd.grad((signs * passed).sum(), [y, means])

    def error(shift_y: Tensor | float, shift_means: Tensor | float) -> Tensor:
        moved = means.detach() + shift_means
        return (torch.round(y.detach() + shift_y - moved) + moved - y.detach()).double().square().mean()

    variance = 0.04**2
    for gradient, shifts in ((by_y, (normal(3, 0.04), 0.0)), (by_means, (0.0, normal(3, 0.04)))):
        rise = float(error(*shifts) - error(0.0, 0.0))
        assert float(gradient.square().mean()) * variance == pytest.approx(rise, abs=0.2 * variance)


@pytest.mark.parametrize("name", ["balle2018", "minnen2018", "cheng2020", "qvrf-minnen2018", "balle2018-vbr"])
def test_a_watched_codec_gives_the_same_numbers(name: str):
    data = images(1)
    if name.endswith("-vbr") or name.startswith("qvrf"):
        planes = torch.ones(len(data), 2, *data.shape[2:])
        data = torch.cat([data, planes], 1)
    qmodel = QuantModel(tiny_codec(name).eval(), QuantConfig())
    qmodel.observe([data])
    qmodel.quantize_nodes(False)
    with torch.no_grad():
        plain = qmodel(data)
        with watching(qmodel) as found:
            watched = qmodel(data)
    assert torch.equal(plain["x_hat"], watched["x_hat"])
    for key, likelihood in plain["likelihoods"].items():
        assert torch.equal(likelihood, watched["likelihoods"][key])
    assert all(bool((c >= 0).all()) and bool(torch.isfinite(c).all()) for _, c in found.terms)
