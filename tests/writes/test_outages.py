"""What a commit owes a store that it could not reach, and when that is paid."""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import redis
from dogpile.cache import make_region
from dogpile.cache.proxy import ProxyBackend
from sqlalchemy import Engine, create_engine, exc, insert, select, text, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from querycache import QueryCache
from querycache.backends.redis import RedisBackend
from querycache.errors import CacheUnavailable
from querycache.phases import MOST_OWED, Marking, _Commit
from tests.servers import Server


class Base(DeclarativeBase):
    pass


class Lamp(Base):
    __tablename__ = "lamp"
    id: Mapped[int] = mapped_column(primary_key=True)
    watts: Mapped[int]


class Candle(Base):
    __tablename__ = "candle"
    id: Mapped[int] = mapped_column(primary_key=True)
    watts: Mapped[int]


def outage() -> AbstractContextManager[object]:
    """Writers cannot reach Redis, nothing that they say."""

    def fail(*_: object, **__: object) -> None:
        raise CacheUnavailable("it does not answer")

    return mock.patch.multiple(RedisBackend, begin=fail, bump=fail)


def ask_until(cache: QueryCache, ask: Callable[[], int | None], answer: int | None, *outcomes: str) -> None:
    """Ask, and get this answer each time (any one, where it is None), until it is answered in one of these ways."""
    deadline = time.monotonic() + 20
    with cache.recording() as events:
        while not events or events[-1].outcome not in outcomes:
            assert time.monotonic() < deadline
            found = ask()
            assert answer is None or found == answer
            time.sleep(0.02)


@pytest.mark.parametrize("owed", [Lamp, Candle])
def test_what_is_owed_while_another_thread_pays(
    sqlite_engine: Engine, redis_store_url: str, owed: type[Lamp | Candle]
) -> None:
    """The store has done what it was asked to, and the answer is under way, when the next commit cannot reach it."""
    Base.metadata.create_all(sqlite_engine)
    factory = sessionmaker(sqlite_engine)
    other_engine = create_engine(sqlite_engine.url)
    payer, elsewhere = sessionmaker(other_engine), sessionmaker(other_engine)  # its own, and another process
    mine = QueryCache(redis_store_url, lease=0.1).attach(factory).attach(payer)
    other = QueryCache(redis_store_url, lease=0.1).attach(elsewhere)
    with factory.begin() as session:
        session.add_all([Lamp(id=1, watts=0), Candle(id=1, watts=0)])

    def ask(sessions: sessionmaker[Session], cls: type[Lamp | Candle]) -> int | None:
        with sessions() as session:
            return session.scalar(select(cls.watts).execution_options(cache_key=True))

    def fill(cls: type[Lamp | Candle]) -> None:
        ask_until(other, lambda: ask(elsewhere, cls), None, "hit")

    def write(cls: type[Lamp | Candle], watts: int) -> None:
        with factory.begin() as session:
            session.execute(update(cls).values(watts=watts))

    pay: Callable[..., None] = RedisBackend.bump
    paid = threading.Event()

    def pay_slowly(self: RedisBackend, *arguments: object, **options: object) -> None:
        pay(self, *arguments, **options)
        if not paid.is_set():
            fill(owed)
            with outage():
                write(owed, 2)
            paid.set()

    fill(Lamp)
    fill(Candle)
    with outage():
        write(Lamp, 1)
    with mock.patch.object(RedisBackend, "bump", pay_slowly):
        assert paid.wait(20)
    assert ask(payer, owed) == 2
    ask_until(mine, lambda: ask(payer, owed), 2, "fill")
    assert ask(elsewhere, owed) == 2
    other_engine.dispose()


@pytest.mark.parametrize("kind", ["redis", "memcached"])
def test_who_owes_a_server_that_hangs_waits_once_in_a_while(
    sqlite_engine: Engine, private_server: Callable[[str], Server], kind: str
) -> None:
    Base.metadata.create_all(sqlite_engine)
    server = private_server(kind)
    factory = sessionmaker(sqlite_engine)
    cache = QueryCache(f"{server.url}?timeout=0.3").attach(factory)
    with factory.begin() as session:
        session.add(Lamp(id=1, watts=0))
    server.pause()
    with factory.begin() as session:
        session.execute(update(Lamp).values(watts=1))
    begun = time.monotonic()
    for _ in range(20):
        with factory() as session:
            assert session.scalar(select(Lamp.watts).execution_options(cache_key=True)) == 1
    assert time.monotonic() - begun < 1.5
    server.resume()
    cache.invalidate(everything=True)  # by hand it is tried at once


