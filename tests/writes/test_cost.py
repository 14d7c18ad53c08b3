"""Cost as part of the contract, counted where it is paid: at the server.

A hit is one round trip and a miss two; a commit that wrote is two however many tags it changes, a transaction
that only read none. A round trip is a request that waits for its answer, as a proxy between client and server
sees it: whatever was sent together counts once.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from redis import Redis
from sqlalchemy import Engine, insert, select, text, update
from sqlalchemy.orm import sessionmaker

from querycache import QueryCache, tags
from tests.servers import Server
from tests.writes.library import Author, Base, Book, fill_library

SLOTS = 64
QUIET = 0.02
"""Seconds after which a client is taken to have sent all that it sends."""


class CountingProxy:
    """Stands before a server and counts the round trips through it.

    An answer is passed on when the client has stopped sending: of a long pipeline the server answers the first commands
    while the last are still on their way.

    Attributes:
        round_trips: how often a client has sent something after the server had answered.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._server = (parts.hostname or "127.0.0.1", parts.port or 0)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.url = parts._replace(netloc=f"127.0.0.1:{self._listener.getsockname()[1]}").geturl()
        self.round_trips = 0
        self._last_sent = 0.0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()
        for each in self._open:
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                server = socket.create_connection(self._server)
                self._open += [client, server]
                # Set once the server has answered: what the client sends next begins a round trip.
                answered = threading.Event()
                answered.set()
                threading.Thread(target=self._requests, args=(client, server, answered), daemon=True).start()
                threading.Thread(target=self._answers, args=(client, server, answered), daemon=True).start()

    def _requests(self, client: socket.socket, server: socket.socket, answered: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 20):
                if answered.is_set():
                    answered.clear()
                    self.round_trips += 1
                self._last_sent = time.monotonic()
                server.sendall(data)

    def _answers(self, client: socket.socket, server: socket.socket, answered: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 20):
                while time.monotonic() < self._last_sent + QUIET:
                    time.sleep(QUIET / 4)
                answered.set()
                client.sendall(data)


class Counted:
    """The library behind a cache on a store whose round trips are counted."""

    def __init__(self, engine: Engine, proxy: CountingProxy) -> None:
        self.proxy = proxy
        self.engine = engine
        self.cache = QueryCache(proxy.url, lease=0.3, slots=SLOTS).attach(engine)
        self.sessions = sessionmaker(engine)
        self.cache.attach(self.sessions)
        Base.metadata.create_all(engine)
        with engine.begin() as connection:
            fill_library(connection)
        for _ in range(5_000):
            with self.cache.recording() as events:
                self.ask(Author)
            if [event.outcome for event in events] == ["hit"]:
                return
        raise AssertionError("the cache does not fill")

    def ask(self, entity: Any, *criteria: Any, **options: Any) -> None:
        with self.sessions() as session:
            statement = select(entity).where(*criteria).execution_options(**{"cache_key": True, **options})
            session.scalars(statement).all()

    def cost(self, action: Callable[[], object]) -> int:
        before = self.proxy.round_trips
        action()
        settled = -1
        while settled != self.proxy.round_trips:  # the last trip of a commit is not waited for
            settled = self.proxy.round_trips
            time.sleep(0.05)
        return self.proxy.round_trips - before


@pytest.fixture(
    params=[
        pytest.param("redis", marks=pytest.mark.server("redis")),
        pytest.param("memcached", marks=pytest.mark.server("memcached")),
    ]
)
def counted(request: pytest.FixtureRequest, sqlite_engine: Engine) -> Iterator[Counted]:
    proxy = CountingProxy(request.getfixturevalue(f"{request.param}_store_url"))
    yield Counted(sqlite_engine, proxy)
    proxy.close()


def test_a_hit_is_one_round_trip_and_a_miss_two(counted: Counted) -> None:
    counted.ask(Book, Book.id == 1, Book.title == "first")  # which makes its tags
    assert counted.cost(lambda: counted.ask(Author)) == 1
    miss = Book.id == 1, Book.title == "never asked before"
    assert counted.cost(lambda: counted.ask(Book, *miss)) == 2
    assert counted.cost(lambda: counted.ask(Book, *miss)) == 1


