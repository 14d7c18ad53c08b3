"""Whatever the rows, the statement, its options and the session: with the cache as without.

Each example is lived through without the cache, on a miss, on a hit in the same session, on a hit in a new
session, and on a hit in another process. Compared are rows, types, order, identity, what is loaded, and what
every attribute of every object gives afterwards with the SQL that this takes.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from sqlalchemy import Engine, create_engine, event, select
from sqlalchemy.orm import Session, immediateload, load_only

from querycache import QueryCache
from tests.read_path.models import Base, Post, User
from tests.read_path.observe import traffic
from tests.read_path.process import Process
from tests.read_path.recipes import Performance, Rows, Scenario, perform, put_rows, relatives, rows, scenarios

EXAMPLES = int(os.environ.get("QUERYCACHE_EXAMPLES", "60"))
"""How many are tried. Without a word the same in every run, with QUERYCACHE_EXAMPLES others each time."""

UNCACHED: dict[str, object] = {}
CACHED = {"cache_key": True}


class CachedSession(Session):
    """The sessions that the cache is attached to, here and in the other process."""


@lru_cache
def opened(url: str, store_url: str) -> tuple[Engine, QueryCache]:
    return create_engine(url), QueryCache(store_url).attach(CachedSession)


def perform_elsewhere(url: str, store_url: str, scenario: Scenario) -> Performance:
    engine, _ = opened(url, store_url)
    return perform(engine, CachedSession, scenario, CACHED)


@pytest.fixture
def url(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path / 'drawn.db'}"
    engine = create_engine(url)
    Base.metadata.create_all(engine)
    engine.dispose()
    return url


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")
@settings(
    suppress_health_check=list(HealthCheck),
    phases=set(Phase) - {Phase.explain},
    max_examples=EXAMPLES,
    derandomize="QUERYCACHE_EXAMPLES" not in os.environ,
    database=None,
)
@given(rows=rows(), scenario=scenarios)
def test_with_the_cache_as_without(
    url: str, redis_cache_url: str, process: Process, rows: Rows, scenario: Scenario
) -> None:
    engine, cache = opened(url, redis_cache_url)
    put_rows(engine, rows)
    once = perform(engine, CachedSession, scenario, UNCACHED)
    twice = perform(engine, CachedSession, scenario, UNCACHED, times=2)

    for recipe in relatives(scenario.recipe):
        perform(engine, CachedSession, Scenario(recipe), CACHED)
    with cache.recording() as events:
        assert perform(engine, CachedSession, scenario, CACHED) == once
    filled = "fill" in [event.outcome for event in events]

    with cache.recording() as events:
        hit = perform(engine, CachedSession, scenario, CACHED)
    assert replace(hit, traffic=once.traffic) == once
    if filled:
        assert [event.outcome for event in events] == ["hit"]
        assert not hit.traffic.checkouts
        assert scenario.changes or not hit.traffic.statements

    elsewhere = process.call(perform_elsewhere, url, redis_cache_url, scenario)
    assert elsewhere == hit

    cache.invalidate(everything=True)
    again = perform(engine, CachedSession, scenario, CACHED, times=2)
    assert replace(again, traffic=twice.traffic) == twice


def test_a_deferred_column_that_a_loader_needs_is_part_of_the_answer(own_forum: Engine) -> None:
    """The foreign key was left out; to load the team, SQLAlchemy completes each author by a statement of its own."""
    cache = QueryCache()
    statement = select(Post).options(
        immediateload(Post.author).options(load_only(User.age), immediateload(User.team))
    )
    seen = []
    for _ in range(2):
        with Session(own_forum) as db, cache.attach(db).recording() as events, traffic(own_forum) as found:
            db.scalars(statement, execution_options=CACHED).all()
        seen.append([sql for sql, _ in found.statements])
    assert any("SELECT user_account.team_id" in sql for sql in seen[0])
    assert not seen[1]
    assert [event.outcome for event in events] == ["hit"]


def test_an_expired_object_met_while_loading_is_asked_of_the_database(own_forum: Engine) -> None:
    cache = QueryCache()

    def touch(target: Post, context: object) -> None:
        Session.object_session(target).get_one(User, 1).name  # type: ignore[union-attr]  # noqa: B018

    statement = select(Post).where(Post.id == 1)
    event.listen(Post, "load", touch)
    try:
        for _ in range(2):
            with Session(own_forum) as db, cache.attach(db).recording() as events:
                user = db.get_one(User, 1)
                db.expire(user)
                with traffic(own_forum) as found:
                    db.scalars(statement, execution_options=CACHED).all()
                assert "FROM user_account" in found.statements[-1][0]
    finally:
        event.remove(Post, "load", touch)
    assert [each.outcome for each in events] == ["hit"]
