"""The coder of a frozen model, from the tables of its entropy models."""

from typing import Any

from licq.codec.coder import Coder, Tables
from licq.codec.tables import GaussianRows, MixtureRows, SteppedRows, bottleneck_rows
from licq.quant.boundaries import (
    QuantEntropyBottleneck,
    QuantGaussianConditional,
    QuantGaussianMixture,
    QuantVariableBottleneck,
)
from licq.quant.density import DensityTables
from licq.quant.file_checks import wrong_numbers
from licq.quant.model import QuantModel
from licq.support.errors import InputError


def coder_of(model: QuantModel) -> Coder:
    """The coder of a frozen model.

    Raises:
        InputError: the model has no tables, or one of them is no distribution.
    """
    check_tables(model)
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


def check_tables(model: QuantModel) -> None:
    """Check the tables that a frozen model's symbols are coded with.

    Raises:
        InputError: an entropy model has none, as in files of earlier versions, or unusable ones.
    """
    for name, node in model.nodes.items():
        if isinstance(node, QuantVariableBottleneck) and node.cumulative is not None:
            there = True
        elif isinstance(node, QuantEntropyBottleneck):
            there = node.tables is not None
        elif isinstance(node, QuantGaussianConditional):
            there = node.normal is not None
        else:
            continue
        problem = wrong_numbers(node) if there else "the model has no tables to code its symbols with"
        if problem is not None:
            raise InputError(f"{name}: {problem}; quantize the codec again")


def _arrays(tables: DensityTables) -> list:
    return [part.cpu().numpy() for part in tables]