class Switched(ProxyBackend):
    """Stands before a dogpile backend that can be switched off."""

    off = False

    def get_serialized_multi(self, keys: Any) -> Any:
        self._check()
        return self.proxied.get_serialized_multi(keys)

    def set_serialized_multi(self, mapping: Any) -> None:
        self._check()
        self.proxied.set_serialized_multi(mapping)

    def _check(self) -> None:
        if self.off:
            raise ConnectionError("switched off")


@pytest.mark.filterwarnings("ignore:region 'default'. its backend cannot count")
def test_a_dogpile_backend_is_owed_what_it_could_not_be_told(sqlite_engine: Engine) -> None:
    Base.metadata.create_all(sqlite_engine)
    switched = Switched()
    region = make_region().configure("dogpile.cache.memory", wrap=[switched])
    mine, elsewhere = sessionmaker(sqlite_engine), sessionmaker(create_engine(sqlite_engine.url))
    writer = QueryCache(region).attach(mine)
    QueryCache(region).attach(elsewhere)
    with mine.begin() as session:
        session.add(Lamp(id=1, watts=0))

    def ask(sessions: sessionmaker[Session]) -> int | None:
        with sessions() as session:
            return session.scalar(select(Lamp.watts).execution_options(cache_key=True))

    assert [ask(mine), ask(elsewhere)] == [0, 0]
    switched.off = True
    with mine.begin() as session:
        session.execute(update(Lamp).values(watts=1))
    assert ask(mine) == 1
    switched.off = False
    ask_until(writer, lambda: ask(mine), 1, "fill")
    assert ask(elsewhere) == 1


def test_a_long_debt_is_paid_in_short(sqlite_engine: Engine, private_server: Callable[[str], Server]) -> None:
    """It does not grow for as long as an outage lasts, and is paid within the time that an answer may take."""
    Base.metadata.create_all(sqlite_engine)
    server = private_server("redis")
    mine, elsewhere = sessionmaker(sqlite_engine), sessionmaker(create_engine(sqlite_engine.url))
    url = f"{server.url}?timeout=0.3"
    writer = QueryCache(url, lease=0.1).attach(mine)
    other = QueryCache(url, lease=0.1).attach(elsewhere)
    with mine.begin() as session:
        session.add(Lamp(id=1, watts=0))

    def ask(sessions: sessionmaker[Session]) -> int | None:
        with sessions() as session:
            return session.scalar(select(Lamp.watts).execution_options(cache_key=True, cache_tags=["7"]))

    ask_until(other, lambda: ask(elsewhere), 0, "hit")
    pay = mock.create_autospec(RedisBackend.bump, side_effect=RedisBackend.bump)
    server.pause()
    for number in range(3):
        with mine.begin() as session:
            session.execute(update(Lamp).values(watts=number + 1))
            names = [str(tag) for tag in range(number * MOST_OWED, (number + 1) * MOST_OWED)]
            writer.invalidate(tags=names, session=session)
    server.resume()
    with mock.patch.object(RedisBackend, "bump", pay):
        ask_until(writer, lambda: ask(mine), 3, "hit", "fill")
    assert all(len(call.args[1]) <= MOST_OWED for call in pay.call_args_list)
    assert ask(elsewhere) == 3


def test_by_hand_every_store_is_told_that_can_be(
    sqlite_engine: Engine, private_server: Callable[[str], Server], redis_store_url: str
) -> None:
    Base.metadata.create_all(sqlite_engine)
    dead = private_server("redis")
    factory = sessionmaker(sqlite_engine)
    cache = QueryCache({"dead": dead.url, "default": redis_store_url, "memory": "memory://"}, lease=0.1)
    cache.attach(factory)

    def ask(region: str) -> int | None:
        with factory() as session:
            asked = select(Lamp.watts).execution_options(cache_key=True, cache_region=region)
            return session.scalar(asked)

    with factory.begin() as session:
        session.add(Lamp(id=1, watts=0))
    for region in ("default", "memory"):
        ask_until(cache, lambda region=region: ask(region), 0, "hit")  # type: ignore[misc]
    dead.kill()
    with sqlite_engine.connect() as connection:  # unseen
        connection.connection.cursor().execute("UPDATE lamp SET watts = 1")
        connection.connection.commit()
    assert [ask("default"), ask("memory")] == [0, 0]
    with pytest.raises(CacheUnavailable, match="Redis at"):
        cache.invalidate(tables=["lamp"])
    assert [ask("default"), ask("memory")] == [1, 1]


