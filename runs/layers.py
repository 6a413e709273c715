"""What main_ptq.py does with single layers: --analyze, --bits_file, --budget_size, --budget_bops and
--max_bd_rate.

`run` is the command line's `main_ptq.Run`.
"""

import argparse
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from licq.report.analysis import unit_table, write_analysis
from licq.runs.bit_search import BdRateSearch, chosen
from licq.runs.folder import QualityFolder, RunFolder, forget_run
from licq.quant.bits import Bits, check_layers, read_bits
from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.reconstruction.analysis import Probe, analyze
from licq.reconstruction.api import prepare
from licq.reconstruction.mixed_precision import Budget, Layer, allocate, describe, measure_layers, start_loss, totals
from licq.reconstruction.objective import Objective
from licq.support.errors import InputError
from licq.support.files import atomic_path, writable_folder, write_json

if TYPE_CHECKING:
    from licq.runs.float_models import FloatModel
    from main_ptq import Run

_SHOWN = 12  # rows of the table on a terminal
BITS = (4, 5, 6, 7, 8)


def searches(args: argparse.Namespace) -> bool:
    """Whether bits are searched for."""
    return any(value is not None for value in (args.budget_size, args.budget_bops, args.max_bd_rate))


def check_flags(args: argparse.Namespace) -> None:
    """Raises InputError where flags do not go together."""
    budgets = [flag for flag in ("budget_size", "budget_bops", "max_bd_rate") if getattr(args, flag) is not None]
    if args.analyze and (budgets or args.bits_file):
        raise InputError(f"--analyze and --{(budgets or ['bits_file'])[0]} exclude each other; analyze first, then quantize")
    if args.landscape and not args.analyze:
        raise InputError("--landscape belongs to --analyze; give both")
    if args.max_bd_rate is not None and len(budgets) > 1:
        raise InputError(f"--max_bd_rate and --{budgets[0]} exclude each other; give one")
    for flag in ("bits_choices", "cost"):
        if getattr(args, flag) is not None and not budgets:
            raise InputError(f"--{flag} is for a search; give --budget_size, --budget_bops or --max_bd_rate as well")
    if args.cost is not None and args.max_bd_rate is None:
        raise InputError("--cost belongs to --max_bd_rate; a budget says itself what it bounds")


def named_layers(args: argparse.Namespace, quality: int, network: nn.Module, several: bool) -> dict[int, Bits]:
    """{quality: the allocation of --bits_file} where it is read; all layers that flags name are the
    network's.

    Raises:
        InputError: a bad file, an unknown layer, or one file to be written for several qualities.
    """
    if args.landscape:
        _check("--landscape", {args.landscape: {}}, network)
    if not args.bits_file:
        return {}
    if searches(args):
        if several and "{quality}" not in args.bits_file:
            raise InputError("--bits_file is written here, for each quality; have {quality} in its name")
        return {}
    path = args.bits_file.replace("{quality}", str(quality))
    bits = read_bits(path)
    _check(f"--bits_file {path}", bits, network)
    return {quality: bits}


def check_written(args: argparse.Namespace, qualities: Sequence[int]) -> None:
    """Raises InputError where --bits_file is to be written for these qualities and cannot be."""
    for path in [_written(args, quality) for quality in qualities if args.bits_file and searches(args)]:
        writable_folder(path.parent, "--bits_file")
        if path.is_dir():
            raise InputError(f"--bits_file {path} is a folder; give a file's name")


def _written(args: argparse.Namespace, quality: int) -> Path:
    return Path(args.bits_file.replace("{quality}", str(quality)))


def _check(flag: str, named: Bits, network: nn.Module) -> None:
    try:
        check_layers(named, QuantModel(network, QuantConfig()).layers)
    except InputError as error:
        raise InputError(f"{flag}: {error}") from error


def settings_of_layers(args: argparse.Namespace, bits: Mapping[int, Bits]) -> dict:
    """What a run's settings say of single layers; nothing where every layer has the same bits."""
    if args.analyze:
        return {"task": "analysis"}
    if searches(args):
        asked = {flag: getattr(args, flag) for flag in ("budget_size", "budget_bops", "max_bd_rate", "cost") if getattr(args, flag) is not None}
        return {"bits": asked | {"choices": list(args.bits_choices or BITS)}}
    return {"bits": {quality: bits[quality] for quality in sorted(bits)}} if bits else {}


