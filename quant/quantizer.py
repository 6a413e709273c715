"""Quantizers: values become integers on a static grid, from real numbers or from another grid."""

import torch
from torch import Tensor, nn

from licq.quant.config import FLOAT_BITS, SYMMETRY
from licq.quant.fixedpoint import int_range, round_ste
from licq.quant.grid import Grid
from licq.quant.observer import RangeObserver
from licq.quant.primitives import add, constant, rescale
from licq.quant.qtensor import QTensor
from licq.quant.ranges import RangeSpec
from licq.quant.symbols import Recorder
from licq.support.errors import InputError

NO_INTEGERS = "32-bit inputs or weights, so the model cannot be lowered; use at most 16 bits"

LATENT_HEADROOM = 4.0
"""Rounded latents have heavy tails: other images reach further than the calibration crops."""


class Quantizer(Grid):
    """Rounds to a grid whose range was observed in calibration, and may be learned.

    Args:
        spec: range estimator, see `quant.ranges`.
        headroom: factor on the range, for grids that must not clip and are not learned.
        bits, frac_bits, channel_dim, fixed, symmetry, scales: the grid's, see `Grid`.
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
        super().__init__(bits, frac_bits, channel_dim, fixed, symmetry, scales)
        self.spec, self.headroom = RangeSpec.parse(spec), headroom
        self.pixels = False
        self.latent = False
        self.integers = True  # every value seen was an integer
        self.exact = False  # the grid holds every value as it is; there is nothing to learn
        self.droppable = False  # what reads it takes numbers that are no integers: sums of products
        self.register_parameter("border", None)  # see `start_border`
        self.border_dim = 1 if channel_dim is None else channel_dim
        self.register_buffer("energy", torch.zeros(()))  # mean square, per channel
        self.ranges_only = False  # what is observed next does not count for the energy
        self.observer = RangeObserver(self.spec.method != "max")

    # -------------------------------------------------------------------------------------------- observation

    def observe(self, x: Tensor, is_pixels: bool = False, is_latent: bool = False) -> None:
        """Take one batch of real values into account: image samples, rounded latents, or neither."""
        if self.fixed is not None or self.bits == FLOAT_BITS:
            return
        self.pixels, self.latent = self.pixels or is_pixels, self.latent or is_latent
        self.integers = self.integers and is_latent and bool((x == torch.round(x)).all())
        x = x.detach()
        if self.channel_dim is None:
            rows = x.reshape(1, -1)
        else:
            rows = x.movedim(self.channel_dim, 0).reshape(x.shape[self.channel_dim], -1)
        self.observer.observe(rows, self.ranges_only)

    @property
    def channels_seen(self) -> int:
        """How many channels the observed values had; 0 before the first."""
        return self.observer.channels

    def merge_channels(self) -> None:
        """One scale for all channels, from what was observed and what will be."""
        self.channel_dim = None
        self.observer.merge_channels()

    def initialize(self) -> None:
        """Ranges from what was observed; afterwards they are static."""
        if self.fixed is not None or self.bits == FLOAT_BITS:
            return
        observer = self.observer
        if observer.low is None or observer.high is None:
            raise RuntimeError("a quantizer saw no value in calibration")
        low, high, self.energy = observer.low.clamp(max=0), observer.high.clamp(min=0), observer.energy()
        if self.pixels:
            low, high = torch.zeros_like(low), torch.ones_like(high)
        # a channel that was silent in calibration may speak later: give it a share of the loudest one's range
        peak = torch.maximum(-low, high)
        floor = peak.max().clamp(min=2**-8) * 2**-8
        silent = peak < floor
        low, high = torch.where(silent, -floor, low), torch.where(silent, floor, high)
        # an image is not outside of 0..1, and 8 bits have its steps just so
        headroom = 1.0 if self.pixels else self.headroom
        if self.latent:
            # eight bits have no room to spare
            headroom, self.symmetry = LATENT_HEADROOM if self.bits > 8 else headroom, "symmetric"
        self.low, self.high = low * headroom, high * headroom
        if self.channel_dim is None:
            self.low, self.high, self.energy = self.low[0], self.high[0], self.energy[0]
        self.log_n = nn.Parameter(torch.zeros_like(self.low), requires_grad=False)
        self.split_steps = None
        if self.latent and self.integers:
            self._hold_integers(peak)
        self.exact = self.exact or self.pixels
        samples = observer.samples()
        if samples is not None and not self.exact:
            n = self._estimate(samples, low, high)
            self.log_n.data = torch.log(n).reshape(self.log_n.shape)
        self.observer, self.ranges_only = RangeObserver(self.spec.method != "max"), False

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

    def _hold_integers(self, peak: Tensor) -> None:
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

    # --------------------------------------------------------------------------------------- rounding borders

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

    # ----------------------------------------------------------------------------------------------- rounding

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

    def _rounded(
        self, x: Tensor, step: Tensor, qmin: Tensor, qmax: Tensor, tracer: Recorder | None
    ) -> Tensor:
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


def _broadcast(multiplier: Tensor, ndim: int) -> Tensor:
    return (
        multiplier
        if multiplier.ndim in (0, ndim)
        else multiplier.reshape((1,) * (ndim - multiplier.ndim) + multiplier.shape)
    )
