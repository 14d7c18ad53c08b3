"""Tables as tags: what is told apart in them, and which tags a write changes.

A *tracked* column (primary key, foreign key, unique, or declared so) of an exact type is divided into *slots* by its
values. A *row write*, of which old and new values are known, changes the table and the slots of these values. A *set
write*, of which only the table is known, changes the table and its bulk tag, and so do foreign keys with ``ON
DELETE`` or ``ON UPDATE`` actions in the tables that refer to it. Where a statement pins a tracked column of a table
to values, its answer depends on their slots and on the bulk tag, instead of on the whole table
(:mod:`querycache.dependencies`).

    ============  ==================  =========================
    tag           a reader has it     a writer changes it
    ============  ==================  =========================
    table:T       unless T is pinned  by every write to T
    bulk:T        if T is pinned      by set writes to T
    slot:T.c:N    if c is pinned      by row writes, old and new
    change:T      if T is pinned by   by row writes but INSERT
                  other than its key
    ============  ==================  =========================

The last is there because the old values of a row come from an object, which may be older than the row: somebody may
have moved it to another parent meanwhile. Only of its primary key is an UPDATE or DELETE sure, by its WHERE clause.

**Schemas.** ``T`` is the table's label. One of a connection's default schema has two names, and what its default schema
is, a connection may be told by itself (``SET search_path``), so who does not say a schema may mean any:

    ================================  ===================  ====================================
    table                             a writer's labels    a reader's labels
    ================================  ===================  ====================================
    ``t``                             t                    t, and ?.t but for rows
    ``s.t``, s the default schema     t                    s.t, t
    ``s.t``                           s.t; ?.t as a whole  s.t, t
    ================================  ===================  ====================================

``?.t`` is the table ``t`` in whatever schema was said. A reader does not ask for the default schema: it may never have
been connected.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from sqlalchemy import Column, ForeignKey, MetaData, Table, UniqueConstraint
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.types import NullType

from querycache import sa_internals
from querycache.errors import ConfigurationError
from querycache.tags import bulk_tag, change_tag, slot_tag, table_tag

__all__ = [
    "TRACKED",
    "Reached",
    "SchemaMap",
    "TableName",
    "any_row_tags",
    "cascades",
    "declared_tags",
    "follows_all",
    "is_merely_declared",
    "is_name",
    "label_of",
    "reader_labels",
    "row_labels",
    "row_tags",
    "set_write_tags",
    "slot_of",
    "tracked_columns",
    "tracked_everywhere",
    "translated",
    "writer_label",
]

TableName = tuple[str | None, str]
"""Schema (None for the default one) and name of a table."""

SchemaMap = Mapping[str | None, str | None]
"""A ``schema_translate_map``."""


# --- tracked columns and slots -----------------------------------------------------------------------


def tracked_columns(table: Table) -> tuple[Column[Any], ...]:
    """The columns whose values are followed: primary key, foreign keys and unique ones of exact types, and those that are
    declared to be (:data:`TRACKED`).

    Raises:
        ConfigurationError: one is declared whose values cannot be.
    """
    return sa_internals.remembered(table, _tracked)


TRACKED = "cache_tracked"
"""The key in ``Column.info`` by which an application has a column tracked."""


def _tracked(table: Table) -> tuple[Column[Any], ...]:
    tracked = dict.fromkeys(table.primary_key.columns)
    tracked.update(
        dict.fromkeys(column for column in list(table.columns) if column.foreign_keys or column.unique)
    )
    for constraint in list(table.constraints):
        if isinstance(constraint, UniqueConstraint):
            tracked.update(dict.fromkeys(constraint.columns))
    for index in list(table.indexes):
        if index.unique:
            tracked.update(dict.fromkeys(index.columns))
    tracked.update(dict.fromkeys(filter(_is_declared, table.columns)))
    return tuple(column for column in tracked if sa_internals.is_exact(column.type))


def _is_declared(column: Column[Any]) -> bool:
    told = column.info.get(TRACKED, False)
    if column.foreign_keys and isinstance(column.type, NullType):
        return False  # not yet: it has the type of what it refers to, once that is declared
    if not isinstance(told, bool):
        raise ConfigurationError(
            f"column {column}: info={{{TRACKED!r}: {told!r}}}; give True or leave it out"
        )
    if told and not sa_internals.is_exact(column.type):
        raise ConfigurationError(
            f"column {column}: info={{{TRACKED!r}: True}}, but only SQLAlchemy's own integers and UUIDs can be tracked, "
            f"without variants of other types, and it is of type {column.type!r}: the database may take for equal there what "
            "is not equal here; leave it out"
        )
    return told


def is_merely_declared(column: Column[Any]) -> bool:
    """True if a column is tracked because the application says so, which may go for many rows at once."""
    return bool(column.info.get(TRACKED) and not (column.primary_key or column.foreign_keys or column.unique))


def follows_all(table: Table) -> bool:
    """True if no other declaration of the table, as another class may have one, has further tracked columns, or says of one
    that the database makes its values; as far as this process knows, and by the table's name: what a schema is called in the
    database, statements and connections may be told otherwise."""
    return sa_internals.remembered(table, _follows_all)


def _follows_all(table: Table) -> bool:
    own = {column.name: sa_internals.is_made_by_database(column) for column in tracked_columns(table)}
    return all(
        own.get(column.name, False) or (column.name in own and not sa_internals.is_made_by_database(column))
        for other in sa_internals.known_tables(table.name)
        for column in tracked_columns(other)
    )


def tracked_everywhere(table: Table) -> Mapping[str, bool]:
    """The names of tracked columns that whoever writes rows of the table follows, as for :func:`follows_all`; and whether it
    has them in its primary key, too."""
    return sa_internals.remembered(table, _tracked_everywhere)


def _tracked_everywhere(table: Table) -> Mapping[str, bool]:
    found = {column.name: column.primary_key for column in tracked_columns(table)}
    for other in sa_internals.known_tables(table.name):
        keys = {column.name: column.primary_key for column in tracked_columns(other)}
        found = {name: is_key and keys[name] for name, is_key in found.items() if name in keys}
    return found


def slot_of(value: object, slots: int) -> int | None:
    """The slot of a value: 0 to ``slots`` - 1; None for one that has no canonical form.

    Equal values of the database have equal slots: integers by their value, UUIDs by their 128 bits, also where
    they are given as text.
    """
    if isinstance(value, int):
        return int(value) % slots
    if isinstance(value, str):
        if _DIGITS.issuperset(value):
            return None  # a number as well, which an integer column would compare as such
        try:
            value = uuid.UUID(value)
        except ValueError:
            return None
    return value.int % slots if isinstance(value, uuid.UUID) else None


_DIGITS = frozenset("0123456789eE")


# --- names -------------------------------------------------------------------------------------------


def is_name(*names: str | None) -> bool:
    """False if one of them, for which the application has forbidden quotes, is rendered as something else than one name."""
    return all(
        getattr(each, "quote", None) is not False or _PLAIN.fullmatch(each) is not None  # type: ignore[arg-type]
        for each in names
    )


_PLAIN = re.compile(r"[^\W\d][\w$]*")


def translated(table: TableName, translate: SchemaMap) -> TableName:
    schema, name = table
    return translate.get(schema, schema), name


_ANY_SCHEMA = "?"
"""Stands in a label where a reader did not say the schema, and a writer did."""


def label_of(schema: str | None, name: str) -> str:
    return f"{schema}.{name}".lower() if schema else name.lower()


def row_labels(schema: str | None, name: str) -> list[str]:
    """The labels under which a reader finds rows of a table."""
    return [label_of(schema, name), label_of(None, name)] if schema else [label_of(None, name)]


def reader_labels(schema: str | None, name: str) -> list[str]:
    """The labels under which a reader finds a table as a whole."""
    return row_labels(schema, name) if schema else [label_of(None, name), label_of(_ANY_SCHEMA, name)]


def writer_label(schema: str | None, name: str, default_schema: str | None) -> str:
    """The label under which a writer changes a table: schema and name are those in the database."""
    return label_of(None if schema == default_schema else schema, name)


def declared_tags(names: Iterable[str]) -> Iterator[str]:
    """The tags of tables that the application has named; without a schema, those of the name in any."""
    for each in names:
        schema, _, name = each.rpartition(".")
        yield from map(table_tag, reader_labels(schema if schema != _ANY_SCHEMA else None, name))


# --- writing -----------------------------------------------------------------------------------------


def set_write_tags(table: TableName, default_schema: str | None) -> Iterator[str]:
    """The tags that a write changes of which only the table is known.

    Args:
        table: schema and name, as they are in the database.
        default_schema: the connection's default schema.
    """
    label = writer_label(*table, default_schema)
    yield table_tag(label)
    yield bulk_tag(label)
    yield from _tags_in_any_schema(label, table[1])


def _tags_in_any_schema(label: str, name: str) -> Iterator[str]:
    """Those of the readers that did not say the schema, which was said by the writer."""
    if label != label_of(None, name):
        yield table_tag(label_of(_ANY_SCHEMA, name))
        yield bulk_tag(label_of(_ANY_SCHEMA, name))


def any_row_tags(table: TableName, default_schema: str | None) -> tuple[str, ...]:
    """The tags that writes of rows change, whichever rows these are; arguments as for :func:`set_write_tags`."""
    label = writer_label(*table, default_schema)
    return table_tag(label), *_tags_in_any_schema(label, table[1])


def row_tags(
    label: str, values: Iterable[tuple[str, object]], slots: int, *, moved: bool
) -> list[str] | None:
    """The tags that change besides with rows of certain values; None where these have no slots, and the table is written as
    a set.

    Args:
        label: a :func:`writer_label`.
        values: (name of a tracked column, value), for old and new values.
        slots: number of slots of a column.
        moved: True if these are not all the values that the rows had in the database.
    """
    tags = [change_tag(label)] if moved else []
    for column, value in values:
        if value is None:
            continue  # no comparison with a parameter finds NULL
        slot = slot_of(value, slots)
        if slot is None:
            return None
        tags.append(slot_tag(label, column, slot))
    return tags


class Reached(NamedTuple):
    """Tables whose rows the database itself changes.

    Attributes:
        tables: those that refer to the very declaration that is written, or to such a one.
        names: those of others: a table may be declared several times, with other foreign keys and in other schemas, and what
            refers to one of them in the database refers to all.
    """

    tables: frozenset[Table]
    names: frozenset[str]


def cascades(table: Table | str, *, delete: bool) -> Reached:
    """What else changes by the actions of foreign keys when rows of a table are deleted, or updated.

    Args:
        table: the table, or its name where no more is known of it.
    """
    known = sa_internals.known_metadata()
    if isinstance(table, str):
        name, place = table.lower(), None
    else:
        name, place = table.name.lower(), _place(table)
        sa_internals.declared(table.metadata)
        if table.metadata not in known:
            known |= {table.metadata}
    memo, key = _memo(known), (name, place, delete)
    found: Reached | None = memo.get(key)
    if found is None:
        referring: _Referring | None = memo.get(_REFERRING)
        if referring is None:
            referring = memo[_REFERRING] = _referring(known)
        found = memo[key] = _cascades(name, place, delete, referring)
    return found


_REFERRING = "referring"


def _memo(known: frozenset[MetaData]) -> dict[Any, Any]:
    """To remember what follows from the declared tables, for as long as there are no others."""
    return _memo_of(sa_internals.declared(), known)


@lru_cache(maxsize=4)
def _memo_of(declared: object, known: frozenset[MetaData]) -> dict[Any, Any]:
    return {}


_Place = tuple[MetaData, str]
"""Of a declaration. Not the table itself: in statements of the ORM it is a copy with annotations, which lead to a mapper."""

_Referring = dict[str, list[tuple[Table, ForeignKey, _Place | None]]]
"""The foreign keys with actions, by the name of the table that they refer to; with their table, and the place of the other,
None where that is not declared there."""


def _place(table: Any) -> _Place:
    return table.metadata, table.key


def _cascades(name: str, place: _Place | None, delete: bool, referring: _Referring) -> Reached:
    found: set[tuple[Table, bool, bool]] = set()
    todo = [(name, place, delete)]
    while todo:
        name, place, deleted = todo.pop()
        for other, key, target in referring.get(name, ()):
            action = ((key.ondelete if deleted else key.onupdate) or "").upper()
            # PostgreSQL: SET NULL (column)
            if not action.startswith(("CASCADE", "SET NULL", "SET DEFAULT")):
                continue
            same = target is not None and target == place
            step = other, same, deleted and action.startswith("CASCADE")
            if step not in found:
                found.add(step)
                todo.append((other.name.lower(), _place(other) if same else None, step[2]))
    return Reached(
        frozenset(other for other, same, _ in found if same),
        frozenset(other.name for other, same, _ in found if not same),
    )


def _referring(known: Iterable[MetaData]) -> _Referring:
    found: _Referring = {}
    for metadata in known:
        for table in sa_internals.tables_in(metadata):
            for key in list(table.foreign_keys):
                if key.ondelete or key.onupdate:
                    name, place = _target(key)
                    if name is not None:
                        found.setdefault(name.lower(), []).append((table, key, place))
    return found


def _target(key: ForeignKey) -> tuple[str | None, _Place | None]:
    try:
        table = key.column.table
    except InvalidRequestError:  # it is declared elsewhere, or nowhere
        return sa_internals.name_of_target(key), None
    return (None, None) if table is None else (table.name, _place(table))  # of a column that has none yet
