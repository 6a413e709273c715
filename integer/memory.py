"""Where the values of a ready program lie in memory, and when each is needed for the last time."""

from collections.abc import Mapping, Sequence

from licq.integer.ready import ALIGNED, SLACK, Launch


def memory_offsets(
    launches: Sequence[Launch], outputs: set[int], sizes: Mapping[int, int]
) -> tuple[dict[int, int], int]:
    """(first byte of each value that a launch writes into memory of the program, bytes in all).

    Values that are not needed at the same time may lie in the same bytes. The largest are placed first, each
    as low as possible. A launch may give views of what it reads; the memory behind them is taken until the
    view is needed no more. A program's outputs have no place there: they leave the program.

    Args:
        outputs: of the program. sizes: of the values, in bytes.
    """
    owners: dict[int, set[int]] = {}  # whose memory a value may be a view of
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for position, launch in enumerate(launches):
        for number in launch.writes:
            viewed = launch.reads if launch.may_give_views else ()
            owners[number] = {owner for source in viewed for owner in owners.get(source, ())}
            if launch.uses_program_memory:
                owners[number].add(number)
                first[number] = position
        for number in (*launch.reads, *launch.writes):
            for owner in owners.get(number, ()):
                last[owner] = max(last.get(owner, 0), len(launches) if number in outputs else position)
    offsets: dict[int, int] = {}
    placed: list[tuple[int, int, int, int]] = []  # first byte, end, first and last launch
    total = 0
    for number in sorted(first, key=lambda number: -sizes[number]):
        if last[number] == len(launches):
            continue
        size = -(-(sizes[number] + SLACK) // ALIGNED) * ALIGNED
        start = 0
        for begin, end, since, until in sorted(placed):
            if since <= last[number] and first[number] <= until and end > start:
                if begin >= start + size:
                    break
                start = end
        offsets[number] = start
        placed.append((start, start + size, first[number], last[number]))
        total = max(total, start + size)
    return offsets, total


def values_to_drop(launches: Sequence[Launch], outputs: set[int]) -> list[list[int]]:
    """The values that nothing needs after each launch."""
    last: dict[int, int] = {}
    for position, launch in enumerate(launches):
        for number in (*launch.reads, *launch.writes):
            last[number] = position
    drops: list[list[int]] = [[] for _ in launches]
    for number, position in last.items():
        if number not in outputs:
            drops[position].append(number)
    return drops
