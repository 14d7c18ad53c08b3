"""Whatever the rows, the statement, its options and the session: with the cache as without.

Each example is lived through without the cache, on a miss, on a hit in the same session, on a hit in a new
session, and on a hit in another process. Compared are rows, types, order, identity, what is loaded, and what
every attribute of every object gives afterwards with the SQL that this takes.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import Session

from querycache import QueryCache
from tests.read_path.models import Base
from tests.read_path.process import Process
from tests.read_path.recipes import Performance, Rows, Scenario, perform, put_rows, rows, scenarios

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
@settings(suppress_health_check=list(HealthCheck), phases=set(Phase) - {Phase.explain}, max_examples=120)
@given(rows=rows(), scenario=scenarios)
def test_with_the_cache_as_without(
    url: str, redis_cache_url: str, process: Process, rows: Rows, scenario: Scenario
) -> None:
    engine, cache = opened(url, redis_cache_url)
    put_rows(engine, rows)
    once = perform(engine, CachedSession, scenario, UNCACHED)
    twice = perform(engine, CachedSession, scenario, UNCACHED, times=2)

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
