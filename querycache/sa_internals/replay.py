"""A statement, compiled and with its parameters, that is executed or replayed over stored rows.

A :class:`~sqlalchemy.engine.CursorResult` needs an execution context, and an execution context needs a connection only
to open a cursor. So a context is built over a *replay connection*, whose cursor hands out rows that were stored earlier.
From there on everything is SQLAlchemy's own: result metadata, result processors, the ORM's loader.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from itertools import chain, islice
from typing import Any, cast
from uuid import UUID

import sqlalchemy
from sqlalchemy import util
from sqlalchemy.engine import ChunkedIteratorResult, Connection, CursorResult, Dialect, Engine, Result
from sqlalchemy.orm import ORMExecuteState, Session
from sqlalchemy.orm.identity import IdentityMap
from sqlalchemy.sql import ClauseElement
from sqlalchemy.sql.compiler import WARN_LINTING, SQLCompiler
from sqlalchemy.sql.elements import BindParameter

from querycache.sa_internals.dialect import Row, sent
from querycache.sa_internals.handlers import uninterpreted_options, untouched

__all__ = [
    "Invocation",
    "Plan",
    "Prepared",
    "Unpreparable",
    "prepare",
]


class _ReplayCursor:
    """A DBAPI cursor over stored rows; only what SQLAlchemy calls once a statement was executed."""

    arraysize = 1
    lastrowid = None

    def __init__(self) -> None:
        self.description: Sequence[Sequence[Any]] | None = None
        self.rowcount = -1
        self.rows: Iterator[Row] = iter(())

    def fetchone(self) -> Row | None:
        return next(self.rows, None)

    def fetchmany(self, size: int | None = None) -> list[Row]:
        return [row for _, row in zip(range(size or self.arraysize), self.rows, strict=False)]

    def fetchall(self) -> list[Row]:
        return list(self.rows)

    def close(self) -> None:
        pass


class _ReplayConnection:
    """Stands where an execution context expects a Connection and its DBAPI connection."""

    _echo = False
    closed = False

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.dialect = engine.dialect

    def cursor(self, *args: Any, **kwargs: Any) -> _ReplayCursor:
        return _ReplayCursor()

    def _safe_close_cursor(self, cursor: Any) -> None:
        pass


# but for those that MySQL executes
_COMMENT = re.compile(r"/\*(?!!).*?\*/|--[^\n]*", re.DOTALL)


def _same_sql(executed: str, prepared: str) -> bool:
    """True where nothing but comments was added before and after, as tracing does."""
    if executed == prepared:
        return True
    before, found, after = executed.partition(prepared)
    return bool(found) and not _COMMENT.sub("", before + "\n" + after).strip()


def _same_parameters(executed: Any, prepared: Any) -> bool:
    """True for equal parameters, where wrappers of a driver (psycopg's Jsonb, Binary) equal by content."""
    if executed == prepared:
        return True
    if len(executed) != len(prepared):
        return False
    if isinstance(executed, Mapping):
        pairs = [(value, prepared.get(name)) for name, value in executed.items()]
    else:
        pairs = list(zip(executed, prepared, strict=True))
    return all(
        one == other or (type(one) is type(other) and hasattr(one, "obj") and one.obj == other.obj)
        for one, other in pairs
    )


@dataclass(slots=True, eq=False)
class Plan:
    """A compiled statement with the values of its parameters: all of an execution that no session is needed for.

    Attributes:
        values: parameters by name, as the application gave them.
        sql, parameters: what the driver is given; together with the database they determine the rows.
        compiled_cache: where the compiled statement was looked for.
        reused: True once a statement was executed again.
        memo: for callers, to remember what follows from the plan.
        shared_memo: to remember what follows from the statement's structure, whatever its parameters.
    """

    engine: Engine
    statement: Any
    compiled: SQLCompiler
    options: Mapping[str, Any]
    extracted: Sequence[BindParameter[Any]]
    cache_hit: Any
    param_dict: Sequence[Any]
    given: Mapping[str, Any]
    compiled_cache: Any
    values: Mapping[str, Any] = field(default_factory=dict)
    sql: str = ""
    parameters: Any = None
    reused: bool = False
    memo: dict[Any, Any] = field(default_factory=dict)
    _template: CursorResult[Any] | None = None

    def cursor_result(self, description: Sequence[Sequence[Any]]) -> CursorResult[Any]:
        """A result over a replay connection, which has columns of this description and no rows yet.

        To make one takes as long as to load a row, so where the plan is used again one is kept, and copied.
        """
        template = self._template
        if template is not None and template.context.cursor.description == description:
            return _copy(template)
        context = self.context()
        context.cursor.description = description
        result: CursorResult[Any] = context._setup_result_proxy()
        if self.reused and _ROWS_FIRST.isdisjoint(self.options) and not result._echo:
            self._template = result
            return _copy(result)
        return result

    def context(self) -> Any:
        """A new execution context over a replay connection."""
        dialect: Any = self.engine.dialect
        connection = _ReplayConnection(self.engine)
        return dialect.execution_ctx_cls._init_compiled(
            dialect,
            connection,
            connection,
            self.options,
            self.compiled,
            [dict(self.given)] if self.given else [],
            self.statement,
            self.extracted,
            cache_hit=self.cache_hit,
            **({"param_dict": self.param_dict[0]} if self.param_dict else {}),
        )

    def serves(self, statement: Any, engine: Engine, options: Mapping[str, Any], compiled_cache: Any) -> bool:
        """True if this is the plan of a statement that is executed without parameters apart from its own."""
        return (
            self.statement is statement
            and self.engine is engine
            and self.compiled_cache is compiled_cache
            and self.options == options
        )

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A copy of the statement, or in another process, makes a plan of its own."""
        return type(None), ()

    @property
    def shared_memo(self) -> dict[Any, Any]:
        memo: dict[Any, Any] = self.compiled.__dict__.setdefault(_MEMO, {})
        return memo

    @property
    def unrendered(self) -> list[BindParameter[Any]]:
        """Parameters of the statement that are in no place of its SQL; those that complete it may have them in theirs."""
        places: list[int] | None = self.compiled.__dict__.get(_UNRENDERED)
        if places is None:
            match = self.compiled._cache_key_bind_match
            # each of the cache key's parameters with those that stand for it in the SQL, itself the first in any case
            rendered = {} if match is None else match[0]
            known = () if self.compiled.cache_key is None else self.compiled.cache_key.bindparams
            places = [place for place, bind in enumerate(known) if len(rendered.get(bind, ())) < 2]
            self.compiled.__dict__[_UNRENDERED] = places
        return [self.extracted[place] for place in places]

    @property
    def schema_translate_map(self) -> Mapping[str | None, str | None]:
        return self.options.get("schema_translate_map") or {}

    @property
    def repeatable(self) -> bool:
        """True if executing the statement object once more gives the same parameters, whatever happened meanwhile."""
        return (
            not self.given
            and all(
                parameter.callable is None and type(parameter.value) in _IMMUTABLE
                for parameter in self.extracted
            )
            and self._has_plain_types
        )

    @property
    def _has_plain_types(self) -> bool:
        known: bool | None = self.compiled.__dict__.get(_PLAIN)
        if known is None:
            dialect = self.engine.dialect
            known = all(_is_plain(bind.type, dialect) for bind in self.compiled.binds.values())
            self.compiled.__dict__[_PLAIN] = known
        return known


def _copy(template: CursorResult[Any]) -> CursorResult[Any]:
    """A result like one that nothing was taken from, with a cursor and an execution context of its own."""
    context = object.__new__(type(template.context))
    context.__dict__.update(template.context.__dict__)
    result = object.__new__(CursorResult)
    result.__dict__.update(template.__dict__)
    result._metadata = template._metadata
    result.dialect = template.dialect
    result.cursor_strategy = template.cursor_strategy
    result.connection = template.connection
    result._echo = template._echo
    result.context = context
    cursor: Any = _ReplayCursor()
    cursor.description = template.context.cursor.description
    result.cursor = context.cursor = cursor
    return result


def _is_plain(kind: Any, dialect: Dialect) -> bool:
    """True for SQLAlchemy's own types. The application's may look at the context when they process a parameter."""
    item = getattr(kind, "item_type", None)
    kinds = (kind, kind.dialect_impl(dialect))
    plain = all(type(each).__module__.startswith("sqlalchemy.") for each in kinds)
    return plain and (item is None or _is_plain(item, dialect))


_IMMUTABLE = frozenset({int, str, float, bool, bytes, type(None), Decimal, date, datetime, UUID})


@dataclass(slots=True)
class Prepared:
    """A statement that is ready to run: against the database, or over stored rows."""

    invocation: Invocation
    plan: Plan
    rewritten: bool = False
    _context: Any = None
    _begun: _Replay | None = None

    def column_names(self) -> list[str]:
        """Names of the columns as rendered in the statement; empty where only the database knows them."""
        return [entry[0] for entry in self.plan.compiled._result_columns]

    def execute(self) -> tuple[Sequence[Sequence[Any]], list[Row], int]:
        """Run the statement on the session's connection, with SQLAlchemy's own events and errors.

        Returns:
            The description of the columns, the rows as the driver gave them, and the cursor's ``rowcount``.
        """
        invocation = self.invocation
        connection = invocation.session._connection_for_bind(invocation.bind)
        result = connection.execute(
            cast("Any", invocation.statement),
            cast("Any", invocation.parameters) or {},
            execution_options=cast("Any", invocation.options),
        )
        context = cast("Any", result.context)
        sql, parameters = sent(context)
        if not (_same_sql(sql, self.plan.sql) and _same_parameters(parameters, self.plan.parameters)):
            # an event of the engine has changed the statement on its way
            self.rewritten = True
        cursor: Any = result.cursor
        strategy: Any = result.cursor_strategy
        description = strategy.alternate_cursor_description or cursor.description
        rowcount = getattr(cursor, "rowcount", -1)
        rows = list(strategy.fetchall(result, cursor))
        result.close()
        context.cursor = _ReplayCursor()
        self._context = context
        self._begun = None
        return description, rows, rowcount

    def begin_replay(self) -> None:
        """Do ahead what :meth:`replay` does before it needs the rows.

        It takes a third of the time of a few rows. For that the columns must be known, which they are once the same
        statement was replayed with any parameters.
        """
        description = self.plan.compiled.__dict__.get(_DESCRIPTION)
        if description is not None and self._begun is None and _ROWS_FIRST.isdisjoint(self.plan.options):
            self._begun = self._begin(description, (), -1)

    def replay(self, description: Sequence[Sequence[Any]], rows: Iterable[Row], rowcount: int) -> Result[Any]:
        """The statement's result over stored rows, loaded as a result from the database is loaded."""
        begun, self._begun = self._begun, None
        identity_map = self.invocation.session.identity_map
        if begun is None or begun.cursor.description != description or begun.identity_map is not identity_map:
            begun = self._begin(description, rows, rowcount)
            self.plan.compiled.__dict__[_DESCRIPTION] = description
        else:
            begun.cursor.rowcount = rowcount
            begun.cursor.rows = iter(rows)
        return _loaded(begun.result)

    def _begin(self, description: Sequence[Sequence[Any]], rows: Iterable[Row], rowcount: int) -> _Replay:
        context, self._context = self._context, None
        if context is None:
            cursor_result = self.plan.cursor_result(description)
        else:
            context.cursor.description = description
            cursor_result = context._setup_result_proxy()
        cursor: Any = cursor_result.cursor
        cursor.rowcount = rowcount
        cursor.rows = iter(rows)
        result = self.invocation.result(cursor_result)
        return _Replay(cursor, result, self.invocation.session.identity_map)


# options under which a result takes its rows, or their number, as soon as it is made
_ROWS_FIRST = frozenset({"prebuffer_rows", "preserve_rowcount"})


@dataclass(slots=True)
class _Replay:
    """A result that has all but its rows."""

    cursor: _ReplayCursor
    result: Result[Any]
    identity_map: IdentityMap


def _loaded(result: Result[Any]) -> Result[Any]:
    """The same result with its objects loaded already.

    The ORM loads, and runs post-loads, when the result is consumed. The option ``prebuffer_rows``
    would make it do so at once, but post-loads inherit the option, and handlers see it.
    """
    if isinstance(result, ChunkedIteratorResult):
        rows = chain.from_iterable(list(result.chunks(None)))

        def chunks(size: int | None) -> Iterator[list[Any]]:
            # like a cursor: goes on where whoever asked before has stopped
            while chunk := list(islice(rows, size)):
                yield chunk

        result.chunks = chunks
        result.iterator = rows
    return result


# 2.0 flushes before statements of the ORM only
_CORE_FLUSHES = not sqlalchemy.__version__.startswith("2.0.")


@dataclass(slots=True)
class Invocation:
    """One execution of a SELECT by a Session, taken over from SQLAlchemy at the ``do_orm_execute`` event.

    Made by :meth:`take`, which does what SQLAlchemy does between the last handler and the execution:
    interpret the options, flush where autoflush asks for it, find the bind.
    """

    session: Session
    statement: ClauseElement
    parameters: Mapping[str, Any] | None
    options: Mapping[str, Any]
    bind_arguments: dict[str, Any]
    bind: Engine | Connection
    _compile_state_cls: Any

    @classmethod
    def take(cls, state: ORMExecuteState) -> Invocation:
        session = state.session
        statement: Any = state.statement
        parameters: Any = state.parameters
        bind_arguments = dict(state.bind_arguments)
        options: Any = uninterpreted_options(state)
        compile_state_cls: Any = state._compile_state_cls
        if compile_state_cls is not None and untouched(state):
            # SQLAlchemy has interpreted the options ahead of the handlers; what is left is to flush
            load_options = options.get("_sa_orm_load_options")
            if load_options is None or load_options._autoflush:
                session._autoflush()
        elif compile_state_cls is not None:
            # 2.0 returns (statement, options), 2.1 (statement, options, parameters)
            statement, options, *rest = compile_state_cls.orm_pre_session_exec(
                session, statement, parameters, options, bind_arguments, False
            )
            if rest:
                parameters = rest[0]
        elif _CORE_FLUSHES:
            session._autoflush()
        bind = session.get_bind(**bind_arguments)
        return cls(session, statement, parameters, options, bind_arguments, bind, compile_state_cls)

    @property
    def engine(self) -> Engine:
        return self.bind.engine

    def connection_options(self) -> Mapping[str, Any]:
        """Options of the connection that would run the statement, without checking one out."""
        if isinstance(self.bind, Connection):
            return self.bind.get_execution_options()
        transaction = self.session._transaction
        while transaction is not None:
            entry = transaction._connections.get(self.bind)
            if entry is not None:
                return entry[0].get_execution_options()
            transaction = transaction._parent
        return self.bind.get_execution_options()

    def result(self, cursor_result: CursorResult[Any]) -> Result[Any]:
        """From a Core result to what ``Session.execute`` returns."""
        if self._compile_state_cls is None:
            return cursor_result
        result: Result[Any] = self._compile_state_cls.orm_setup_cursor_result(
            self.session,
            self.statement,
            self.parameters or {},
            self.options,
            self.bind_arguments,
            cursor_result,
        )
        return result


# An engine that never connected has a dialect that does not know its server yet. What it compiles must not
# end up in the engine's own cache, where the initialized dialect would find it.
_compiled_before_first_connect: weakref.WeakKeyDictionary[Engine, util.LRUCache[Any, Any]] = (
    weakref.WeakKeyDictionary()
)


def _compiled_cache(engine: Engine, options: Mapping[str, Any]) -> Any:
    dialect = engine.dialect
    if dialect.server_version_info is not None or dialect.default_schema_name is not None:
        return options.get("compiled_cache", engine._compiled_cache)
    cache = _compiled_before_first_connect.get(engine)
    if cache is None:
        cache = _compiled_before_first_connect[engine] = util.LRUCache(500)
    return cache


_DESCRIPTION = "_querycache_description"
_UNRENDERED = "_querycache_unrendered"
_PLAIN = "_querycache_plain"
_PLAN = "_querycache_plan"
_MEMO = "_querycache_memo"


class Unpreparable(Exception):
    """The parameters of a statement cannot be made ready for the driver. Running it will raise the reason."""


def prepare(invocation: Invocation) -> Prepared:
    """Compile a statement and process its parameters, exactly as ``Connection.execute`` would do.

    The compiled object remembers the plan of the statement object it was last asked for, and that statement, once it is
    executed again, its plan. A statement is never changed once it is made, so one that is kept is planned once.

    Raises:
        Unpreparable: the code of the application that makes the parameters has failed.
    """
    statement: Any = invocation.statement
    engine = invocation.engine
    options = statement._execution_options.merge_with(invocation.connection_options(), invocation.options)
    given = invocation.parameters or {}
    compiled_cache = _compiled_cache(engine, options)
    if not given:
        plan: Plan | None = statement.__dict__.get(_PLAN)
        if plan is not None and plan.serves(statement, engine, options, compiled_cache):
            return Prepared(invocation, plan)
    dialect: Any = engine.dialect
    # 2.0 returns (compiled, extracted, cache hit), 2.1 (compiled, extracted, parameter dict, cache hit)
    compiled, extracted, *param_dict, cache_hit = statement._compile_w_cache(
        dialect=dialect,
        compiled_cache=compiled_cache,
        column_keys=sorted(given),
        for_executemany=False,
        schema_translate_map=options.get("schema_translate_map"),
        linting=dialect.compiler_linting | WARN_LINTING,
    )
    plan = compiled.__dict__.get(_PLAN)
    if plan is not None and plan.serves(statement, engine, options, compiled_cache):
        plan.reused = True
        statement.__dict__[_PLAN] = plan
        return Prepared(invocation, plan)
    plan = Plan(
        engine, statement, compiled, options, extracted or (), cache_hit, param_dict, given, compiled_cache
    )
    try:
        context = plan.context()
        plan.values = context.compiled_parameters[0]
        if compiled.literal_execute_params or compiled.post_compile_params:
            # those that become part of the SQL have been taken out
            plan.values = compiled.construct_params(
                given or None,
                extracted_parameters=extracted,
                escape_names=False,
                **({"_collected_params": param_dict[0]} if param_dict else {}),
            )
    except Exception as error:
        raise Unpreparable("parameters") from error
    plan.sql = context.statement
    plan.parameters = context.parameters[0]
    if plan.repeatable:
        compiled.__dict__[_PLAN] = plan
    return Prepared(invocation, plan, _context=context)
