"""Layout functions of a program on NumPy's arrays, with the arguments of PyTorch's functions. No torch is
needed."""

from collections.abc import Callable
from typing import Any

import numpy as np


def viewed(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """x in another shape and the same memory; None where that takes a copy."""
    if x.flags.c_contiguous:
        return x.reshape(shape)
    if not hasattr(np, "from_dlpack") or np.lib.NumpyVersion(np.__version__) >= "2.1.0":
        try:
            return np.reshape(x, shape, copy=False)  # pyright: ignore[reportCallIssue]
        except ValueError:
            return None
    view = x.view()
    try:
        view.shape = shape
    except AttributeError:
        return None
    return view


def _sizes(first: Any, rest: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(first) if isinstance(first, (tuple, list)) else (first, *rest)


def _permute(x: np.ndarray, dims: Any, *rest: int) -> np.ndarray:
    return x.transpose(_sizes(dims, rest))


def _reshape(x: np.ndarray, shape: Any, *rest: int) -> np.ndarray:
    return x.reshape(_sizes(shape, rest))


def _flatten(x: np.ndarray, start_dim: int = 0, end_dim: int = -1) -> np.ndarray:
    start, end = start_dim % x.ndim, end_dim % x.ndim
    return x.reshape(*x.shape[:start], -1, *x.shape[end + 1 :])


def _unflatten(x: np.ndarray, dim: int, sizes: Any) -> np.ndarray:
    dim %= x.ndim
    return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


def _squeeze(x: np.ndarray, dim: Any = None) -> np.ndarray:
    if dim is None:
        return np.squeeze(x)
    dims = [d % x.ndim for d in ((dim,) if isinstance(dim, int) else dim)]
    return np.squeeze(x, tuple(d for d in dims if x.shape[d] == 1))


def _unsqueeze(x: np.ndarray, dim: int) -> np.ndarray:
    return np.expand_dims(x, dim)


def _narrow(x: np.ndarray, dim: int, start: int, length: int) -> np.ndarray:
    index: list[Any] = [slice(None)] * x.ndim
    index[dim] = slice(start, start + length)
    return x[tuple(index)]


def _split(x: np.ndarray, sizes: Any, dim: int = 0) -> tuple[np.ndarray, ...]:
    total = x.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, total - start) for start in range(0, total, sizes)]
    starts = np.cumsum([0, *sizes])
    return tuple(_narrow(x, dim, int(start), size) for start, size in zip(starts, sizes))


def _chunk(x: np.ndarray, chunks: int, dim: int = 0) -> tuple[np.ndarray, ...]:
    return _split(x, -(-x.shape[dim] // chunks), dim)


def _expand(x: np.ndarray, sizes: Any, *rest: int) -> np.ndarray:
    shape = _sizes(sizes, rest)
    old = (1,) * (len(shape) - x.ndim) + x.shape
    return np.broadcast_to(x, [o if new == -1 else new for new, o in zip(shape, old)])


def _unbind(x: np.ndarray, dim: int = 0) -> tuple[np.ndarray, ...]:
    return tuple(np.moveaxis(x, dim, 0))


def _flip(x: np.ndarray, dims: Any, *rest: int) -> np.ndarray:
    return np.flip(x, _sizes(dims, rest))


def _roll(x: np.ndarray, shifts: Any, dims: Any = None) -> np.ndarray:
    return np.roll(x, shifts, dims)


def _index_select(x: np.ndarray, dim: int, index: np.ndarray) -> np.ndarray:
    return np.take(x, index, dim)


def _select(x: np.ndarray, dim: int, index: int) -> np.ndarray:
    return np.take(x, index, dim)


def _repeat_interleave(x: np.ndarray, repeats: Any, dim: int) -> np.ndarray:
    return np.repeat(x, repeats, dim)


def _pad(x: np.ndarray, pad: Any, mode: str = "constant", value: Any = None) -> np.ndarray:
    if mode != "constant" or value not in (None, 0):
        raise NotImplementedError(f"padding {mode} with {value}")
    widths = [(0, 0)] * x.ndim
    for i in range(len(pad) // 2):
        widths[x.ndim - 1 - i] = (pad[2 * i], pad[2 * i + 1])
    cut = x[tuple(slice(max(0, -a), n - max(0, -b)) for (a, b), n in zip(widths, x.shape))]
    kept = [(max(0, a), max(0, b)) for a, b in widths]
    full = np.zeros([a + n + b for (a, b), n in zip(kept, cut.shape)], x.dtype)
    full[tuple(slice(a, a + n) for (a, _), n in zip(kept, cut.shape))] = cut
    return full


def _pixel_shuffle(x: np.ndarray, side: int) -> np.ndarray:
    *batch, channels, height, width = x.shape
    x = x.reshape(*batch, channels // side**2, side, side, height, width)
    n = len(batch)
    order = (*range(n + 1), n + 3, n + 1, n + 4, n + 2)
    return x.transpose(order).reshape(*batch, channels // side**2, height * side, width * side)


def _pixel_unshuffle(x: np.ndarray, side: int) -> np.ndarray:
    *batch, channels, height, width = x.shape
    x = x.reshape(*batch, channels, height // side, side, width // side, side)
    n = len(batch)
    order = (*range(n + 1), n + 2, n + 4, n + 1, n + 3)
    return x.transpose(order).reshape(*batch, channels * side**2, height // side, width // side)


def _unfold(
    x: np.ndarray, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1
) -> np.ndarray:
    given = (kernel_size, dilation, padding, stride)
    pairs = [(part, part) if isinstance(part, int) else part for part in given]
    (kh, kw), (dh, dw), (ph, pw), (sh, sw) = pairs
    x = _pad(x, (pw, pw, ph, ph))
    sides: Any = (kh - 1) * dh + 1, (kw - 1) * dw + 1
    axes: Any = 2, 3
    windows = np.lib.stride_tricks.sliding_window_view(x, sides, axes)
    windows = windows[:, :, ::sh, ::sw, ::dh, ::dw].transpose(0, 1, 4, 5, 2, 3)
    return windows.reshape(x.shape[0], x.shape[1] * kh * kw, -1)


def _cat(parts: list[np.ndarray], dim: int = 0) -> np.ndarray:
    return np.concatenate(parts, dim)


def _stack(parts: list[np.ndarray], dim: int = 0) -> np.ndarray:
    return np.stack(parts, dim)


LAYOUT: dict[str, Callable[..., Any]] = {
    "permute": _permute,
    "transpose": np.swapaxes,
    "t": np.transpose,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "movedim": np.moveaxis,
    "chunk": _chunk,
    "split": _split,
    "narrow": _narrow,
    "select": _select,
    "__getitem__": lambda x, index: x[index],
    "expand": _expand,
    "unbind": _unbind,
    "flip": _flip,
    "contiguous": np.ascontiguousarray,
    "clone": np.array,
    "reshape": _reshape,
    "view": _reshape,
    "flatten": _flatten,
    "unflatten": _unflatten,
    "roll": _roll,
    "index_select": _index_select,
    "repeat_interleave": _repeat_interleave,
    "pad": _pad,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
    "unfold": _unfold,
    "cat": _cat,
    "stack": _stack,
    "zeros_like": np.zeros_like,
}
"""By PyTorch's name. Not among them: `max_pool2d`, `upsample_nearest2d`, `amax`, `amin`, `gather`,
`take_along_dim`, paddings other than with zeros."""
