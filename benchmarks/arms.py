"""Where an answer can come from: the databases, the documented recipe, this library, and memory as the limit.

Every arm has an engine of its own, so that what one listens to costs the others nothing, and asks the way an
application does: a new Session, the statement built once before, all rows fetched.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dogpile.cache import make_region
from sqlalchemy import Executable, create_engine, event
from sqlalchemy.orm import ORMExecuteState, Session, sessionmaker

from benchmarks.documented_recipe import FromRegion, Recipe
from benchmarks.forum import Case
from querycache import QueryCache
from querycache.sa_internals import Invocation, autobegin, prepare

__all__ = ["Arm", "Servers", "arms"]

LEASE = 2.0
"""Seconds. A cache server that was just started stores nothing for so long."""
_TTL = 3600


@dataclass(frozen=True)
class Servers:
    """URLs; None for a server that there is not."""

    sqlite: str
    postgresql: str | None
    redis: str | None
    memcached: str | None

    @classmethod
    def from_environment(cls, sqlite: str) -> Servers:
        """As ``python -m tests.servers`` exports them."""
        urls = [os.environ.get(f"QUERYCACHE_TEST_{name}") for name in ("POSTGRESQL", "REDIS", "MEMCACHED")]
        return cls(sqlite, *urls)

    @property
    def database(self) -> str:
        """The database behind the caches."""
        return self.postgresql or self.sqlite

    def missing(self) -> list[str]:
        return [name for name in ("postgresql", "redis", "memcached") if getattr(self, name) is None]


@dataclass(frozen=True)
class Arm:
    """One column of the table.

    Attributes:
        name: its heading.
        factory: makes its Sessions.
        marked: puts on a statement what asks for the cache, given a name for the statement.
        ready: returns once answers come from where this arm wants them, given what runs the statement.
    """

    name: str
    factory: sessionmaker[Session]
    marked: Callable[[Executable, str], Executable] = lambda statement, name: statement
    ready: Callable[[Callable[[], object]], object] = lambda run: run()

    def run(self, case: Case, rows: int) -> Callable[[], Sequence[Any]]:
        """What is timed. Before it is returned, the answer is where it will come from."""
        statement = self.marked(case.statement(rows), case.name)

        def run() -> Sequence[Any]:
            with self.factory() as session:
                return case.fetch(session, statement)

        self.ready(run)
        return run


def _database(name: str, url: str) -> Arm:
    return Arm(name, sessionmaker(create_engine(url)))


def _recipe(name: str, url: str, backend: str, arguments: dict[str, Any]) -> Arm:
    factory = sessionmaker(create_engine(url))
    region = make_region(name).configure(backend, arguments=arguments)
    event.listen(factory, "do_orm_execute", Recipe(region))
    return Arm(name, factory, lambda statement, key: statement.options(FromRegion(key)))


def _library(name: str, url: str, cache_url: str) -> Arm:
    factory = sessionmaker(create_engine(url))
    namespace = f"bench-{os.getpid()}-{time.time_ns()}"
    cache = QueryCache(cache_url, namespace=namespace, ttl=_TTL, lease=LEASE)
    cache.attach(factory)

    def ready(run: Callable[[], object]) -> None:
        deadline = time.monotonic() + 5 * LEASE
        while True:
            with cache.recording() as events:
                run()
            if [each.outcome for each in events] == ["hit"]:
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"{name}: no hit, but {events}")
            if events[-1].outcome != "fill":
                time.sleep(0.1)

    return Arm(name, factory, lambda statement, key: statement.execution_options(cache_key=key), ready)


def _limit(name: str, url: str) -> Arm:
    """SQLAlchemy's loader over rows that are in memory already: what no cache of rows can beat.

    As after any statement, the Session is in a transaction then; there is just no connection in it.
    """
    factory = sessionmaker(create_engine(url))
    held: dict[object, tuple[Any, list[Any], int]] = {}

    def replay(state: ORMExecuteState) -> Any:
        invocation = Invocation.take(state)
        prepared = prepare(invocation)
        given = prepared.plan.parameters
        key = prepared.plan.sql, tuple(given.values() if isinstance(given, dict) else given)
        answer = held.get(key)
        if answer is None:
            answer = held[key] = prepared.execute()
        autobegin(invocation.session, invocation.bind)
        return prepared.replay(*answer)

    event.listen(factory, "do_orm_execute", replay)

    return Arm(name, factory)


def arms(servers: Servers) -> list[Arm]:
    """All arms for which there are servers."""
    url = servers.database
    found = [_database("SQLite", servers.sqlite)]
    if servers.postgresql:
        found.append(_database("PostgreSQL", servers.postgresql))
    found.append(_recipe("recipe memory", url, "dogpile.cache.memory_pickle", {}))
    if servers.redis:
        arguments = {"url": servers.redis, "redis_expiration_time": _TTL}
        found.append(_recipe("recipe Redis", url, "dogpile.cache.redis", arguments))
    found.append(_library("memory", url, "memory://"))
    if servers.redis:
        found.append(_library("Redis", url, servers.redis))
    if servers.memcached:
        found.append(_library("memcached", url, servers.memcached))
    found.append(_limit("limit", url))
    return found
