"""What does not depend on a unit although it runs behind it: computed once per calibration batch.

A layer of h_s changes the rate alone where y_hat is round(y): g_s is then the same in every step. Which calls
these are is found by running the codec, not from its structure.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from licq.quant.latents import showing_dependence
from licq.quant.model import QuantModel
from licq.quant.outputs import codec_output
from licq.quant.qtensor import QTensor
from licq.quant.runtime import Call, detached
from licq.reconstruction.units import Trace, Unit


class Unaffected:
    """For each batch, the outputs of calls behind the present unit that do not depend on it.

    Only those are kept that something else reads; the others are replaced by tensors without memory.

    Args:
        trace: of a forward of `qmodel`.
        batches: crops, (B, 3, H, W) each.
    """

    def __init__(self, qmodel: QuantModel, trace: Trace, batches: Sequence[Tensor]):
        self.qmodel, self.trace, self.batches = qmodel, trace, batches
        self.outputs: list[dict[Call, Any]] = [{} for _ in batches]
        self.read: set[Call] = set()
        self._unread: dict[Call, Any] = {}

    def forget(self) -> None:
        """Nodes have changed: compute everything."""
        self.outputs = [{} for _ in self.batches]
        self.read, self._unread = set(), {}

    def find(self, unit: Unit, parameters: Iterable[nn.Parameter], prefix: dict[Call, Any]) -> None:
        """Find the calls for a unit.

        Args:
            parameters: that the unit may learn.
            prefix: outputs of the calls before the unit on the first batch.
        """
        self.forget()
        calls = self._constant(unit, list(parameters), prefix)
        if calls:
            read = self._directly_read(calls, prefix)
            unread = {call: _without_memory(output) for call, output in calls.items() if call not in read}
            if self._is_right(prefix, calls, read, unread):
                self.read, self._unread = read, unread

    def missing(self, index: int) -> set[Call]:
        """The calls whose outputs on batch number `index` are to be recorded."""
        return self.read - self.outputs[index].keys() if self._fits(index) else set()

    def keep(self, index: int, record: dict[Call, Any]) -> None:
        """Keep what a forward on batch number `index` has given for `missing`."""
        self.outputs[index].update({call: detached(output) for call, output in record.items()})

    def known(self, index: int) -> dict[Call, Any]:
        """What forwards on batch number `index` need not compute."""
        return {**self._unread, **self.outputs[index]} if self._fits(index) and self.read else {}

    def _fits(self, index: int) -> bool:
        return self.batches[index].shape == self.batches[0].shape

    # ------------------------------------------------------------------------------ which calls these are

    def _constant(self, unit: Unit, parameters: list[nn.Parameter], prefix: dict) -> dict[Call, Any]:
        """The outermost calls behind the unit that take no gradient from it and that quantizing it does not
        change, with their outputs on the first batch."""
        runtime, batch, names = self.qmodel.runtime, self.batches[0], unit.nodes
        with torch.no_grad(), runtime.replaying(prefix), runtime.recording() as before:
            self.qmodel.quantize_nodes(False, names)
            self.qmodel(batch)
        self.qmodel.quantize_nodes(True, names)
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad(), showing_dependence():
            with runtime.replaying(prefix), runtime.recording() as after:
                self.qmodel(batch)
        for parameter in parameters:
            parameter.requires_grad_(False)
        same = [
            call
            for call in sorted(after, key=lambda call: self.trace.begin[call])
            if call not in prefix and _is_same(before[call], after[call])
        ]
        calls, reach = {}, -1
        for call in same:
            if self.trace.end[call] > reach:
                calls[call], reach = detached(after[call]), self.trace.end[call]
        return calls

    def _directly_read(self, calls: dict[Call, Any], prefix: dict) -> set[Call]:
        """Those among the calls that something else reads: what has a gradient where all are constants."""
        leaves: dict[Call, list[Tensor]] = {call: [] for call in calls}
        replayed = {call: _leaf(output, leaves[call]) for call, output in calls.items()}
        with torch.enable_grad(), showing_dependence(), self.qmodel.runtime.replaying({**prefix, **replayed}):
            total = sum(part.sum() for part in _tensors(self.qmodel(self.batches[0])))
            flat = [(call, leaf) for call, parts in leaves.items() for leaf in parts]
            if not isinstance(total, Tensor) or not total.requires_grad:
                return set()
            gradients = torch.autograd.grad(total, [leaf for _, leaf in flat], allow_unused=True)
        return {call for (call, _), gradient in zip(flat, gradients) if gradient is not None}

    @torch.no_grad()
    def _is_right(self, prefix: dict, calls: dict, read: set[Call], unread: dict) -> bool:
        """Whether the codec's output stays to the bit; unread calls give numbers that would spoil it."""
        runtime, batch = self.qmodel.runtime, self.batches[0]
        with runtime.replaying(prefix):
            exact = _tensors(self.qmodel(batch))
        with runtime.replaying({**prefix, **unread, **{call: calls[call] for call in read}}):
            ours = _tensors(self.qmodel(batch))
        return all(torch.equal(a, b) for a, b in zip(exact, ours, strict=True))


def _tensors(output: dict) -> list[Tensor]:
    return [output["x_hat"], *codec_output(output)["likelihoods"].values()]


def _parts(output: Any) -> list[Any]:
    if isinstance(output, (list, tuple)):
        return [part for item in output for part in _parts(item)]
    return [output]


def _is_same(before: Any, after: Any) -> bool:
    """Whether two outputs are the same numbers, and the second takes no gradient."""
    for old, new in zip(_parts(before), _parts(after), strict=True):
        for a, b in ((old.q, new.q), (old.scale, new.scale)) if isinstance(new, QTensor) else ((old, new),):
            if isinstance(b, Tensor) and (b.requires_grad or not torch.equal(a, b)):
                return False
    return True


def _with_numbers(output: Any, change: Any) -> Any:
    """An output with other tensors in it."""
    if isinstance(output, (list, tuple)):
        return type(output)(_with_numbers(part, change) for part in output)
    if isinstance(output, QTensor):
        other = output.same()
        other.q = change(output.q)
        return other
    return change(output) if isinstance(output, Tensor) else output


def _leaf(output: Any, leaves: list[Tensor]) -> Any:
    def leaf(tensor: Tensor) -> Tensor:
        leaves.append(tensor.detach().clone().requires_grad_(tensor.is_floating_point()))
        return leaves[-1]

    return _with_numbers(output, leaf)


def _without_memory(output: Any) -> Any:
    """An output of the same form that must not be read: its numbers are NaN."""
    return _with_numbers(
        output, lambda x: torch.full((), torch.nan, dtype=x.dtype).to(x.device).expand(x.shape)
    )
