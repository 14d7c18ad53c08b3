"""What a process that is forked finds of its parent's locks."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event

from querycache import QueryCache, forks, sa_internals
from querycache.backends.breaker import CircuitBreaker
from querycache.backends.memory import MemoryBackend
from querycache.events import Telemetry
from querycache.ledger import Ledger

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")


def child_succeeds(work: Any) -> bool:
    child = os.fork()
    if child == 0:
        status = 1
        signal.alarm(5)
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def lock_for_a_moment(lock: Any) -> None:
    """Another thread has it when this returns."""
    locked = threading.Event()

    def hold() -> None:
        with lock:
            locked.set()
            time.sleep(0.1)

    threading.Thread(target=hold).start()
    locked.wait()


@pytest.mark.parametrize("which", ["store", "ledger", "breaker", "telemetry", "phases", "listeners"])
def test_what_another_thread_had_locked_is_free(sqlite_engine: Engine, which: str) -> None:
    cache = QueryCache("memory://").attach(sqlite_engine)
    other = create_engine("sqlite://")
    event.listen(other, "do_execute", lambda *arguments: None)
    store = MemoryBackend({})
    ledger, breaker, telemetry = Ledger(store, "witness"), CircuitBreaker("it"), Telemetry()
    owner, work = {
        "store": (store, lambda: store.fetch("entry")),
        "ledger": (ledger, ledger.snapshot),
        "breaker": (breaker, lambda: breaker.failed(OSError())),
        "telemetry": (telemetry, lambda: telemetry.emit("hit", "", "")),
        "phases": (cache._writes.phases, cache._writes.phases._lock.acquire),
        "listeners": (SimpleNamespace(_lock=sa_internals.listening), lambda: cache.attach(other)),
    }[which]
    lock_for_a_moment(owner._lock)
    assert child_succeeds(work)


def test_threads_that_fork_at_once() -> None:
    locks = [forks.lock() for _ in range(20)]
    results: list[bool] = []

    def fork() -> None:
        results.extend(child_succeeds(lambda: [lock.acquire() for lock in locks]) for _ in range(5))

    threads = [threading.Thread(target=fork) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 20


def test_who_holds_one_may_fork() -> None:
    lock = forks.lock()
    with lock:
        assert child_succeeds(lock.acquire)
