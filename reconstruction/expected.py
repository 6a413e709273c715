"""How long the loops of a calibration are expected to take, for the time left; no number depends on it.

Times are in float forwards of one image of 256x256 pixels. Ratios are between those that were measured for
several codecs; where a codec or a machine has others, the run's own times replace them (`support.work`).
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from licq.quant.rounding import ROUNDINGS
from licq.reconstruction.config import SCREENED, PtqConfig, ReconstructionConfig
from licq.reconstruction.state import stored_records

SIDE = 256
OBSERVING = "observing ranges"
TIGHTENING = "tightening ranges"
UNITS, JOINT = "units", "joint pass"

# in float forwards of as many images
_OBSERVED = 1.3  # forwards that set ranges
_SENSITIVITY = 4.3  # a forward, and gradients to every layer's output
_MOMENTS = 3.6  # forwards that collect GPTQ's moments
_QUANTIZED = 1.4  # forwards of the quantized codec
_STEP = 4.5  # its forward and backward
# in all, whatever the crops
_BALANCE = 2.0
_FACTORIZATION = 75.0

_TIGHTENED, _TRIALS = 6, 2.0  # crops on which ranges are tightened; trials for each layer
_COSTLY = 0.4  # share of the layers whose inputs cost enough to be tried
_FLAT, _HARDER, _SCORES = 12, 4, 7  # flat pictures; harder crops of one; measurements in the joint pass
_WORTH_LEARNING = 0.4  # share of the units that `min_rise` lets learn
_LAYERS_A_UNIT = {"layer": 1.0, "block": 2.5, "stage": 5.0}


def expected_loops(
    config: PtqConfig,
    crops: int,
    side: int,
    network: nn.Module | int,
    folder: Path | None = None,
    pixels: int = 0,
) -> list[tuple[str, float]]:
    """(kind, time) of the loops of `quantize`, in their order.

    Args:
        crops, side: how many calibration crops there are, and their sides in pixels.
        network: the float codec, or how many layers it has.
        folder: units/ of a calibration that is resumed: what it has stored is left out.
        pixels: of the whole images.
    """
    knobs = config.reconstruction
    layers = network if isinstance(network, int) else count_layers(network)
    stored = stored_records(folder)
    measured = min(knobs.measured, crops)
    observed = max(min(knobs.observed, crops), measured)
    forward = (side / SIDE) ** 2  # of one crop
    harder = _HARDER * measured * knobs.stress + _FLAT * knobs.flat
    observing = _OBSERVED * (forward * (observed + harder) + pixels / SIDE**2)
    quantized = _QUANTIZED * forward * measured  # J of the measured crops
    sensitivities = ("measuring sensitivities", _SENSITIVITY * forward * measured)
    loops = []
    if knobs.range_search == "powell":
        loops.append(("searching the norm of ranges", 5 * (observing + quantized)))
    loops.append((OBSERVING, observing))
    loops += [sensitivities] if knobs.knows_j else [sensitivities, sensitivities]
    if knobs.balance:
        loops.append(("balancing scales", _BALANCE))
    if knobs.range_search == "powell":
        loops.append(("searching ranges", knobs.search_evals * quantized))
    if _is_compensated(config) and "start" not in stored:
        shown = observed if crops >= knobs.observed else 4 * observed  # `gptq.turned`
        moments = _MOMENTS * forward * shown
        loops.append(("compensating rounding", moments + _FACTORIZATION))
    if knobs.tighten and knobs.knows_j and "tightened" not in stored:
        pictures = min(measured, _TIGHTENED) + _HARDER
        trials = _TRIALS * layers * (1.0 if config.quant.strict_int8 else _COSTLY)
        loops.append((TIGHTENING, trials * _QUANTIZED * forward * pictures))
    has_units = bool(knobs.iters and knobs.learn)
    if has_units:
        loops.append(("measuring J", quantized))
    needed = crops if knobs.loss in ("rd", "output") else measured
    loops.append(("measuring J in float", forward * needed))
    if has_units:
        loops.append((UNITS, forward * _units(knobs, layers, measured, stored)))
    joint = stored.get("joint", {})
    if knobs.joint_iters and not (has_units and knobs.unit == "network") and not joint.get("done"):
        steps = knobs.joint_iters * _STEP * forward * knobs.batch
        loops.append((JOINT, steps + _SCORES * quantized))
    return loops


def pixels_of(images: Iterable[Tensor]) -> int:
    """How many pixels images (3, H, W) have together."""
    return sum(image.shape[-2] * image.shape[-1] for image in images)


def expected_preparation(config: PtqConfig, crops: int, side: int, layers: int, pixels: int = 0) -> float:
    """The time of `prepare_calibration`."""
    behind = {"measuring J", "measuring J in float", UNITS, JOINT}
    loops = expected_loops(config, crops, side, layers, pixels=pixels)
    return sum(time for kind, time in loops if kind not in behind)


def expected_bit_search(
    config: PtqConfig, crops: int, side: int, layers: int, choices: int, pixels: int = 0
) -> float:
    """The time of `mixed_precision.measure_layers`; each layer is measured in so many choices of bits."""
    measured = min(config.reconstruction.measured, crops)
    preparation = expected_preparation(config, crops, side, layers, pixels)
    return choices * (preparation + layers * measured * (side / SIDE) ** 2)


def expected_baseline(config: PtqConfig, crops: int, side: int) -> float:
    """The time of observing the ranges of plain quantization."""
    return _OBSERVED * min(config.reconstruction.observed, crops) * (side / SIDE) ** 2


def count_layers(network: nn.Module) -> int:
    """Convolutions and linear layers."""
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    return sum(isinstance(module, kinds) for module in network.modules())


def _is_compensated(config: PtqConfig) -> bool:
    return config.reconstruction.round_init == "gptq" and ROUNDINGS[config.quant.rounding].starts_anywhere


def _units(knobs: ReconstructionConfig, layers: int, measured: int, stored: Mapping[str, dict]) -> float:
    """Forwards of a crop for all units. A unit's own error costs a step of its part of the network; a step
    on a loss of the whole codec, and a measurement, that of what is behind it, half of it on average."""
    units = 1 if knobs.unit == "network" else max(1, round(layers / _LAYERS_A_UNIT[knobs.unit]))
    tail = (1.0 if units == 1 else knobs.tail_share) if knobs.is_global else 0.0
    steps = (
        knobs.rounds * knobs.iters * knobs.batch * _STEP * (1 - tail + tail * (units / 2 if units > 1 else 1))
    )
    measurements = units * (1 + knobs.rounds) * measured * _QUANTIZED / 2
    if knobs.loss == "rd" and knobs.min_rise:
        steps, measurements = _WORTH_LEARNING * steps, _WORTH_LEARNING * measurements
        measurements += units * min(SCREENED, measured) * _QUANTIZED / 2
    remaining = max(0, units - sum(name.isdigit() for name in stored)) / units
    return remaining * (steps + measurements)
