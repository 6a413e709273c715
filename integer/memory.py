"""Which values of a ready program share memory, and when each is needed for the last time."""

from collections.abc import Mapping, Sequence

from licq.integer.ready import Launch


def memory_slots(launches: Sequence[Launch], outputs: set[int], sizes: Mapping[int, int]) -> dict[int, int]:
    """The slot of memory of each value that a launch writes into memory of the program.

    Values that are not needed at the same time share a slot, values of the same size first. A launch may give
    views of what it reads; the memory behind them is taken until the view is needed no more. A program's
    outputs have no slot: they leave the program.

    Args:
        outputs: of the program. sizes: of the values, in bytes.
    """
    owners: dict[int, set[int]] = {}  # whose memory a value may be a view of
    last: dict[int, int] = {}
    for position, launch in enumerate(launches):
        for number in launch.writes:
            viewed = launch.reads if launch.may_give_views else ()
            owners[number] = {owner for source in viewed for owner in owners.get(source, ())}
            if launch.uses_program_memory:
                owners[number].add(number)
        for number in (*launch.reads, *launch.writes):
            for owner in owners.get(number, ()):
                last[owner] = max(last.get(owner, 0), len(launches) if number in outputs else position)
    ending: dict[int, list[int]] = {}
    for owner, position in last.items():
        ending.setdefault(position, []).append(owner)
    slots: dict[int, int] = {}
    free: list[tuple[int, int]] = []  # size, slot
    count = 0
    for position, launch in enumerate(launches):
        for number in launch.writes:
            if not launch.uses_program_memory or last[number] == len(launches):
                continue
            reused = next((entry for entry in free if entry[0] == sizes[number]), free[-1] if free else None)
            if reused is None:
                slots[number], count = count, count + 1
            else:
                free.remove(reused)
                slots[number] = reused[1]
        free += [(sizes[owner], slots[owner]) for owner in ending.get(position, ()) if owner in slots]
    return slots


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
