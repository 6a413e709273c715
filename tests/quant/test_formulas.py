"""What is known of how a forward has written a tensor ends where the tensor is changed."""

import pytest
import torch
import torch.nn.functional as F
from compressai.entropy_models import EntropyBottleneck
from torch import nn

from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.support.errors import InputError


class Codec(nn.Module):
    """A codec that changes the output of its first convolution by `change` (codec, h) -> h."""

    def __init__(self, change):
        super().__init__()
        self.change = change
        self.first, self.second = nn.Conv2d(3, 4, 5, 4, 2), nn.Conv2d(4, 4, 3, 4, 1)
        self.entropy_bottleneck = EntropyBottleneck(4)
        self.last = nn.ConvTranspose2d(4, 3, 16, 16)
        self.register_buffer("means", torch.full((1, 4, 16, 16), 0.25))

    def forward(self, x):
        y_hat, likelihoods = self.entropy_bottleneck(self.second(self.change(self, self.first(x))))
        return {"x_hat": self.last(y_hat), "likelihoods": {"y": likelihoods}}


def frozen(change) -> tuple[Codec, QuantModel, torch.Tensor]:
    torch.manual_seed(0)
    network, image = Codec(change).eval(), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for layer in (network.first, network.second, network.last):
            layer.weight.mul_(4)
    model = QuantModel(network, QuantConfig())
    model.observe([image])
    model.freeze()
    return network, model, image


def corner_of_a_difference_tripled(codec, h):
    positive = F.relu(h)
    difference = h - positive
    difference[:, :, :2, :2].mul_(3)
    return difference + positive


def part_taken_before_a_change_in_place(codec, h):
    even = h[:, :, 0::2]
    h[:, :, :2, :2].mul_(30)
    zeros = torch.zeros_like(h)
    zeros[:, :, 0::2] = even
    return zeros


def corner_tripled_before_rounding(codec, h):
    difference = h - codec.means
    difference[:, :, :2, :2].mul_(3)
    return torch.round(difference) + codec.means


@pytest.mark.parametrize(
    "change",
    [corner_of_a_difference_tripled, part_taken_before_a_change_in_place, corner_tripled_before_rounding],
)
def test_a_tensor_whose_view_was_changed_in_place_is_refused_by_name(change):
    with pytest.raises(InputError, match="changes a tensor in place"):
        frozen(change)


def changed_means(codec, h):
    means = codec.means.clone()
    difference = h - means
    means[:, :, :2] += 9
    return difference + means


def broadcast_sum(codec, h):
    return (h[:, :, :1, :1] - h) + h


def broadcast_difference(codec, h):
    positive = F.relu(h)
    corner = h[:, :, :1, :1]
    return corner - (corner - positive[:, :, :1]) + positive


def whole_numbers(codec, h):
    return h * torch.full_like(h, 2, dtype=torch.long).float()


def rounded_about_means(codec, h):
    return torch.round(h - codec.means) + codec.means


@pytest.mark.parametrize(
    "change", [changed_means, broadcast_sum, broadcast_difference, whole_numbers, rounded_about_means]
)
def test_terms_cancel_only_where_they_are_what_they_were(change):
    network, model, image = frozen(change)
    seen = []
    second = model.get_submodule("model.second")
    second.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].real()))
    with torch.no_grad():
        model(image)
        expected = change(network, network.first(image))
    assert seen[0].shape == expected.shape
    # W8A8, and one step of rounding where a number lies at the border of two
    off = (seen[0] - expected).abs() > 0.03 * expected.abs().max()
    assert off.float().mean() < 0.02
