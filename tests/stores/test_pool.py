"""The pool of connections: bounded, the last used first, waited for no longer than it should, not shared by a fork."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from itertools import count

import pytest

from querycache.backends.pool import Pool


@pytest.fixture
def closed() -> list[int]:
    return []


@pytest.fixture
def pool(closed: list[int]) -> Pool[int]:
    numbers: Iterator[int] = count(1)
    return Pool(lambda: next(numbers), closed.append, 2, 10.0)


def test_the_one_used_last_is_taken_first(pool: Pool[int]) -> None:
    one, two = pool.take(), pool.take()
    pool.give_back(two)
    pool.give_back(one)
    assert pool.take() == one


def test_there_are_no_more_than_so_many(closed: list[int]) -> None:
    pool = Pool(object, lambda one: None, 2, 0.01)
    pool.take(), pool.take()
    with pytest.raises(TimeoutError, match="none of 2 connections became free"):
        pool.take()


def test_who_waits_gets_what_is_given_back(pool: Pool[int]) -> None:
    one, _ = pool.take(), pool.take()
    threading.Timer(0.05, pool.give_back, [one]).start()
    assert pool.take() == one


def test_one_that_could_not_be_made_counts_for_nothing() -> None:
    def fail() -> int:
        raise OSError("no more descriptors")

    pool = Pool(fail, lambda one: None, 1, 0.01)
    for _ in range(2):
        with pytest.raises(OSError, match="no more descriptors"):
            pool.take()


def test_no_two_threads_have_the_same(pool: Pool[int]) -> None:
    busy: set[int] = set()
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
    assert {pool.take(), pool.take()} == {1, 2}


def test_a_forked_process_starts_anew(pool: Pool[int], closed: list[int]) -> None:
    pool.give_back(pool.take())
    child = os.fork()
    if child == 0:
        os._exit(0 if pool.take() == 2 and closed == [1] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert pool.take() == 1


def test_clearing_closes_what_is_idle(pool: Pool[int], closed: list[int]) -> None:
    one, two = pool.take(), pool.take()
    pool.give_back(two)
    pool.clear()
    assert closed == [two]
    pool.give_back(one)
    assert pool.take() == one
