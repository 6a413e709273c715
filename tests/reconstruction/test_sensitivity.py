"""The curvature of J, predicted noise and channel splitting, against closed forms and against measured
noise."""

import math

import pytest
import torch
from torch import Tensor, nn

from licq.quant.channel_split import split_shares
from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.quant.qtensor import QTensor
from licq.quant.quantizer import Quantizer
from licq.reconstruction.api import quantize
from licq.reconstruction.config import PtqConfig
from licq.reconstruction.objective import Objective
from licq.reconstruction.sensitivity import input_noise, measure_sensitivities, predicted_losses, weight_noise
from licq.reconstruction.split import split_channels
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
        return {
            "x_hat": self.second(a) * 0.1 + 0.5,
            "likelihoods": {"a": (a.square() * -0.5).exp() / math.sqrt(2 * math.pi)},
        }


def observed(model: nn.Module, batches: list[Tensor], **config) -> QuantModel:
    qmodel = QuantModel(model.eval(), QuantConfig(**config))
    qmodel.observe(batches)
    return qmodel


def batches(count: int = 4, size: int = 64) -> list[Tensor]:
    return list(images(count, size, size).split(2))


def test_distortion_curvature_is_the_closed_form():
    model = Linear2()
    sensitivity = measure_sensitivities(
        observed(model, batches()), batches(), Objective(LAMBDA), progress=False
    )["first"]
    kernel = (
        0.01 * model.second.weight.detach().square().sum((0, 2, 3)).double()
    )  # x_hat = 0.1 * second + 0.5
    distortion = 2 * LAMBDA * 255**2 / 3 * kernel
    with torch.no_grad():
        a = model.first(torch.cat(batches()))
    rate = a.square().mean((0, 2, 3)).double() / math.log(
        2
    )  # squared gradient of a^2 / 2 nats, in bits per pixel
    torch.testing.assert_close(sensitivity.curvature, distortion + rate, rtol=0.05, atol=0)


def test_without_an_objective_a_layer_has_its_own_relative_error():
    model = Linear2()
    sensitivity = measure_sensitivities(observed(model, batches()), batches(), None, progress=False)["first"]
    with torch.no_grad():
        inverse = [1 / model.first(batch).square().mean().double() for batch in batches()]
    expected = (2 / 24 * torch.stack(inverse).mean()).expand(24)
    torch.testing.assert_close(sensitivity.curvature, expected, rtol=1e-4, atol=0)
    noise = torch.randn(2, 24, 64, 64, generator=torch.Generator().manual_seed(0)) * 0.01
    with torch.no_grad():
        rise = [(noise.square().mean() / model.first(batch).square().mean()).double() for batch in batches()]
    predicted = 0.5 * (sensitivity.curvature * 0.01**2).sum()
    torch.testing.assert_close(predicted, torch.stack(rise).mean(), rtol=0.02, atol=0)


def test_nothing_is_chosen_by_j_where_the_loss_does_not_know_it():
    def outcome(loss: str, lmbda: float) -> list[Tensor]:
        config = PtqConfig.from_preset(loss=loss, joint_iters=0, stress=False)
        return list(
            quantize(tiny_codec("balle2018"), images(2), config, lmbda=lmbda, progress=False)
            .state_dict()
            .values()
        )

    assert all(torch.equal(a, b) for a, b in zip(outcome("mse", 0.001), outcome("mse", 0.1)))
    assert any(not torch.equal(a, b) for a, b in zip(outcome("rd", 0.001), outcome("rd", 0.1)))


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
    torch.testing.assert_close(
        sensitivity.curvature, torch.full((4,), 1 / math.log(2), dtype=torch.float64), rtol=0.05, atol=0
    )


