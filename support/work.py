"""The work of a whole command: what is planned, how much of it is done, and how long the rest takes.

    with working("lu2022", [Item("quality 1", "float codec", 24.0), ...], enabled=True) as work:
        work.enter("quality 1")
        for image in progress(images, desc="evaluating", kind="float codec"):   # the first item of that kind
            ...

While it lasts, loops that `support.progress.progress` counts are parts of it, and standard error has one line
for all of them.
"""

import contextlib
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TextIO

_LOG_INTERVAL = 10.0  # seconds between two lines of a log
_TERMINAL_INTERVAL = 0.2
_BELIEF = 0.3  # what is expected of a kind counts as this share of an item, until one of the kind is done


@dataclass
class Item:
    """A piece of planned work, which one loop does.

    Args:
        group: what the loop belongs to, such as a quality.
        kind: of the loop; what one took tells how long others of its kind take.
        cost: how long it is expected to take, in a unit that all items share; the run finds out how many
            seconds that is.
        in_seconds: the cost is in seconds.
        share: that is done, 0 to 1.
        seconds: that the loop has taken so far.
        gap: seconds between the loop before and this one.
    """

    group: str
    kind: str
    cost: float
    in_seconds: bool = False
    share: float = 0.0
    seconds: float = 0.0
    gap: float = 0.0


def seconds_left(items: Sequence[Item]) -> list[float] | None:
    """How long the rest of each item takes; None where nothing has been done yet that could tell.

    An item's expected time is its cost, times the seconds that a unit of cost has taken in items of its
    kind. Kinds that have not been met take the mean of those that have. What was expected first weighs
    like a third of an item, until one is done. Time between loops is expected again before loops of the same
    kind.
    """
    done = [item for item in items if item.share > 0 and item.seconds > 0 and item.cost > 0]
    general = _mean_rate([item for item in done if not item.in_seconds])
    if general is None and any(not item.in_seconds and item.share < 1 for item in items):
        return None
    left = []
    for item in items:
        same = [other for other in done if other.kind == item.kind]
        expected = 1.0 if item.in_seconds else general or 0.0
        belief = _BELIEF * item.cost * max(0.0, 1 - sum(other.share for other in same))
        seconds = sum(other.seconds for other in same) + belief * expected
        cost = sum(other.cost * other.share for other in same) + belief
        rest = item.cost * (1 - item.share) * seconds / cost if cost else 0.0
        if not item.share and same:
            rest += sum(other.gap for other in same) / len(same)
        left.append(rest)
    return left


def _mean_rate(items: Sequence[Item]) -> float | None:
    """Seconds for a unit of cost: the geometric mean over kinds, by the cost that is done, so that one kind
    that was misjudged does not count for all."""
    kinds: dict[str, tuple[float, float]] = {}
    for item in items:
        seconds, cost = kinds.get(item.kind, (0.0, 0.0))
        kinds[item.kind] = seconds + item.seconds, cost + item.cost * item.share
    total = sum(cost for _, cost in kinds.values())
    if not total:
        return None
    return math.exp(sum(cost * math.log(seconds / cost) for seconds, cost in kinds.values()) / total)


def side_by_side(seconds: Iterable[float], workers: int) -> float:
    """How long pieces of work take that `workers` processes take up in their order."""
    free = [0.0] * workers
    for piece in seconds:
        free[free.index(min(free))] += piece
    return max(free)


