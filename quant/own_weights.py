"""Handlers of products with weights that a forward passes itself: F.conv2d(x, self.weight), x @ w, and
einsum with a parameter."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from licq.quant.dispatch import Forward, arguments, handles
from licq.quant.qtensor import QTensor

_CONV = ["weight", "bias", "stride", "padding", "dilation", "groups"]
_TRANSPOSED = ["weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"]


def _pair(value: Any) -> Any:
    if isinstance(value, str):
        return value
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return [int(part) for part in (values * 2 if len(values) == 1 else values)]


def _is_constant(weight: Any, bias: Any) -> bool:
    return isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))


def linear(runtime: Forward, x: QTensor, weight: Tensor, bias: Tensor | None = None) -> QTensor:
    """x times a matrix (outputs, inputs) along the last dimension."""
    options = {"shape": list(weight.shape), "bias": bias is not None}
    return runtime.function("linear", options, (x, weight, bias))


@handles("linear")
def _linear(runtime, function, args, kwargs):
    x, given = args[0], arguments(args, kwargs, ["weight", "bias"])
    weight, bias = given["weight"], given.get("bias")
    if not isinstance(x, QTensor) or not _is_constant(weight, bias) or weight.ndim != 2:
        return runtime.in_float(function, args, kwargs)
    return linear(runtime, x, weight, bias)


@handles("conv2d", "conv_transpose2d")
def _conv2d(runtime, function, args, kwargs):
    transposed = "transpose" in function.__name__
    x, given = args[0], arguments(args, kwargs, _TRANSPOSED if transposed else _CONV)
    weight, bias = given["weight"], given.get("bias")
    if not isinstance(x, QTensor) or not _is_constant(weight, bias) or x.ndim != 4:
        return runtime.in_float(function, args, kwargs)
    options = {
        "shape": list(weight.shape),
        "bias": bias is not None,
        "stride": _pair(given.get("stride", 1)),
        "padding": _pair(given.get("padding", 0)),
        "dilation": _pair(given.get("dilation", 1)),
        "groups": int(given.get("groups", 1)),
    }
    if transposed:
        options["output_padding"] = _pair(given.get("output_padding", 0))
    return runtime.function("conv_transpose2d" if transposed else "conv2d", options, (x, weight, bias))


@handles("conv1d", "conv_transpose1d")
def _conv1d(runtime, function, args, kwargs):
    """As images of one row."""
    transposed = "transpose" in function.__name__
    x, given = args[0], arguments(args, kwargs, _TRANSPOSED if transposed else _CONV)
    weight, bias = given.pop("weight"), given.pop("bias", None)
    if not isinstance(x, QTensor) or not _is_constant(weight, bias) or x.ndim != 3:
        return runtime.in_float(function, args, kwargs)
    neutral = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0}
    for name, idle in neutral.items():
        if name in given and not isinstance(given[name], str):
            value = given[name]
            given[name] = [idle, int(value[0] if isinstance(value, (list, tuple)) else value)]
    convolve = F.conv_transpose2d if transposed else F.conv2d
    return convolve(x.unsqueeze(2), weight.unsqueeze(2), bias, **given).squeeze(2)


@handles("matmul")
def _matmul(runtime, function, args, kwargs):
    a, b = args[:2]
    if isinstance(a, QTensor) and isinstance(b, Tensor) and b.ndim == 2:
        return linear(runtime, a, b.T)
    if isinstance(b, QTensor) and isinstance(a, Tensor) and a.ndim == 2 and b.ndim >= 2:
        return linear(runtime, b.transpose(-1, -2), a).transpose(-1, -2)
    if min(a.ndim, b.ndim) < 2:
        return runtime.in_float(function, args, kwargs)
    return runtime.function("matmul", {}, (a, b))


def with_parameter(runtime: Forward, equation: str, operands: list) -> QTensor | None:
    """einsum of a tensor and a constant as a linear layer; None: it is none."""
    terms, arrow, out = equation.replace(" ", "").partition("->")
    names = terms.split(",")
    if "." in equation or not arrow or len(operands) != 2 or len(names) != 2:
        return None
    if isinstance(operands[0], Tensor):
        names, operands = names[::-1], operands[::-1]
    (x, w), (of_x, of_w) = operands, names
    if not isinstance(x, QTensor) or not isinstance(w, Tensor):
        return None
    if len({*of_x}) != len(of_x) or len({*of_w}) != len(of_w) or not {*out} <= {*of_x, *of_w}:
        return None
    shared = [letter for letter in of_x if letter in of_w]
    summed = [letter for letter in shared if letter not in out]
    kept = [letter for letter in of_x if letter not in summed]
    new = [letter for letter in of_w if letter not in summed]
    if len(summed) != len(shared) or not summed or any(letter not in out for letter in (*kept, *new)):
        return None
    rows = x.permute([of_x.index(letter) for letter in (*kept, *summed)])
    size = {**dict(zip(of_x, x.shape)), **dict(zip(of_w, w.shape))}
    rows = rows.reshape([*(size[letter] for letter in kept), -1])
    weight = w.permute([of_w.index(letter) for letter in (*new, *summed)])
    weight = weight.reshape(-1, rows.shape[-1])
    y = linear(runtime, rows, weight)
    y = y.reshape([size[letter] for letter in (*kept, *new)])
    order = [*kept, *new]
    return y.permute([order.index(letter) for letter in out])
