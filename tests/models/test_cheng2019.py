"""Cheng2019 against its layers written out one by one, and against CompressAI's anchor where the two are
alike."""

import torch
import torch.nn.functional as F
from compressai.models import Cheng2020Anchor

from licq.models.checkpoints import identify, load_checkpoint, save_checkpoint
from licq.models.registry import create_model
from tests.formula import as_published, fill_by_formula, image_by_formula

N = 8


def codec():
    return fill_by_formula(create_model("cheng2019", N=N))


class WrittenOut:
    """The network of the authors' later code, layer by layer, on the weights of a state_dict."""

    def __init__(self, state_dict):
        self.w = state_dict

    def conv(self, x, name, stride=1):
        weight = self.w[f"{name}.weight"]
        return F.conv2d(x, weight, self.w.get(f"{name}.bias"), stride, weight.shape[-1] // 2)

    def up(self, x, name):
        return F.conv_transpose2d(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"], 2, 1, 1)

    def gdn(self, x, name, inverse=False):
        floor = 2.0**-36
        beta = self.w[f"{name}.beta"].clamp(min=(1e-6 + floor) ** 0.5) ** 2 - floor
        gamma = self.w[f"{name}.gamma"].clamp(min=floor**0.5) ** 2 - floor
        norm = torch.einsum("oi,bihw->bohw", gamma, x**2) + beta[:, None, None]
        return x * norm.sqrt() if inverse else x / norm.sqrt()

    def unit(self, x, name):
        return x + lrelu(self.conv(lrelu(self.conv(x, f"{name}.conv1")), f"{name}.conv2"))

    def down_unit(self, x, name):
        inner = self.conv(lrelu(self.conv(x, f"{name}.conv1", 2)), f"{name}.conv2")
        shortcut = F.conv2d(x, self.w[f"{name}.skip.weight"], self.w[f"{name}.skip.bias"], 2)
        return self.gdn(inner, f"{name}.gdn") + shortcut

    def up_unit(self, x, name):
        inner = self.conv(lrelu(F.pixel_shuffle(self.conv(x, f"{name}.subpel_conv.0"), 2)), f"{name}.conv")
        return self.gdn(inner, f"{name}.igdn", inverse=True) + F.pixel_shuffle(
            self.conv(x, f"{name}.upsample.0"), 2
        )

    def analysis(self, x):
        for stage in range(3):
            x = self.unit(self.down_unit(x, f"g_a.{2 * stage}"), f"g_a.{2 * stage + 1}")
        return self.conv(x, "g_a.6", 2)

    def synthesis(self, x):
        for stage in range(3):
            x = self.up_unit(self.unit(x, f"g_s.{2 * stage}"), f"g_s.{2 * stage + 1}")
        return F.pixel_shuffle(self.conv(self.unit(x, "g_s.6"), "g_s.7.0"), 2)

    def hyper_analysis(self, x):
        for layer, stride in ((0, 1), (2, 1), (4, 2), (6, 1)):
            x = lrelu(self.conv(x, f"h_a.{layer}", stride))
        return self.conv(x, "h_a.8", 2)

    def hyper_synthesis(self, x):
        x = lrelu(self.up(lrelu(self.conv(x, "h_s.0")), "h_s.2"))
        x = lrelu(self.up(lrelu(self.conv(x, "h_s.4")), "h_s.6"))
        return self.conv(x, "h_s.8")


def lrelu(x):
    return torch.where(x < 0, 0.2 * x, x)


def test_transforms_are_the_layers_written_out():
    model = codec().double()
    theirs = WrittenOut(model.state_dict())
    x = image_by_formula(64, 128).double()
    with torch.no_grad():
        y = theirs.analysis(x)
        z = theirs.hyper_analysis(y)
        torch.testing.assert_close(model.g_a(x), y, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(model.h_a(y), z, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(model.h_s(z), theirs.hyper_synthesis(z), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(model.g_s(y), theirs.synthesis(y), rtol=1e-6, atol=1e-8)
    assert y.shape == (1, N, 4, 8) and z.shape == (1, N, 1, 2)


def test_the_rest_is_the_codec_of_minnen2018():
    """With the anchor's layers in their places the forward is the anchor's."""
    anchor = fill_by_formula(Cheng2020Anchor(N))
    model = codec()
    for name in (
        "g_a",
        "g_s",
        "h_a",
        "h_s",
        "context_prediction",
        "entropy_parameters",
        "entropy_bottleneck",
    ):
        setattr(model, name, getattr(anchor, name))
    x = image_by_formula(64, 64)
    with torch.no_grad():
        ours, theirs = as_published(model)(x), anchor(x)
    assert torch.equal(ours["x_hat"], theirs["x_hat"])
    assert torch.equal(ours["likelihoods"]["y"], theirs["likelihoods"]["y"])


def test_checkpoint_is_told_from_the_anchors(tmp_path):
    model = codec()
    assert identify(model.state_dict()) == "cheng2019"
    assert identify(Cheng2020Anchor(N).state_dict()) == "cheng2020-anchor"
    save_checkpoint(model, tmp_path / "model.safetensors", {"arch": "cheng2019"}, torch.float32)
    loaded = load_checkpoint(tmp_path / "model.safetensors")
    assert all(
        torch.equal(parameter, loaded.get_parameter(name)) for name, parameter in model.named_parameters()
    )


def test_official_sizes():
    model = create_model("cheng2019", quality=6)
    assert model.N == 192 and model.entropy_parameters[0].out_channels == 960
    assert model.g_a[6].bias is None and model.entropy_parameters[4].bias is None
