"""Sweep files: grids over any flags of main_ptq.py, read as runs. docs/sweeps.md says how to write one.

title: Bits of weights and activations
flags: {arch: lu2022, no-baseline: true}   for every run; knobs under `set: {joint_iters: 40}`
grid:                                      every combination of one value of each axis
  bits:                                    a mapping sets several flags; tables call it by its `name`
    - {name: W8A8, w_bits: 8, a_bits: 8}
    - {name: W4A8, w_bits: 4, a_bits: 8}
  loss: [mse, rd]                          an axis of single values has the name of its flag, or of its
                                           knob (set.joint_iters)
seeds: [0, 1, 2]                           repeats, of which tables show mean and spread
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
from licq.sweeps.sweep import CURVES, METRICS, SEED, Plot, Sweep, SweepRun
from licq.sweeps.values import as_text, label_of, list_of, mapping, names_of, one_of

FILES = Path(__file__).parent / "files"
_KEYS = {"title", "flags", "grid", "seeds", "table", "plot", "gpu_share"}
_OF_THE_SWEEP = {
    "sweep",
    "only",
    "workers",
    "ray",
    "gpu_share",
    "out",
    "resume",
    "shared",
    "part",
    "quiet",
    "help",
    "help_all",
    SEED,
}  # flags of the whole sweep, which no run has


@dataclass(frozen=True)
class _Choice:
    """One value of an axis.

    Args:
        label: what the value is called.
        flags: flag -> its words; None takes the flag away.
        knobs: field of the reconstruction's configuration -> its value as text.
    """

    label: str
    flags: dict[str, list[str] | None] = field(default_factory=dict)
    knobs: dict[str, str] = field(default_factory=dict)


def list_sweeps() -> list[str]:
    """The names of the sweeps that come with the project."""
    return sorted(path.stem for path in FILES.glob("*.yaml"))


def load_sweep(name_or_file: str, parser: argparse.ArgumentParser, changes: Sequence[str] = ()) -> Sweep:
    """Read a sweep.

    Args:
        name_or_file: a name of `list_sweeps`, or the path of a YAML file.
        parser: main_ptq.py's, for the flags that there are. The caller has to check their values.
        changes: further words of the command line, for all runs. They replace flags of the file, and an axis
            of single values of such a flag.

    Raises:
        InputError: no such file, or one that is no sweep.
    """
    path = (
        Path(name_or_file)
        if Path(name_or_file).suffix in (".yaml", ".yml")
        else FILES / f"{name_or_file}.yaml"
    )
    if not path.is_file():
        raise InputError(
            f"no sweep {name_or_file}; choose `sweep` from {', '.join(list_sweeps())}, or give a YAML file"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        # ValueError: no UTF-8, or a date such as 2024-13-45
        raise InputError(
            f"{path}: not a readable sweep ({error}); docs/sweeps.md says how to write one"
        ) from error
    try:
        return _Reader(parser).read(path.stem, content, changes)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def read_sweep(name: str, content: Any, parser: argparse.ArgumentParser) -> Sweep:
    """The sweep that a mapping, read from YAML, describes; see `load_sweep`.

    Raises:
        InputError: it is no sweep.
    """
    return _Reader(parser).read(name, content, ())


class _Reader:
    """Reads the content of a sweep file, for the flags of a parser."""

    def __init__(self, parser: argparse.ArgumentParser):
        self.actions = {
            option.lstrip("-"): action
            for action in parser._actions
            for option in action.option_strings
            if option.startswith("--")
        }

    def read(self, name: str, file: Any, changes: Sequence[str]) -> Sweep:
        content = mapping(file, "the file", _KEYS)
        fixed = self._choice("flags", mapping(content.get("flags") or {}, "flags"))
        axes = {
            axis: [self._value(axis, value) for value in list_of(values, f"grid: {axis}")]
            for axis, values in mapping(content.get("grid") or {}, "grid").items()
        }
        if content.get("seeds") is not None:
            axes[SEED] = [
                _Choice(f"{seed}", {SEED: [f"{seed}"]}) for seed in list_of(content["seeds"], "seeds")
            ]
        changed, axes = self._change(changes, axes)
        _refuse_clashes(axes)
        labels = {axis: [choice.label for choice in choices] for axis, choices in axes.items()}
        runs = [
            _run(dict(zip(axes, chosen)), fixed, changed, labels)
            for chosen in itertools.product(*axes.values())
        ]
        twice = _repeated([run.name for run in runs])
        if twice is not None:
            raise InputError(f"two runs would have the folder {twice}; tell them apart by a `name`")
        share = content.get("gpu_share")
        if share is not None and not (isinstance(share, (int, float)) and 0 <= share <= 1):
            raise InputError(f"gpu_share: {share!r} is no share; choose 0 to 1")
        without_seed = [axis for axis in axes if axis != SEED]
        rows, columns, values = _table(content.get("table") or {}, without_seed)
        return Sweep(
            name,
            str(content.get("title") or name),
            labels,
            tuple(runs),
            rows,
            columns,
            values,
            _plots(content.get("plot") or [], without_seed),
            share,
        )

    def _value(self, axis: str, value: Any) -> _Choice:
        """One value of an axis."""
        if isinstance(value, Mapping):
            value = mapping(value, f"grid: {axis}")
            choice = self._choice(
                f"grid: {axis}", {key: item for key, item in value.items() if key != "name"}
            )
            return _Choice(
                str(value.get("name") or ",".join(f"{key}={as_text(item)}" for key, item in value.items())),
                choice.flags,
                choice.knobs,
            )
        return _Choice(label_of(value), *self._assign(f"grid: {axis}", axis, value))

    def _choice(self, where: str, flags: Mapping) -> _Choice:
        """Several flags together, with knobs under `set`."""
        words: dict[str, list[str] | None] = {}
        knobs: dict[str, str] = {}
        for name, value in flags.items():
            if name == "set":
                pairs = {f"set.{knob}": item for knob, item in mapping(value, f"{where}: set").items()}
            else:
                pairs = {name: value}
            for key, item in pairs.items():
                more, known = self._assign(where, key, item)
                words |= more
                knobs |= known
        return _Choice("", words, knobs)

    def _assign(
        self, where: str, name: Any, value: Any
    ) -> tuple[dict[str, list[str] | None], dict[str, str]]:
        """A flag's words, or a knob's text."""
        name = str(name)
        if name.startswith("set."):
            if value is None:
                raise InputError(f"{where}: {name} has no value")
            return {}, {name.removeprefix("set."): as_text(value)}
        if name in _OF_THE_SWEEP or name not in self.actions or name == "set":
            known = sorted(set(self.actions) - _OF_THE_SWEEP - {"set"})
            hint = "use `seeds`" if name == SEED else f"known are {', '.join(known)}, and set.<knob>"
            raise InputError(f"{where}: {name} is not a flag that a run may have; {hint}")
        if self.actions[name].nargs == 0:
            if value is not None and not isinstance(value, bool):
                raise InputError(f"{where}: {name} is true or false, not {as_text(value)}")
            return {name: [] if value else None}, {}
        if isinstance(value, (bool, Mapping)):
            raise InputError(f"{where}: {name} takes a value, not {as_text(value)}")
        return {name: None if value is None else [as_text(value)]}, {}

    def _change(
        self, words: Sequence[str], axes: dict[str, list[_Choice]]
    ) -> tuple[_Choice, dict[str, list[_Choice]]]:
        """The flags of the command line, and the axes without those that they replace."""
        changed = _Choice("")
        for flag, values in _by_flag(words):
            if flag == "set":
                knob, _, value = (part.strip() for part in " ".join(values).partition("="))
                changed.knobs[knob] = value
                key = f"set.{knob}"
            else:
                changed.flags[flag] = values
                key, value = flag, ",".join(values)
            for axis, choices in axes.items():
                if axis == key:
                    axes = axes | {axis: [_Choice(label_of(value))]}
                elif any(
                    key in choice.flags or key.removeprefix("set.") in choice.knobs for choice in choices
                ):
                    raise InputError(
                        f"--{key.replace('.', ' ')} is what the sweep's {axis} varies; leave it out, or "
                        "change the file"
                    )
        return changed, axes


def _by_flag(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Words of a command line that argparse has accepted, each flag with its values."""
    flags: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            flag, sign, value = word[2:].partition("=")
            flags.append((flag, [value] if sign else []))
        else:
            flags[-1][1].append(word)
    return flags