def test_curvature_of_ms_ssim_is_that_of_small_noise():
    """White noise in x_hat raises 1 - MS-SSIM by half its variance times the curvature."""
    model, data = Linear2(), [images(1, 192, 192)]
    objective = Objective(20.0, "ms-ssim")
    curvature = measure_sensitivities(observed(model, data), data, objective, progress=False)[
        "second"
    ].curvature
    with torch.no_grad():
        x_hat = model(data[0])["x_hat"]
        size = 4 / 255
        draw = torch.Generator().manual_seed(5)
        rises = []
        for _ in range(8):
            noise = torch.randn(x_hat.shape, generator=draw) * size
            pair = [objective.unclipped_distortion(x_hat + sign * noise, data[0]) for sign in (-1, 0, 1)]
            rises.append(float(pair[0] + pair[2] - 2 * pair[1]) / 2)
    predicted = (
        0.5 * size**2 * float(curvature.sum()) / 0.1**2
    )  # of the layer's output, which x_hat holds 0.1 times
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
    """The distortion that the layer "second" alone adds, on integers."""
    qmodel.quantize_nodes(False)
    qmodel.quantize_nodes(True, ["second"])
    x = torch.cat(data)
    with torch.no_grad():
        return float((qmodel(x)["x_hat"] - model(x)["x_hat"]).square().mean() * LAMBDA * 255**2)


@pytest.mark.parametrize(
    "transposed,groups,split",
    [(False, 1, False), (True, 1, False), (False, 3, False), (False, 1, True), (True, 1, True)],
)
@pytest.mark.parametrize("transform", ["fold", "equalize"])
def test_predicted_input_noise_is_what_rounding_does(transposed, groups, split, transform):
    model, data = Linear2(transposed=transposed, groups=groups), batches(4, 128)
    qmodel = observed(model, data, a_bits=6, w_bits=16, transform=transform)
    sensitivity = measure_sensitivities(qmodel, data, Objective(LAMBDA), progress=False)["second"]
    if split:
        loudest = input_noise(qmodel.nodes["second"], sensitivity).argsort(descending=True)[:8]
        qmodel.nodes["second"].input_grid.split(
            torch.zeros(24, dtype=torch.bool).index_fill(0, loudest, True)
        )
        qmodel.nodes["second"].start_weights()
    error = measured_loss(qmodel, model, data)
    assert float(input_noise(qmodel.nodes["second"], sensitivity).sum()) == pytest.approx(error, rel=0.1)


@pytest.mark.parametrize(
    "transposed,groups,a_bits",
    [(False, 1, 14), (True, 1, 14), (False, 3, 14), (False, 1, 32), (True, 1, 32), (False, 3, 32)],
)
def test_predicted_weight_noise_is_what_rounding_does(transposed, groups, a_bits):
    # the noise model takes inputs as uncorrelated: noise for an image, and filters without a mean
    model = Linear2(channels=96, transposed=transposed, groups=groups)
    data = [torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    with torch.no_grad():
        model.first.bias.zero_()
        model.first.weight.sub_(model.first.weight.mean((1, 2, 3), keepdim=True))
    qmodel = observed(model, data, a_bits=a_bits, w_bits=5)
    sensitivities = measure_sensitivities(qmodel, data, Objective(LAMBDA), progress=False)
    error = measured_loss(qmodel, model, data)
    assert float(weight_noise(qmodel.nodes["second"], sensitivities["second"]).sum()) == pytest.approx(
        error, rel=0.4
    )
    predicted = predicted_losses(qmodel, sensitivities)["second"]
    assert predicted["weights"] == pytest.approx(error, rel=0.4) and (predicted["inputs"] == 0) == (
        a_bits == 32
    )


def split_model(share: float, least: float = 0.0, **config) -> tuple[QuantModel, dict, dict]:
    data = batches()
    qmodel = observed(tiny_codec("minnen2018"), data, **config)
    sensitivities = measure_sensitivities(qmodel, data, Objective(LAMBDA), progress=False)
    return qmodel, sensitivities, split_channels(qmodel, sensitivities, share, least)


def test_channels_that_gain_too_little_are_not_split():
    plain, sensitivities, _ = split_model(0.0)
    total = sum(s.macs for s in sensitivities.values())
    gains = {}
    for name in split_model(1.0)[2]["layers"]:
        noise = input_noise(plain.nodes[name], sensitivities[name])
        gains[name] = noise * len(noise) / (sensitivities[name].macs / total)
    least = 1.001 * float(torch.cat(list(gains.values())).median())
    facts = split_model(1.0, least)[2]
    expected = {name: float((gain > least).float().mean()) for name, gain in gains.items()}
    assert facts["layers"] == pytest.approx({name: share for name, share in expected.items() if share})
    assert 0 < facts["extra_macs"] < split_model(1.0)[2]["extra_macs"]


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 1.0])
def test_splitting_stays_inside_its_budget_and_lowers_the_predicted_loss(share):
    qmodel, sensitivities, facts = split_model(share)
    plain = split_model(0.0)[0]
    assert facts["extra_macs"] <= share + 1e-9
    split = {n: float((qmodel.nodes[n].input_grid.fine > 1).float().mean()) for n in sensitivities}
    assert {n: s for n, s in split.items() if s} == pytest.approx(facts["layers"])
    total = sum(s.macs for s in sensitivities.values())
    assert sum(split[n] * sensitivities[n].macs for n in split) / total == pytest.approx(facts["extra_macs"])
    before, after = (
        sum(p["inputs"] for p in predicted_losses(m, sensitivities).values()) for m in (plain, qmodel)
    )
    assert after < before if share else after == before
    assert share < 0.02 or facts["extra_macs"] > 0.8 * min(share, 0.1)


