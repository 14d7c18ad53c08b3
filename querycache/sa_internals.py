"""Everything that querycache takes from SQLAlchemy without a public name for it, in one place.

Each function states what it stands on; the versions read are 2.0.40 to 2.0.57 and 2.1.0 to 2.1.9, and
``tests/test_sa_internals.py`` fails when one of the names moves. No other module of querycache touches a
private name of SQLAlchemy.

The idea behind the replay: a :class:`~sqlalchemy.engine.CursorResult` needs an execution context, and an
execution context needs a connection only to open a cursor. So a context is built over a *replay
connection*, whose cursor hands out rows that were stored earlier. From there on everything is SQLAlchemy's
own: result metadata, result processors, the ORM's loader.
"""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast
from uuid import UUID

import sqlalchemy
from sqlalchemy import Column, Table, event, inspect, util
from sqlalchemy.engine import ChunkedIteratorResult, Connection, CursorResult, Dialect, Engine, Result
from sqlalchemy.engine.base import OptionEngine
from sqlalchemy.orm import LoaderCallableStatus, Mapper, MapperProperty, ORMExecuteState, Session
from sqlalchemy.orm.exc import UnmappedColumnError
from sqlalchemy.orm.interfaces import UserDefinedOption
from sqlalchemy.orm.mapper import _all_registries
from sqlalchemy.sql import ClauseElement
from sqlalchemy.sql.compiler import WARN_LINTING
from sqlalchemy.sql.elements import BindParameter, TextClause
from sqlalchemy.sql.selectable import TextualSelect

from querycache.errors import CacheUnavailable, ConfigurationError
from querycache.textual import first_word

if TYPE_CHECKING:
    from sqlalchemy.sql.compiler import SQLCompiler

__all__ = [
    "UNKNOWN",
    "Invocation",
    "Plan",
    "Prepared",
    "StatementOption",
    "Unpreparable",
    "Written",
    "autobegin",
    "begins_transaction",
    "cache_key_of",
    "connections",
    "default_isolation_level",
    "effective_options",
    "flushed",
    "given_options",
    "holds_text",
    "in_transaction",
    "is_autocommit",
    "is_flushing",
    "is_initializing",
    "is_textual",
    "is_unit_of_work",
    "isolation_level",
    "known_tables",
    "later_handlers",
    "load_in_order",
    "load_options",
    "may_block",
    "old_and_new",
    "prepare",
    "reads_uncommitted",
    "replaces",
    "root_engine",
    "run_later_handlers",
    "run_statement",
    "tables_of",
    "tap",
    "untap",
    "written",
]

Row = Sequence[object]


# --- options of statements ---------------------------------------------------------------------------


class StatementOption(UserDefinedOption):
    """An option that tells statements apart when they are compiled.

    SQLAlchemy takes no notice of user-defined options there. It then loads with the compiled statement's, of which it
    pairs each with the executed statement's in the same place: one is lost, or takes another's place.
    """

    _is_has_cache_key = True

    def _gen_cache_key(self, anon_map: Any, bindparams: Any) -> tuple[type, type]:
        return StatementOption, type(self)


# --- the event: what a do_orm_execute handler is given -------------------------------------------


def _untouched(state: ORMExecuteState) -> bool:
    """True where no handler has replaced the statement or added options, so that what SQLAlchemy derived holds."""
    return (
        not getattr(state, "_update_execution_options", True)
        and state.bind_arguments.get("clause") is state.statement
        and "sa_top_level_orm_context" not in state.local_execution_options
    )


def effective_options(state: ORMExecuteState) -> Mapping[str, Any]:
    """Execution options as they stand now, with what handlers before this one have added.

    ``ORMExecuteState.execution_options`` is computed once and does not see what handlers change.
    """
    if _untouched(state):
        return state.execution_options
    return state.statement._execution_options.union(state.local_execution_options)  # type: ignore[no-any-return]


