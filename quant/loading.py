"""A frozen model from a file: the program is rebuilt around the codec's own forward, and checked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from licq.models.registry import create_network, list_models
from licq.quant.config import QuantConfig
from licq.quant.file_checks import check_certificates, wrong_numbers
from licq.quant.grid import Grid
from licq.quant.mac import QuantMAC
from licq.quant.network_checks import unwrapped
from licq.quant.rewritten import RewrittenCodec
from licq.quant.rounding import AdaRound
from licq.quant.saved_parts import (
    GRID_ATTRIBUTES,
    layer_sizes,
    named_grids,
    named_nodes,
    named_tensors,
    unread_tensors,
)
from licq.quant.serialization import read_quantized, refusing
from licq.support.errors import InputError

Codec = TypeVar("Codec", bound=RewrittenCodec)


def load_quantized(
    cls: type[Codec],
    path: str | Path,
    network: nn.Module | None = None,
    device: torch.device | str | None = None,
) -> Codec:
    """The frozen model of a file. Its forward gives the bits that the saved model gave.

    Args:
        cls: `QuantModel`.
        network: a new object of the codec's class, for a codec that is not registered. Its weights do not
            matter.

    Raises:
        InputError: no such file, damaged, not a quantized model, of another version, or of another network.
    """
    header, tensors = read_quantized(path)
    with refusing(
        f"{path} does not describe a program of this version ({{error}}); quantize the codec again"
    ):
        codec = cls(_network(path, header, network), QuantConfig(**header["config"]))
        _rebuild(codec, header, path)
        _fill(codec, tensors, set(header["constants"]), path)
        _complete(codec, header, path)
        for name, node in codec.nodes.items():
            if (problem := wrong_numbers(node)) is not None:
                raise InputError(f"{path}: {name}: {problem}; quantize the codec again")
        check_certificates(codec.nodes, path)
        codec.extra, codec.identity = header["extra"], header["identity"]
        codec.checked = {key: dict(found) for key, found in header.get("checked", {}).items()}
    codec.frozen = codec.loaded = True
    return codec if device is None else codec.to(device)


def _network(path: str | Path, header: Mapping[str, Any], network: nn.Module | None) -> nn.Module:
    arch, cls = header["arch"], header["class"]
    if network is not None:
        network = unwrapped(network)
        if type(network).__qualname__ != cls:
            raise InputError(
                f"{path} is a quantized {cls}, not a {type(network).__qualname__}; pass a new {cls}"
            )
        return network
    if arch is None:
        raise InputError(
            f"{path} is a quantized {cls}, which is not registered under a name (`arch`); "
            f"pass a new one: QuantModel.load(path, model={cls}(...))"
        )
    if arch not in list_models():
        raise InputError(
            f"{path} needs the architecture {arch!r} of a plug-in; "
            "name the file that registers it: `arch=FILE.py` (in Python: import it first)"
        )
    return create_network(arch, header["kwargs"])


def _rebuild(codec: RewrittenCodec, header: Mapping[str, Any], path: str | Path) -> None:
    """Make the nodes that calibration made, in their order and with their settings."""
    runtime = codec.runtime
    for name, kind, options in header["functions"]:
        runtime.add_function(name, kind, options)
    nodes = named_nodes(codec)
    if layer_sizes(codec) != header["sizes"] or any(name not in nodes for name, _ in header["order"]):
        raise InputError(
            f"{path} was saved from a network of other layers or sizes than this {header['class']}; "
            "build it as it was built then"
        )
    for name, node in nodes.items():
        if name in header["configs"]:
            node.config = QuantConfig(**header["configs"][name])
            if isinstance(node, QuantMAC):
                node.set_bits()  # those of this config
    runtime.nodes.clear()
    for name, calls in header["order"]:
        runtime.nodes[name] = nodes[name]
        nodes[name].calls = calls
    for name, (scheme, hardened) in header["roundings"].items():
        node = _layer(codec, name)
        rounding = node.weight_quantizer.set_rounding(scheme, node.float_weight())
        rounding.hardened = hardened
        if isinstance(rounding, AdaRound):
            rounding.base = None  # the file has it; these floors are those of this network's weights
    for grid_path, values in header["grids"].items():
        grid = codec.get_submodule(grid_path)
        if not isinstance(grid, Grid):
            raise TypeError(f"{grid_path} is no grid")
        grid.frozen = True
        for attribute, value in zip(GRID_ATTRIBUTES, values):
            setattr(grid, attribute, value)
    for grid_path in named_grids(codec).keys() - header["grids"].keys():
        parent, _, attribute = grid_path.rpartition(".")
        if attribute != "stored":
            raise InputError(f"{path} does not describe {grid_path}; quantize the codec again")
        # of a LayerNorm under `strict_int8`, in files of versions that stored its input with one scale
        setattr(codec.get_submodule(parent), attribute, None)
    for name, node in nodes.items():
        node.quantized = name not in header["float_nodes"]
    runtime.kept_in_float.clear()
    runtime.kept_in_float.update(
        {(function, where): calls for function, where, calls in header["kept_in_float"]}
    )


def _fill(
    codec: RewrittenCodec, tensors: Mapping[str, Tensor], constants: set[str], path: str | Path
) -> None:
    """Put every tensor of the file where it belongs, and free what the program never reads."""
    other = f"{path} was saved from another network than this {type(codec.model).__qualname__}"
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(".")
        try:
            module = codec.get_submodule(owner)
        except AttributeError:
            raise InputError(f"{other}: {owner} is unknown") from None
        if key in module._parameters:
            old = module._parameters[key]
            # the shapes of learned factors are those of what was observed
            is_learned = isinstance(module, Grid) or ".weight_quantizer." in name or key.startswith("log_n")
            if (old is None and key != "border") or (
                old is not None and old.shape != tensor.shape and not is_learned
            ):
                raise InputError(f"{other}: {name} has shape {tuple(tensor.shape)} there")
            module._parameters[key] = nn.Parameter(tensor, requires_grad=False)
        elif key in module._buffers:
            module._buffers[key] = tensor
        else:
            raise InputError(f"{other}: {name} is unknown")
    unread, persistent = unread_tensors(codec), codec.state_dict().keys()
    for name, tensor in named_tensors(codec):
        if name in unread:
            _free(codec, name, tensor)
        elif name not in tensors and name not in constants and tensor.numel() and name in persistent:
            raise InputError(f"{other}: {name} is missing")


def _complete(codec: RewrittenCodec, header: Mapping[str, Any], path: str | Path) -> None:
    """Add what older files do not say of layers with float inputs.

    The floors of AdaRound follow from the weights. Which output channels share a scale does not.

    Raises:
        InputError: output channels share scales, and the file does not say which.
    """
    for name in header["roundings"]:
        node = _layer(codec, name)
        quantizer = node.weight_quantizer
        if quantizer.group_count and quantizer.group is None:
            raise InputError(
                f"{path} is of a version that did not write which output channels of {name} share a scale; "
                "quantize the codec again"
            )
        if isinstance(quantizer.rounding, AdaRound) and quantizer.rounding.base is None:
            quantizer.rounding.base = quantizer.in_steps(node.float_weight()).floor()


def _layer(codec: RewrittenCodec, name: str) -> QuantMAC:
    """The multiply-accumulate layer of this name; TypeError where it is another node."""
    node = codec.nodes[name]
    if not isinstance(node, QuantMAC):
        raise TypeError(f"{name} is no multiply-accumulate layer")
    return node


def _free(codec: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a tensor by one of the same shape in four bytes: NaN, so that reading it cannot pass
    unnoticed."""
    owner, _, key = name.rpartition(".")
    module = codec.get_submodule(owner)
    value = (
        torch.full((), torch.nan, dtype=tensor.dtype)
        if tensor.is_floating_point()
        else torch.zeros((), dtype=tensor.dtype)
    )
    value = value.expand(tensor.shape)
    if key in module._parameters:
        module._parameters[key] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[key] = value
