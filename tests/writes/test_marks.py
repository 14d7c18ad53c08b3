"""Phase one of a Session's commit: the ledger is told while the Session still flushes, and waited for before COMMIT."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar
from unittest import mock

import pytest
from dogpile.cache import register_backend
from redis import Redis
from sqlalchemy import Engine, event, update
from sqlalchemy.orm import Session

from querycache import versions
from querycache.backends.memory import MemoryBackend
from querycache.backends.redis import RedisBackend
from querycache.errors import CacheUnavailable
from querycache.phases import Phases
from querycache.store import Mark
from tests.servers import Server
from tests.writes.library import Author, Book
from tests.writes.test_pitfalls_e import AUTHORS, PRICES, RAISE_PRICE, Library, point


class Slow(MemoryBackend):
    """Marks nothing before somebody waits for it, as a server may that is far away."""

    log: ClassVar[list[str]] = []
    fails: ClassVar[bool] = False

    def send_begin(self, counters: Sequence[str]) -> Callable[[], Mapping[str, Mark]]:
        self.log.append("told")

        def wait() -> Mapping[str, Mark]:
            self.log.append("marked")
            if self.fails:
                raise CacheUnavailable("it does not answer")
            return self.begin(counters)

        return wait

    def end(self, marks: Mapping[str, Mark]) -> None:
        self.log.append("end")
        super().end(marks)

    def bump(self, counters: Sequence[str]) -> None:
        self.log.append("bump")
        super().bump(counters)

    def unclean(self) -> list[str]:
        return [name for name, version in self._counters.items() if not versions.is_clean(version)]


register_backend("tests.slow", __name__, "Slow")


@pytest.fixture
def slow(sqlite_engine: Engine) -> Iterator[Library]:
    yield made(sqlite_engine)


def made(engine: Engine, **arguments: Any) -> Library:
    library = Library(engine, {"default": {"backend": "tests.slow"}}, **arguments)

    def commit(real: Callable[[Any], None], connection: Any) -> None:
        Slow.log.append("COMMIT")
        real(connection)

    library._commit.instead = commit
    library.fill(PRICES, AUTHORS)
    Slow.log.clear()
    return library


def store_of(library: Library) -> Slow:
    store: Any = library.cache._regions.get().ledger.store
    assert isinstance(store, Slow)
    return store


def change(session: Session, price: int = 77) -> None:
    session.get_one(Book, 2).price = price


@pytest.mark.parametrize("flushed", [False, True])
def test_the_ledger_is_told_before_the_flush_is_over_and_waited_for_before_commit(
    slow: Library, flushed: bool
) -> None:
    @event.listens_for(slow.sessions, "after_flush_postexec")
    def note(session: Session, context: object) -> None:
        Slow.log.append("flushed")

    with slow.sessions() as session:
        change(session)
        if flushed:
            session.flush()
            assert Slow.log == ["flushed"], "nobody is committing yet"
        session.commit()
    order = ["flushed", "told"] if flushed else ["told", "flushed"]
    assert Slow.log == [*order, "marked", "COMMIT", "end"]
    assert slow.is_right(PRICES)
    assert not store_of(slow).unclean()


def test_E17_what_is_told_is_waited_for(slow: Library) -> None:
    """Or else a lookup would be answered from before a COMMIT that has become visible."""
    seen: list[bool] = []

    def commit(real: Callable[[Any], None], connection: Any) -> None:
        real(connection)
        seen.append(slow.is_right(PRICES))

    def check() -> None:
        seen.clear()
        slow.fill(PRICES)
        with slow.committing(commit), slow.sessions.begin() as session:
            change(session, session.get_one(Book, 2).price + 1)
        assert seen == [True]

    check()
    with (
        mock.patch.object(Phases, "_wait", staticmethod(lambda marking: None)),
        pytest.raises(AssertionError),
    ):
        check()


def test_what_is_written_after_it_was_told_is_told_too(slow: Library) -> None:
    @event.listens_for(slow.sessions, "after_flush")
    def follow(session: Session, context: object) -> None:
        if not session.info.get("followed"):
            session.info["followed"] = True
            session.add(Author(id=50, name="late"))

    with slow.sessions.begin() as session:
        change(session)
    assert Slow.log == ["told", "told", "marked", "marked", "COMMIT", "end", "end"]
    assert slow.is_right(PRICES) and slow.is_right(AUTHORS)
    assert not store_of(slow).unclean()


@pytest.mark.parametrize("how", ["listener", "flush", "COMMIT"])
def test_a_commit_that_fails_after_it_was_told_leaves_no_mark(slow: Library, how: str) -> None:
    def fail(*given: Any) -> None:
        if how == "COMMIT":
            given[1].rollback()  # as a database does that refuses
        raise RuntimeError("no")

    session = slow.sessions()
    change(session)
    if how == "listener":
        event.listen(slow.sessions, "after_flush_postexec", fail)
    elif how == "flush":

        def again(session: Session, context: object) -> None:
            session.add(Author(id=1, name="is there already"))

        event.listen(slow.sessions, "after_flush_postexec", again)
    with slow.committing(fail if how == "COMMIT" else None), pytest.raises(Exception):  # noqa: B017
        session.commit()
    assert "told" in Slow.log
    session.close()
    assert Slow.log[-1] == "end"
    assert not store_of(slow).unclean()
    assert slow.is_right(PRICES)


@pytest.mark.parametrize("mode", ["rollback_only", "control_fully", "create_savepoint"])
def test_a_session_that_does_not_commit_itself_tells_nobody(postgresql_engine: Engine, mode: Any) -> None:
    library = made(postgresql_engine)
    with postgresql_engine.connect() as connection:
        outer = connection.begin()
        with library.sessions(bind=connection, join_transaction_mode=mode) as session:
            change(session)
            session.commit()
        if mode == "control_fully":
            assert Slow.log == ["told", "marked", "COMMIT", "end"]
        else:
            assert Slow.log == [], "marks would keep others out for as long as the outer transaction lasts"
            outer.commit()
            assert Slow.log == ["told", "marked", "COMMIT", "end"]
    assert library.is_right(PRICES)


def test_what_was_flushed_before_is_told_with_the_rest(slow: Library) -> None:
    with slow.sessions.begin() as session:
        session.add(Author(id=50, name="new"))
        session.flush()
        change(session)
    assert Slow.log == ["told", "marked", "COMMIT", "end"]


def test_a_savepoint_tells_nobody(postgresql_engine: Engine) -> None:
    library = made(postgresql_engine)
    with library.sessions() as session:
        change(session, 76)
        with session.begin_nested():  # which flushes
            change(session)
        assert Slow.log == []
        with session.begin_nested():
            change(session, 78)
            session.commit()  # of the whole transaction
    assert Slow.log == ["told", "marked", "COMMIT", "end"]
    assert library.is_right(PRICES)


def test_who_takes_their_time_is_marked_again(slow: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mark that is older than a lease may be given up, so COMMIT must begin soon after it was made."""
    clock = [1_000.0]
    monkeypatch.setattr("querycache.phases.time.monotonic", lambda: clock[0])

    @event.listens_for(slow.sessions, "after_flush_postexec")
    def wait(session: Session, context: object) -> None:
        clock[0] += 0.08  # a quarter of the lease, and a little

    with slow.sessions.begin() as session:
        change(session)
    assert Slow.log == ["told", "told", "marked", "marked", "COMMIT", "end", "end"]
    assert not store_of(slow).unclean()
    assert slow.is_right(PRICES)