def _refuse_clashes(axes: Mapping[str, Sequence[_Choice]]) -> None:
    """Raises InputError where two axes set the same flag, or an axis has a value twice."""
    setter: dict[str, str] = {}  # flag or knob -> the axis that sets it
    for axis, choices in axes.items():
        for choice in choices:
            for key in (*choice.flags, *(f"set.{knob}" for knob in choice.knobs)):
                other = setter.setdefault(key, axis)
                if other != axis:
                    raise InputError(f"the axes {other} and {axis} both set {key}; leave it to one of them")
    for axis, choices in axes.items():
        twice = _repeated([choice.label for choice in choices])
        if twice is not None:
            raise InputError(f"grid: {axis} has {twice} twice; leave one out, or give each mapping a `name`")


def _repeated(names: list[str]) -> str | None:
    """A name that is there more than once."""
    return next((name for name in names if names.count(name) > 1), None)


def _run(
    chosen: dict[str, _Choice], fixed: _Choice, changed: _Choice, labels: dict[str, list[str]]
) -> SweepRun:
    """One run.

    Args:
        chosen: axis -> its value.
        fixed: what all runs have in the file.
        changed: what they have on the command line.
        labels: axis -> what all its values are called.
    """
    flags, knobs = dict(fixed.flags), dict(fixed.knobs)
    for choice in (*chosen.values(), changed):
        flags |= choice.flags
        knobs |= choice.knobs
    words = [word for flag, values in flags.items() if values is not None for word in (f"--{flag}", *values)]
    words += [word for knob, text in knobs.items() for word in ("--set", f"{knob}={text}")]
    parts = [_folder_part(axis, choice.label) for axis, choice in chosen.items() if len(labels[axis]) > 1]
    return SweepRun(
        "_".join(parts) or "run", {axis: choice.label for axis, choice in chosen.items()}, tuple(words)
    )


