"""Strategy "trigger": the database keeps the column by itself, for every writer (`triggers.py` writes the DDL).

Inside the application nothing is left to do but to forget the values in memory: after a flush that touched the chain,
parents in the session have their column expired.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sqlalchemy import Connection, Table
from sqlalchemy import inspect as sqlalchemy_inspect
from sqlalchemy.engine.reflection import Inspector
from sqlalchemy.orm import Session

from querycache.declarations import written_by_triggers
from querycache.denormalize.aggregate import Aggregate
from querycache.denormalize.attributes import Key
from querycache.denormalize.ddl import Ddl
from querycache.denormalize.plan import Place, Plan
from querycache.denormalize.strategies.base import Strategy
from querycache.denormalize.triggers import DIALECTS, drop_statements, tables_of, trigger_statements

__all__ = ["Trigger", "drop_triggers", "make_triggers", "parents_in"]


class Trigger(Strategy):
    name = "trigger"

    def attach(self, plan: Plan, aggregate: Aggregate) -> None:
        # Whatever a cache answers from the parent's rows changes with the rows below, and no statement shows it.
        chain = aggregate.chain
        written_by_triggers(
            aggregate.table,
            {table for level in range(1, chain.depth + 1) for table in plan.tables_of(Place(chain, level))},
        )

    def after_flush(self, session: Session, aggregates: Sequence[Aggregate]) -> dict[Aggregate, set[Key]]:
        return parents_in(session, aggregates)


def parents_in(session: Session, aggregates: Sequence[Aggregate]) -> dict[Aggregate, set[Key]]:
    """For each aggregate the parents that the session holds with their column loaded; or as if it was: a new parent has no
    value of a column where NULL was inserted, and no access would load it."""
    stale: dict[Aggregate, set[Key]] = {aggregate: set() for aggregate in aggregates}
    for instance in (*session.identity_map.values(), *session.new):
        state = sqlalchemy_inspect(instance)
        for aggregate in aggregates:
            unread = aggregate.key in state.expired_attributes and aggregate.key not in state.dict
            if not unread and state.mapper.isa(aggregate.chain.root):
                key = tuple(state.mapper.primary_key_from_instance(instance))
                stale[aggregate].add(key)
    return stale


def make_triggers(plan: Plan, tables: Iterable[Table], connection: Connection) -> None:
    """Make the triggers of all aggregates that depend on one of the tables, in place of any that were there; but those
    whose other tables are still to be made come with the last of them."""
    ddl = _ddl(connection)
    wanted = _concerned(plan, tables)
    inspector: Inspector = sqlalchemy_inspect(connection)
    known = {
        table: inspector.has_table(table.name, schema=ddl.schema(table))
        for table in {table for aggregate in wanted for table in tables_of(aggregate)}
    }
    ready = [held for held in wanted if all(known[table] for table in tables_of(held))]
    if ready:
        _run(connection, drop_statements(plan, ddl, ready.__contains__))
        _run(connection, trigger_statements(plan, ddl, ready.__contains__))


def drop_triggers(plan: Plan, tables: Iterable[Table], connection: Connection) -> None:
    """Drop them before a table goes away: SQLite would compile them once more, and PostgreSQL keep their functions."""
    wanted = _concerned(plan, tables)
    if wanted and connection.dialect.name in DIALECTS:
        _run(connection, drop_statements(plan, _ddl(connection), wanted.__contains__))


def _concerned(plan: Plan, tables: Iterable[Table]) -> list[Aggregate]:
    held = [aggregate for aggregate in plan.aggregates if aggregate.strategy == "trigger"]
    return [aggregate for aggregate in held if not tables_of(aggregate).isdisjoint(tables)]


def _ddl(connection: Connection) -> Ddl:
    return Ddl(connection.dialect, connection.get_execution_options().get("schema_translate_map") or {})


def _run(connection: Connection, statements: Iterable[str]) -> None:
    for statement in statements:
        connection.exec_driver_sql(statement, execution_options={"no_parameters": True})
