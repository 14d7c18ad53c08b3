"""What statements are made of and write, and what a flush has written."""

from __future__ import annotations

import inspect as python_inspect
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from types import FrameType
from typing import Any, NamedTuple, cast

from sqlalchemy import DDL, BindParameter, Column, Dialect, Integer, Select, Table, Values
from sqlalchemy.engine.interfaces import ExecuteStyle
from sqlalchemy.orm import LoaderCallableStatus, Mapper, Session, UOWTransaction, persistence
from sqlalchemy.orm.exc import UnmappedColumnError
from sqlalchemy.sql import ClauseElement
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.selectable import TextualSelect
from sqlalchemy.sql.visitors import iterate

from querycache.errors import ConfigurationError
from querycache.sa_internals.mapping import is_made_by_database, remembered

__all__ = [
    "UNKNOWN",
    "Held",
    "Written",
    "appended",
    "cache_key_of",
    "columns_set",
    "columns_upserted",
    "custom_constructs",
    "flush_of",
    "flushed",
    "held",
    "holds_text",
    "inserts_one",
    "is_batch",
    "is_clean",
    "is_flushing",
    "is_of_flush",
    "is_of_relationship",
    "is_unit_of_work",
    "just_flushed",
    "keys_set",
    "made_by_flush",
    "names_entity",
    "old_and_new",
    "prefixes",
    "replaces",
    "savepoint_word",
    "unflushed",
    "written",
]

_PERSISTENCE = vars(persistence)


def is_flushing(session: Session) -> bool:
    """True while the unit of work is sending statements."""
    return session._flushing


def is_batch(context: Any) -> bool:
    """True for an INSERT of many rows that is sent in batches, each of which is a statement made of the one that is known."""
    return context.execute_style is ExecuteStyle.INSERTMANYVALUES


def is_clean(session: Session) -> bool:
    """True if a flush would find nothing to do."""
    return session._is_clean()


def is_unit_of_work(context: Any) -> bool:
    """True if a statement was made by the unit of work, or by its relatives that write without objects.

    They, and nobody else, compile into a cache of the mapper; ORM-enabled statements of the application are
    told by their plugin.
    """
    cache = context.execution_options.get("compiled_cache")
    if cache is None or cache is context.root_connection.engine._compiled_cache:
        return False
    return not context.invoked_statement._propagate_attrs


def savepoint_word(statement: Any) -> str:
    """What a statement begins with that makes a savepoint or ends one: "savepoint", "release" or "rollback_to"; else "".

    SQLAlchemy has no other mark for these.
    """
    name: str = statement.__visit_name__
    return name.removesuffix("_savepoint") if name.endswith("savepoint") else ""


def is_of_relationship() -> bool:
    """True while a flush executes a statement on the secondary table of a relationship; asked by what sees it executed.

    Such statements compile into the engine's cache, as those of the application do, and look like them.
    """
    frame = python_inspect.currentframe()
    for _ in range(14):
        if frame is None:
            return False
        if frame.f_code.co_name == "_run_crud" and frame.f_globals["__name__"] == "sqlalchemy.orm.dependency":
            return True
        frame = frame.f_back
    return False


def flush_of(context: Any) -> UOWTransaction | None:
    """The flush that sends a statement; None where none does. Asked by what sees it executed.

    A connection may serve several Sessions, and the execution does not know for which of them it is; the function of
    the unit of work that sends it does.
    """
    frame = _sender(context)
    flush: UOWTransaction | None = None if frame is None else frame.f_locals["uowtransaction"]
    return flush


def is_of_flush(context: Any) -> bool:
    """True if a flush sends a statement to the table of a mapper; what :func:`flush_of` comes to, for less time."""
    return _sender(context) is not None


