"""Blocks: parts of a codec that are reconstructed as one unit, functional code included."""

from typing import Any

from compressai.layers import AttentionBlock, ResidualBlock, ResidualBlockUpsample, ResidualBlockWithStride
from torch import nn

from licq.models.chen2021 import NonLocalBlock, ResBlock
from licq.models.lu2022 import NSABlock
from licq.models.swin import SwinTransformerBlock
from licq.quant.runtime import Runtime

BLOCKS: set[type[nn.Module]] = set()


def register_block(*types: type[nn.Module]) -> None:
    """Have the rewriter wrap modules of these types in a `QuantBlock`."""
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
    """A block with its own forward, whose layers are nodes and whose functions (adds, products ...) get
    nodes."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.name = ""
        self.runtime: Runtime | None = None

    def bind(self, runtime: Runtime, name: str) -> None:
        object.__setattr__(self, "runtime", runtime)
        self.name = name

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            wrapped = self.__dict__.get("_modules", {}).get("module")
            if wrapped is None:
                raise
            return getattr(wrapped, name)

    def forward(self, *args, **kwargs):
        return self.runtime.execute(self, args, lambda: self.module(*args, **kwargs))
