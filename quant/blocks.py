"""Blocks: parts of a codec that are reconstructed as one unit, with the functions between their layers."""

from typing import Any

from compressai.layers import AttentionBlock, ResidualBlock, ResidualBlockUpsample, ResidualBlockWithStride
from torch import nn

from licq.models.chen2021 import NonLocalBlock, ResBlock
from licq.models.lu2022 import NSABlock
from licq.models.swin import SwinTransformerBlock
from licq.quant.modules import attribute_of_wrapped
from licq.quant.runtime import Runtime

BLOCKS: set[type[nn.Module]] = set()


def register_block(*types: type[nn.Module]) -> None:
    """Let the rewriter wrap modules of these types, and not of their subclasses, in a `QuantBlock`."""
    BLOCKS.update(types)


register_block(
    ResidualBlock,
    ResidualBlockWithStride,
    ResidualBlockUpsample,
    AttentionBlock,
    NSABlock,
    SwinTransformerBlock,
    ResBlock,
    NonLocalBlock,
)


class QuantBlock(nn.Module):
    """A block that keeps its own forward. Its layers are nodes; its functions (adds, products ...) get nodes.

    Args:
        module: the block, with nodes in the place of its layers.
    """

    runtime: Runtime
    """Of the codec that the block belongs to; set by `bind`."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.name = ""

    def bind(self, runtime: Runtime, name: str) -> None:
        """Make this the block `name` of a codec."""
        # not through nn.Module's __setattr__: the runtime holds modules and must not become a submodule
        object.__setattr__(self, "runtime", runtime)
        self.name = name

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return attribute_of_wrapped(self, name)

    def forward(self, *args, **kwargs):
        return self.runtime.execute(self, args, lambda: self.module(*args, **kwargs))
