"""CompressAI's variable-rate codecs: ours against its own forward at every level, on equal weights."""

import copy
import functools
from decimal import Decimal, localcontext

import compressai.zoo.image_vbr as zoo
import pytest
import torch
from compressai.models import (
    JointAutoregressiveHierarchicalPriorsVbr,
    MeanScaleHyperpriorVbr,
    ScaleHyperpriorVbr,
)
from scipy.stats import truncnorm

from licq.models.checkpoints import identify, load_checkpoint, save_checkpoint
from licq.models.registry import create_model, get_architecture
from licq.models.vbr import OffsetNet, WholeOffsetNet, in_order
from tests.formula import fill_by_formula, image_by_formula

N, M = 6, 8
CLASSES = {"balle2018-vbr": ScaleHyperpriorVbr, "minnen2018-mean-vbr": MeanScaleHyperpriorVbr}


def filled(model):
    """By formula, but for gains; the symbols of y are spread, so that offsets matter."""
    gains = model.Gain.detach().clone()
    fill_by_formula(model).Gain.data = gains
    with torch.no_grad():
        model.g_a[6].weight.mul_(12)
        for parameter in model.QuantABCD.parameters():
            parameter.mul_(0.4)
    return model


@pytest.mark.parametrize("step_of_z", [False, True])
@pytest.mark.parametrize("name", CLASSES)
def test_outputs_equal_compressais_at_every_level(name, step_of_z, monkeypatch):
    theirs = filled(CLASSES[name](N, M, vr_entbttlnck=step_of_z))
    ours = create_model(name, N=N, M=M, vr_entbttlnck=step_of_z).eval()
    assert ours.Gain.tolist() == pytest.approx(CLASSES[name](N, M).Gain.tolist(), abs=1e-4)
    ours.load_state_dict(theirs.state_dict())
    if step_of_z:  # its forward hands the step over in the place of stop_gradient; the coder does not
        right = theirs.entropy_bottleneck._likelihood_variable
        monkeypatch.setattr(
            theirs.entropy_bottleneck, "_likelihood_variable", lambda inputs, qs: right(inputs, qs=qs)
        )
    x = image_by_formula(64, 128)
    moved = 0.0
    for level in range(1, 9):
        ours.set_level(level)
        with torch.no_grad():
            out, expected = ours(x), theirs(x, stage=2, s=level - 1)
            y_hat = ours.QuantABCD(*_latents(ours, x))
        torch.testing.assert_close(out["x_hat"], expected["x_hat"], rtol=1e-4, atol=1e-5)
        for key in "yz":
            torch.testing.assert_close(
                out["likelihoods"][key], expected["likelihoods"][key], rtol=1e-4, atol=1e-6
            )
        moved = max(moved, float((y_hat * ours.rate - (y_hat * ours.rate).round()).abs().max()))
    assert moved > 0.01  # the offsets are at work


def _latents(model, x):
    y = model.g_a(x)
    z_hat, _ = model._code_z(model.h_a(y.abs() if "Balle" in type(model).__name__ else y), model.rate)
    scales, *means = model.h_s(z_hat).chunk(2, 1) if "Mean" in type(model).__name__ else (model.h_s(z_hat),)
    return y, scales, means[0] if means else None, model.rate


def test_without_context_the_autoregressive_codec_equals_compressais():
    """With a context model its forward is serial, and the context is the y_hat it has just made; without
    means its symbols are integers, as ours."""
    theirs = filled(JointAutoregressiveHierarchicalPriorsVbr(N, M))
    theirs.context_prediction.weight.data.zero_()
    last = theirs.entropy_parameters[-1]
    last.weight.data[len(last.weight) // 2 :], last.bias.data[len(last.bias) // 2 :] = 0, 0
    ours = create_model("minnen2018-vbr", N=N, M=M).eval()
    ours.load_state_dict(theirs.state_dict())
    x = image_by_formula(64, 128)
    for level in (1, 4, 8):
        ours.set_level(level)
        with torch.no_grad():
            out, expected = ours(x), theirs(x, stage=2, s=level - 1)
        torch.testing.assert_close(out["x_hat"], expected["x_hat"], rtol=1e-4, atol=1e-5)
        for key in "yz":
            torch.testing.assert_close(
                out["likelihoods"][key], expected["likelihoods"][key], rtol=1e-4, atol=1e-6
            )


def test_context_of_the_autoregressive_codec_is_the_rounded_latent():
    model = filled(create_model("minnen2018-vbr", N=N, M=M))
    model.set_level(5)
    x = image_by_formula(64, 64)
    seen = []
    model.context_prediction.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(x)
        y = model.g_a(x)
    torch.testing.assert_close(seen[0], (y * model.rate).round() / model.rate)


@pytest.mark.parametrize("name", [*CLASSES, "minnen2018-vbr"])
def test_official_files_load(name, tmp_path):
    """As CompressAI's class writes them, in a file as its zoo's: names of the bottleneck included."""
    kinds = {**CLASSES, "minnen2018-vbr": JointAutoregressiveHierarchicalPriorsVbr}
    theirs = filled(kinds[name](N, M) if name == "minnen2018-vbr" else kinds[name](N, M, vr_entbttlnck=True))
    path = tmp_path / "model-12345678.pth.tar"
    torch.save(theirs.state_dict(), path)
    loaded = load_checkpoint(path, quality=3)
    assert identify(theirs.state_dict()) == name and loaded.rate.item() == pytest.approx(
        theirs.Gain[2].item()
    )
    for key, parameter in theirs.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(key)), key
    save_checkpoint(loaded, tmp_path / "own.safetensors", {"arch": name}, torch.float32)
    again = load_checkpoint(tmp_path / "own.safetensors", name, 3)
    with torch.no_grad():
        assert torch.equal(
            again(image_by_formula(64, 64))["x_hat"], loaded(image_by_formula(64, 64))["x_hat"]
        )


