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

from querycache.denormalize.errors import UncoveredChange
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
        UncoveredChange: naming the table and what to do.
    """
    if not isinstance(statement, (Insert, Update, Delete)) or _covered.get():
        return
    option = execution_options.get("denormalize")
    if option in ("own", "unchecked"):
        return
    table = statement.table
    plan = plan_of(table) if isinstance(table, Table) else None
    if plan is None:
        return
    if table in plan.tables or (isinstance(statement, Delete) and table in plan.edges):
        held = sorted(aggregate.name for aggregate in plan.depending_on(table))
        raise UncoveredChange(
            f"{type(statement).__name__} on {table.fullname} outside the unit of work would leave"
            f" {', '.join(held)} wrong; use the Session (also for bulk statements: session.execute(…)), or the"
            ' execution option {"denormalize": "unchecked"} and then repair()'
        )
