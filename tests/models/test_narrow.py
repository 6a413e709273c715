"""Narrowing a codec: exact where nothing that matters is lost, and close where channels can be predicted from
others."""

import copy

import pytest
import torch
from compressai.models import JointAutoregressiveHierarchicalPriors, ScaleHyperprior

from licq.models.narrow import choose_channels, narrow
from licq.models.train_reference import start_from
from licq.support.errors import InputError
from tests.formula import fill_by_formula, image_by_formula

N, M = 6, 8


def wide_codec():
    torch.manual_seed(0)
    return fill_by_formula(JointAutoregressiveHierarchicalPriors(N, M)).eval()


def outcome(model):
    with torch.no_grad():
        out = model.eval()(image_by_formula(64, 64))
    return [out["x_hat"], *out["likelihoods"].values()]


def test_channels_that_others_predict_go_first():
    base = torch.randn(500, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    samples = torch.cat(
        (base, base @ torch.tensor([[1.0, 2.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)), 1
    )
    channels = choose_channels(samples.T.cov(), torch.ones(5, dtype=torch.float64), 3)
    assert torch.linalg.matrix_rank(samples[:, channels]) == 3
    assert choose_channels(
        torch.diag(torch.tensor([4.0, 1, 9], dtype=torch.float64)), torch.ones(3, dtype=torch.float64), 2
    ) == [0, 2]
    assert choose_channels(
        torch.eye(3, dtype=torch.float64), torch.tensor([1.0, 9, 4], dtype=torch.float64), 2
    ) == [1, 2]


def test_equal_widths_change_nothing():
    wide = wide_codec()
    target = JointAutoregressiveHierarchicalPriors(N, M)
    narrow(wide, target, [image_by_formula(64, 64)])
    for ours, expected in zip(outcome(target), outcome(wide), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def _without(wide, layer, following, gone):
    """`wide` whose channel `gone` of `layer` nobody reads."""
    dead = copy.deepcopy(wide)
    with torch.no_grad():
        conv = dead.get_submodule(following)
        (conv.weight[gone] if isinstance(conv, torch.nn.ConvTranspose2d) else conv.weight[:, gone]).zero_()
    return dead


@pytest.mark.parametrize(
    ("layer", "following"),
    [("h_a.0", "h_a.2"), ("h_s.0", "h_s.2"), ("entropy_parameters.0", "entropy_parameters.2")],
)
def test_channels_without_readers_cost_nothing(layer, following):
    wide = _without(wide_codec(), layer, following, 2)
    narrower = copy.deepcopy(wide)
    prefix, index = layer.split(".")
    channels = [i for i in range(getattr(wide, prefix)[int(index)].out_channels) if i != 2]
    chain = getattr(narrower, prefix)
    first, second = chain[int(index)], chain[int(index) + 2]
    for conv, outputs in ((first, True), (second, False)):
        transposed = isinstance(conv, torch.nn.ConvTranspose2d)
        select = (lambda w: w[:, channels]) if outputs == transposed else (lambda w: w[channels])
        conv.weight = torch.nn.Parameter(select(conv.weight.detach()))
    first.bias = torch.nn.Parameter(first.bias.detach()[channels])
    first.out_channels = second.in_channels = len(channels)
    target = copy.deepcopy(narrower)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.add_(0.1)
    narrow(wide, target, [image_by_formula(64, 64)])
    for ours, expected in zip(outcome(target), outcome(wide), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def test_a_hyperprior_starts_from_a_wider_context_model(capsys):
    target = ScaleHyperprior(N - 2, M - 2)
    start_from(target, wide_codec(), [image_by_formula(64, 64)])
    said = capsys.readouterr().out
    assert "h_s.4" in said and "g_a" not in said and "h_a" not in said
    assert all(torch.isfinite(part).all() for part in outcome(target))


def test_equal_layers_are_taken_over_and_the_rest_is_named(capsys):
    wide, target = wide_codec(), ScaleHyperprior(N, M)
    target.extra = torch.nn.Conv2d(1, 1, 1)
    wide_parts = copy.deepcopy(wide)
    del wide_parts.h_s
    start_from(target, wide_parts, [])
    assert torch.equal(target.g_a[0].weight, wide.g_a[0].weight)
    assert "extra" in capsys.readouterr().out
    with pytest.raises(InputError, match="in common"):
        start_from(target, torch.nn.Conv2d(1, 1, 1), [])
