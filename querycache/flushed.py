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
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import and_, or_, select
from sqlalchemy.engine import Connection

from querycache import sa_internals
from querycache.changes import WrittenTable
from querycache.tables import SchemaMap, row_tags

__all__ = ["FlushedRows"]

Returned = dict[tuple[object, ...], tuple[object, ...]]
"""Values of the followed columns by primary key, as UPDATE has returned them."""

_MOST_LOOKED_AT = 50
"""Rows that a flush may update of a table before they are no longer looked at one by one."""


@dataclass(slots=True)
class FlushedRows:
    """Rows of a table that a flush has written.

    Attributes:
        written: the table.
        schemas: what the schemas of the flush are called in the database.
        returned: what the database has told of the rows already.
        values: old and new values of their tracked columns, as far as they are known.
        known: False if there are some that only the database knows; None as long as nobody has told of any row.
        updated: primary keys of rows that were there before, and still are.
        moved: True if some are gone, or have other values in tracked columns than before.
        inserted: the last INSERT whose parameters were taken in.
    """

    written: WrittenTable
    schemas: SchemaMap
    returned: Returned = field(default_factory=dict)
    values: set[tuple[str, object]] = field(default_factory=set)
    known: bool | None = None
    updated: set[tuple[object, ...]] = field(default_factory=set)
    moved: bool = False
    inserted: Any = None

    def inserting(self, context: Any) -> None:
        """Take in what an INSERT is given. The object may tell otherwise by the end of the flush, where a listener has set or
        refreshed an attribute.

        Args:
            context: of the execution. It has all parameters at each of its batches.
        """
        if context is self.inserted:
            return
        self.inserted = context
        for given in context.compiled_parameters:
            for column in self.written.tracked:
                if column.key in given:
                    self.values.add((column.name, given[column.key]))

    def setting(self, keys: Collection[str]) -> None:
        """Take in which columns an UPDATE sets. What was in them the object may not tell any more by the end of the flush."""
        for column in self.written.tracked:
            if column.key in keys:
                self.moved = True
                if column.primary_key:
                    self.known = False

    def add(self, state: Any, deleted: bool) -> None:
        """Take in what an object knows of its row."""
        inserted = state.key is None
        unknown = sa_internals.UNKNOWN
        key, values = [], self.values
        if self.known is None:
            self.known = True
        columns = self.written.held_by(state.mapper)
        for held, (old, new) in zip(columns, sa_internals.old_and_new(state, columns), strict=True):
            if old is unknown or new is unknown:
                if held.primary:
                    self.known = False
                self.moved = True
            else:
                values.add((held.name, new))
                if not inserted and old != new:
                    values.add((held.name, old))
                    self.moved = self.moved or not held.primary
            if not inserted:
                if held.primary:
                    key.append(new)
                if sa_internals.made_by_flush(state, held):
                    self.moved = True
        if not inserted:
            if len(key) < len(self.written.key):  # not all of it can be tracked
                held_key = [sa_internals.held(state.mapper, column) for column in self.written.key]
                key = [new for _, new in sa_internals.old_and_new(state, held_key)]
            self.moved = self.moved or deleted or unknown in key
            self.updated.add(tuple(key))

    def look_at(self, connection: Connection) -> None:
        """Take in what the database knows of the rows that were updated."""
        columns = self.written.followed
        if not columns:
            self.moved = False
        elif not self.written.table.implicit_returning:
            self.moved = True  # a view, for example, or columns that may be written but not read
        elif self.updated and self.known and not self.moved:
            names = [column.name for column in columns]
            unknown = self.updated - self.returned.keys()
            if len(unknown) > _MOST_LOOKED_AT:
                self.moved = True
                return
            found = [self.returned[key] for key in self.updated - unknown]
            if unknown:
                keys = [and_(*map(operator.eq, self.written.key, key)) for key in unknown]
                statement = select(*columns).where(or_(*keys))
                options = {"schema_translate_map": self.schemas}
                found += map(tuple, connection.execute(statement, execution_options=options))
            self.moved = len(found) < len(self.updated)
            for row in found:
                self.values.update(zip(names, row, strict=True))

    def tags(self, slots: int) -> Iterable[str]:
        """The tags that change: those of the rows where they are known, else those of the whole table.

        Args:
            slots: number of slots of a column.
        """
        written = self.written
        tags = row_tags(written.label, self.values, slots, moved=self.moved) if self.known else None
        return written.tags if tags is None else (*written.any_row, *tags)
