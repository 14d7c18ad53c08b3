"""The pool of connections: bounded, the last used first, waited for no longer than it should, not shared by a fork."""

from __future__ import annotations

import os
import threading
import time
from itertools import count

import pytest

from querycache.backends.pool import Pool
from querycache.errors import CacheUnavailable


class One:
    """What is pooled."""

    def __init__(self, number: int = 0) -> None:
        self.number = number


@pytest.fixture
def closed() -> list[One]:
    return []


@pytest.fixture
def pool(closed: list[One]) -> Pool[One]:
    numbers = count(1)
    return Pool(lambda: One(next(numbers)), closed.append, 2, 10.0)


def test_the_one_used_last_is_taken_first(pool: Pool[One]) -> None:
    one, two = pool.take(), pool.take()
    pool.give_back(two)
    pool.give_back(one)
    assert pool.take() is one


def test_there_are_no_more_than_so_many(closed: list[One]) -> None:
    pool = Pool(One, lambda one: None, 2, 0.01)
    taken = [pool.take(), pool.take()]
    with pytest.raises(CacheUnavailable, match="none of 2 connections became free"):
        pool.take()
    assert len(taken) == 2


def test_who_waits_gets_what_is_given_back(pool: Pool[One]) -> None:
    one, two = pool.take(), pool.take()
    threading.Timer(0.05, pool.give_back, [one]).start()
    assert pool.take() is one is not two


def test_who_waits_gets_the_place_of_one_that_was_lost() -> None:
    """Nobody tells of it, but before it is given up it is looked for once more."""
    pool = Pool(One, lambda one: None, 1, 0.1)
    held = [pool.take()]
    threading.Timer(0.02, held.clear).start()
    pool.take()


def test_one_that_nobody_holds_any_more_leaves_its_place() -> None:
    """A signal's handler may raise after it was taken, and before anybody could see to it that it is given back."""
    pool = Pool(One, lambda one: None, 1, 0.01)
    for _ in range(3):
        pool.take()


def test_one_that_could_not_be_made_counts_for_nothing() -> None:
    def fail() -> One:
        raise OSError("no more descriptors")

    pool = Pool(fail, lambda one: None, 1, 0.01)
    for _ in range(2):
        with pytest.raises(OSError, match="no more descriptors"):
            pool.take()


def test_no_two_threads_have_the_same(pool: Pool[One]) -> None:
    busy: set[One] = set()
    faults: list[str] = []
    stop = time.monotonic() + 0.5

    def work() -> None:
        while time.monotonic() < stop:
            one = pool.take()
            if one in busy:
                faults.append(f"{one} is in use")
            busy.add(one)
            time.sleep(0)
            busy.remove(one)
            pool.give_back(one)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert {one.number for one in (pool.take(), pool.take())} == {1, 2}


def test_a_forked_process_starts_anew(pool: Pool[One], closed: list[One]) -> None:
    pool.give_back(pool.take())
    child = os.fork()
    if child == 0:
        os._exit(0 if pool.take().number == 2 and len(closed) == 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert pool.take().number == 1


def test_clearing_closes_what_is_idle(pool: Pool[One], closed: list[One]) -> None:
    one, two = pool.take(), pool.take()
    pool.give_back(two)
    pool.clear()
    assert closed == [two]
    closed.clear()
    del two
    three = pool.take()  # where that was there is room
    pool.give_back(three)
    pool.give_back(one)
    assert pool.take() is one
