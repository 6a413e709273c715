"""The parts of a rewritten codec as its file knows them: tensors, nodes and grids by name."""

import hashlib
import json

from torch import Tensor, nn

from licq.models.checkpoint_files import CDF_STATE
from licq.quant.boundaries import (
    QuantEntropyBottleneck,
    QuantGaussianConditional,
    QuantVariableBottleneck,
)
from licq.quant.config import FLOAT_BITS
from licq.quant.grid import Grid
from licq.quant.mac import QuantMAC
from licq.quant.modules import QuantModule
from licq.quant.norms import QuantLayerNorm
from licq.quant.rewritten import RewrittenCodec

GRID_ATTRIBUTES = ("bits", "channel_dim", "fixed", "pixels")
"""What a file says of each grid, in this order."""


def named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers by name. Those of a module that stands in several places have the first name
    alone."""
    return [
        (f"{path}.{key}" if path else key, tensor)
        for path, part in module.named_modules()
        for key, tensor in (*part._parameters.items(), *part._buffers.items())
        if tensor is not None
    ]


def named_nodes(codec: RewrittenCodec) -> dict[str, QuantModule]:
    """Every node, whether it has run or not, by the name that it tells the runtime."""
    return {part.name: part for part in codec.modules() if isinstance(part, QuantModule) and part.name}


def named_grids(codec: RewrittenCodec) -> dict[str, Grid]:
    """Every grid, by its path."""
    return {path: part for path, part in codec.named_modules() if isinstance(part, Grid)}


def layer_sizes(codec: RewrittenCodec) -> str:
    """A fingerprint of the wrapped layers' names and shapes."""
    shapes = {
        f"{name}.{key}": list(tensor.shape)
        for name, node in codec.rewrite.nodes.items()
        for key, tensor in node.named_parameters()
        if key.startswith("module.")
    }
    return hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()


def unread_tensors(codec: RewrittenCodec) -> set[str]:
    """Names of the tensors that the frozen program never reads.

    They are the float weights of integer layers, observed ranges and learned factors.
    """
    ran = {id(node) for node in codec.nodes.values()}
    cdfs = [f"module.{name}" for name in CDF_STATE]
    unread: set[str] = set()
    for path, module in codec.named_modules():
        for start in _unread_of(module, id(module) in ran, cdfs):
            unread.update(
                f"{path}.{name}"
                for name, _ in named_tensors(module)
                if not start or name == start or name.startswith(f"{start}.")
            )
    return unread


def _unread_of(module: nn.Module, ran: bool, cdfs: list[str]) -> list[str]:
    """Names of tensors and submodules of one module; the name "" stands for all of them."""
    if isinstance(module, QuantMAC):
        if module.weight_int is not None:
            return ["module", "weight_quantizer", "log_n_bias", "bias_change"]
        return [] if ran else [""]
    if isinstance(module, (QuantEntropyBottleneck, QuantGaussianConditional)) and not ran:
        return cdfs
    if isinstance(module, QuantGaussianConditional) and module.normal is not None:
        return cdfs  # its symbols are coded with `density`
    if isinstance(module, QuantVariableBottleneck) and module.cumulative is not None:
        return cdfs  # its symbols are coded with `cumulative`
    if isinstance(module, QuantLayerNorm) and module.offset is not None:
        return ["module"]
    if isinstance(module, Grid):
        unused = module.fixed is not None or module.bits == FLOAT_BITS
        return ["low", "high", "energy", "log_n", *(("scale", "qmin", "qmax") if unused else ())]
    return []
