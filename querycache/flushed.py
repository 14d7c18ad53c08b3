"""What a flush has done to the rows of a table, as far as it matters to answers that depend on single rows.

An answer that depends on a *slot* of rows must fall when a row comes into it, leaves it or changes within it. So the
values of the tracked columns are wanted from before and after: of rows that were inserted or deleted the objects know
them, but of rows that were updated the database knows better. An object may be older than its row, which somebody else
has moved since.

Where the database can, the UPDATE itself returns them; otherwise they are asked for afterwards. Nobody can change them
then until the transaction ends, for it has written the row.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Column, Table, and_, or_, select
from sqlalchemy.engine import Connection

from querycache import sa_internals
from querycache.tables import tracked_columns

__all__ = ["FlushedRows", "Returned", "SchemaMap", "followed_columns"]

SchemaMap = Mapping[str | None, str | None]
"""A ``schema_translate_map``."""

Returned = dict[tuple[object, ...], tuple[object, ...]]
"""Values of the followed columns by primary key, as UPDATE has returned them."""

_MOST_LOOKED_AT = 50
"""Rows that a flush may update of a table before they are no longer looked at one by one."""


def followed_columns(table: Table) -> list[Column[Any]]:
    """The tracked columns that a row can change without becoming another one."""
    return sa_internals.remembered(table, _followed)


def _followed(table: Table) -> list[Column[Any]]:
    return [column for column in tracked_columns(table) if not column.primary_key]


@dataclass(slots=True)
class FlushedRows:
    """Rows of a table that a flush has written.

    Attributes:
        table: the table.
        tracked: its tracked columns, those of its primary key first.
        values: old and new values of their tracked columns, as far as they are known.
        known: False if there are some that only the database knows.
        updated: primary keys of rows that were there before, and still are.
        moved: True if some are gone, or have other values in tracked columns than before.
    """

    table: Table
    tracked: tuple[Column[Any], ...]
    values: set[tuple[str, object]] = field(default_factory=set)
    known: bool = True
    updated: set[tuple[object, ...]] = field(default_factory=set)
    moved: bool = False

    @classmethod
    def of(cls, table: Table) -> FlushedRows:
        return cls(table, tracked_columns(table))

    def add(self, state: Any, deleted: bool) -> None:
        """Take in what an object knows of its row."""
        inserted = state.key is None
        unknown = sa_internals.UNKNOWN
        key = []
        for column in self.tracked:
            old, new = sa_internals.old_and_new(state, column)
            if old is unknown or new is unknown:
                self.known = False
            else:
                self.values.add((column.name, new))
                if not inserted and old != new:
                    self.values.add((column.name, old))
                    self.moved = self.moved or not column.primary_key
            if not inserted:
                if column.primary_key:
                    key.append(new)
                if sa_internals.made_by_flush(state, column):
                    self.moved = True
        if not inserted:
            if len(key) < len(self.table.primary_key):  # not all of it can be tracked
                key = [sa_internals.old_and_new(state, column)[1] for column in self.table.primary_key]
            self.moved = self.moved or deleted or unknown in key
            self.updated.add(tuple(key))

    def look_at(self, connection: Connection, schemas: SchemaMap, returned: Returned) -> None:
        """Take in what the database knows of the rows that were updated.

        Args:
            returned: what it has told already.
        """
        columns = followed_columns(self.table)
        if not columns:
            self.moved = False
        elif self.updated and self.known and not self.moved:
            names = [column.name for column in columns]
            unknown = self.updated - returned.keys()
            if len(unknown) > _MOST_LOOKED_AT:
                self.moved = True
                return
            found = [returned[key] for key in self.updated - unknown]
            if unknown:
                keys = [and_(*map(operator.eq, self.table.primary_key, key)) for key in unknown]
                statement = select(*columns).where(or_(*keys))
                options = {"schema_translate_map": schemas}
                found += map(tuple, connection.execute(statement, execution_options=options))
            self.moved = len(found) < len(self.updated)
            for row in found:
                self.values.update(zip(names, row, strict=True))