def test_each_image_has_its_own_gain():
    model = filled(create_model("minnen2018-mean-vbr", N=N, M=M)).double()
    x = torch.cat([image_by_formula(64, 64), image_by_formula(64, 64).flip(-1)]).double()
    with torch.no_grad():
        together = model(model.with_planes(x, torch.tensor([8, 2]), torch.ones(2)))
        for index, level in enumerate((8, 2)):
            model.set_level(level)
            alone = model(x[index : index + 1])
            torch.testing.assert_close(
                together["x_hat"][index : index + 1], alone["x_hat"], rtol=1e-5, atol=1e-6
            )
            for key in "yz":
                torch.testing.assert_close(
                    together["likelihoods"][key][index : index + 1], alone["likelihoods"][key]
                )


@pytest.mark.parametrize("name", ["balle2018-vbr", "minnen2018-mean-vbr"])
def test_images_together_at_one_rate_are_those_alone(name):
    model = filled(create_model(name, N=N, M=M, vr_entbttlnck=True)).double()
    model.set_level(4)
    x = torch.cat([image_by_formula(128, 128), image_by_formula(128, 128).flip(-1)]).double()
    with torch.no_grad():
        together, alone = model(x), model(x[1:])
    torch.testing.assert_close(together["x_hat"][1:], alone["x_hat"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(together["likelihoods"]["z"][1:], alone["likelihoods"]["z"])


def test_training_reaches_every_parameter_but_the_gains():
    model = filled(create_model("minnen2018-mean-vbr", N=N, M=M)).train()
    torch.manual_seed(0)
    out = model(image_by_formula(64, 64))
    (out["x_hat"].square().mean() - sum(p.log().mean() for p in out["likelihoods"].values())).backward()
    without = {
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    }
    assert without == {"Gain", "entropy_bottleneck.quantiles"}


def test_constants_of_a_rate_are_sums_in_order_and_correctly_rounded_softplus():
    """Against Python's own arithmetic, number by number, to the bit; near PyTorch's."""
    model = filled(create_model("balle2018-vbr", N=N, M=M)).eval()
    for layers, inputs in (
        (model.QuantABCD, [[0.7, 0.31], [12.0, 0.05]]),
        (model.gayn2zqstep, [[1.0], [3.7]]),
    ):
        results = in_order(layers, torch.tensor(inputs, dtype=torch.float64))
        for row, result in zip(inputs, results.tolist()):
            for layer in layers:
                if isinstance(layer, torch.nn.Linear):
                    weight, bias = layer.weight.double().tolist(), layer.bias.double().tolist()
                    row = [
                        functools.reduce(lambda total, pair: total + pair[0] * pair[1], zip(row, line), start)
                        for line, start in zip(weight, bias)
                    ]
                elif isinstance(layer, torch.nn.ReLU):
                    row = [max(value, 0.0) for value in row]
                else:
                    with localcontext() as context:
                        context.prec = 60
                        row = [float((1 + Decimal(value).exp()).ln()) for value in row]
            assert result == row
        reference = torch.nn.Sequential(*copy.deepcopy(list(layers))).double()(
            torch.tensor(inputs, dtype=torch.float64)
        )
        assert torch.allclose(results, reference, rtol=1e-12, atol=1e-14)


def test_every_published_architecture_is_here():
    zoos = {get_architecture(name).zoo: name for name in (*CLASSES, "minnen2018-vbr")}
    assert set(zoos) == set(zoo.model_urls)


def test_offsets_of_whole_symbols_are_those_of_differences_where_means_are_whole():
    """y_hat of s = round(y a) about a mean m / a, m whole, is that of round((y - mean) a)."""
    model = filled(create_model("minnen2018-vbr", N=N, M=M))
    model.set_level(6)
    gain = model.rate
    draw = torch.Generator().manual_seed(0)
    y, scales = (
        torch.randn(2, M, 5, 4, generator=draw, dtype=torch.float64) * 6,
        torch.rand(2, M, 5, 4, generator=draw, dtype=torch.float64) * 4,
    )
    means = torch.randint(-5, 6, y.shape, generator=draw) / gain.double()
    plain = OffsetNet(*model.QuantABCD)
    results, expected = (
        model.QuantABCD((y * gain).round(), scales, means, gain),
        plain(y, scales, means, gain),
    )
    torch.testing.assert_close(results, expected)
    assert not torch.equal(results, (y * gain).round() / gain)  # moved


def test_share_of_a_residual_is_the_derivative_of_the_mean_within_the_interval():
    scales, step = torch.tensor([0.11, 0.2, 0.5, 1.3, 20.0], dtype=torch.float64), 1e-4
    for scale, share in zip(scales.tolist(), WholeOffsetNet.shares(scales).tolist()):
        means = [
            truncnorm((centre - 0.5) / scale, (centre + 0.5) / scale, scale=scale).mean()
            for centre in (-step, step)
        ]
        assert share == pytest.approx((means[1] - means[0]) / (2 * step), rel=1e-4, abs=1e-6)
