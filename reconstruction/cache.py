"""Outputs of the prefix of a unit, computed once per calibration batch."""

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from licq.quant.model import QuantModel
from licq.quant.qtensor import QTensor
from licq.quant.runtime import Call, detached
from licq.reconstruction.unaffected import Unaffected
from licq.reconstruction.units import Trace


class PrefixCache:
    """For each batch, the outputs of every call that is complete before the present unit.

    Whether these are of the float codec or of the quantized prefix is decided by the state that the nodes are
    in when `advance` is called.

    Args:
        trace: of a forward of `qmodel`.
        batches: crops, (B, 3, H, W) each.
    """

    def __init__(self, qmodel: QuantModel, trace: Trace, batches: Sequence[Tensor]):
        self.qmodel, self.trace, self.batches = qmodel, trace, batches
        self.outputs: list[dict[Call, object]] = [{} for _ in batches]
        self.unaffected = Unaffected(qmodel, trace, batches)

    @torch.no_grad()
    def advance(self, start: Call) -> None:
        """Bring the cache to the calls before `start`; the nodes there are in their final state."""
        self.unaffected.forget()
        needed = self.trace.prefix(start)
        runtime = self.qmodel.runtime
        for index, batch in enumerate(self.batches):
            known = self.outputs[index]
            missing = needed - known.keys()
            if missing:
                with runtime.replaying(known), runtime.recording(missing, stop_before=start) as record:
                    self.qmodel(batch)
                known.update({call: detached(output) for call, output in record.items()})
            self.outputs[index] = {call: output for call, output in known.items() if call in needed}

    @contextmanager
    def replaying(self, index: int):
        """A forward on batch number `index` starts behind the prefix, and leaves out what does not depend on
        the unit."""
        runtime, rest = self.qmodel.runtime, self.unaffected
        missing = rest.missing(index)
        if missing:
            with runtime.replaying(self.outputs[index]), runtime.recording(missing) as record:
                yield
            rest.keep(index, record)
        else:
            with runtime.replaying({**self.outputs[index], **rest.known(index)}):
                yield


def mixed(quantized: Any, real: Any, share: float, generator: torch.Generator) -> Any:
    """Each element from the float codec with probability `share`, else from the quantized one.

    QDrop, Wei et al. 2022. `quantized` and `real` are outputs of the same call: a tensor, or several.
    """
    if isinstance(quantized, QTensor):
        choice = torch.rand(quantized.shape, generator=generator).to(quantized.device) < share
        return quantized.like(torch.where(choice, real.real(), quantized.real()), None)
    if isinstance(quantized, (list, tuple)):
        return type(quantized)(mixed(q, r, share, generator) for q, r in zip(quantized, real))
    return quantized
