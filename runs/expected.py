"""What a run still has to do, loop by loop, and how long that is expected to take; for the line of progress.

Costs are in float forwards of one image of 256x256 pixels by the first quality's network (`support.work`).
"""

from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from licq.evaluation.anchors import NAMES, SECONDS, unmeasured
from licq.evaluation.evaluate import COUNTING, FLOAT, QUANTIZED
from licq.reconstruction.expected import (
    OBSERVING,
    SIDE,
    expected_baseline,
    expected_bit_search,
    expected_loops,
    pixels_of,
)
from licq.runs.folder import QualityFolder
from licq.runs.layer_bits import bits_choices, searches_bits
from licq.runs.run import Run
from licq.support.work import Item

CROPS = "cutting crops"

# in float forwards of as many pixels
_FLOAT, _FILES, _SIMULATION = 1.8, 1.0, 3.0  # large images take longer, and are compared
_SECONDS_OF_REPORT = 3.0


def planned_qualities(run: Run, folders: Mapping[int, QualityFolder]) -> list[Item]:
    """The loops that are left of qualities, {index among the run's: folder}."""
    items: list[Item] = []
    pixels = [_pixels_of(path) / SIDE**2 for path in run.dataset.paths]
    images = sum(pixels)
    args, config, side = run.args, run.config, run.crops.shape[-1]
    files = run.device.type == "cpu" and not args.estimate
    evaluation = images * (_FILES if files else _SIMULATION)
    counting = [(COUNTING, images * _SIMULATION)] if config.clips and files else []
    first = run.networks[run.models[0].quality]
    whole = pixels_of(run.whole)
    for index, folder in folders.items():
        model = run.models[index]
        network = run.networks[model.quality]
        loops: list[tuple[str, float]] = []
        copied = run.models_from is not None
        if "fp32" not in folder.parts:
            loops.append((FLOAT, images * _FLOAT))
        alone = index == 0 or not run.is_variable
        if searches_bits(args) and not (run.layer_bits or "bits" in folder.parts) and alone:
            choices = len(bits_choices(args)) * (2 if args.budget_bops is not None else 1)
            cost = expected_bit_search(config, len(run.crops), side, network.layers, choices, whole)
            loops.append(("measuring bits of layers", cost))
        if args.baseline and "baseline" not in folder.parts:
            if alone:
                loops.append((OBSERVING, expected_baseline(config, len(run.crops), side)))
            loops.append((QUANTIZED, evaluation))
        if "quant" not in folder.parts and not copied:
            if alone:
                units = folder.path / "units" if args.resume else None
                loops += expected_loops(config, len(run.crops), side, network.layers, units, whole)
            loops.append((QUANTIZED, evaluation))
            loops += counting if alone else []
        if "crops" not in folder.parts:
            loops.append((CROPS, 3 * max(pixels)))
        size = network.parameters / first.parameters
        items += [Item(f"q{model.quality}", kind, size * cost) for kind, cost in loops]
    return items


def planned_report(run: Run) -> list[Item]:
    """What follows the qualities."""
    items = []
    if run.args.with_anchors:
        for codec, paths in unmeasured(run.dataset.paths).items():
            items.append(Item("", NAMES[codec], SECONDS[codec] * sum(map(_pixels_of, paths)) / 1e6, True))
    return [*items, Item("", "report", _SECONDS_OF_REPORT, True)]


def _pixels_of(path: Path) -> int:
    with Image.open(path) as image:
        return image.width * image.height
