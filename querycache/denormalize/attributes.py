"""The attributes of mapped classes by which rows are told apart, and keys, which are what they hold."""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any, Final

from sqlalchemy import BinaryExpression, BindParameter, Column, ColumnElement, Table, bindparam, tuple_
from sqlalchemy.orm import Mapper
from sqlalchemy.sql import operators, visitors

__all__ = [
    "KEYS",
    "Key",
    "attribute_columns",
    "changed_by_update",
    "in_order",
    "key_condition",
    "key_in",
    "mapped_attributes",
    "primary_keys",
]

KEYS: Final = "denormalize_keys"
"""A parameter; its name, as those in `writing.py`, must be that of no column of a table that is updated."""

Key = tuple[Any, ...]
"""A primary key: always a tuple, in the order of the mapper's primary key."""


def primary_keys(mapper: Mapper[Any]) -> tuple[str, ...]:
    """The names of the primary key attributes of `mapper`, in its order."""
    return tuple(mapper.get_property_by_column(column).key for column in mapper.primary_key)


def key_in(table: Table, mapper: Mapper[Any]) -> tuple[Column[Any], ...] | None:
    """The columns of `table` that hold the primary key of `mapper`, which need not be that of the table, in its order; None
    if it does not hold it. What its tables are joined by is the same in each."""
    pairs = [
        {each.left, each.right}
        for each in visitors.iterate(mapper.persist_selectable)
        if isinstance(each, BinaryExpression) and each.operator is operators.eq
    ]
    found = []
    for column in mapper.primary_key:
        same = {column, *mapper.get_property_by_column(column).columns}
        for _ in pairs:
            same.update(*(pair for pair in pairs if not pair.isdisjoint(same)))
        held = [each for each in table.columns if each in same]
        found.extend(held[:1])
    return tuple(found) if len(found) == len(mapper.primary_key) else None


def attribute_columns(entity: Any, names: Sequence[str]) -> tuple[ColumnElement[Any], ...]:
    return tuple(getattr(entity, name) for name in names)


_ORDERED: Final = (
    str,
    int,
    float,
    bytes,
    Decimal,
    datetime.date,
    datetime.time,
    datetime.timedelta,
    uuid.UUID,
)


def in_order(keys: Iterable[Key]) -> list[Key]:
    """Keys in the order in which every transaction locks and writes their rows.

    Members of an Enum and the values of other types may have no order of their own, and are taken as text.
    """
    found = list(keys)
    if all(isinstance(part, _ORDERED) for part in (found[0] if found else ())):
        return sorted(found)
    return sorted(found, key=_as_ordered)


def _as_ordered(key: Key) -> Key:
    return tuple(part if isinstance(part, _ORDERED) else str(part) for part in key)


def key_condition(columns: Sequence[ColumnElement[Any]]) -> ColumnElement[bool]:
    """The condition that `columns` are one of the keys given as parameter `KEYS`."""
    keys: BindParameter[Any] = bindparam(KEYS, expanding=True)
    return columns[0].in_(keys) if len(columns) == 1 else tuple_(*columns).in_(keys)


def mapped_attributes(mapper: Mapper[Any], columns: Iterable[tuple[str, str]]) -> set[str]:
    """The column attributes of `mapper` that stand for one of the given (full table name, column name)."""
    wanted = set(columns)
    return {
        attribute.key
        for attribute in mapper.column_attrs
        for column in attribute.columns
        if isinstance(table := getattr(column, "table", None), Table)
        and (table.fullname, column.name) in wanted
    }


def changed_by_update(mapper: Mapper[Any], names: Iterable[str]) -> frozenset[str]:
    """Those of the attributes `names` that an UPDATE of other columns may change as well: by onupdate=, because the
    database computes them, or as the version of the row."""
    return frozenset(
        name
        for name in names
        if name in mapper.column_attrs
        for column in mapper.column_attrs[name].columns
        if getattr(column, "onupdate", None) is not None
        or getattr(column, "server_onupdate", None) is not None  # a Computed too
        or column is mapper.version_id_col
    )
