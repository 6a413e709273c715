"""Numbers that the tables and the pictures of an analysis share."""

from collections.abc import Sequence

NOTHING = 1e-4  # of the largest: what is smaller is a channel that training has switched off


def alive(values: Sequence[float]) -> list[float]:
    """The values of the channels that training has not switched off."""
    return [value for value in values if value > NOTHING * max(values)]


def lowest(rows: Sequence[Sequence[float]]) -> tuple[int, int]:
    """(row, column) of the smallest number."""
    return min(
        ((i, j) for i, row in enumerate(rows) for j in range(len(row))), key=lambda at: rows[at[0]][at[1]]
    )
