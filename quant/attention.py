"""Handlers of attention as PyTorch writes it whole, of einsum over two activations, and of `fold`.

Each is made of the products, softmax and sums that have nodes of their own.
"""

import math
from typing import Any

import torch
from torch import Tensor

from licq.quant.dispatch import Forward, arguments, handles
from licq.quant.own_weights import linear, with_parameter
from licq.quant.qtensor import QTensor, to_real
from licq.quant.resampling import AxisMap, resampled


def _bias(mask: Any, causal: bool, queries: int, keys: int, device: torch.device) -> Tensor | None:
    """What is added to the scores: 0 or -inf of boolean masks (true: the key is seen), numbers of others."""
    total = None
    if mask is not None:
        total = (
            torch.zeros(mask.shape, device=device).masked_fill(~mask, -math.inf)
            if (mask.dtype == torch.bool)
            else mask.float()
        )
    if causal:
        seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril()
        triangle = torch.zeros(queries, keys, device=device).masked_fill(~seen, -math.inf)
        total = triangle if total is None else total + triangle
    return total


def attention(runtime: Forward, q: Any, k: Any, v: Any, bias: Any, scale: float) -> tuple[Any, QTensor]:
    """softmax(q k^T * scale + bias) v, and the probabilities, of quantized tensors."""
    scores = torch.matmul(q, k.transpose(-2, -1)) * scale
    if isinstance(bias, QTensor):
        scores, bias = scores + bias, None
    p: Any = runtime.function("softmax", {"dim": -1}, (scores,) if bias is None else (scores, bias))
    return torch.matmul(p, v), p


@handles("scaled_dot_product_attention")
def _scaled_dot_product(runtime, function, args, kwargs):
    names = ["key", "value", "attn_mask", "dropout_p", "is_causal", "scale"]
    given = {"key": None, "value": None, **arguments(args, kwargs, names)}
    q, k, v, mask = args[0], given["key"], given["value"], given.get("attn_mask")
    if (
        given.get("enable_gqa")
        or not all(isinstance(x, QTensor) for x in (q, k, v))
        or given.get("dropout_p")
    ):
        return runtime.in_float(function, args, kwargs)
    if not isinstance(mask, QTensor) or mask.boolean:
        if isinstance(mask, QTensor):  # a mask made of values
            return runtime.in_float(function, args, kwargs)
        mask = _bias(mask, bool(given.get("is_causal")), q.shape[-2], k.shape[-2], q.device)
    scale = given.get("scale")
    return attention(runtime, q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else float(scale))[0]


_HEADED = (
    "query key value embed_dim_to_check num_heads in_proj_weight in_proj_bias bias_k bias_v add_zero_attn "
    "dropout_p out_proj_weight out_proj_bias training key_padding_mask need_weights attn_mask "
    "use_separate_proj_weight q_proj_weight k_proj_weight v_proj_weight static_k static_v "
    "average_attn_weights is_causal"
).split()


