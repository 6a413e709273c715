"""Functions that compute: exact on the spot on the numbers, or by the node of a function
(`quant.functions`)."""

import math

import torch
from torch import Tensor

from licq.quant import primitives
from licq.quant.assignment import disjoint_sum
from licq.quant.dispatch import Forward, arguments, handles
from licq.quant.formulas import difference_of, fixed_values, note_difference, sum_of
from licq.quant.qtensor import QTensor, to_real
from licq.quant.reductions import fitting, root, squared
from licq.quant.torch_functions import function_name

OTHER_TABLES = (
    "celu selu log_sigmoid tanhshrink softshrink hardshrink threshold softsign erf erfc erfinv sin cos tan "
    "asin acos atan sinh cosh asinh acosh atanh log1p log2 log10 exp2 expm1 sign sgn"
).split()
"""Functions of one number beside those that are named below."""

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
        return x.clamp(0, 6)
    return x.like(primitives.clamp(x.q, 0, None), x.scale)


@handles("mul", "div")
def _mul(runtime, function, args, kwargs):
    a, b = fixed_values(args[0]), fixed_values(args[1])
    if not isinstance(a, QTensor) and not isinstance(b, QTensor):
        return runtime.wrap(function(a, b, **kwargs))
    if function_name(function) == "div":
        if kwargs.get("rounding_mode") is not None:
            return runtime.in_float(function, args, kwargs)
        if isinstance(b, QTensor):
            return _quotient(runtime, a, b)
        b = 1 / b
    if not isinstance(a, QTensor):
        a, b = b, a
    if isinstance(b, QTensor):
        special = _product(runtime, a, b)
        if special is not None:
            return special
    if isinstance(b, Tensor) and b.ndim == 0 and not b.requires_grad:
        b = float(b)
    if isinstance(b, (int, float)):
        if not a.is_integer:
            y = a.like(a.q * b, None)
        elif b == 0:
            return a.like(torch.zeros_like(a.q), a.scale)
        else:
            y = a.like(a.q if b > 0 else primitives.negative(a.q), a.unit * abs(float(b)))
        y.bound = a.bound if b > 0 else 0
        return y
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


def _product(runtime: Forward, a: QTensor, b: QTensor) -> QTensor | None:
    """The product of two tensors where it is another function, exact or of more bits; None: it is not."""
    if a.boolean or b.boolean:
        a, b = (a, b) if b.boolean else (b, a)
        return a.like(primitives.product(a.q, b.q), a.scale)
    if a is b:
        return squared(runtime, a)
    for x, other in ((a, b), (b, a)):
        if other.root is not None and other.root[1]:
            return runtime.function("div_root", {}, (x, other.root[0]))
    return None


def _quotient(runtime: Forward, a: QTensor | Tensor | float, b: QTensor) -> QTensor:
    """a / b."""
    if b.root is not None:
        v, inverse = b.root
        if not inverse:
            if isinstance(a, QTensor):
                return runtime.function("div_root", {}, (a, v))
            return root(runtime, v, inverse=True) * a
    if isinstance(a, QTensor):
        return runtime.function("div", {}, (a, b))
    return runtime.function("reciprocal", {}, (b,)) * a


@handles("rdiv")
def _divided_by(runtime, function, args, kwargs):
    b, a = args[:2]
    return _quotient(runtime, a, b)


@handles("reciprocal")
def _reciprocal(runtime, function, args, kwargs):
    return _quotient(runtime, 1.0, args[0])


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
    if isinstance(b, (int, float)) and a.bound:  # a second moment keeps its bits
        if not a.is_integer:
            y = a.like(a.q + b, None)
            y.bound = a.bound
            return y
        # a number that is larger than all moments takes bits from them
        room = max(1.0, float(abs(b) / a.unit.detach()) / a.bound)
        q, unit, bound = fitting(a.q if a.recorder else a.q.double(), a.unit, a.bound, room)
        steps = torch.round(b / unit.detach())
        y = a.like(primitives.add(q, primitives.constant(steps, a.recorder)), unit)
        y.bound = bound + int(steps.abs().max())
        return y
    return runtime.function("add", {}, (a, b))


# -------------------------------------------------------------- functions with an integer algorithm of theirs


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


_OPTIONS_OF_TABLES = {
    "elu": {"alpha": 1.0},
    "celu": {"alpha": 1.0},
    "softplus": {"beta": 1.0, "threshold": 20.0},
    "softshrink": {"lambd": 0.5},
    "hardshrink": {"lambd": 0.5},
    "threshold": {"threshold": None, "value": None},
}


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
    "log",
    *OTHER_TABLES,
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


@handles("pow", "square", "sqrt", "rsqrt", "float_power")
def _pow(runtime, function, args, kwargs):
    name = function_name(function)
    exponent = {"square": 2, "sqrt": 0.5, "rsqrt": -0.5}.get(name)
    if exponent is None:
        exponent = arguments(args, kwargs, ["exponent"]).get("exponent")
    x = args[0]
    if not isinstance(x, QTensor) or not isinstance(exponent, (int, float)):
        if isinstance(exponent, QTensor) and isinstance(x, (int, float)) and x > 0:
            return runtime.function("exp", {}, (exponent * math.log(x),))
        return runtime.in_float(function, args, kwargs)
    if exponent == 1:
        return x.same()
    if exponent == 2:
        return squared(runtime, x)
    if x.bound and abs(exponent) == 0.5:
        return root(runtime, x, inverse=exponent < 0)
    if exponent == 0.5:
        return runtime.function("sqrt", {}, (x,))
    return runtime.function("power", {"exponent": float(exponent)}, (x,))


@handles("rpow")
def _rpow(runtime, function, args, kwargs):
    return torch.pow(args[1], args[0])


@handles("clamp")
def _clamp(runtime, function, args, kwargs):
    low = kwargs.get("min", args[1] if len(args) > 1 else None)
    high = kwargs.get("max", args[2] if len(args) > 2 else None)
    x = args[0]
    for limit, kind in ((low, "maximum"), (high, "minimum")):
        if isinstance(limit, (Tensor, QTensor)) and limit.numel() > 1:
            x = runtime.function(kind, {}, (x, limit))
    low, high = (
        None if limit is None or getattr(limit, "ndim", 0) and limit.numel() > 1 else to_real(limit)
        for limit in (low, high)
    )
    low, high = (None if isinstance(end, float) and math.isinf(end) else end for end in (low, high))
    if not x.is_integer:
        y = x.q if low is None and high is None else x.q.clamp(low, high)
        y = x.like(y, None)
    else:
        scale = x.unit.detach()
        low, high = (None if limit is None else torch.round(limit / scale) for limit in (low, high))
        y = x.like(primitives.clamp(x.q, low, high), x.scale)
    # a second moment that is raised to a limit may pass what was known of it
    raised = 0 if low is None or not x.is_integer else int(torch.as_tensor(low).abs().max())
    y.bound = max(x.bound, raised) if x.bound else 0
    return y


@handles("hardtanh")
def _hardtanh(runtime, function, args, kwargs):
    given = arguments(args, kwargs, ["min_val", "max_val"])
    return args[0].clamp(given.get("min_val", -1.0), given.get("max_val", 1.0))


@handles("glu")
def _glu(runtime, function, args, kwargs):
    value, gate = args[0].chunk(2, arguments(args, kwargs, ["dim"]).get("dim", -1))
    return value * torch.sigmoid(gate)


@handles("dropout", "dropout2d")
def _dropout(runtime, function, args, kwargs):
    training = kwargs.get("training", args[2] if len(args) > 2 else True)
    return runtime.in_float(function, args, kwargs) if training else args[0]