def own_settings(source: "FloatModel") -> dict:
    """What results of one quality depend on, beside the run's settings."""
    return {"quality": source.quality, "lambda": source.lmbda, "checkpoint_sha256": source.sha256}


# -------------------------------------------------------------------------------------------------- --analyze


def analyze_run(run: "Run") -> int:
    """--analyze: OUT/q<quality>/analysis.{json,md} and pictures for each quality; a variable-rate codec is
    one, for all rates."""
    args, config = run.args, run.config
    for source in run.models[:1] if run.is_variable else run.models:
        run.say(f"{source.arch} quality {source.quality}")
        folder = run.folder.quality(source.quality, own_settings(source))
        objective = Objective(source.lmbda, args.metric)
        start = prepare(source.load(), run.crops, config, objective, device=run.device, progress=not args.quiet)
        batches = start.batches[: start.measured]
        probe = Probe(start.qmodel, batches, objective)
        found = analyze(probe, start.sensitivities, config.reconstruction.unit, args.landscape, folder.part, progress=not args.quiet)
        title = f"{source.arch} quality {source.quality}, W{config.quant.w_bits}A{config.quant.a_bits}, preset {config.preset}"
        found |= {"title": title, "crops": sum(map(len, batches)), "settings": folder.settings}
        write_analysis(folder.path, found)
        folder.finish()
        print(f"{title}: J {found['float']['j']:.4f}, with everything quantized {100 * found['all']['j'] / found['float']['j']:+.3f} %\n\n"
              f"{unit_table(found, most=_SHOWN)}\n\nreport:  {folder.path / 'analysis.md'}, analysis.json, delta_j.png, ranges.png, "
              "channels.png, landscape.png\n")
    return 0


# --------------------------------------------------------------------------------------------- bits of layers


def bits_of_quality(run: "Run", index: int, load: Callable[[], nn.Module], folder: QualityFolder) -> dict | None:
    """{"layers": the allocation, "how": where it comes from, "loss": predicted rise of J or absent}; None: no
    bits of single layers.

    A search is made once, and its part of result.json kept; a variable-rate codec has the one of its first
    quality.
    """
    source, args = run.models[0 if run.is_variable else index], run.args
    if source.quality in run.bits:
        return {"layers": run.bits[source.quality], "how": run.how or f"From {args.bits_file}."}
    if not searches(args):
        return None
    if run.is_variable and index:
        return run.folder.quality_parts(source.quality)["bits"]

    def search() -> dict:
        layers = measured_layers(run, index, load(), folder)
        budget = Budget(**(args.budget_size or {}), **(args.budget_bops or {}))
        bits = allocate(layers, budget)
        found = totals(layers, bits)
        asked = " and ".join(f"{name.replace('_', ' ')} at most {value:.6g}" for name, value in dataclasses.asdict(budget).items() if value is not None)
        return {"layers": bits, "loss": found.loss, "how": f"The least predicted loss with {asked}; candidates {_choices(args)}."}

    return folder.part("bits", search)


def _choices(args: argparse.Namespace) -> str:
    return ", ".join(map(str, args.bits_choices or BITS))


def measured_layers(run: "Run", index: int, network: nn.Module, folder: QualityFolder) -> list[Layer]:
    """The losses of the layers at the candidates; inputs keep --a_bits where their bits have no price."""
    args, source = run.args, run.models[index]
    choices = args.bits_choices or BITS
    priced = args.budget_bops is not None or args.cost == "bops"
    return measure_layers(network, run.crops, run.config, Objective(source.lmbda, args.metric), choices, choices if priced else [run.config.quant.a_bits],
                          folder.part, run.device, progress=not args.quiet)


def described_bits(own: dict, codec: QuantModel, crops: Tensor) -> dict:
    """`bits_of_quality` with every layer named and the totals of the quantized codec."""
    return own | describe(codec, crops[:1].to(next(codec.parameters()).device))