@handles("multi_head_attention_forward")
def _multi_head(runtime, function, args, kwargs):
    """`nn.MultiheadAttention`: (L, B, E) or (L, E) in and out, whatever the module's batch_first."""
    given = {"query": args[0], **arguments(args, kwargs, _HEADED[1:])}
    inputs = [given[name] for name in ("query", "key", "value")]
    unknown = ("bias_k", "bias_v", "add_zero_attn", "static_k", "static_v", "training")
    masks = given.get("attn_mask"), given.get("key_padding_mask")
    if (
        any(given.get(name) is not None and given[name] is not False for name in unknown)
        or not all(isinstance(x, QTensor) for x in inputs)
        or any(isinstance(mask, QTensor) for mask in masks)
    ):
        return runtime.in_float(function, args, kwargs)
    batched = inputs[0].ndim == 3
    inputs = inputs if batched else [x.unsqueeze(1) for x in inputs]
    heads, (length, batch, width) = given["num_heads"], inputs[0].shape
    if given.get("use_separate_proj_weight"):
        weights = [given[f"{name}_proj_weight"] for name in "qkv"]
    else:
        weights = given["in_proj_weight"].chunk(3)
    offsets = [None] * 3 if given.get("in_proj_bias") is None else given["in_proj_bias"].chunk(3)
    q, k, v = (
        linear(runtime, x, weight, offset).reshape(x.shape[0], batch, heads, -1).permute(1, 2, 0, 3)
        for x, weight, offset in zip(inputs, weights, offsets)
    )
    bias = _bias_of_heads(*masks, batch, heads, q.device)
    y, p = attention(runtime, q, k, v, bias, (width // heads) ** -0.5)
    y = y.permute(2, 0, 1, 3).reshape(length, batch, width)
    y = linear(runtime, y, given["out_proj_weight"], given.get("out_proj_bias"))
    y = y if batched else y.squeeze(1)
    if not given.get("need_weights", True):
        return y, None
    p = p.mean(1) if given.get("average_attn_weights", True) else p
    return y, p if batched else p.squeeze(0)


def _bias_of_heads(mask: Any, padding: Any, batch: int, heads: int, device: torch.device) -> Tensor | None:
    """The masks of `nn.MultiheadAttention`, where true hides a key, as one bias of scores."""
    total = None
    if mask is not None:
        total = _bias(~mask if mask.dtype == torch.bool else mask, False, 0, 0, device)
        if total is not None and total.ndim == 3:
            total = total.reshape(batch, heads, *total.shape[1:])
    if padding is not None:
        padding = padding if padding.ndim == 2 else padding.unsqueeze(0)
        keys = _bias(~padding if padding.dtype == torch.bool else padding, False, 0, 0, device)
        assert keys is not None
        total = keys[:, None, None] if total is None else total + keys[:, None, None]
    return total


# ---------------------------------------------------------------------------------------------------- einsum


@handles("einsum")
def _einsum(runtime, function, args, kwargs):
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    result = None
    if isinstance(equation, str) and len(operands) == 2:
        if all(isinstance(x, QTensor) for x in operands):
            result = _of_two(equation, operands)
        else:
            result = with_parameter(runtime, equation, operands)
    return runtime.in_float(function, args, kwargs) if result is None else result


def _of_two(equation: str, operands: list) -> Any:
    """einsum of two activations as a matrix product; None: it is none."""
    terms, arrow, out = equation.replace(" ", "").partition("->")
    names = terms.split(",")
    if "." in equation or not arrow or len(names) != 2 or any(len({*n}) != len(n) for n in (*names, out)):
        return None
    (of_a, of_b), (a, b) = names, operands
    size = {**dict(zip(of_a, a.shape)), **dict(zip(of_b, b.shape))}
    shared = [letter for letter in of_a if letter in of_b]
    batch = [letter for letter in shared if letter in out]
    summed = [letter for letter in shared if letter not in out]
    rows = [letter for letter in of_a if letter not in shared]
    columns = [letter for letter in of_b if letter not in shared]
    order = [*batch, *rows, *columns]
    if (
        not summed
        or sorted(order) != sorted(out)
        or any(
            x.shape[of_x.index(letter)] != size[letter]
            for x, of_x in ((a, of_a), (b, of_b))
            for letter in of_x
        )
    ):
        return None
    count = [size[letter] for letter in batch]
    a = a.permute([of_a.index(letter) for letter in (*batch, *rows, *summed)])
    a = a.reshape([*count, math.prod(size[x] for x in rows), -1])
    b = b.permute([of_b.index(letter) for letter in (*batch, *summed, *columns)])
    b = b.reshape([*count, a.shape[-1], math.prod(size[x] for x in columns)])
    y = torch.matmul(a, b).reshape([size[letter] for letter in order])
    return y.permute([order.index(letter) for letter in out])


# ------------------------------------------------------------------------------------------------------ fold


def _two(value: Any) -> list[int]:
    return [int(part) for part in value] if isinstance(value, (list, tuple)) else [int(value)] * 2


@handles("fold")
def _fold(runtime, function, args, kwargs):
    """Patches (B, C * kh * kw, L) summed into an image: along each axis a map of weights 0 and 1."""
    names = ["output_size", "kernel_size", "dilation", "padding", "stride"]
    x, given = args[0], arguments(args, kwargs, names)
    if not isinstance(x, QTensor) or x.ndim != 3:
        return runtime.in_float(function, args, kwargs)
    size, kernel = _two(given["output_size"]), _two(given["kernel_size"])
    dilation, padding, stride = (_two(given.get(name, d)) for name, d in zip(names[2:], (1, 0, 1)))
    counts, maps = [], {}
    for i in range(2):
        count = (size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        weights = torch.zeros(kernel[i], count, size[i], dtype=torch.float64)
        for tap in range(kernel[i]):
            for place in range(count):
                to = place * stride[i] + tap * dilation[i] - padding[i]
                if 0 <= to < size[i]:
                    weights[tap, place, to] = 1
        counts.append(count)
        maps[2 + i] = AxisMap(weights.reshape(-1, size[i]))
    batch, (kh, kw), (h, w) = x.shape[0], kernel, counts
    x = x.reshape(batch, -1, kh, kw, h, w).permute(0, 1, 2, 4, 3, 5).reshape(batch, -1, kh * h, kw * w)
    if x.is_integer:
        return resampled(runtime, x, maps)
    only_moves = all(found.only_moves for found in maps.values())
    x = runtime.one_scale_along(x, maps) if only_moves else runtime.function("carrier", {}, (x,))
    q = to_real(x)
    for axis, found in maps.items():
        q = found(q, x, axis)
    return x.like(q.to(x.q.dtype), None)