@pytest.mark.parametrize("on_outage", ["available", "refuse"])
def test_a_ledger_that_was_told_and_does_not_answer(
    sqlite_engine: Engine, monkeypatch: pytest.MonkeyPatch, on_outage: str
) -> None:
    library = made(sqlite_engine, on_outage=on_outage)
    monkeypatch.setattr(Slow, "fails", True)
    with library.sessions() as session:
        change(session)
        if on_outage == "refuse":
            with pytest.raises(CacheUnavailable):
                session.commit()
            assert Slow.log == ["told", "marked"], "neither committed nor invalidated"
        else:
            session.commit()
            assert Slow.log == ["told", "marked", "COMMIT", "bump"]
    assert library.database(point(2)) == [(2, "book 2", 20 if on_outage == "refuse" else 77)]
    assert library.is_right(PRICES)


def test_one_phase_tells_after_commit(sqlite_engine: Engine) -> None:
    library = made(sqlite_engine, consistency="commit")
    with library.sessions.begin() as session:
        change(session)
    assert Slow.log == ["COMMIT", "bump"]
    assert library.is_right(PRICES)


# --- Redis: a connection is kept for the answer ------------------------------------------------------------


def stored(store: RedisBackend, *counters: str) -> list[int]:
    _, found = store.fetch(None, counters)
    return [version for version in found if version is not None]


