"""Static grids: the scale, zero point and bits of integers, per tensor or per channel."""

import torch
from torch import Tensor, nn

from licq.quant import unchanged
from licq.quant.channel_split import more_steps, split_shares, split_steps
from licq.quant.config import FLOAT_BITS, SYMMETRY
from licq.quant.fixedpoint import SCALES, int_range, round_half_away


class Grid(nn.Module):
    """A static uniform grid with a learnable range (eqs. 1, 3, 4 and 16): scale, zero point and bits.

    Integers are held without their zero point. A symmetric channel has -(2^(b-1)-1) .. 2^(b-1)-1. A channel
    with the zero point z has the codes 0 .. 2^b-1, held as -z .. 2^b-1-z, so that a product needs no
    correction.

    With split channels (`quant.channel_split`), integers are in units of scale / `refinement`. Those of
    channels that are not split are multiples of `refinement`.

    Args:
        bits: b, from 2 to 16; 32 passes values through.
        frac_bits: n_r of eq. 4.
        channel_dim: the dimension along which each index has its own scale; None: one scale.
        fixed: a given scale, as at the codec's boundaries.
        symmetry: which channels have a zero point; see `QuantConfig.a_symmetry`.
        scales: "fixed_point" (eqs. 3 and 4) or "power_of_two".
    """

    log_n: nn.Parameter
    low: Tensor
    high: Tensor
    split_steps: Tensor | None
    scale: Tensor
    qmin: Tensor
    qmax: Tensor

    def __init__(
        self,
        bits: int,
        frac_bits: int,
        channel_dim: int | None = None,
        fixed: float | None = None,
        symmetry: str = "one_sided",
        scales: str = "fixed_point",
    ):
        super().__init__()
        self.bits, self.frac_bits, self.channel_dim = bits, frac_bits, channel_dim
        self.fixed, self.symmetry = fixed, symmetry
        self.make_scale = SCALES[scales]
        self.frozen = False
        # what `parameters_of_grid` gave last, and of which values
        self._known: tuple[tuple, tuple[Tensor | None, ...], tuple[Tensor, Tensor, Tensor]] | None = None
        # ln N: N stays positive, steps are relative
        self.log_n = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.register_buffer("low", torch.zeros(()))  # ends of the range at N = 1, per channel
        self.register_buffer("high", torch.zeros(()))
        # with split channels: how many steps of each channel make one of `scale`
        self.register_buffer("split_steps", None)
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))  # valid once frozen, or when fixed
        self.register_buffer("qmin", torch.zeros(()))
        self.register_buffer("qmax", torch.zeros(()))

    def _has_zero_point(self) -> Tensor:
        small, large = torch.minimum(-self.low, self.high), torch.maximum(-self.low, self.high)
        return small < SYMMETRY[self.symmetry] * large

    def split(self, channels: Tensor) -> None:
        """Represent these channels by two digits of `bits` each. channels: bool, (channels,)."""
        self.split_steps = split_steps(channels.to(self.low.device), self.bits)

    @property
    def fine(self) -> Tensor:
        """How many steps of each channel make one step of `scale`: () or (channels,)."""
        return torch.ones((), device=self.scale.device) if self.split_steps is None else self.split_steps

    @property
    def refinement(self) -> float:
        """The unit of integers is scale / refinement; 1 without split channels."""
        return 1.0 if self.split_steps is None else float(split_shares(self.bits)[0])

    def parameters_of_grid(self) -> tuple[Tensor, Tensor, Tensor]:
        """(scale float64, qmin, qmax), each of shape () or (channels,); the scale is differentiable in log_n.

        The limits are in steps of the channel, scale / fine.
        """
        if self.fixed is not None:
            qmin, qmax = int_range(self.bits) if self.bits <= 16 else (-(2**23), 2**23)
            like = self.low
            return (
                torch.as_tensor(self.fixed, dtype=torch.float64, device=like.device),
                like.new_tensor(qmin),
                like.new_tensor(qmax),
            )
        if self.frozen:
            return self.scale, self.qmin, self.qmax
        return unchanged.once(self, self._present_parameters, self.log_n)

    def _present_parameters(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.log_n.device.type != "cpu" or (torch.is_grad_enabled() and self.log_n.requires_grad):
            return self._computed_parameters()
        # by values, not by versions: `.data` changes those without telling
        inputs = (self.log_n, self.low, self.high, self.split_steps)
        key = (self.bits, self.symmetry, self.make_scale, self.frac_bits)
        known = self._known
        if known is None or known[0] != key or not all(map(_same, known[1], inputs)):
            values = tuple(None if x is None else x.detach().clone() for x in inputs)
            with torch.no_grad():
                self._known = known = key, values, self._computed_parameters()
        return known[2]

    def _computed_parameters(self) -> tuple[Tensor, Tensor, Tensor]:
        n = torch.exp(self.log_n.double())
        shifted = self._has_zero_point()
        signed_max, unsigned_max = float(int_range(self.bits)[1]), float(2**self.bits - 1)
        span = torch.where(
            shifted,
            (self.high - self.low).double() / unsigned_max,
            torch.maximum(-self.low, self.high).double() / signed_max,
        )
        scale = self.make_scale(n * span, self.frac_bits)
        with torch.no_grad():
            more = more_steps(self.split_steps, self.bits)
            more = more if isinstance(more, Tensor) else torch.ones((), device=self.low.device)
            signed_max, unsigned_max = signed_max * more, unsigned_max * more
            zero = round_half_away(-n * self.low.double() / scale * more).clamp(min=0).float()
            zero = torch.minimum(zero, unsigned_max)
            qmin = torch.where(shifted, -zero, -signed_max)
            qmax = torch.where(shifted, unsigned_max - zero, signed_max)
        return scale, qmin, qmax

    def freeze(self) -> None:
        """Make the scale and the limits final; `log_n` is not read any more."""
        if self.fixed is None and self.bits != FLOAT_BITS:
            scale, qmin, qmax = self.parameters_of_grid()
            self.scale, self.qmin, self.qmax = (t.detach().clone() for t in (scale, qmin, qmax))
        self.frozen = True

    def thaw(self) -> None:
        """Undo `freeze`."""
        self.frozen = False

    def shape_for(self, x_ndim: int) -> list[int]:
        """The shape that lets a per-channel vector broadcast against a tensor of `x_ndim` dimensions."""
        shape = [1] * x_ndim
        if self.channel_dim is not None:
            shape[self.channel_dim % x_ndim] = -1
        return shape

    def parameters_for(self, x_ndim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(scale, qmin, qmax, fine), shaped to broadcast against a tensor of `x_ndim` dimensions."""
        scale, qmin, qmax = self.parameters_of_grid()
        if scale.ndim:
            scale = scale.reshape(self.shape_for(x_ndim))
        elif not self.frozen and self.fixed is None:
            scale = scale.view(())  # each call gives another object: numbers of it may have been added since
        kept = None if self.frozen else unchanged.memory(self.log_n)
        if kept is None:
            return scale, *self._limits_for(x_ndim, qmin, qmax)
        if (self, x_ndim) not in kept:
            kept[self, x_ndim] = limits = self._limits_for(x_ndim, qmin, qmax)
            unchanged.keep(kept, *limits)
        return scale, *kept[self, x_ndim]

    def _limits_for(self, x_ndim: int, qmin: Tensor, qmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fine = self.fine
        if not qmin.ndim:
            return qmin, qmax, fine
        shape = self.shape_for(x_ndim)
        return qmin.reshape(shape), qmax.reshape(shape), fine.reshape(shape) if fine.ndim else fine

    def largest(self) -> Tensor:
        """The largest magnitude of an integer of this grid: () or (channels,)."""
        _, qmin, qmax = self.parameters_of_grid()
        return torch.maximum(-qmin, qmax) * (self.refinement / self.fine)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, channel_dim={self.channel_dim}" + (
            f", fixed={self.fixed}" if self.fixed else ""
        )


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and a.device == b.device and torch.equal(a, b))
