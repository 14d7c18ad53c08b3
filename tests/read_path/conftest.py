"""The forum of `models.py`, filled once for each database; stores; and a process to share them with."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, literal, make_url, select, text
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import NullPool

from querycache import QueryCache
from tests.read_path.process import Process
from tests.read_path.rows import create_and_fill

DIALECTS = [
    "sqlite",
    pytest.param("postgresql", marks=pytest.mark.server("postgresql")),
    pytest.param("mariadb", marks=pytest.mark.server("mariadb")),
]
STORES = [
    "memory",
    pytest.param("redis", marks=pytest.mark.server("redis")),
    pytest.param("memcached", marks=pytest.mark.server("memcached")),
]


@contextlib.contextmanager
def _database(server_url: str) -> Iterator[str]:
    """A database beside the one that other tests empty."""
    name = f"forum_{os.getpid()}_{uuid.uuid4().hex[:8]}"
    administration = create_engine(server_url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with administration.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    try:
        yield make_url(server_url).set(database=name).render_as_string(hide_password=False)
    finally:
        # Not the connection from above: other fixtures hang up whoever is connected to the worker's database.
        with administration.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name}"))


@contextlib.contextmanager
def _filled(url: str) -> Iterator[Engine]:
    engine = create_engine(url)
    try:
        create_and_fill(engine)
        yield engine
    finally:
        engine.dispose()


@pytest.fixture(scope="session")
def sqlite_forum(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with _filled(f"sqlite:///{tmp_path_factory.mktemp('forum') / 'forum.db'}") as engine:
        yield engine


@pytest.fixture(scope="session")
def postgresql_forum(postgresql_url: str) -> Iterator[Engine]:
    with _database(postgresql_url) as url, _filled(url) as engine:
        yield engine


@pytest.fixture(scope="session")
def mariadb_forum(mariadb_url: str) -> Iterator[Engine]:
    with _database(mariadb_url) as url, _filled(url) as engine:
        yield engine


@pytest.fixture(params=DIALECTS)
def forum(request: pytest.FixtureRequest) -> Engine:
    """An engine on a filled forum that tests only read: SQLite, PostgreSQL and MariaDB in turn."""
    engine = request.getfixturevalue(f"{request.param}_forum")
    assert isinstance(engine, Engine)
    return engine


@pytest.fixture
def own_forum(tmp_path: Path) -> Iterator[Engine]:
    """An engine on a filled forum (SQLite) of the test's own, which it may change."""
    with _filled(f"sqlite:///{tmp_path / 'forum.db'}") as engine:
        yield engine


def _trusted(url: str) -> str:
    """Wait until a store that was emptied is trusted again: its keys might have been lost under a writer."""
    # A busy machine must not look like a server that is down.
    url += "?timeout=20"
    cache = QueryCache(url, lease=0.05)
    with Session(create_engine("sqlite://")) as db:
        cache.attach(db)
        number = 0
        while not cache.stats().fills:
            # A name that is new each time: one that was seen before may be trusted before the store is.
            number += 1
            db.execute(select(literal(1)), execution_options={"cache_key": f"warm up {number}"})
    return url


@pytest.fixture
def redis_cache_url(redis_store_url: str) -> str:
    """URL of an empty store on Redis that fills at once."""
    return _trusted(redis_store_url)


@pytest.fixture
def memcached_cache_url(memcached_store_url: str) -> str:
    """URL of an empty store on memcached that fills at once."""
    return _trusted(memcached_store_url)


@pytest.fixture(params=STORES)
def store_url(request: pytest.FixtureRequest) -> str:
    """URL of an empty store that fills at once: memory, Redis and memcached in turn."""
    if request.param == "memory":
        return "memory://"
    url = request.getfixturevalue(f"{request.param}_cache_url")
    assert isinstance(url, str)
    return url


@pytest.fixture
def cache() -> QueryCache:
    return QueryCache()


@pytest.fixture
def sessions(cache: QueryCache) -> Callable[[Engine], sessionmaker[Session]]:
    """Makes the sessions of an engine, with the cache attached."""

    def make(engine: Engine) -> sessionmaker[Session]:
        maker = sessionmaker(engine)
        cache.attach(maker)
        return maker

    return make


@pytest.fixture(scope="session")
def process() -> Iterator[Process]:
    """Another process, which knows nothing but what is in the store."""
    with Process() as other:
        yield other
