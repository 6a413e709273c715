"""The folder of a run: what is finished is kept, what belongs to other settings is never mixed in.

    OUT/run.json                     the settings of the run
    OUT/q<quality>/partial.json      parts finished so far; gone when the quality is finished
    OUT/q<quality>/units/            the reconstruction's own state; gone likewise
    OUT/q<quality>/model.safetensors the quantized codec; of variable rate: OUT/model.safetensors, for all
    qualities
    OUT/q<quality>/crops.png         pieces of pictures for the report
    OUT/q<quality>/result.json       settings and every part, when the quality is finished
    OUT/measured/                    float codecs' evaluations and JPEG's curves, without --shared; gone when
                                     the run is finished
    OUT/report.{json,md,html}, OUT/rd.png, OUT/compressai/*.json written last

A run that starts anew in a used folder replaces a quality's files when that quality is finished, and the
report at the end; until then the old ones stand.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from licq.support.errors import InputError
from licq.support.files import sha256, writable_folder, write_json


class RunFolder:
    """Settings of a run, written before its first result.

    Args:
        settings: JSON-able; everything that the numbers depend on, apart from what differs by quality.
        resume: go on with what `out` holds.
        threads: what run.json says of them, beside the settings: a resumption has as many.
        part: another process has begun the run, and this one does a part of it.

    Raises:
        InputError: `out` cannot be written, or `resume` and it holds a run with other settings.
    """

    def __init__(
        self,
        out: str | Path,
        settings: dict[str, Any],
        resume: bool,
        threads: int | None = None,
        part: bool = False,
    ):
        self.path = Path(out)
        self.resume = resume
        before = read_json(self.path / "run.json") if resume or part else None
        if before is not None:
            refuse_other_settings(self.path, before.get("settings", {}), _plain(settings))
        self.settings = _plain(settings)
        if part:
            return
        writable_folder(self.path)
        # of every quality: unfinished parts must not be met by a later resumption with these settings
        if not resume:
            for folder in self.path.glob("q*/"):
                (folder / "partial.json").unlink(missing_ok=True)
                shutil.rmtree(folder / "units", ignore_errors=True)
            self.forget_measured()
        stated = {} if threads is None else {"threads": threads}
        write_json(self.path / "run.json", {"settings": self.settings, **stated})

    def quality(self, quality: int, settings: dict[str, Any], shared: bool = False) -> "QualityFolder":
        """The part of the folder that belongs to a quality; `settings` are its own, beside the run's.

        With `shared` there is one quantized codec for all.
        """
        return QualityFolder(
            self.path / f"q{quality}",
            {**self.settings, **_plain(settings)},
            self.resume,
            self.model(quality, shared),
        )

    @property
    def measured(self) -> Path:
        """Where the run keeps for itself what `runs.shared` can keep for several."""
        return self.path / "measured"

    def forget_measured(self) -> None:
        shutil.rmtree(self.measured, ignore_errors=True)

    def model(self, quality: int, shared: bool = False) -> Path:
        """Where the quantized codec of a quality, or of all, is saved."""
        return (self.path if shared else self.path / f"q{quality}") / "model.safetensors"

    def quality_parts(self, quality: int) -> dict[str, Any]:
        """The finished parts of a quality that this run has finished."""
        result = read_json(self.path / f"q{quality}" / "result.json")
        if result is None:
            raise InputError(
                f"{self.path / f'q{quality}'} holds no finished quality; start anew without --resume"
            )
        return result["parts"]


class QualityFolder:
    """Finished parts of one quality, by name, as JSON."""

    def __init__(self, path: Path, settings: dict[str, Any], resume: bool, model: Path):
        self.path = path
        self.model = model  # where the quantized codec is saved
        self.settings = settings
        self.parts: dict[str, Any] = {}
        for name in ("result.json", "partial.json") if resume else ():
            stored = read_json(path / name)
            if stored is not None and stored.get("settings") == settings:
                self.parts.update(stored.get("parts", {}))
        quant = self.parts.get("quant")
        if quant is not None and not (self.model.is_file() and sha256(self.model) == quant["model_sha256"]):
            # the model was deleted or replaced: made again, from its units where they are left
            del self.parts["quant"]
        if "quant" not in self.parts or not (path / "crops.png").is_file():
            self.parts.pop("crops", None)

    def part(self, name: str, compute: Callable[[], Any]) -> Any:
        """The finished part of that name, or what `compute` gives now, kept from now on."""
        if name not in self.parts:
            self.parts[name] = _plain(compute())
            write_json(self.path / "partial.json", {"settings": self.settings, "parts": self.parts})
        return self.parts[name]

    def finish(self) -> None:
        """Everything is there: write result.json, remove what only a resumption needs."""
        write_json(self.path / "result.json", {"settings": self.settings, "parts": self.parts})
        (self.path / "partial.json").unlink(missing_ok=True)
        shutil.rmtree(self.path / "units", ignore_errors=True)


def forget_run(out: Path) -> None:
    """Remove all that --resume would go on with, also of the rounds of a search; models and reports stand
    until others replace them."""
    for name in ("run.json", "partial.json", "result.json"):
        for path in list(out.rglob(name)):
            path.unlink()
    for units in list(out.rglob("q*/units")):
        shutil.rmtree(units, ignore_errors=True)


def refuse_other_settings(folder: Path, before: dict, now: dict) -> None:
    """Raises InputError that names the first settings in which a folder's run and this one differ."""
    old, new = _flat(before), _flat(now)
    changed = [key for key in [*old, *(key for key in new if key not in old)] if old.get(key) != new.get(key)]
    if changed:
        shown = ", ".join(f"{key} {_short(old.get(key))}, now {_short(new.get(key))}" for key in changed[:2])
        more = f", and {len(changed) - 2} more" if len(changed) > 2 else ""
        raise InputError(
            f"{folder} holds a run with other settings ({shown}{more}); repeat them, leave out --resume to "
            "start anew, or choose another folder with --out"
        )


def read_json(path: Path) -> dict | None:
    """A JSON object from a file; None where there is no file, or one that holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _plain(value: Any) -> Any:
    """`value` as it comes back from JSON: tuples are lists, so that settings can be compared."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def _flat(settings: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 40 else text[:12] + "..."
