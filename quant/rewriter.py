"""The graph rewriter: layers become nodes, blocks become `QuantBlock`s, by type."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.utils import prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from licq.models.vbr import RateFunction
from licq.quant import (
    activations,
    boundaries,
    choices,
    functions,
    layers,
    norms,
    offsets,
    operands,
    own_layers,
    quotients,
    rounded,
)
from licq.quant.blocks import BLOCKS, QuantBlock
from licq.quant.config import QuantConfig
from licq.quant.modules import REPLACEMENTS, QuantModule
from licq.quant.network_checks import uncompiled
from licq.quant.runtime import Runtime
from licq.support.errors import InputError

NODE_MODULES = (
    activations,
    boundaries,
    choices,
    functions,
    layers,
    norms,
    offsets,
    operands,
    own_layers,
    quotients,
    rounded,
)
"""Imported for the kinds of layers that they register with `replaces`, and for their functions."""


NO_LAYER = "has no integer layer here"
"""Of a module that is left alone. The functions of its own forward may all be integer."""


@dataclass
class Rewrite:
    """What the rewriter did: names of nodes and blocks, and modules it left alone with the reason."""

    nodes: dict[str, QuantModule] = field(default_factory=dict)
    blocks: dict[str, QuantBlock] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)


def replacement_for(module: nn.Module) -> Callable[[nn.Module, QuantConfig], QuantModule] | None:
    """By exact type, or by a base type whose forward the module has not overridden."""
    for base in type(module).__mro__:
        if base in REPLACEMENTS and type(module).forward is base.forward:
            return REPLACEMENTS[base]
    return None


def unsupported(module: nn.Module) -> str | None:
    """Why a layer of a supported type cannot be an integer layer, or None."""
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
        return f"LayerNorm over more than the last dimension {NO_LAYER}"
    if isinstance(module, nn.Conv3d) and module.padding_mode != "zeros":
        return f"padding mode {module.padding_mode!r} in three dimensions {NO_LAYER}"
    return None


def rewrite(model: nn.Module, config: QuantConfig, runtime: Runtime) -> Rewrite:
    """Replace in place every layer with an integer form; forward code is kept as it is.

    A layer or block that stands in several places is one node or block in all of them, under the first one's
    name.

    Raises:
        InputError: a layer has a forward hook, which an integer layer would not run.
    """
    done = Rewrite()
    _rewrite_children(model, "", config, runtime, done, {})
    runtime.attach(model)
    return done


def _rewrite_children(
    parent: nn.Module,
    path: str,
    config: QuantConfig,
    runtime: Runtime,
    done: Rewrite,
    stands: dict[nn.Module, nn.Module],
) -> None:
    """`stands`: what stands now where each module stood."""
    for key, module in parent._modules.items():
        if module is None:
            continue
        if module not in stands:
            stands[module] = _rewritten(module, f"{path}.{key}".lstrip("."), config, runtime, done, stands)
        parent._modules[key] = stands[module]


def _rewritten(
    module: nn.Module,
    name: str,
    config: QuantConfig,
    runtime: Runtime,
    done: Rewrite,
    stands: dict[nn.Module, nn.Module],
) -> nn.Module:
    """A node or block in the module's place, or the module itself with its children rewritten."""
    if isinstance(module, RateFunction):
        done.left_alone[name] = "its input is the rate alone: computed in float, a constant of each rate"
        return module
    if type(module) is nn.MultiheadAttention:
        return module  # its forward passes the weights to one function, `quant.attention`
    make, reason = replacement_for(module), unsupported(module)
    if make is not None and reason is None:
        refuse_hooks(module, name)
        node = make(module, config)
        node.bind(runtime, name)
        node.eval()
        done.nodes[name] = node
        return node
    if reason is not None or (not list(module.children()) and list(module.parameters())):
        done.left_alone[name] = reason or f"{type(module).__name__} with parameters {NO_LAYER}"
    _rewrite_children(module, name, config, runtime, done, stands)
    if type(module) not in BLOCKS:
        return module
    block = QuantBlock(module)
    block.bind(runtime, name)
    done.blocks[name] = block
    return block


def refuse_hooks(module: nn.Module, name: str) -> None:
    """Raises InputError when a layer, or a part of it, has a hook that its forward would run."""
    for part in module.modules():
        for hook in (*part._forward_pre_hooks.values(), *part._forward_hooks.values()):
            known = getattr(hook, "__qualname__", type(hook).__qualname__)
            raise InputError(
                f"{name} has a forward hook ({known}), which an integer layer would not run; "
                "remove it first, or do what it does in a module's forward"
            )


def fixed_weights(model: nn.Module) -> nn.Module:
    """A copy of the model, without torch.compile, in which weights that a hook computes (weight_norm,
    spectral_norm and prune of torch.nn.utils) are parameters."""
    # such a weight has a history of operations until the next forward, and deepcopy takes none with one
    computed = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    model = uncompiled(copy.deepcopy(model, computed)).eval()
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)
            elif isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)
    return model
