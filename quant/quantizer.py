"""Quantizers: real numbers, or integers of another scale, become integers of a static grid."""

import torch
from torch import Tensor, nn

from licq.quant import fused_layers
from licq.quant.clipping import ClipCounter
from licq.quant.config import FLOAT_BITS, SYMMETRY
from licq.quant.fixedpoint import int_range, round_ste
from licq.quant.grid import Grid
from licq.quant.observer import RangeObserver
from licq.quant.primitives import add, constant, rescale
from licq.quant.qtensor import QTensor, Repeated
from licq.quant.ranges import RangeSpec
from licq.quant.symbols import Recorder
from licq.support.errors import InputError

NO_INTEGERS = "32-bit inputs or weights, so the model cannot be lowered; use at most 16 bits"

LATENT_HEADROOM = 4.0
"""Factor on the ranges of rounded latents. They have heavy tails: other images reach further than the
calibration crops."""


def room(bits: int) -> float:
    """The factor on an activation's range for its bits: 1 up to 8, twice as much for each four bits more.

    Other images reach further than calibration images. At 8 bits a wider range costs as much as what it no
    longer clips. With each bit more rounding errors are halved, and a quarter of that bit goes to the range.
    """
    return 2.0 ** (max(bits - 8, 0) / 4)


class Quantizer(Grid):
    """Rounds to a grid whose range is observed in calibration and may be learned.

    Args:
        spec: range estimator, see `quant.ranges`.
        headroom: factor on the range, for tensors that must not clip and whose range is not learned.
        bits, frac_bits, channel_dim, fixed, symmetry, scales: see `Grid`.

    Attributes:
        pixels, latent: every value was of an image, or some were of y_hat or z_hat.
        integers: every value was an integer.
        exact: the grid holds every value without error, so there is nothing to learn.
        allows_act_drop: QDrop may replace integers by the same numbers before rounding, since the result
        enters
            sums of products. `Runtime.act_drop` does it.
        widens: the range is multiplied by `room` of its bits.
        border: the learned rounding border of each channel, or None: a number goes up where its fraction is
        at
            least 1/2 + border.
        border_dim: the dimension of the border's channels.
        energy: mean square of each channel.
        ranges_only: what is observed from here on counts for the ends of the range alone.
        dead_share: a channel counts as zero where its largest value is below this share of 2^-8 of the
            tensor's largest. It gets 2^-8 of that as its range.
        clip_counter: while `quant.clipping.counting` lasts, it is told what is clipped.
    """

    border: nn.Parameter | None
    channel_dim: int | None
    energy: Tensor

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
        self.integers = True
        self.exact = False
        self.allows_act_drop = False
        self.widens = False
        self.register_parameter("border", None)
        self.border_dim = 1 if channel_dim is None else channel_dim
        self.register_buffer("energy", torch.zeros(()))
        self.ranges_only = False
        self.dead_share = 1.0
        self.clip_counter: ClipCounter | None = None
        self.observer = RangeObserver(self.spec.method != "max")

    # -------------------------------------------------------------------------------------------- observation

    def observe(self, x: Tensor, is_pixels: bool = False, is_latent: bool = False) -> None:
        """Take one batch of real values into account.

        Args:
            is_pixels: they are image samples. is_latent: they are y_hat or z_hat.
        """
        if self.fixed is not None or self.bits == FLOAT_BITS:
            return
        self.pixels, self.latent = self.pixels or is_pixels, self.latent or is_latent
        self.integers = self.integers and is_latent and bool((x == torch.round(x)).all())
        x = x.detach()
        ends = None if self.observer.keeps_samples else fused_layers.ends_of_channels(x, self.channel_dim)
        if ends is not None:
            self.observer.observe_ends(*ends, x.numel() // len(ends[0]), self.ranges_only)
            return
        if self.channel_dim is None:
            rows = x.reshape(1, -1)
        else:
            rows = x.movedim(self.channel_dim, 0).reshape(x.shape[self.channel_dim], -1)
        self.observer.observe(rows, self.ranges_only)

    @property
    def channels_seen(self) -> int:
        """How many channels the observed values had; 0 before the first batch."""
        return self.observer.channels

    def merge_channels(self) -> None:
        """Have one scale for all channels, from what was observed and what will be."""
        self.channel_dim = None
        self.observer.merge_channels()

    def initialize(self) -> None:
        """Set static ranges from what was observed.

        Raises:
            RuntimeError: nothing was observed.
        """
        if self.fixed is not None or self.bits == FLOAT_BITS:
            return
        observer = self.observer
        if observer.low is None or observer.high is None:
            raise RuntimeError("a quantizer saw no value in calibration")
        low, high, self.energy = observer.low.clamp(max=0), observer.high.clamp(min=0), observer.energy()
        if self.pixels:
            low, high = torch.zeros_like(low), torch.ones_like(high)
            self.symmetry = "one_sided"  # 256 codes, whatever the method does with activations
        # a channel of zeros in calibration may hold values later: it gets a share of the largest range
        peak = torch.maximum(-low, high)
        floor = peak.max().clamp(min=2**-8) * 2**-8
        is_zero = peak < floor * self.dead_share
        low, high = torch.where(is_zero, -floor, low), torch.where(is_zero, floor, high)
        # no image leaves 0..1, and its 256 values are the codes of 8 bits
        headroom = 1.0 if self.pixels else self.headroom * (room(self.bits) if self.widens else 1.0)
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

        An estimator works on magnitudes. Where a channel has a zero point, N shrinks both sides alike, so the
        magnitude of a value is its share of the side that it lies on. On a side that is hardly used, it is
        the share of the larger side.
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
        """Hold symbols without means exactly, by a step of 2^-k. k is the smallest that leaves them
        `LATENT_HEADROOM`."""
        qmax = int_range(self.bits)[1]
        if peak.max() > qmax:
            return  # too few bits for that: an ordinary scale
        reach = (peak.clamp(min=1.0) * LATENT_HEADROOM).clamp(max=float(qmax))
        if self.channel_dim is None:
            reach = reach.max()
        step = torch.exp2(torch.ceil(torch.log2(reach / qmax))).clamp(max=1.0)
        self.low, self.high, self.exact = -step * qmax, step * qmax, True

    # ---------------------------------------------------------------------------------------- rounding border

    def start_rounding_border(self, channels: int) -> None:
        """Let the rounding border of each channel be learned (AQuant, Li et al. 2022), from 0 on.

        AQuant learns the border as a function of the value. Here it is a constant: then the program can
        express it by an integer that is added to the accumulator before requantization
        (`rounding_border_in`). The channels are those of dimension `border_dim`, also where they share one
        scale.
        """
        self.border = nn.Parameter(torch.zeros(channels, device=self.low.device), requires_grad=False)

    def rounding_border_in(self, scale: Tensor, step: Tensor, ndim: int) -> Tensor:
        """The border as an integer in units of `scale`, to be subtracted from integers of that scale.

        It broadcasts to `ndim` dimensions. step: of this grid.
        """
        return round_ste(self._rounding_border_for(ndim).double() * step / _broadcast(scale, ndim))

    def _rounding_border_for(self, ndim: int) -> Tensor:
        shape = [1] * ndim
        shape[self.border_dim % ndim] = -1
        assert self.border is not None
        return self.border.reshape(shape)

    # ----------------------------------------------------------------------------------------------- rounding

    def forward(self, x: QTensor) -> QTensor:
        """x as integers of this grid; as real numbers where `bits` is 32.

        Raises:
            InputError: the forward is written down as a program, and `bits` is 32.
        """
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
        act_drop = x.runtime.act_drop if self.allows_act_drop else None
        if x.repeated is not None and self.border is None and self.clip_counter is None and act_drop is None:
            q = _before_repetition(x.repeated, step, qmin, qmax, ratio)
            if q is not None:
                return x.like(q, scale if refinement == 1 else scale / refinement)
        if x.scale is None:
            q = self._rounded(x.q, step, qmin, qmax, tracer)
            if act_drop is not None:
                q = act_drop(q, (x.q / step).to(q.dtype))
            q = constant(q if ratio is None else q * ratio, tracer)
        else:
            multiplier = _broadcast(x.scale / step, x.ndim)
            numbers = x.q
            if self.border is not None:
                numbers = add(numbers, constant(-self.rounding_border_in(x.scale, step, x.ndim), tracer))
            if self.clip_counter is not None:
                self.clip_counter.add(self, rescale(numbers, multiplier), qmin, qmax)
            if act_drop is None:
                q = rescale(numbers, multiplier, qmin, qmax, ratio)
            else:
                q = rescale(numbers, multiplier, qmin, qmax)
                q = act_drop(q, (x.q * multiplier).to(q.dtype))
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
                    f"{tracer.node}: a constant meets a learned rounding border, "
                    "so the model cannot be lowered; leave `border` out of `learn`"
                )
            shares = shares - self._rounding_border_for(x.ndim)
        q = round_ste(shares.to(torch.float32))
        if self.clip_counter is not None:
            self.clip_counter.add(self, q, qmin, qmax)
        return torch.minimum(torch.maximum(q, qmin.to(q.dtype)), qmax.to(q.dtype)).to(torch.float32)


def _before_repetition(
    repeated: Repeated, step: Tensor, qmin: Tensor, qmax: Tensor, ratio: Tensor | None
) -> Tensor | None:
    """The quantized numbers, requantized before they are repeated; None: the grid does not allow it."""
    values = (repeated.scale / step, qmin, qmax, *(() if ratio is None else (ratio,)))
    before = [known for value in values if (known := repeated.before(value)) is not None]
    return repeated.moved(rescale(repeated.numbers, *before)) if len(before) == len(values) else None


def _broadcast(multiplier: Tensor, ndim: int) -> Tensor:
    return (
        multiplier
        if multiplier.ndim in (0, ndim)
        else multiplier.reshape((1,) * (ndim - multiplier.ndim) + multiplier.shape)
    )
