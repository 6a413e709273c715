"""The names of PyTorch's functions: one for all the ways in which a function can be called."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

SQUARE_BITS = 13
"""Of numbers whose exact squares are summed up; a square has 24."""

_ALIASES = {
    "__add__": "add",
    "__radd__": "add",
    "__iadd__": "add",
    "__sub__": "sub",
    "__isub__": "sub",
    "__mul__": "mul",
    "__rmul__": "mul",
    "__imul__": "mul",
    "multiply": "mul",
    "__truediv__": "div",
    "__itruediv__": "div",
    "true_divide": "div",
    "divide": "div",
    "__eq__": "eq",
    "__ne__": "ne",
    "__lt__": "lt",
    "__le__": "le",
    "__gt__": "gt",
    "__ge__": "ge",
    "__abs__": "abs",
    "__matmul__": "matmul",
    "bmm": "matmul",
    "mm": "matmul",
    "__neg__": "neg",
    "negative": "neg",
    "concat": "cat",
    "concatenate": "cat",
    "swapaxes": "transpose",
    "clip": "clamp",
    "subtract": "sub",
    "__rdiv__": "rdiv",
    "__rtruediv__": "rdiv",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "not_equal": "ne",
    "__and__": "logical_and",
    "__rand__": "logical_and",
    "bitwise_and": "logical_and",
    "__or__": "logical_or",
    "__ror__": "logical_or",
    "bitwise_or": "logical_or",
    "__xor__": "logical_xor",
    "__rxor__": "logical_xor",
    "bitwise_xor": "logical_xor",
    "__invert__": "logical_not",
    "bitwise_not": "logical_not",
    "linalg_vector_norm": "norm",
    "special_erf": "erf",
    "special_expit": "sigmoid",
    "fmin": "minimum",
    "fmax": "maximum",
    "logsigmoid": "log_sigmoid",
    "_threshold": "threshold",
}


def function_name(function: Callable) -> str:
    """The name under which a torch function, a method or its in-place variant is handled."""
    name = getattr(function, "__name__", str(function))
    if not name.startswith("__"):
        name = name.rstrip("_")
    return _ALIASES.get(name, name)


def is_in_place(function: Callable, kwargs: dict) -> bool:
    """Whether a torch function changes its first argument."""
    name = getattr(function, "__name__", "")
    if name.startswith("__"):
        return name == "__setitem__" or name[:3] == "__i" and name[3:-2] in ("add", "sub", "mul", "truediv")
    return name.endswith("_") or bool(kwargs.get("inplace"))


def out_of_place(function: Callable, name: str) -> Callable | None:
    """The function that returns what this one, in place, writes; None where there is none (fill_, copy_, x[i]
    = y)."""
    if not getattr(function, "__name__", "").endswith("_"):
        return function  # inplace=True
    return next(
        (
            getattr(home, name)
            for home in (torch.Tensor, torch, F)
            if hasattr(home, name) and name != "__setitem__"
        ),
        None,
    )
