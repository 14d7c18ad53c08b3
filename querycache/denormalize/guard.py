"""The guard: writes that pass the unit of work by, on tables that aggregates are computed from, are refused.

`bulk_save_objects()`, `bulk_insert_mappings()` and Core statements on a connection reach no event of the Session that
could bring the aggregates forward. They do reach the engine, and there they are stopped unless a flush or a covered
bulk statement is running. Whoever knows better says so, and repairs afterwards:

    connection.execute(insert(Comment), rows, execution_options={"denormalize": "unchecked"})

Textual SQL cannot be understood here; for writers that use it there is strategy "trigger".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from sqlalchemy import Delete, Insert, Table, Update

from querycache.denormalize.dml import columns_written
from querycache.denormalize.errors import ReadOnlyAggregate, UncoveredChange
from querycache.denormalize.plan import plan_of

__all__ = ["before_execute", "cover", "covered", "is_covered", "uncover"]

_covered: ContextVar[bool] = ContextVar("querycache_denormalize_covered", default=False)


def cover() -> None:
    """From here on, in this thread or task, DML belongs to a flush that is accounted for."""
    _covered.set(True)


def uncover() -> None:
    _covered.set(False)


def is_covered() -> bool:
    return _covered.get()


@contextmanager
def covered() -> Iterator[None]:
    token = _covered.set(True)
    try:
        yield
    finally:
        _covered.reset(token)


def before_execute(
    connection: Any, statement: Any, multiparams: Any, params: Any, execution_options: Any
) -> None:
    """The engine's event: refuse DML that nobody accounts for.

    Raises:
        ReadOnlyAggregate: if it writes an aggregate.
        UncoveredChange: naming the table and what to do.
    """
    if not isinstance(statement, (Insert, Update, Delete)) or _covered.get():
        return
    option = execution_options.get("denormalize")
    if option in ("own", "unchecked"):
        return
    table = statement.table
    if not isinstance(table, Table):
        return
    plan = plan_of(table)
    if plan is None:
        return
    rows = [dict(row) for row in multiparams] or ([dict(params)] if params else [])
    written = columns_written(statement, rows, connection.dialect)
    kind = statement.__visit_name__.upper()
    for name, aggregate in plan.columns.get(table, {}).items():
        if written is not None and name in written:
            raise ReadOnlyAggregate(
                f"{aggregate.name} is kept by {aggregate.kind.name}(…) and cannot be set by {kind}; run repair() if it"
                " is wrong"
            )
    if isinstance(statement, Update) and written is not None and not written & plan.column_keys(table):
        return
    if table in plan.tables or (isinstance(statement, Delete) and table in plan.edges):
        held = sorted(one.name for one in plan.depending_on(table) if one.strategy != "trigger")
        if held:
            raise UncoveredChange(
                f"{kind} on {table.fullname} outside the unit of work would leave {', '.join(held)} wrong; use the"
                " Session (also for bulk statements: session.execute(…)), or the execution option"
                ' {"denormalize": "unchecked"} and then repair()'
            )
