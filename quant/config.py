"""The settings of a quantization, validated where they are built and written out whole into every result."""

import dataclasses
import re
from typing import Any

from licq.quant.ranges import RangeSpec
from licq.quant.rounding import ROUNDINGS
from licq.support.errors import InputError

FLOAT_BITS = 32
"""The number of bits that stands for float."""

SIMULATED = "simulated: no integer machine computes this"
"""What reports say of a codec with simulated scales, and why it has no files."""

SYMMETRY = {"symmetric": 0.0, "one_sided": 0.25, "asymmetric": 1.01}
"""By the name of `QuantConfig.a_symmetry`: a channel has a zero point where its smaller side is below this
share of the larger."""


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """How a codec is quantized (design, section 3). The defaults suit W8A8.

    Raises:
        InputError: a value that is unknown or out of range; the message names the field.
    """

    w_bits: int = 8
    """Bits of weights: 2 to 16; 32 leaves them in float."""

    a_bits: int = 8
    """Bits of the inputs of multiply-accumulate layers: 2 to 16; 32 leaves them in float."""

    bias_bits: int = 32
    """Bits of biases: 32 in units of the accumulator; or 8, which are rescaled (eqs. 17 and 19)."""

    w_range: str = "max"
    """Estimator of the first ranges of weights: "max", "mse", "lpP" (lp2.4), "percentileP" (percentile99.99)
    or "sigmaK" (sigma3); see `quant.ranges`."""

    a_range: str = "max"
    """Estimator of the first ranges of activations, as `w_range`."""

    a_granularity: str = "channel"
    """"channel": a scale per input channel, folded into the weights that consume it (eq. 16). "tensor": one
    scale."""

    a_scales: str = "folded"
    """How the scales of a layer's input channels are computed with:

    - "folded": the weights take them over before they are quantized, so that integers are summed.
    - "simulated": weights keep scales of their own, and everything is computed in float. Weights, biases and
      inputs of convolutions, linear layers and attention's products are rounded; what lies between them is
      not. No integer machine computes that, so such a codec has no files. Papers measure methods like this.
    """

    a_symmetry: str = "asymmetric"
    """Which input channels have a zero point: "asymmetric" all; "one_sided" those whose smaller side is below
    a quarter of the larger; "symmetric" none."""

    w_granularity: str = "channel"
    """"channel": a scale per output channel (eq. 15). "tensor": one scale. "groupsK" (groups4): K scales, for
    groups of output channels with ranges as equal as possible (`quant.transforms.range_groups`)."""

    transform: str = "equalize"
    """How the scales of a layer's input channels spread (`quant.transforms`):

    - "fold": each channel has its own range, and the weights take over the whole spread.
    - "equalize": a spread between none and "fold", with the least predicted noise of weights and activations.
    - "smooth": max|x|^alpha / max|w|^(1 - alpha) (SmoothQuant, Xiao et al. 2023).
    - "ptf": powers of two times one scale (FQ-ViT, Lin et al. 2022).
    """

    float_stages: tuple[str, ...] = ()
    """Stages that stay in float (g_a, h_s, ...: the first part of a layer's name, without its number; names
    that a codec does not have count for nothing). Papers that quantize a part of a codec are measured so. A
    codec with such a stage has no files, since these are written and read by one integer program."""

    rounding: str = "nearest"
    """How weights are rounded: "nearest", "adaround", "ste" or "learned_offset"; see `quant.rounding`."""

    carrier_bits: int = 16
    """Bits of wide activations: tensors between multiply-accumulate layers that are added, multiplied or
    normalized."""

    table_bits: int = 12
    """Bits of the index into the tables of elementwise functions."""

    latent_bits: int = 14
    """Bits of the inputs of layers that read y_hat or z_hat, where `a_bits` is smaller. Latents have heavy
    tails: on other images they reach several times as far as on calibration crops, and a clipped symbol is
    visible. Up to 16 bits are two 8-bit digits in an int8 kernel, at 1/256 of the pixels or less."""

    boundary_bits: int = 12
    """Fractional bits of y, z, means and scales at the codec's boundaries."""

    strict_int8: bool = False
    """8 bits on every tensor that is stored between layers, as in the paper: `carrier_bits` and `latent_bits`
    become 8, or `a_bits` where that is 9 to 16, and no channel is split. What elementwise functions make of
    the sums of a layer stays in registers until it is stored; `quant.storage` says which operands are."""

    smooth_alpha: float = 0.5
    """alpha of the transform "smooth", 0 to 1."""

    scales: str = "fixed_point"
    """Scales of weights and inputs: "fixed_point" (eqs. 3 and 4); "power_of_two", with which requantization
    is a shift; or "power_of_two_weights", only weights in fixed point, as where papers leave activations
    alone."""

    accumulator_bits: int = 0
    """16 to 48: the scales of a layer's weights are raised until its sums provably fit. 0: no limit; the
    bound is stated only."""

    softmax: str = "linear"
    """Probabilities of attention: "linear" in `a_bits`; "log2" or "log_sqrt2" on levels, the powers of 1/2 or
    of its square root down to 2^-14 (FQ-ViT, Lin et al. 2022; RepQ-ViT, Li et al. 2023)."""

    softmax_bits: int = 4
    """2^softmax_bits is the number of levels of `softmax`."""

    frac_bits: int = 24
    """n_r of eqs. 3 and 4: fractional bits of scales."""

    a_headroom: float = 1.1
    """First ranges of activations of up to 8 bits are this multiple of what the estimator gives. With more
    bits they are wider, `quantizer.room` times."""

    headroom: float = 2.0
    """Ranges of wide activations are this multiple of the largest value in calibration."""

    def __post_init__(self):
        if isinstance(self.float_stages, str):
            raise InputError(
                f"`float_stages={self.float_stages}` is a text; give a list of stages, e.g. [g_a, g_s]"
            )
        object.__setattr__(self, "float_stages", tuple(self.float_stages))
        for name in ("w_bits", "a_bits"):
            bits = getattr(self, name)
            if bits != FLOAT_BITS and not 2 <= bits <= 16:
                raise InputError(f"`{name}={bits}` is out of range; choose 2 to 16, or 32 for float")
        if self.bias_bits not in (8, 32):
            raise InputError(f"`bias_bits={self.bias_bits}` is not possible; choose 32 or 8")
        one_of("a_granularity", self.a_granularity, ("channel", "tensor"))
        one_of("a_scales", self.a_scales, ("folded", "simulated"))
        one_of("a_symmetry", self.a_symmetry, tuple(SYMMETRY))
        if not re.fullmatch(r"channel|tensor|groups[1-9]\d*", self.w_granularity):
            raise InputError(
                f"`w_granularity={self.w_granularity}` is unknown; "
                "choose channel, tensor, or groups4 for four groups"
            )
        if self.transform == "split":
            raise InputError(
                "`transform=split` is unknown: channel splitting goes with every transform; "
                "use `split=0.1`, the share of operations it may add"
            )
        one_of("transform", self.transform, ("equalize", "fold", "smooth", "ptf"))
        one_of("scales", self.scales, ("fixed_point", "power_of_two", "power_of_two_weights"))
        one_of("softmax", self.softmax, ("linear", "log2", "log_sqrt2"))
        if self.accumulator_bits and not 16 <= self.accumulator_bits <= 48:
            raise InputError(
                f"`accumulator_bits={self.accumulator_bits}` is out of range; "
                "choose 16 to 48, or 0 for no limit"
            )
        if not 0 <= self.smooth_alpha <= 1:
            raise InputError(f"`smooth_alpha={self.smooth_alpha}` is out of range; choose 0 to 1")
        one_of("rounding", self.rounding, tuple(ROUNDINGS))
        RangeSpec.parse(self.w_range)
        RangeSpec.parse(self.a_range)
        if self.strict_int8:
            bits = self.a_bits if 8 < self.a_bits <= 16 else 8
            for name in ("carrier_bits", "latent_bits"):
                object.__setattr__(self, name, bits)
        for name in ("carrier_bits", "table_bits", "latent_bits", "softmax_bits"):
            in_range(name, getattr(self, name), 2, 16)
        in_range("boundary_bits", self.boundary_bits, 4, 16)
        in_range("frac_bits", self.frac_bits, 8, 30)

    @property
    def is_simulated(self) -> bool:
        """Whether float stands for what integers would have to compute."""
        return self.a_scales == "simulated"

    @property
    def w_scales(self) -> str:
        """`scales` of weights: "fixed_point" or "power_of_two"."""
        return self.scales.removesuffix("_weights")

    @property
    def input_scales(self) -> str:
        """`scales` of inputs."""
        return "fixed_point" if self.scales == "power_of_two_weights" else self.scales

    @property
    def why_no_files(self) -> str | None:
        """Why a codec with these settings has no files, whatever its layers are; None: nothing forbids
        them."""
        if self.is_simulated:
            return SIMULATED
        if self.float_stages:
            return f"float_stages: {', '.join(self.float_stages)} stay in float"
        return None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def stage_of(name: str) -> str:
    """g_a of "g_a.3.conv1" and of "g_a3.blocks.0": the first component, without its number."""
    return name.split(".")[0].rstrip("0123456789").rstrip("_") or name.split(".")[0]


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises InputError when the value of a setting is none of the choices."""
    if value not in choices:
        raise InputError(f"`{name}={value}` is unknown; choose from {', '.join(choices)}")


def in_range(name: str, value: int, low: int, high: int) -> None:
    """Raises InputError when the value of a setting is not from `low` to `high`."""
    if not low <= value <= high:
        raise InputError(f"`{name}={value}` is out of range; choose {low} to {high}")
