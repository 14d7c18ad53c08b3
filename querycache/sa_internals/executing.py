"""A SELECT that a Session executes, which is run against the database or replayed over stored rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import sqlalchemy
from sqlalchemy.engine import Connection, CursorResult, Engine, Result
from sqlalchemy.orm import ORMExecuteState, Session
from sqlalchemy.orm.identity import IdentityMap
from sqlalchemy.sql import ClauseElement

from querycache.sa_internals.dialect import Row, sent
from querycache.sa_internals.handlers import marked, uninterpreted_options, untouched
from querycache.sa_internals.planning import ROWS_FIRST, Compilation, Plan
from querycache.sa_internals.replay import ReplayCursor, loaded
from querycache.wording import says_the_same

__all__ = ["Invocation", "Prepared", "prepare"]

# 2.0 flushes before statements of the ORM only
_CORE_FLUSHES = not sqlalchemy.__version__.startswith("2.0.")


@dataclass(slots=True)
class Invocation:
    """One execution of a SELECT by a Session, taken over from SQLAlchemy at the ``do_orm_execute`` event.

    Made by :meth:`take`, which does what SQLAlchemy does between the last handler and the execution:
    interpret the options, flush where autoflush asks for it, find the bind.

    Attributes:
        load: what the executions of one answer have in common: of a statement, and of those that complete its objects.
    """

    session: Session
    statement: ClauseElement
    parameters: Mapping[str, Any] | None
    options: Mapping[str, Any]
    bind_arguments: dict[str, Any]
    bind: Engine | Connection
    _compile_state_cls: Any
    load: object = field(default_factory=object)

    @classmethod
    def take(cls, state: ORMExecuteState) -> Invocation:
        session = state.session
        statement: Any = state.statement
        parameters: Any = state.parameters
        if isinstance(parameters, (list, tuple)):
            parameters = parameters[0] if parameters else None  # not an executemany, which is refused
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
            marked(self.options, self.load),
            self.bind_arguments,
            cursor_result,
        )
        return result


@dataclass(slots=True)
class Prepared:
    """A statement that is ready to run: against the database, or over stored rows."""

    invocation: Invocation
    compilation: Compilation
    plan: Plan
    options: Mapping[str, Any]
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
        if not (says_the_same(sql, self.plan.sql) and _same_parameters(parameters, self.plan.parameters)):
            # an event of the engine has changed the statement on its way
            self.rewritten = True
        cursor: Any = result.cursor
        strategy: Any = result.cursor_strategy
        description = strategy.alternate_cursor_description or cursor.description
        rowcount = getattr(cursor, "rowcount", -1)
        rows = list(strategy.fetchall(result, cursor))
        result.close()
        context.cursor = ReplayCursor()
        self._context = context
        return description, rows, rowcount

    def begin_replay(self) -> None:
        """Do ahead what :meth:`replay` does before it needs the rows.

        It takes a third of the time of a few rows. For that the columns must be known, which they are once the same
        statement was replayed with any parameters.
        """
        description = self.plan.compiled.__dict__.get(_DESCRIPTION)
        if description is not None and self._begun is None and ROWS_FIRST.isdisjoint(self.plan.options):
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
        return loaded(begun.result)

    def _begin(self, description: Sequence[Sequence[Any]], rows: Iterable[Row], rowcount: int) -> _Replay:
        context, self._context = self._context, None
        if context is None:
            given = self.invocation.parameters or {}
            cursor_result = self.plan.cursor_result(description, self.compilation, given, self.options)
        else:
            context.cursor.description = description
            cursor_result = context._setup_result_proxy()
        cursor: Any = cursor_result.cursor
        cursor.rowcount = rowcount
        cursor.rows = iter(rows)
        result = self.invocation.result(cursor_result)
        return _Replay(cursor, result, self.invocation.session.identity_map)


@dataclass(slots=True)
class _Replay:
    """A result that has all but its rows."""

    cursor: ReplayCursor
    result: Result[Any]
    identity_map: IdentityMap


def prepare(invocation: Invocation) -> Prepared:
    """Compile a statement and process its parameters, exactly as ``Connection.execute`` would do.

    Raises:
        Unpreparable: the code of the application that makes the parameters has failed.
    """
    statement: Any = invocation.statement
    options = statement._execution_options.merge_with(invocation.connection_options(), invocation.options)
    given = invocation.parameters or {}
    compilation = Compilation.of(statement, invocation.engine, given, options)
    plan, context = compilation.with_values(given, options)
    return Prepared(invocation, compilation, plan, options, _context=context)


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
        one == other
        or (type(one) is type(other) and hasattr(one, "obj") and one.obj == other.obj)
        or (one != one and other != other)  # not a number
        for one, other in pairs
    )


_DESCRIPTION = "_querycache_description"