@pytest.mark.parametrize("then", ["nothing", "commits", "asks another"])
def test_who_does_not_ask_a_store_pays_it_all_the_same(
    sqlite_engine: Engine, redis_store_url: str, then: str
) -> None:
    Base.metadata.create_all(sqlite_engine)
    mine, elsewhere = sessionmaker(sqlite_engine), sessionmaker(create_engine(sqlite_engine.url))
    QueryCache({"default": redis_store_url, "memory": "memory://"}, lease=0.1).attach(mine)
    other = QueryCache(redis_store_url, lease=0.1).attach(elsewhere)
    with mine.begin() as session:
        session.add_all([Lamp(id=1, watts=0), Candle(id=1, watts=0)])

    def ask() -> int | None:
        with elsewhere() as session:
            return session.scalar(select(Lamp.watts).execution_options(cache_key=True))

    ask_until(other, ask, 0, "hit")
    with outage(), mine.begin() as session:
        session.execute(update(Lamp).values(watts=1))
    until = time.monotonic() + 20
    while ask() != 1 and time.monotonic() < until:
        if then == "commits":
            with mine.begin() as session:
                session.execute(update(Candle).values(watts=Candle.watts + 1))
        elif then == "asks another":
            with mine() as session:
                asked = select(Candle.watts).execution_options(cache_key=True, cache_region="memory")
                session.scalar(asked)
        time.sleep(0.2)
    assert ask() == 1


def test_the_thread_that_pays_ends(sqlite_engine: Engine, private_server: Callable[[str], Server]) -> None:
    """When all is paid, and when nobody has the cache any more. After that it begins anew."""
    Base.metadata.create_all(sqlite_engine)
    server = private_server("redis")
    factory = sessionmaker(sqlite_engine)
    cache = QueryCache(server.url).attach(factory)

    def owe() -> list[threading.Thread]:
        before = threading.enumerate()
        server.kill()
        with factory.begin() as session:
            session.add(Lamp(watts=0))
        return [each for each in threading.enumerate() if each not in before]

    for _ in range(2):
        [payer] = owe()
        server.start()
        payer.join(20)
        assert not payer.is_alive()
    [payer] = owe()
    cache.detach(factory).detach(sqlite_engine)
    del cache
    gc.collect()
    payer.join(20)
    assert not payer.is_alive()


@pytest.mark.parametrize("then", ["nothing", "another commit"])
@pytest.mark.parametrize("consistency", ["strict", "commit"])
def test_a_commit_of_unknown_outcome_that_a_store_missed(
    postgresql_engine: Engine, redis_store_url: str, consistency: Any, then: str
) -> None:
    """Whoever is told of it takes place before it may."""
    Base.metadata.drop_all(postgresql_engine)
    Base.metadata.create_all(postgresql_engine)
    mine, elsewhere = sessionmaker(postgresql_engine), sessionmaker(create_engine(postgresql_engine.url))
    writer = QueryCache(redis_store_url, lease=3, consistency=consistency).attach(mine)
    other = QueryCache(redis_store_url, lease=3, consistency=consistency).attach(elsewhere)
    with mine.begin() as session:
        session.add(Lamp(id=1, watts=0))

    def ask() -> int | None:
        with elsewhere() as session:
            return session.scalar(select(Lamp.watts).order_by(Lamp.id).execution_options(cache_key=True))

    ask_until(other, ask, 0, "hit")
    with mine() as session:
        session.execute(update(Lamp).values(watts=1))
        transaction = session.connection()
        with outage():
            writer._writes.commit(transaction.info, transaction.dialect)
            if then == "another commit":
                writer._writes.end(transaction.info, "unknown")
                with mine.begin() as another:
                    another.execute(insert(Lamp).values(id=2, watts=5))
        writer._writes.end(transaction.info, "unknown")  # and now the server is at it
        until = time.monotonic() + 2
        while time.monotonic() < until:
            assert ask() == 0
            time.sleep(0.05)
        connection = transaction.connection.dbapi_connection
        assert connection is not None
        connection.commit()
        session.invalidate()
    assert ask() == 1


