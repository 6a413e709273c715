"""NLAIC against the public code (NJUVISION/NIC): names, shapes, and outputs on weights made by a formula.

The golden numbers were printed by the public code on the same weights; x_hat there was equal bit for bit, the
likelihoods to 2e-7.
"""

import pytest
import torch

from licq.models.checkpoints import identify, load_checkpoint, save_checkpoint
from licq.models.chen2021 import NLAIC
from licq.models.layers import MaskedConv3d
from licq.models.registry import create_model, get_architecture
from licq.support.errors import InputError
from tests.formula import fill_by_formula, image_by_formula

M, N2 = 16, 8


@pytest.fixture(scope="module")
def narrow() -> NLAIC:
    return fill_by_formula(NLAIC(M, N2))


def test_outputs_equal_the_public_code(narrow):
    x = image_by_formula(128, 192)
    with torch.no_grad():
        y, z = narrow.encoder(x)
        out = narrow(x)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(
        y.flatten()[::301],
        torch.tensor([-0.774273, -0.199798, 0.305353, 0.437334, 0.295976, -0.102518]),
        **close,
    )
    torch.testing.assert_close(
        z.flatten()[::7],
        torch.tensor([0.153667, -0.678193, 0.351101, 0.725334, -0.49911, -0.270103, -0.024438]),
        **close,
    )
    expected_x_hat = [-0.933837, 1.032276, -0.750288, -0.332427, -0.41549, 0.408948, 0.347184, 0.035338]
    torch.testing.assert_close(out["x_hat"].flatten()[::10007], torch.tensor(expected_x_hat), **close)
    likelihoods = out["likelihoods"]
    expected_y = [0.754544, 0.079543, 0.078594, 0.074559, 0.081366, 0.080331]
    torch.testing.assert_close(likelihoods["y"].flatten()[::301], torch.tensor(expected_y), **close)
    assert float(likelihoods["y"].log2().sum()) == pytest.approx(-4477.95361, rel=1e-4)
    assert float(likelihoods["z"].log2().sum()) == pytest.approx(-59.1603165, rel=1e-4)


def official_files(model: NLAIC, folder) -> str:
    """Two files as the public code's training writes them: unused branches and repeated tensors included."""
    first, second = {}, {}
    for name, tensor in model.state_dict().items():
        if name.startswith("context."):
            second[name.removeprefix("context.")] = tensor
        elif name.startswith("factorized_entropy_func."):
            for ours, theirs in (("matrices", "_matrices"), ("biases", "_bias"), ("factors", "_factor")):
                if f".{ours}." in name:
                    first[name.replace(f".{ours}.", f".{theirs}.")] = tensor
        elif not name.startswith("gaussian_conditional."):
            first[name] = tensor
    for name, last in (("matrix", "_matrices.3"), ("bias", "_bias.3"), ("factor", "_factor.2")):
        first[f"factorized_entropy_func.{name}"] = first[f"factorized_entropy_func.{last}"]
    for unused, used in (("encoder.mask1", "encoder.mask2"), ("decoder.mask2", "decoder.mask1")):
        first.update(
            {name.replace(used, unused): tensor for name, tensor in first.items() if name.startswith(used)}
        )
    torch.save(first, folder / "mse800.pkl", _use_new_zipfile_serialization=False)
    torch.save(second, folder / "mse800p.pkl", _use_new_zipfile_serialization=False)
    return str(folder / "mse800.pkl")


def test_the_two_official_files_load_as_one(narrow, tmp_path):
    loaded = load_checkpoint(official_files(narrow, tmp_path), "chen2021")
    x = image_by_formula(64, 128)
    with torch.no_grad():
        ours, theirs = narrow(x), loaded(x)
    assert torch.equal(ours["x_hat"], theirs["x_hat"])
    assert all(torch.equal(ours["likelihoods"][key], theirs["likelihoods"][key]) for key in "yz")
    bottleneck = loaded.factorized_entropy_func
    assert not bottleneck._get_medians().any() and bottleneck._quantized_cdf.numel()
    quantiles = bottleneck.quantiles
    assert bool((quantiles[:, :, 0] < 0).all() and (quantiles[:, :, 2] > 0).all())


def test_without_the_second_file_the_context_model_is_missing(narrow, tmp_path):
    path = official_files(narrow, tmp_path)
    (tmp_path / "mse800p.pkl").unlink()
    with pytest.raises(InputError, match=r"no checkpoint of chen2021: context\.conv1\.weight is missing"):
        load_checkpoint(path, "chen2021")


def test_our_own_file_is_found_out_and_comes_back(narrow, tmp_path):
    assert identify(narrow.state_dict()) == "chen2021"
    save_checkpoint(narrow, tmp_path / "model.safetensors", {"arch": "chen2021"}, torch.float32)
    loaded = load_checkpoint(tmp_path / "model.safetensors")
    for name, parameter in narrow.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name


def test_official_sizes_have_the_published_number_of_parameters():
    """198.19 MB and 2.9 MB of float32 by the public documentation; 4 206 144 numbers of the first file never
    run."""
    model = create_model("chen2021", quality=3)
    context = sum(p.numel() for p in model.context.parameters())
    quantiles = model.factorized_entropy_func.quantiles.numel()
    assert context == 702_537
    assert sum(p.numel() for p in model.parameters()) - context - quantiles == 51_936_643 - 4_206_144
    assert get_architecture("chen2021").lambda_for(3) == pytest.approx(0.0123, rel=0.01)


def test_mask_reads_what_comes_before_in_raster_order():
    layer = MaskedConv3d(1, 2, 3, padding=1)
    assert layer.mask[1, 0].flatten().tolist() == [1.0] * 13 + [0.0] * 14
    torch.manual_seed(0)
    volume = torch.randn(1, 1, 4, 5, 6, requires_grad=True)
    position = (2, 3, 1)
    (gradient,) = torch.autograd.grad(layer(volume)[0, 0][position], volume)
    reads = {tuple(index) for index in gradient[0, 0].nonzero().tolist()}
    assert reads and max(reads) < position
