"""The knobs of the reconstruction engine (design, section 5), and the presets that set them."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from licq.quant.config import QuantConfig, one_of
from licq.support import options
from licq.support.errors import InputError

LOSSES = ("mse", "fisher", "rd", "rd_direct", "kl", "stage", "output")
AWARE = ("fisher", "rd", "rd_direct", "output")  # losses that know J; with the others nothing is chosen by it
UNITS = ("layer", "block", "stage", "network")
KNOBS = ("range_w", "range_b", "range_a", "rounding", "bias", "border")
SCHEMES = {
    "offset": "learned_offset",
    "weight": "ste",
}  # other names of the knob "rounding", by what these schemes learn
PRESETS = Path(__file__).parent / "presets"


@dataclasses.dataclass(frozen=True)
class ReconstructionConfig:
    """How a quantized codec learns from its calibration images.

    loss:       target of a unit. mse: squared error of its output, relative to the output's mean square;
    fisher: the same weighted,
                half with the squared gradient of J at that output, measured once on the float codec, and half
                evenly; rd: (J_hat - J_0)^2 per image, eq. 12; rd_direct: J_hat itself; kl: divergence between
                the channel-wise softmax of the outputs; stage: as mse, of the output of the stage that the
                unit lies in (g_a, h_s ...), through what follows the unit there in float; output: the
                difference of the codec's own outputs from the float codec's, lambda D(x_hat, x_hat_0) + |R -
                R_0|.
    blend:      weight of the unit's own error (mse) beside the loss: with stage; with rd, rd_direct and
    output in the steps that use
                the whole codec, where both are relative to what they are with weights rounded to nearest.
    unit:       layer | block | stage | network: what is reconstructed at once.
    learn:      any of range_w (eq. 15), range_a (eq. 16), range_b (eq. 17), rounding, bias, border (where
    activations are
                rounded up, a constant a channel; after AQuant, Li et al. 2022). "offset" and "weight" are
                rounding with the schemes "learned_offset" (eq. 14) and "ste", and are written out so: ste
                learns the weights themselves, straight-through, in units of their first step; a learned range
                scales them. Activation ranges are not learned by default: on ten crops they shrink, and clip
                other images.
    iters:      optimizer steps per unit, over both phases of Algorithm 1; 0 leaves the units out, as the
    default does: from the
                start that round_init gives, units gained nothing in trials, or less than as much time of the
                joint pass.
    tail_share: of these, the share (the last ones) that uses the true J where loss is rd or rd_direct; the
    others use the Fisher
                weighted quadratic (with blend the plain one). 1 is the paper's own way: every step goes
                through the float tail.
    joint_iters: steps of a last pass over all quantization parameters of the network on J itself; 0 leaves it
    out.
    alternate:  Algorithm 1: first weights and biases, then activations; False learns them together.
    batch:      crops per step.
    measured:   on the first so many crops J and what it cares about are measured, from them the harder ones
    come (`stress`), and
                units learn from them, whose outputs are kept in memory.
    observed:   the first so many set ranges and are what rounding is compensated on. The joint pass learns
    from all: a step takes
                `batch` of them however many there are, and what is learned from few does not hold for other
                images.
    lr_range, lr_rounding, lr_bias: step sizes of Adam. Ranges: in ln N. Rounding: in units of the weight's
                step. Bias: relative to its root mean square.
    joint_lr:   factor on all of them in the joint pass with weights of 8 bits and more; with fewer it is ten
    times as large
                for each four bits less: where rounding costs more, more is to be learned.
    input_mix:  probability that an element of a unit's input comes from the float codec (QDrop's 1 - p); 0
    uses the
                quantized prefix alone.
    act_drop:   probability that an input of a layer inside the unit stays as it is, not quantized, in a step
    (QDrop, Wei et al. 2022).
    range_search: "none"; "powell": before anything is learned, the ranges of all weights and activations are
    searched on J (LAPQ,
                Nahshan et al. 2021): by the Lp norm first, then one factor a layer by Powell's method
                (`reconstruction.search`).
    search_evals: so many times Powell's method may measure J.
    regularizer: weight of AdaRound's regularizer, a sum over weights, beside a loss relative to that of
    rounding to nearest.
    warmup:     share of the steps without it.
    stress:     first ranges are also observed on the crops with strong, rotated colours and with strong
    contrasts
                (`reconstruction.stress`).
    split:      channel splitting (after Zhao et al. 2019): the share of multiply-accumulate operations that
    may be added. Input
                channels whose rounding costs most J for their operations are carried by two digits of a_bits
                each; with losses that do not know J (mse, kl), most of their layer's relative squared error.
                0 leaves it out. What it is worth: docs/results.md.
    balance:    scales of input channels are raised where that lowers the predicted rise of the same
    (`reconstruction.balance`);
                the number is how much of the noise of weights rounded to nearest is expected to remain, 1 for
                all of it. 0 leaves it out.
    round_init: where learned rounding starts: "nearest", or "gptq", where each weight's rounding error is
    made good by the
                others (Frantar et al. 2023). Only learned_offset and ste can start there; "nearest" and
                "adaround", which choose between two neighbours, start as ever.
    seed:       of batches and mixing.
    """

    loss: str = "rd"
    unit: str = "block"
    learn: tuple[str, ...] = ("range_w", "range_b", "rounding", "bias")
    iters: int = 0
    tail_share: float = 0.1
    joint_iters: int = 40
    alternate: bool = True
    batch: int = 2
    measured: int = 10
    observed: int = 40
    lr_range: float = 2e-3
    lr_rounding: float = 1e-2
    lr_bias: float = 1e-3
    joint_lr: float = 0.2
    input_mix: float = 0.0
    act_drop: float = 0.0
    blend: float = 0.0
    range_search: str = "none"
    search_evals: int = 600
    regularizer: float = 0.01
    warmup: float = 0.2
    stress: bool = True
    split: float = 0.1
    balance: float = 0.3
    round_init: str = "gptq"
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "learn", tuple(self.learn))
        one_of("loss", self.loss, LOSSES)
        one_of("unit", self.unit, UNITS)
        for knob in self.learn:
            one_of("learn", knob, (*KNOBS, *SCHEMES))
        one_of("round_init", self.round_init, ("nearest", "gptq"))
        for name in ("iters", "joint_iters"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} {getattr(self, name)} is negative; choose 0 or more")
        one_of("range_search", self.range_search, ("none", "powell"))
        if self.blend < 0:
            raise InputError(f"blend {self.blend} is negative; choose 0 or more")
        for name in ("batch", "measured", "observed", "search_evals"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)} is too small; choose 1 or more")
        for name in ("tail_share", "input_mix", "act_drop", "warmup", "split", "balance"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} {getattr(self, name)} is out of range; choose 0 to 1")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def parse_knobs(assignments: Iterable[tuple[str, str]], taken: Mapping[str, Any]) -> dict[str, Any]:
    """`taken` with the words "knob", "value" of --set added, each of its field's type.

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
            raise InputError(f"--set {name}: no such knob; known are {', '.join(sorted(fields))}")
        if name in taken:
            raise InputError(f"--set {name}: it has a flag of its own; use --{name}")
        if name in knobs:
            raise InputError(f"--set {name} is given twice; give it once")
        knobs[name] = options.convert(name, text, fields[name].default)
    return knobs


