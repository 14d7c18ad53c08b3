"""What a commit owes a store that it could not reach, and when that is paid."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from unittest import mock

import pytest
from sqlalchemy import Engine, create_engine, select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from querycache import QueryCache
from querycache.backends.redis import RedisBackend
from querycache.errors import CacheUnavailable
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


@pytest.mark.parametrize("owed", [Lamp, Candle])
def test_what_is_owed_while_another_thread_pays(
    sqlite_engine: Engine, redis_store_url: str, owed: type[Lamp | Candle]
) -> None:
    """The store has done what it was asked to, and the answer is under way, when the next commit cannot reach it."""
    Base.metadata.create_all(sqlite_engine)
    factory = sessionmaker(sqlite_engine)
    other_engine = create_engine(sqlite_engine.url)
    payer, elsewhere = sessionmaker(other_engine), sessionmaker(other_engine)  # its own, and another process
    QueryCache(redis_store_url, lease=0.1).attach(factory).attach(payer)
    other = QueryCache(redis_store_url, lease=0.1).attach(elsewhere)
    with factory.begin() as session:
        session.add_all([Lamp(id=1, watts=0), Candle(id=1, watts=0)])

    def ask(sessions: sessionmaker[Session], cls: type[Lamp | Candle]) -> int | None:
        with sessions() as session:
            return session.scalar(select(cls.watts).execution_options(cache_key=True))

    def fill(cls: type[Lamp | Candle]) -> None:
        with other.recording() as events:
            for _ in range(500):
                ask(elsewhere, cls)
                if events[-1].outcome == "hit":
                    return
                time.sleep(0.01)
        raise AssertionError("the store is not filled")

    def write(cls: type[Lamp | Candle], watts: int) -> None:
        with factory.begin() as session:
            session.execute(update(cls).values(watts=watts))

    def fail(*_: object, **__: object) -> None:
        raise CacheUnavailable("it does not answer")

    def outage() -> AbstractContextManager[object]:
        return mock.patch.multiple(RedisBackend, begin=fail, bump=fail)

    pay: Callable[..., None] = RedisBackend.bump

    def pay_slowly(self: RedisBackend, *arguments: object, **options: object) -> None:
        pay(self, *arguments, **options)
        fill(owed)
        with outage():
            write(owed, 2)

    fill(Lamp)
    fill(Candle)
    with outage():
        write(Lamp, 1)
    with mock.patch.object(RedisBackend, "bump", pay_slowly):
        ask(payer, Lamp)
    assert ask(payer, owed) == 2
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
