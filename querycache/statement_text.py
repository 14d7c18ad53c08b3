"""A statement as it is sent: its text, which a listener may have put in the place of another, and what is known of that."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from querycache import sa_internals
from querycache.options import names
from querycache.textual import TextStatement, read_text
from querycache.wording import beginning, first_word, only_reads, says_the_same

__all__ = ["as_text", "is_rewritten", "read_sent"]

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
    """True where a listener has put another statement in the place of one, or the application renders it itself; unless that
    is a query, of which what it was made from tells more."""
    compiled = context.compiled
    is_custom = compiled is not None and sa_internals.is_custom(compiled)
    prepared = as_text(context.statement, context)
    if sa_internals.is_batch(context):  # each of which is made of it
        return is_custom or beginning(sql) != beginning(prepared)
    is_select = compiled is not None and compiled.statement.is_select
    # whatever words of those that write are in it, unless it is more than one statement
    asks = only_reads(sql) or (is_select and first_word(sql) == "select" and ";" not in sql.rstrip("; \n"))
    return not asks and (is_custom or not says_the_same(sql, prepared))


def read_sent(sql: str, context: Any) -> TextStatement:
    """What is known of textual SQL: what the application says of it, or else what can be read."""
    return _told(sql, context) or _read(sql, context)


def _told(sql: str, context: Any) -> TextStatement | None:
    """What the option ``cache_tables`` says of textual DML; None where it says nothing."""
    tables = context.execution_options.get("cache_tables")
    if not tables or first_word(sql) not in _DML:
        return None
    parts = [name.rpartition(".") for name in names("cache_tables", tables)]
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