def given_options(statement: Any) -> tuple[Mapping[str, Any], tuple[Any, ...]]:
    """The execution options of a statement, and those given to ``statement.options(…)``, in order."""
    return statement._execution_options, getattr(statement, "_with_options", ())


def load_options(options: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Options of the ORM's loading that are not the default: refresh_state, populate_existing, yield_per.

    They are given by the legacy Query, made from execution options, or set where an object is refreshed, which no
    flag of the event tells of for every kind of statement.
    """
    given = options.get("_sa_orm_load_options")
    if given is None:
        return None
    return {
        "refresh_state": given._refresh_state,
        "populate_existing": given._populate_existing,
        "yield_per": given._yield_per,
    }


def later_handlers(state: ORMExecuteState) -> Sequence[Callable[[ORMExecuteState], Any]]:
    """The ``do_orm_execute`` handlers that SQLAlchemy would call after the current one."""
    return state._remaining_events()


def run_later_handlers(state: ORMExecuteState, tail: Callable[[ORMExecuteState], Result[Any]]) -> Result[Any]:
    """Run the handlers registered later than the current one, and then ``tail`` as the last of them.

    Handlers that rewrite the statement have done so when ``tail`` is called. Handlers that answer by
    ``invoke_statement()``, once or once per shard, reach ``tail`` through each of these invocations. The
    caller must return the result, so that SQLAlchemy does not run the later handlers a second time.
    """
    events: list[Any] = [*state._remaining_events(), tail]
    state._events_todo = events
    for index, handler in enumerate(events):
        state._starting_event_idx = index
        result = handler(state)
        if result:
            return cast("Result[Any]", result)
    raise AssertionError("the tail handler always returns a result")


def run_statement(state: ORMExecuteState) -> Result[Any]:
    """Run the statement as SQLAlchemy does after the last handler, for one that must return a result."""
    state.local_execution_options = cast("Any", _uninterpreted_options(state))
    return state.invoke_statement()


def _uninterpreted_options(state: ORMExecuteState) -> Mapping[str, Any]:
    """The options given to one execution, to be interpreted anew after handlers have added theirs.

    SQLAlchemy has interpreted them once, for handlers to see, and that has given a post-load all options of
    the surrounding statement. Those that say how to load must not be taken for the post-load's own now.
    """
    options = state.local_execution_options
    # missing in versions that interpret the mixed options themselves
    added: Mapping[str, Any] | None = getattr(state, "_update_execution_options", None)
    if added is None or "sa_top_level_orm_context" not in options:
        return options
    return util.immutabledict(
        {name: value for name, value in options.items() if name not in _INTERPRETED_OPTIONS or name in added}
    )


# the execution options that QueryContext.default_load_options is made from
_INTERPRETED_OPTIONS = frozenset({"autoflush", "identity_token", "populate_existing", "yield_per"})


def is_textual(statement: Any) -> bool:
    """True for ``text("…")`` as a whole statement, of which the event does not tell whether it selects."""
    return isinstance(statement, TextClause)


# --- the statement: compiled, with its parameters, but not executed -------------------------------


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
    values: Mapping[str, Any] = field(default_factory=dict)
    sql: str = ""
    parameters: Any = None
    memo: dict[Any, Any] = field(default_factory=dict)
    _template: Any = None

    def context(self) -> Any:
        """A new execution context over a replay connection."""
        if self._template is not None:
            context = object.__new__(type(self._template))
            context.__dict__.update(self._template.__dict__)
            context.cursor = _ReplayCursor()
            return context
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

    @property
    def shared_memo(self) -> dict[Any, Any]:
        memo: dict[Any, Any] = self.compiled.__dict__.setdefault(_MEMO, {})
        return memo

    @property
    def schema_translate_map(self) -> Mapping[str | None, str | None]:
        return self.options.get("schema_translate_map") or {}

    @property
    def repeatable(self) -> bool:
        """True if executing the statement object once more gives the same values, whatever happened meanwhile."""
        return not self.given and all(
            parameter.callable is None and type(parameter.value) in _IMMUTABLE for parameter in self.extracted
        )


_IMMUTABLE = frozenset({int, str, float, bool, bytes, type(None), Decimal, date, datetime, UUID})


@dataclass(slots=True)
class Prepared:
    """A statement that is ready to run: against the database, or over stored rows."""

    invocation: Invocation
    plan: Plan
    rewritten: bool = False
    _context: Any = None

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
        sql, parameters = context.__dict__.pop(_SENT, (context.statement, context.parameters[0]))
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
        return description, rows, rowcount

    def replay(self, description: Sequence[Sequence[Any]], rows: Iterable[Row], rowcount: int) -> Result[Any]:
        """The statement's result over stored rows, loaded as a result from the database is loaded."""
        context = self._context or self.plan.context()
        cursor = context.cursor
        cursor.description = description
        cursor.rowcount = rowcount
        cursor.rows = iter(rows)
        return self.invocation.load(context._setup_result_proxy())


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
        options: Any = _uninterpreted_options(state)
        compile_state_cls: Any = state._compile_state_cls
        if compile_state_cls is not None and _untouched(state):
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

    def load(self, cursor_result: CursorResult[Any]) -> Result[Any]:
        """From a Core result to what ``Session.execute`` returns, with all its rows loaded already.

        The ORM loads, and runs post-loads, when the result is consumed. The option ``prebuffer_rows``
        would make it do so at once, but post-loads inherit the option, and handlers see it.
        """
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
        if isinstance(result, ChunkedIteratorResult):
            loaded = list(result.chunks(None))
            result.chunks = lambda size: iter(loaded)
            result.iterator = chain.from_iterable(loaded)
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


_PLAN = "_querycache_plan"
_MEMO = "_querycache_memo"


class Unpreparable(Exception):
    """The parameters of a statement cannot be made ready for the driver. Running it will raise the reason."""


def prepare(invocation: Invocation) -> Prepared:
    """Compile a statement and process its parameters, exactly as ``Connection.execute`` would do.

    The compiled object remembers the plan of the statement object it was last asked for. A statement is never
    changed once it is made, so one that is kept and executed again is planned once.

    Raises:
        Unpreparable: the code of the application that makes the parameters has failed.
    """
    statement: Any = invocation.statement
    engine = invocation.engine
    options = statement._execution_options.merge_with(invocation.connection_options(), invocation.options)
    given = invocation.parameters or {}
    dialect: Any = engine.dialect
    # 2.0 returns (compiled, extracted, cache hit), 2.1 (compiled, extracted, parameter dict, cache hit)
    compiled, extracted, *param_dict, cache_hit = statement._compile_w_cache(
        dialect=dialect,
        compiled_cache=_compiled_cache(engine, options),
        column_keys=sorted(given),
        for_executemany=False,
        schema_translate_map=options.get("schema_translate_map"),
        linting=dialect.compiler_linting | WARN_LINTING,
    )
    plan: Plan | None = compiled.__dict__.get(_PLAN)
    if plan is not None and plan.statement is statement and plan.engine is engine and plan.options == options:
        return Prepared(invocation, plan)
    plan = Plan(engine, statement, compiled, options, extracted or (), cache_hit, param_dict, given)
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
        plan._template = context
        compiled.__dict__[_PLAN] = plan
        context = None
    return Prepared(invocation, plan, _context=context)


def load_in_order() -> None:
    """Make the ORM take the attributes of a class in the order of their names, as any other process does.

    Without that it takes them from a set in the order of their addresses. Where loaders of several attributes lead to
    the same objects, that order decides which of them asks for what, so what a hit needs would not be what the miss
    in another process has stored. Asked for when a cache is attached: who only imports this package is left alone.
    """
    if Mapper._prop_set is _in_order:
        return
    Mapper._prop_set = _in_order  # type: ignore[method-assign]
    for registry in _all_registries():
        for mapper in registry.mappers:
            mapper.__dict__.pop("_prop_set", None)  # remembered from before


def _prop_set(mapper: Mapper[Any]) -> util.OrderedSet[MapperProperty[Any]]:
    return util.OrderedSet([attribute for _, attribute in sorted(mapper._props.items())])


_in_order = util.HasMemoized.memoized_attribute(_prop_set)


def autobegin(session: Session) -> None:
    """Begin the Session's transaction as any statement would, without a connection."""
    session._autobegin_t()


def may_block() -> bool:
    """False where waiting would stop an event loop: in a greenlet that SQLAlchemy runs under asyncio."""
    greenlet: Any = sys.modules.get("greenlet")
    return greenlet is None or not getattr(greenlet.getcurrent(), "__sqlalchemy_greenlet_provider__", False)


# --- connections and transactions ---------------------------------------------------------------------


def root_engine(engine: Engine) -> Engine:
    """The engine that ``Engine.execution_options`` has made others from; its events reach them all."""
    while isinstance(engine, OptionEngine):
        engine = engine._proxied
    return engine


def connections(session: Session) -> list[Connection]:
    """The connections of a Session: those it was bound to, and those it has checked out, of its savepoints and
    enclosing transactions as well.
    """
    found: dict[Connection, None] = {}
    # 2.0 keeps them in a name of the class, 2.1 in a plain one
    binds = session.__dict__.get("binds") or session.__dict__.get("_Session__binds") or {}
    for bind in (session.bind, *binds.values()):
        if isinstance(bind, Connection) and not bind.closed and not bind.invalidated:
            found[bind] = None
    transaction = session._transaction
    while transaction is not None:
        for entry in transaction._connections.values():
            if not entry[0].closed and not entry[0].invalidated:
                found[entry[0]] = None
        transaction = transaction._parent
    return list(found)


def checked_out(session: Session, bind: Engine | Connection) -> Connection | None:
    """The connection that a Session's transaction has for a bind already, without the checks of ``connection()``."""
    transaction = session._transaction
    while transaction is not None:
        if (entry := transaction._connections.get(bind)) is not None:
            return entry[0]
        transaction = transaction._parent
    return None


def is_autocommit(connection: Connection) -> bool:
    """True if each statement of the connection commits itself."""
    driver: Any = connection.connection.dbapi_connection
    if connection._is_autocommit_isolation() or getattr(driver, "autocommit", None) is True:
        return True
    told = getattr(driver, "get_autocommit", None)  # drivers of MySQL, whose server tells of SET autocommit
    return told is not None and bool(told())


def default_isolation_level(dialect: Any) -> str | None:
    """The isolation level that the engine asks for, or else the database's own; in capitals and with spaces."""
    level = dialect._on_connect_isolation_level or dialect.default_isolation_level
    return level.replace("_", " ").upper() if level else None


def is_initializing(connection: Connection) -> bool:
    """True for the connection on which a dialect gets to know its database; nothing can be noted with it."""
    return _info(connection) is None


def isolation_level(connection: Connection) -> str | None:
    """The isolation level of a connection, in capitals and with spaces, without asking the database."""
    level: str | None = connection.get_execution_options().get("isolation_level")
    return level.replace("_", " ").upper() if level else default_isolation_level(connection.dialect)


def reads_uncommitted(session: Session) -> bool:
    """True if a connection of the session sees what others have not committed yet."""
    return any(isolation_level(connection) == "READ UNCOMMITTED" for connection in connections(session))


def in_transaction(connection: Connection) -> bool:
    """True if SQLite's driver has a transaction open, whose view of the database may be an old one."""
    return bool(getattr(connection.connection.dbapi_connection, "in_transaction", False))


def begins_transaction(connection: Connection, sql: str) -> bool:
    """True if SQLite's driver begins a transaction of its own before this statement."""
    driver: Any = connection.connection.dbapi_connection
    return driver.isolation_level is not None and first_word(sql) in ("insert", "update", "delete", "replace")


# --- what a dialect does --------------------------------------------------------------------------------


class Tap(Protocol):
    """Who listens to a dialect. ``info`` is the dictionary of a pooled DBAPI connection."""

    def executing(self, sql: str, context: Any, reads_only: bool) -> bool: ...

    def executed(self, context: Any) -> None: ...

    def begin(self, info: dict[Any, Any]) -> None: ...

    def commit(self, info: dict[Any, Any], dialect: Dialect) -> None: ...

    def end(self, info: dict[Any, Any]) -> None: ...


_SENT = "_querycache_sent"
_TAPS = "_querycache_taps"
_READS = "_querycache_reads"


def note_reads_only(compiled: Any) -> None:
    """Remember of a compiled statement, which is kept and used again, that it writes nothing."""
    compiled.__dict__[_READS] = True


def tap(engine: Engine, listener: Tap) -> None:
    """Tell a listener of each statement and of the begin and end of each transaction of an engine."""
    dialect = engine.dialect
    taps: list[Tap] | None = dialect.__dict__.get(_TAPS)
    if taps is None:
        taps = []
        setattr(dialect, _TAPS, taps)
        for name in ("do_execute", "do_executemany", "do_execute_no_params"):
            event.listen(engine, name, _execution(dialect, name, taps), insert=True)
        for name, wrap in _WRAPPED.items():
            setattr(dialect, name, wrap(dialect, getattr(dialect, name), taps))
    taps.append(listener)


def untap(engine: Engine, listener: Tap) -> None:
    """Tell a listener nothing more."""
    engine.dialect.__dict__.get(_TAPS, []).remove(listener)


def _execution(dialect: Dialect, name: str, taps: list[Tap]) -> Callable[..., bool | None]:
    """A listener of the dialect's events: it runs the statement itself where that commits, to know when it has."""
    run = getattr(dialect, name)
    one_set = name == "do_execute"

    def execute(cursor: Any, sql: str, *rest: Any) -> bool | None:
        context = rest[-1]
        if sql is not context.statement or (one_set and rest[0] is not context.parameters[0]):
            # by a listener of before_cursor_execute, of which the context is not told
            context.__dict__[_SENT] = sql, rest[0] if one_set else context.parameters[0]
        compiled = context.compiled
        reads_only = compiled is not None and _READS in compiled.__dict__
        ending: list[Tap] | None = None
        for each in taps:
            if each.executing(sql, context, reads_only):
                ending = [*(ending or ()), each]
        if ending is None:
            return None
        try:
            run(cursor, sql, *rest)
        finally:
            for each in ending:
                each.executed(context)
        return True

    return execute


def _info(connection: Any) -> dict[Any, Any] | None:
    """The dictionary of a connection; None for those that a dialect makes for itself.

    It is empty while nothing was noted, and then there is nothing to tell anybody.
    """
    try:
        return connection.info  # type: ignore[no-any-return]
    except (AttributeError, NotImplementedError):
        # a bare DBAPI connection has none, and neither has what stands in for one at first connect
        return None


def _beginning(dialect: Dialect, run: Callable[..., Any], taps: list[Tap]) -> Callable[..., Any]:
    def begin(connection: Any, *args: Any, **kwargs: Any) -> Any:
        # What _info() mostly comes to, here and in rollback: each transaction comes through, also one that only reads.
        try:
            info = connection._connection_record.info
        except AttributeError:
            info = _info(connection)
        if info:
            for each in taps:
                each.begin(info)
        return run(connection, *args, **kwargs)

    return begin


def _committing(dialect: Dialect, run: Callable[..., Any], taps: list[Tap]) -> Callable[..., Any]:
    def commit(connection: Any, *args: Any, **kwargs: Any) -> Any:
        info = _info(connection)
        if not info:
            return run(connection, *args, **kwargs)
        for each in taps:
            try:
                each.commit(info, dialect)
            except CacheUnavailable:
                # This stops the COMMIT, but the connection would go back to its pool with the transaction open, for
                # the next user to commit.
                _give_up(connection)
                for every in taps:
                    every.end(info)
                raise
        try:
            return run(connection, *args, **kwargs)
        finally:
            for each in taps:
                each.end(info)

    return commit


def _preparing(dialect: Dialect, run: Callable[..., Any], taps: list[Tap]) -> Callable[..., Any]:
    def prepare(connection: Any, *args: Any, **kwargs: Any) -> Any:
        # where this is refused, SQLAlchemy rolls back by itself
        for each in taps:
            each.commit(connection.info, dialect)
        return run(connection, *args, **kwargs)

    return prepare


def _rolling_back(dialect: Dialect, run: Callable[..., Any], taps: list[Tap]) -> Callable[..., Any]:
    def rollback(connection: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return run(connection, *args, **kwargs)
        finally:
            try:
                info = connection._connection_record.info
            except AttributeError:
                info = _info(connection)
            if info:
                for each in taps:
                    each.end(info)

    return rollback


_WRAPPED = {
    "do_begin": _beginning,
    "do_begin_twophase": _beginning,
    "do_prepare_twophase": _preparing,
    "do_commit": _committing,
    "do_commit_twophase": _committing,
    "do_rollback": _rolling_back,
    "do_rollback_twophase": _rolling_back,
}


def _give_up(connection: Any) -> None:
    if isinstance(connection, Connection):  # two-phase: what was prepared stays prepared
        connection.invalidate()
    else:
        connection.rollback()


# --- what was written ---------------------------------------------------------------------------------


def is_flushing(session: Session) -> bool:
    """True while the unit of work is sending statements."""
    return session._flushing


def is_unit_of_work(context: Any) -> bool:
    """True if a statement was made by the unit of work, or by its relatives that write without objects.

    They, and nobody else, compile into a cache of the mapper; ORM-enabled statements of the application are
    told by their plugin.
    """
    cache = context.execution_options.get("compiled_cache")
    if cache is None or cache is context.engine._compiled_cache:
        return False
    return not context.invoked_statement._propagate_attrs


def _dml(compiled: Any) -> Any:
    """The INSERT, UPDATE or DELETE, also where ``select(Entity).from_statement(…)`` is to load what it returns."""
    statement = compiled.statement
    return statement.element if statement.is_from_statement else statement


class Written(NamedTuple):
    """What a statement does to the rows of a table.

    Attributes:
        table: None where it cannot be told.
        deletes: whether rows that were there may be gone.
        updates: whether rows that were there may have changed.
    """

    table: Table | None
    deletes: bool
    updates: bool


def written(compiled: Any) -> list[Written]:
    """What an INSERT, UPDATE or DELETE writes to, and what the CTEs of any statement do."""
    found = []
    statement = _dml(compiled)
    if statement.is_dml:
        tables = [statement.table]
        # a bulk statement of a joined subclass is compiled once for each of its tables, which is only noted aside
        noted = statement._annotations
        tables += [noted[key] for key in ("_emit_insert_table", "_emit_update_table") if key in noted]
        tables += getattr(compiled.dml_compile_state, "_extra_froms", None) or ()
        found += [_written(statement, table) for table in tables]
    for cte in getattr(compiled, "ctes", None) or ():
        if cte.element.is_dml:
            found.append(_written(cte.element, cte.element.table))
    return found


def _written(statement: Any, selectable: Any) -> Written:
    while selectable is not None and not isinstance(selectable, Table):
        selectable = getattr(selectable, "element", None)
    # an upsert, INSERT OR REPLACE, or UPDATE OR REPLACE, may do either
    either = bool(statement._prefixes) or getattr(statement, "_post_values_clause", None) is not None
    either = either or (isinstance(selectable, Table) and replaces(selectable))
    return Written(selectable, statement.is_delete or either, statement.is_update or either)


@lru_cache(maxsize=4096)
def replaces(table: Table) -> bool:
    """True for a table of SQLite in which a new row may take the place of others, by ON CONFLICT REPLACE."""
    return any(
        str(value).upper() == "REPLACE"
        for each in (*table.constraints, *table.columns)
        for name, value in each.dialect_kwargs.items()
        if name.startswith("sqlite_on_conflict")
    )


def holds_text(compiled: Any) -> bool:
    """True for a whole textual statement, by itself or as a CTE, that was told which columns it returns.

    It looks like a SELECT, but may be a DELETE with RETURNING.
    """
    statements = [_dml(compiled), *(cte.element for cte in getattr(compiled, "ctes", None) or ())]
    return any(isinstance(each, TextualSelect) for each in statements)


def unflushed(session: Session) -> tuple[list[Any], list[Any], list[Any]]:
    """The objects of ``session.new``, ``dirty`` and ``deleted``, without the sets that those properties make."""
    deleted = session._deleted
    dirty = [state.obj() for state in session._dirty_states if state not in deleted]
    return list(session._new.values()), dirty, list(deleted.values())


def flushed(context: Any) -> Iterator[tuple[Any, bool]]:
    """The states that a flush has written, each with True where it was deleted."""
    for state, (is_delete, list_only) in context.states.items():
        # one that was to be deleted, and is replaced by another under its primary key, is listed only
        if is_delete or not list_only:
            yield state, is_delete


UNKNOWN = object()
"""Stands for a value that only the database knows."""


def old_and_new(state: Any, column: Column[Any]) -> tuple[object, object]:
    """The value of a column before and after the flush that has just sent its statements.

    A column that is not mapped, or whose value the server has made, is :data:`UNKNOWN`.
    """
    try:
        key = state.mapper.get_property_by_column(column).key
    except UnmappedColumnError:
        return UNKNOWN, UNKNOWN
    if column.computed is not None or column.server_onupdate is not None:
        return UNKNOWN, UNKNOWN
    if state.key is not None and key not in state.dict and column in state.mapper.primary_key:
        identity = state.key[1][state.mapper.primary_key.index(column)]
        return identity, identity
    if key in state.dict:
        new = state.dict[key]
    elif state.key is None and column.server_default is None and key not in state.expired_attributes:
        new = None  # inserted without a value
    else:
        new = UNKNOWN
    old = state.committed_state.get(key, new)
    if old is LoaderCallableStatus.NO_VALUE:
        # what was never set had no value before an INSERT; otherwise it was not loaded
        old = None if state.key is None else UNKNOWN
    return old, new


def tables_of(entity: Any) -> list[Table]:
    """The tables of a mapped class, those it inherits from included.

    Raises:
        ConfigurationError: it is not a mapped class.
    """
    mapper = inspect(entity, raiseerr=False)
    if not isinstance(mapper, Mapper):
        raise ConfigurationError(f"{entity!r} is not a mapped class")
    return [table for table in mapper.tables if isinstance(table, Table)]


def cache_key_of(statement: Any) -> Any:
    """The key under which SQLAlchemy caches a statement's compiled form; None where it has none.

    Raises:
        ConfigurationError: it is not a statement.
    """
    if not isinstance(statement, ClauseElement):
        raise ConfigurationError(f"{statement!r} is not a statement; give a select()")
    key = statement._generate_cache_key()
    return key.key if key is not None else None


def known_tables(name: str) -> list[Table]:
    """The mapped tables of a name, in any schema; textual SQL knows only names."""
    found: set[Table] = set()
    for registry in _all_registries():
        for mapper in registry.mappers:
            for table in mapper.tables:
                if isinstance(table, Table):
                    found.update(
                        each for each in table.metadata.tables.values() if each.name.lower() == name.lower()
                    )
    return list(found)