def test_who_only_writes_goes_on_paying(sqlite_engine: Engine, redis_store_url: str) -> None:
    """Although the thread is not there any more, as in a child of whoever owes."""
    Base.metadata.create_all(sqlite_engine)
    mine, elsewhere = sessionmaker(sqlite_engine), sessionmaker(create_engine(sqlite_engine.url))
    QueryCache(redis_store_url, lease=0.1).attach(mine)
    other = QueryCache(redis_store_url, lease=0.1).attach(elsewhere)
    with mine.begin() as session:
        session.add_all([Lamp(id=1, watts=0), Candle(id=1, watts=0)])

    def ask() -> int | None:
        with elsewhere() as session:
            return session.scalar(select(Lamp.watts).execution_options(cache_key=True))

    ask_until(other, ask, 0, "hit")
    with (
        outage(),
        mock.patch.object(threading.Thread, "start", side_effect=RuntimeError),
        mine.begin() as session,
    ):
        session.execute(update(Lamp).values(watts=1))
    with mine.begin() as session:
        session.execute(update(Candle).values(watts=1))
    until = time.monotonic() + 20
    while ask() != 1 and time.monotonic() < until:
        time.sleep(0.05)
    assert ask() == 1


def test_what_a_server_refuses_is_logged(
    sqlite_engine: Engine, private_server: Callable[[str], Server], caplog: pytest.LogCaptureFixture
) -> None:
    """And what it has only forgotten is not."""
    Base.metadata.create_all(sqlite_engine)
    server = private_server("redis")
    factory = sessionmaker(sqlite_engine)
    cache = QueryCache(server.url, namespace="well").attach(factory)
    with redis.Redis.from_url(server.url) as client:
        client.script_flush()
        cache.invalidate(tables=["lamp"])
        assert not caplog.records
        client.execute_command("ACL", "SETUSER", "weak", "on", ">secret", "~*", "+@all", "-set", "-incr")
    cache.detach(factory).detach(sqlite_engine)
    QueryCache(server.url.replace("redis://", "redis://weak:secret@")).attach(factory)
    with factory.begin() as session:
        session.add(Lamp(id=1, watts=0))
    [record] = [each for each in caplog.records if "refuses" in each.getMessage()]
    assert "weak" in record.getMessage() or "permissions" in record.getMessage()
    assert "secret" not in record.getMessage()


def test_what_is_owed_anew_was_never_not_owed(sqlite_engine: Engine) -> None:
    phases = QueryCache("redis://localhost:1/0").attach(sqlite_engine)._writes.phases
    [ledger] = phases._regions.ledgers
    commit, later = _Commit(True), _Commit(True)
    phases._owed[ledger] = {"a": later}
    stop = threading.Event()

    def settle() -> None:
        while not stop.is_set():
            phases._settle(ledger, {"a": commit})

    thread = threading.Thread(target=settle)
    thread.start()
    with mock.patch.object(phases, "_pay_later"):
        owed = {phases.owes(ledger) for _ in range(100_000)}
    stop.set()
    thread.join()
    assert owed == {True}


