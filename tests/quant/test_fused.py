import pytest
import torch

from licq.quant import fused, fused_layers
from licq.quant.fixedpoint import Limits, quantize_multiplier, requantize_ste
from licq.quant.primitives import gdn
from licq.quant.rounding import LearnedOffset

pytestmark = pytest.mark.skipif(fused.kernels() is None, reason="no compiled kernels")


def integers(shape, largest: float, seed: int, dtype=torch.float32) -> torch.Tensor:
    """Small and large integers of either sign, zeros, and what lies at the end of float32's integers."""
    generator = torch.Generator().manual_seed(seed)
    exponent = torch.rand(shape, generator=generator, dtype=torch.float64) * torch.log2(torch.tensor(largest))
    x = torch.round(torch.exp2(exponent)) * (torch.randint(0, 2, shape, generator=generator) * 2 - 1)
    return torch.where(torch.rand(shape, generator=generator) < 0.1, 0.0, x).to(dtype)


def both(run) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    with fused.switched_off():
        expected = run()
    return run(), expected


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, -0.0 apart from 0.0."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8))
    )


SHAPES = {
    "channels of pictures": ((2, 5, 37, 131), (1, 5, 1, 1)),
    "channels side by side": ((3, 301, 17), (17,)),
    "images": ((3, 4, 9, 9), (3, 1, 1, 1)),
    "one": ((2, 5, 70, 70), ()),
    "one number": ((1, 1, 1, 1), (1, 1, 1, 1)),
    "rows and columns": ((2, 3, 5, 7), (1, 3, 1, 7)),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("limited", [False, True])
def test_the_kernel_requantizes_as_pytorch_does_to_the_bit(name, dtype, limited):
    shape, channels = SHAPES[name]
    generator = torch.Generator().manual_seed(1)
    largest = 2.0**24 - 1 if dtype == torch.float32 else 2.0**31 - 1
    for seed, spread in enumerate((0.0, -12.0, -30.0)):
        acc = integers(shape, largest, seed, dtype).requires_grad_()
        exponent = torch.randint(-20, 4, channels, generator=generator).double() + spread
        # powers of two and three halves have ties
        step = torch.randint(2, 4, channels, generator=generator) / 2
        multiplier = (step * torch.exp2(exponent)).requires_grad_()
        low = -torch.randint(0, 200, channels, generator=generator).float()
        limits = Limits(low, low + 255) if limited else None
        refinement = torch.exp2(torch.randint(0, 4, channels, generator=generator)) if limited else None
        gradient = torch.randn(shape, generator=generator)

        def run(given=(acc, multiplier, limits, refinement), gradient=gradient):
            out = requantize_ste(*given)
            grads = torch.autograd.grad(out, given[:2], gradient.to(out.dtype))
            return [out.detach(), *grads]

        (out, grad_acc, grad_multiplier), expected = both(run)
        assert same_bytes(out, expected[0])
        assert torch.allclose(grad_acc, expected[1], rtol=1e-6, atol=0)
        assert torch.allclose(grad_multiplier, expected[2], rtol=1e-4, atol=1e-3 * expected[2].abs().max())


def test_the_kernel_takes_strides_and_any_multiplier():
    acc = integers((2, 40, 30, 6), 2.0**20, 3).permute(0, 3, 1, 2)
    multiplier = torch.rand(6, 1, 1, dtype=torch.float64) + 1e-3
    (out,), (expected,) = both(lambda: [requantize_ste(acc, multiplier)])
    assert same_bytes(out, expected)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("inf"), float("nan")])
def test_a_multiplier_that_is_not_positive_is_refused_by_the_kernel_too(bad):
    with pytest.raises(ValueError, match="positive and finite"):
        requantize_ste(torch.ones(3), torch.tensor([1.0, bad, 1.0], dtype=torch.float64))


def test_one_thread_and_several_give_the_same_sums():
    acc = integers((2, 3, 200, 200), 2.0**20, 5).requires_grad_()
    multiplier = torch.full((1, 3, 1, 1), 0.3, dtype=torch.float64, requires_grad=True)
    before, sums = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out = requantize_ste(acc, multiplier)
            sums.append(torch.autograd.grad((out * out.detach()).sum(), multiplier)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*sums)


def test_weights_round_alike_with_their_mask_and_their_gradients():
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(5, 3, 3, 3, generator=generator)
    rounding = LearnedOffset(w * 40, torch.rand(w.shape, generator=generator) > 0.3)
    rounding.v.data = torch.randn(w.shape, generator=generator)
    scale = (torch.rand(5, generator=generator, dtype=torch.float64) * 0.02 + 0.01).requires_grad_()
    gradient = torch.randn(w.shape, generator=generator)

    def run():
        w_int = rounding.quantized(w, scale, -127, 127)
        if w_int is None:
            w_int = rounding((w / scale.reshape(-1, 1, 1, 1)).float()).clamp(-127, 127)
        return [w_int.detach(), *torch.autograd.grad(w_int, (rounding.v, scale), gradient)]

    (w_int, grad_v, grad_scale), expected = both(run)
    assert same_bytes(w_int, expected[0]) and bool((w_int.abs() == 127).any())
    assert torch.allclose(grad_v, expected[1])
    assert torch.allclose(grad_scale, expected[2], rtol=1e-4)


@pytest.mark.parametrize("algorithm", ["gdn", "gdn1"])
@pytest.mark.parametrize("inverse", [False, True])
def test_gdn_is_alike_to_the_bit_and_its_gradient_nearly(algorithm, inverse):
    x = integers((2, 3, 40, 41), 2.0**15 - 1, 1).requires_grad_()
    norm = integers(x.shape, 2.0**36, 2, torch.float64).abs().requires_grad_()
    real = torch.tensor([0.7, 300.0, 2.0**12], dtype=torch.float64).reshape(1, 3, 1, 1)
    slope = real * (2.0**-18 if inverse and algorithm == "gdn" else 2.0**-36 if inverse else 1.0)
    mantissa, shift = quantize_multiplier(slope)
    slope.requires_grad_()
    high = torch.full((1, 3, 1, 1), 32767.0)
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))

    def run():
        out = gdn(x, norm, mantissa, shift, inverse, algorithm, -high, high, slope)
        return [out.detach(), *torch.autograd.grad(out, (x, norm, slope), gradient)]

    (out, *gradients), expected = both(run)
    assert torch.equal(out, expected[0])
    inside = (out.abs() < 32767) & (norm != 1)
    for ours, theirs in zip(gradients[:2], expected[1:3]):
        difference = (ours - theirs)[inside].abs()
        assert bool((difference <= 1e-4 * theirs[inside].abs() + 1e-12).all())


@pytest.mark.parametrize("dim", [None, 1, -1])
def test_ends_of_channels_are_those_of_every_layout(dim):
    x = torch.randn(2, 5, 300, 7, generator=torch.Generator().manual_seed(4)).transpose(1, 2)
    low, high, squares = fused_layers.ends_of_channels(x, dim)
    rows = x.reshape(1, -1) if dim is None else x.movedim(dim, 0).reshape(x.shape[dim], -1)
    assert torch.equal(low, rows.amin(1)) and torch.equal(high, rows.amax(1))
    assert torch.allclose(squares, rows.square().sum(1), rtol=1e-4)
