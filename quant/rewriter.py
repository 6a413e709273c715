"""The graph rewriter: layers become nodes, blocks become `QuantBlock`s, by type."""

from collections.abc import Callable
from dataclasses import dataclass, field

from compressai.entropy_models import EntropyBottleneck, GaussianConditional, GaussianMixtureConditional
from compressai.layers import GDN, GDN1, MaskedConv2d
from torch import nn

from models.attention import MaskedSoftmax
from models.layers import MaskedConv3d, MultistageMaskedConv2d, RoundAboutMeans, WholeGaussianConditional
from models.vbr import OffsetNet, RateFunction, VariableBottleneck, WholeOffsetNet
from quant.blocks import BLOCKS, QuantBlock
from quant.boundaries import (
    QuantEntropyBottleneck,
    QuantGaussianConditional,
    QuantGaussianMixture,
    QuantOffsets,
    QuantRound,
    QuantVariableBottleneck,
    QuantWholeOffsets,
)
from quant.config import QuantConfig
from quant.functions import QuantSoftmax
from quant.modules import QuantConv2d, QuantConv3d, QuantConvTranspose2d, QuantLinear, QuantModule
from quant.norms import QuantGDN, QuantLayerNorm
from quant.runtime import Runtime

Replacement = Callable[[nn.Module, QuantConfig], QuantModule]

REPLACEMENTS: dict[type[nn.Module], Replacement] = {
    nn.Conv2d: QuantConv2d,
    MaskedConv2d: QuantConv2d,
    MultistageMaskedConv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
    MaskedConv3d: QuantConv3d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.Linear: QuantLinear,
    GDN: QuantGDN,
    GDN1: QuantGDN,
    nn.LayerNorm: QuantLayerNorm,
    MaskedSoftmax: lambda module, config: QuantSoftmax(config),
    EntropyBottleneck: QuantEntropyBottleneck,
    GaussianConditional: QuantGaussianConditional,
    WholeGaussianConditional: QuantGaussianConditional,
    GaussianMixtureConditional: QuantGaussianMixture,
    RoundAboutMeans: QuantRound,
    OffsetNet: QuantOffsets,
    WholeOffsetNet: QuantWholeOffsets,
    VariableBottleneck: QuantVariableBottleneck,
}


def register_replacement(layer: type[nn.Module], replacement: Replacement) -> None:
    """Have the rewriter put `replacement(module, config)` where a module of this type stands."""
    REPLACEMENTS[layer] = replacement


@dataclass
class Rewrite:
    """What the rewriter did: names of nodes and blocks, and modules it left alone with the reason."""

    nodes: dict[str, QuantModule] = field(default_factory=dict)
    blocks: dict[str, QuantBlock] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)


def replacement_for(module: nn.Module) -> Replacement | None:
    """By exact type, or by a base type whose forward the module has not overridden."""
    for base in type(module).__mro__:
        if base in REPLACEMENTS and type(module).forward is base.forward:
            return REPLACEMENTS[base]
    return None


def unsupported(module: nn.Module) -> str | None:
    """Why a layer of a supported type cannot be an integer layer, or None."""
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return f"padding mode {module.padding_mode!r} has no integer form here"
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
        return "LayerNorm over more than the last dimension has no integer form here"
    return None


def rewrite(model: nn.Module, config: QuantConfig, runtime: Runtime) -> Rewrite:
    """Replace in place every layer with an integer form; forward code is kept as it is."""
    done = Rewrite()
    _rewrite_children(model, "", config, runtime, done)
    runtime.attach(model)
    return done


def _rewrite_children(parent: nn.Module, path: str, config: QuantConfig, runtime: Runtime, done: Rewrite) -> None:
    for key, module in list(parent.named_children()):
        name = f"{path}.{key}".lstrip(".")
        if isinstance(module, RateFunction):
            done.left_alone[name] = "its input is the rate alone: computed in float, a constant of each rate"
            continue
        make, reason = replacement_for(module), unsupported(module)
        if make is not None and reason is None:
            node = make(module, config)
            node.bind(runtime, name)
            node.eval()
            parent._modules[key] = node
            done.nodes[name] = node
            continue
        if reason is not None or (not list(module.children()) and list(module.parameters())):
            done.left_alone[name] = reason or f"{type(module).__name__} has parameters but no integer form here"
        _rewrite_children(module, name, config, runtime, done)
        if type(module) in BLOCKS:
            block = QuantBlock(module)
            block.bind(runtime, name)
            parent._modules[key] = block
            done.blocks[name] = block