def write_bits(run: "Run", index: int, folder: Path, bits: Bits) -> None:
    """OUT/q<quality>/bits.json, and --bits_file where a search has ended; a variable-rate codec's with its
    first quality."""
    if run.is_variable and index:
        return
    write_json(folder / "bits.json", bits)
    is_round = run.how and run.taken_from is None
    if run.args.bits_file and searches(run.args) and not is_round:
        write_json(_written(run.args, run.models[index].quality), bits)


def take_model(run: "Run", index: int, folder: QualityFolder, own: dict | None) -> dict:
    """The finished part of a quality that another run has made, whose model is copied."""
    quality = run.models[index].quality
    with atomic_path(folder.model) as temporary:
        shutil.copyfile(run.taken_from.model(quality, run.is_variable), temporary)
    part = run.taken_from.quality_parts(quality)["quant"]
    return part | {"bits": part["bits"] | {key: value for key, value in own.items() if key != "layers"}}


def below_bd_rate(run: "Run", quantize: Callable[["Run"], tuple[list[dict], float | None]]) -> "Run":
    """--max_bd_rate: the run with the bits that were found, its finished models to be taken from the round
    that made them.

    Args:
        quantize: (a run) -> points and BD-rate of all its qualities.
    """
    limit, args = run.args.max_bd_rate, run.args
    codecs = range(1 if run.is_variable else len(run.models))
    # of all rounds now: one that is not reached before an interrupt must not be met by a resumption
    if not args.resume:
        for old in run.folder.path.glob("round*/"):
            forget_run(old)
    search_folder = RunFolder(run.folder.path / "search", run.folder.settings, args.resume)
    folders = [search_folder.quality(run.models[i].quality, own_settings(run.models[i])) for i in codecs]
    networks = [run.models[i].load() for i in codecs]
    layers = [measured_layers(run, i, networks[i], folders[i]) for i in codecs]

    def start(number: int, bits: Bits) -> dict:
        name = f"start {hashlib.sha256(json.dumps(bits, sort_keys=True).encode()).hexdigest()[:16]}"
        objective = Objective(run.models[number].lmbda, args.metric)
        return folders[number].part(name, lambda: start_loss(networks[number], run.crops, run.config, objective, bits, run.device, not args.quiet))

    most = [{layer.name: {"w_bits": max(layer.w_loss), "a_bits": max(layer.a_loss)} for layer in own} for own in layers]
    bpp = [start(number, bits)["bpp"] for number, bits in enumerate(most)]
    rounds: dict[int, Run] = {}

    def attempt(number: int, bits: Sequence[Bits]) -> float | None:
        every = {source.quality: bits[0 if run.is_variable else place] for place, source in enumerate(run.models)}
        folder = RunFolder(run.folder.path / f"round{number}", {**run.folder.settings, "bits": every}, args.resume)
        quick = argparse.Namespace(**{**vars(args), "baseline": False})
        rounds[number] = dataclasses.replace(run, args=quick, folder=folder, bits=every, how=f"Round {number} of --max_bd_rate {limit}.", shared={})
        run.say(f"round {number}: {', '.join(f'{totals(own, b).mean_bits:.2f} bits a weight' for own, b in zip(layers, bits))}")
        return quantize(rounds[number])[1]

    search = BdRateSearch(layers, bpp, lambda number, bits: start(number, bits)["loss"], attempt, "bops" if args.cost == "bops" else "mean_bits")
    attempts = search.run(limit)
    best = chosen(attempts, limit)
    tried = "; ".join(f"round {a.number}: predicted {a.predicted_percent:.2f} % of the rate, prepared {a.start_percent:.2f} %, "
                      f"BD-rate {'n/a' if a.bd_rate is None else f'{a.bd_rate:+.2f} %'}" for a in attempts)
    how = f"The cheapest found below a BD-rate of {limit} % ({tried}); candidates {_choices(args)}."
    warnings = list(run.warnings)
    if not best.stays_below(limit):
        how = f"None of the rounds stayed below a BD-rate of {limit} % ({tried}); this one has the lowest."
        warnings.append(f"--max_bd_rate {limit} was not met; allow more bits with --bits_choices, or more --iters")
    return dataclasses.replace(run, bits=rounds[best.number].bits, how=how, warnings=warnings, taken_from=rounds[best.number].folder)
