"""Bits of single layers as a run uses them: read from a file, or searched for within a budget."""

import dataclasses
from collections.abc import Callable

from torch import nn

from licq.quant.bits import Bits
from licq.quant.model import QuantModel
from licq.reconstruction.mixed_precision import (
    Budget,
    Layer,
    allocate,
    allocate_by_threshold,
    describe,
    measure_layers,
    totals,
)
from licq.reconstruction.objective import Objective
from licq.runs.folder import QualityFolder
from licq.runs.layer_bits import bits_choices, searches_bits, written_bits_file
from licq.runs.run import Run
from licq.support.files import write_json


def find_layer_bits(
    run: Run, index: int, load: Callable[[], nn.Module], folder: QualityFolder
) -> dict | None:
    """The bits of single layers of a quality; None where every layer has the same.

    A search is made once and kept as the part "bits" of result.json. A variable-rate codec has the bits of
    its first quality.

    Args:
        index: of the quality among `run.models`. load: gives its float codec.

    Returns:
        {"layers": the allocation, "how": where it comes from, "loss": predicted rise of J in bits per pixel,
        only of a search}.
    """
    quality = run.models[0 if run.is_variable else index].quality
    if quality in run.layer_bits:
        return {
            "layers": run.layer_bits[quality],
            "how": run.bits_origin or f"From {run.args.bits_file}.",
        }
    if not searches_bits(run.args):
        return None
    if run.is_variable and index:
        return run.folder.quality_parts(quality)["bits"]
    return folder.part("bits", lambda: _search(run, index, load(), folder))


def _search(run: Run, index: int, network: nn.Module, folder: QualityFolder) -> dict:
    layers = measured_layers(run, index, network, folder)
    budget = Budget(**(run.args.budget_size or {}), **(run.args.budget_bops or {}))
    rule = "The least predicted loss"
    if run.config.reconstruction.allocation == "threshold":
        bits, tolerance = allocate_by_threshold(layers, budget)
        rule = f"The fewest bits with which each layer alone loses at most {tolerance:.3g} bpp"
    else:
        bits = allocate(layers, budget)
    asked = " and ".join(
        f"{name.replace('_', ' ')} at most {value:.6g}"
        for name, value in dataclasses.asdict(budget).items()
        if value is not None
    )
    how = f"{rule}, with {asked}; candidates {', '.join(map(str, bits_choices(run.args)))}."
    return {"layers": bits, "loss": totals(layers, bits).loss, "how": how}


def measured_layers(run: Run, index: int, network: nn.Module, folder: QualityFolder) -> list[Layer]:
    """The losses of the layers at the candidates; inputs keep --a_bits where their bits have no price."""
    args = run.args
    choices = bits_choices(args)
    inputs_count = args.budget_bops is not None or args.cost == "bops"
    return measure_layers(
        network,
        run.crops,
        run.config,
        Objective(run.models[index].lmbda, args.metric),
        choices,
        choices if inputs_count else [run.config.quant.a_bits],
        folder.part,
        run.device,
        run.whole,
        progress=run.progress,
    )


def described_bits(layer_bits: dict, codec: QuantModel, run: Run) -> dict:
    """The result of `find_layer_bits` with every layer of the quantized codec named, and the totals."""
    crop = run.crops[:1].to(next(codec.parameters()).device)
    return layer_bits | describe(codec, crop)


def write_layer_bits(run: Run, index: int, folder: QualityFolder, bits: Bits) -> None:
    """OUT/q<quality>/bits.json, and --bits_file where a search has ended; of a variable-rate codec with its
    first quality."""
    if run.is_variable and index:
        return
    write_json(folder.path / "bits.json", bits)
    is_round = run.bits_origin and run.models_from is None
    if run.args.bits_file and searches_bits(run.args) and not is_round:
        write_json(written_bits_file(run.args, run.models[index].quality), bits)