def _sender(context: Any) -> FrameType | None:
    """The function of the unit of work that sends a statement, of which it is told by nobody.

    None for the ``bulk_…`` methods, which call the same functions without a flush, for what is executed within an event
    of a flush, and where the application compiles its own statements into a cache of its own.
    """
    frame = python_inspect.currentframe() if is_unit_of_work(context) else None
    while frame is not None:
        if frame.f_globals is _PERSISTENCE:
            caller = frame.f_back
            sends = frame.f_code.co_name.startswith("_emit_")
            return frame if sends and caller is not None and caller.f_globals is _PERSISTENCE else None
        frame = frame.f_back
    return None


def columns_set(statement: Any) -> list[Any]:
    """The columns that an INSERT or UPDATE was told in ``values()`` or the like; strings where they were named."""
    pairs = getattr(statement, "_ordered_values", None)
    return [column for column, _ in pairs] if pairs else list(statement._values or ())


def keys_set(compiled: Any) -> Collection[str]:
    """The keys of the columns that an UPDATE of the unit of work sets, and of the parameters of its WHERE clause."""
    keys: list[str] = compiled.column_keys or []
    told = compiled.statement._values
    return {*keys, *(getattr(each, "key", each) for each in told)} if told else keys


def columns_upserted(statement: Any) -> list[Any]:
    """The columns that an INSERT sets in rows which are there already; strings where they were named."""
    found: list[Any] = []
    for element in iterate(statement):
        if element.__visit_name__ == "on_conflict_do_update":
            found.extend(dict(cast("Any", element).update_values_to_set))
        elif element.__visit_name__ == "on_duplicate_key_update":
            found.extend(dict(cast("Any", element).update))
    return found


def inserts_one(statement: Any) -> bool:
    """True if an INSERT has VALUES for one row, and makes it or fails: it does not leave conflicts alone."""
    alone = bool(statement._prefixes) or getattr(statement, "_post_values_clause", None) is not None
    return statement.select is None and not statement._multi_values and not alone


def prefixes(statement: Any) -> list[str]:
    """What an INSERT, UPDATE or DELETE was given by ``prefix_with()``, as text."""
    return [str(clause) for clause, _ in statement._prefixes]


def appended(statement: Any) -> list[str]:
    """What a SELECT was given by ``suffix_with()`` and ``with_statement_hint()``, as text."""
    return [
        *(str(clause) for clause, _ in statement._suffixes),
        *(text for _, text in statement._statement_hints),
    ]


def names_entity(statement: Any) -> bool:
    """True if what an INSERT, UPDATE or DELETE writes to was given as an entity, and not as a table.

    Only then do parameter sets of an UPDATE hold the primary keys of rows.
    """
    return "parententity" in statement.table._annotations


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
    statement, custom = _dml(compiled), is_custom(compiled)
    if statement.is_dml:
        tables = [getattr(statement, "table", None)]  # of the application's own, nobody knows what they have
        # a bulk statement of a joined subclass is compiled once for each of its tables, which is only noted aside
        noted = statement._annotations
        tables += [noted[key] for key in ("_emit_insert_table", "_emit_update_table") if key in noted]
        tables += getattr(compiled.dml_compile_state, "_extra_froms", None) or ()
        found += [_written(statement, table, custom) for table in tables]
    for cte in getattr(compiled, "ctes", None) or ():
        if cte.element.is_dml:
            found.append(_written(cte.element, cte.element.table, custom))
    return found


def _written(statement: Any, selectable: Any, custom: bool) -> Written:
    while selectable is not None and not isinstance(selectable, Table):
        selectable = getattr(selectable, "element", None)
    # an upsert, INSERT OR REPLACE, or UPDATE OR REPLACE, may do either
    either = bool(statement._prefixes) or getattr(statement, "_post_values_clause", None) is not None
    either = either or custom or (isinstance(selectable, Table) and replaces(selectable))
    return Written(selectable, statement.is_delete or either, statement.is_update or either)


