"""Weight rounding schemes: from weights in steps, w / s, to integers, differentiably.

Every scheme is a module called as `rounding(w_over_s)` with a tensor of the weight's shape; it returns a
tensor of that shape and dtype, not yet clipped to the codes' range, with a gradient to w_over_s (and so to
the scale) where the scheme says so. `mask` (0/1, broadcast to the weight, or None) is fixed at construction:
a masked weight is exactly 0, before and after `harden()`, so that a masked convolution stays causal.
"""

import torch
from torch import Tensor, nn

from licq.quant import fused_layers
from licq.quant.fixedpoint import round_ste
from licq.support.errors import InputError


class Rounding(nn.Module):
    """What all schemes share: the mask, and a state that `harden()` makes final."""

    starts_anywhere = False
    """Learning can start at any integer, not only at the neighbours of w/s."""

    hardened: bool

    def __init__(self, w_over_s: Tensor, mask: Tensor | None = None):
        super().__init__()
        self.hardened = False
        unmasked = None if mask is None else (mask.detach() != 0).expand(w_over_s.shape)
        self.unmasked: Tensor | None
        self.register_buffer("unmasked", unmasked, persistent=False)

    def forward(self, w_over_s: Tensor) -> Tensor:
        rounded = self.round(w_over_s)
        return rounded if self.unmasked is None else torch.where(self.unmasked, rounded, 0.0)

    def round(self, w_over_s: Tensor) -> Tensor:
        raise NotImplementedError

    def quantized(self, w: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor | None:
        """The scheme at w / scale, clipped, in one pass; None: there is no such pass.

        Args:
            w: (outputs, ...), float32. scale: (outputs,) or (), float64.
        """
        return None

    def regularizer(self, beta: float) -> Tensor | float:
        """What a scheme adds to the loss so that its results become integers; 0 where they are integers."""
        return 0.0

    def start_at(self, integers: Tensor, w_over_s: Tensor) -> None:
        """Start at these integers instead of those nearest to w/s. Only where `starts_anywhere`."""
        raise NotImplementedError

    def harden(self) -> None:
        """End learning: from here on the results are integers, and no parameter takes a gradient."""
        self.hardened = True
        self.requires_grad_(False)


class Nearest(Rounding):
    """round(w/s), halves away from zero; straight-through gradient to w/s. Nothing is learned."""

    def round(self, w_over_s: Tensor) -> Tensor:
        return round_ste(w_over_s)


class AdaRound(Rounding):
    """floor(w/s) + h(V), h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1), V learned (Nagel et al.,
    2020).

    V starts where h(V) is the fractional part of w/s, so the scheme starts at the unrounded weight. Until
    `harden()` the result is *not* an integer: h lies between 0 and 1 and `regularizer` drives it to the ends.
    After it, the result is floor(w/s) + {0, 1}, up where h(V) >= 0.5. The floor is the one at construction:
    were it to follow a learned scale, a weight would jump by a whole step wherever it passes an integer. Such
    a scale has its gradient from s * code.
    """

    zeta = 1.1
    gamma = -0.1

    def __init__(self, w_over_s: Tensor, mask: Tensor | None = None):
        super().__init__(w_over_s, mask)
        w_over_s = w_over_s.detach()
        fraction = w_over_s - w_over_s.floor()
        sigmoid = (fraction - self.gamma) / (self.zeta - self.gamma)
        self.V = nn.Parameter(torch.logit(sigmoid))
        self.base: Tensor | None  # None while a file is read
        self.register_buffer("base", w_over_s.floor())

    def h(self) -> Tensor:
        """The soft upward steps, 0 to 1, of the weight's shape."""
        return (torch.sigmoid(self.V) * (self.zeta - self.gamma) + self.gamma).clamp(0, 1)

    def round(self, w_over_s: Tensor) -> Tensor:
        assert self.base is not None
        return self.base + ((self.V >= 0).to(self.base.dtype) if self.hardened else self.h())

    def regularizer(self, beta: float) -> Tensor:
        """sum over unmasked weights of 1 - |2 h(V) - 1|^beta: 0 when every h is 0 or 1, one a weight at h =
        0.5."""
        terms = 1 - (2 * self.h() - 1).abs().pow(beta)
        return (terms if self.unmasked is None else torch.where(self.unmasked, terms, 0.0)).sum()


class StraightThrough(Rounding):
    """round(v), v a learned copy of the weight in integer units, straight-through gradient to v.

    The codes do not depend on w/s after construction; a learned scale gets its gradient from s * code alone.
    """

    starts_anywhere = True

    def __init__(self, w_over_s: Tensor, mask: Tensor | None = None):
        super().__init__(w_over_s, mask)
        self.v = nn.Parameter(w_over_s.detach().clone())

    def round(self, w_over_s: Tensor) -> Tensor:
        return round_ste(self.v)

    def start_at(self, integers: Tensor, w_over_s: Tensor) -> None:
        self.v.data = integers.clone()


class LearnedOffset(Rounding):
    """Eq. 14: round(w/s + v), v learned from 0, straight-through gradient to v and w/s."""

    starts_anywhere = True

    def __init__(self, w_over_s: Tensor, mask: Tensor | None = None):
        super().__init__(w_over_s, mask)
        self.v = nn.Parameter(torch.zeros_like(w_over_s.detach()))

    def round(self, w_over_s: Tensor) -> Tensor:
        return round_ste(w_over_s + self.v)

    def quantized(self, w: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor | None:
        return fused_layers.rounded_weights(w, scale, self.v, self.unmasked, qmin, qmax)

    def start_at(self, integers: Tensor, w_over_s: Tensor) -> None:
        self.v.data = integers - w_over_s


ROUNDINGS = {
    "nearest": Nearest,
    "adaround": AdaRound,
    "ste": StraightThrough,
    "learned_offset": LearnedOffset,
}


def make_rounding(name: str, w_over_s: Tensor, mask: Tensor | None = None) -> Rounding:
    """The scheme called `name`, started at the weight `w_over_s` (in integer units). Raises InputError."""
    if name not in ROUNDINGS:
        raise InputError(f"`rounding={name}` is unknown; choose from {', '.join(ROUNDINGS)}")
    return ROUNDINGS[name](w_over_s, mask)


def temperature(step: int, steps: int, start: float = 20.0, end: float = 2.0, warmup: float = 0.2) -> float:
    """beta of `AdaRound.regularizer` at `step` of `steps`: `start` during the warm-up share, then down to
    `end`.

    Linear, and `end` from the last step on. Callers leave the regularizer out while step < warmup * steps.
    """
    begin = warmup * steps
    if step < begin:
        return start
    progress = min((step - begin) / max(steps - 1 - begin, 1e-9), 1.0)
    return start + (end - start) * progress
