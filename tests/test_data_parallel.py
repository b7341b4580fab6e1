"""Proofs of data/parallel.py: results in order, errors of either side, and nothing that is left behind."""

from __future__ import annotations

import functools
import multiprocessing
import os
import time
from collections.abc import Iterator

import parallel
import pytest
from shards import DataError


class Work:
    """What the processes do: it must be importable, as they begin with nothing."""

    def __init__(self, offset: int = 0):
        self.offset = offset

    def square(self, number: int) -> int:
        """Returns the square, the sooner the larger it is: results come in another order than they are to leave."""
        time.sleep(0.02 if number % 4 == 0 else 0.0)
        return number * number + self.offset

    def fail(self, number: int) -> int:
        """Returns the number, or ends in one of the ways in which work ends."""
        if number == 5:
            raise DataError("five is wrong")
        if number == 6:
            raise FileNotFoundError("six is missing")
        if number == 7:
            os._exit(3)
        return number


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_results_come_in_the_order_of_the_items(jobs: int) -> None:
    found = list(parallel.in_order(functools.partial(Work, 7), "square", iter(range(40)), jobs))
    assert found == [number * number + 7 for number in range(40)]
    assert list(parallel.in_order(Work, "square", [], jobs)) == []


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_in_a_process_is_raised_here(jobs: int) -> None:
    with pytest.raises(DataError, match="five is wrong"):
        list(parallel.in_order(Work, "fail", range(1, 6), jobs))
    with pytest.raises((DataError, OSError), match="six is missing"):
        list(parallel.in_order(Work, "fail", [1, 6], jobs))


def test_a_process_that_ends_is_an_error_and_not_a_wait() -> None:
    with pytest.raises(DataError, match="a process ended, .*: try fewer than --jobs 2"):
        list(parallel.in_order(Work, "fail", [1, 7, *range(8, 30)], 2))


def test_who_stops_listening_leaves_no_process() -> None:
    results = parallel.in_order(Work, "square", iter(range(10**9)), 2)
    assert next(results) == 0
    results.close()


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_while_a_process_starts_is_heard_afterwards() -> None:
    with pytest.raises(KeyboardInterrupt):
        with parallel.interrupts_held_back():
            os.kill(os.getpid(), 2)
            time.sleep(0.05)
            finished = True
    assert finished
