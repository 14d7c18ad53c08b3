"""The circuit breaker."""

from __future__ import annotations

import pytest

from querycache.backends.breaker import COOL_DOWN, CircuitBreaker
from querycache.errors import CacheUnavailable


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_refusal_is_told_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    breaker = CircuitBreaker("the server", clock=clock)
    for _ in range(3):
        breaker.refused(ValueError("OOM"))
        breaker.succeeded()
        assert not is_open(breaker)
    assert [record.getMessage() for record in caplog.records] == [
        "the server refuses something that the cache asks of it: OOM"
    ]
    clock.now += 61
    breaker.refused(ValueError("OOM"))
    assert len(caplog.records) == 2


def is_open(breaker: CircuitBreaker) -> bool:
    try:
        breaker.admit()
    except CacheUnavailable:
        return True
    return False


def test_a_fault_opens_it_for_the_cool_down() -> None:
    clock = Clock()
    breaker = CircuitBreaker("the server", clock=clock)
    assert not is_open(breaker)
    breaker.failed(OSError("timed out"))
    with pytest.raises(CacheUnavailable, match=r"the server is left alone for 2.0 s after: timed out"):
        breaker.admit()
    clock.now += COOL_DOWN - 0.01
    assert is_open(breaker)
    clock.now += 0.01
    assert not is_open(breaker)


def test_one_call_tries_and_the_others_wait_for_what_becomes_of_it() -> None:
    clock = Clock()
    breaker = CircuitBreaker("the server", clock=clock)
    breaker.failed(OSError())
    clock.now += COOL_DOWN
    assert [is_open(breaker) for _ in range(4)] == [False, True, True, True]
    breaker.failed(OSError())
    assert is_open(breaker)
    clock.now += COOL_DOWN
    assert [is_open(breaker) for _ in range(2)] == [False, True]
    breaker.succeeded()
    assert [is_open(breaker) for _ in range(4)] == [False] * 4


def test_a_call_that_never_came_back_does_not_keep_it_open() -> None:
    clock = Clock()
    breaker = CircuitBreaker("the server", clock=clock)
    breaker.failed(OSError())
    clock.now += COOL_DOWN
    assert not is_open(breaker)
    clock.now += COOL_DOWN
    assert not is_open(breaker)


def test_what_must_not_be_left_out_goes_through() -> None:
    breaker = CircuitBreaker("the server", clock=Clock())
    breaker.failed(OSError())
    breaker.admit(essential=True)
    assert is_open(breaker)
    breaker.succeeded()
    assert not is_open(breaker)


def test_the_begin_and_the_end_of_an_outage_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    breaker = CircuitBreaker("Redis at cache1")
    with caplog.at_level("INFO", "querycache"):
        breaker.succeeded()
        for _ in range(3):
            breaker.failed(TimeoutError("timed out"))
        breaker.succeeded()
        breaker.succeeded()
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        (
            "WARNING",
            "Redis at cache1 does not answer, so the database is asked; trying again every 2 s: timed out",
        ),
        ("INFO", "Redis at cache1 answers again"),
    ]
