"""The line of progress: what is expected of the work that is left, with a clock that the tests move."""

import io

import pytest

from licq.support.progress import progress, say
from licq.support.work import Item, Work, in_words, seconds_left, side_by_side, working

KINDS = {"float": 20.0, "observing": 60.0, "compensating": 200.0, "learning": 500.0, "files": 15.0}


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def plan(qualities=(1, 2, 3)) -> list[Item]:
    return [Item(f"q{quality}", kind, cost) for quality in qualities for kind, cost in KINDS.items()]


def do(work: Work, clock: Clock, rates: dict[str, float], qualities=(1, 2, 3), steps: int = 10) -> list:
    """Do the plan at so many seconds for a unit of cost.

    Returns:
        (seconds since the start, what was said to be left) after each step.
    """
    said = []
    for quality in qualities:
        work.enter(f"q{quality}")
        for kind, cost in KINDS.items():
            with progress(total=steps, desc=kind) as bar:
                for _ in range(steps):
                    clock.now += cost * rates[kind] / steps
                    bar.update()
                    said.append((clock.now, work.left()))
    return said


@pytest.mark.parametrize("wrong", [2.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_the_time_left_is_right_after_a_fifth_where_a_kind_takes_twice_or_half_of_what_was_expected(
    kind, wrong
):
    clock = Clock()
    rates = dict.fromkeys(KINDS, 0.3) | {kind: 0.3 * wrong}
    with working("test", plan(), stream=io.StringIO(), clock=clock) as work:
        said = do(work, clock, rates)
    end = clock.now
    late = [(now, left) for now, left in said if end / 5 < now < 0.99 * end]
    assert len(late) > 50
    assert all(end - now < 1.5 * left and left < 1.5 * (end - now) for now, left in late)


def test_a_second_quality_is_known_from_the_first():
    clock = Clock()
    rates = {kind: 0.1 * 3**number for number, kind in enumerate(KINDS)}  # far from what was expected
    with working("test", plan(), stream=io.StringIO(), clock=clock) as work:
        said = do(work, clock, rates)
    third = clock.now / 3
    for now, left in said:
        if third < now < 0.99 * clock.now:
            assert left == pytest.approx(clock.now - now, rel=0.1)


def test_loops_that_do_not_come_are_left_out_and_others_change_nothing():
    clock = Clock()
    with working("test", plan((1,)), stream=io.StringIO(), clock=clock) as work:
        assert work.left() is None
        work.enter("q1")
        for _ in progress(range(2), desc="float"):
            clock.now += 10.0  # a second for a unit
            for _ in progress(range(5), desc="learning"):  # inside of a planned loop
                pass
        for _ in progress(range(5), desc="unknown"):
            pass
        assert work.left() == pytest.approx(60 + 200 + 500 + 15)
        for _ in progress(range(2), desc="learning", initial=1):  # half of it was done before
            assert work.left() == pytest.approx(250 + 15)
            clock.now += 250.0
            break
        with progress(total=1, desc="files"):
            assert work.left() == pytest.approx(15, rel=0.1)
        assert work.left() == 0


def test_time_between_loops_is_expected_again():
    items = [Item("q1", "files", 10.0, share=1.0, seconds=10.0, gap=5.0), Item("q2", "files", 10.0)]
    assert seconds_left(items) == [0.0, 15.0]
    fixed = [Item("", "report", 3.0, in_seconds=True)]
    assert seconds_left(fixed) == [3.0]


def test_groups_in_other_processes_take_the_time_of_the_last_to_end():
    assert side_by_side([4.0, 2.0, 2.0, 1.0], 2) == 5.0
    clock = Clock()
    elsewhere = Work("test", plan((1,)), stream=io.StringIO(), clock=clock)
    work = Work("test", [*plan((1, 2, 3)), Item("", "report", 7.0, True)], workers=2, stream=io.StringIO())
    with working("test", []) as outer:
        assert outer is not None
    for item in elsewhere.items[:4]:
        item.share, item.seconds = 1.0, item.cost
    work.take("q1", elsewhere.state())
    assert [item.share for item in work.items[:5]] == [1, 1, 1, 1, 0]
    whole = sum(KINDS.values())
    assert work.left() == pytest.approx(15 + whole + 7)  # q1's rest and q3 on one of two, q2 on the other
    work.finish("q1")
    assert work.left() == pytest.approx(whole + 7)
    work.enter("")
    assert work.left() == pytest.approx(7)


def test_a_log_has_one_line_now_and_then_and_a_terminal_one_in_place():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    texts = []
    for stream in (io.StringIO(), Terminal()):
        clock = Clock()
        with working("codec", plan((1,)), stream=stream, clock=clock) as work:
            work.enter("q1", "codec quality 1 (1 of 1)")
            for _ in progress(range(10), desc="float"):
                clock.now += 2.0
                for _ in progress(range(3), desc="nested"):
                    pass
            say("a remark")
        texts.append(stream.getvalue())
    log, terminal = texts
    lines = log.splitlines()
    assert (
        lines[0] == "codec quality 1 (1 of 1)"
        and "a remark" in lines
        and "\r" not in log
        and "\x1b" not in log
    )
    assert lines[1].startswith("codec quality 1 (1 of 1): float 4/10: nested 1/3, about 16 min left")
    assert len(lines) == 4
    assert terminal.count("\n") == 1 and "a remark\n" in terminal and terminal.endswith("\r\x1b[K")


def test_quiet_shows_nothing_and_changes_nothing(capsys):
    with working("codec", plan((1,)), enabled=False) as work:
        assert work is None
        assert list(progress(range(3), desc="float", enabled=False)) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_time_in_words():
    words = ["about 5 s", "about 45 s", "about 2 min", "about 12 min", "about 3.5 h"]
    assert [in_words(seconds) for seconds in (0, 43, 110, 700, 12600)] == words
