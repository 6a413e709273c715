"""What coding images of one size needs, made ready: as plain data, and run without torch."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from licq.codec.coder import Coder, Tables
from licq.codec.parts import Chain, Context, Gathering, Latent, Part, Step
from licq.codec.tables import GaussianRows, MixtureRows, RowTable, SteppedRows
from licq.integer.ready import ReadyProgram
from licq.integer.ready_files import KINDS, NotStorable, Reader, Writer
from licq.integer.tiles import Cut, Tiled

_KINDS: dict[str, type] = {
    **KINDS,
    **{kind.__name__: kind for kind in (Chain, Context, Gathering, Latent, Step, Cut, Tiled)},
}


@dataclass
class ReadyPlan:
    """One direction of a plan, with the coder's tables; a `coder.Coded`.

    Args:
        coder: the coder of the model.
        latents: in their order.
        orders: of each latent, positions in the groups in which they are coded.
        encoder: from pixels to symbols and densities; None: this is a decoder's plan.
        steps: how the latents are decoded; empty: this is an encoder's plan.
        synthesis: see `coder.Coded`; None: this is an encoder's plan.
    """

    coder: Coder
    latents: list[Latent]
    orders: list[list[np.ndarray]]
    encoder: Part | None = None
    steps: list[Step] = field(default_factory=list)
    pixels: tuple[Part, dict[str, int]] | None = None

    def order(self, index: int) -> list[np.ndarray]:
        """Positions of a latent, flat, in the groups in which they are coded."""
        return self.orders[index]

    def encode(self, pixels: np.ndarray) -> list[dict[str, np.ndarray]]:
        """Symbols and densities of an image, uint8 (1, 3, H, W)."""
        assert self.encoder is not None
        return named_values(self.latents, self.encoder({"pixels": pixels}))

    @property
    def synthesis(self) -> tuple[Part, dict[str, int]]:
        """(what computes {"pixels"} from values by name, the numbers of these values)."""
        assert self.pixels is not None
        return self.pixels

    def set_threads(self, threads: int | None) -> None:
        """Threads of the kernels; None: as many as there are processors."""
        for part in _programs([self.encoder, self.steps, self.pixels]):
            part.threads = threads

    def show(self, progress: bool) -> None:
        """Whether a progress bar counts the tiles of a large image."""
        for part, name in ((self.encoder, "analysis"), (self.pixels, "synthesis")):
            first = part.parts[0] if isinstance(part, Chain) else part[0] if isinstance(part, tuple) else part
            if isinstance(first, Tiled):
                first.shown = f"{name} transform" if progress else ""


def named_values(latents: list[Latent], values: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """For each latent {"symbols", and the names of its densities}, from values by names such as
    "1.scales"."""
    return [
        {name: values[f"{index}.{name}"] for name in ("symbols", *latent.densities)}
        for index, latent in enumerate(latents)
    ]


def _programs(part: Any) -> list[ReadyProgram]:
    """Every ready program in a part of a plan."""
    if isinstance(part, ReadyProgram):
        return [part]
    if isinstance(part, dict):
        part = [*part.values()]
    elif isinstance(part, (Chain, Context, Gathering, Step, Tiled)):
        part = [getattr(part, entry.name) for entry in dataclasses.fields(part)]
    inner = part if isinstance(part, (list, tuple)) else ()
    return [program for one in inner for program in _programs(one)]


# --------------------------------------------------------------------------------------------- as plain data


def plain_plan(plan: ReadyPlan) -> tuple[Any, list[np.ndarray]]:
    """(what JSON can hold, the arrays that it refers to).

    Raises:
        NotStorable: a part is computed by the reference.
    """
    writer = Writer(_KINDS)
    tiled = [part for part in _tiled([plan.encoder, plan.pixels]) if part.make is not None]
    for part in tiled:  # every tile's program has been made, or is made now
        for row in part.rows:
            for column in part.columns:
                part.part_for(row.end - row.start, column.end - column.start)
    content = {
        "bits": plan.coder.bits,
        "tables": [[name, _plain_table(table, writer)] for name, table in plan.coder.tables.items()],
        "latents": writer.plain(plan.latents),
        "orders": [_plain_order(order, writer) for order in plan.orders],
        "encoder": _plain_part(plan.encoder, writer),
        "steps": writer.plain([dataclasses.replace(step, order=[]) for step in plan.steps]),
        "pixels": None
        if plan.pixels is None
        else [_plain_part(plan.pixels[0], writer), writer.plain(plan.pixels[1])],
    }
    return content, writer.arrays


def _tiled(parts: list[Any]) -> list[Tiled]:
    inner = [part.parts[0] if isinstance(part, Chain) else part for part in parts if part is not None]
    inner = [part[0] if isinstance(part, tuple) else part for part in inner]
    return [part for part in inner if isinstance(part, Tiled)]


def _plain_part(part: Any, writer: Writer) -> Any:
    if isinstance(part, Tiled):
        part = dataclasses.replace(part, make=None, shown="")
    if isinstance(part, Chain):
        inner = [
            dataclasses.replace(one, make=None, shown="") if isinstance(one, Tiled) else one
            for one in part.parts
        ]
        part = Chain(inner)
    return writer.plain(part)


def read_plan(content: Any, arrays: list[np.ndarray]) -> ReadyPlan:
    """The plan that `plain_plan` has written.

    Raises:
        KeyError, ValueError, TypeError, IndexError, InputError: there is none like it.
    """
    reader = Reader(arrays, _KINDS)
    orders = [_order(order, reader) for order in content["orders"]]
    steps = reader.object(content["steps"])
    for step, order in zip(steps, orders):
        step.order = order
    tables = {name: _table(table, reader) for name, table in content["tables"]}
    pixels = content["pixels"]
    return ReadyPlan(
        Coder(tables, content["bits"]),
        reader.object(content["latents"]),
        orders,
        reader.object(content["encoder"]),
        steps,
        None if pixels is None else (reader.object(pixels[0]), reader.object(pixels[1])),
    )


def _plain_order(order: list[np.ndarray], writer: Writer) -> Any:
    ends = np.cumsum([len(group) for group in order])
    return writer.plain([np.concatenate(order).astype(np.int32), ends])


def _order(plain: Any, reader: Reader) -> list[np.ndarray]:
    flat, ends = reader.object(plain)
    return np.split(flat.astype(np.int64), ends[:-1])


def _plain_table(table: Tables, writer: Writer) -> Any:
    match table:
        case GaussianRows():
            return ["gaussian", writer.plain([*table.tables]), table.boundary_bits]
        case MixtureRows():
            gaussians = table.gaussians
            return ["mixture", writer.plain([*gaussians.tables]), gaussians.boundary_bits, table.count]
        case SteppedRows():
            return ["stepped", writer.plain(table.cumulative)]
        case RowTable():
            return ["rows", writer.plain([table.cdfs, table.starts, table.offsets])]
    raise NotStorable(type(table).__name__)


def _table(plain: Any, reader: Reader) -> Tables:
    kind, arrays, *rest = plain
    arrays = reader.object(arrays)
    match kind:
        case "gaussian":
            return GaussianRows(arrays, *rest)
        case "mixture":
            return MixtureRows(arrays, *rest)
        case "stepped":
            return SteppedRows(arrays)
        case "rows":
            return RowTable(*arrays)
    raise ValueError(kind)
