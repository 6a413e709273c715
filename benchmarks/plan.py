"""The plan of the measured tables, benchmarks/tables.yaml: which runs of main_ptq.py each table is made of.

A run is a cell: a codec with all its rates, a method, bits, a seed and calibration images. A cell that
several tables have is one cell. The file is read with the reader of sweep files, so its flags and knobs are
checked.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout, whatever is installed

from licq.reconstruction.config import PtqConfig
from licq.runs.flags import build_config
from licq.support.errors import InputError
from licq.sweeps.grid import read_sweep
from licq.sweeps.values import as_text, list_of, mapping, one_of

PLAN = ROOT / "benchmarks" / "tables.yaml"
CHECKPOINTS = "{checkpoints}"  # stands in the plan and in records for a folder of this machine
_OF_VALUES = {
    "depends",
    "minutes",
    "layers",
    "learning",
    "learning_below_8",
    "learning_a_layer",
}  # what a value has beside flags
_OF_TABLES = {"title", "text", "notes", "grid", "seeds", "flags", "show", "paper"}
_IN_NAMES = ("preset", "w_bits", "a_bits")  # flags that the name of a cell shows without their names


@dataclass(frozen=True)
class Cell:
    """One run of main_ptq.py.

    Args:
        codec: its name in the plan; the folder of its record.
        name: of its record's file, made from the flags in which cells differ.
        words: the command line without folders; `CHECKPOINTS` stands for a folder.
        config: the fields of the method that are not the default, e.g. {"preset": "nearest", "iters": 0}.
        depends: kinds of changes of numbers.json that make its results old.
        minutes: that the run takes, as the plan expects.
        problem: why it cannot be run here; None where it can.
    """

    codec: str
    name: str
    words: tuple[str, ...]
    config: dict[str, Any] = field(compare=False)
    depends: frozenset[str] = field(compare=False)
    minutes: float = field(compare=False)
    problem: str | None = field(compare=False)

    @property
    def key(self) -> str:
        return f"{self.codec}/{self.name}"

    @property
    def method(self) -> str:
        """What cells have in common whose time says something about each other's."""
        return f"{self.config['preset']} {self.config.get('w_bits', 8)}"


@dataclass(frozen=True)
class Table:
    """A table of the plan.

    Args:
        content: its mapping in the file.
        cells: by their labels, (axis, label) of every axis, without the seed; one a seed.
        axes: axis -> its labels, in the order of the file.
    """

    name: str
    content: Mapping[str, Any]
    cells: dict[tuple[tuple[str, str], ...], list[Cell]]
    axes: dict[str, list[str]]

    @cached_property
    def distinct(self) -> list[Cell]:
        """Its cells, those first that are expected to take the least time."""
        cells = dict.fromkeys(cell for seeds in self.cells.values() for cell in seeds)
        return sorted(cells, key=lambda cell: cell.minutes)

    def at(self, **labels: str) -> list[Cell]:
        """The cells, one a seed, at these labels; none where the table has no such cell, or several."""
        found = [seeds for key, seeds in self.cells.items() if labels.items() <= dict(key).items()]
        return found[0] if len(found) == 1 else []


Ranking = Callable[[Table, str], list[str]]
"""The labels of an axis of a table, best first; what has no result is left out."""


