"""A frozen model as a file: what of it is written."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from licq.models.checkpoint_files import CDF_STATE
from licq.models.registry import architecture_of, create_network
from licq.quant.identity import identity_of
from licq.quant.mac import QuantMAC
from licq.quant.rewritten import RewrittenCodec
from licq.quant.saved_parts import (
    GRID_ATTRIBUTES,
    layer_sizes,
    named_grids,
    named_nodes,
    named_tensors,
    unread_tensors,
)
from licq.quant.serialization import same_bits, write_quantized
from licq.support.errors import InputError


def save_quantized(codec: RewrittenCodec, path: str | Path, extra: Mapping[str, Any] | None = None) -> int:
    """Write a frozen model, whole or not at all; returns the size of the file in bytes.

    Args:
        extra: what the writer wants to find again (quality, lambda, history ...), anything that JSON can
            hold.

    Raises:
        InputError: the model is not frozen, or the file cannot be written.
    """
    if not codec.frozen:
        raise InputError(
            "only a frozen model is a program that can be saved; call freeze() after calibration"
        )
    header, tensors = _content(codec)
    if codec.identity is None or not codec.loaded:
        codec.identity = identity_of(header, tensors)
    content = {"identity": codec.identity, "checked": codec.checked, "extra": dict(extra or {})}
    return write_quantized(path, {**header, **content}, tensors)


def model_identity(codec: RewrittenCodec) -> str:
    """The identity of a frozen model; of one from a file that of the file. See `quant.identity`."""
    if codec.identity is None:
        codec.identity = identity_of(*_content(codec))
    return codec.identity


def _content(codec: RewrittenCodec) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(how the program is rebuilt, the tensors that it reads)."""
    unread, constants, first_names = unread_tensors(codec), _constants(codec), dict(named_tensors(codec))
    tensors = {
        name: tensor.detach().cpu()
        for name, tensor in codec.state_dict().items()
        if name in first_names and name not in unread and name not in constants and tensor.numel()
    }
    header = {**_description(codec), "constants": sorted(constants)}
    return json.loads(json.dumps(header)), tensors


def _description(codec: RewrittenCodec) -> dict[str, Any]:
    """How the program is rebuilt around the codec's own forward."""
    arch, kwargs = architecture_of(codec.model) or (None, None)
    nodes = named_nodes(codec)
    return {
        "arch": arch,
        "kwargs": kwargs,
        "class": type(codec.model).__qualname__,
        "sizes": layer_sizes(codec),
        "config": codec.config.to_dict(),
        "configs": {
            name: node.config.to_dict() for name, node in nodes.items() if node.config != codec.config
        },
        "functions": [
            [key.replace("/", "."), node.kind, node.options] for key, node in codec.runtime.functions.items()
        ],
        "order": [[name, node.calls] for name, node in codec.nodes.items()],
        "float_nodes": [name for name, node in nodes.items() if not node.quantized],
        "grids": {
            path: [getattr(grid, attribute) for attribute in GRID_ATTRIBUTES]
            for path, grid in named_grids(codec).items()
        },
        "roundings": {
            name: [node.weight_quantizer.rounding_name, node.weight_quantizer.rounding.hardened]
            for name, node in codec.nodes.items()
            if isinstance(node, QuantMAC)
            and node.weight_int is None
            and node.weight_quantizer.rounding is not None
        },
        "kept_in_float": [[*position, calls] for position, calls in codec.runtime.kept_in_float.items()],
        "left_alone": codec.rewrite.left_alone,
    }


def _constants(codec: RewrittenCodec) -> set[str]:
    """Names of the buffers that the constructor gives to every network of a registered codec: attention
    masks, bounds, indices. They need not be in the file."""
    architecture = architecture_of(codec.model)
    if architecture is None:
        return set()
    fresh = RewrittenCodec(create_network(*architecture), codec.config)
    fresh_buffers = dict(fresh.model.named_buffers())
    return {
        f"model.{name}"
        for name, buffer in codec.model.named_buffers()
        if name in fresh_buffers
        and buffer.numel()
        and name.rpartition(".")[2] not in CDF_STATE
        and buffer.dtype == fresh_buffers[name].dtype
        and same_bits(buffer.cpu().contiguous(), fresh_buffers[name].contiguous())
    }
