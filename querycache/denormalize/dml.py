"""What a DML statement writes: which columns, with which plain values.

SQLAlchemy has no public way to ask. The text of the compiled statement tells the columns, and holds no values that could
be mistaken for them, since those are parameters; the parameters tell the values.
"""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy import ColumnElement, Delete, Insert, Table, TextClause, Update
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import FromStatement
from sqlalchemy.sql import visitors

from querycache.sa_internals import columns_set

__all__ = ["columns_written", "is_upsert", "literal_rows", "set_elsewhere"]

_NAMES = r"""|"((?:[^"]|"")*)"|`((?:[^`]|``)*)`"""
_QUOTED = re.compile(r"'(?:[^']|'')*'" + _NAMES)
_QUOTED_IN_MYSQL = re.compile(r"'(?:[^'\\]|''|\\.)*'" + _NAMES, re.DOTALL)
_NESTED = re.compile(r"\([^()]*\)")
_SET = re.compile(r"\sSET\s(.*?)(?:\s(?:WHERE|FROM|RETURNING|ORDER BY|LIMIT)\s.*)?$", re.DOTALL)
_INTO = re.compile(r"^INSERT\b.*?\bINTO\s[^(]*\(([^()]*)\)", re.DOTALL)


def columns_written(compiled: Any, table: Any = None) -> set[str] | None:
    """The keys of the columns that a compiled statement sets, but for defaults; None if it cannot be told.

    Args:
        table: whose keys, where it is not that of the statement, but another of its name.
    """
    statement = compiled.statement
    if isinstance(statement, FromStatement):
        statement = statement.element
    if isinstance(statement, Delete):
        return set()
    sql, quoted = _without_quotes(str(compiled), compiled.dialect)
    if isinstance(statement, Insert):
        found = _INTO.search(sql)
    else:
        while _NESTED.search(sql):
            sql = _NESTED.sub("", sql)
        found = _SET.search(sql)
    if found is None:
        return None
    table = statement.table if table is None else table
    keys = {column.name: str(column.key) for column in table.columns}
    # Some drivers have percent signs doubled.
    keys.update({column.name.replace("%", "%%"): str(column.key) for column in table.columns})
    words = (part.split("=")[0].strip().rpartition(".")[2] for part in found[1].split(","))
    names = (quoted.get(word, word) for word in words)
    by_default = {column.key for column in compiled.insert_prefetch or ()}
    return {keys.get(name, name) for name in names} - by_default


def _without_quotes(sql: str, dialect: Dialect) -> tuple[str, dict[str, str]]:
    """The text with a word for each quoted name, which may hold anything, and these names by their words."""
    names: dict[str, str] = {}

    def word(found: re.Match[str]) -> str:
        name = found[2] if found[1] is None else found[1]
        if name is None:  # a text
            return "''"
        mark = f"\0{len(names)}"
        names[mark] = name.replace('""', '"').replace("``", "`")
        return mark

    quoted = _QUOTED_IN_MYSQL if dialect.name in ("mysql", "mariadb") else _QUOTED
    return quoted.sub(word, sql), names


def set_elsewhere(statement: Any) -> dict[Any, set[str]]:
    """The names of the columns that an UPDATE sets in other tables (or aliases) than its own, as MySQL's may."""
    if not isinstance(statement, Update):
        return {}
    found: dict[Any, set[str]] = {}
    own = getattr(statement.table, "columns", ())
    for column in columns_set(statement):
        table = column.table if isinstance(column, ColumnElement) and hasattr(column, "table") else None
        if table is not None and not any(column.shares_lineage(each) for each in own):
            found.setdefault(table, set()).add(column.name)
    return found


def literal_rows(statement: Insert | Update | Delete, dialect: Dialect) -> list[dict[str, Any]]:
    """The plain values inside a statement without parameter sets, row by row, under the keys of their columns."""
    if isinstance(statement, Delete) or not isinstance(statement.table, Table):
        return []
    values = statement.compile(dialect=dialect).params
    keys = [str(column.key) for column in statement.table.columns]
    rows: list[dict[str, Any]] = []
    single = {key: values[key] for key in keys if key in values}
    if single:
        rows.append(single)
    number = 0
    while several := {key: values[f"{key}_m{number}"] for key in keys if f"{key}_m{number}" in values}:
        rows.append(several)
        number += 1
    return rows


def is_upsert(statement: Insert) -> bool:
    """Whether an INSERT may change rows that exist: ON CONFLICT DO UPDATE, ON DUPLICATE KEY, OR REPLACE."""
    for element in visitors.iterate(statement):
        if element.__visit_name__ in ("on_conflict_do_update", "on_duplicate_key_update"):
            return True
        if isinstance(element, TextClause) and "REPLACE" in element.text.upper():
            return True
    return False