class Plan:
    """The content of the file.

    Args:
        path: of the YAML file.
        parser: of main_ptq.py.
        checkpoints: the folder that `CHECKPOINTS` stands for.

    Raises:
        InputError: no plan, or one that names flags, knobs or axes that there are not.
    """

    def __init__(self, path: Path, parser: argparse.ArgumentParser, checkpoints: Path | None = None):
        self.path, self.parser = path, parser
        self.checkpoints = checkpoints or default_checkpoints()
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise InputError(f"{path}: not a readable plan ({error})") from error
        content = mapping(content, f"{path}", {"flags", "axes", "tables"})
        self.flags = mapping(content.get("flags") or {}, "flags")
        self.axes = {
            axis: {str(name): mapping(value or {}, f"axes: {axis}: {name}") for name, value in values.items()}
            for axis, values in mapping(content["axes"], "axes").items()
        }
        self.contents = {
            name: mapping(table, f"tables: {name}", _OF_TABLES)
            for name, table in mapping(content["tables"], "tables").items()
        }
        self._made: dict[tuple[str, ...], Cell] = {}

    def tables(self, ranked: Ranking) -> list[Table]:
        """The tables, in the order in which they are to be measured.

        Args:
            ranked: the best labels of an axis of a table, by what has been measured.
        """
        tables: list[Table] = []
        for name in self.contents:
            tables.append(self._table(name, tables, ranked))
        return tables

    def _table(self, name: str, before: Sequence[Table], ranked: Ranking) -> Table:
        content = self.contents[name]
        cells: dict[tuple[tuple[str, str], ...], list[Cell]] = {}
        axes: dict[str, dict[str, None]] = {}
        grids = content.get("grid") or {}
        for grid in grids if isinstance(grids, list) else [grids]:
            values = {}
            for axis, given in grid.items():
                if isinstance(given, Mapping):  # the best of another table
                    given = self._best(name, axis, given, before, ranked)
                if given:
                    values[axis] = list_of(given, f"tables: {name}: grid: {axis}")
            if len(values) < len(grid):
                continue  # nothing is known of the best ones yet
            for labels, cell in self._cells(name, content, values):
                for axis, label in labels:
                    axes.setdefault(axis, {})[label] = None
                cells.setdefault(labels, []).append(cell)
        return Table(name, content, cells, {axis: list(labels) for axis, labels in axes.items()})

    def _best(
        self, name: str, axis: str, given: Mapping, before: Sequence[Table], ranked: Ranking
    ) -> list[str]:
        where = f"tables: {name}: grid: {axis}"
        given = mapping(given, where, {"best", "of", "and"})
        known = {table.name: table for table in before}
        best = ranked(known[one_of(given.get("of"), f"{where}: of", known)], axis)[: given["best"]]
        return [*best, *(label for label in given.get("and", ()) if label not in best)] if best else []

    def _cells(
        self, name: str, content: Mapping, values: Mapping[str, list]
    ) -> Iterator[tuple[tuple[tuple[str, str], ...], Cell]]:
        """(labels without the seed, cell) of every combination."""
        sweep = {"flags": {**self.flags, **(content.get("flags") or {})}, "grid": {}}
        if content.get("seeds"):
            sweep["seeds"] = content["seeds"]
        for axis, given in values.items():
            sweep["grid"][axis] = [self._value(name, axis, value) for value in given]
        try:
            runs = read_sweep(name, sweep, self.parser).runs
        except InputError as error:
            raise InputError(f"{self.path}: tables: {name}: {error}") from error
        for run in runs:
            labels = {axis: label for axis, label in run.labels.items() if axis != "seed"}
            words = canonical(run.words)
            if words not in self._made:
                self._made[words] = self._cell(name, labels, words)
            yield tuple(labels.items()), self._made[words]

    def _value(self, name: str, axis: str, value: Any) -> Any:
        """A value of an axis as a sweep file has it."""
        if axis not in self.axes:
            return value
        label = one_of(str(value), f"{self.path}: tables: {name}: grid: {axis}", self.axes[axis])
        flags = {flag: item for flag, item in self.axes[axis][label].items() if flag not in _OF_VALUES}
        return {"name": label, **flags}

    def _cell(self, table: str, labels: Mapping[str, str], words: tuple[str, ...]) -> Cell:
        chosen = [self.axes[axis].get(label, {}) for axis, label in labels.items() if axis in self.axes]
        of_codec = self.axes["codec"][labels["codec"]]
        config, problem = self._config(table, words)
        kinds = {"calibration", "default-crops", config["preset"], labels["codec"]}
        for value in chosen:
            kinds.update(value.get("depends", ()))
        low = config.get("w_bits", 8) < 8
        learning = 0.0
        for value in chosen:
            learning += value.get("learning_below_8" if low else "learning", value.get("learning", 0))
            learning += value.get("learning_a_layer", 0) * of_codec.get("layers", 20)
        minutes = of_codec.get("minutes", {"files": 2, "simulated": 2, "licq": 5})
        simulated = config.get("a_scales") == "simulated" or 32 in (
            config.get("w_bits", 8),
            config.get("a_bits", 8),
        )
        images = int(_flags(words).get("num_calib", ["10"])[0])
        expected = minutes["simulated" if simulated else "files"] + learning * minutes["licq"] * min(
            1, images / 10
        )
        return Cell(
            labels["codec"],
            self._name(words, of_codec),
            words,
            config,
            frozenset(kinds),
            expected,
            problem or self._missing(words),
        )

    def _name(self, words: tuple[str, ...], of_codec: Mapping) -> str:
        """The flags that are not those of the codec or of every cell: "nearest_w8a8_strict_int8"."""
        flags = _flags(words)
        common = {flag: [] if value is True else [as_text(value)] for flag, value in self.flags.items()}
        preset, w_bits, a_bits = (flags.get(name, [default])[0] for name, default in zip(_IN_NAMES, "l88"))
        parts = ["licq" if preset == "l" else Path(preset).stem, f"w{w_bits}a{a_bits}"]
        for flag, values in flags.items():
            if flag in _IN_NAMES or flag in of_codec or common.get(flag) == values:
                continue
            parts.append("=".join([flag, *values]) if flag != "set" else "_".join(values))
        return re.sub(r"[^A-Za-z0-9.=+-]+", "_", "_".join(parts))

    def _config(self, table: str, words: tuple[str, ...]) -> tuple[dict[str, Any], str | None]:
        """`Cell.config`, and why there is no such method here."""
        flags = _flags(words)
        flags.pop("checkpoint", None)
        preset = flags.get("preset", ["licq"])[0]
        try:
            args = self.parser.parse_args(join(flags))
        except InputError as error:
            raise InputError(f"{self.path}: tables: {table}: {error}") from error
        try:
            config = build_config(args)
        except InputError as error:
            if not str(error).startswith("unknown preset"):
                raise InputError(f"{self.path}: tables: {table}: {error}") from error
            return {"preset": preset, "w_bits": args.w_bits, "a_bits": args.a_bits}, str(error).split(";")[0]
        return changed_fields(config), None

    def _missing(self, words: tuple[str, ...]) -> str | None:
        """A file that the run needs and that is not there."""
        flags = _flags(self.here(words))
        for flag in ("arch", "checkpoint"):
            value = flags.get(flag, [""])[0]
            if "/" in value and "{quality}" not in value and not (ROOT / value).exists():
                return f"{value} is not there"
        return None

    def here(self, words: Sequence[str]) -> tuple[str, ...]:
        """The words with this machine's folder of checkpoints, and plug-ins by their full path."""
        return tuple(
            str(ROOT / word)
            if word.startswith("examples/")
            else word.replace(CHECKPOINTS, str(self.checkpoints))
            for word in words
        )


