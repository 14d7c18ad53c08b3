"""The pytest plugin: what SQLAlchemy's tests select, they are given from bytes.

Loaded with ``-p tests.sqlalchemy_suite.plugin``, it attaches the interceptor of querycache to every Session,
with three things changed:

- Everything that is a select asks for the cache, without a word in the statement.
- No answer is ever old: each statement is run against the database, once, and its answer is stored; then it
  is looked up like any other, with ``cache_mode="only"``, and the *hit* is what the test is given. So the
  test sees the SQL that it would see anyway, and rows that went through freeze, bytes and replay. The
  post-loads of a statement arrive while its hit is being replayed; theirs take the same way.
- Refreshes, and statements that overwrite what is loaded, are answered too, although no application has them
  answered from the cache: they are further ways in which rows are loaded.

What is left to the database is counted with its reason. Each test's report carries the counts of the test.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Result
from sqlalchemy.orm import ORMExecuteState, Session

from querycache import interceptor, sa_internals
from querycache.codec import Codec, Unstorable
from querycache.events import Telemetry
from querycache.frozen import Entry, FrozenStatement, freeze, merge_frozen_result
from querycache.interceptor import Interceptor, Request
from querycache.ledger import DEFAULT_LEASE
from querycache.options import CacheOptions
from querycache.regions import Regions
from querycache.sa_internals import Prepared
from tests.sqlalchemy_suite.run import ANSWERED, COMPLETED, PROPERTY

_counts: Counter[str] = Counter()
_codec = Codec(FrozenStatement)


class _Load(interceptor._Load):
    """A load whose post-loads are replayed from bytes, also when they are met for the first time."""

    __slots__ = ()

    def run(self, prepared: Prepared) -> tuple[FrozenStatement | None, Result[Any]]:
        description, rows, rowcount = prepared.execute()
        try:
            packed = _codec.encode(freeze(description, rows, rowcount))
        except Unstorable as refusal:
            _counts[refusal.reason] += 1
            return None, prepared.replay(description, rows, rowcount)
        frozen = _codec.decode(packed)
        _counts[COMPLETED] += 1
        return frozen, merge_frozen_result(prepared, frozen)


class _Replay(Interceptor):
    """Answers every select from the store, filling it just before."""

    def _wanted(self, state: ORMExecuteState) -> CacheOptions | None:
        return CacheOptions(mode="only")

    @staticmethod
    def _refuse(state: ORMExecuteState, within: bool = False) -> None:
        if not (state.is_select or state.is_from_statement) or state.statement.is_dml:
            raise interceptor._Bypass("not a select")
        if state.is_executemany:
            raise interceptor._Bypass("several parameter sets")
        if not state.session.is_active:
            raise interceptor._Bypass("transaction failed")
        options = sa_internals.effective_options(state)
        if options.get("yield_per") or sa_internals.load_option(options, "yield_per"):
            raise interceptor._Bypass("yield_per")

    def _answer(self, state: ORMExecuteState) -> Result[Any] | None:
        with self._telemetry.recording() as events:
            result = super()._answer(state)
        if result is None:
            load = self._surrounding(state)
            _counts[events[-1].reason if load is None else load.spoiled] += 1
        return result

    def _look_up(self, request: Request) -> Result[Any]:
        region = request.region
        reading = region.lookup(request.key, request.tags).reading
        description, rows, rowcount = request.prepared.execute()
        try:
            main = freeze(description, rows, rowcount)
        except Unstorable as refusal:
            _counts[refusal.reason] += 1
            return request.prepared.replay(description, rows, rowcount)
        assert reading is not None, "the memory store always answers"
        refused = region.fill(request.key, Entry(time.time(), main, {}), reading, None)
        assert not refused, refused
        _counts[ANSWERED] += 1
        return super()._look_up(request)


_regions = Regions("memory://", namespace="suite", lease=DEFAULT_LEASE, ttl=None, signing_key=None)
_replay = _Replay(_regions.get, Telemetry(), None, {})


def pytest_configure() -> None:
    interceptor._Load = _Load  # type: ignore[misc]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    _counts.clear()
    # again for each test, because some remove all listeners of Session when they end
    if not event.contains(Session, "do_orm_execute", _replay):
        event.listen(Session, "do_orm_execute", _replay)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    item.user_properties.append((PROPERTY, json.dumps(_counts)))
