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

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import util
from sqlalchemy.engine import ChunkedIteratorResult, Connection, CursorResult, Dialect, Engine, Result
from sqlalchemy.orm import ORMExecuteState, Session
from sqlalchemy.sql import ClauseElement
from sqlalchemy.sql.compiler import WARN_LINTING
from sqlalchemy.sql.elements import BindParameter

if TYPE_CHECKING:
    from sqlalchemy.sql.compiler import SQLCompiler

__all__ = [
    "Invocation",
    "Prepared",
    "Unpreparable",
    "autobegin",
    "effective_options",
    "is_refresh",
    "later_handlers",
    "load_option",
    "prepare",
    "run_later_handlers",
    "run_statement",
    "statement_options",
]

Row = Sequence[object]


# --- the event: what a do_orm_execute handler is given -------------------------------------------


def effective_options(state: ORMExecuteState) -> Mapping[str, Any]:
    """Execution options as they stand now, with what handlers before this one have added.

    ``ORMExecuteState.execution_options`` is computed once and does not see ``update_execution_options``.
    """
    return state.statement._execution_options.union(state.local_execution_options)  # type: ignore[attr-defined,no-any-return]


def statement_options(statement: Any) -> tuple[Any, ...]:
    """The options given to ``statement.options(…)``, in order; empty where a statement takes none."""
    return getattr(statement, "_with_options", ())


def load_option(options: Mapping[str, Any], name: str) -> Any:
    """An option of the ORM's loading, as given to the legacy Query or interpreted from execution options."""
    return getattr(options.get("_sa_orm_load_options"), f"_{name}", None)


def is_refresh(options: Mapping[str, Any]) -> bool:
    """True for the statement that refreshes an object: never an answer to share.

    Refreshes carry their object in the load options, also where no flag of the event tells of it.
    """
    return load_option(options, "refresh_state") is not None


def later_handlers(state: ORMExecuteState) -> Sequence[Callable[[ORMExecuteState], Any]]:
    """The ``do_orm_execute`` handlers that SQLAlchemy would call after the current one."""
    return state._remaining_events()


def run_later_handlers(state: ORMExecuteState, tail: Callable[[ORMExecuteState], Result[Any]]) -> Result[Any]:
    """Run the handlers registered later than the current one, and then ``tail`` as the last of them.

    Handlers that rewrite the statement have done so when ``tail`` is called. Handlers that answer by
    ``invoke_statement()``, once or once per shard, reach ``tail`` through each of these invocations. The
    caller must return the result, so that SQLAlchemy does not run the later handlers a second time.
    """
    events = [*state._remaining_events(), tail]
    state._events_todo = cast("list[Any]", events)
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


@dataclass(slots=True)
class Prepared:
    """A statement that is ready to run: against the database, or over stored rows.

    ``sql`` and ``parameters`` are what the driver would be given; together with the database they
    determine the rows.
    """

    invocation: Invocation
    compiled: SQLCompiler
    context: Any
    sql: str
    parameters: Any
    extracted: Sequence[BindParameter[Any]]
    rewritten: bool = False

    @property
    def schema_translate_map(self) -> Mapping[str | None, str | None]:
        return self.context.execution_options.get("schema_translate_map") or {}

    def column_names(self) -> list[str]:
        """Names of the columns as rendered in the statement; empty where only the database knows them."""
        return [entry[0] for entry in self.compiled._result_columns]

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
        if context.statement != self.sql or context.parameters[0] != self.parameters:
            # an event of the engine has changed the statement on its way
            self.rewritten = True
            self.context = context
            self.compiled = context.compiled
        cursor: Any = result.cursor
        strategy: Any = result.cursor_strategy
        description = strategy.alternate_cursor_description or cursor.description
        rowcount = getattr(cursor, "rowcount", -1)
        rows = list(strategy.fetchall(result, cursor))
        result.close()
        context.cursor = _ReplayCursor()
        return description, rows, rowcount

    def replay(self, description: Sequence[Sequence[Any]], rows: Iterable[Row], rowcount: int) -> Result[Any]:
        """The statement's result over stored rows, loaded as a result from the database is loaded."""
        cursor = self.context.cursor
        cursor.description = description
        cursor.rowcount = rowcount
        cursor.rows = iter(rows)
        return self.invocation.load(self.context._setup_result_proxy())


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
        if compile_state_cls is not None:
            # 2.0 returns (statement, options), 2.1 (statement, options, parameters)
            statement, options, *rest = compile_state_cls.orm_pre_session_exec(
                session, statement, parameters, options, bind_arguments, False
            )
            if rest:
                parameters = rest[0]
        else:
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


class Unpreparable(Exception):
    """The parameters of a statement cannot be made ready for the driver. Running it will raise the reason."""


def prepare(invocation: Invocation) -> Prepared:
    """Compile a statement and process its parameters, exactly as ``Connection.execute`` would do.

    Raises:
        Unpreparable: the code of the application that makes the parameters has failed.
    """
    statement: Any = invocation.statement
    engine = invocation.engine
    dialect = engine.dialect
    options = statement._execution_options.merge_with(invocation.connection_options(), invocation.options)
    parameters = invocation.parameters
    # 2.0 returns (compiled, extracted, cache hit), 2.1 (compiled, extracted, parameter dict, cache hit)
    compiled, extracted, *param_dict, cache_hit = statement._compile_w_cache(
        dialect=dialect,
        compiled_cache=_compiled_cache(engine, options),
        column_keys=sorted(parameters) if parameters else [],
        for_executemany=False,
        schema_translate_map=options.get("schema_translate_map"),
        linting=dialect.compiler_linting | WARN_LINTING,
    )
    connection = _ReplayConnection(engine)
    try:
        context = cast("Any", dialect).execution_ctx_cls._init_compiled(
            dialect,
            connection,
            connection,
            options,
            compiled,
            [dict(parameters)] if parameters else [],
            statement,
            extracted,
            cache_hit=cache_hit,
            **({"param_dict": param_dict[0]} if param_dict else {}),
        )
    except Exception as error:
        raise Unpreparable("parameters") from error
    return Prepared(invocation, compiled, context, context.statement, context.parameters[0], extracted or ())


def autobegin(session: Session) -> None:
    """Begin the Session's transaction as any statement would, without a connection."""
    session._autobegin_t()
