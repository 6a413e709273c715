"""Units of reconstruction, in execution order, and what must be known before each of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from licq.quant.config import stage_of
from licq.quant.model import QuantModel
from licq.quant.runtime import Call

BOUNDARIES = ("round", "entropy_bottleneck", "gaussian_conditional")


@dataclass(frozen=True)
class Unit:
    """Nodes that are reconstructed together."""

    name: str
    """Of its block, its layer or its stage."""

    nodes: tuple[str, ...]
    """Names, in the order of first execution."""

    start: Call
    """The unit's first call in a forward; everything before it is the prefix."""

    outputs: tuple[Call, ...]
    """The calls whose results are the unit's output."""

    @property
    def end(self) -> Call:
        """The last of `outputs`."""
        return self.outputs[-1]


class Trace:
    """Which calls one forward of the codec makes, and how they nest.

    Attributes:
        begin, end: the time of each call, counted in events.
        leaves: the calls of nodes, in the order in which they begin.
    """

    def __init__(self, qmodel: QuantModel, image: Tensor):
        with torch.no_grad(), qmodel.runtime.tracing() as events:
            qmodel(image)
        self.begin = {call: time for time, (kind, call) in enumerate(events) if kind == "begin"}
        self.end = {call: time for time, (kind, call) in enumerate(events) if kind == "end"}
        self.leaves = [
            call
            for _, call in sorted((time, call) for call, time in self.begin.items())
            if call[0] in qmodel.nodes
        ]

    def prefix(self, start: Call) -> set[Call]:
        """All outputs that `start` needs: the calls that are complete before it, outermost ones only."""
        before = [call for call, time in self.end.items() if time < self.begin[start]]
        before.sort(key=lambda call: self.begin[call])
        outermost, reach = set(), -1
        for call in before:
            if self.end[call] > reach:
                outermost.add(call)
                reach = self.end[call]
        return outermost

    def outermost(self, call: Call, names: set[str]) -> Call:
        """The largest block around `call` whose name is in `names` and which ends with it, or the call
        itself."""
        around = [
            other
            for other, time in self.begin.items()
            if other[0] in names and time <= self.begin[call] and self.end[other] >= self.end[call]
        ]
        return max(around, key=lambda other: self.end[other], default=call)


def find_units(qmodel: QuantModel, trace: Trace, kind: str) -> list[Unit]:
    """The codec cut into units of one kind.

    - "layer": a node that learns, with the functions that follow it and learn nothing.
    - "block": a QuantBlock; outside of blocks a layer, which a following GDN joins.
    - "stage": g_a, h_a, h_s, g_s, the context model, the entropy parameters: by the first component of the
      name.
    - "network": everything.

    Stages that stay in float are in no unit.
    """
    seen: list[str] = []
    for name, _ in trace.leaves:
        if name not in seen:
            seen.append(name)
    blocks = qmodel.rewrite.blocks
    groups: list[tuple[str, list[str]]] = []
    closed = True
    for name in seen:
        node = qmodel.nodes[name]
        if node.in_float_stage:
            closed = True
            continue
        inside = _block_of(name, blocks) if kind == "block" else None
        if kind == "network":
            key = "network"
        elif kind == "stage":
            key = stage_of(name)
        else:
            key = inside or name
        learns = any(node.learnable().values())
        joins = bool(groups) and (
            groups[-1][0] == key
            or kind in ("layer", "block")
            and not closed
            and inside is None
            and (not learns or kind == "block" and node.kind == "gdn")
        )
        if node.kind in BOUNDARIES and kind in ("layer", "block"):
            closed = True
            continue
        if joins:
            groups[-1][1].append(name)
        elif learns or kind in ("stage", "network") or inside is not None:
            groups.append((key, [name]))
            closed = False
        # a function before any layer has no unit: it learns nothing
    groups = [
        (key, names) for key, names in groups if any(any(qmodel.nodes[n].learnable().values()) for n in names)
    ]
    return [_unit(key, names, trace, set(blocks)) for key, names in groups]


def _block_of(name: str, blocks: dict) -> str | None:
    """The outermost block that holds the node."""
    parts = name.split(".")
    for length in range(1, len(parts)):
        if ".".join(parts[:length]) in blocks:
            return ".".join(parts[:length])
    return None


def _unit(key: str, names: list[str], trace: Trace, blocks: set[str]) -> Unit:
    calls = [call for call in trace.leaves if call[0] in names]
    last = max(calls, key=lambda call: trace.end[call])
    last = trace.outermost(last, {key} if key in blocks else set()) if last[0].startswith(f"{key}.") else last
    same = [call for call in trace.begin if call[0] == last[0]]
    same.sort(key=lambda call: trace.end[call])
    return Unit(key, tuple(names), calls[0], tuple(same))
