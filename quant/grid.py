"""Static grids: where values become whole numbers, from real numbers or from another grid."""

from typing import Any

import torch
from torch import Tensor, nn

from licq.quant.config import FLOAT_BITS, SYMMETRY
from licq.quant.fixedpoint import (
    fixed_point_scale,
    int_range,
    power_of_two_scale,
    round_half_away,
    round_ste,
)
from licq.quant.primitives import add, constant, rescale
from licq.quant.qtensor import QTensor
from licq.quant.ranges import RangeSpec, sample
from licq.support.errors import InputError

_SAMPLES = (
    2**21
    # values kept for the range estimators: what clips is rare, and an estimator that has not seen it clips
    # too much
)
_FEWEST = 4096  # of them for each channel
NO_INTEGERS = "32-bit inputs or weights, so the model cannot be lowered; use at most 16 bits"
SECOND_DIGIT = 6  # bits at most that a split channel has more: enough, and accumulators stay inside 32 bits
SCALES = {"fixed_point": fixed_point_scale, "power_of_two": power_of_two_scale}
LATENT_HEADROOM = (
    4.0  # rounded latents have heavy tails: other images reach further than the calibration crops
)


class Grid(nn.Module):
    """A static uniform grid with a learnable range, eqs. 1, 3, 4 and 16.

    Whole numbers are held without their zero point: symmetric -(2^(b-1)-1) .. 2^(b-1)-1; channels with a zero
    point z use 0 .. 2^b - 1 and are held as -z .. 2^b - 1 - z, so that a product needs no correction.

    A channel may be split into two digits of b bits (low digits without a sign): its steps are `fine` times
    smaller and it reaches further than low and high. Numbers of a grid with split channels are in units of
    scale / `refinement`; those of other channels are multiples of `refinement`. A kernel sees the other
    channels, the high digits and the low digits, all with the same weights, and adds the three accumulators
    with two shifts.

    Args:
        bits: width; 32 passes values through.
        channel_dim: dimension with a scale of its own per index, or None for one scale.
        frac_bits: n_r of eq. 4.
        spec: range estimator.
        headroom: factor on the range, for grids that must not clip and are not learned.
        fixed: a scale that is given instead of found (power-of-two grids at the codec's boundaries).
        symmetry: which channels have a zero point: symmetric (none), one_sided (where one side is hardly
        used), asymmetric (all).
        scales: fixed_point (eqs. 3 and 4) or power_of_two.
    """

    def __init__(
        self,
        bits: int,
        frac_bits: int,
        channel_dim: int | None = None,
        spec: str = "max",
        headroom: float = 1.0,
        fixed: float | None = None,
        symmetry: str = "one_sided",
        scales: str = "fixed_point",
    ):
        super().__init__()
        self.bits, self.frac_bits, self.channel_dim = bits, frac_bits, channel_dim
        self.spec, self.headroom, self.symmetry = RangeSpec.parse(spec), headroom, symmetry
        self.fixed = fixed
        self.make_scale = SCALES[scales]
        self.pixels = False
        self.latent = False
        self.whole = True  # every value seen was a whole number
        self.exact = False  # the grid holds every value as it is; there is nothing to learn
        self.frozen = False
        self.droppable = False  # what reads it takes numbers that are not whole: sums of products
        self.register_parameter("border", None)  # see `start_border`
        self.border_dim = 1 if channel_dim is None else channel_dim
        self.log_n = nn.Parameter(
            torch.zeros(()), requires_grad=False
        )  # ln N: N stays positive, steps are relative
        self.register_buffer("low", torch.zeros(()))  # observed, per channel
        self.register_buffer("high", torch.zeros(()))
        self.register_buffer("energy", torch.zeros(()))  # mean square, per channel
        self.register_buffer(
            "split_steps", None
        )  # with split channels: how many steps of each channel are one of `scale`
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))  # valid once frozen, or when fixed
        self.register_buffer("qmin", torch.zeros(()))
        self.register_buffer("qmax", torch.zeros(()))
        self.ranges_only = False  # what is observed next does not count for the energy
        self._seen: tuple[Tensor, Tensor, Tensor] | None = (
            None  # lowest, highest, sum of squares: (channels,)
        )
        self._count = 0
        self._samples: list[Tensor] = []
        self._every = 1

    # -------------------------------------------------------------------------------------------- observation

    def _rows(self, x: Tensor) -> Tensor:
        if self.channel_dim is None:
            return x.reshape(1, -1)
        return x.movedim(self.channel_dim, 0).reshape(x.shape[self.channel_dim], -1)

    def observe(self, x: QTensor | Tensor, is_pixels: bool = False, is_latent: bool = False) -> None:
        """Take one batch of values into account. x: real values; image samples or rounded latents, or
        neither."""
        if self.fixed is not None or self.bits == FLOAT_BITS:
            return
        self.pixels, self.latent = self.pixels or is_pixels, self.latent or is_latent
        self.whole = self.whole and is_latent and bool((x == torch.round(x)).all())
        rows = self._rows(x.detach())
        energy = torch.zeros_like(rows[:, 0]) if self.ranges_only else rows.square().mean(1) * rows.shape[1]
        new = rows.amin(1), rows.amax(1), energy
        if self._seen is None:
            self._seen = new
        # in place: small tensors kept from every batch would cut the heap into pieces, gigabytes of them
        else:
            low, high, energy = self._seen
            torch.minimum(low, new[0], out=low)
            torch.maximum(high, new[1], out=high)
            energy.add_(new[2])
        self._count += 0 if self.ranges_only else rows.shape[1]
        if self.spec.method != "max":
            self._keep_some(rows)

    @property
    def channels_seen(self) -> int:
        """How many channels the observed values had; 0 before the first."""
        return 0 if self._seen is None else len(self._seen[0])

    def merge_channels(self) -> None:
        """One scale for all channels, from what was observed and what will be."""
        self.channel_dim = None
        if self._seen is not None:
            low, high, energy = self._seen
            self._seen = low.amin(0, keepdim=True), high.amax(0, keepdim=True), energy.sum(0, keepdim=True)
            self._count *= len(low)
            self._samples = [part.reshape(1, -1) for part in self._samples]

    def _keep_some(self, rows: Tensor) -> None:
        """One value of `_every` from every batch alike; when they become too many, half of them go, and of
        all to come."""
        most = max(_SAMPLES // rows.shape[0], _FEWEST)
        self._samples.append(sample(rows, max(1, rows.shape[1] // self._every)).clone())
        count = sum(part.shape[1] for part in self._samples)
        while count > most:
            count = -(-count // 2)
            self._samples = [sample(torch.cat(self._samples, dim=1), count)]
            self._every *= 2

    def initialize(self) -> None:
        """Ranges from what was observed; afterwards they are static."""
        if self.fixed is not None or self.bits == FLOAT_BITS:
            return
        if self._seen is None:
            raise RuntimeError("a grid saw no value in calibration")
        low, high, self.energy = (
            self._seen[0].clamp(max=0),
            self._seen[1].clamp(min=0),
            self._seen[2] / max(self._count, 1),
        )
        if self.pixels:
            low, high = torch.zeros_like(low), torch.ones_like(high)
        # a channel that was silent in calibration may speak later: give it a share of the loudest one's range
        peak = torch.maximum(-low, high)
        floor = peak.max().clamp(min=2**-8) * 2**-8
        silent = peak < floor
        low, high = torch.where(silent, -floor, low), torch.where(silent, floor, high)
        headroom = (
            1.0 if self.pixels else self.headroom
        )  # an image is not outside of 0..1, and 8 bits have its steps just so
        if self.latent:
            # eight bits have no room to spare
            headroom, self.symmetry = LATENT_HEADROOM if self.bits > 8 else headroom, "symmetric"
        self.low, self.high = low * headroom, high * headroom
        if self.channel_dim is None:
            self.low, self.high, self.energy = self.low[0], self.high[0], self.energy[0]
        self.log_n = nn.Parameter(torch.zeros_like(self.low), requires_grad=False)
        self.split_steps = None
        if self.latent and self.whole:
            self._hold_whole_numbers(peak)
        self.exact = self.exact or self.pixels
        if self._samples and not self.exact:
            self.log_n.data = torch.log(self._estimate(torch.cat(self._samples, dim=1), low, high)).reshape(
                self.log_n.shape
            )
        self._seen, self._count, self._samples, self._every, self.ranges_only = None, 0, [], 1, False

    def _estimate(self, samples: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """N per channel by the range estimator, from samples (channels, values) of a range low .. high.

        The estimators know one magnitude. Where a grid has a zero point, N shrinks both sides alike, so a
        value's magnitude is its share of the side it lies on; a side that is hardly used has small values,
        not large shares.
        """
        far, near = torch.maximum(-low, high), torch.minimum(-low, high)
        one_sided = near < SYMMETRY["one_sided"] * far
        shares = torch.where(
            samples < 0, samples / low.clamp(max=-1e-12)[:, None], samples / high.clamp(min=1e-12)[:, None]
        )
        alike = one_sided | (near >= SYMMETRY[self.symmetry] * far)
        magnitude = torch.where(alike[:, None], samples.abs() / far.clamp(min=1e-12)[:, None], shares)
        if self.spec.method == "sigma":  # of the values, not of their magnitudes
            magnitude = samples / far.clamp(min=1e-12)[:, None]
        signed = self.symmetry == "symmetric" or not bool(one_sided.any())
        return self.spec.estimate(magnitude, 0, self.bits, signed).to(samples).clamp(1e-3, 1.0)

    def _hold_whole_numbers(self, peak: Tensor) -> None:
        """Symbols without means: a step of 2^-k holds them all exactly, and k leaves what range it can to
        other images."""
        qmax = int_range(self.bits)[1]
        if peak.max() > qmax:
            return  # too few bits for that: an ordinary grid
        reach = (peak.clamp(min=1.0) * LATENT_HEADROOM).clamp(max=float(qmax))
        if self.channel_dim is None:
            reach = reach.max()
        step = torch.exp2(torch.ceil(torch.log2(reach / qmax))).clamp(max=1.0)
        self.low, self.high, self.exact = -step * qmax, step * qmax, True

    def _has_zero_point(self) -> Tensor:
        small, large = torch.minimum(-self.low, self.high), torch.maximum(-self.low, self.high)
        return small < SYMMETRY[self.symmetry] * large

    # ----------------------------------------------------------------------------------------------- the grid

    def split(self, channels: Tensor) -> None:
        """Carry these channels (bool, one per channel) by two digits of `bits` each.

        What the second digit adds goes to the step and to the range, see `split_shares`: with 8 bits a
        sixteenth of the step and four times the range.
        """
        finer, _ = split_shares(self.bits)
        self.split_steps = (
            torch.where(channels.to(self.low.device), float(finer), 1.0) if channels.any() else None
        )

    def start_border(self, channels: int) -> None:
        """Let the border of rounding be learned: a value goes up where its share of a step is at least 1/2 +
        border, one per channel.

        AQuant (Li et al. 2022) learns it as a function of the value; here it is a constant, which a whole
        number added to the accumulator before it is requantized can express, see `border_in`. The channels
        are those of dimension `border_dim`, also where they share one scale.
        """
        self.border = nn.Parameter(torch.zeros(channels, device=self.low.device), requires_grad=False)

    def border_in(self, scale: Tensor, step: Tensor, ndim: int) -> Tensor:
        """The border as a whole number in units of `scale`, to be taken off values of that scale; broadcasts
        to `ndim` dimensions."""
        return round_ste(self._border_for(ndim).double() * step / _broadcast(scale, ndim))

    def _border_for(self, ndim: int) -> Tensor:
        shape = [1] * ndim
        shape[self.border_dim % ndim] = -1
        return self.border.reshape(shape)

    @property
    def fine(self) -> Tensor:
        """How many steps of a channel are one of `scale`: () or (channels,)."""
        return torch.ones((), device=self.scale.device) if self.split_steps is None else self.split_steps

    @property
    def refinement(self) -> float:
        """The unit of numbers on the grid is scale / refinement; 1 without split channels."""
        return 1.0 if self.split_steps is None else float(split_shares(self.bits)[0])

    def parameters_of_grid(self) -> tuple[Tensor, Tensor, Tensor]:
        """(scale float64, qmin, qmax), each of shape () or (channels,); differentiable in log_n.

        The limits are in a channel's own steps, scale / fine.
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
            more = torch.ones((), device=self.low.device)  # steps, times those of an unsplit channel
            if self.split_steps is not None:
                more = torch.where(self.fine > 1, self.fine * split_shares(self.bits)[1], 1.0)
            signed_max, unsigned_max = signed_max * more, unsigned_max * more
            zero = round_half_away(-n * self.low.double() / scale * more).clamp(min=0).float()
            zero = torch.minimum(zero, unsigned_max)
            qmin = torch.where(shifted, -zero, -signed_max)
            qmax = torch.where(shifted, unsigned_max - zero, signed_max)
        return scale, qmin, qmax

    def freeze(self) -> None:
        """Make the ranges final; the learned factor has no say any more."""
        if self.fixed is None and self.bits != FLOAT_BITS:
            scale, qmin, qmax = self.parameters_of_grid()
            self.scale, self.qmin, self.qmax = scale.detach(), qmin.detach(), qmax.detach()
        self.frozen = True

    def thaw(self) -> None:
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
        fine = self.fine
        if scale.ndim:
            shape = self.shape_for(x_ndim)
            scale, qmin, qmax = scale.reshape(shape), qmin.reshape(shape), qmax.reshape(shape)
            fine = fine.reshape(shape) if fine.ndim else fine
        return scale, qmin, qmax, fine

    def forward(self, x: QTensor) -> QTensor:
        """x on this grid: whole numbers and their scale."""
        tracer = x.recorder
        if self.bits == FLOAT_BITS:
            if tracer is not None:
                raise InputError(f"{tracer.node} has {NO_INTEGERS}")
            return x.like(x.real(), None)
        scale, qmin, qmax, fine = self.parameters_for(x.ndim)
        refinement = self.refinement
        if refinement == 1 and x.is_integer and x.scale is scale:
            return x
        step = scale if refinement == 1 else scale / fine  # fine is a power of two
        ratio = None if refinement == 1 else refinement / fine
        dropping = x.runtime.dropping if self.droppable else None
        if not x.is_integer:
            q = self._rounded(x.q, step, qmin, qmax, tracer)
            if dropping is not None:
                q = dropping(q, (x.q / step).to(q.dtype))
            q = constant(q if ratio is None else q * ratio, tracer)
        else:
            multiplier = _broadcast(x.scale / step, x.ndim)
            numbers = x.q
            if self.border is not None:
                numbers = add(numbers, constant(-self.border_in(x.scale, step, x.ndim), tracer))
            if dropping is None:
                q = rescale(numbers, multiplier, qmin, qmax, ratio)
            else:
                q = rescale(numbers, multiplier, qmin, qmax)
                q = dropping(q, (x.q * multiplier).to(q.dtype))
                q = q if ratio is None else q * ratio
        return x.like(q, scale if refinement == 1 else scale / refinement)

    def _rounded(self, x: Tensor, step: Tensor, qmin: Tensor, qmax: Tensor, tracer: Any) -> Tensor:
        """Real numbers as integers in units of `step`."""
        shares = x / step
        if self.border is not None:
            if tracer is not None:
                raise InputError(
                    f"{tracer.node}: a constant meets a learned border, so the model cannot be lowered; "
                    "leave border out"
                )
            shares = shares - self._border_for(x.ndim)
        q = round_ste(shares.to(torch.float32))
        return torch.minimum(torch.maximum(q, qmin.to(q.dtype)), qmax.to(q.dtype)).to(torch.float32)

    def largest(self) -> Tensor:
        """The largest magnitude of a number on this grid, per channel or ()."""
        _, qmin, qmax = self.parameters_of_grid()
        return torch.maximum(-qmin, qmax) * (self.refinement / self.fine)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, channel_dim={self.channel_dim}" + (
            f", fixed={self.fixed}" if self.fixed else ""
        )


def _broadcast(multiplier: Tensor, ndim: int) -> Tensor:
    return (
        multiplier
        if multiplier.ndim in (0, ndim)
        else multiplier.reshape((1,) * (ndim - multiplier.ndim) + multiplier.shape)
    )


def split_shares(bits: int) -> tuple[int, int]:
    """(how much finer the steps of a split channel are, how much further it reaches): 16 and 4 from 6 bits,
    less below.

    A second digit adds at most `bits` bits, of which a third goes to the range.
    """
    more = min(SECOND_DIGIT, bits)
    reach = more // 3
    return 2 ** (more - reach), 2**reach
