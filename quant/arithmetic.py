"""Functions that compute: exact on the spot on the numbers, or by the node of a function
(`quant.functions`)."""

import torch
from torch import Tensor

from licq.quant import primitives
from licq.quant.assignment import disjoint_sum
from licq.quant.dispatch import arguments, handles
from licq.quant.formulas import difference_of, fixed_values, note_difference, sum_of
from licq.quant.qtensor import QTensor
from licq.quant.torch_functions import function_name

# ----------------------------------------------------------------------- arithmetic that is exact on the spot


@handles("neg")
def _neg(runtime, function, args, kwargs):
    x = args[0]
    return x.like(primitives.negative(x.q), x.scale)


@handles("abs")
def _abs(runtime, function, args, kwargs):
    x = args[0]
    return x.like(primitives.absolute(x.q), x.scale)


@handles("relu", "relu6")
def _relu(runtime, function, args, kwargs):
    x = args[0]
    if function_name(function) == "relu6":
        return runtime.function("relu6", {}, (x,))
    return x.like(primitives.clamp(x.q, 0, None), x.scale)


@handles("mul", "div")
def _mul(runtime, function, args, kwargs):
    a, b = fixed_values(args[0]), fixed_values(args[1])
    if not isinstance(a, QTensor) and not isinstance(b, QTensor):
        return runtime.wrap(function(a, b, **kwargs))
    if function_name(function) == "div":
        if not isinstance(a, QTensor) or isinstance(b, QTensor) or kwargs.get("rounding_mode") is not None:
            return runtime.in_float(function, args, kwargs)
        b = 1 / b
    if not isinstance(a, QTensor):
        a, b = b, a
    if isinstance(b, Tensor) and b.ndim == 0 and not b.requires_grad:
        b = float(b)
    if isinstance(b, (int, float)):
        if not a.is_integer:
            return a.like(a.q * b, None)
        if b == 0:
            return a.like(torch.zeros_like(a.q), a.scale)
        return a.like(a.q if b > 0 else primitives.negative(a.q), a.unit * abs(float(b)))
    if (
        isinstance(b, Tensor)
        and not b.requires_grad
        and b.ndim == a.ndim
        and b.numel() == b.shape[0]
        and bool((b > 0).all())
    ):
        # one factor an image, a variable-rate codec's gain: it goes into the scale
        return a.moved(a.q, a.full_scale() * b.double()) if a.is_integer else a.moved(a.q * b, None)
    if isinstance(b, Tensor) and not b.requires_grad and bool(((b == 0) | (b == 1)).all()):
        return a.moved(primitives.mask(a.q, b), a.scale)
    return runtime.function("mul", {}, (a, b))


@handles("add", "sub")
def _add(runtime, function, args, kwargs):
    a, b = args[0], args[1]
    if kwargs.get("alpha", 1) != 1:
        b = b * kwargs["alpha"]
    is_difference = function_name(function) == "sub"
    known = difference_of(a, b) if is_difference else sum_of(a, b)
    if known is not None:
        return known
    if is_difference:
        return note_difference(_sum(runtime, a, -b), a, b)
    return _sum(runtime, a, b)


def _sum(runtime, a, b):
    if isinstance(a, QTensor) and isinstance(b, QTensor) and a.latent and b.latent:
        return disjoint_sum(runtime, a, b)
    if not isinstance(a, QTensor):
        a, b = b, a
    if isinstance(b, (int, float)) and b == 0:
        return a.same()
    return runtime.function("add", {}, (a, b))


# -------------------------------------------------------------- functions with an integer algorithm of theirs


@handles("matmul")
def _matmul(runtime, function, args, kwargs):
    if not all(isinstance(a, QTensor) for a in args[:2]):
        return runtime.in_float(function, args, kwargs)
    return runtime.function("matmul", {}, args[:2])


@handles("softmax")
def _softmax(runtime, function, args, kwargs):
    dim = arguments(args, kwargs, ["dim"]).get("dim")
    if dim is None:  # as torch.nn.functional.softmax chooses it
        dim = 0 if args[0].ndim in (0, 1, 3) else 1
    return runtime.function("softmax", {"dim": dim}, (args[0],))


@handles("leaky_relu")
def _leaky_relu(runtime, function, args, kwargs):
    slope = kwargs.get("negative_slope", args[1] if len(args) > 1 else 0.01)
    return runtime.function("leaky_relu", {"slope": slope}, (args[0],))


@handles("gelu")
def _gelu(runtime, function, args, kwargs):
    approximate = kwargs.get("approximate", args[1] if len(args) > 1 else "none")
    return runtime.function("gelu" if approximate == "none" else "gelu_tanh", {}, (args[0],))


_OPTIONS_OF_TABLES = {"elu": {"alpha": 1.0}, "softplus": {"beta": 1.0, "threshold": 20.0}}


@handles(
    "sigmoid",
    "tanh",
    "silu",
    "softplus",
    "exp",
    "elu",
    "hardswish",
    "hardsigmoid",
    "mish",
    "square",
    "sqrt",
    "log",
)
def _table(runtime, function, args, kwargs):
    """The table of a function with its arguments, of which the node keeps those that are not the defaults."""
    name = function_name(function)
    defaults = _OPTIONS_OF_TABLES.get(name, {})
    given = arguments(args, kwargs, defaults)
    given.pop("inplace", None)
    known = given.keys() <= defaults.keys() and len(args) <= 1 + len(defaults)
    if not known or not all(isinstance(value, (int, float)) for value in given.values()):
        return runtime.in_float(function, args, kwargs)
    options = {key: float(value) for key, value in given.items() if value != defaults[key]}
    return runtime.function(name, options, (args[0],))


@handles("pow")
def _pow(runtime, function, args, kwargs):
    exponent = arguments(args, kwargs, ["exponent"]).get("exponent")
    if not isinstance(args[0], QTensor) or not isinstance(exponent, (int, float)) or exponent != 2:
        return runtime.in_float(function, args, kwargs)
    return runtime.function("square", {}, (args[0],))


@handles("clamp")
def _clamp(runtime, function, args, kwargs):
    low = kwargs.get("min", args[1] if len(args) > 1 else None)
    high = kwargs.get("max", args[2] if len(args) > 2 else None)
    x = args[0]
    if not x.is_integer:
        return x.like(x.q.clamp(low, high), None)
    if any(isinstance(limit, (Tensor, QTensor)) for limit in (low, high)):
        return runtime.in_float(function, args, kwargs)
    scale = x.scale.detach()
    low, high = (None if limit is None else torch.round(limit / scale) for limit in (low, high))
    return x.like(primitives.clamp(x.q, low, high), x.scale)


@handles("dropout", "dropout2d")
def _dropout(runtime, function, args, kwargs):
    training = kwargs.get("training", args[2] if len(args) > 2 else True)
    return runtime.in_float(function, args, kwargs) if training else args[0]
