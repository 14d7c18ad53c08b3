"""What an UPDATE is to return for us beside its work."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Column, Table
from sqlalchemy.engine.cursor import _NO_CURSOR_DML

__all__ = ["ASKED", "Asked", "ask_for"]

_log = logging.getLogger("querycache")

ASKED = "_querycache_asked"
"""The attribute of a context, until its statement has run, that holds what it was asked for."""
_RETURNING = ("postgresql", "sqlite")
"""Those that say RETURNING at the end."""


@dataclass(slots=True)
class Asked:
    """What an UPDATE is to return for us, of which SQLAlchemy is to see nothing."""

    table: Table
    columns: tuple[Column[Any], ...]
    takers: list[dict[tuple[object, ...], tuple[object, ...]]]

    def run(self, execute: Callable[..., Any], cursor: Any, sql: str, parameters: Any, context: Any) -> None:
        """Execute the UPDATE by ``execute(cursor, sql, parameters, context)``, and take what it returns."""
        try:
            execute(cursor, sql + self._returning(context), parameters, context)
        except context.dialect.loaded_dbapi.Error as error:
            self._blame(context, error)
            raise
        self._give(cursor, context)

    def _returning(self, context: Any) -> str:
        known: tuple[object, str] | None = context.compiled.__dict__.get(ASKED)
        if known is None or known[0] is not self.columns:
            columns = *self.table.primary_key, *self.columns
            names = map(context.dialect.identifier_preparer.format_column, columns)
            known = context.compiled.__dict__[ASKED] = self.columns, f" RETURNING {', '.join(names)}"
        return known[1]

    def _blame(self, context: Any, error: Any) -> None:
        """Say so where an UPDATE may have failed for what it was to return: of that the application's error shows nothing."""
        dbapi = context.dialect.loaded_dbapi
        refused = isinstance(error, (dbapi.NotSupportedError, dbapi.ProgrammingError))
        if refused or "RETURNING" in str(error):
            _log.warning(
                "an UPDATE of %s failed that had%s added; if that is why, give the Table implicit_returning=False: %s",
                self.table,
                self._returning(context),
                error,
            )

    def _give(self, cursor: Any, context: Any) -> None:
        rows = cursor.fetchall()
        context._rowcount = len(rows)  # some drivers do not know it now
        context.cursor_fetch_strategy = _NO_CURSOR_DML
        place = -len(self.columns)
        for row in rows:
            key, values = tuple(row[:place]), tuple(row[place:])
            for each in self.takers:
                each[key] = values


def ask_for(
    context: Any,
    table: Table,
    columns: tuple[Column[Any], ...],
    returned: dict[tuple[object, ...], tuple[object, ...]],
) -> None:
    """Have an UPDATE that is about to run return columns of the rows it changes, as the driver gives them.

    Where the database cannot, or says it in other words, where the statement returns something already or several sets of
    parameters are given, it returns nothing. Several who ask for the same table ask for the same columns.

    Args:
        context: of the execution.
        table: what it updates.
        columns: which ones.
        returned: gets them by the primary keys of their rows.
    """
    compiled = context.compiled
    if (
        context.dialect.name in _RETURNING
        and context.dialect.update_returning
        and table.implicit_returning
        and not compiled.effective_returning
        and compiled.statement.table is table
    ):
        asked = getattr(context, ASKED, None)
        if asked is None:
            asked = Asked(table, columns, [])
            setattr(context, ASKED, asked)
        asked.takers.append(returned)
