"""The guard: writes that pass the unit of work by, on tables that aggregates are computed from, are refused.

`bulk_save_objects()`, `bulk_insert_mappings()`, Core statements on a connection, DML inside a CTE or `from_statement()`
reach no event of the Session that could bring the aggregates forward. They do reach the dialect, and there they are
stopped, unless they are a flush's own or a covered bulk statement; a CTE even then, since what is accounted for is the
statement around it. Those that mapper events execute during a flush are not its own, and neither are those of `bulk_…`
methods that these call. Whoever knows better says so, and
repairs afterwards:

    connection.execute(insert(Comment), rows, execution_options={"denormalize": "unchecked"})

Textual SQL cannot be understood here; for writers that use it there is strategy "trigger".

The dialect is listened to, and not the engine, which takes a tenth longer for a small statement once it has any listener.
"""

from __future__ import annotations

import weakref
from collections.abc import Container, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from sqlalchemy import Connection, Delete, Insert, Table, Update
from sqlalchemy.orm import FromStatement, Session, UOWTransaction

from querycache.denormalize.dml import columns_written, keys_upserted, replaces_rows, set_elsewhere
from querycache.denormalize.errors import ReadOnlyAggregate, UncoveredChange
from querycache.denormalize.plan import plan_of, planned_table
from querycache.denormalize.readonly import becomes_another
from querycache.sa_internals import connections, is_flushing, is_of_flush, is_of_relationship

__all__ = [
    "check_elsewhere",
    "cover",
    "covered",
    "do_execute",
    "do_execute_no_params",
    "is_any_at_work",
    "is_covered",
    "refuse_aggregates",
    "refuse_replacing",
    "refuse_within_flush",
    "uncover",
]

_flushes: ContextVar[tuple[weakref.ref[UOWTransaction], ...]] = ContextVar(
    "querycache_denormalize_flushes", default=()
)
"""What runs in this thread or task: one flush, or more where a mapper event uses another Session."""

_SEVERAL_TABLES = ("mysql", "mariadb")
"""Databases whose UPDATE may set columns of several tables."""

_bulk: ContextVar[bool] = ContextVar("querycache_denormalize_bulk", default=False)


def cover(flush: UOWTransaction) -> None:
    """From here on, in this thread or task, DML belongs to a flush that is accounted for."""
    others = _flushes.get()
    _flushes.set((*_still(others, flush.session), weakref.ref(flush)) if others else (weakref.ref(flush),))


def uncover(session: Session) -> None:
    if others := _flushes.get():
        _flushes.set(_still(others, session))


def _still(
    flushes: tuple[weakref.ref[UOWTransaction], ...], ended: Session
) -> tuple[weakref.ref[UOWTransaction], ...]:
    return tuple([each for each in flushes if (flush := each()) is not None and flush.session is not ended])


def is_covered() -> bool:
    return _bulk.get() or _is_flushing()


def _is_flushing() -> bool:
    for each in _flushes.get():
        flush = each()
        if flush is not None and flush.has_work:  # One that finds nothing to do ends without an event.
            return True
    return False


def _is_accounted_for(context: Any) -> bool:
    return _bulk.get() or (_is_flushing() and (is_of_flush(context) or is_of_relationship()))


@contextmanager
def covered() -> Iterator[None]:
    token = _bulk.set(True)
    try:
        yield
    finally:
        _bulk.reset(token)


def do_execute(cursor: Any, sql: str, parameters: Any, context: Any) -> None:
    """The dialect's event: refuse DML that nobody accounts for.

    Raises:
        ReadOnlyAggregate: if it writes an aggregate.
        UncoveredChange: naming the table and what to do.
    """
    compiled = context.compiled
    if compiled is None:  # textual SQL
        return
    ctes = getattr(compiled, "ctes", None)
    top = context.isinsert or context.isupdate or context.isdelete
    if not (ctes or top) or context.execution_options.get("denormalize") in ("own", "unchecked"):
        return
    for cte in ctes or ():
        if isinstance(cte.element, (Insert, Update, Delete)):
            _check(cte.element, cte.element.compile(dialect=context.dialect), "inside a CTE")
    if top and not _is_accounted_for(context):
        statement = compiled.statement
        if isinstance(statement, FromStatement):
            _check(statement.element, compiled, "inside from_statement()")
        else:
            _check(statement, compiled, "outside the unit of work")


def do_execute_no_params(cursor: Any, sql: str, context: Any) -> None:
    """The same, of a statement that is executed without looking for parameters in it."""
    do_execute(cursor, sql, (), context)


def check_elsewhere(statement: Any, but: Container[Table] = ()) -> None:
    """Refuse an UPDATE of several tables for what it writes in those that are not its own.

    Args:
        but: tables whose rows are accounted for; their aggregates are not for it to set all the same.
    """
    for selectable, names in set_elsewhere(statement).items():
        table = planned_table(selectable)
        if table is not None:
            written = _keys(table, names)
            refuse_aggregates(table, written, statement)
            if table not in but:
                _refuse(table, written, "UPDATE", "together with another table")


