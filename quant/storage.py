"""Which operands of elementwise functions are read from memory, for `QuantConfig.strict_int8`.

The sums of a multiply-accumulate layer (MAC layer) pass through what follows them number by number,
activation functions, residual sums and gates, before anything is written: they are in registers. An
elementwise function of several operands runs behind the latest of the MAC layers that its operands come
from. Operands of that layer are in registers. Those of earlier layers were stored until then, and stored
tensors have 8 bits, with a scale for each channel.

The first observed forward finds that out. Each tensor has an `Origin` in it.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from licq.quant.dispatch import HANDLERS
from licq.quant.qtensor import QTensor
from licq.quant.quantizer import Quantizer
from licq.quant.torch_functions import function_name, is_in_place

REGISTER_BITS = 16
"""Of what elementwise functions give, between the sums of a MAC layer and what is stored."""

DEAD_SHARE = 2.0**-6
"""`Quantizer.dead_share` of stored tensors: no weights have to take over the spread of their scales."""


class Origin(NamedTuple):
    """Where a tensor comes from."""

    layer: int
    """The latest MAC layer behind it, as the number of its call in the forward; 0: none."""

    axis: int | None
    """The dimension of the channels; None where it is not known."""


_NOWHERE = Origin(0, None)


class Origins:
    """Gives every tensor of a forward its origin."""

    def __init__(self) -> None:
        self._layers = 0

    def of_node(self, inputs: Iterable[Any], output: Any, sums: bool, axis: int | None) -> None:
        """Note the output of a node.

        Args:
            sums: the node is a MAC layer. axis: of the channels of its output.
        """
        if sums:
            self._layers += 1
            for x in _tensors(output):
                x.origin = Origin(self._layers, None if axis is None else axis % x.ndim)
            return
        origin = _latest(_tensors(inputs))
        for x in _tensors(output):
            x.origin = origin

    def of_function(self, function: Callable, args: tuple, kwargs: dict, result: Any) -> None:
        """Note what a PyTorch function has given, where no node has."""
        new = [x for x in _tensors(result) if x.origin is None]
        given = list(_tensors((args, tuple(kwargs.values()))))
        if not new or not given:
            return
        origin = _latest(given)
        axes = [origin.axis] * len(new)
        name = function_name(function)
        handler = HANDLERS.get(name)
        moves = handler is not None and handler.__module__.endswith("layout") and name != "pad"
        if origin.axis is not None and moves and not is_in_place(function, kwargs):
            axes = _axes_behind(function, args, kwargs)
        for x, axis in zip(new, axes if len(axes) == len(new) else [None] * len(new)):
            x.origin = Origin(origin.layer, axis)


def _tensors(parts: Any) -> Iterator[QTensor]:
    if isinstance(parts, QTensor):
        yield parts
    elif isinstance(parts, (list, tuple)):
        for part in parts:
            yield from _tensors(part)


def _latest(tensors: Iterable[QTensor]) -> Origin:
    """The latest layer, with the channels of the first tensor that knows them."""
    origins = [x.origin or _NOWHERE for x in tensors] or [_NOWHERE]
    axis = next((origin.axis for origin in origins if origin.axis is not None), None)
    return Origin(max(origin.layer for origin in origins), axis)


def _axes_behind(function: Callable, args: tuple, kwargs: dict) -> list[int | None]:
    """The dimensions of the channels in the results of a layout function, which moves their numbers here."""

    def numbered(part: Any) -> Any:
        if isinstance(part, QTensor):
            axis = None if part.origin is None else part.origin.axis
            if axis is None:
                return torch.zeros(part.shape, device=part.device)
            numbers = torch.arange(1.0, part.shape[axis] + 1, device=part.device)
            return numbers.reshape([-1 if d == axis else 1 for d in range(part.ndim)]).expand(part.shape)
        if isinstance(part, (list, tuple)) and not isinstance(part, torch.Size):
            return type(part)(map(numbered, part))
        return part

    try:
        moved = function(*numbered(args), **{key: numbered(part) for key, part in kwargs.items()})
    except RuntimeError:  # a view that these numbers have no memory for
        return []
    return [_varying(part) for part in (moved if isinstance(moved, (list, tuple)) else [moved])]


def _varying(x: Tensor) -> int | None:
    """The only dimension along which x varies; None: there are none, or several."""
    dims = [d for d in range(x.ndim) if x.shape[d] > 1 and bool((x != x.narrow(d, 0, 1)).any())]
    return dims[0] if len(dims) == 1 else None


def stored_operands(inputs: Iterable[Any]) -> list[int]:
    """The numbers of the operands that an elementwise function reads from memory.

    Latents are none: y_hat and z_hat are boundaries of the codec.
    """
    operands = [x for x in inputs if isinstance(x, QTensor)]
    latest = _latest(operands).layer
    return [
        number
        for number, x in enumerate(operands)
        if not x.latent and (x.origin is None or x.origin.layer < latest)
    ]


def store(grid: Quantizer, x: QTensor, bits: int) -> None:
    """Have a quantizer, before it observes, hold x as a stored tensor."""
    axis = None if x.origin is None else x.origin.axis
    if axis is None:  # a constant that varies along one dimension
        long = [d for d, size in enumerate(x.shape) if size > 1]
        axis = long[0] if x.origin is None and len(long) == 1 else None
    grid.bits, grid.headroom, grid.symmetry, grid.channel_dim = bits, 1.0, "asymmetric", axis
    grid.border_dim = 1 if axis is None else axis
    grid.dead_share = DEAD_SHARE
