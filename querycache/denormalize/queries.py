"""The statements over a chain: what the images and recounts of `images.py` are read by, and the rows of the child."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Select, select

from querycache.denormalize.aggregate import Aggregate
from querycache.denormalize.attributes import attribute_columns, key_condition
from querycache.denormalize.chain import Chain

__all__ = ["Queried", "image_query", "recount_query"]


class Queried(NamedTuple):
    """A statement and where to find what in its rows."""

    statement: Select[Any]
    parent: slice
    levels: tuple[slice, ...]
    values: slice


def image_query(
    chain: Chain, aggregates: Sequence[Aggregate], level: int, above: tuple[int, ...], *, rows: bool
) -> Queried:
    """The joined rows that contain one of `:keys` at `level`.

    Grouped by the parent and by the keys of the levels `above`, with the parts of the aggregates; or, with
    `rows`, each row with the child's columns.
    """
    entities = chain.entities()
    parent = attribute_columns(entities[0], chain.keys[0])
    levels = tuple(attribute_columns(entities[i], chain.keys[i]) for i in above)
    columns: list[ColumnElement[Any]] = list(parent)
    places: list[slice] = []
    for keys in levels:
        places.append(slice(len(columns), len(columns) + len(keys)))
        columns.extend(keys)
    grouping = list(columns)
    if rows:
        columns += _child_columns(chain, aggregates, entities)
    else:
        columns += [part for aggregate in aggregates for part in aggregate.parts(entities)]
    statement = chain.join(select(*_distinct_names(columns)), entities, outer=False)
    statement = statement.where(key_condition(attribute_columns(entities[level], chain.keys[level])))
    if not rows:
        statement = statement.group_by(*grouping)
    return Queried(statement, slice(0, len(parent)), tuple(places), slice(len(grouping), None))


def recount_query(
    chain: Chain, aggregates: Sequence[Aggregate], *, rows: bool, locking: bool = False
) -> Queried:
    """Every parent of `:keys` with the stored values of `aggregates`, then their parts; or, with `rows`, one row
    for each child with its columns, and one row of NULLs for a parent without children.

    `locking` makes its subqueries locking reads, which that of the statement around them does not do.
    """
    entities = chain.entities()
    parent = attribute_columns(entities[0], chain.keys[0])
    stored = attribute_columns(entities[0], [aggregate.key for aggregate in aggregates])
    columns: list[ColumnElement[Any]] = [*parent, *stored]
    grouping = list(columns)
    if rows:
        columns += _child_columns(chain, aggregates, entities)
    else:
        columns += [part for aggregate in aggregates for part in aggregate.recount_parts(entities, locking)]
    statement = chain.join(select(*_distinct_names(columns)), entities, outer=True)
    statement = statement.where(key_condition(parent))
    if not rows:
        statement = statement.group_by(*grouping)
    return Queried(
        statement,
        slice(0, len(parent)),
        (slice(len(parent), len(parent) + len(stored)),),
        slice(len(grouping), None),
    )


def _child_columns(
    chain: Chain, aggregates: Sequence[Aggregate], entities: tuple[Any, ...]
) -> list[ColumnElement[Any]]:
    """What is read of a child, and what the aggregates need of its row besides."""
    extra = [column for aggregate in aggregates for column in aggregate.extra_columns(entities)]
    return [*attribute_columns(entities[-1], chain.leaf_columns), *extra]


def _distinct_names(columns: Sequence[ColumnElement[Any]]) -> list[ColumnElement[Any]]:
    return [column.label(f"c{number}") for number, column in enumerate(columns)]