def _check(statement: Any, compiled: Any, where: str) -> None:
    if compiled.dialect.name in _SEVERAL_TABLES:
        check_elsewhere(statement)
    table = planned_table(statement.table)
    if table is None:
        return
    kind = statement.__visit_name__.upper()
    written = columns_written(compiled, table)
    refuse_aggregates(table, written, statement)
    refuse_replacing(table, statement)
    _refuse(table, written, kind, where)


def _keys(table: Table, names: set[str]) -> set[str]:
    return {str(column.key) for column in table.columns if column.name in names}


def refuse_aggregates(
    table: Table, written: set[str] | None, statement: Any, *, by_attribute: bool = False
) -> None:
    """Refuse a statement that sets aggregates, or makes rows those of a class that has some.

    Args:
        written: the columns that it sets, by their keys; None if that cannot be told.
        by_attribute: whether it may name them by their attributes, too.

    Raises:
        ReadOnlyAggregate: naming the aggregate.
        UncoveredChange: where it cannot be told whether it sets one.
    """
    plan = plan_of(table)
    if plan is None:
        return
    kind = statement.__visit_name__.upper()
    held = plan.columns.get(table, {})
    if written is None:
        if not held:
            return
        raise UncoveredChange(
            f"which columns the {kind} on {table.fullname} sets cannot be told from its text, and"
            f" {', '.join(sorted(one.name for one in held.values()))} must not be among them; write it without comments and"
            ' text of your own, or take the execution option {"denormalize": "unchecked"} and then repair()'
        )
    for name, aggregate in held.items():
        if name in written or (by_attribute and aggregate.key in written):
            raise ReadOnlyAggregate(
                f"{aggregate.name} is kept by {aggregate.kind.name}(…) and cannot be set by {kind}; run repair() if it"
                " is wrong"
            )
    changed = keys_upserted(statement, table) if isinstance(statement, Insert) else written
    for column, aggregates in plan.discriminators.get(table, {}).items():
        names = {str(column.key)}
        if by_attribute:
            names.add(aggregates[0].chain.root.get_property_by_column(column).key)
        if not names.isdisjoint(changed):
            raise becomes_another(aggregates, f"{column} cannot be set by {kind}")


def refuse_replacing(table: Table, statement: Any) -> None:
    """Refuse INSERT OR REPLACE and its like where the rows that it deletes, of which nothing tells, count for aggregates or
    hold some.

    Raises:
        UncoveredChange: naming the table.
    """
    plan = plan_of(table)
    if plan is None or not replaces_rows(statement):
        return
    held = {one.name for one in plan.columns.get(table, {}).values()}
    if table in plan.tables or table in plan.edges:
        held |= {one.name for one in plan.depending_on(table) if one.strategy != "trigger"}
    if held:
        raise UncoveredChange(
            f"OR REPLACE on {table.fullname} deletes the rows that are in its way unseen, which would leave"
            f" {', '.join(sorted(held))} wrong; delete them and then insert or update, in two statements"
        )


def is_any_at_work() -> bool:
    """Whether a flush that is accounted for may be at work in this thread or task."""
    return bool(_flushes.get())


def refuse_within_flush(
    session: Session, connection: Connection, what: str, names: str, *, flushes: bool = False
) -> None:
    """Refuse a write of rows while a flush is at work on the same connection, which has looked at what it changes before,
    and will take what it then finds for its own doing.

    Args:
        what: is to be written.
        names: of the aggregates concerned.
        flushes: whether it is the flush of the Session itself, for which only those of others are in the way.

    Raises:
        UncoveredChange: naming these.
    """
    for each in _flushes.get():
        flush = each()
        if flush is None or not is_flushing(flush.session):
            continue
        own = flush.session is session
        if (own and not flushes) or (not own and connection in connections(flush.session)):
            raise UncoveredChange(
                f"{what} while a flush is at work, as mapper events, and before_flush and after_flush listeners, execute"
                f" it, would be counted twice, or not at all, for {names}; set the attributes of the objects in a"
                " before_flush listener that was registered on the Session class before the mappers configured, or execute"
                " it after the flush"
            )


def _refuse(table: Table, written: set[str] | None, kind: str, where: str) -> None:
    plan = plan_of(table)
    assert plan is not None
    if kind == "UPDATE" and written is not None and not written & plan.column_keys(table):
        return
    if table in plan.tables or (kind == "DELETE" and table in plan.edges):
        held = sorted(one.name for one in plan.depending_on(table) if one.strategy != "trigger")
        if held:
            raise UncoveredChange(
                f"{kind} on {table.fullname} {where} would leave {', '.join(held)} wrong; use the"
                " Session (also for bulk statements: session.execute(…)), each statement by itself and with the mapped"
                ' table, or the execution option {"denormalize": "unchecked"} and then repair()'
            )
