"""The knobs of the reconstruction engine (design, section 5), and the presets that set them."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from licq.quant.config import QuantConfig, one_of
from licq.reconstruction.preset_files import PRESETS, list_presets
from licq.support import options
from licq.support.errors import InputError

LOSSES = ("mse", "fisher", "rd", "rd_direct", "kl", "stage", "output")
GLOBAL_LOSSES = ("rd", "rd_direct", "output")  # they need the whole codec's output
J_AWARE_LOSSES = ("fisher", *GLOBAL_LOSSES)  # with the others nothing is chosen by J
UNITS = ("layer", "block", "stage", "network")
KNOBS = ("range_w", "range_b", "range_a", "rounding", "bias", "border")
# other names of the knob "rounding", by what these schemes learn
SCHEMES = {"offset": "learned_offset", "weight": "ste"}
RANGE_SEARCHES = ("none", "powell")
ROUND_INITS = ("nearest", "gptq")
ALLOCATIONS = ("knapsack", "threshold")
SCREENED = 10
"""Crops on which `ReconstructionConfig.min_rise` says whether a unit learns."""


@dataclasses.dataclass(frozen=True)
class ReconstructionConfig:
    """How a quantized codec learns from its calibration crops. The defaults are those of the preset "licq".

    Raises:
        InputError: a value that is unknown, out of range or of another type; the message names the field.
    """

    loss: str = "rd"
    """Target of a unit:

    - "mse": squared error of the unit's output, relative to the output's mean square.
    - "fisher": the same, weighted half evenly and half with the squared gradient of J at that output. The
      gradient is measured once, on the float codec (BRECQ, Li et al. 2021, eq. 10).
    - "rd": (J_hat - J_0)^2 of each image (RDO-PTQ, eq. 12).
    - "rd_direct": J_hat itself.
    - "kl": divergence between the channel-wise softmax of the two outputs.
    - "stage": "mse" of the output of the stage (g_a, h_s ...) that the unit lies in. The rest of the stage
      is in float.
    - "output": distance of the codec's outputs from the float codec's, lambda D(x_hat, x_hat_0) + |R - R_0|.
    """

    unit: str = "block"
    """What is reconstructed at once: "layer", "block", "stage" or "network"; see `units.find_units`."""

    learn: tuple[str, ...] = ("range_w", "range_b", "rounding", "bias")
    """Which quantization parameters are learned:

    - "range_w", "range_a", "range_b": N of weights, activations and biases (eqs. 15, 16 and 17). A learned
      activation range shrinks on ten crops and clips other images, so it is not learned by default.
    - "rounding": what `QuantConfig.rounding` learns.
    - "bias": the biases.
    - "border": the rounding border of each channel, where activations round up (AQuant, Li et al. 2022).
    - "offset", "weight": "rounding" with the scheme "learned_offset" (eq. 14) or "ste". `PtqConfig` stores
      them as "rounding". "ste" learns the weights themselves, straight-through, in units of their first step.
    """

    iters: int = 0
    """Optimizer steps of each round of a unit, over both phases of Algorithm 1. 0 leaves the units out: from
    the start that `round_init` gives, units gained nothing in trials, or less than as much time of the joint
    pass."""

    rounds: int = 1
    """A unit's steps are repeated until they lower its loss by less than a hundredth, at most so many times
    (Algorithm 1, lines 2 to 12)."""

    min_rise: float = 0.0
    """With the loss "rd": a unit takes no steps where its quantization raises eq. 12, on ten crops, by less
    than this share of it."""

    tail_share: float = 0.1
    """Share of `iters`, the last ones, that use a loss of the whole codec ("rd", "rd_direct", "output"). The
    steps before use the unit's own error: "fisher", or "mse" where `blend` is positive. 1 is the paper's own
    way: every step goes through the float tail."""

    joint_iters: int = 40
    """Steps of a last pass over all quantization parameters of the network; 0 leaves it out."""

    alternate: bool = True
    """True: first weights and biases are learned, then activations (Algorithm 1). False: all together."""

    batch: int = 2
    """Crops of a step."""

    measured: int = 10
    """J and its sensitivities are measured on the first so many crops. The harder crops of `stress` come from
    them, and units learn from them: their outputs are kept in memory. The joint pass does not learn from them
    where there are as many others, and keeps what has the lowest J on them."""

    observed: int = 40
    """The first so many crops set ranges and are what rounding is compensated on. The joint pass learns from
    all crops but the measured ones: a step takes `batch` of them however many there are, and what is learned
    from few does not hold for other images."""

    lr_range: float = 2e-3
    """Step size of Adam for ranges, in ln N."""

    lr_rounding: float = 1e-2
    """Step size for rounding, in units of the weight's step, and for the rounding border."""

    lr_bias: float = 1e-3
    """Step size for biases, relative to their root mean square."""

    joint_lr: float = 0.2
    """Factor on the step sizes in the joint pass, for weights of 8 bits and more. It grows tenfold for each
    four bits less: where rounding costs more, more is to be learned."""

    input_mix: float = 0.0
    """Probability that an element of a unit's input comes from the float codec (QDrop's 1 - p; Wei et al.
    2022). 0 uses the quantized prefix alone."""

    act_drop: float = 0.0
    """QDrop inside the unit: probability that an element of a layer's input is not quantized in a step."""

    blend: float = 0.0
    """Weight of the unit's own error ("mse") beside the loss: with "stage", and in the steps of "rd",
    "rd_direct" and "output" that use the whole codec. Both are then relative to what they are with weights
    rounded to nearest."""

    range_search: str = "none"
    """"powell": before anything is learned, the ranges of all weights and activations are searched on J, by
    the Lp norm first, then one factor a layer by Powell's method (LAPQ, Nahshan et al. 2021)."""

    search_evals: int = 600
    """How many times Powell's method may measure J."""

    allocation: str = "knapsack"
    """How a search with `--budget_size` chooses bits of layers from their losses: "knapsack", the least sum
    of losses (`allocation.allocate`); "threshold", the fewest bits with which each layer's loss stays below
    one tolerance (FMPQ, Hossain et al. 2024; `allocation.allocate_by_threshold`)."""

    regularizer: float = 0.01
    """Weight of AdaRound's regularizer, a sum over weights, beside a loss that is relative to that of
    rounding to nearest."""

    warmup: float = 0.2
    """Share of the steps without the regularizer."""

    stress: bool = True
    """First ranges are also observed on the crops with strong, rotated colours and with strong contrasts
    (`reconstruction.stress`). An estimator that clips does not see them."""

    flat: bool = True
    """Ranges also hold flat pictures: white, black, grey and saturated colours (`reconstruction.stress`). An
    estimator that clips ("mse", "percentile" ...) does not see them. Rounding that starts at "gptq" also
    keeps the outputs of flat areas (`reconstruction.flat_areas`)."""

    whole: bool = False
    """Ranges are also observed on the whole images that crops are drawn from, where these are files."""

    split: float = 0.2
    """Channel splitting (after Zhao et al. 2019): share of multiply-accumulate operations that may be added.
    Input channels whose rounding raises J most for their operations are carried by two digits of a_bits each.
    Losses that do not know J ("mse", "kl", "stage") take their layer's relative squared error instead. 0
    leaves it out."""

    split_gain: float = 0.005
    """A channel is split where that lowers the predicted J by at least this share of J for each share of
    operations that it adds: with 0.005, 10 % more operations have to bring 0.05 % of J. 0: all that `split`
    allows. Losses that do not know J do without it."""

    balance: float = 0.3
    """Scales of input channels are raised where that lowers the predicted rise of J
    (`reconstruction.balance`). The number is the share of the noise of weights rounded to nearest that is
    expected to remain after learning, 1 for all of it. 0 leaves it out."""

    tighten: bool = False
    """Behind the first rounding: ranges of layers' inputs, and under `strict_int8` those of all stored
    tensors, are made smaller where that lowers J of crops and does not raise that of harder ones
    (`reconstruction.tighten`). The loss must know J."""

    round_init: str = "gptq"
    """Where learned rounding starts: "nearest", or "gptq", where each weight's rounding error is compensated
    by the others (Frantar et al. 2023). Only "learned_offset" and "ste" can start there. "nearest" and
    "adaround" choose between two neighbours and start at the nearest."""

    seed: int = 0
    """Of batches and of the random choices of `input_mix` and `act_drop`."""

    def __post_init__(self):
        object.__setattr__(self, "learn", tuple(self.learn))
        one_of("loss", self.loss, LOSSES)
        one_of("unit", self.unit, UNITS)
        for knob in self.learn:
            one_of("learn", knob, (*KNOBS, *SCHEMES))
        one_of("round_init", self.round_init, ROUND_INITS)
        one_of("allocation", self.allocation, ALLOCATIONS)
        one_of("range_search", self.range_search, RANGE_SEARCHES)
        counts = ("iters", "rounds", "joint_iters", "batch", "measured", "observed", "search_evals", "seed")
        for name in counts:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise InputError(f"`{name}={value}` is no integer; give one")
        positive = ("lr_range", "lr_rounding", "lr_bias")
        for name in ("iters", "joint_iters", "split_gain", "blend", "regularizer", *positive):
            if not getattr(self, name) >= 0:
                raise InputError(f"`{name}={getattr(self, name)}` is negative; choose 0 or more")
        for name in ("rounds", "batch", "measured", "observed", "search_evals"):
            if getattr(self, name) < 1:
                raise InputError(f"`{name}={getattr(self, name)}` is too small; choose 1 or more")
        for name in ("tail_share", "input_mix", "act_drop", "warmup", "split", "balance", "min_rise"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"`{name}={getattr(self, name)}` is out of range; choose 0 to 1")

    @property
    def knows_j(self) -> bool:
        """Whether the loss has J in it."""
        return self.loss in J_AWARE_LOSSES

    @property
    def is_global(self) -> bool:
        """Whether the loss needs the whole codec's output."""
        return self.loss in GLOBAL_LOSSES

    @property
    def uses_own_error(self) -> bool:
        """Whether steps of units use the error of the unit's own output."""
        only_global = self.is_global and (self.tail_share == 1 or self.unit == "network")
        return bool(self.blend) or not only_global

    @property
    def local_loss(self) -> str:
        """The error of a unit's own output that the loss uses, for steps or beside it."""
        if self.is_global:
            return "mse" if self.blend else "fisher"
        return self.loss

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def parse_knobs(assignments: Iterable[tuple[str, str]], taken: Mapping[str, Any]) -> dict[str, Any]:
    """`taken` with the assignments (knob, value as text) added, each value of its field's type.

    Raises:
        InputError: an unknown knob, one that is taken or given twice, a value of another type.
    """
    fields = {
        field.name: field
        for kind in (QuantConfig, ReconstructionConfig)
        for field in dataclasses.fields(kind)
    }
    knobs = dict(taken)
    for name, text in assignments:
        if name not in fields:
            raise InputError(f"`knobs` {name}: no such knob; known are {', '.join(sorted(fields))}")
        if name in taken:
            raise InputError(f"`knobs` {name}: it has a name of its own; use `{name}`")
        if name in knobs:
            raise InputError(f"`knobs` {name} is given twice; give it once")
        knobs[name] = options.convert(name, text, fields[name].default)
    return knobs


