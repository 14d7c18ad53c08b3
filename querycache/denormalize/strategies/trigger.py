"""Strategy "trigger": the database keeps the column by itself, for every writer (`triggers.py` writes the DDL).

Inside the application nothing is left to do but to forget the values in memory: after a flush that touched the chain,
parents in the session have their column expired.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, event
from sqlalchemy import inspect as sqlalchemy_inspect
from sqlalchemy.orm import Session

from querycache.denormalize.chain import Aggregate, Key
from querycache.denormalize.plan import Place, Plan, plan_of
from querycache.denormalize.strategies.base import Strategy
from querycache.denormalize.triggers import drop_statements, trigger_statements
from querycache.dependencies import written_by_triggers

__all__ = ["Trigger", "parents_in"]


class Trigger(Strategy):
    name = "trigger"

    def attach(self, plan: Plan, aggregate: Aggregate) -> None:
        if not event.contains(plan.metadata, "after_create", _create):
            event.listen(plan.metadata, "after_create", _create)
        # Whatever a cache answers from the parent's rows changes with the rows below, and no statement shows it.
        chain = aggregate.chain
        written_by_triggers(
            aggregate.table,
            {table for level in range(1, chain.depth + 1) for table in plan.tables_of(Place(chain, level))},
        )

    def after_flush(self, session: Session, aggregates: Sequence[Aggregate]) -> dict[Aggregate, set[Key]]:
        return parents_in(session, aggregates)


def parents_in(session: Session, aggregates: Sequence[Aggregate]) -> dict[Aggregate, set[Key]]:
    """For each aggregate the parents that the session holds with their column loaded."""
    stale: dict[Aggregate, set[Key]] = {aggregate: set() for aggregate in aggregates}
    for instance in (*session.identity_map.values(), *session.new):
        state = sqlalchemy_inspect(instance)
        for aggregate in aggregates:
            if state.mapper.isa(aggregate.chain.root) and aggregate.key in state.dict:
                key = tuple(state.mapper.primary_key_from_instance(instance))
                stale[aggregate].add(key)
    return stale


def _create(metadata: Any, connection: Connection, **options: Any) -> None:
    """After `create_all()`: make the triggers, in place of any that were there."""
    table = next(iter(metadata.tables.values()))
    plan = plan_of(table)
    if plan is None:
        return
    for statement in (
        *drop_statements(plan, connection.dialect),
        *trigger_statements(plan, connection.dialect),
    ):
        connection.exec_driver_sql(statement)
