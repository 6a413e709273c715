"""Processes give what one gives, in order, and hand errors on."""

import os

import pytest

from licq.support.errors import InputError
from licq.support.parallel import default_jobs, ordered


def doubled(number: int) -> tuple[int, int]:
    if number == 13:
        raise InputError("13 is bad; choose another")
    return 2 * number, os.getpid()


@pytest.mark.parametrize("jobs", [1, 2])
def test_results_come_in_order(jobs):
    results = list(ordered(doubled, range(7), jobs))
    assert [result for result, _ in results] == [0, 2, 4, 6, 8, 10, 12]
    assert (os.getpid() in {process for _, process in results}) == (jobs == 1)


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_of_one_piece_is_raised_after_the_results_before_it(jobs):
    results = ordered(doubled, [1, 13, 2], jobs)
    assert next(results)[0] == 2
    with pytest.raises(InputError, match="13 is bad"):
        next(results)


def dies(number: int) -> None:
    os._exit(1)


def test_a_process_that_dies_is_one_line():
    with pytest.raises(InputError, match="a job died"):
        list(ordered(dies, [1, 2], 2))


def test_jobs_by_default_are_bounded():
    assert default_jobs(1, None) == default_jobs(2, None) == 1
    processors = len(os.sched_getaffinity(0))
    assert 1 <= default_jobs(1000, None) <= processors
    assert default_jobs(1000, processors) == 1
