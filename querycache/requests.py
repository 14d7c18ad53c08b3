"""What asks for the cache, and what is asked: the first half of the read path, before anything is looked up.

Options of a statement, or a policy of its entity, ask for the cache. Some statements are never answered from it (row
locks, refreshes, server-side cursors …): they are refused, with a reason. For the others the key of the answer and its
tags are found, from the statement as it is compiled and its parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any, TypeVar

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import ORMExecuteState, Session

from querycache import dependencies, sa_internals
from querycache.analysis import Analysis, analyse
from querycache.databases import bind_identity, own_database
from querycache.declarations import Declarations
from querycache.frozen import canonical_parameters, discriminators, fingerprint, how_given
from querycache.keys import UnkeyableValue, canonical, digest, hashed
from querycache.options import CacheOptions, FromCache, Policy, RelationshipCache
from querycache.regions import Region
from querycache.sa_internals import Invocation, Plan, Prepared, Unpreparable
from querycache.tables import declared_tags
from querycache.tags import EVERYTHING, key_tag, region_tag, statement_tag, user_tag
from querycache.transactions import Transaction
from querycache.writes import Writes

__all__ = ["ByKey", "Completion", "Refresh", "Refused", "Request", "Requests"]

# Options under which rows are fetched piece by piece, or objects are overwritten: the caller wants the database.
_DATABASE_ONLY = frozenset({"populate_existing", "yield_per", "stream_results"})


_T = TypeVar("_T")


class Refused(Exception):
    """The statement goes to the database, for the reason given.

    Attributes:
        flushed: True if the session was flushed for it.
    """

    flushed = False


class Refresh(Refused):
    """The statement refreshes an object."""


@dataclass(slots=True)
class Request:
    """A statement that asks for the cache, with all that is known before it is looked up.

    Attributes:
        key: of the answer in the store.
        tags, tag_keys: what the answer depends on, as far as the statement shows; and their keys in the store.
        name: what to call it in events.
        scope: what keeps answers apart by the session that asks.
        transactions: those that the session takes part in.
    """

    region: Region
    options: CacheOptions
    prepared: Prepared
    key: str
    tags: list[str]
    tag_keys: tuple[str, ...]
    name: str
    scope: str
    transactions: Sequence[Transaction]

    @property
    def invocation(self) -> Invocation:
        return self.prepared.invocation

    @property
    def session(self) -> Session:
        return self.invocation.session

    @property
    def bind(self) -> Engine | Connection:
        return self.invocation.bind


@dataclass(slots=True)
class Completion:
    """A statement by which SQLAlchemy completes the objects of another.

    Attributes:
        mark: tells it from the others in an entry, 16 bytes.
        tags: gives what it depends on.
    """

    prepared: Prepared
    mark: bytes
    tags: Callable[[], Sequence[str]]


@dataclass(slots=True)
class ByKey:
    """What a completion asks, where each of its rows is there for its key alone.

    Attributes:
        family: the same for all that differ by their keys only, and complete the answers to one statement.
        place: of the key among the columns.
        common: keys in the store of the tags on which all rows depend, those of the answers that they complete included.
        own: by key of a row, those of the tags on which it depends by itself.
    """

    family: bytes
    place: int
    common: tuple[str, ...]
    own: Mapping[object, tuple[str, ...]]


_asking_for_scope: ContextVar[bool] = ContextVar("querycache_asking_for_scope", default=False)


class Requests:
    """Makes requests of statements.

    Args:
        writes: knows what the transactions of a session have written.
        declared: what the application has said about views, triggers and functions.
        scope: gives, for a session, a value that keeps answers apart (tenant, locale, role).
        policies: what is cached without a word in the statement, by mapped class.
    """

    def __init__(
        self,
        writes: Writes,
        declared: Declarations,
        scope: Callable[[Session], object] | None,
        policies: Mapping[type, Policy],
    ) -> None:
        self._writes = writes
        self._declared = declared
        self._scope = scope
        self._policies = {cls: policy.cache_options() for cls, policy in policies.items()}
        self._known_options: dict[object, CacheOptions | None] = {}

    def wanted(self, state: ORMExecuteState) -> CacheOptions | None:
        """What the statement, or the policy of its entity, asks of the cache; None where nobody asks."""
        if self._scope is not None and _asking_for_scope.get():
            return None  # its key would need the scope
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
                # True is not 1 here; and what is the application's own is neither compared nor kept
                values = tuple(
                    [
                        (name, value, type(value))
                        for name, value in given.items()
                        if type(name) is str and name.startswith("cache_")
                    ]
                )
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
        if "sa_top_level_orm_context" in options and "cache_exact" in options:
            # What completes the objects of a statement has options of that and of the Session, which need not fit together.
            options = {name: value for name, value in options.items() if name != "cache_exact"}
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

    def request(self, state: ORMExecuteState, region: Region, options: CacheOptions) -> Request:
        """All that is needed to look the statement up.

        Raises:
            Refused: no cache can answer this statement.
        """
        if options.mode == "bypass":
            raise Refused("mode")
        self._refuse(state)
        try:
            return self._flushed(state, region, options)
        except Refused as refusal:
            refusal.flushed = True
            raise

    def _flushed(self, state: ORMExecuteState, region: Region, options: CacheOptions) -> Request:
        """The same for a statement of which nothing speaks against it; the session is flushed, as SQLAlchemy does then."""
        session = state.session
        try:
            prepared = self._prepare(state)
            plan, bind = prepared.plan, prepared.invocation.bind
            scope = "" if self._scope is None else self._scope_of(session)
            # For a statement that is executed again and again, all of this follows from its plan.
            memo = (self, region, options, scope, *self._besides(plan))
            derived: tuple[str, list[str], tuple[str, ...], str] | None = plan.memo.get(memo)
            if derived is None:
                derived = _remember(plan, memo, self._derive(region, options, plan, scope))
        except (UnkeyableValue, Unpreparable) as refusal:
            raise Refused(str(refusal)) from refusal
        self._refuse_temporary(plan)
        transactions = self._writes.transactions(session, bind, before_lookup=True)
        request = Request(region, options, prepared, *derived, scope, transactions)
        if self._writes.phases.owes(region.ledger):
            raise Refused("unavailable")
        for transaction in transactions:
            if transaction.hides(request.tags):
                raise Refused("own write")
        return request

    def completion(self, state: ORMExecuteState, request: Request) -> Completion:
        """The same for a statement that completes the objects of another.

        Raises:
            Refresh: it is not part of the answer, but of what the application does with it.
            Refused: no cache can answer it.
        """
        try:
            self._refuse(state, within=True)
            prepared, options = self._prepare(state), request.options
            prepared.invocation.load = request.invocation.load
            plan = prepared.plan
            analysis = analyse(plan.compiled)
            # what follows from the plan alone is remembered by it, as for _request()
            memo = ("completion", self, options, *self._besides(plan))
            mark: bytes | None = plan.memo.get(memo)
            if mark is None:
                self._refuse_content(analysis, plan, options)
                mark = _remember(plan, memo, fingerprint(plan))
            self._refuse_temporary(plan)
            return Completion(prepared, mark, partial(dependencies.tags, analysis, plan, self._declared))
        except (UnkeyableValue, Unpreparable) as refusal:
            raise Refused(str(refusal)) from refusal

    def by_key(self, request: Request, asked: Completion) -> ByKey | None:
        """What a completion asks by key; None where its rows must not complete other answers."""
        region, options, plan = request.region, request.options, asked.prepared.plan
        if options.ttl is not None or region.ttl is not None:
            return None  # who has asked for a short time must not be given what another has asked long ago
        analysis = analyse(plan.compiled)
        place, own = analysis.key_place, dependencies.tags_by_key(analysis, plan, self._declared)
        if place is None or own is None:
            return None
        main = analyse(request.prepared.plan.compiled)
        family = self._begin_key(region, options, request.prepared.plan, main, request.scope).copy()
        try:
            schemas = canonical(dict(plan.schema_translate_map))
        except UnkeyableValue:
            return None
        hashed((plan.compiled.string, bind_identity(plan.engine), schemas), family)
        tags = {
            *self._tags_of_answer(region, options, main),
            *dependencies.tags(analysis, plan, self._declared),
        }
        common = region.tag_keys(sorted(tags.difference(*own.values())))
        keys = {key: region.tag_keys(each) for key, each in own.items()}
        return ByKey(family.digest(), place, common, keys)

    def _scope_of(self, session: Session) -> str:
        asking = _asking_for_scope.set(True)
        try:
            return canonical(self._scope(session))  # type: ignore[misc]
        finally:
            _asking_for_scope.reset(asking)

    def _besides(self, plan: Plan) -> tuple[object, ...]:
        """What further goes into a key and tags, and does not follow from a plan."""
        database = own_database(plan.engine)
        if database is None:
            raise Refused("several databases")
        return database, self._declared.digest, self._declared.of_triggers, sa_internals.declared()

    def _derive(
        self, region: Region, options: CacheOptions, plan: Plan, scope: str
    ) -> tuple[str, list[str], tuple[str, ...], str]:
        """The key of an answer, its tags and their keys, and what it is called.

        Raises:
            Refused: no cache can answer this statement.
            UnkeyableValue: a parameter has no canonical form.
        """
        analysis = analyse(plan.compiled)
        self._refuse_content(analysis, plan, options)
        key = self._key(region, options, plan, analysis, scope)
        tags = self._tags(region, options, plan, analysis)
        return key, tags, region.tag_keys(tags), options.name or key[-40:-28]

    @staticmethod
    def _refuse(state: ORMExecuteState, within: bool = False) -> None:
        """Raise Refused for what no cache can answer, as far as it shows before the statement is compiled."""
        statement: Any = state.statement
        session = state.session
        options = sa_internals.effective_options(state)
        if not (statement.is_select or statement.is_from_statement or sa_internals.is_textual(statement)):
            raise Refused("not a select")
        if statement.is_dml:
            raise Refused("not a select")
        if state.is_executemany:
            raise Refused("several parameter sets")
        given: Any = state.parameters
        if given is not None and not isinstance(given, Mapping):
            sets = given if isinstance(given, (list, tuple)) else (given,)
            if not all(isinstance(each, Mapping) for each in sets):
                raise Refused("parameters")  # the execution will raise the reason
        if "sa_top_level_orm_context" in options and not within:
            raise Refused("part of another load")
        if not session.is_active or sa_internals.is_broken(session):
            raise Refused("transaction failed")
        if sa_internals.is_flushing(session):
            raise Refused("flushing")
        if not _DATABASE_ONLY.isdisjoint(options):
            for name in _DATABASE_ONLY.intersection(options):
                if options[name]:
                    raise Refused(name)
        load_options = sa_internals.load_options(options)
        if load_options is not None:
            refreshed = load_options["refresh_state"]
            # A loader may need a column that the statement has deferred: what it asks then is part of the answer.
            if refreshed is not None and (not within or refreshed.expired or refreshed.expired_attributes):
                raise Refresh("refresh")
            for name in ("populate_existing", "yield_per"):
                if load_options[name]:
                    raise Refused(name)

    def _prepare(self, state: ORMExecuteState) -> Prepared:
        """The statement, ready to run on a database whose writes are noticed from now on.

        Raises:
            Refused: it is for a driver of asyncio, whose results are made otherwise; or its database or connection is to be
                asked itself.
            Unpreparable: it cannot be compiled ahead of its execution.
        """
        invocation = Invocation.take(state)
        bind = invocation.bind
        if invocation.engine.dialect.is_async:
            raise Refused("asyncio")
        prepared = sa_internals.prepare(invocation)
        if isinstance(bind, Connection):
            self._refuse_connection(state.session, bind)
        if self._writes.watch_bind(bind) and "isolation_level" not in prepared.plan.options:
            raise Refused("serializable")
        return prepared

    @staticmethod
    def _refuse_connection(session: Session, bind: Connection) -> None:
        """Raise Refused for what the execution will raise on a connection that a Session was given, or begin there."""
        if sa_internals.is_unusable(bind):
            raise Refused("connection closed" if bind.closed else "transaction failed")
        if session.twophase and sa_internals.checked_out(session, bind) is None:
            raise Refused("two-phase")

    def _refuse_content(self, analysis: Analysis, plan: Plan, options: CacheOptions) -> None:
        """Raise Refused for what no cache can answer, as far as it shows in what the statement says."""
        for name in _DATABASE_ONLY.intersection(plan.options):  # of the connection or the engine
            if plan.options[name]:
                raise Refused(name)
        if (
            str(plan.options.get("isolation_level")).upper() == "SERIALIZABLE"
            and plan.engine.dialect.name != "sqlite"
        ):
            raise Refused("serializable")  # the database wants to know what is read
        if analysis.locks:
            raise Refused("for update")
        if analysis.writes:
            raise Refused("not a select")
        if dependencies.in_temporary_schema(analysis, plan):
            raise Refused("temporary table")
        if options.ttl is not None:
            return  # an answer that changes by itself, or that nobody can follow, may be kept for a given time
        unstable = dependencies.unstable_function(analysis, plan, self._declared)
        if unstable:
            raise Refused(f"function {unstable}")
        system = dependencies.system_table(analysis, plan, self._declared)
        if system:
            raise Refused(f"system table {system}")
        if analysis.opaque and not options.tables:
            raise Refused("text")

    def _refuse_temporary(self, plan: Plan) -> None:
        """Raise Refused for what every connection has a table of its own for."""
        temporary = self._declared.temporary
        if temporary and analyse(plan.compiled).reads_any(temporary):
            raise Refused("temporary table")

    def _key(self, region: Region, options: CacheOptions, plan: Plan, analysis: Analysis, scope: str) -> str:
        declared = self._declared.digest
        if options.exact:
            schemas = canonical(dict(plan.schema_translate_map))
            identity = bind_identity(plan.engine)
            return region.entry_key(digest((region.name, options.name, scope, identity, schemas, declared)))
        begun = self._begin_key(region, options, plan, analysis, scope)
        parameters = canonical_parameters(plan), discriminators(plan), how_given(plan)
        return region.entry_key(hashed(parameters, begun.copy()).digest())

    def _begin_key(
        self, region: Region, options: CacheOptions, plan: Plan, analysis: Analysis, scope: str
    ) -> blake2b:
        """All of a key but the parameters, which is the same for a statement that is built anew for each execution."""
        declared = self._declared.digest
        identity = bind_identity(plan.engine)
        memo = (self, region, options, scope, identity, plan.sql, declared)
        begun: blake2b | None = plan.shared_memo.get(memo)
        if begun is None:
            parts = (
                analysis.structure,
                identity,
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
        return begun

    def _tags(self, region: Region, options: CacheOptions, plan: Plan, analysis: Analysis) -> list[str]:
        return [
            *self._tags_of_answer(region, options, analysis),
            *dependencies.tags(analysis, plan, self._declared),
        ]

    def _tags_of_answer(self, region: Region, options: CacheOptions, analysis: Analysis) -> list[str]:
        """The tags of an answer that do not follow from what it reads."""
        tags = [EVERYTHING, region_tag(region.name), statement_tag(analysis.structure)]
        if isinstance(options.key, str):
            tags.append(key_tag(options.key))
        tags.extend(map(user_tag, options.tags))
        tags.extend(declared_tags(self._declared.closure(options.tables)) if options.tables else ())
        return tags


def _remember(plan: Plan, memo: object, value: _T) -> _T:
    if len(plan.memo) > 16:
        plan.memo.clear()
    plan.memo[memo] = value
    return value
