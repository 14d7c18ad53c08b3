"""The pytest plugin: what SQLAlchemy's tests select, they are given from bytes.

Loaded with ``-p tests.sqlalchemy_suite.plugin``, it attaches a cache to every Session, with these changes:

- Everything that is a select asks for the cache, without a word in the statement.
- No answer is ever old: each statement is run against the database, once, and its answer is stored; then it
  is looked up like any other, and the *hit* is what the test is given. So the
  test sees the SQL that it would see anyway, and rows that went through freeze, bytes and replay. The
  post-loads of a statement arrive while its hit is being replayed; theirs take the same way.
- The hit is replayed as in a process that has not asked the database: nothing of the execution is left but what
  went through bytes.
- As no answer is old, nothing that is bypassed for its content or its time is bypassed here: refreshes,
  statements that overwrite what is loaded or that run while the Session flushes, functions like ``now()``,
  and what the transaction itself has written. Writes are noted as ever.

What is left to the database is counted with its reason. Each test's report carries the counts of the test.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine, Result
from sqlalchemy.orm import ORMExecuteState, Session

from querycache import sa_internals
from querycache.codec import Codec, Unstorable
from querycache.declarations import Declarations
from querycache.events import Telemetry
from querycache.frozen import Entry, FrozenStatement, freeze, merge_frozen_result
from querycache.interceptor import Interceptor
from querycache.ledger import DEFAULT_LEASE, Reading
from querycache.load import Load
from querycache.options import CacheOptions
from querycache.phases import Phases
from querycache.regions import Region, Regions
from querycache.requests import Refused, Request, Requests
from querycache.sa_internals import Prepared
from querycache.transactions import Transaction
from querycache.writes import Writes
from tests.sqlalchemy_suite.run import ANSWERED, COMPLETED, PROPERTY

# with a TTL, so that answers are stored that change by themselves
_OPTIONS = CacheOptions(ttl=3600)

_counts: Counter[str] = Counter()
_codec = Codec(FrozenStatement)


def _not_executed(prepared: Prepared) -> Prepared:
    """The statement without the execution context in which the database was asked."""
    return replace(prepared, _context=None, _begun=None)


class _Writes(Writes):
    """Notes what is written, and keeps it from readers."""

    def transactions(
        self, session: Session, bind: Engine | Connection, before_lookup: bool = False
    ) -> list[Transaction]:
        return []


class _Requests(Requests):
    """Asks for the cache with every select, as far as it can be replayed."""

    def wanted(self, state: ORMExecuteState) -> CacheOptions | None:
        return _OPTIONS

    @staticmethod
    def _refuse(state: ORMExecuteState, within: bool = False) -> None:
        statement: Any = state.statement
        if not (statement.is_select or statement.is_from_statement or sa_internals.is_textual(statement)):
            raise Refused("not a select")
        if statement.is_dml:
            raise Refused("not a select")
        if state.is_executemany:
            raise Refused("several parameter sets")
        if not state.session.is_active:
            raise Refused("transaction failed")
        options = sa_internals.effective_options(state)
        load_options = sa_internals.load_options(options)
        if options.get("yield_per") or (load_options is not None and load_options["yield_per"]):
            raise Refused("yield_per")

    def request(self, state: ORMExecuteState, region: Region, options: CacheOptions) -> Request:
        try:
            return super().request(state, region, options)
        except Refused as refusal:
            _counts[str(refusal)] += 1
            raise


class _Replay(Interceptor):
    """Answers every select from the store, filling it just before."""

    def _complete(self, load: Load, state: ORMExecuteState) -> Result[Any] | None:
        result = super()._complete(load, state)
        if result is None:
            _counts[load.spoiled] += 1
        return result

    def _run(self, load: Load, prepared: Prepared) -> tuple[FrozenStatement | None, Result[Any]]:
        """Replay post-loads from bytes also when they are met for the first time."""
        description, rows, rowcount = prepared.execute()
        if prepared.rewritten:
            _counts["rewritten"] += 1
            return None, prepared.replay(description, rows, rowcount)
        try:
            packed = _codec.encode(freeze(description, rows, rowcount))
        except Unstorable as refusal:
            _counts[refusal.reason] += 1
            return None, prepared.replay(description, rows, rowcount)
        frozen = _codec.decode(packed)
        _counts[COMPLETED] += 1
        return frozen, merge_frozen_result(_not_executed(prepared), frozen)

    def _look_up(self, request: Request, may_wait: bool = True) -> Result[Any] | None:
        region = request.region
        reading = region.lookup(request.key, request.tag_keys).reading
        assert reading is not None, "the memory store always answers"
        reading = reading.of(set(request.tag_keys))
        description, rows, rowcount = request.prepared.execute()
        try:
            main = freeze(description, rows, rowcount)
        except Unstorable as refusal:
            _counts[refusal.reason] += 1
            return request.prepared.replay(description, rows, rowcount)
        if not reading.fillable:
            _counts["pending"] += 1
            return request.prepared.replay(description, rows, rowcount)
        refused = region.fill(request.key, Entry(time.time(), main, {}), reading, None, request.tag_keys)
        assert not refused, refused
        _counts[ANSWERED] += 1
        request.prepared = _not_executed(request.prepared)
        request.prepared.begin_replay()  # as while a server is waited for, which the memory store is not
        return super()._look_up(request, may_wait)

    def _ask_database(self, request: Request, reading: Reading | None) -> Result[Any] | None:
        raise AssertionError("what was just stored was not found")


_declared = Declarations()
_telemetry = Telemetry()
_regions = Regions("memory://", namespace="suite", lease=DEFAULT_LEASE, ttl=None, signing_key=None)
_writes = _Writes(_regions, _declared, Phases(_regions, _telemetry, "strict", "available"))
_replay = _Replay(_regions.get, _writes, _declared, _telemetry, None, {})
_listeners = {**_writes.session_listeners(), "do_orm_execute": _replay}


def pytest_configure() -> None:
    _replay._requests = _Requests(_writes, _declared, None, {})
    sa_internals.load_in_order()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    _counts.clear()
    # again for each test, because some remove all listeners of Session when they end
    for name, listener in _listeners.items():
        if not event.contains(Session, name, listener):
            event.listen(Session, name, listener)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    _writes.unwatch()
    item.user_properties.append((PROPERTY, json.dumps(_counts)))
