"""What is checked of the classes on a path and their tables: that their rows are where the library looks for them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Column, Table
from sqlalchemy.orm import Mapper, RelationshipProperty

from querycache.denormalize.plan import Plan
from querycache.errors import ConfigurationError
from querycache.sa_internals import replaces

__all__ = ["check_classes", "check_conflicts"]


def check_classes(root: Mapper[Any], steps: Iterable[RelationshipProperty[Any]], name: str) -> None:
    """Check the classes of a path one by one.

    Raises:
        ConfigurationError: naming the class.
    """
    for step in steps:
        if not isinstance(step.entity, Mapper):
            raise ConfigurationError(
                f"{name}: {step} leads to an alias of {step.mapper.class_.__name__}, which may stand for a part of its rows;"
                " take a relationship to the class, with where= over the children"
            )
    for mapper in (root, *(step.mapper for step in steps)):
        _check_table(mapper, name)
        _check_told_apart(mapper, name)


def _check_table(mapper: Mapper[Any], name: str) -> None:
    """Locks, statements and foreign keys are of tables, and rows of a join are of none. Classes that inherit have more than
    one, but each its own."""
    if not isinstance(mapper.local_table, Table):
        raise ConfigurationError(
            f"{name}: {mapper.class_.__name__} is mapped to a join or a subquery, changes of whose rows cannot be followed;"
            " map it to one table, and have what is joined to it in a relationship, or by joined-table inheritance"
        )
    if any(each.concrete for each in mapper.self_and_descendants):
        raise ConfigurationError(
            f"{name}: {mapper.class_.__name__} is mapped with concrete inheritance, whose classes have their rows in tables"
            " of their own, with keys that may be the same; take joined-table or single-table inheritance, or a mixin, and"
            " aggregate over each class by itself"
        )


def _check_told_apart(mapper: Mapper[Any], name: str) -> None:
    """SQLAlchemy does not tell the rows of a class by an expression where its table has an alias, as it has in most queries
    here; and what such an expression reads would have to be followed."""
    told_by = mapper.polymorphic_on
    if mapper.single and told_by is not None and not isinstance(told_by, Column):
        raise ConfigurationError(
            f"{name}: rows of {mapper.class_.__name__} are told from others of their table by an expression,"
            f" {getattr(told_by, 'element', told_by)}; take a column as polymorphic_on, or aggregate over all rows of the"
            " table with where="
        )


def check_conflicts(plan: Plan) -> None:
    """SQLite deletes rows without a trace where a table has ON CONFLICT REPLACE and a new row is in their way.

    Raises:
        ConfigurationError: naming the table.
    """
    for table in sorted({*plan.tables, *plan.edges, *plan.columns}, key=lambda each: each.fullname):
        if not replaces(table):
            continue
        held = {one.name for one in plan.columns.get(table, {}).values()}
        held |= {one.name for one in plan.depending_on(table) if one.strategy != "trigger"}
        if held:
            raise ConfigurationError(
                f"{', '.join(sorted(held))}: {table.fullname} has ON CONFLICT REPLACE, by which SQLite deletes rows"
                " that are in the way of another unseen; leave out sqlite_on_conflict…=, and delete them before"
            )