def test_what_has_two_digits_already_may_have_none_or_would_pass_32_bits_is_left_alone():
    nothing = {"extra_macs": 0.0, "layers": {}, "refused": []}
    assert split_model(0.5, a_bits=10)[2] == nothing
    wide = split_model(0.5, w_bits=16)[2]
    assert wide["refused"] and not set(wide["refused"]) & set(wide["layers"])
    assert split_model(0.5, strict_int8=True)[2] == nothing


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_two_digits_hold_a_split_channel(bits):
    fine, reach = split_shares(bits)
    assert fine * reach <= 2**bits and fine >= reach
    grid = Quantizer(bits, 24, 1, symmetry="one_sided")
    x = torch.stack([torch.linspace(-1, 1, 1001), torch.linspace(0, 1, 1001)])[None]
    grid.observe(x)
    grid.initialize()
    steps = grid.parameters_of_grid()[0]
    for split in ([True, False], [False, True]):
        grid.split(torch.tensor(split))
        scale, qmin, qmax = grid.parameters_of_grid()
        own = torch.tensor(split)
        assert torch.equal(scale, steps) and bool((qmax - qmin < torch.where(own, 4**bits, 2**bits)).all())
        step = torch.where(own, scale / fine, scale)
        inside = x * torch.where(own, reach - 0.1, 0.9).reshape(1, 2, 1)
        # real numbers, and integers of another scale, as an accumulator has
        other = QTensor(
            torch.round(inside * 2.0**20), torch.tensor([[[2.0**-20]]], dtype=torch.float64), None
        )
        for given in (QTensor(inside, None, None), other):
            found = grid(given)
            assert found.scale.shape == (1, 2, 1) and torch.equal(found.q, found.q.round())
            error = (found.real() - inside).abs().amax((0, 2))
            assert bool((error <= 0.51 * step).all()) and bool(
                (error >= 0.1 * step).all()
            )  # its own step: neither clipped nor finer
        beyond = grid(QTensor(x * reach * 1.5, None, None)).real()
        assert torch.allclose(beyond.amax((0, 2)), (qmax * step).to(beyond))
        assert bool(((qmax * step - torch.where(own, reach, 1.0)).abs() <= step * reach).all())


