"""Every kind of statement: the database, a miss, and hits here, later and elsewhere give the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import Session, sessionmaker

from querycache import CacheStats, QueryCache
from tests.read_path.kinds import KINDS, Kind, Options, kinds_for
from tests.read_path.kinds.loading import NESTED
from tests.read_path.observe import Observer, Traffic, outcome_of, traffic
from tests.read_path.process import Process
from tests.read_path.rows import create_and_fill
from tests.servers import Server

FROM_DATABASE: Options = {}
FROM_CACHE: Options = {"cache_key": True}

Sessions = Callable[[Engine], sessionmaker[Session]]


def answers_elsewhere(url: str, store_url: str, names: list[str]) -> tuple[dict[str, Any], CacheStats]:
    """What this process gets for statements that it has never seen, each in a session of its own."""
    engine = create_engine(url)
    maker = sessionmaker(engine)
    cache = QueryCache(store_url).attach(maker)
    answers = {}
    for name in names:
        with maker() as db:
            answers[name] = Observer().describe(outcome_of(lambda: KINDS[name](db, FROM_CACHE)))  # noqa: B023
    engine.dispose()
    return answers, cache.stats()


def answer(
    engine: Engine, maker: sessionmaker[Session], kind: Kind, options: Options
) -> tuple[Any, Any, Traffic]:
    """The answer in a new session, what its objects do afterwards, and what of that reached the database."""
    observer = Observer()
    with maker() as db:
        with traffic(engine) as seen:
            described = observer.describe(kind(db, options))
        return described, observer.touch(engine), seen


def answered_twice(maker: sessionmaker[Session], kind: Kind, options: Options) -> Any:
    """The answers of one session to the same statement, one after the other."""
    observer = Observer()
    with maker() as db:
        first = observer.describe(kind(db, options))
        return first, observer.describe(kind(db, options))


def each_kind_on_each_database() -> list[Any]:
    marks = {
        "sqlite": (),
        "postgresql": pytest.mark.server("postgresql"),
        "mariadb": pytest.mark.server("mariadb"),
    }
    return [
        pytest.param(dialect, KINDS[name], id=f"{dialect}-{name}", marks=mark)
        for dialect, mark in marks.items()
        for name in kinds_for(dialect)
    ] + [pytest.param("sqlite", NESTED[name], id=f"sqlite-{name}") for name in NESTED if name not in KINDS]


@pytest.mark.parametrize(("forum", "kind"), each_kind_on_each_database(), indirect=["forum"])
def test_kind(forum: Engine, kind: Kind, cache: QueryCache, sessions: Sessions) -> None:
    maker = sessions(forum)
    uncached, uncached_touch, uncached_traffic = answer(forum, maker, kind, FROM_DATABASE)
    assert not uncached_traffic.nothing
    twice = answered_twice(maker, kind, FROM_DATABASE)
    assert not cache.stats().fills

    missed, missed_touch, missed_traffic = answer(forum, maker, kind, FROM_CACHE)
    assert cache.stats().fills
    assert missed == uncached
    assert missed_touch == uncached_touch
    assert missed_traffic.statements == uncached_traffic.statements

    hit, hit_touch, hit_traffic = answer(forum, maker, kind, FROM_CACHE)
    assert hit == uncached
    assert hit_touch == uncached_touch
    assert hit_traffic.nothing, cache.stats()

    assert answered_twice(maker, kind, FROM_CACHE) == twice
    cache.invalidate(everything=True)
    assert answered_twice(maker, kind, FROM_CACHE) == twice
    assert not cache.stats().bypasses
    assert not cache.stats().errors


def hits_with_the_database_stopped(url: str, store_url: str, stop: Callable[[], None]) -> None:
    """Fill the cache here; stop the database; then get every answer in a process that begins after that."""
    engine = create_engine(url)
    create_and_fill(engine)
    engine.dispose()
    names = kinds_for(engine.dialect.name)
    answers, filled = answers_elsewhere(url, store_url, names)
    assert filled.fills
    stop()
    with Process() as fresh:
        found, stats = fresh.call(answers_elsewhere, url, store_url, names)
    assert found == answers
    assert (stats.hits, stats.misses, stats.bypasses) == (filled.hits + filled.misses, 0, 0)


def test_hits_without_sqlite(tmp_path: Path, redis_cache_url: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    hits_with_the_database_stopped(
        f"sqlite:///{folder / 'forum.db'}", redis_cache_url, lambda: shutil.rmtree(folder)
    )


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("postgresql", marks=pytest.mark.server("postgresql")),
        pytest.param("mariadb", marks=pytest.mark.server("mariadb")),
    ],
)
def test_hits_with_the_server_stopped(
    name: str, private_server: Callable[[str], Server], redis_cache_url: str
) -> None:
    server = private_server(name)
    # Told by its URL, the dialect knows without a connection that it speaks to MariaDB, and what words it quotes.
    url = server.url.replace("mysql+pymysql", "mariadb+pymysql")
    hits_with_the_database_stopped(url, redis_cache_url, server.kill)
