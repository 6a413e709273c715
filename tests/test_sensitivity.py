"""The curvature of J, predicted noise and channel splitting, against closed forms and against measured noise."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.config import QuantConfig
from quant.model import QuantModel
from reconstruction.api import quantize
from reconstruction.config import PtqConfig
from reconstruction.objective import Objective
from reconstruction.sensitivity import input_noise, measure_sensitivities, predicted_losses, weight_noise
from reconstruction.split import split_channels
from tests.tiny_codecs import images, tiny_codec

LAMBDA = 0.01


class Linear2(nn.Module):
    """x -> a -> x_hat by two convolutions; the rate is that of a under a unit Gaussian density."""

    def __init__(self, channels: int = 24, transposed: bool = False, groups: int = 1):
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.first = nn.Conv2d(3, channels, 3, padding=1, stride=2 if transposed else 1)
        self.second = (
            nn.ConvTranspose2d(channels, 3, 5, stride=2, padding=2, output_padding=1)
            if transposed
            else nn.Conv2d(channels, 3, 3, padding=1, groups=groups)
        )
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
            self.first.weight.mul_(torch.logspace(-1, 0, channels).reshape(-1, 1, 1, 1))

    def forward(self, x):
        a = self.first(x)
        return {"x_hat": self.second(a) * 0.1 + 0.5, "likelihoods": {"a": (a.square() * -0.5).exp() / math.sqrt(2 * math.pi)}}


def observed(model: nn.Module, batches: list[Tensor], **config) -> QuantModel:
    qmodel = QuantModel(model.eval(), QuantConfig(**config))
    qmodel.observe(batches)
    return qmodel


def batches(count: int = 4, size: int = 64) -> list[Tensor]:
    return list(images(count, size, size).split(2))


def test_distortion_curvature_is_the_closed_form():
    model = Linear2()
    sensitivity = measure_sensitivities(observed(model, batches()), batches(), Objective(LAMBDA), progress=False)["first"]
    kernel = 0.01 * model.second.weight.detach().square().sum((0, 2, 3)).double()  # x_hat = 0.1 * second + 0.5
    distortion = 2 * LAMBDA * 255**2 / 3 * kernel
    with torch.no_grad():
        a = model.first(torch.cat(batches()))
    rate = a.square().mean((0, 2, 3)).double() / math.log(2)  # squared gradient of a^2 / 2 nats, in bits per pixel
    torch.testing.assert_close(sensitivity.curvature, distortion + rate, rtol=0.05, atol=0)


def test_rate_curvature_is_the_fisher_information_of_a_gaussian():
    """For a ~ N(0, 1) under its own density the Hessian of the code length is 1 nat."""
    model = Linear2(channels=4)
    with torch.no_grad():
        model.first.weight.zero_()
        model.first.weight[:, 0, 1, 1] = 1.0
        model.first.bias.zero_()
        model.second.weight.zero_()
    noise = [torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))]
    qmodel = QuantModel(model.eval(), QuantConfig())
    qmodel.observe(noise)
    sensitivity = measure_sensitivities(qmodel, noise, Objective(LAMBDA), progress=False)["first"]
    torch.testing.assert_close(sensitivity.curvature, torch.full((4,), 1 / math.log(2), dtype=torch.float64), rtol=0.05, atol=0)


def test_curvature_of_ms_ssim_is_that_of_small_noise():
    """White noise in x_hat raises 1 - MS-SSIM by half its variance times the curvature."""
    model, data = Linear2(), [images(1, 192, 192)]
    objective = Objective(20.0, "ms-ssim")
    curvature = measure_sensitivities(observed(model, data), data, objective, progress=False)["second"].curvature
    with torch.no_grad():
        x_hat = model(data[0])["x_hat"]
        size = 4 / 255
        draw = torch.Generator().manual_seed(5)
        rises = []
        for _ in range(8):
            noise = torch.randn(x_hat.shape, generator=draw) * size
            pair = [objective.unclipped_distortion(x_hat + sign * noise, data[0]) for sign in (-1, 0, 1)]
            rises.append(float(pair[0] + pair[2] - 2 * pair[1]) / 2)
    predicted = 0.5 * size**2 * float(curvature.sum()) / 0.1**2  # of the layer's output, which x_hat holds 0.1 times
    assert sum(rises) / len(rises) == pytest.approx(predicted, rel=0.15)


@pytest.mark.parametrize("transposed", [False, True])
def test_macs_are_counted(transposed):
    model = Linear2(transposed=transposed)
    found = measure_sensitivities(observed(model, batches()), batches(), Objective(LAMBDA), progress=False)
    if transposed:
        assert found["first"].macs == 32 * 32 * 9 * 3 * 24
        assert found["second"].macs == 32 * 32 * 25 * 3 * 24  # every input element meets every tap once
    else:
        assert found["first"].macs == 64 * 64 * 9 * 3 * 24


def measured_loss(qmodel: QuantModel, model: nn.Module, data: list[Tensor]) -> float:
    """The distortion that the layer "second" alone adds, on whole numbers."""
    qmodel.quantize_nodes(False)
    qmodel.quantize_nodes(True, ["second"])
    x = torch.cat(data)
    with torch.no_grad():
        return float((qmodel(x)["x_hat"] - model(x)["x_hat"]).square().mean() * LAMBDA * 255**2)


@pytest.mark.parametrize("transposed,groups", [(False, 1), (True, 1), (False, 3)])
@pytest.mark.parametrize("transform", ["fold", "equalize"])
def test_predicted_input_noise_is_what_rounding_does(transposed, groups, transform):
    model, data = Linear2(transposed=transposed, groups=groups), batches(4, 128)
    qmodel = observed(model, data, a_bits=6, w_bits=16, transform=transform)
    sensitivity = measure_sensitivities(qmodel, data, Objective(LAMBDA), progress=False)["second"]
    error = measured_loss(qmodel, model, data)
    assert float(input_noise(qmodel.nodes["second"], sensitivity).sum()) == pytest.approx(error, rel=0.1)


@pytest.mark.parametrize("transposed,groups", [(False, 1), (True, 1), (False, 3)])
def test_predicted_weight_noise_is_what_rounding_does(transposed, groups):
    # the noise model takes inputs as uncorrelated: noise for an image, and filters without a mean
    model = Linear2(channels=96, transposed=transposed, groups=groups)
    data = [torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    with torch.no_grad():
        model.first.bias.zero_()
        model.first.weight.sub_(model.first.weight.mean((1, 2, 3), keepdim=True))
    qmodel = observed(model, data, a_bits=14, w_bits=5)
    sensitivity = measure_sensitivities(qmodel, data, Objective(LAMBDA), progress=False)["second"]
    error = measured_loss(qmodel, model, data)
    assert float(weight_noise(qmodel.nodes["second"], sensitivity).sum()) == pytest.approx(error, rel=0.4)


def split_model(share: float, **config) -> tuple[QuantModel, dict, dict]:
    data = batches()
    qmodel = observed(tiny_codec("minnen2018"), data, **config)
    sensitivities = measure_sensitivities(qmodel, data, Objective(LAMBDA), progress=False)
    return qmodel, sensitivities, split_channels(qmodel, sensitivities, share)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 1.0])
def test_splitting_stays_inside_its_budget_and_lowers_the_predicted_loss(share):
    qmodel, sensitivities, facts = split_model(share)
    plain = split_model(0.0)[0]
    assert facts["extra_macs"] <= share + 1e-9
    grown = {n: float(node.input_grid.copies.mean()) for n, node in qmodel.nodes.items() if n in sensitivities}
    total = sum(s.macs for s in sensitivities.values())
    assert sum((g - 1) * sensitivities[n].macs for n, g in grown.items()) / total == pytest.approx(facts["extra_macs"])
    before, after = (sum(p["inputs"] for p in predicted_losses(m, sensitivities).values()) for m in (plain, qmodel))
    assert after < before if share else after == before
    assert share < 0.02 or facts["extra_macs"] > 0.8 * min(share, 0.1)


@pytest.mark.parametrize("w_bits,a_bits", [(32, 8), (8, 32)])
def test_nothing_is_split_in_ablations_with_float_on_one_side(w_bits, a_bits):
    assert split_model(0.5, w_bits=w_bits, a_bits=a_bits)[2] == {"extra_macs": 0.0, "layers": {}}


@pytest.mark.parametrize("symmetry", ["symmetric", "one_sided", "asymmetric"])
def test_a_split_channel_is_several_channels_of_eight_bits(symmetry):
    """The accumulator of the split layer, from int8 channels: each copy in 8 bits, the weights repeated."""
    qmodel, _, facts = split_model(1.0, a_symmetry=symmetry)
    name = max(facts["layers"], key=facts["layers"].get)
    node = qmodel.nodes[name]
    grid, copies = node.input_grid, [int(c) for c in node.input_grid.copies]
    qmodel.quantize_nodes(True)
    qmodel.freeze()
    draw = torch.Generator().manual_seed(0)
    low, high = grid.qmin, grid.qmax
    shape = (1, len(copies), 1, 1)
    x = torch.round(low.reshape(shape) + torch.rand(1, len(copies), 16, 16, generator=draw) * (high - low).reshape(shape))
    x[:, :, 0, 0], x[:, :, 0, 1] = low, high
    parts, weights = [], []
    weight = node.weight_int.float()
    for channel, copy in enumerate(copies):
        zero = -float(low[channel]) if float(high[channel] + low[channel]) or symmetry == "asymmetric" else None
        stored = x[:, channel] if zero is None else x[:, channel] + zero
        left = stored
        for remaining in range(copy, 0, -1):
            part = torch.div(left, remaining, rounding_mode="floor")
            left = left - part
            smallest, largest = (-127, 127) if zero is None else (0, 255)
            assert smallest <= float(part.min()) and float(part.max()) <= largest
            parts.append(part)
            weights.append(weight[:, channel])
        assert not left.any()
        if zero is not None:  # the zero point, as a kernel would subtract it: a constant channel
            parts.append(torch.full_like(left, -zero))
            weights.append(weight[:, channel])
    whole, module = node.product(x, weight), node.module
    inputs, stacked = torch.stack(parts, 1), torch.stack(weights, 1)
    if isinstance(module, nn.ConvTranspose2d):
        split = F.conv_transpose2d(inputs, stacked.transpose(0, 1), None, module.stride, module.padding, module.output_padding)
    else:
        split = F.conv2d(inputs, stacked, None, module.stride, module.padding)
    assert max(copies) > 1
    assert torch.equal(whole, split)


def test_a_split_model_is_saved_and_loaded_bit_for_bit(tmp_path):
    model = tiny_codec("balle2018")
    config = PtqConfig.from_preset("licq", iters=0, joint_iters=2, split=0.2)
    qmodel = quantize(model, images(4), config, lmbda=LAMBDA, progress=False)
    assert qmodel.history["splitting"]["extra_macs"] > 0.1
    assert set(qmodel.history["predicted"]) >= set(qmodel.history["splitting"]["layers"])
    qmodel.save(tmp_path / "model.safetensors")
    loaded = QuantModel.load(tmp_path / "model.safetensors")
    copies = {n: node.input_grid.copies for n, node in qmodel.nodes.items() if n in qmodel.history["splitting"]["layers"]}
    assert all(torch.equal(loaded.nodes[n].input_grid.copies, c) for n, c in copies.items())
    x = images(1, seed=9)
    with torch.no_grad():
        ours, theirs = qmodel(x), loaded(x)
    assert torch.equal(ours["x_hat"], theirs["x_hat"])
    assert all(torch.equal(ours["likelihoods"][k], theirs["likelihoods"][k]) for k in ours["likelihoods"])