@pytest.mark.parametrize("w_bits,a_bits", [(32, 8), (8, 32)])
def test_nothing_is_split_in_ablations_with_float_on_one_side(w_bits, a_bits):
    assert split_model(0.5, w_bits=w_bits, a_bits=a_bits)[2] == {
        "extra_macs": 0.0,
        "layers": {},
        "refused": [],
    }


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetry", ["symmetric", "one_sided", "asymmetric"])
def test_a_split_channel_is_two_channels_of_few_bits(symmetry, bits):
    """The accumulator of the split layer from three of a kernel of few bits: unsplit channels, high digits,
    low digits."""
    qmodel, _, facts = split_model(0.1, a_symmetry=symmetry, a_bits=bits)
    names = [name for name, share in facts["layers"].items() if share < 1]
    assert {type(qmodel.nodes[name].module) for name in names} >= {nn.Conv2d, nn.ConvTranspose2d}
    qmodel.quantize_nodes(True)
    qmodel.freeze()
    for name in names:
        node = qmodel.nodes[name]
        grid, split = node.input_grid, node.input_grid.fine > 1
        refinement, base, weight = grid.refinement, 2.0**bits, node.weight_int.float()
        draw = torch.Generator().manual_seed(0)
        low, high = (grid.qmin.reshape(-1, 1, 1), grid.qmax.reshape(-1, 1, 1))
        codes = torch.round(low + torch.rand(1, len(split), 16, 16, generator=draw) * (high - low))
        codes[0, :, 0, 0], codes[0, :, 0, 1] = low[:, 0, 0], high[:, 0, 0]
        signed = (low == -high) & (symmetry != "asymmetric")
        zero = torch.where(signed, 0.0, -low)
        main = torch.where(signed, codes, codes + zero)[:, ~split]
        digits = torch.where(signed, codes, codes + zero)[:, split]
        first = torch.div(digits, base, rounding_mode="floor")
        second = digits - base * first
        for stored, which in ((main, ~split), (first, split)):
            has_sign = signed[which]
            assert bool(
                (
                    (stored >= torch.where(has_sign, -base / 2, 0.0))
                    & (stored < torch.where(has_sign, base / 2, base))
                ).all()
            )
        assert float(second.min()) >= 0 and float(second.max()) < base
        unsplit, offset = (
            torch.zeros_like(codes),
            (zero * (refinement / grid.fine).reshape(-1, 1, 1)).expand_as(codes),
        )
        unsplit[:, ~split] = main
        parts = []
        for digit in (first, second):
            part = torch.zeros_like(codes)
            part[:, split] = digit
            parts.append(node.product(part, weight))
        accumulator = (
            refinement * node.product(unsplit, weight)
            + base * parts[0]
            + parts[1]
            - node.product(offset.contiguous(), weight)
        )
        numbers = codes * (refinement / grid.fine).reshape(-1, 1, 1)  # what the simulation holds
        assert torch.equal(
            grid(QTensor(numbers, grid.scale.reshape(-1, 1, 1) / refinement, qmodel.runtime)).q, numbers
        )
        assert torch.equal(node.product(numbers.double(), weight.double()), accumulator.double())
        assert float(node.bound) < 2**31


def test_a_split_model_is_saved_and_loaded_bit_for_bit(tmp_path):
    model = tiny_codec("balle2018")
    config = PtqConfig.from_preset("licq", iters=0, joint_iters=2, split=0.2)
    qmodel = quantize(model, images(4), config, lmbda=LAMBDA, progress=False)
    assert qmodel.history["splitting"]["extra_macs"] > 0.1
    assert set(qmodel.history["predicted"]) >= set(qmodel.history["splitting"]["layers"])
    qmodel.save(tmp_path / "model.safetensors")
    loaded = QuantModel.load(tmp_path / "model.safetensors")
    assert all(
        torch.equal(loaded.nodes[n].input_grid.fine, qmodel.nodes[n].input_grid.fine)
        for n in qmodel.history["splitting"]["layers"]
    )
    x = images(1, seed=9)
    with torch.no_grad():
        ours, theirs = qmodel(x), loaded(x)
    assert torch.equal(ours["x_hat"], theirs["x_hat"])
    assert all(torch.equal(ours["likelihoods"][k], theirs["likelihoods"][k]) for k in ours["likelihoods"])
