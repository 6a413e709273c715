"""Rounding of latents: symbols and the values that the decoder will have, with straight-through gradients."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from licq.quant.primitives import add, rescale, subtract


class _Shown(threading.local):
    everything = False


_shown = _Shown()  # of this thread


@contextmanager
def showing_dependence() -> Iterator[None]:
    """While this lasts, y_hat takes gradients from all that it depends on, also where they cancel."""
    _shown.everything = True
    try:
        yield
    finally:
        _shown.everything = False


def to_symbols(x: Tensor, means: Tensor | None, unit: float) -> tuple[Tensor, Tensor]:
    """(symbols, values): round(x - means), and the same plus means; with straight-through gradients.

    Args:
        x, means: integers whose unit is `unit`. The symbols have unit 1, the values that of x.
    """
    symbols = rescale(x if means is None else subtract(x, means), unit)
    values = rescale(symbols, 1 / unit)
    if means is None:
        return symbols, values
    return symbols, _without_gradient_of(means, x, add(values, means))


def rounded(x: Tensor, means: Tensor | None) -> tuple[Tensor, Tensor]:
    """(round(x - means), round(x - means) + means) of real numbers, with straight-through gradients."""
    residual = x if means is None else x - means
    symbols = residual + (torch.round(residual) - residual).detach()
    if means is None:
        return symbols, symbols
    return symbols, _without_gradient_of(means, x, symbols + means)


def _without_gradient_of(means: Tensor, x: Tensor, values: Tensor) -> Tensor:
    """values = round(x - means) + means, in which the gradients of the means cancel: without them, where x
    takes none. Then what reads the values need not be differentiated, as g_s while h_s learns."""
    cancels = means.requires_grad and not x.requires_grad and not _shown.everything
    return values.detach() if cancels else values
