"""One call from a float codec to a quantized one."""

import dataclasses
import resource
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from licq.models.qvrf import VariableRate
from licq.quant.bits import Bits
from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.quant.rounding import ROUNDINGS
from licq.reconstruction.balance import balance_scales
from licq.reconstruction.config import AWARE, PtqConfig, ReconstructionConfig
from licq.reconstruction.driver import Reconstruction
from licq.reconstruction.gptq import compensate_rounding, turned
from licq.reconstruction.objective import Objective, mean_cost
from licq.reconstruction.search import best_norm, search_ranges
from licq.reconstruction.sensitivity import Sensitivity, measure_sensitivities, predicted_losses
from licq.reconstruction.split import split_channels
from licq.reconstruction.state import StateFolder, fingerprint, learned, restore
from licq.reconstruction.stress import stressed
from licq.support.errors import InputError
from licq.support.progress import progress as progress_bar


def quantize(
    model: nn.Module,
    images: Tensor,
    config: PtqConfig | None = None,
    *,
    lmbda: float,
    metric: str = "mse",
    bits: Bits | None = None,
    device: torch.device | str | None = None,
    folder: Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> QuantModel:
    """Quantize a codec on calibration images.

    Args:
        model: float codec; its forward maps (B, 3, H, W) in 0..1 to {"x_hat", "likelihoods"}. It is not
        changed.
        images: calibration crops (n, 3, H, W) in 0..1, 8-bit samples; see `data.calibration.sample_crops`.
        The first
            `config.reconstruction.measured` are those that J is measured on. For a variable-rate codec (n, 5,
            H, W), with the gain and the lambda of each crop (`models.qvrf.VariableRate.with_planes`): crops
            of all rates make one codec.
        config: the method; default the preset "licq".
        lmbda: weight of the distortion in J = R + lambda * D that the codec was trained with.
        metric: "mse" (D = 255^2 * mse) or "ms-ssim" (D = 1 - MS-SSIM).
        bits: of single layers, see `QuantModel`; default those of `config` for all.
        device: where to run; default where the model is.
        folder: where finished units are kept for `resume`; default nowhere.
        resume: go on behind the last finished unit in `folder`; the result is that of an uninterrupted run.
        progress: show bars with the time left.

    Returns:
        A frozen `QuantModel`. Its `history` has J of the float codec (`j_float`), of the quantized one before
        and after (`j_start`, `j_end`), the same for each unit, what channel splitting added (`splitting`),
        the rise of J that rounding noise still makes in each layer (`predicted`), what a search of ranges
        found (`search`), seconds in all and `seconds_by_step` of this process, and the peak memory of the
        process in MB.

    Raises:
        InputError: images of a wrong shape, a lambda that is not positive, bits of an unknown layer, a folder
        of another
            calibration.
    """
    config = config or PtqConfig.from_preset()
    objective = Objective(lmbda, metric)
    _check_images(model, images)
    started = time.monotonic()
    own = [dict(bits)] if bits else []
    identity = fingerprint(model, images, config.to_dict(), lmbda, metric, *own)
    state = StateFolder(None if folder is None else Path(folder) / "units", identity, resume)
    start = prepare(
        model, images, config, objective, bits=bits, device=device, state=state, progress=progress
    )
    qmodel, measured = start.qmodel, start.batches[: start.measured]
    qmodel.quantize_nodes(True)
    j_start = mean_cost(
        qmodel,
        progress_bar(measured, desc="measuring J", unit="batch", enabled=progress, leave=False),
        objective,
    )
    history = {"j_start": j_start, "splitting": start.splitting, "search": start.search}
    history |= Reconstruction(
        qmodel, start.batches, start.measured, config.reconstruction, objective, state, progress
    ).run()
    start.clock.lap("learning")
    history["predicted"] = predicted_losses(qmodel, start.sensitivities)
    qmodel.freeze()
    history["seconds_by_step"] = start.clock.laps
    history["seconds"] = time.monotonic() - started + start.resumed_seconds + history.pop("resumed_seconds")
    history["peak_memory_mb"] = peak_memory_mb(next(qmodel.parameters()).device)
    qmodel.history = history
    return qmodel


class _Clock:
    """Seconds of each step."""

    def __init__(self):
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self._last = now - self._last, now


@dataclasses.dataclass(frozen=True)
class Start:
    """What learning starts from.

    qmodel: observed, with its split and balanced scales and the first rounding; not frozen, its nodes in
    float.
    batches: the crops; J is measured on the first `measured` of them.
    sensitivities: of J. splitting: what channel splitting added. search: what a search of ranges found.
    resumed_seconds: that an earlier process has spent.
    """

    qmodel: QuantModel
    batches: list[Tensor]
    measured: int
    sensitivities: dict[str, Sensitivity]
    splitting: dict
    search: dict | None
    resumed_seconds: float
    clock: _Clock


def prepare(
    model: nn.Module,
    images: Tensor,
    config: PtqConfig,
    objective: Objective,
    *,
    bits: Bits | None = None,
    device: torch.device | str | None = None,
    state: StateFolder | None = None,
    progress: bool = True,
) -> Start:
    """The steps of `quantize` before anything is learned: ranges, splitting, balance, the first rounding.

    Args:
        state: where GPTQ's start is kept and taken from; default nowhere. The others are those of `quantize`.
    """
    if device is None:
        parameter = next(model.parameters(), None)
        device = images.device if parameter is None else parameter.device
    clock, knobs = _Clock(), config.reconstruction
    state = state or StateFolder(None, "", False)
    images = images.to(device)
    measured, observed, batches = _batches(images, knobs)
    harder = stressed(images[: knobs.measured]).split(knobs.batch) if knobs.stress else ()

    def observing(quant: QuantConfig) -> QuantModel:
        qmodel = QuantModel(model, quant, bits).to(device)
        with progress_bar(
            total=len(observed) + len(harder),
            desc="observing ranges",
            unit="batch",
            enabled=progress,
            leave=False,
        ) as bar:
            qmodel.observe(_counted(observed, bar), _counted(harder, bar))
        return qmodel

    quant, searched = config.quant, None
    if knobs.range_search == "powell":

        def cost_of(tried: QuantConfig) -> float:
            qmodel = observing(tried)
            qmodel.quantize_nodes(True)
            return mean_cost(qmodel, measured, objective)

        quant, searched = best_norm(quant, cost_of, state, progress)
    qmodel = observing(quant)
    clock.lap("observing")
    sensitivities = measure_sensitivities(qmodel, measured, objective, knobs.seed, progress)
    aim = (
        sensitivities
        if knobs.loss in AWARE
        else measure_sensitivities(qmodel, measured, None, knobs.seed, progress)
    )
    clock.lap("measuring sensitivities")
    splitting = split_channels(qmodel, aim, knobs.split)
    if knobs.balance:
        balance_scales(qmodel, aim, knobs.balance, progress)
    clock.lap("splitting and balancing")
    if searched is not None:
        searched |= search_ranges(qmodel, measured, objective, knobs.search_evals, state, progress)
        clock.lap("searching ranges")
    resumed = 0.0
    if knobs.round_init == "gptq" and ROUNDINGS[config.quant.rounding].starts_anywhere:
        shown = observed if len(images) >= knobs.observed else turned(observed)
        resumed = _start_rounding(qmodel, shown, knobs.seed, state, progress)
    clock.lap("compensating rounding")
    return Start(qmodel, batches, len(measured), sensitivities, splitting, searched, resumed, clock)


def _check_images(model: nn.Module, images: Tensor) -> None:
    channels = 5 if isinstance(model, VariableRate) else 3
    if images.ndim != 4 or images.shape[1] != channels or not len(images):
        raise InputError(
            f"calibration images of shape {tuple(images.shape)}; (n, {channels}, H, W) is needed"
        )


def _batches(images: Tensor, knobs: ReconstructionConfig) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Crops in batches: those that J is measured on; these and more to observe; all."""
    measured, observed, rest = torch.tensor_split(
        images, (knobs.measured, max(knobs.observed, knobs.measured))
    )
    found: list[Tensor] = []
    parts = []
    for part in (measured, observed, rest):
        found = found + (list(part.split(knobs.batch)) if len(part) else [])
        parts.append(found)
    return parts[0], parts[1], parts[2]


def _start_rounding(
    qmodel: QuantModel, batches: list[Tensor], seed: int, state: StateFolder, progress: bool
) -> float:
    """GPTQ's start, or the killed run's, where its seconds are returned; what comes before is soon
    repeated."""
    parameters = learned(qmodel.nodes)
    stored = state.load("start")
    if stored is not None:
        restore(parameters, stored[1])
        return stored[0]["seconds"]
    started = time.monotonic()
    compensate_rounding(qmodel, batches, seed, progress)
    state.save("start", {"seconds": time.monotonic() - started}, parameters)
    return 0.0


def _counted(batches: Iterable[Tensor], bar: tqdm) -> Iterator[Tensor]:
    for batch in batches:
        yield batch
        bar.update()


def peak_memory_mb(device: torch.device | str) -> float:
    """The most memory this process has held so far, in MB: of the GPU where it runs on one."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
