"""Attention as one launch: scores, softmax and weighted sum."""

import hashlib
import math

import torch
from torch import Tensor

from licq.integer import ready
from licq.integer.exactness import tie_free_multiplier
from licq.integer.groups import fits, parameters_of, varying_dim
from licq.integer.launches import LaunchContext, fits16
from licq.integer.library import Attention
from licq.integer.program import Program
from licq.quant import operations as ops
from licq.quant.fixedpoint import multiplier_value


def attention_launch(context: LaunchContext, operation: ops.Attention) -> ready.AttentionLaunch:
    """The launch of an attention that `AttentionJob.takes`."""
    made = AttentionJob(context, operation)
    buffers = [tensor.numpy() for tensor in made.buffers]
    return ready.AttentionLaunch(operation.inputs, operation.outputs, made.shape, made.job, buffers)


class AttentionJob:
    """The kernel's job of an attention."""

    @staticmethod
    def takes(operation: ops.Attention, program: Program) -> bool:
        """Whether numbers fit 16 bits, sums of products 32, and scales differ from head to head at most."""
        scores, weights = operation.scores, operation.weights
        q, k, v = (program.values[number] for number in operation.inputs)
        in_range = fits16(q.range, k.range, v.range, program.values[weights.outputs[0]].range)
        in_range = in_range and all(fits(step, program) for step in (operation.products, operation.output))
        ndim = len(q.shape)
        same_batch = ndim >= 3 and q.shape[:-2] == k.shape[:-2] == v.shape[:-2]
        of_keys = operation.softmax.dim % ndim == ndim - 1
        per_head = all(varying_dim(parameters_of(step), ndim) in (-1, ndim - 3) for step in (scores, weights))
        alike = all(
            end is not None and end.numel() in (1, q.shape[-3]) and bool((end == end.flatten()[0]).all())
            for step in (scores, weights)
            for end in (step.low, step.high)
        )
        return in_range and same_batch and of_keys and per_head and alike

    def __init__(self, context: LaunchContext, operation: ops.Attention):
        self.context = context
        values = context.program.values
        softmax = operation.softmax
        q, k, v = (values[number].shape for number in operation.inputs)
        *batch, heads, queries, inner = q
        keys, width = k[-1], v[-1]
        self.shape = values[operation.outputs[0]].shape
        self.job = Attention(
            batch=math.prod(batch), heads=heads, queries=queries, keys=keys, inner=inner, width=width
        )
        self.buffers: list[Tensor] = []  # what the job points to
        self._scales({"score": operation.scores, "weight": operation.weights}, heads)
        table = softmax.table.float().contiguous()
        self._point("table", table)
        self.job.last = len(table) - 1
        if softmax.offset is not None:
            self._offsets(softmax, softmax.offset, tuple(batch), heads, queries, keys)

    def _point(self, name: str, tensor: Tensor) -> None:
        self.buffers.append(tensor)
        setattr(self.job, name, tensor.data_ptr())

    def _scales(self, rescales: dict[str, ops.Rescale], heads: int) -> None:
        """Multipliers and limits of the scores and of the weights; tie-free ones where both have some."""
        exact, tie_free = {}, {}
        for name, step in rescales.items():
            assert step.low is not None and step.high is not None, "takes() asks for limits"
            low, high = int(step.low.flatten()[0]), int(step.high.flatten()[0])
            setattr(self.job, f"{name}_low", low)
            setattr(self.job, f"{name}_high", high)
            largest = self.context.program.values[step.inputs[0]].range.largest
            exact[name] = multiplier_value(step.mantissa, step.shift)
            multiplier = tie_free_multiplier(step.mantissa, step.shift, largest, max(abs(low), abs(high)))
            if multiplier is not None:
                tie_free[name] = multiplier
        self.job.tie_free = int(len(tie_free) == len(exact))
        for name, multiplier in (tie_free if self.job.tie_free else exact).items():
            self._point(f"{name}_scale", multiplier.reshape(-1).expand(heads).contiguous())

    def _offsets(
        self,
        softmax: ops.Softmax,
        offset: Tensor,
        batch: tuple[int, ...],
        heads: int,
        queries: int,
        keys: int,
    ) -> None:
        """Bias and mask of each kind of window, and the kind of each."""
        blank, kinds = softmax.blank, softmax.kinds
        if kinds is not None:  # (kinds, heads, queries, keys); the batch's last dimension has one kind each
            count = offset.shape[0]
            kind = kinds.expand(batch).reshape(-1)
        else:
            full = (1,) * (len(batch) + 3 - offset.ndim) + tuple(offset.shape)
            count = math.prod(full[: len(batch)])
            kind = torch.arange(count).reshape(full[: len(batch)]).expand(batch).reshape(-1)
            offset = offset.reshape(full).reshape(count, *full[len(batch) :])
            if blank is not None:
                blank = blank.reshape(*(1,) * (len(full) - blank.ndim), *blank.shape)
                blank = blank.expand(*full[:-1], 1).reshape(count, *full[len(batch) : -1], 1)
            first, same = distinct(offset, blank)  # most windows of an image are alike
            kind, count, offset = same[kind], len(first), offset[first]
            blank = None if blank is None else blank[first]
        assert len(kind) == self.job.batch
        self._point("offset", offset.expand(count, heads, queries, keys).to(torch.int32).contiguous())
        if blank is not None:
            self._point("blank", blank.expand(count, heads, queries, 1).to(torch.uint8).contiguous())
        self._point("kind", kind.to(torch.int32).contiguous())


def distinct(*parts: Tensor | None) -> tuple[Tensor, Tensor]:
    """(where each kind of entry stands first, the kind of each entry) of tensors (entries, ...)."""
    kinds: dict[bytes, int] = {}
    first, same = [], []
    given = [part.contiguous().numpy() for part in parts if part is not None]
    for position in range(len(given[0])):
        digest = hashlib.sha256(b"".join(part[position].tobytes() for part in given)).digest()
        if digest not in kinds:
            kinds[digest] = len(first)
            first.append(position)
        same.append(kinds[digest])
    return torch.tensor(first), torch.tensor(same)
