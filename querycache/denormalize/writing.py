"""The UPDATEs: one a parent, in the order of tables and keys, as increments computed by the database.

Ordinary Core statements on the session's own connection and in its transaction, one row each by primary key, so
whoever watches the writes of that connection sees them as what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import groupby
from typing import Any

from sqlalchemy import ColumnElement, Table, and_, bindparam, case, func, literal_column, or_, update

from querycache.denormalize.aggregate import Aggregate
from querycache.denormalize.attributes import Key, in_order
from querycache.denormalize.chain import Chain
from querycache.denormalize.images import Image, recount
from querycache.denormalize.kinds import RECOUNT, How, Increment, Merge, Recount
from querycache.denormalize.locks import OWN, Locks
from querycache.denormalize.plan import Place

__all__ = ["Changes", "changes_between", "is_parent", "key_parameter", "meets", "write"]

Outcome = Increment | Merge | Recount
Changes = dict[Key, dict[Aggregate, Outcome]]
"""Parent key to what is to happen to its aggregates; for the aggregates of one table."""


def changes_between(
    aggregates: Iterable[Aggregate], before: Image, after: Image, recounted: Callable[[Aggregate], bool]
) -> Changes:
    """What brings the aggregates from the one image to the other.

    Args:
        recounted: whether an aggregate is computed anew wherever a row was touched, whatever the images say.
    """
    changes: Changes = {}
    for parent in before.keys() | after.keys():
        was, now = before.get(parent, {}), after.get(parent, {})
        for aggregate in aggregates:
            change: Outcome | None = RECOUNT
            if not recounted(aggregate):
                zero = aggregate.kind.zero
                change = aggregate.kind.change(was.get(aggregate, zero), now.get(aggregate, zero))
            if change is not None:
                changes.setdefault(parent, {})[aggregate] = change
    return changes


def write(locks: Locks, changes: Changes) -> dict[Table, set[Key]]:
    """Emit the UPDATEs; what is to be recounted is recounted first, under the parents' locks.

    Returns:
        the keys written, by table.
    """
    _resolve(locks, changes)
    tables: dict[Table, dict[Key, dict[Aggregate, Outcome]]] = {}
    for parent, outcomes in changes.items():
        for aggregate, outcome in outcomes.items():
            tables.setdefault(aggregate.table, {}).setdefault(parent, {})[aggregate] = outcome
    ordered = (
        tables
        if len(tables) == 1
        else sorted(tables, key=lambda held: (_rank(locks, tables[held]), held.fullname))
    )
    for table in ordered:
        _write_table(locks, table, tables[table])
    return {table: set(rows) for table, rows in tables.items()}


def _rank(locks: Locks, rows: Mapping[Key, Mapping[Aggregate, Any]]) -> int:
    return min(locks.plan.rank(aggregate.chain.root) for held in rows.values() for aggregate in held)


def _resolve(locks: Locks, changes: Changes) -> None:
    """Turn every Recount into the value to set."""
    wanted: dict[Chain, dict[tuple[Aggregate, ...], set[Key]]] = {}
    for parent, outcomes in changes.items():
        per_chain: dict[Chain, list[Aggregate]] = {}
        for aggregate, outcome in outcomes.items():
            if isinstance(outcome, Recount):
                per_chain.setdefault(aggregate.chain, []).append(aggregate)
        for chain, held in per_chain.items():
            wanted.setdefault(chain, {}).setdefault(tuple(held), set()).add(parent)
    if not wanted:
        return
    # All parents that will be written, in order, not only those to be counted: locking these first and the others by
    # their UPDATE would be another order than that of a transaction which counts nothing.
    locks.lock({Place(next(iter(wanted)), 0): changes.keys()}, roots=True)
    for chain, groups in wanted.items():
        for aggregates, keys in groups.items():
            counted = recount(locks, chain, aggregates, keys)
            for parent in keys:
                for aggregate in aggregates:
                    if parent in counted:
                        changes[parent][aggregate] = Merge("set", counted[parent][aggregate][1])
                    else:  # the parent is gone
                        del changes[parent][aggregate]


def _write_table(locks: Locks, table: Table, rows: Mapping[Key, Mapping[Aggregate, Outcome]]) -> None:
    prepared: list[tuple[tuple[tuple[Aggregate, How], ...], dict[str, Any]]] = []
    for parent in in_order(rows):
        outcomes = rows[parent]
        shape: list[tuple[Aggregate, How]] = []
        values: dict[str, Any] = {key_parameter(i): part for i, part in enumerate(parent)}
        for aggregate in sorted(outcomes, key=lambda held: held.key):
            outcome = outcomes[aggregate]
            assert not isinstance(outcome, Recount)
            if isinstance(outcome, Increment):
                values[_value_parameter(len(shape))] = aggregate.fit(outcome.amount)
                shape.append((aggregate, "add"))
            else:
                values[_value_parameter(len(shape))] = aggregate.fit(outcome.value)
                shape.append((aggregate, outcome.how))
        prepared.append((tuple(shape), values))
    for same_shape, group in groupby(prepared, key=lambda one: one[0]):
        statement = locks.plan.memo(("update", table, same_shape), partial(_statement, table, same_shape))
        locks.connection.execute(statement, [values for _, values in group], execution_options=OWN)


def _statement(table: Table, shape: tuple[tuple[Aggregate, How], ...]) -> Any:
    values = {
        aggregate.column: meets(
            aggregate, how, bindparam(_value_parameter(number), type_=aggregate.column.type)
        )
        for number, (aggregate, how) in enumerate(shape)
    }
    return update(table).where(is_parent(shape[0][0])).values(values)


def key_parameter(number: int) -> str:
    """The name of a parameter; SQLAlchemy keeps those that are names of the table's columns to itself."""
    return f"denormalize_key_{number}"


def _value_parameter(number: int) -> str:
    return f"denormalize_to_{number}"


def meets(aggregate: Aggregate, how: How, given: ColumnElement[Any]) -> ColumnElement[Any]:
    """What the column becomes when it meets `given`."""
    column = aggregate.column
    if how == "add":
        return func.coalesce(column, literal_column("0")) + given
    if how == "set":
        return given
    further = given < column if how == "least" else given > column
    return case((or_(column.is_(None), further), given), else_=column)


def is_parent(aggregate: Aggregate) -> ColumnElement[bool]:
    """The row whose key the parameters `key_parameter(0)`, … name."""
    return and_(
        *(
            column == bindparam(key_parameter(i), type_=column.type)
            for i, column in enumerate(aggregate.table_key)
        )
    )
