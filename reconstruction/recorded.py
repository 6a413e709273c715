"""What the modules of a network compute in a run, so that two runs can be compared module by module."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from licq.quant.qtensor import QTensor

Event = tuple[str, str, list[Tensor]]
"""("in" or "out", the module's name, its inputs or outputs)."""

_NOISE = 1e-4
"""Of a tensor's standard deviation: so much may float kernels differ from run to run."""


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and mappings, in their order."""
    if isinstance(value, QTensor):
        return [value.q]
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for part in value.values() for tensor in tensors_of(part)]
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in tensors_of(part)]
    return []


class Recorded:
    """Records what the modules of a network take and give."""

    def __init__(self, network: nn.Module):
        self.network = network
        self._stack: list[str] = []

    @contextmanager
    def running(self) -> Iterator[list[Event]]:
        """Within it, a run of the network is recorded."""
        events: list[Event] = []
        self._stack = []
        hooks = []
        for name, module in self.network.named_modules():
            hooks.append(module.register_forward_pre_hook(self._entering(name, events), with_kwargs=True))
            hooks.append(module.register_forward_hook(self._leaving(name, events)))
        try:
            yield events
        finally:
            for hook in hooks:
                hook.remove()

    def _entering(self, name: str, events: list[Event]):
        def hook(module, args, kwargs):
            self._stack.append(name)
            events.append(("in", name, [part.clone() for part in tensors_of((args, kwargs))]))

        return hook

    def _leaving(self, name: str, events: list[Event]):
        def hook(module, args, output):
            self._stack.pop()
            events.append(("out", name, [part.clone() for part in tensors_of(output)]))

        return hook

    def where(self) -> str:
        """The module that runs, for a message."""
        return said(self._stack[-1]) if self._stack else said("")

    def state(self) -> dict[str, Any]:
        """Buffers and attributes of all modules, by words for a message, as values that can be compared."""
        values: dict[str, Any] = {}
        for path, module in self.network.named_modules():
            of = f" of {path}" if path else ""
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    values[f"buffer `{name}`{of}"] = _comparable(buffer)
            for name, value in vars(module).items():
                if not name.startswith("_") or isinstance(value, (Tensor, int, float)):
                    values[f"attribute `{name}`{of}"] = _comparable(value)
        return values


def first_difference(before: Sequence[Event], after: Sequence[Event]) -> str | None:
    """Where two runs go apart: the module whose own code gives other numbers for the same; None: nowhere.

    Differences as small as the noise of float kernels are none, and then what follows them says nothing.
    """
    stack: list[str] = []
    for (kind, name, values), (other_kind, other_name, others) in zip(before, after):
        parent = stack[-1] if stack else ""
        if (kind, name) != (other_kind, other_name) or len(values) != len(others):
            return said(parent)
        if kind == "out" and stack:
            stack.pop()
        if not all(map(_same, values, others)):
            if all(map(near, values, others)):
                return None
            return f"{said(parent)}, before {name}" if kind == "in" and stack else said(name)
        if kind == "in":
            stack.append(name)
    return None if len(before) == len(after) else said("")


def said(name: str) -> str:
    """A module's name for a message."""
    return name or "the codec's own forward"


def near(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors differ by no more than the noise of float kernels."""
    if _same(a, b) or a.shape != b.shape or not a.is_floating_point():
        return _same(a, b)
    spread = float(a.double().std(correction=0)) or float(a.double().abs().max())
    return float((a.double() - b.double()).abs().max()) <= _NOISE * spread


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _comparable(value: Any) -> Any:
    """Something that `!=` compares by its content; None for what is neither a number nor a tensor."""
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return tuple(value.shape), content
    if isinstance(value, (list, tuple)):
        return [_comparable(part) for part in value]
    return value if isinstance(value, (int, float, str)) else None
