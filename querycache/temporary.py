"""Temporary tables: each connection has its own, so what reads one is never cached."""

from __future__ import annotations

import re
from collections.abc import Set

from querycache.wording import first_word, without_comments

__all__ = ["is_temporary_schema", "temporary_tables"]

_CARRYING_NONE = frozenset(
    ["delete", "insert", "merge", "replace", "select", "table", "update", "values", "with"]
)
_STRING = re.compile(r"'(?:[^']|'')*'")
_NAME = r"""(?:[\w$]+|"[^"]*"|`[^`]*`|\[[^\]]*\])"""
_TABLE = rf"({_NAME}(?:\s*\.\s*{_NAME})*)"
_NAMES = re.compile(_NAME)
_TABLES = re.compile(_TABLE)
_MAKES_TABLE = re.compile(
    r"\b(?:create(?:\s+or\s+replace)?|into)\s+(?:(?:local|global)\s+)?(temp(?:orary)?\s+)?"
    rf"(?:(?:recursive|unlogged|virtual)\s+)?(?:(?:table|view)\s+)?(?:if\s+not\s+exists\s+)?{_TABLE}",
    re.IGNORECASE,
)
_NEW_NAME = re.compile(rf"\b(?:rename\s+(?:as|to)|rename|to)\s+{_TABLE}", re.IGNORECASE)


def temporary_tables(sql: str, dialect: str, known: Set[str]) -> set[str]:
    """The names, in lower case, of the temporary tables and views that a statement makes, or makes of those that are known.

    They may be too many: of what is renamed beside a temporary table, each new name counts.
    """
    bare = without_comments(sql)
    if first_word(bare) in _CARRYING_NONE:  # others may carry SQL in a string
        bare = _STRING.sub("''", bare)
    made: set[str] = set()

    def is_temporary(table: str) -> bool:
        *schema, name = _parts(table)
        return name in known or name in made or (bool(schema) and is_temporary_schema(schema[-1], dialect))

    made |= {_parts(table)[-1] for word, table in _MAKES_TABLE.findall(bare) if word or is_temporary(table)}
    if "rename" in bare.lower() and any(map(is_temporary, _TABLES.findall(bare))):
        made |= {_parts(table)[-1] for table in _NEW_NAME.findall(bare)} - {"table"}
    return made


def is_temporary_schema(schema: str | None, dialect: str) -> bool:
    """True for the schema of a connection's own tables."""
    pattern = _TEMPORARY_SCHEMAS.get(dialect)
    return bool(schema and pattern and re.fullmatch(pattern, schema.lower()))


_TEMPORARY_SCHEMAS = {"postgresql": r"pg_temp(_\d+)?", "sqlite": "temp"}


def _parts(names: str) -> list[str]:
    return [each.strip('"`[]').lower() for each in _NAMES.findall(names)]
