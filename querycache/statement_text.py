"""A statement as it is sent: its text, which a listener may have put in the place of another, and what is known of that."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from querycache import sa_internals
from querycache.options import table_names
from querycache.textual import TextStatement, read_text
from querycache.wording import beginning, first_word, only_reads, says_the_same

__all__ = ["as_text", "is_rewritten", "may_do_more", "read_rendered", "read_sent"]

_DML = frozenset({"delete", "insert", "merge", "replace", "update"})


def as_text(sql: Any, context: Any) -> str:
    """A statement as it is sent; drivers may take bytes, and objects of their own that they make text of.

    Empty where that cannot be told, which may be any statement.
    """
    if isinstance(sql, str):
        return sql
    try:
        if isinstance(sql, (bytes, bytearray)):
            return sql.decode()
        return str(sql.as_string(context.root_connection.connection.driver_connection))
    except Exception:  # noqa: BLE001 - what the driver has to say of it, it says when it is sent
        return ""


def is_rewritten(sql: str, context: Any) -> bool:
    """True where a listener has put another statement in the place of one; unless that is a query, of which the one that it
    replaces tells more."""
    prepared = as_text(context.statement, context)
    if sa_internals.is_batch(context):  # each of which is made of it
        return beginning(sql) != beginning(prepared)
    compiled = context.compiled
    # whatever words of those that write are in it
    asks = only_reads(sql) or (compiled is not None and compiled.statement.is_select and _is_select(sql))
    return not asks and not says_the_same(sql, prepared)


def _is_select(sql: str) -> bool:
    """True unless it is more than one statement."""
    return first_word(sql) == "select" and ";" not in sql.rstrip("; \n")


def may_do_more(sql: str, context: Any) -> bool:
    """True for a statement that the application renders itself, which may do more than what it is made of tells."""
    compiled = context.compiled
    if compiled is None or not sa_internals.is_custom(compiled):
        return False
    if not compiled.statement.is_select:
        return True
    asked = _SETTINGS.sub("", sql, count=1)
    return not (only_reads(asked) or (_is_select(asked) and _INTO.search(asked) is None))


_SETTINGS = re.compile(r"^\s*SET\s+STATEMENT\s.+?\sFOR\s+(?=SELECT\b|WITH\b|\()", re.IGNORECASE | re.DOTALL)
"""What MariaDB takes before a statement."""
_INTO = re.compile(r"\bINTO\b", re.IGNORECASE)


def read_rendered(context: Any) -> TextStatement:
    """What the text of a statement tells that the application renders itself, beside what it is made of."""
    sql = as_text(context.statement, context)  # of a batch, what each is made of
    text = read_sent(sql, context)
    into = None if text.understood else _INSERT.match(sql)
    if into is None:
        return text
    schema, name = (part and (part[1:-1] if part[0] in '"`[' else part) for part in into.groups())
    return TextStatement(True, writes=frozenset([(schema, name)]))


_NAME = r"(?:\w[\w$]*|\"[^\"]+\"|`[^`]+`|\[[^\]]+\])"
# Whatever follows, unless it may write by itself; where a name does not end there, or may go on, it is not told.
_INSERT = re.compile(
    rf"\s*(?:INSERT|REPLACE)(?:\s+\w+){{0,3}}?\s+INTO\s+(?:({_NAME})\s*\.\s*)?({_NAME})(?=\s*\(|\s+\w|\s*$)"
    r"(?!.*(?:\b(?:WITH|INTO|EXEC|EXECUTE)\b|;|/\*M?!))",
    re.IGNORECASE | re.DOTALL,
)


def read_sent(sql: str, context: Any) -> TextStatement:
    """What is known of textual SQL: what the application says of it, or else what can be read."""
    return _told(sql, context) or _read(sql, context)


def _told(sql: str, context: Any) -> TextStatement | None:
    """What the option ``cache_tables`` says of textual DML; None where it says nothing."""
    tables = context.execution_options.get("cache_tables")
    if not tables or first_word(sql) not in _DML:
        return None
    parts = [name.rpartition(".") for name in table_names("cache_tables", tables)]
    return TextStatement(True, writes=frozenset((schema or None, name) for schema, _, name in parts))


def _read(sql: str, context: Any) -> TextStatement:
    """What can be read of textual SQL. Of a query to be cached the application says what it reads, or for how long it may."""
    text = read_text(sql, context.dialect.name)
    if not text.understood and only_reads(sql):
        options = context.execution_options
        return replace(
            text, understood=bool(options.get("cache_tables") or options.get("cache_ttl") is not None)
        )
    return text
