"""`--max_bd_rate`: rounds of quantizing all qualities until the cheapest bits below the limit are known."""

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Sequence

from licq.quant.bits import Bits
from licq.reconstruction.mixed_precision import start_loss, totals
from licq.reconstruction.objective import Objective
from licq.runs.bit_search import Attempt, BdRateSearch, chosen
from licq.runs.folder import QualityFolder, RunFolder, forget_run
from licq.runs.layer_bits import bits_choices
from licq.runs.layer_search import measured_layers
from licq.runs.quality import quality_settings, run_all_qualities
from licq.runs.results import summarize
from licq.runs.run import Run


def below_bd_rate(run: Run) -> Run:
    """The run with the bits that were chosen, whose finished models are taken from the round that made them.

    Rounds are runs in OUT/round<number>, losses of layers are kept in OUT/search.
    """
    args = run.args
    if not args.resume:
        # of all rounds now: one that is not reached before an interrupt must not be met by a resumption
        for old in run.folder.path.glob("round*/"):
            forget_run(old)
    folder = RunFolder(run.folder.path / "search", run.folder.settings, args.resume)
    search = _Rounds(run, [folder.quality(codec.quality, quality_settings(codec)) for codec in run.codecs])
    return search.best(args.max_bd_rate)


class _Rounds:
    """The measurements of a `BdRateSearch`.

    Args:
        folders: what is measured of each codec is kept there.
    """

    def __init__(self, run: Run, folders: Sequence[QualityFolder]):
        self.run, self.folders = run, folders
        self.networks = [codec.load() for codec in run.codecs]
        self.layers = [
            measured_layers(run, index, network, folders[index])
            for index, network in enumerate(self.networks)
        ]
        self.rounds: dict[int, Run] = {}

    def best(self, limit: float) -> Run:
        """The run with the bits of the best round."""
        most_bits = [
            {layer.name: {"w_bits": max(layer.w_loss), "a_bits": max(layer.a_loss)} for layer in layers}
            for layers in self.layers
        ]
        bpp = [self._start(index, bits)["bpp"] for index, bits in enumerate(most_bits)]
        attempts = BdRateSearch(
            self.layers,
            bpp,
            lambda index, bits: self._start(index, bits)["loss"],
            self._quantize,
            "bops" if self.run.args.cost == "bops" else "mean_bits",
        ).run(limit)
        best = chosen(attempts, limit)
        tried = "; ".join(map(_described, attempts))
        warnings = list(self.run.warnings)
        if best.stays_below(limit):
            choices = ", ".join(map(str, bits_choices(self.run.args)))
            origin = f"The cheapest found below a BD-rate of {limit} % ({tried}); candidates {choices}."
        else:
            origin = (
                f"None of the rounds stayed below a BD-rate of {limit} % ({tried}); this one has the lowest."
            )
            warnings.append(
                f"--max_bd_rate {limit} was not met; allow more bits with --bits_choices, or more --iters"
            )
        round_run = self.rounds[best.number]
        return dataclasses.replace(
            self.run,
            layer_bits=round_run.layer_bits,
            bits_origin=origin,
            warnings=warnings,
            models_from=round_run.folder,
        )

    def _start(self, index: int, bits: Bits) -> dict[str, float]:
        """See `start_loss`."""
        run, key = self.run, hashlib.sha256(json.dumps(bits, sort_keys=True).encode()).hexdigest()[:16]
        objective = Objective(run.models[index].lmbda, run.args.metric)
        return self.folders[index].part(
            f"start {key}",
            lambda: start_loss(
                self.networks[index],
                run.crops,
                run.config,
                objective,
                bits,
                run.device,
                run.whole,
                run.progress,
            ),
        )

    def _quantize(self, number: int, bits: Sequence[Bits]) -> float | None:
        """The BD-rate of a round, in percent."""
        run = self.run
        layer_bits = {
            model.quality: bits[0 if run.is_variable else index] for index, model in enumerate(run.models)
        }
        settings = {**run.folder.settings, "bits": layer_bits}
        self.rounds[number] = dataclasses.replace(
            run,
            args=argparse.Namespace(**{**vars(run.args), "baseline": False}),
            folder=RunFolder(run.folder.path / f"round{number}", settings, run.args.resume),
            layer_bits=layer_bits,
            bits_origin=f"Round {number} of --max_bd_rate {run.args.max_bd_rate}.",
            cache={},
        )
        means = [totals(layers, of_codec).mean_bits for layers, of_codec in zip(self.layers, bits)]
        run.say(f"round {number}: {', '.join(f'{mean:.2f} bits a weight' for mean in means)}")
        return summarize(self.rounds[number], run_all_qualities(self.rounds[number]))["bd_rate_psnr"]


def _described(attempt: Attempt) -> str:
    bd_rate = "n/a" if attempt.bd_rate is None else f"{attempt.bd_rate:+.2f} %"
    return (
        f"round {attempt.number}: predicted {attempt.predicted_percent:.2f} % of the rate, "
        f"prepared {attempt.start_percent:.2f} %, BD-rate {bd_rate}"
    )
