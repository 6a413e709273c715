"""The settings of a quantization, validated where they are built and written out whole into every result."""

import dataclasses
import re
from typing import Any

from licq.quant.ranges import RangeSpec
from licq.quant.rounding import ROUNDINGS
from licq.support.errors import InputError

FLOAT_BITS = 32
# an activation's channel has a zero point when its smaller side is below this share of the larger
SYMMETRY = {"symmetric": 0.0, "one_sided": 0.25, "asymmetric": 1.01}


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """Design section 3. Every field has a default that suits W8A8.

    w_bits, a_bits: bits of weights and of the inputs of multiply-accumulate layers, 2..16; 32 leaves them in
    float.
    bias_bits:      32, whole numbers at the accumulator's scale; or 8, eqs. 17 and 19 with rescaling.
    w_range, a_range: estimators of the first ranges: max, mse, lpP, percentileP, sigmaK.
    a_granularity:  "channel": a scale per input channel, folded into the weights that consume it (eq. 16);
                    "tensor": one scale per tensor.
    a_symmetry:     which inputs of multiply-accumulate layers have a zero point: "asymmetric" all,
    "one_sided" the channels
                    whose smaller side is below a quarter of the larger, "symmetric" none.
    w_granularity:  "channel" (per output channel, eq. 15), "tensor", or "groupsK": output channels in order
    of their ranges, in K
                    groups of as equal ranges as can be (`quant.transforms.range_groups`), a scale for each.
    transform:      the spread of the per-channel scales of a layer's inputs. "fold": each channel's own
    range, all folded into the
                    weights; "equalize": between none and that, where the predicted noise of weights and
                    activations together is least; "smooth": max|x|^alpha / max|w|^(1 - alpha) (SmoothQuant,
                    Xiao et al. 2023); "ptf": powers of two times one scale (power-of-two factor, FQ-ViT, Lin
                    et al. 2022). See `quant.transforms`.
    smooth_alpha:   alpha of "smooth".
    scales:         "fixed_point" (eqs. 3 and 4) or "power_of_two", for weights and inputs: requantization is
    a shift then.
    accumulator_bits: the scale of a layer's weights is raised until its sums provably fit; 0 only states the
    bound.
    softmax:        probabilities of attention: "linear", on the grid of a_bits; "log2" or "log_sqrt2",
    2^softmax_bits levels at the
                    powers of 1/2 or of its root (FQ-ViT; RepQ-ViT, Li et al. 2023), down to 2^-14.
    rounding:       nearest | adaround | ste | learned_offset.
    carrier_bits:   fixed point between multiply-accumulate layers, where tensors are added, multiplied or
    normalized.
    table_bits:     index of the tables of elementwise functions.
    latent_bits:    inputs of layers that read y_hat or z_hat, where that is more than a_bits. Latents have
    heavy tails: on
                    other images they reach several times as far as on the calibration crops, and a clipped
                    symbol is seen. Up to 16 bits are two 8-bit digits in an int8 kernel, at 1/256 of the
                    pixels or less.
    boundary_bits:  fractional bits of y, z, means and scales at the codec's boundaries.
    strict_int8:    8 bits on every stored tensor, as the paper does (sets carrier_bits, table_bits,
    latent_bits to 8; to a_bits where
                    activations have 9 to 16).
    frac_bits:      n_r of eqs. 3 and 4.
    a_headroom:     first ranges of activations reach to this multiple of what the estimator says.
    headroom:       carriers reach to this multiple of the largest value seen in calibration.
    """

    w_bits: int = 8
    a_bits: int = 8
    bias_bits: int = 32
    w_range: str = "max"
    a_range: str = "max"
    a_granularity: str = "channel"
    a_symmetry: str = "asymmetric"
    w_granularity: str = "channel"
    transform: str = "equalize"
    rounding: str = "nearest"
    carrier_bits: int = 16
    table_bits: int = 12
    latent_bits: int = 14
    boundary_bits: int = 12
    strict_int8: bool = False
    smooth_alpha: float = 0.5
    scales: str = "fixed_point"
    accumulator_bits: int = 0
    softmax: str = "linear"
    softmax_bits: int = 4
    frac_bits: int = 24
    a_headroom: float = 1.1
    headroom: float = 2.0

    def __post_init__(self):
        for name in ("w_bits", "a_bits"):
            bits = getattr(self, name)
            if bits != FLOAT_BITS and not 2 <= bits <= 16:
                raise InputError(f"--{name} {bits} is out of range; choose 2 to 16, or 32 for float")
        if self.bias_bits not in (8, 32):
            raise InputError(f"--bias_bits {self.bias_bits} is not possible; choose 32 or 8")
        one_of("a_granularity", self.a_granularity, ("channel", "tensor"))
        one_of("a_symmetry", self.a_symmetry, tuple(SYMMETRY))
        if not re.fullmatch(r"channel|tensor|groups[1-9]\d*", self.w_granularity):
            raise InputError(
                f"w_granularity {self.w_granularity!r} is unknown; choose channel, tensor, or groups4 for four groups"
            )
        if self.transform == "split":
            raise InputError(
                "channel splitting goes with every transform and is a knob of its own; use --set split=0.1, the share of operations it may add"
            )
        one_of("transform", self.transform, ("equalize", "fold", "smooth", "ptf"))
        one_of("scales", self.scales, ("fixed_point", "power_of_two"))
        one_of("softmax", self.softmax, ("linear", "log2", "log_sqrt2"))
        if self.accumulator_bits and not 16 <= self.accumulator_bits <= 48:
            raise InputError(
                f"accumulator_bits {self.accumulator_bits} is out of range; choose 16 to 48, or 0 for no limit"
            )
        if not 0 <= self.smooth_alpha <= 1:
            raise InputError(f"smooth_alpha {self.smooth_alpha} is out of range; choose 0 to 1")
        one_of("rounding", self.rounding, tuple(ROUNDINGS))
        RangeSpec.parse(self.w_range)
        RangeSpec.parse(self.a_range)
        if self.strict_int8:
            bits = self.a_bits if 8 < self.a_bits <= 16 else 8
            for name in ("carrier_bits", "table_bits", "latent_bits"):
                object.__setattr__(self, name, bits)
        for name in ("carrier_bits", "table_bits", "latent_bits", "softmax_bits"):
            if not 2 <= getattr(self, name) <= 16:
                raise InputError(f"{name} {getattr(self, name)} is out of range; choose 2 to 16")
        if not 4 <= self.boundary_bits <= 16:
            raise InputError(f"boundary_bits {self.boundary_bits} is out of range; choose 4 to 16")
        if not 8 <= self.frac_bits <= 30:
            raise InputError(f"frac_bits {self.frac_bits} is out of range; choose 8 to 30")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises InputError when the value of a setting is none of the choices."""
    if value not in choices:
        raise InputError(f"{name} {value!r} is unknown; choose from {', '.join(choices)}")