@dataclasses.dataclass(frozen=True)
class PtqConfig:
    """A whole method: a preset's name, how numbers are represented and how they are learned.

    Example:
        >>> PtqConfig.from_preset("licq", w_bits=6, joint_iters=100)

    Raises:
        InputError: fields of `quant` and `reconstruction` that exclude each other.
    """

    preset: str = "licq"
    """The name of the preset that the fields come from; written into results."""

    quant: QuantConfig = QuantConfig(rounding="learned_offset")
    """Bits, scales, first ranges and rounding."""

    reconstruction: ReconstructionConfig = ReconstructionConfig()
    """Loss, units, steps and crops."""

    def __post_init__(self):
        learn = self.reconstruction.learn
        for knob, scheme in SCHEMES.items():
            if knob in learn and self.quant.rounding != scheme:
                raise InputError(
                    f"`learn={knob}` needs `rounding={scheme}`, not {self.quant.rounding}; choose that"
                )
        if self.quant.is_simulated and (self.reconstruction.split or self.reconstruction.balance):
            raise InputError(
                "`a_scales=simulated` has no integers to split or scales to balance; choose split=0 and "
                "balance=0 with it"
            )
        learn = dict.fromkeys("rounding" if knob in SCHEMES else knob for knob in learn)
        object.__setattr__(
            self, "reconstruction", dataclasses.replace(self.reconstruction, learn=tuple(learn))
        )

    @property
    def clips(self) -> bool:
        """Whether so much is clipped on purpose that a report counts it, at the price of a simulation."""
        knobs = self.reconstruction
        tightened = knobs.tighten and self.quant.strict_int8
        return self.quant.a_range != "max" or "range_a" in knobs.learn or not knobs.flat or tightened

    @classmethod
    def from_preset(cls, preset: str = "licq", **overrides: Any) -> "PtqConfig":
        """A preset with single fields changed.

        Args:
            preset: a name of `list_presets`, or the path of a YAML file. A file holds fields of `QuantConfig`
                and `ReconstructionConfig`, and may name another preset as its `base`.
            overrides: fields of `QuantConfig` and `ReconstructionConfig`.

        Raises:
            InputError: no such preset, a file that is not a preset, an unknown field or a value out of range.
        """
        path = Path(preset) if Path(preset).suffix in (".yaml", ".yml") else PRESETS / f"{preset}.yaml"
        knobs = _read_preset(path, preset)
        if "base" in knobs:  # another preset, of which this one changes some fields
            name = str(knobs.pop("base"))
            if Path(name).stem == path.stem:
                raise InputError(f"{path}: it builds on itself; name another preset as its base")
            given = {key: overrides[key] for key in ("w_bits", "strict_int8") if key in overrides}
            base = cls.from_preset(name, **given)
            knobs = {**base.quant.to_dict(), **base.reconstruction.to_dict(), **knobs}
        low, strict = (knobs.pop(key, {}) for key in ("below_8_bits", "under_strict_int8"))
        chosen = {**knobs, **overrides}
        if chosen.get("w_bits", QuantConfig.w_bits) < 8:
            knobs |= low  # fields for weights of fewer bits
        elif chosen.get("strict_int8", QuantConfig.strict_int8):
            knobs |= strict
        knobs = {**knobs, **overrides}
        quant = {field.name for field in dataclasses.fields(QuantConfig)}
        reconstruction = {field.name for field in dataclasses.fields(ReconstructionConfig)}
        unknown = sorted(set(knobs) - quant - reconstruction)
        if unknown:
            raise InputError(
                f"{path}: unknown knob {unknown[0]!r}; known are {', '.join(sorted(quant | reconstruction))}"
            )
        return cls(
            path.stem,
            QuantConfig(**{name: value for name, value in knobs.items() if name in quant}),
            ReconstructionConfig(**{name: value for name, value in knobs.items() if name in reconstruction}),
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "preset": self.preset,
            "quant": self.quant.to_dict(),
            "reconstruction": self.reconstruction.to_dict(),
        }


def _read_preset(path: Path, preset: str) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(
            f"unknown preset {preset!r}; choose `preset` from {', '.join(list_presets())}, or a YAML file"
        )
    try:
        knobs = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(
            f"{path}: not a readable preset ({error}); see reconstruction/presets/licq.yaml"
        ) from error
    if not isinstance(knobs, dict):
        raise InputError(f"{path}: not a preset; see reconstruction/presets/licq.yaml")
    return knobs