def replaces(table: Table) -> bool:
    """True for a table of SQLite in which a new row may take the place of others, by ON CONFLICT REPLACE."""
    return remembered(table, _replaces)


def _replaces(table: Table) -> bool:
    return any(
        str(value).upper() == "REPLACE"
        for each in (*table.constraints, *table.columns)
        for name, value in each.dialect_kwargs.items()
        if name.startswith("sqlite_on_conflict")
    )


def holds_text(compiled: Any) -> bool:
    """True for a whole textual statement that does not look like one.

    One that was told which columns it returns, by itself or as a CTE, looks like a SELECT, and may be a DELETE with
    RETURNING. And what looks like DDL may be anything, as ``DDL("…")``.
    """
    known: bool | None = compiled.__dict__.get(_TEXT)
    if known is None:
        statements = [_dml(compiled), *(cte.element for cte in getattr(compiled, "ctes", None) or ())]
        known = compiled.__dict__[_TEXT] = any(isinstance(each, (DDL, TextualSelect)) for each in statements)
    return known


_TEXT = "_querycache_text"


def is_custom(compiled: Any) -> bool:
    """True where the application renders a statement itself, or a CTE of it: what it comes to, its text tells."""
    known: bool | None = compiled.__dict__.get(_CUSTOM)
    if known is None:
        statements = [_dml(compiled), *(cte.element for cte in getattr(compiled, "ctes", None) or ())]
        known = any(_is_custom(each, compiled.dialect) for each in statements)
        compiled.__dict__[_CUSTOM] = known
    return known


_CUSTOM = "_querycache_custom"


def unflushed(session: Session) -> tuple[list[Any], list[Any], list[Any]]:
    """The objects of ``session.new``, ``dirty`` and ``deleted``, without the sets that those properties make."""
    deleted = session._deleted
    dirty = [state.obj() for state in session._dirty_states if state not in deleted]
    return list(session._new.values()), dirty, list(deleted.values())


