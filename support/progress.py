"""Progress with time left: a bar on a terminal, a line now and then in a log."""

import sys
import time

from tqdm import tqdm

_LOG_INTERVAL = 10.0  # seconds between two lines of a log
_LOG_FORMAT = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class _Lines:
    """A stream that turns what tqdm draws into plain lines: no carriage returns, no cursor movement."""

    def __init__(self, stream):
        self._stream = stream
        self._last = ""

    def write(self, text: str) -> None:
        text = text.replace("\x1b[A", "").replace("\r", "").strip()
        if text and text != self._last:
            self._stream.write(text + "\n")
            self._last = text

    def flush(self) -> None:
        self._stream.flush()

    def __getattr__(self, name):
        return getattr(self._stream, name)


def progress(
    iterable=None,
    *,
    total: int | None = None,
    desc: str = "",
    unit: str = "it",
    enabled: bool = True,
    leave: bool = True,
    stream=None,
) -> tqdm:
    """A tqdm over `iterable` (or `total` steps counted with `.update()`) on standard error.

    On a terminal a bar with the time left. Elsewhere (a log file, CI) one line every 10 seconds and one at
    the end, and none from a loop that is over sooner. `desc` and `unit` are words for the user;
    `enabled=False` is silent; `leave=False` takes the bar away at the end. `.set_postfix_str("J 0.81")` adds
    a value.
    """
    stream = stream or sys.stderr
    if getattr(stream, "isatty", lambda: False)():
        return tqdm(
            iterable,
            total=total,
            desc=desc,
            unit=unit,
            disable=not enabled,
            leave=leave,
            file=stream,
            dynamic_ncols=True,
            mininterval=0.2,
        )
    return tqdm(
        iterable,
        total=total,
        desc=desc,
        unit=unit,
        disable=not enabled,
        leave=leave,
        file=_Lines(stream),
        mininterval=_LOG_INTERVAL,
        miniters=1,
        delay=_LOG_INTERVAL / 2,
        bar_format=_LOG_FORMAT,
    )


def time_left(started: float, done: int, total: int) -> str:
    """ ", about 3 min left", from the mean time of what is done since `started` (monotonic seconds); nothing
    to go by at the first."""
    if not done:
        return ""
    return f", about {max(1, round((time.monotonic() - started) / done * (total - done) / 60))} min left"
