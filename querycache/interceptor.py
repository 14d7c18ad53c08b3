"""The read path, whole: decide, look up, replay or freeze.

One handler of ``do_orm_execute`` answers every select for which somebody asked the cache:

1. **Decide.** Options of the statement, or a policy of its entity, ask for the cache. Some statements are
   never answered from it (row locks, refreshes, server-side cursors …): they are *bypassed*, with a reason.
2. **Let the others speak.** Handlers registered later may still change the statement (tenant filters!), or
   run it several times (shards). They are run first, and the cache answers each statement that comes out; where
   none does, the answer is a handler's own, and none of the cache's business.
3. **Look up**, in one round trip: the entry, and the versions of the tags on which it depends.
4. **Replay** the entry if its versions still stand; otherwise ask the database, and **freeze** what it
   returns under the versions that were read *before* it was asked.

SQLAlchemy completes objects by further statements (``selectinload`` …). They reach this handler while the
first one is being loaded, which a context variable tells, and are replayed from, or frozen into, its entry. Where a
write has reached only them, the first one is replayed, and the database is asked from the first that was written on.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, cast

from sqlalchemy.engine import Connection, Engine, Result
from sqlalchemy.orm import ORMExecuteState, Session

from querycache import sa_internals
from querycache.codec import Corrupt, Unstorable
from querycache.dependencies import Analysis, Declarations, analyse
from querycache.errors import CacheMiss
from querycache.events import Explanation, Outcome, Telemetry
from querycache.flight import Flights
from querycache.frozen import (
    Entry,
    FrozenStatement,
    canonical_parameters,
    discriminators,
    fingerprint,
    fits,
    freeze,
    layout,
    merge_frozen_result,
)
from querycache.keys import UnkeyableValue, bind_identity, canonical, digest, hashed
from querycache.ledger import Reading
from querycache.options import CacheOptions, FromCache, Policy, RelationshipCache
from querycache.regions import Region
from querycache.sa_internals import Invocation, Plan, Prepared, Unpreparable
from querycache.tables import declared_tags
from querycache.tags import EVERYTHING, key_tag, region_tag, statement_tag, user_tag
from querycache.writes import Transaction, Writes

__all__ = ["Interceptor", "Request"]

# Options under which rows are fetched piece by piece, or objects are overwritten: the caller wants the database.
_DATABASE_ONLY = frozenset({"populate_existing", "yield_per", "stream_results"})


# What a handler makes itself cannot be looked up before that handler has run: it may as well have changed the statement,
# or read what no tag of the statement covers. Once it has run, there is nothing left to save.
_BY_A_HANDLER = "answered by a handler"


class _Bypass(Exception):
    """The statement goes to the database, for the reason given."""


class _Refresh(_Bypass):
    """The statement refreshes an object."""


class _Torn(Exception):
    """The database shows something later than what was replayed already, and by this transaction it must not."""


@dataclass(slots=True)
class Request:
    """A statement that asks for the cache, with all that is known before it is looked up.

    Attributes:
        key: of the answer in the store.
        tags, tag_keys: what the answer depends on, as far as the statement shows; and their keys in the store.
        name: what to call it in events.
        transactions: those that the session takes part in.
    """

    region: Region
    options: CacheOptions
    prepared: Prepared
    key: str
    tags: list[str]
    tag_keys: tuple[str, ...]
    name: str
    transactions: Sequence[Transaction]

    @property
    def session(self) -> Session:
        return self.prepared.invocation.session

    @property
    def bind(self) -> Engine | Connection:
        return self.prepared.invocation.bind


@dataclass(slots=True)
class _Load:
    """A request whose rows are being loaded, and what is gathered for its entry meanwhile.

    Attributes:
        reading: versions of the tags, read before a statement that depends on them was run; None where the server
            did not answer.
        needed: keys of the tags that the answer depends on.
        replays: True where the entry has the statement itself, at least.
        stored: the further statements that the entry has, by fingerprint.
        checks: True where not all of them may stand, or were stored with all tags that they need.
        fallen: keys of the tags under whose present versions they do not stand any more.
        loads: those that it is to have.
        spoiled: why nothing of this may be stored; empty while it may.
        grown: True once the database was asked for a further statement.
    """

    request: Request
    reading: Reading | None
    needed: set[str]
    replays: bool = False
    stored: Mapping[bytes, FrozenStatement] = field(default_factory=dict)
    checks: bool = False
    fallen: frozenset[str] = frozenset()
    loads: dict[bytes, FrozenStatement] = field(default_factory=dict)
    spoiled: str = ""
    grown: bool = False
    _token: Token[_Load | None] | None = None

    def __enter__(self) -> None:
        self._token = _loading.set(self)

    def __exit__(self, *exc_info: object) -> None:
        _loading.reset(cast("Token[_Load | None]", self._token))

    def run(self, prepared: Prepared) -> tuple[FrozenStatement | None, Result[Any]]:
        """Ask the database, freeze what it returns, and load that."""
        description, rows, rowcount = prepared.execute()
        frozen = None
        if prepared.rewritten:
            self.spoiled = "rewritten"
        if not self.unfit:
            try:
                frozen = freeze(description, rows, rowcount)
            except Unstorable as refusal:
                self.spoiled = refusal.reason
        return frozen, prepared.replay(description, rows, rowcount)

    def find(self, mark: bytes, tags: Callable[[], Sequence[str]]) -> FrozenStatement | None:
        """A further statement that the entry has and that still stands.

        None once one was asked of the database: SQLAlchemy asks them one after the other, so a later one never knows
        less than an earlier one.
        """
        frozen = None if self.grown else self.stored.get(mark)
        if frozen is not None and self.checks:
            keys = self.request.region.tag_keys(tags())
            if self.reading is None or not self.fallen.isdisjoint(keys) or not self.reading.names(keys):
                return None
            self.needed.update(keys)
            self.loads[mark] = frozen
        return frozen

    def observe(self, tags: Sequence[str]) -> None:
        """Read the versions of tags not read yet, before the statement runs that depends on them."""
        region = self.request.region
        keys = region.tag_keys(tags)
        self.needed.update(keys)
        if self.reading is not None and not self.needed.issubset(self.reading.tags):
            more = region.observe(keys)
            self.reading = None if more is None else self.reading.union(more)

    @property
    def unfit(self) -> str:
        """Why this cannot be stored, in a word or two; empty where it can."""
        if self.spoiled:
            return self.spoiled
        if self.reading is None:
            return "unavailable"
        return "" if self.reading.of(self.needed).fillable else "pending"


class _Explained(Exception):
    """Carries an explanation out of Session.execute."""

    def __init__(self, explanation: Explanation) -> None:
        self.explanation = explanation


_explaining: ContextVar[bool] = ContextVar("querycache_explaining", default=False)


_MOST_LOADS = 64
"""Where an entry grows by what handlers add to further statements alone, it starts anew at so many of them."""

# The load that runs around the current statement, in this thread or task.
_loading: ContextVar[_Load | None] = ContextVar("querycache_loading", default=None)


class Interceptor:
    """The ``do_orm_execute`` handler of one QueryCache.

    Args:
        region_for: gives the region of a name, the default one for None.
        writes: knows what the transactions of a session have written.
        declared: what the application has said about views, triggers and functions.
        telemetry: is told each decision.
        scope: gives, for a session, a value that keeps answers apart (tenant, locale, role).
        policies: what is cached without a word in the statement, by mapped class.
    """

    def __init__(
        self,
        region_for: Callable[[str | None], Region],
        writes: Writes,
        declared: Declarations,
        telemetry: Telemetry,
        scope: Callable[[Session], object] | None,
        policies: Mapping[type, Policy],
    ) -> None:
        self._region_for = region_for
        self._writes = writes
        self._declared = declared
        self._telemetry = telemetry
        self._scope = scope
        self._policies = {cls: policy.cache_options() for cls, policy in policies.items()}
        self._flights = Flights()
        self._known_options: dict[object, CacheOptions | None] = {}

    def __call__(self, state: ORMExecuteState) -> Result[Any] | None:
        """Answer the statement, or return None to leave it to SQLAlchemy."""
        load = _loading.get()
        if load is not None and load.request.session is state.session:
            if later := sa_internals.later_handlers(state):
                return None if self in later else sa_internals.run_later_handlers(state, self._last)
            if sa_internals.completes(state):
                return self._complete(load, state)
        options = self._wanted(state)
        if options is None and not _explaining.get():
            return None
        if later := sa_internals.later_handlers(state):
            # where the cache is attached to a Session and to its class, the last call is the one that counts
            return None if self in later else self._after_others(state, options)
        return self._answer(state, options)

    def _after_others(self, state: ORMExecuteState, options: CacheOptions | None) -> Result[Any]:
        """Answer each statement that comes out of the handlers registered later: one, or several, or none."""
        came_out: list[ORMExecuteState] = []

        def last(state: ORMExecuteState) -> Result[Any]:
            came_out.append(state)
            return self._last(state)

        result = sa_internals.run_later_handlers(state, last)
        if options is not None and not came_out:
            self._leave(self._region_for(options.region), options, _BY_A_HANDLER)
        return result

    def _last(self, state: ORMExecuteState) -> Result[Any]:
        """Answer the statement after all other handlers have had their say."""
        load = _loading.get()
        if load is not None and load.request.session is state.session and sa_internals.completes(state):
            result = self._complete(load, state)
        else:
            result = self._answer(state, self._wanted(state))
        return sa_internals.run_statement(state) if result is None else result

    def _answer(self, state: ORMExecuteState, options: CacheOptions | None) -> Result[Any] | None:
        if _explaining.get():
            raise _Explained(self._explanation(state, options))
        if options is None:
            return None
        region = self._region_for(options.region)
        try:
            request = self._decide(state, region, options)
        except (_Bypass, UnkeyableValue, Unpreparable) as refusal:
            self._leave(region, options, str(refusal))
            return None
        before = sa_internals.loads_so_far()
        try:
            return self._look_up(request)
        except _Torn:
            sa_internals.expire_loaded_since(request.session, before)
            self._leave(region, options, "snapshot")
            return None

    def _leave(self, region: Region, options: CacheOptions, reason: str) -> None:
        """Leave a statement to the database, where that may be asked."""
        self._telemetry.emit("bypass", region.name, options.name, reason)
        _check_allowed(region, options, reason)

    def explain(self, session: Session, statement: Any) -> Explanation:
        """What would be done with a statement, found by doing it up to the point where it would be answered."""
        token = _explaining.set(True)
        try:
            with session.no_autoflush:
                session.execute(statement)
        except _Explained as explained:
            return explained.explanation
        finally:
            _explaining.reset(token)
        return Explanation(False, _BY_A_HANDLER)

    def _explanation(self, state: ORMExecuteState, options: CacheOptions | None) -> Explanation:
        if options is None:
            return Explanation(False, "no cache_key, no policy")
        region = self._region_for(options.region)
        try:
            request = self._decide(state, region, options)
        except (_Bypass, UnkeyableValue, Unpreparable) as refusal:
            return Explanation(False, str(refusal), region.name)
        lookup = region.lookup(request.key, request.tag_keys, request.options.exact)
        distrust = "" if lookup.reading is None else self._distrust(request, lookup.reading)
        entry = lookup.entry if lookup.outcome == "hit" else None
        return Explanation(
            cacheable=not distrust,
            reason=distrust or lookup.reason or lookup.outcome,
            region=region.name,
            key=request.key,
            tags=tuple(request.tags),
            stored=entry is not None,
            age=None if entry is None else max(0.0, time.time() - entry.created),
            promise=region.promise,
        )

    # --- decide ------------------------------------------------------------------------------------

    def _wanted(self, state: ORMExecuteState) -> CacheOptions | None:
        """What the statement, or the policy of its entity, asks of the cache; None where nobody asks."""
        # Every statement comes through here, cached or not. So there are loops and no generators, and
        # state.execution_options, which is made for whoever asks, is not asked for.
        for name in state.local_execution_options:
            if type(name) is str and name.startswith("cache_"):
                return self._wanted_by_options(state, sa_internals.effective_options(state))
        given, others = sa_internals.given_options(state.statement)
        for name in given:
            if type(name) is str and name.startswith("cache_"):
                if "cache_key" not in given:
                    return self._wanted_by_options(state, given)
                values = tuple(given.items()), tuple(map(type, given.values()))  # True is not 1 here
                try:
                    known = self._known_options.get(values)
                except TypeError:  # a list or a set among the values
                    return CacheOptions.from_execution_options(given)
                if known is None:
                    known = CacheOptions.from_execution_options(given)
                    if len(self._known_options) > 1000:
                        self._known_options.clear()
                    self._known_options[values] = known
                return known
        return self._asked_otherwise(state, others) if others or self._policies else None

    def _wanted_by_options(self, state: ORMExecuteState, options: Mapping[str, Any]) -> CacheOptions | None:
        refined = None
        if "cache_key" not in options:
            refined = self._asked_otherwise(state, sa_internals.given_options(state.statement)[1])
        return CacheOptions.from_execution_options(options, refined)

    def _asked_otherwise(self, state: ORMExecuteState, options: Sequence[Any]) -> CacheOptions | None:
        """What is asked for a statement by its other options, or by a policy."""
        for option in options:
            if isinstance(option, FromCache):
                return option.cache_options
            if isinstance(option, RelationshipCache) and state.is_relationship_load:
                path: Any = state.loader_strategy_path
                if option.applies_to(path[-2], path[-1].key):
                    return option.cache_options
        if self._policies and state.is_select and state.bind_mapper is not None:
            for cls in state.bind_mapper.class_.__mro__:
                if cls in self._policies:
                    return self._policies[cls]
        return None

    def _decide(self, state: ORMExecuteState, region: Region, options: CacheOptions) -> Request:
        """All that is needed to look the statement up.

        Raises:
            _Bypass: no cache can answer this statement.
            UnkeyableValue: a parameter, or the scope, has no canonical form.
            Unpreparable: a parameter has no value.
        """
        if options.mode == "bypass":
            raise _Bypass("mode")
        self._refuse(state)
        session = state.session
        prepared = sa_internals.prepare(Invocation.take(state))
        plan = prepared.plan
        bind = prepared.invocation.bind
        self._writes.watch_bind(bind)
        scope = "" if self._scope is None else canonical(self._scope(session))
        # For a statement that is executed again and again, all of this follows from its plan.
        memo = (self, region, options, scope, self._declared.digest(), self._declared.of_triggers)
        derived: tuple[str, list[str], tuple[str, ...], str] | None = plan.memo.get(memo)
        if derived is None:
            derived = self._derive(region, options, plan, scope)
            if len(plan.memo) > 16:
                plan.memo.clear()
            plan.memo[memo] = derived
        self._refuse_temporary(plan)
        transactions = self._writes.transactions(session, bind, before_lookup=True)
        request = Request(region, options, prepared, *derived, transactions)
        if self._writes.owes(region.ledger):
            raise _Bypass("unavailable")
        for transaction in transactions:
            if transaction.hides(request.tags):
                raise _Bypass("own write")
        return request

    def _derive(
        self, region: Region, options: CacheOptions, plan: Plan, scope: str
    ) -> tuple[str, list[str], tuple[str, ...], str]:
        """The key of an answer, its tags and their keys, and what it is called.

        Raises:
            _Bypass: no cache can answer this statement.
            UnkeyableValue: a parameter has no canonical form.
        """
        analysis = analyse(plan.compiled)
        self._refuse_content(analysis, plan, options)
        key = self._key(region, options, plan, analysis, scope)
        tags = self._tags(region, options, plan, analysis)
        return key, tags, region.tag_keys(tags), options.name or key[-40:-28]

    @staticmethod
    def _refuse(state: ORMExecuteState, within: bool = False) -> None:
        """Raise _Bypass for what no cache can answer, as far as it shows before the statement is compiled."""
        statement: Any = state.statement
        session = state.session
        options = sa_internals.effective_options(state)
        if not (statement.is_select or statement.is_from_statement or sa_internals.is_textual(statement)):
            raise _Bypass("not a select")
        if statement.is_dml:
            raise _Bypass("not a select")
        if state.is_executemany:
            raise _Bypass("several parameter sets")
        if "sa_top_level_orm_context" in options and not within:
            raise _Bypass("part of another load")
        if not session.is_active:
            raise _Bypass("transaction failed")
        if sa_internals.is_flushing(session):
            raise _Bypass("flushing")
        if not _DATABASE_ONLY.isdisjoint(options):
            for name in _DATABASE_ONLY.intersection(options):
                if options[name]:
                    raise _Bypass(name)
        load_options = sa_internals.load_options(options)
        if load_options is not None:
            refreshed = load_options["refresh_state"]
            # A loader may need a column that the statement has deferred: what it asks then is part of the answer.
            if refreshed is not None and (not within or refreshed.expired or refreshed.expired_attributes):
                raise _Refresh("refresh")
            for name in ("populate_existing", "yield_per"):
                if load_options[name]:
                    raise _Bypass(name)

    def _refuse_content(self, analysis: Analysis, plan: Plan, options: CacheOptions) -> None:
        """Raise _Bypass for what no cache can answer, as far as it shows in what the statement says."""
        for name in _DATABASE_ONLY.intersection(plan.options):  # of the connection or the engine
            if plan.options[name]:
                raise _Bypass(name)
        if analysis.locks:
            raise _Bypass("for update")
        if analysis.writes:
            raise _Bypass("not a select")
        if options.ttl is not None:
            return  # an answer that changes by itself, or that nobody can follow, may be kept for a given time
        unstable = analysis.unstable(plan, self._declared)
        if unstable:
            raise _Bypass(f"function {unstable}")
        system = analysis.system_table(self._declared)
        if system:
            raise _Bypass(f"system table {system}")
        if analysis.opaque and not options.tables:
            raise _Bypass("text")

    def _refuse_temporary(self, plan: Plan) -> None:
        """Raise _Bypass for what every connection has a table of its own for."""
        temporary = self._declared.temporary
        if temporary and analyse(plan.compiled).reads_any(temporary):
            raise _Bypass("temporary table")

    def _key(self, region: Region, options: CacheOptions, plan: Plan, analysis: Analysis, scope: str) -> str:
        declared = self._declared.digest()
        if options.exact:
            schemas = canonical(dict(plan.schema_translate_map))
            identity = bind_identity(plan.engine)
            return region.entry_key(digest((region.name, options.name, scope, identity, schemas, declared)))
        # Parameters apart, all of it is the same for a statement that is built anew for each execution.
        memo = (self, region, options, scope, plan.engine, plan.sql, declared)
        begun: blake2b | None = plan.shared_memo.get(memo)
        if begun is None:
            parts = (
                analysis.structure,
                bind_identity(plan.engine),
                plan.sql,
                options.name,
                scope,
                # Regions may share a store; and who names a tag must not be given an answer that was stored without it.
                region.name,
                canonical(frozenset(options.tags)),
                canonical(frozenset(options.tables)),
                # Who asks for a short time must not be given what was stored for a long one.
                canonical(options.ttl),
                # What was stored by who knew less of views and triggers may not have the tags that it needs.
                declared,
            )
            begun = hashed(parts, blake2b(digest_size=20))
            if len(plan.shared_memo) > 64:
                plan.shared_memo.clear()
            plan.shared_memo[memo] = begun
        parameters = canonical_parameters(plan), discriminators(plan)
        return region.entry_key(hashed(parameters, begun.copy()).digest())

    def _tags(self, region: Region, options: CacheOptions, plan: Plan, analysis: Analysis) -> list[str]:
        tags = [EVERYTHING, region_tag(region.name), statement_tag(analysis.structure)]
        if isinstance(options.key, str):
            tags.append(key_tag(options.key))
        tags.extend(map(user_tag, options.tags))
        tags.extend(declared_tags(self._declared.closure(options.tables)) if options.tables else ())
        tags.extend(analysis.tags(plan, self._declared))
        return tags

    # --- look up -----------------------------------------------------------------------------------

    def _look_up(self, request: Request, may_wait: bool = True) -> Result[Any] | None:
        region, options = request.region, request.options
        lookup = region.lookup(request.key, request.tag_keys, options.exact, request.prepared.begin_replay)
        outcome, reason, entry, reading = lookup.outcome, lookup.reason, lookup.entry, lookup.reading
        if reading is not None:
            distrust = self._distrust(request, reading)
            if distrust:
                self._leave(region, options, distrust)
                return None
        if options.mode == "refresh":
            outcome, reason, entry = "miss", "refresh", None
        elif entry is not None and options.exact and not fits(entry, request.prepared):
            warnings.warn(
                f"cache_exact: what is stored under {request.name!r} does not have the columns of the "
                "statement that asks for it, so the database was asked. Give each kind of row its own cache_key",
                RuntimeWarning,
                stacklevel=2,
            )
            outcome, reason, entry = "miss", "layout", None
            # valid by its own tags; those of this statement may never have been looked up
            reading = region.observe(request.tag_keys)
        if entry is not None and reading is not None and not reading.fallen:
            try:
                result = self._replay(request, entry, reading)
            except Corrupt as fault:
                outcome, reason, entry = "miss", fault.reason, None
            else:
                self._telemetry.emit("hit", region.name, request.name)
                return result
        if options.mode == "only":
            self._telemetry.emit(outcome, region.name, request.name, reason)
            _check_allowed(region, options, reason or outcome)
        if reading is None:
            self._telemetry.emit(outcome, region.name, request.name, reason)
            return self._ask_database(request, reading)
        flight = (region.name, request.key, reading.versions)
        if may_wait and sa_internals.may_block() and self._flights.wait(flight):
            return self._look_up(request, may_wait=False)
        self._telemetry.emit(outcome, region.name, request.name, reason)
        with self._flights.flying(flight):
            if entry is not None:
                with suppress(Corrupt):
                    return self._replay(request, entry, reading)
            return self._ask_database(request, reading)

    @staticmethod
    def _distrust(request: Request, reading: Reading) -> str:
        """Why this session's transaction must not be answered from the cache; empty where it may."""
        ledger = request.region.ledger
        for transaction in request.transactions:
            if transaction.snapshot is not None and transaction.snapshot.get(ledger) != (
                reading.witness or -1
            ):
                return "snapshot"
            if transaction.tags and not set(request.region.tag_keys(transaction.tags)).isdisjoint(
                reading.tags
            ):
                return "own write"
        return ""

    # --- replay, or ask the database and freeze ------------------------------------------------------

    def _replay(self, request: Request, entry: Entry, reading: Reading) -> Result[Any]:
        # which triggers there are may not have been known to the process that has stored it
        checks = bool(reading.fallen or self._declared.of_triggers)
        load = _Load(request, reading, set(request.tag_keys), True, entry.loads, checks, reading.fallen)
        sa_internals.autobegin(request.session)
        with load:
            result = merge_frozen_result(request.prepared, entry.main)
        if load.grown:
            if not reading.fallen and len(entry.loads) + len(load.loads) <= _MOST_LOADS:
                load.loads = {**entry.loads, **load.loads}
                load.needed.update(reading.tags)
            self._fill(load, entry.main, entry.created)
        return result

    def _ask_database(self, request: Request, reading: Reading | None) -> Result[Any]:
        load = _Load(request, reading, set(request.tag_keys))
        created = time.time()
        with load:
            main, result = load.run(request.prepared)
        self._fill(load, main, created)
        return result

    def _complete(self, load: _Load, state: ORMExecuteState) -> Result[Any] | None:
        """Answer a statement that SQLAlchemy runs to complete the objects of the surrounding load."""
        try:
            self._refuse(state, within=True)
            prepared = sa_internals.prepare(Invocation.take(state))
            self._writes.watch_bind(prepared.invocation.bind)
            analysis = analyse(prepared.plan.compiled)
            self._refuse_content(analysis, prepared.plan, load.request.options)
            self._refuse_temporary(prepared.plan)
            mark = fingerprint(prepared.plan)
        except _Refresh:
            return None  # not part of the answer, but of what the application does with it
        except (_Bypass, UnkeyableValue, Unpreparable) as refusal:
            load.spoiled, load.grown = str(refusal), True
            _check_allowed(load.request.region, load.request.options, load.spoiled)
            return None
        stored = load.find(mark, lambda: analysis.tags(prepared.plan, self._declared))
        if stored is not None:
            return merge_frozen_result(prepared, stored)
        _check_allowed(load.request.region, load.request.options, "incomplete")
        load.observe(analysis.tags(prepared.plan, self._declared))
        load.grown = True
        frozen, result = load.run(prepared)
        if load.replays and self._is_torn(load):
            raise _Torn
        if frozen is not None:
            load.loads[mark] = frozen
        return result

    def _is_torn(self, load: _Load) -> bool:
        """True if a snapshot of the database has begun meanwhile, and may be of another state than what was replayed."""
        request, reading = load.request, load.reading
        before = request.transactions
        request.transactions = self._writes.transactions(request.session, request.bind)
        for transaction in request.transactions:
            if transaction.snapshot is not None and not any(transaction is each for each in before):
                witness = request.region.ledger.quiet()
                return witness is None or reading is None or witness != reading.witness
        return False

    def _fill(self, load: _Load, main: FrozenStatement | None, created: float) -> None:
        request = load.request
        outcome: Outcome = "bypass"
        reason = load.unfit or self._unfit_transaction(request, load.reading)
        seconds = request.region.seconds_left(request.options.ttl, created)
        if seconds == 0 and not reason:
            reason = "expired"
        if main is not None and load.reading is not None and not reason:
            shape = layout(request.prepared.invocation.statement) if request.options.exact else ""
            entry = Entry(created, main, load.loads, shape)
            reading = load.reading.of(load.needed)
            reason = request.region.fill(request.key, entry, reading, seconds, request.tag_keys)
            outcome = "error" if reason else "fill"
        self._telemetry.emit(outcome, request.region.name, request.name, reason)

    def _unfit_transaction(self, request: Request, reading: Reading | None) -> str:
        """Why what this session's transaction has read must not be shared; empty where it may."""
        request.transactions = self._writes.transactions(request.session, request.bind)
        for transaction in request.transactions:
            if transaction.wrote:
                return "after write"
        if sa_internals.reads_uncommitted(request.session):
            return "uncommitted"
        return self._distrust(request, reading) if reading is not None else ""


def _check_allowed(region: Region, options: CacheOptions, reason: str) -> None:
    """Raise CacheMiss where the database may not be asked."""
    if options.mode == "only":
        raise CacheMiss(
            f"region {region.name!r} has no answer for {options.name!r} ({reason}), and cache_mode='only' forbids to "
            "ask the database"
        )