class Work:
    """What is planned, what is done, and one line on standard error that says so.

    Args:
        title: the first word of the line.
        items: in their order; those of a group follow each other.
        workers: so many groups at a time are worked on, elsewhere; `take` says what they have done.
        shown: False for no output.
        stream: instead of standard error.
        publish: called about once a second with `state()`.
        clock: seconds.
    """

    def __init__(
        self,
        title: str,
        items: Sequence[Item],
        workers: int = 1,
        shown: bool = True,
        stream: TextIO | None = None,
        publish: Callable[[dict[str, Any]], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.title, self.items, self.workers, self.shown = title, list(items), workers, shown
        self.stream = stream or sys.stderr
        self.publish, self.clock = publish, clock
        self.group = self.items[0].group if self.items else ""
        self.label = ""
        self.open: list[Part] = []
        self._at: Item | None = None  # the item whose loop runs
        self._next = 0  # items before it are behind us
        self._gap = 0.0  # since the last planned loop
        self._last = self._drawn = self._published = clock()
        self._on_terminal = bool(getattr(self.stream, "isatty", lambda: False)())

    # ---------------------------------------------------------------------------------------- what is done

    def enter(self, group: str, label: str = "") -> None:
        """What follows belongs to this group; `label` says it to the user. Groups that were not entered
        before it are left out."""
        self._count_time()
        self.group, self.label = group, label
        if self.workers > 1:
            self._gap = 0.0  # it was that of the workers
        first = [index for index, item in enumerate(self.items) if item.group == group]
        if first:
            self._leave_out(first[0])
        if label and self.shown and not self._on_terminal:
            self.say(f"{label}{self._left_in_words()}")
            self._drawn = self.clock()

    def begin(self, part: "Part") -> None:
        """A loop begins: the next planned one of its kind in the group, if there is one and no planned loop
        is around it."""
        self._count_time()
        self.open.append(part)
        if self._at is not None:
            return
        for index in range(self._next, len(self.items)):
            item = self.items[index]
            if item.group == self.group and item.kind == part.kind:
                self._leave_out(index)
                self._next, self._at = index + 1, item
                part.item = item
                if part.total:
                    item.cost *= 1 - min(part.n / part.total, 1)  # what was done before
                item.gap, self._gap = self._gap, 0.0
                break
        self.draw()

    def advance(self, part: "Part") -> None:
        """The loop has done another step."""
        self._count_time()
        if part.item is not None and part.total and part.total > part.first:
            part.item.share = min((part.n - part.first) / (part.total - part.first), 1.0)
        self.draw()

    def end(self, part: "Part") -> None:
        """The loop has ended."""
        if part not in self.open:
            return
        self._count_time()
        self.open.remove(part)
        if part.item is not None:
            part.item.share, self._at = 1.0, None

    def state(self) -> dict[str, Any]:
        """What is done, for `take` in another process; as JSON."""
        fields = [
            [item.kind, item.cost, item.in_seconds, item.share, item.seconds, item.gap] for item in self.items
        ]
        return {"items": fields, "doing": self._doing()}

    def take(self, group: str, state: dict[str, Any]) -> None:
        """What another process plans and has done of a group."""
        first = next((index for index, item in enumerate(self.items) if item.group == group), len(self.items))
        others = [item for item in self.items if item.group != group]
        self.items = [*others[:first], *(Item(group, *fields) for fields in state["items"]), *others[first:]]

    def finish(self, group: str) -> None:
        """Another process has ended with a group."""
        for item in self.items:
            if item.group == group and item.share < 1:
                item.cost, item.share = item.cost * item.share, 1.0

    def _count_time(self) -> None:
        now = self.clock()
        if self._at is None:
            self._gap += now - self._last
        else:
            self._at.seconds += now - self._last
        self._last = now

    def _leave_out(self, index: int) -> None:
        """Planned loops before this one that have not begun will not."""
        for item in self.items[self._next : index]:
            if item.share < 1:
                item.cost, item.share = 0.0, 1.0
        self._next = max(self._next, index)

    # ------------------------------------------------------------------------------------ what is shown

    def left(self) -> float | None:
        """Seconds that the rest takes; None while that is not known."""
        each = seconds_left(self.items)
        if each is None:
            return None
        if self.workers == 1:
            return sum(each)
        groups: dict[str, float] = {}
        for item, seconds in zip(self.items, each):
            groups[item.group] = groups.get(item.group, 0.0) + seconds
        alone = groups.pop("", 0.0)  # of no group: when all others are done
        begun = {item.group for item in self.items if 0 < item.share}
        order = sorted(groups, key=lambda group: group not in begun)
        return side_by_side((groups[group] for group in order), self.workers) + alone

    def draw(self, doing: str | None = None) -> None:
        """Show the line, if that is due; `doing` instead of the loop that runs."""
        now = self.clock()
        if self.publish is not None and now - self._published >= 1:
            self._published = now
            self.publish(self.state())
        if not self.shown or now - self._drawn < (_TERMINAL_INTERVAL if self._on_terminal else _LOG_INTERVAL):
            return
        self._drawn = now
        words = ": ".join(filter(None, [self.label or self.title, doing or self._doing()]))
        line = f"{words}{self._left_in_words()}"
        if self._on_terminal:
            width = shutil.get_terminal_size().columns - 1
            # the cursor goes back: what another prints begins a line
            self._write(f"\r{line[:width]}\x1b[K\r")
        else:
            self._write(line + "\n")

    def say(self, text: str) -> None:
        """A line of its own, which stays."""
        if self.shown:
            self._write(f"\r\x1b[K{text}\n" if self._on_terminal else f"{text}\n")

    def close(self) -> None:
        """Take the line away."""
        if self.shown and self._on_terminal:
            self._write("\r\x1b[K")

    def _doing(self) -> str:
        """The outermost loop, and the innermost where there are several."""
        return ": ".join(part.in_words() for part in (self.open[:1] + self.open[1:][-1:]))

    def _left_in_words(self) -> str:
        left = self.left()
        return "" if left is None else f", {in_words(left)} left"

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a closed terminal ends no calibration
            self.stream.write(text)
            self.stream.flush()


class Part:
    """A loop of some `Work`; has what loops use of a tqdm.

    Args:
        iterable: what to go over; without it, steps are counted by `update`.
        total: steps; default those of the iterable.
        initial: steps that were done before.
        desc, kind: for the user and for the plan.
    """

    def __init__(
        self, work: Work, iterable: Iterable | None, total: int | None, initial: int, desc: str, kind: str
    ):
        self.work, self.iterable, self.desc, self.kind = work, iterable, desc, kind
        self.total = len(iterable) if total is None and isinstance(iterable, Sized) else total
        self.n = self.first = initial
        self.postfix = ""
        self.item: Item | None = None
        work.begin(self)

    def __iter__(self) -> Iterator[Any]:
        assert self.iterable is not None
        with self:
            for element in self.iterable:
                yield element
                self.update()

    def __enter__(self) -> "Part":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, steps: int = 1) -> None:
        """So many steps more are done."""
        self.n += steps
        self.work.advance(self)

    def set_postfix_str(self, text: str) -> None:
        """A value to show."""
        self.postfix = text

    def in_words(self) -> str:
        """What is done, and how far it is."""
        steps = f" {self.n}/{self.total}" if self.total and self.total > 1 else ""
        return f"{self.desc}{steps}" + (f" ({self.postfix})" if self.postfix else "")

    def close(self) -> None:
        """The loop is over."""
        self.work.end(self)


_current: ContextVar[Work | None] = ContextVar("work", default=None)


def current() -> Work | None:
    """The work that loops are part of now."""
    return _current.get()


@contextlib.contextmanager
def working(title: str, items: Sequence[Item], enabled: bool = True, **options: Any) -> Iterator[Work | None]:
    """While this lasts, loops are parts of one work; where they are already, of that.

    Args:
        enabled: False leaves the loops alone.
        options: further arguments of `Work`.
    """
    outer = current()
    if outer is not None or not enabled:
        yield outer
        return
    work = Work(title, items, **options)
    before = _current.set(work)
    try:
        yield work
    finally:
        _current.reset(before)
        work.close()


def in_words(seconds: float) -> str:
    """About how long that is: "about 40 s", "about 12 min", "about 3.5 h"."""
    if seconds < 90:
        return f"about {max(5, 5 * round(seconds / 5))} s"
    if seconds < 90 * 60:
        return f"about {round(seconds / 60)} min"
    return f"about {seconds / 3600:.1f} h"
