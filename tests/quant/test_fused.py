import pytest
import torch

from licq.quant import fused
from licq.quant.fixedpoint import Limits, requantize_ste

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
    return a.dtype == b.dtype and a.shape == b.shape and a.contiguous().view(torch.uint8).equal(
        b.contiguous().view(torch.uint8)
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

        def run():
            out = requantize_ste(acc, multiplier, limits, refinement)
            grads = torch.autograd.grad(out, (acc, multiplier), gradient.to(out.dtype))
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