def just_flushed(session: Session, context: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """What :func:`unflushed` gave when the flush began that has just sent its statements, as far as can be told.

    What an ``after_flush`` listener has added or deleted since is left out, which is for the next flush. What such a
    listener has changed is not: SQLAlchemy will forget of it when the flush ends, and no flush writes it.
    """
    states = context.states  # each with (is deleted, is only listed)
    gone = {state: each for state, each in session._deleted.items() if states.get(state, (False,))[0]}
    new = [instance for state, instance in session._new.items() if state in states]
    return new, [state.obj() for state in session._dirty_states if state not in gone], list(gone.values())


def flushed(context: Any) -> Iterator[tuple[Any, bool]]:
    """The states that a flush has written, each with True where it was deleted."""
    for state, (is_delete, list_only) in context.states.items():
        # one that was to be deleted, and is replaced by another under its primary key, is listed only
        if is_delete or not list_only:
            yield state, is_delete


UNKNOWN = object()
"""Stands for a value that only the database knows."""


class Held(NamedTuple):
    """How the objects of a mapper hold the values of a column.

    Attributes:
        name: of the column.
        primary: whether it is of the table's primary key.
        key: of the attribute; None for a column that is not mapped, or whose values the server makes.
        position: in the mapper's primary key; None where it is not of that.
        left_out: whether a row that was inserted without a value has none.
        remade: whether a flush may by itself put a value into an object that was there before.
        number: whether it is of integers.
    """

    name: str
    primary: bool
    key: str | None
    position: int | None
    left_out: bool
    remade: bool
    number: bool


def held(mapper: Mapper[Any], column: Column[Any]) -> Held:
    """How the objects of a mapper hold the values of a column of one of its tables."""
    key = None
    if not is_made_by_database(column):
        with suppress(UnmappedColumnError):
            key = mapper.get_property_by_column(column).key
    return Held(
        column.name,
        column.primary_key,
        key,
        mapper.primary_key.index(column) if column in mapper.primary_key else None,
        column.server_default is None,
        column.onupdate is not None or column is mapper.version_id_col,
        isinstance(column.type, Integer),
    )


def old_and_new(state: Any, columns: Iterable[Held]) -> list[tuple[object, object]]:
    """The values of columns before and after the flush that has just sent its statements, as far as their object knows.

    What only the database knows is :data:`UNKNOWN`.
    """
    identity, current, committed = state.key, state.dict, state.committed_state
    found: list[tuple[object, object]] = []
    for held in columns:
        key = held.key
        new: object
        if key is None:
            found.append((UNKNOWN, UNKNOWN))
            continue
        if key in current:
            new = current[key]
        elif identity is not None and held.position is not None:
            new = identity[1][held.position]
            found.append((new, new))
            continue
        elif identity is None and held.left_out and key not in state.expired_attributes:
            new = None
        else:
            new = UNKNOWN
        old = committed.get(key, new)
        if old is LoaderCallableStatus.NO_VALUE:
            # what was never set had no value before an INSERT; otherwise it was not loaded
            old = None if identity is None else UNKNOWN
        if held.number and new is not None and not isinstance(new, int):
            new = UNKNOWN  # what number it makes of text, for example
        found.append((old, new))
    return found


def made_by_flush(state: Any, held: Held) -> bool:
    """True if the flush itself has put the value of a column into an object that was there before.

    It leaves no history of that: what the value was before, nobody knows any more.
    """
    return (
        held.remade
        and held.key is not None
        and state.key is not None
        and held.key not in state.committed_state
    )


def custom_constructs(rendered: SQLCompiler) -> set[str]:
    """What the application renders itself in a statement: ``@compiles.`` and the name, in lower case."""
    state = rendered.compile_state
    statement = getattr(state, "statement", None)
    root = cast("Any", rendered.statement if statement is None else statement)
    found = set()
    for element in [*iterate(root), *_made_by_types(root, rendered.dialect)]:
        if _is_custom(element, rendered.dialect):
            name = getattr(element, "name", None)
            found.add(f"@compiles.{name if isinstance(name, str) else type(element).__name__}".lower())
    return found


def _is_custom(element: Any, dialect: Dialect) -> bool:
    """True for what the application renders itself on a dialect, rather than for others only."""
    for each in type(element).__mro__:
        dispatcher = getattr(each, "_compiler_dispatcher", None)
        if dispatcher is not None:
            render = dispatcher.specs.get(dialect.name, dispatcher.specs.get("default"))
            # what is above it does it otherwise
            if getattr(render, "__name__", "") != "_wrap_existing_dispatch":
                return True
    return False


def _made_by_types(root: Any, dialect: Dialect) -> Iterator[Any]:
    """What types of the application put around columns that are selected and around parameters, which is only made when these
    are rendered; also of columns within, around which it may put nothing."""
    for element in iterate(root):
        if isinstance(element, BindParameter):
            yield from _put_around(element, "bind_expression", dialect)
        elif isinstance(element, Select):
            for column in element.selected_columns:
                yield from _put_around(column, "column_expression", dialect)
        elif isinstance(element, Values):
            for column in element._column_args:
                yield from _put_around(column, "bind_expression", dialect)


def _put_around(element: Any, method: str, dialect: Dialect) -> Iterator[Any]:
    made: Any = None
    with suppress(Exception):  # it may not be for all of them that it is rendered
        made = getattr(element.type.dialect_impl(dialect), method)(element)
    if made is not None:
        yield from iterate(made)


def cache_key_of(statement: Any) -> Any:
    """The key under which SQLAlchemy caches a statement's compiled form; None where it has none.

    Raises:
        ConfigurationError: it is not a statement.
    """
    if not isinstance(statement, ClauseElement):
        raise ConfigurationError(f"{statement!r} is not a statement; give a select()")
    key = statement._generate_cache_key()
    return key.key if key is not None else None