def _folder_part(axis: str, label: str) -> str:
    """A label as a part of a folder's name; a number has the name of its axis before it."""
    plain = re.sub(r"[^A-Za-z0-9.+-]+", "-", label).strip("-.") or "x"
    return (
        f"{axis.removeprefix('set.')}{plain}"
        if re.fullmatch(r"[0-9.,+-]+", label) or label in ("true", "false")
        else plain
    )


def _table(content: Any, axes: list[str]) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The rows, columns and values of a table; every axis gets a place."""
    given = mapping(content, "table", {"rows", "columns", "value"})
    rows = names_of(given.get("rows"), "table: rows", axes) or tuple(axes[:1])
    columns = tuple(
        axis for axis in names_of(given.get("columns"), "table: columns", axes) if axis not in rows
    )
    columns += tuple(axis for axis in axes if axis not in rows + columns)
    return (
        rows,
        columns,
        names_of(given.get("value"), "table: value", METRICS) or ("bd_rate_psnr", "delta_j_percent"),
    )


def _plots(content: Any, axes: list[str]) -> tuple[Plot, ...]:
    """One plot, or those of a list."""
    plots = []
    for given in content if isinstance(content, list) else [content]:
        plot = mapping(given, "plot", {"x", "y", "lines"})
        x = one_of(plot.get("x"), "plot: x", ["bpp", *axes])
        y = one_of(plot.get("y"), "plot: y", CURVES if x == "bpp" else METRICS)
        plots.append(
            Plot(x, y, one_of(plot["lines"], "plot: lines", axes) if plot.get("lines") is not None else None)
        )
    return tuple(plots)
