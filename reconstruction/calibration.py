"""A calibration from the float codec to the quantized one: its state, and how its steps are run."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from licq.quant.bits import Bits
from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.quant.network_checks import unwrapped
from licq.reconstruction.config import PtqConfig, ReconstructionConfig
from licq.reconstruction.expected import OBSERVING
from licq.reconstruction.objective import Objective
from licq.reconstruction.sensitivity import Sensitivity
from licq.reconstruction.state import StateFolder
from licq.reconstruction.stress import flat, stressed
from licq.support.progress import progress as progress_bar


@dataclasses.dataclass
class Calibration:
    """What the steps read and write.

    The first nine fields are given; the steps fill in the others, in the order of `steps.STEPS`.
    """

    model: nn.Module
    """The float codec; it is not changed."""

    crops: Tensor
    """(n, 3, H, W) in 0..1; (n, 5, H, W) of a variable-rate codec."""

    config: PtqConfig
    """The method."""

    objective: Objective
    """J."""

    bits: Bits | None = None
    """Of single layers; the others have those of `config`."""

    device: torch.device | str | None = None
    """Where to run; None: where the model is."""

    whole: Sequence[Tensor] = ()
    """The images of the crops, (3, H, W) in uint8, of any sizes."""

    state: StateFolder = dataclasses.field(default_factory=lambda: StateFolder(None, "", False))
    """Where finished parts are stored, and taken from when a killed calibration is repeated."""

    progress: bool = True
    """Show bars."""

    quant: QuantConfig = dataclasses.field(init=False)
    """`config.quant`, with the ranges of the best norm where that is searched."""

    qmodel: QuantModel = dataclasses.field(init=False)
    """The codec that is quantized; observed, not frozen."""

    sensitivities: dict[str, Sensitivity] = dataclasses.field(init=False)
    """Of J, for each layer."""

    guide: dict[str, Sensitivity] = dataclasses.field(init=False)
    """What splitting and balancing lower: `sensitivities` where the loss knows J, else those of each layer's
    own relative squared error."""

    history: dict[str, Any] = dataclasses.field(default_factory=lambda: {"search": None})
    """What each step has to say: `QuantModel.history`."""

    seconds_by_step: dict[str, float] = dataclasses.field(default_factory=dict)
    """Of this process, by the names of the steps."""

    resumed_seconds: float = 0.0
    """That earlier processes have spent on what was taken from `state`."""

    batches: list[Tensor] = dataclasses.field(init=False)
    """All crops, (config.reconstruction.batch, 3, H, W) each; the first ones are `measured_batches`."""

    measured_batches: list[Tensor] = dataclasses.field(init=False)
    """Those that J is measured on."""

    observed_batches: list[Tensor] = dataclasses.field(init=False)
    """Those that set ranges and that rounding is compensated on; the first ones are `measured_batches`."""

    def __post_init__(self):
        self.model = unwrapped(self.model)
        if self.device is None:
            self.device = device_of(self.model, self.crops)
        self.crops = self.crops.to(self.device)
        if self.crops.is_inference():  # gradients cannot be taken through such a tensor
            self.crops = self.crops.clone()
        self.quant = self.config.quant
        knobs = self.knobs
        parts = torch.tensor_split(self.crops, (knobs.measured, max(knobs.observed, knobs.measured)))
        measured, observed, rest = (list(part.split(knobs.batch)) if len(part) else [] for part in parts)
        self.measured_batches = measured
        self.observed_batches = measured + observed
        self.batches = measured + observed + rest

    @property
    def knobs(self) -> ReconstructionConfig:
        """`config.reconstruction`."""
        return self.config.reconstruction

    @property
    def measured(self) -> int:
        """J is measured on the first so many of `batches`."""
        return len(self.measured_batches)

    @property
    def flat_batches(self) -> tuple[Tensor, ...]:
        """Flat pictures of the crops' size, in batches; none where the knobs leave them out."""
        return flat(self.crops).split(self.knobs.batch) if self.knobs.flat else ()

    def observed_model(self, quant: QuantConfig) -> QuantModel:
        """The codec with these settings, its ranges observed on the crops, and with `stress` on harder."""
        harder: tuple[Tensor, ...] = ()
        if self.knobs.stress:
            harder = stressed(self.crops[: self.knobs.measured]).split(self.knobs.batch)
        harder += self.flat_batches
        whole = self.whole if self.knobs.whole else ()
        qmodel = QuantModel(self.model, quant, self.bits).to(self.device)
        with progress_bar(
            total=len(self.observed_batches) + len(whole) + len(harder),
            desc=OBSERVING,
            unit="batch",
            enabled=self.progress,
            leave=False,
        ) as bar:
            images = chain(self.observed_batches, map(self._as_batch, range(len(whole)), whole))
            qmodel.observe(_counted(images, bar), _counted(harder, bar))
        return qmodel

    def _as_batch(self, number: int, pixels: Tensor) -> Tensor:
        """uint8 (3, H, W) as a batch in 0..1; of a variable-rate codec with the planes of a crop."""
        image = pixels.to(self.device)[None].float() / 255
        planes = self.crops[number % len(self.crops), None, 3:, :1, :1]
        return torch.cat([image, planes.expand(-1, -1, *image.shape[2:])], 1)


def device_of(model: nn.Module, crops: Tensor) -> torch.device:
    """Where the model is; where the crops are, if it has no parameters."""
    parameter = next(model.parameters(), None)
    return crops.device if parameter is None else parameter.device


def _counted(batches: Iterable[Tensor], bar: Any) -> Iterator[Tensor]:
    for batch in batches:
        yield batch
        bar.update()


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a calibration."""

    name: str
    """Its time is added to this entry of `seconds_by_step`."""

    run: Callable[[Calibration], None]
    """It changes the calibration in place and writes its own entries of the history."""

    applies: Callable[[PtqConfig], bool] = lambda config: True
    """Whether the method asks for it."""


def run_steps(calibration: Calibration, steps: Iterable[Step]) -> None:
    """Run the steps that apply, in their order, and keep their times."""
    seconds = calibration.seconds_by_step
    for step in steps:
        if step.applies(calibration.config):
            started = time.monotonic()
            step.run(calibration)
            seconds[step.name] = seconds.get(step.name, 0.0) + time.monotonic() - started