@pytest.mark.parametrize("rows", [1, 500])
def test_a_writing_commit_is_two_round_trips_however_many_tags(counted: Counted, rows: int) -> None:
    def write() -> None:
        with counted.sessions.begin() as session:
            session.add_all(Book(id=100 + n, title="new", price=n, author_id=1 + n % 3) for n in range(rows))

    assert counted.cost(write) == 2


def test_a_bulk_write_and_core_cost_the_same(counted: Counted) -> None:
    def bulk() -> None:
        with counted.sessions.begin() as session:
            session.execute(update(Book).values(price=1))
            session.execute(text("UPDATE author SET name = 'x'"))

    def core() -> None:
        with counted.engine.begin() as connection:
            connection.execute(insert(Author).values(id=9, name="nine"))

    assert counted.cost(bulk) == 2
    assert counted.cost(core) == 2


def test_a_transaction_that_wrote_nothing_costs_nothing(counted: Counted) -> None:
    def read() -> None:
        with counted.sessions.begin() as session:
            session.scalars(select(Book)).all()

    def roll_back() -> None:
        with counted.sessions() as session:
            session.execute(update(Book).values(price=1))
            session.rollback()

    def core() -> None:
        with counted.engine.begin() as connection:
            connection.execute(select(Book.id)).all()

    for transaction in (read, roll_back, core):
        assert counted.cost(transaction) == 0


def test_a_snapshot_costs_one_round_trip(postgresql_engine: Engine, redis_store_url: str) -> None:
    """The cache may be used as long as nobody has committed since, so what was there before must be known."""
    proxy = CountingProxy(redis_store_url)
    counted = Counted(postgresql_engine, proxy)
    snapshots = counted.engine.execution_options(isolation_level="REPEATABLE READ")

    def read() -> None:
        with counted.sessions(bind=snapshots) as session:
            session.scalars(select(Book)).all()
            session.scalars(select(Author)).all()
            session.commit()

    assert counted.cost(read) == 1
    proxy.close()


def test_names_and_statements_do_not_make_the_ledger_grow(
    sqlite_engine: Engine, private_server: Callable[[str], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tags, "NAMES", 8)
    server = private_server("redis")
    counted = Counted(sqlite_engine, CountingProxy(server.url))
    with Redis.from_url(server.url) as client:
        for number in range(100):
            counted.ask(
                Author,
                text(f"{number} = {number}"),
                cache_key=f"user-{number}",
                cache_tags=[f"page-{number}"],
            )
        for kind in ("key", "tag", "statement"):
            assert 0 < len(client.keys(f"qc:t:{kind}:*")) <= 8
    with counted.cache.recording() as events:
        counted.ask(Author, cache_key="user-7")
        counted.ask(Author, cache_key="user-7")
        counted.cache.invalidate(key="user-7")
        counted.ask(Author, cache_key="user-7")
    assert [event.outcome for event in events][-3:] == ["hit", "stale", "fill"]
    counted.proxy.close()


def test_ten_thousand_rows_collapse_to_the_slots(
    sqlite_engine: Engine, private_server: Callable[[str], Server]
) -> None:
    """And with them the memory of the ledger is bounded: by tables, tracked columns and slots."""
    server = private_server("redis")
    proxy = CountingProxy(server.url)
    counted = Counted(sqlite_engine, proxy)

    def write(first: int, rows: int) -> None:
        with counted.sessions.begin() as session:
            session.add_all(
                Book(id=first + n, title="new", price=n, author_id=1 + n % 3) for n in range(rows)
            )

    assert counted.cost(lambda: write(1_000, 10_000)) == 2
    with Redis.from_url(server.url) as client:
        slots = client.keys("qc:t:slot:book.*")
        assert len(client.keys("qc:t:slot:book.id:*")) == SLOTS
        # two tracked columns, of which one has three values
        assert len(slots) == SLOTS + 3
        before = client.dbsize()
        assert counted.cost(lambda: write(20_000, 500)) == 2
        assert client.dbsize() == before
    proxy.close()
