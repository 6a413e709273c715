"""What a float network must be: Python code that can be followed, and numbers in float32."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from licq.support.errors import InputError

_QUANTIZED = (
    "torch.ao.nn.quantized",
    "torch.ao.nn.intrinsic.quantized",
    "torch.ao.nn.sparse.quantized",
)
"""Packages of PyTorch whose modules hold no weights that could be read."""


def check_network(network: object) -> None:
    """Refuse a network that cannot be quantized, before any work.

    Raises:
        InputError: what `check_code` refuses; or its numbers are not there (the meta device) or are not
            float32. The message names the part.
    """
    check_code(network)
    assert isinstance(network, nn.Module)
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.is_meta:
            raise InputError(
                f"{name} is on the meta device and has no numbers; load the weights onto a device first: "
                "model.to_empty(device='cpu'), then load_state_dict"
            )
    for name, parameter in network.named_parameters():
        if parameter.dtype != torch.float32 and (parameter.is_floating_point() or parameter.is_complex()):
            raise InputError(
                f"the network's weights are {parameter.dtype} ({name}); convert it with .float() first"
            )


def check_code(network: object) -> None:
    """Refuse a network whose forward cannot be followed.

    Raises:
        InputError: it is no module; a part of it is scripted, traced, exported or quantized already; a lazy
            layer never ran.
    """
    if not isinstance(network, nn.Module):
        kind = (
            "a scripted function" if isinstance(network, torch.jit.ScriptFunction) else type(network).__name__
        )
        raise InputError(f"the network is {kind}; give an nn.Module, the codec in Python, as `model`")
    for name, part in _parts(network):
        place = f"{name} of the network" if name else "the network"
        if isinstance(part, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
            raise InputError(
                f"{place} is scripted or traced by torch.jit, so licq cannot look into it; give the Python "
                "module that it was made from, with its weights (load_state_dict)"
            )
        if type(part).__module__.startswith(_QUANTIZED):
            raise InputError(f"{place} ({type(part).__name__}) is quantized already; give the float network")
        if isinstance(part, torch.fx.GraphModule) and any(
            isinstance(node.target, torch._ops.OpOverload) for node in part.graph.nodes
        ):
            raise InputError(
                f"{place} is a graph of torch.export, so licq cannot look into it; give the Python module "
                "that it was made from, with its weights"
            )
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if is_lazy(tensor):
            raise InputError(
                f"{name} has no shape yet: its layer is lazy and never ran; run the network once on an image "
                "first, such as torch.zeros(1, 3, 256, 256)"
            )


def _parts(network: nn.Module) -> Iterator[tuple[str, object]]:
    """Every module by name, and every scripted function that a module holds as an attribute."""
    for name, module in network.named_modules():
        yield name, module
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for key, value in vars(module).items():
            if isinstance(value, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
                yield f"{name}.{key}".lstrip("."), value


def unwrapped(network: nn.Module) -> nn.Module:
    """The codec inside `nn.DataParallel`, `DistributedDataParallel` or what `torch.compile` gives; any other
    module as it is."""
    while True:
        if isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            network = network.module
        elif _is_compiled(network):
            network = cast(Any, network)._orig_mod
        else:
            return network


def uncompiled(network: nn.Module) -> nn.Module:
    """The network without torch.compile, in place: each compiled module is the module that was compiled."""
    network = unwrapped(network)
    for module in network.modules():
        for key, child in module._modules.items():
            while child is not None and _is_compiled(child):
                child = module._modules[key] = cast(Any, child)._orig_mod
    return network


def _is_compiled(module: nn.Module) -> bool:
    # by name: the import of torch._dynamo takes seconds
    return any(
        base.__name__ == "OptimizedModule" and base.__module__.startswith("torch._dynamo")
        for base in type(module).__mro__
    )