def test_one_connection_is_enough(sqlite_engine: Engine, redis_store_url: str) -> None:
    library = Library(sqlite_engine, f"{redis_store_url}?max_connections=1")
    library.fill(PRICES)
    for price in range(5):
        with library.sessions.begin() as session:
            change(session, price)
        with library.sessions() as session:
            change(session, price + 100)
            session.flush()
            session.rollback()
        assert library.is_right(PRICES)
    assert library.outcome(PRICES) in ("hit", "stale fill")


def test_a_transaction_whose_connection_is_lost_gives_its_own_back(
    postgresql_engine: Engine, redis_store_url: str
) -> None:
    library = Library(postgresql_engine, f"{redis_store_url}?max_connections=2")
    library.fill(PRICES)

    def lose(session: Session) -> None:
        session.connection().invalidate()

    for _ in range(4):
        with library.sessions() as session:
            session.execute(RAISE_PRICE)
            event.listen(session, "before_commit", lose)
            with pytest.raises(Exception):  # noqa: B017
                session.commit()
        gc.collect()
    library.write(update(Book).values(price=5))  # connects anew
    assert library.is_right(PRICES)
    gc.collect()
    store: Any = library.cache._regions.get().ledger.store
    taken = [store._pool.take() for _ in range(2)]
    for each in taken:
        store._pool.give_back(each)


def test_scripts_that_were_flushed_meanwhile_are_sent_again(redis_store_url: str) -> None:
    store = RedisBackend({"url": redis_store_url})
    store.ping()
    with Redis.from_url(redis_store_url) as client:
        client.script_flush()
    waiting = store.send_begin(["witness", "tag"])
    store.ping()  # by another connection
    marks = waiting()
    assert [versions.pending_of(each) for each in stored(store, "witness", "tag")] == [1, 1]
    store.end(marks)
    store.ping()
    assert [versions.pending_of(each) for each in stored(store, "witness", "tag")] == [0, 0]
    store.close()


def test_a_server_that_dies_before_it_answers(private_server: Callable[[str], Server]) -> None:
    server = private_server("redis")
    store = RedisBackend({"url": f"{server.url}?timeout=0.2"})
    store.ping()
    server.pause()
    marks = store.send_begin(["witness", "tag"])
    with pytest.raises(CacheUnavailable, match="does not answer"):
        marks()
    server.resume()
    store.close()


def test_an_answer_that_nobody_waits_for_is_not_taken_for_another(
    private_server: Callable[[str], Server],
) -> None:
    server = private_server("redis")
    store = RedisBackend({"url": f"{server.url}?max_connections=1&timeout=10"})
    store.store("entry", b"payload")
    server.pause()
    waiting = store.send_begin(["witness", "tag"])
    del waiting
    gc.collect()
    threading.Timer(0.1, server.resume).start()
    assert store.fetch("entry")[0] == b"payload"
    store.close()