def test_a_signal_in_phase_two_loses_no_debt(sqlite_engine: Engine) -> None:
    Base.metadata.create_all(sqlite_engine)
    factory = sessionmaker(sqlite_engine)
    urls = {"default": "redis://localhost:1/0", "pages": "redis://localhost:1/1"}
    phases = QueryCache(urls).attach(factory)._writes.phases
    before = threading.enumerate()
    with (
        mock.patch.object(RedisBackend, "bump", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
        factory.begin() as session,
    ):
        session.add(Lamp(watts=0))
    assert len(phases._owed) == 2
    assert [each.name for each in threading.enumerate() if each not in before] == ["querycache-debts"]


def test_a_commit_within_the_noting_of_another_loses_no_debt(sqlite_engine: Engine) -> None:
    """As by a signal handler, or by an object that the garbage collector deletes; before whichever line."""
    Base.metadata.create_all(sqlite_engine)
    factory = sessionmaker(sqlite_engine)
    phases = QueryCache("redis://localhost:1/0").attach(factory)._writes.phases
    code = type(phases)._owe.__code__

    def owed_with_a_commit_before(number: int) -> tuple[bool, set[str]]:
        lines = itertools.count()
        nested = False

        def trace(frame: Any, kind: str, argument: object) -> Any:
            nonlocal nested
            if frame.f_code is not code:
                return None
            if kind == "line" and next(lines) == number:
                sys.settrace(None)
                nested = True
                phases.two(Marking({"candle"}, unmarked=list(phases._regions.ledgers)))
            return trace

        phases._owed.clear()
        sys.settrace(trace)
        try:
            phases.two(Marking({"lamp"}, unmarked=list(phases._regions.ledgers)))
        finally:
            sys.settrace(None)
        [debts] = phases._owed.values()
        return nested, {tag.rpartition(":")[2] for tag in debts}

    was = sys.gettrace()  # of what measures how much is tested
    try:
        for number in itertools.count():
            nested, debts = owed_with_a_commit_before(number)
            if not nested:
                break
            assert debts == {"candle", "lamp"}, number
    finally:
        sys.settrace(was)
    assert number > 5


def test_commits_side_by_side_are_no_outage(postgresql_engine: Engine, redis_store_url: str) -> None:
    """In one phase each owes its tags for a moment, which is nobody else's business."""
    Base.metadata.drop_all(postgresql_engine)
    Base.metadata.create_all(postgresql_engine)
    factory = sessionmaker(postgresql_engine)
    cache = QueryCache(redis_store_url, lease=0.1, consistency="commit").attach(factory)

    def work(number: int) -> None:
        for watts in range(50):
            with factory.begin() as session:
                session.merge(Lamp(id=number, watts=watts))
            with factory() as session:
                session.scalar(select(Lamp.watts).where(Lamp.id == number).execution_options(cache_key=True))

    before = threading.enumerate()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    with cache.recording() as events:
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        names = {each.name for each in threading.enumerate() if each not in before}
    assert "querycache-debts" not in names  # it would last for half a second
    assert not [each for each in events if "unavailable" in each.reason]


def test_what_is_committed_when_the_interpreter_ends(tmp_path: Path) -> None:
    """No thread can begin any more, and who waits for it waits for ever."""
    script = f"""if True:
        from sqlalchemy import create_engine, select
        from sqlalchemy.orm import sessionmaker
        from querycache import QueryCache
        from tests.writes.test_outages import Base, Lamp
        engine = create_engine("sqlite:///{tmp_path / "x.db"}")
        Base.metadata.create_all(engine)
        factory = sessionmaker(engine)
        QueryCache("redis://127.0.0.1:1/0").attach(factory)
        class Buffer:
            factory, lamp = factory, Lamp
            def __del__(self):
                with self.factory.begin() as session:
                    session.add(self.lamp(watts=1))
        with factory() as session:
            session.scalars(select(Lamp).execution_options(cache_key=True)).all()
        left = Buffer()
    """
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_what_a_driver_refuses_by_itself_is_not_under_way(
    postgresql_engine: Engine, redis_store_url: str
) -> None:
    Base.metadata.drop_all(postgresql_engine)
    Base.metadata.create_all(postgresql_engine)
    engine = create_engine(postgresql_engine.url, isolation_level="AUTOCOMMIT")
    factory = sessionmaker(engine)
    cache = QueryCache(redis_store_url, lease=600).attach(factory)
    cache._regions.ledgers[0].lease = 0.1
    asked = select(Lamp.watts).where(Lamp.id == 1).execution_options(cache_key=True)

    def outcome() -> str:
        with factory() as session, cache.recording() as events:
            session.scalar(asked)
        return events[-1].outcome

    while outcome() != "hit":
        time.sleep(0.05)
    cache._regions.ledgers[0].lease = 600
    with pytest.raises(exc.DataError), engine.connect() as connection:
        connection.execute(text("UPDATE lamp SET watts = :watts"), {"watts": "\x00"})
    assert [outcome(), outcome()] == ["fill", "hit"]
    engine.dispose()
