"""What an INSERT, UPDATE or DELETE changes whatever its parameters, found once for each compiled statement.

It changes the tables it writes to, as a whole unless a flush tells of their rows (:mod:`querycache.flushed`), and those
whose rows the database itself changes then, by the actions of foreign keys.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Column, Table
from sqlalchemy.orm import Mapper

from querycache import sa_internals
from querycache.tables import (
    SchemaMap,
    any_row_tags,
    cascades,
    follows_all,
    is_name,
    set_write_tags,
    tracked_columns,
    translated,
    writer_label,
)
from querycache.tags import EVERYTHING

__all__ = ["Changes", "WrittenTable", "changes_of", "tags_of_actions"]


@dataclass(frozen=True, slots=True)
class WrittenTable:
    """A table of whose rows a flush that writes it can tell.

    Attributes:
        table: the table.
        schema: its schema in the database; None for the default one.
        label: under which writers change it.
        tags: those that change where nobody tells of the rows.
        any_row: those that change with whichever row.
        key: its primary key.
        tracked: its tracked columns, those of its primary key first.
        followed: those that a row can change without becoming another one.
        held: for each mapper how its objects hold the tracked ones; see :meth:`held_by`.
    """

    table: Table
    schema: str | None
    label: str
    tags: frozenset[str]
    any_row: tuple[str, ...]
    key: tuple[Column[Any], ...]
    tracked: tuple[Column[Any], ...]
    followed: tuple[Column[Any], ...]
    held: dict[Any, tuple[sa_internals.Held, ...]] = field(default_factory=dict)

    def held_by(self, mapper: Mapper[Any]) -> tuple[sa_internals.Held, ...]:
        """How the objects of a mapper hold the tracked columns."""
        found = self.held.get(mapper)
        if found is None:
            found = self.held[mapper] = tuple(sa_internals.held(mapper, column) for column in self.tracked)
        return found


@dataclass(frozen=True, slots=True)
class Changes:
    """What a statement changes.

    Attributes:
        tags: those that change in any case.
        tables: those of whose rows a flush can tell.
        schemas: what the statement's schemas are called in the database.
        declared: what was declared when this was found.
    """

    tags: frozenset[str]
    tables: tuple[WrittenTable, ...]
    schemas: SchemaMap
    declared: object


def changes_of(context: Any) -> Changes:
    """What the statement of an execution changes."""
    schemas: SchemaMap = context.execution_options.get("schema_translate_map") or _NONE
    default = context.dialect.default_schema_name
    key = (default, frozenset(schemas.items())) if schemas else default
    compiled = context.compiled
    known: dict[object, Changes] | None = getattr(compiled, _CHANGES, None)
    if known is None:
        known = compiled.__dict__.setdefault(_CHANGES, {})
    found = known.get(key)
    if found is None or found.declared is not sa_internals.declared():
        if len(known) >= _MOST_KNOWN:
            known.clear()
        found = known[key] = _changes_of(compiled, dict(schemas), default)
    return found


_CHANGES = "_querycache_changes"
_MOST_KNOWN = 64
"""An application may have a schema for each of its customers."""
_NONE: SchemaMap = {}


def _changes_of(compiled: Any, schemas: SchemaMap, default: str | None) -> Changes:
    tags: set[str] = set()
    tables = []
    written, custom = sa_internals.written(compiled), sa_internals.is_custom(compiled)
    for table, _, _ in written:
        if table is not None:
            sa_internals.declared(table.metadata)
    declared = sa_internals.declared()  # of all of them, and before anything is looked at
    for table, deletes, updates in written:
        if table is None or not is_name(table.schema, table.name):
            tags.add(EVERYTHING)
            continue
        schema, name = translated((table.schema, table.name), schemas)
        whole = frozenset(set_write_tags((schema, name), default))
        # without a primary key in the database, rows are not told apart
        rows = table.primary_key and follows_all(table)
        if custom or sa_internals.replaces(table) or not rows:
            tags.update(whole)
        else:
            tracked = tracked_columns(table)
            followed = tuple(column for column in tracked if not column.primary_key)
            label, any_row = writer_label(schema, name, default), any_row_tags((schema, name), default)
            key = tuple(table.primary_key)
            tables.append(WrittenTable(table, schema, label, whole, any_row, key, tracked, followed))
        for delete, does in ((True, deletes), (False, updates)):
            if does:
                tags.update(tags_of_actions(table, delete, schemas, default))
    return Changes(frozenset(tags), tuple(tables), schemas, declared)


def tags_of_actions(
    table: Table | str, delete: bool, schemas: SchemaMap, default: str | None
) -> Iterable[str]:
    """The tags that foreign keys change when rows of a table are deleted, or updated; arguments as for :func:`cascades`."""
    reached = cascades(table, delete=delete)
    for each in reached.tables:
        yield from set_write_tags(translated((each.schema, each.name), schemas), default)
    for name in reached.names:
        yield from set_write_tags((None, name), None)
