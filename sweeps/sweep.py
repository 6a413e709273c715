"""A sweep: many runs of main_ptq.py, the axes along which they differ, and how their results are shown."""

from collections.abc import Sequence
from dataclasses import dataclass

from licq.sweeps.values import one_of

SEED = "seed"  # the axis of the repeats
METRICS = {  # what a table or a plot may show of a run: its key in summary.csv -> its title
    "bd_rate_psnr": "BD-rate, PSNR [%]",
    "bd_rate_psnr_cubic": "BD-rate, PSNR, cubic [%]",
    "bd_rate_ms_ssim": "BD-rate, MS-SSIM [%]",
    "bd_rate_psnr_baseline": "BD-rate of plain quantization, PSNR [%]",
    "delta_j_percent": "mean change of J [%]",
    "bpp": "mean bpp",
    "psnr": "mean PSNR [dB]",
    "ms_ssim": "mean MS-SSIM",
    "calibration_seconds": "calibration [s]",
    "peak_memory_mb": "peak memory [MB]",
    "model_bytes": "models [bytes]",
}
CURVES = {"psnr": "PSNR [dB]", "ms_ssim": "MS-SSIM [dB]"}  # what a plot over bpp may show -> its title


@dataclass(frozen=True)
class SweepRun:
    """One command line of main_ptq.py.

    Args:
        name: also of its folder.
        labels: axis -> what its value is called.
        words: the command line, without what the engine adds.
    """

    name: str
    labels: dict[str, str]
    words: tuple[str, ...]


@dataclass(frozen=True)
class Plot:
    """A plot of the summary.

    Args:
        x: an axis, or "bpp" for R-D curves.
        y: a key of `METRICS`; over bpp, one of `CURVES`.
        lines: the axis with a line for each of its values; None for one line.
    """

    x: str
    y: str
    lines: str | None


@dataclass(frozen=True)
class Sweep:
    """A sweep: runs, and how their results are shown.

    Args:
        name: also of its folder.
        title: for the user.
        axes: name -> the labels of its values.
        runs: one for each combination of values.
        rows, columns: the axes of the table.
        values: keys of `METRICS`; there is a table for each.
        plots: of the summary.
        gpu_share: of a GPU for each run on Ray; None: as the command line says.
    """

    name: str
    title: str
    axes: dict[str, list[str]]
    runs: tuple[SweepRun, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[str, ...]
    plots: tuple[Plot, ...]
    gpu_share: float | None = None

    def chosen(self, only: Sequence[tuple[str, str]]) -> tuple[SweepRun, ...]:
        """The runs at certain values of axes.

        Args:
            only: (axis, value or values with commas); of other axes all values.

        Raises:
            InputError: an axis or a value that the sweep does not have.
        """
        chosen: dict[str, set[str]] = {}
        for axis, text in only:
            known = self.axes[one_of(axis, "`only`", self.axes)]
            labels = [text] if text in known else text.split(",")
            chosen.setdefault(axis, set()).update(
                one_of(label.strip(), f"`only` {axis}", known) for label in labels
            )
        return tuple(
            run for run in self.runs if all(run.labels[axis] in labels for axis, labels in chosen.items())
        )
