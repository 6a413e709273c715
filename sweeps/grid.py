"""A sweep file: grids over any flags of main_ptq.py, written out as runs. docs/sweeps.md says how to write
one.

title: Bits of weights and activations
flags: {arch: lu2022, no-baseline: true}    for every run; knobs of --set under `set: {joint_iters: 40}`
grid:                                      every combination of one value of each axis
  bits:                                    mappings set several flags together; `name` is what tables call
  them
    - {name: W8A8, w_bits: 8, a_bits: 8}
    - {name: W4A8, w_bits: 4, a_bits: 8}
  loss: [mse, rd]                          an axis of single values is called after its flag; of a knob,
  set.joint_iters
seeds: [0, 1, 2]                           repeats, of which tables give mean and spread
table: {rows: bits, columns: loss, value: [bd_rate_psnr, delta_j_percent]}
plot: {x: bpp, y: psnr, lines: loss}
"""

import argparse
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from licq.support.errors import InputError

FILES = Path(__file__).parent / "files"
SEED = "seed"
METRICS = {  # what a table or a plot may show, of a run: its key in summary.csv and what it is called
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
CURVES = {"psnr": "PSNR [dB]", "ms_ssim": "MS-SSIM [dB]"}  # over bpp
_KEYS = {"title", "flags", "grid", "seeds", "table", "plot", "gpu_share"}
_OWN = {
    "sweep",
    "only",
    "workers",
    "ray",
    "gpu_share",
    "out",
    "resume",
    "shared",
    "quiet",
    "help",
    "help_all",
    SEED,
}  # the sweep's, not a run's


@dataclass(frozen=True)
class Run:
    """One command line of main_ptq.py. labels: axis -> what its value is called. words: without what the
    engine adds."""

    name: str
    labels: dict[str, str]
    words: tuple[str, ...]


@dataclass(frozen=True)
class Plot:
    """x: an axis, or bpp for R-D curves; y: a key of METRICS, or of CURVES over bpp; lines: an axis or
    None."""

    x: str
    y: str
    lines: str | None


@dataclass(frozen=True)
class Sweep:
    """A sweep file with the command line's changes. axes: name -> labels; rows, columns: axes; values: keys
    of METRICS."""

    name: str
    title: str
    axes: dict[str, list[str]]
    runs: tuple[Run, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[str, ...]
    plots: tuple[Plot, ...]
    gpu_share: float | None = None

    def chosen(self, only: Sequence[tuple[str, str]]) -> tuple[Run, ...]:
        """The runs at these values of axes, (axis, value or values with commas); all where an axis is not
        named.

        Raises:
            InputError: an axis or a value that the sweep does not have.
        """
        wanted = {}
        for axis, text in only:
            known = self.axes[_one(axis, "--only", self.axes)]
            labels = [text] if text in known else text.split(",")
            wanted.setdefault(axis, set()).update(
                _one(label.strip(), f"--only {axis}", known) for label in labels
            )
        return tuple(
            run for run in self.runs if all(run.labels[axis] in labels for axis, labels in wanted.items())
        )


@dataclass(frozen=True)
class _Choice:
    """One value of an axis: flags as words, knobs as text. None takes a flag away."""

    label: str
    flags: dict[str, list[str] | None] = field(default_factory=dict)
    knobs: dict[str, str] = field(default_factory=dict)


def list_sweeps() -> list[str]:
    """The names of the sweeps that come with the project."""
    return sorted(path.stem for path in FILES.glob("*.yaml"))


def load_sweep(name_or_file: str, parser: argparse.ArgumentParser, changes: Sequence[str] = ()) -> Sweep:
    """The runs of a sweep by name (see `list_sweeps`) or file.

    Args:
        parser: main_ptq.py's; says which flags there are. That their values make sense is for the caller to
        see.
        changes: further words of the command line, for every run: they replace the file's flags, and an axis
        of that flag.

    Raises:
        InputError: no such file, or one that does not say a sweep.
    """
    path = (
        Path(name_or_file)
        if Path(name_or_file).suffix in (".yaml", ".yml")
        else FILES / f"{name_or_file}.yaml"
    )
    if not path.is_file():
        raise InputError(
            f"no sweep {name_or_file}; choose --sweep from {', '.join(list_sweeps())}, or give a YAML file"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (
        OSError,
        ValueError,
        yaml.YAMLError,
    ) as error:  # ValueError: no UTF-8, or a date such as 2024-13-45
        raise InputError(
            f"{path}: not a readable sweep ({error}); docs/sweeps.md says how to write one"
        ) from error
    try:
        return _Reader(parser).read(path.stem, content, changes)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


class _Reader:
    """Turns the content of a sweep file into a Sweep."""

    def __init__(self, parser: argparse.ArgumentParser):
        self.actions = {
            option.lstrip("-"): action
            for action in parser._actions
            for option in action.option_strings
            if option.startswith("--")
        }

    def read(self, name: str, content: Any, changes: Sequence[str]) -> Sweep:
        content = _mapping(content, "the file", _KEYS)
        fixed = self._choice("flags", _mapping(content.get("flags") or {}, "flags"))
        axes = {
            axis: [self._value(axis, value) for value in _list(values, f"grid: {axis}")]
            for axis, values in _mapping(content.get("grid") or {}, "grid").items()
        }
        if content.get("seeds") is not None:
            axes[SEED] = [
                _Choice(f"{seed}", {SEED: [f"{seed}"]}) for seed in _list(content["seeds"], "seeds")
            ]
        changed, axes = self._change(changes, axes)
        setters = [
            (axis, key)
            for axis, choices in axes.items()
            for key in {
                key
                for choice in choices
                for key in (*choice.flags, *(f"set.{knob}" for knob in choice.knobs))
            }
        ]
        for axis, key in setters:
            other = next((other for other, same in setters if same == key and other != axis), None)
            if other:
                raise InputError(f"the axes {axis} and {other} both set {key}; leave it to one of them")
        labels = {axis: [choice.label for choice in choices] for axis, choices in axes.items()}
        for axis, names in labels.items():
            twice = next((label for label in names if names.count(label) > 1), None)
            if twice is not None:
                raise InputError(
                    f"grid: {axis} has {twice} twice; leave one out, or give each mapping a `name`"
                )
        runs = [
            _run(dict(zip(axes, chosen)), fixed, changed, labels)
            for chosen in itertools.product(*axes.values())
        ]
        names = [run.name for run in runs]
        twice = next((one for one in names if names.count(one) > 1), None)
        if twice is not None:
            raise InputError(f"two runs would have the folder {twice}; tell them apart by a `name`")
        share = content.get("gpu_share")
        if share is not None and not (isinstance(share, (int, float)) and 0 <= share <= 1):
            raise InputError(f"gpu_share: {share!r} is no share; choose 0 to 1")
        places = [axis for axis in axes if axis != SEED]
        rows, columns, values = _table(content.get("table") or {}, places)
        return Sweep(
            name,
            str(content.get("title") or name),
            labels,
            tuple(runs),
            rows,
            columns,
            values,
            _plots(content.get("plot") or [], places),
            share,
        )

    def _value(self, axis: str, value: Any) -> _Choice:
        """One value of an axis."""
        if isinstance(value, Mapping):
            value = _mapping(value, f"grid: {axis}")
            choice = self._choice(
                f"grid: {axis}", {key: item for key, item in value.items() if key != "name"}
            )
            return _Choice(
                str(value.get("name") or ",".join(f"{key}={_text(item)}" for key, item in value.items())),
                choice.flags,
                choice.knobs,
            )
        return _Choice(_label(value), *self._assign(f"grid: {axis}", axis, value))

    def _choice(self, where: str, flags: Mapping) -> _Choice:
        """Several flags together; `set` holds knobs."""
        given: dict[str, list[str] | None] = {}
        knobs: dict[str, str] = {}
        for name, value in flags.items():
            if name == "set":
                pairs = {f"set.{knob}": item for knob, item in _mapping(value, f"{where}: set").items()}
            else:
                pairs = {name: value}
            for key, item in pairs.items():
                more, known = self._assign(where, key, item)
                given |= more
                knobs |= known
        return _Choice("", given, knobs)

    def _assign(
        self, where: str, name: Any, value: Any
    ) -> tuple[dict[str, list[str] | None], dict[str, str]]:
        """A flag's words, or a knob's text."""
        name = str(name)
        if name.startswith("set."):
            if value is None:
                raise InputError(f"{where}: {name} has no value")
            return {}, {name.removeprefix("set."): _text(value)}
        if name in _OWN or name not in self.actions or name == "set":
            known = sorted(set(self.actions) - _OWN - {"set"})
            hint = "use `seeds`" if name == SEED else f"known are {', '.join(known)}, and set.<knob>"
            raise InputError(f"{where}: {name} is not a flag that a run may have; {hint}")
        if self.actions[name].nargs == 0:
            if value is not None and not isinstance(value, bool):
                raise InputError(f"{where}: {name} is true or false, not {_text(value)}")
            return {name: [] if value else None}, {}
        if isinstance(value, (bool, Mapping)):
            raise InputError(f"{where}: {name} takes a value, not {_text(value)}")
        return {name: None if value is None else [_text(value)]}, {}

    def _change(
        self, words: Sequence[str], axes: dict[str, list[_Choice]]
    ) -> tuple[_Choice, dict[str, list[_Choice]]]:
        """The flags of the command line, and the axes without those that they replace."""
        changed = _Choice("")
        for flag, values in _by_flag(words):
            if flag == "set":
                knob, _, text = " ".join(values).partition("=")
                changed.knobs[knob.strip()] = text.strip()
                key = f"set.{knob.strip()}"
            else:
                changed.flags[flag] = values
                key = flag
            for axis, choices in axes.items():
                if axis == key:
                    axes = axes | {
                        axis: [_Choice(_label(",".join(values) if flag != "set" else text.strip()))]
                    }
                elif any(
                    key in choice.flags or key.removeprefix("set.") in choice.knobs for choice in choices
                ):
                    raise InputError(
                        f"--{key.replace('.', ' ')} is what the sweep's {axis} varies; leave it out, or change the file"
                    )
        return changed, axes


def _by_flag(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Words of a command line that argparse has accepted, each flag with its values."""
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            flag, sign, value = word[2:].partition("=")
            found.append((flag, [value] if sign else []))
        else:
            found[-1][1].append(word)
    return found


def _run(chosen: dict[str, _Choice], fixed: _Choice, changed: _Choice, labels: dict[str, list[str]]) -> Run:
    flags, knobs = dict(fixed.flags), dict(fixed.knobs)
    for choice in (*chosen.values(), changed):
        flags |= choice.flags
        knobs |= choice.knobs
    words = [word for flag, values in flags.items() if values is not None for word in (f"--{flag}", *values)]
    words += [word for knob, text in knobs.items() for word in ("--set", f"{knob}={text}")]
    parts = [_folder_part(axis, choice.label) for axis, choice in chosen.items() if len(labels[axis]) > 1]
    return Run(
        "_".join(parts) or "run", {axis: choice.label for axis, choice in chosen.items()}, tuple(words)
    )


def _folder_part(axis: str, label: str) -> str:
    """A label in a folder's name; a number says of what."""
    plain = re.sub(r"[^A-Za-z0-9.+-]+", "-", label).strip("-.") or "x"
    return (
        f"{axis.removeprefix('set.')}{plain}"
        if re.fullmatch(r"[0-9.,+-]+", label) or label in ("true", "false")
        else plain
    )


def _table(given: Any, axes: list[str]) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    given = _mapping(given, "table", {"rows", "columns", "value"})
    rows = _names(given.get("rows"), "table: rows", axes) or tuple(axes[:1])
    columns = tuple(axis for axis in _names(given.get("columns"), "table: columns", axes) if axis not in rows)
    columns += tuple(axis for axis in axes if axis not in rows + columns)  # every axis has a place
    return (
        rows,
        columns,
        _names(given.get("value"), "table: value", METRICS) or ("bd_rate_psnr", "delta_j_percent"),
    )


def _plots(given: Any, axes: list[str]) -> tuple[Plot, ...]:
    plots = []
    for plot in given if isinstance(given, list) else [given]:
        plot = _mapping(plot, "plot", {"x", "y", "lines"})
        x = _one(plot.get("x"), "plot: x", ["bpp", *axes])
        y = _one(plot.get("y"), "plot: y", CURVES if x == "bpp" else METRICS)
        plots.append(
            Plot(x, y, _one(plot["lines"], "plot: lines", axes) if plot.get("lines") is not None else None)
        )
    return tuple(plots)


def _one(name: Any, where: str, known) -> str:
    if name not in list(known):
        raise InputError(f"{where}: {name} is not one of {', '.join(known)}")
    return name


def _names(value: Any, where: str, known) -> tuple[str, ...]:
    """One name or several, each known."""
    return tuple(
        _one(name, where, known)
        for name in ([] if value is None else value if isinstance(value, list) else [value])
    )


def _mapping(value: Any, where: str, known: set[str] | None = None) -> Mapping:
    if not isinstance(value, Mapping):
        raise InputError(f"{where} is no mapping of names to values")
    other = [key for key in value if not isinstance(key, str)]
    if other:
        raise InputError(
            f"{where} has the name {other[0]}, which YAML does not read as text; put it in quotes"
        )
    unknown = [key for key in value if known is not None and key not in known]
    if unknown:
        raise InputError(f"{where} has the unknown key {unknown[0]}; known are {', '.join(sorted(known))}")
    return value


def _list(value: Any, where: str) -> list:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where} is no list of values")
    return value


def _text(value: Any) -> str:
    """As the command line spells it: lists with commas, true and false."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(_text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _label(value: Any) -> str:
    """What a single value is called; a path by its last part."""
    text = _text(value)
    return Path(text).name if "/" in text else text
