"""The coder of a frozen model, from the tables of its entropy models."""

from typing import Any

from licq.codec.coder import Coder, Tables
from licq.codec.tables import GaussianRows, MixtureRows, SteppedRows, bottleneck_rows
from licq.quant.boundaries import QuantEntropyBottleneck, QuantGaussianMixture, QuantVariableBottleneck
from licq.quant.density import DensityTables
from licq.quant.model import QuantModel
from licq.quant.saving import make_tables


def coder_of(model: QuantModel) -> Coder:
    """The coder of a frozen model.

    Raises:
        InputError: a table of the model is no distribution.
    """
    make_tables(model)
    bits = model.config.boundary_bits
    tables: dict[str, Tables] = {}
    for node in model.nodes.values():
        if isinstance(node, QuantVariableBottleneck) and node.cumulative is not None:
            tables[node.name] = SteppedRows(node.cumulative.cpu().numpy())
        elif isinstance(node, QuantEntropyBottleneck):
            module: Any = node.module
            parts = module._quantized_cdf, module._cdf_length, module._offset
            tables[node.name] = bottleneck_rows(*(part.cpu().numpy() for part in parts))
        elif isinstance(node, QuantGaussianMixture):
            mixture: Any = node.module
            tables[node.name] = MixtureRows(_arrays(node.density), bits, mixture.K)
        elif hasattr(node, "density"):
            tables[node.name] = GaussianRows(_arrays(node.density), bits)
    return Coder(tables, bits)


def _arrays(tables: DensityTables) -> list:
    return [part.cpu().numpy() for part in tables]