@dataclasses.dataclass(frozen=True)
class PtqConfig:
    """A whole method: what the numbers are (quant) and how they are learned (reconstruction)."""

    preset: str = "licq"
    quant: QuantConfig = QuantConfig(rounding="learned_offset")
    reconstruction: ReconstructionConfig = ReconstructionConfig()

    def __post_init__(self):
        learn = self.reconstruction.learn
        for knob, scheme in SCHEMES.items():
            if knob in learn and self.quant.rounding != scheme:
                raise InputError(
                    f"learn {knob} needs rounding {scheme}, not {self.quant.rounding}; add --set rounding={scheme}"
                )
        learn = dict.fromkeys("rounding" if knob in SCHEMES else knob for knob in learn)
        object.__setattr__(
            self, "reconstruction", dataclasses.replace(self.reconstruction, learn=tuple(learn))
        )

    @classmethod
    def from_preset(cls, preset: str = "licq", **overrides: Any) -> "PtqConfig":
        """A preset by name (see `list_presets`) or the path of a YAML file, with single knobs changed.

        Raises:
            InputError: no such preset, a file that is not a preset, an unknown knob or a value out of range.
        """
        path = Path(preset) if Path(preset).suffix in (".yaml", ".yml") else PRESETS / f"{preset}.yaml"
        if not path.is_file():
            raise InputError(
                f"unknown preset {preset!r}; choose --preset from {', '.join(list_presets())}, or a YAML file"
            )
        try:
            knobs = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(
                f"{path}: not a readable preset ({error}); see reconstruction/presets/licq.yaml"
            ) from error
        if not isinstance(knobs, dict):
            raise InputError(f"{path}: not a preset; see reconstruction/presets/licq.yaml")
        if "base" in knobs:  # another preset, of which this one changes some knobs
            name = str(knobs.pop("base"))
            if Path(name).stem == path.stem:
                raise InputError(f"{path}: it builds on itself; name another preset as its base")
            base = cls.from_preset(name, **{key: overrides[key] for key in ("w_bits",) if key in overrides})
            knobs = {**base.quant.to_dict(), **base.reconstruction.to_dict(), **knobs}
        low = knobs.pop("below_8_bits", {})  # knobs for weights of fewer bits
        if overrides.get("w_bits", knobs.get("w_bits", QuantConfig.w_bits)) < 8:
            knobs |= low
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


def list_presets() -> list[str]:
    """The names of the presets that come with the project."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))