def default_checkpoints() -> Path:
    """LICQ_DATA/checkpoints, or ./checkpoints."""
    return Path(os.environ.get("LICQ_DATA", ".")).expanduser() / "checkpoints"


def changed_fields(config: PtqConfig) -> dict[str, Any]:
    """The fields of a method that are not those of `PtqConfig()`, and the preset; as JSON has them.

    A field that is new in the code has its default in older records, so it does not make them old.
    """
    plain, fields = PtqConfig().to_dict(), config.to_dict()
    changed: dict[str, Any] = {"preset": config.preset}
    for part in ("quant", "reconstruction"):
        for name, value in fields[part].items():
            if value != plain[part][name]:
                changed[name] = list(value) if isinstance(value, tuple) else value
    return changed


def canonical(words: Sequence[str]) -> tuple[str, ...]:
    """The words of a command line in one order and without --seed 0, so that equal commands are equal."""
    flags = _flags(words)
    if flags.get("seed") == ["0"]:
        del flags["seed"]
    return tuple(join(flags))


def join(flags: Mapping[str, list[str]]) -> list[str]:
    words = []
    for flag, values in flags.items():
        if flag == "set":
            words += [word for value in values for word in ("--set", value)]
        else:
            words += [f"--{flag}", *values]
    return words


def _flags(words: Sequence[str]) -> dict[str, list[str]]:
    """flag -> its values, in alphabetical order; `set` has all knobs."""
    flags: dict[str, list[str]] = {}
    last = ""
    for word in words:
        if word.startswith("--"):
            last = word[2:]
            flags.setdefault(last, [])
        else:
            flags[last].append(word)
    if "set" in flags:
        flags["set"].sort()
    return dict(sorted(flags.items()))
