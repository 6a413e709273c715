"""Nothing but usable distributions reaches the entropy coder: CompressAI's rANS checks none, and reads and
writes past a bad one."""

import numpy as np

from licq.quant.boundaries import QuantEntropyBottleneck, QuantGaussianConditional, QuantVariableBottleneck
from licq.quant.file_checks import wrong_numbers
from licq.quant.model import QuantModel
from licq.support.errors import InputError

_TOTAL = 1 << 16  # of cumulative frequencies


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


def checked_rows(rows: np.ndarray) -> np.ndarray:
    """Cumulative frequencies (..., edges) as they are; of three edges at least, rising from 0 to 2^16.

    Raises:
        InputError: they are not so: the parameters of a density are none.
    """
    usable = rows.shape[-1] > 2 and not rows[..., 0].any() and bool((rows[..., -1] == _TOTAL).all())
    if not usable or not bool((rows[..., 1:] > rows[..., :-1]).all()):
        raise InputError(
            "the codec gives parameters of a density that no symbols can be coded with (negative weights?); "
            "its files are none"
        )
    return rows
