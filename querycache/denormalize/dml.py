"""What a DML statement writes: which columns, with which plain values.

SQLAlchemy has no public way to ask. The text of the compiled statement tells the columns, and holds no values that could
be mistaken for them, since those are parameters; the parameters tell the values.
"""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy import ColumnElement, Delete, Insert, Table, Update
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import FromStatement

from querycache.sa_internals import columns_set, columns_upserted, prefixes

__all__ = [
    "columns_written",
    "is_upsert",
    "keys_upserted",
    "literal_rows",
    "replaces_rows",
    "set_elsewhere",
]

_NAMES = r"""|"((?:[^"]|"")*)"|`((?:[^`]|``)*)`"""
_QUOTED = re.compile(r"'(?:[^']|'')*'" + _NAMES)
_QUOTED_IN_MYSQL = re.compile(r"'(?:[^'\\]|''|\\.)*'" + _NAMES, re.DOTALL)
_PARENTHESES = re.compile(r"[()]")
_INTO = re.compile(r"(?:^|\s)INSERT\s.*?\bINTO\s[^(]*\((\d+)\)", re.DOTALL)
_BY_DEFAULT = re.compile(r"^INSERT\s.*?\bINTO\s[^(]*\sDEFAULT VALUES\b", re.DOTALL)
_SET = re.compile(r"\sSET\s(.*)$", re.DOTALL)
_RETURNING = re.compile(r"\sRETURNING\s(?!.*\sRETURNING\s).*$", re.DOTALL)
_ASSIGNED = re.compile(r"(?:^|,)\s*([^\s,=]+)\s*=")
_HIDING = re.compile(r"--|/\*|\$\w*\$|\b[EeUu]&?''")
_HIDING_IN_MYSQL = re.compile(r"--|/\*|#")
"""What text, of the application's own, may hide something in from one who reads no further: comments, other quotes."""


def columns_written(compiled: Any, table: Any = None) -> set[str] | None:
    """The keys of the columns that a compiled statement sets, but for defaults; also those that an upsert sets in rows which
    are there. None if it cannot be told.

    Args:
        table: whose keys, where it is not that of the statement, but another of its name.
    """
    statement = _dml(compiled)
    if isinstance(statement, Delete):
        return set()
    read = _Text(compiled)
    table = statement.table if table is None else table
    if not isinstance(statement, Insert):
        found = _SET.search(read.outline or "")
        return None if found is None else read.keys(read.assigned(found[1]), table)
    into = read.keys(read.into(), table)
    if into is None:
        return None
    by_default = {column.key for column in compiled.insert_prefetch or ()}
    return (into - by_default) | keys_upserted(statement, table)


def keys_upserted(statement: Insert, table: Any = None) -> set[str]:
    """The keys of the columns that an INSERT sets in rows which are there already."""
    given = {str(getattr(each, "key", each)) for each in columns_upserted(statement)}
    columns = (statement.table if table is None else table).columns
    # What is no key is taken for a name.
    return given | {str(column.key) for column in columns if column.name in given}


def _dml(compiled: Any) -> Any:
    statement = compiled.statement
    return statement.element if isinstance(statement, FromStatement) else statement


class _Text:
    """The text of a statement, with a word for each quoted name, which may hold anything, and for what is in parentheses.

    Attributes:
        outline: what is outside of parentheses, these with a number; None if they do not match.
    """

    def __init__(self, compiled: Any) -> None:
        mysql = compiled.dialect.name in ("mysql", "mariadb")
        self._hiding = _HIDING_IN_MYSQL if mysql else _HIDING
        self._names: dict[str, str] = {}
        self._groups: list[str] = []
        quoted = _QUOTED_IN_MYSQL if mysql else _QUOTED
        self.outline = self._outline(quoted.sub(self._word, str(compiled)))

    def _word(self, found: re.Match[str]) -> str:
        name = found[2] if found[1] is None else found[1]
        if name is None:  # a text
            return "''"
        mark = f"\0{len(self._names)}"
        self._names[mark] = name.replace('""', '"').replace("``", "`")
        return mark

    def _outline(self, sql: str) -> str | None:
        parts: list[str] = []
        depth = start = 0
        for found in _PARENTHESES.finditer(sql):
            if found[0] == "(":
                if depth == 0:
                    parts.append(sql[start : found.start()])
                    start = found.end()
                depth += 1
            else:
                depth -= 1
                if depth < 0:
                    return None
                if depth == 0:
                    parts.append(f"({len(self._groups)})")
                    self._groups.append(sql[start : found.start()])
                    start = found.end()
        parts.append(sql[start:])
        return None if depth else "".join(parts)

    def into(self) -> list[str] | None:
        """The names of the columns of an INSERT."""
        found = _INTO.search(self.outline or "")
        if found is not None:
            return self._groups[int(found[1])].split(",")
        return [] if _BY_DEFAULT.search(self.outline or "") else None

    def assigned(self, said: str) -> list[str] | None:
        """The names to the left of each equals sign after SET, and of some that stand in conditions after that."""
        if self._hiding.search(said):
            return None
        return _ASSIGNED.findall(_RETURNING.sub("", said))

    def keys(self, words: list[str] | None, table: Any) -> set[str] | None:
        """The keys of the columns of those names; None for None."""
        if words is None:
            return None
        keys = {column.name: str(column.key) for column in table.columns}
        # Some drivers have percent signs doubled.
        keys.update({column.name.replace("%", "%%"): str(column.key) for column in table.columns})
        names = (word.strip().rpartition(".")[2] for word in words)
        found = (self._names.get(name, name) for name in names)
        return {keys.get(name, name) for name in found}


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
    """Whether an INSERT may change rows that exist: ON CONFLICT DO UPDATE, ON DUPLICATE KEY."""
    return bool(columns_upserted(statement))


def replaces_rows(statement: Any) -> bool:
    """Whether an INSERT or UPDATE may delete other rows, in whose place it puts its own: OR REPLACE."""
    return any("REPLACE" in prefix.upper() for prefix in prefixes(statement))
