"""Progress with time left: a bar on a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

from licq.support.work import Part, current, in_words

_LOG_INTERVAL = 10.0  # seconds between two lines of a log
_LOG_FORMAT = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class _Lines:
    """A stream that turns what tqdm draws into plain lines, without carriage returns and cursor movement."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._last = ""

    def write(self, text: str) -> None:
        text = text.replace("\x1b[A", "").replace("\r", "").strip()
        if text and text != self._last:
            self._stream.write(text + "\n")
            self._last = text

    def flush(self) -> None:
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def progress(
    iterable: Iterable | None = None,
    *,
    total: int | None = None,
    desc: str = "",
    unit: str = "it",
    enabled: bool = True,
    leave: bool = True,
    initial: int = 0,
    kind: str = "",
    stream: TextIO | None = None,
) -> tqdm | Part:
    """A tqdm with the time left, on standard error; inside of a `support.work.working` a part of its line.

    On a terminal it is a bar. Elsewhere (a log file, CI) it is one line every 10 seconds and one at the end,
    and nothing where the loop is over sooner. `.set_postfix_str("J 0.81")` adds a value.

    Args:
        iterable: what to go over; without it, steps are counted by `.update()`.
        total: number of steps.
        desc, unit: words for the user.
        enabled: False for no output at all.
        leave: False to take the bar away at the end.
        initial: steps that were done before.
        kind: of the items that the loop can be in a plan; default `desc`.
        stream: instead of standard error.
    """
    work = current()
    if work is not None and enabled:
        return Part(work, iterable, total, initial, desc, kind or desc)
    output = stream or sys.stderr
    if getattr(output, "isatty", lambda: False)():
        return tqdm(
            iterable,
            total=total,
            initial=initial,
            desc=desc,
            unit=unit,
            disable=not enabled,
            leave=leave,
            file=output,
            dynamic_ncols=True,
            mininterval=0.2,
        )
    return tqdm(
        iterable,
        total=total,
        initial=initial,
        desc=desc,
        unit=unit,
        disable=not enabled,
        leave=leave,
        file=_Lines(output),
        mininterval=_LOG_INTERVAL,
        miniters=1,
        delay=_LOG_INTERVAL / 2,
        bar_format=_LOG_FORMAT,
    )


def say(text: str) -> None:
    """A line on standard error, beside the line of the work that goes on."""
    work = current()
    if work is not None:
        work.say(text)
    else:
        print(text, file=sys.stderr, flush=True)


def time_left(started: float, done: int, total: int) -> str:
    """The words ", about 3 min left", by the mean time of the steps so far; empty before the first is done.

    Args:
        started: `time.monotonic()` at the beginning.
        done, total: steps.
    """
    if not done:
        return ""
    return f", {in_words((time.monotonic() - started) / done * (total - done))} left"
