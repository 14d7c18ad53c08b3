"""What a piece of textual SQL reads and writes.

Parsed with sqlglot where it is installed (``pip install querycache[text]``). What cannot be understood is said to be
so, and is then taken for a statement that may read or write anything.
"""

from __future__ import annotations

import logging
import re
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from querycache.fragments import calls, may_query
from querycache.functions import is_stable
from querycache.wording import (
    COMMITTING,
    chains,
    commits,
    isolates,
    leaves_open,
    may_isolate,
    may_write,
    without_comments,
    words,
)

__all__ = ["TextStatement", "read_text"]

TableName = tuple[str | None, str]
# On MySQL LOCK, CHECK and their like commit, which commits() knows.
_HARMLESS = frozenset(
    [
        "abort",
        "analyze",
        "begin",
        "check",
        "checkpoint",
        "close",
        "comment",
        "commit",
        "deallocate",
        "declare",
        "describe",
        "desc",
        "discard",
        "end",
        "explain",
        "fetch",
        "flush",
        "listen",
        "lock",
        "notify",
        "optimize",
        "pragma",
        "prepare",
        "reindex",
        "release",
        "reset",
        "rollback",
        "savepoint",
        "set",
        "show",
        "start",
        "unlisten",
        "unlock",
        "use",
        "vacuum",
    ]
)
_HARMLESS_CALLS = frozenset(
    [
        "benchmark",
        "connection_id",
        "database",
        "get_lock",
        "is_free_lock",
        "is_used_lock",
        "last_insert_id",
        "rand",
        "release_all_locks",
        "release_lock",
        "sleep",
        "uuid",
    ]
)
_STRINGS = re.compile(r"'[^']*'")
# within which an apostrophe begins no string, or none that ends at the next one
_OTHER_QUOTES = re.compile(r"[\"`#\\]|--|/\*")
_HARMLESS_XA = frozenset(["begin", "end", "prepare", "recover", "rollback", "start"])
# Harmless unless they carry another statement: EXPLAIN ANALYZE DELETE, ANALYZE UPDATE, SET STATEMENT … FOR INSERT.
_CARRYING = frozenset(["analyze", "desc", "describe", "explain", "set"])
_SETS_ISOLATION = re.compile(r"\bset_config\s*\(.*isolation", re.IGNORECASE | re.DOTALL)
# Words that MySQL allows before the name of a table, and that a parser takes for the name.
_MODIFIERS = re.compile(
    r"^((?:update|delete|insert)\s+)(?:(?:low_priority|high_priority|delayed|quick|ignore)\s+)+",
    re.IGNORECASE,
)
_PARSED = re.compile(
    r"\(*\s*(select|with|insert|update|delete|merge|replace|table|truncate|values|((create|drop|alter)\s+(or\s+replace\s+)?"
    r"(temp(orary)?\s+|unique\s+)?(table|view|index)))\b",
    re.IGNORECASE,
)
# What a parser does not know, and makes no difference here.
_ON_COMMIT = re.compile(r"\bon\s+commit\s+(?:drop|(?:delete|preserve)\s+rows)\b", re.IGNORECASE)
_REFRESH = re.compile(
    r"refresh\s+materialized\s+view\s+(?:concurrently\s+)?(?:(\w+|\"[^\"]+\")\s*\.\s*)?(\w+|\"[^\"]+\")"
    r"(?:\s+with\s+(?:no\s+)?data)?",
    re.IGNORECASE,
)
# Parameters as drivers want them written, which the grammars of the databases do not know.
_PLACEHOLDERS = re.compile(r"%%|%\(\w+\)s|%s")
_DIALECTS = {"postgresql": "postgres", "mariadb": "mysql", "mysql": "mysql", "sqlite": "sqlite"}


@dataclass(frozen=True, slots=True)
class TextStatement:
    """What is known of a textual statement.

    Attributes:
        understood: False where it may read and write anything.
        reads, writes: tables, as (schema or None, name).
        functions: lower-case names of the functions it calls.
        isolates: what it sets the isolation of: its own "transaction", or all that follow in its "session"; or "".
        begins: True for BEGIN and its like, and for several statements after which a transaction is open.
        rolls_back: True for ROLLBACK of a whole transaction.
        commits: True for COMMIT and its like.
    """

    understood: bool
    reads: frozenset[TableName] = frozenset()
    writes: frozenset[TableName] = frozenset()
    functions: frozenset[str] = frozenset()
    isolates: Literal["", "transaction", "session"] = ""
    begins: bool = False
    rolls_back: bool = False
    commits: bool = False


_ANYTHING = TextStatement(False)


@lru_cache(maxsize=2048)
def read_text(sql: str, dialect: str) -> TextStatement:
    """What a textual statement reads and writes.

    Args:
        sql: the statement.
        dialect: SQLAlchemy's name of the dialect.
    """
    found = _read(sql, dialect)
    if found.understood:
        return found
    return replace(
        found,
        isolates="session" if may_isolate(sql) else "",
        begins=leaves_open(sql),
    )


def _read(sql: str, dialect: str) -> TextStatement:
    text = sql.strip().rstrip(";").strip()
    bare = without_comments(text).strip()
    first, second = words(bare)
    if "/*!" in text or "/*M!" in text:  # comments that MySQL executes
        return _ANYTHING
    if first in COMMITTING or (first, second) == ("xa", "commit"):
        # what was prepared in another session may be anything, and so may what follows
        understood = second not in ("prepared", "commit") and ";" not in text
        return TextStatement(understood, isolates=isolates(bare, dialect), begins=chains(bare), commits=True)
    if first == "xa" and second in _HARMLESS_XA:
        return TextStatement(True)
    mysql = dialect in ("mysql", "mariadb")
    harmless = first in _HARMLESS
    if first == "do" and mysql:  # elsewhere it does whatever it says
        said = text if _OTHER_QUOTES.search(text) else _STRINGS.sub("''", text[len(first) :])
        known = all(is_stable(name, dialect) or name in _HARMLESS_CALLS for name in calls(said))
        harmless = known and not may_query(said)
    if harmless and ";" not in text and not (first in _CARRYING and may_write(text)):
        return TextStatement(
            True,
            isolates=isolates(bare, dialect),
            begins=first in ("start", "begin") or chains(bare),
            rolls_back=first in ("abort", "rollback") and not re.search(r"\bto\b", bare, re.IGNORECASE),
            commits=commits(sql, dialect),
        )
    if refresh := _REFRESH.fullmatch(bare):
        schema, name = [
            part and (part[1:-1] if part[0] == '"' else part.lower()) for part in refresh.groups()
        ]
        return TextStatement(True, writes=frozenset([(schema, name)]))
    if not _PARSED.match(bare):
        return _ANYTHING
    if first == "replace":
        text = bare = f"INSERT {bare[len(first) :]}"
    elif first == "create":
        text = _ON_COMMIT.sub(" ", bare)
    if mysql and _MODIFIERS.match(bare):
        text = _MODIFIERS.sub(r"\1", bare)
    value = "'0'" if mysql else "0"  # in AGAINST it must be text
    text = _PLACEHOLDERS.sub(lambda found: "%" if found.group() == "%%" else value, text)
    found = _parsed(text, _DIALECTS.get(dialect, ""))
    return replace(found, isolates="session") if _SETS_ISOLATION.search(bare) else found


def _parsed(text: str, dialect: str) -> TextStatement:
    try:
        from sqlglot import errors, exp
    except ImportError:
        return _ANYTHING
    token = _parsing.set(True)
    try:
        parser, as_written = _parser(dialect)
        statements = parser.parse(parser.dialect.tokenize(text), text)
    except (errors.SqlglotError, RecursionError):
        return _ANYTHING
    finally:
        _parsing.reset(token)
    reads: set[TableName] = set()
    writes: set[TableName] = set()
    functions: set[str] = set()
    for statement in statements:
        if statement is None:
            continue
        targets = _targets(statement, exp)
        if targets is None:
            return _ANYTHING
        for each in statement.find_all(exp.In) if dialect == "sqlite" else ():
            # x IN t is x IN (SELECT * FROM t)
            field = each.args.get("field")
            if isinstance(field, exp.Column):
                reads.add((field.table or None, field.name))
            elif field is not None and not isinstance(field, (exp.Func, exp.Parameter, exp.Placeholder)):
                return _ANYTHING
        for table in statement.find_all(exp.Table):
            if isinstance(table.this, exp.Func):
                continue  # one of the functions below
            name = (table.db or None, table.name)
            if any(table is target for target in targets):
                writes.add(name)
            else:
                # or a CTE, which may well have the name of the table that it is made from
                reads.add(name)
        functions.update(_function_name(each, exp) for each in statement.find_all(exp.Func))
    if not as_written:
        functions |= calls(text) - _NO_FUNCTIONS
    functions.discard("")
    return TextStatement(True, frozenset(reads), frozenset(writes), frozenset(functions))


def _parser(dialect: str) -> tuple[Any, bool]:
    """A parser, and whether it leaves functions the names that they were given.

    Otherwise NVL, which may be the application's own, becomes COALESCE. Where sqlglot is compiled, that cannot be helped.
    """
    from sqlglot.dialects.dialect import Dialect

    known = Dialect.get_or_raise(dialect)
    made = _parsers.get(dialect)
    if made is None:
        usual = known.parser_class
        special = _SPECIAL.get(dialect, frozenset())
        members = {
            "FUNCTIONS": {},
            "FUNCTION_PARSERS": {
                name: parse for name, parse in usual.FUNCTION_PARSERS.items() if name in special
            },
        }
        try:
            made = type(usual.__name__, (usual,), members)
        except TypeError:
            made = usual
        _parsers[dialect] = made
    return made(dialect=known), made is not known.parser_class


_parsers: dict[str, Any] = {}
# Those whose arguments have a syntax of their own, and which nobody can declare.
_SPECIAL = {
    "": frozenset({"CAST", "EXTRACT", "TRIM"}),
    "mysql": frozenset(
        {"CAST", "CHAR", "CONVERT", "EXTRACT", "GROUP_CONCAT", "MATCH", "POSITION", "SUBSTRING", "TRIM"}
    ),
    "postgres": frozenset({"CAST", "EXTRACT", "OVERLAY", "POSITION", "SUBSTRING", "TRIM", "XMLTABLE"}),
    "sqlite": frozenset({"CAST"}),
}
# What the parser calls functions, and are operators and the like.
_OPERATORS = frozenset(
    [
        "and",
        "array",
        "case",
        "collate",
        "exists",
        "json_extract",
        "json_extract_scalar",
        "or",
        "regexp_like",
        "xor",
    ]
)
# Further words that may stand before a bracket in a whole statement, and are none either.
_NO_FUNCTIONS = frozenset(
    [
        "by",
        "distinct",
        "except",
        "fetch",
        "from",
        "group",
        "having",
        "insert",
        "intersect",
        "interval",
        "into",
        "join",
        "lateral",
        "limit",
        "offset",
        "order",
        "partition",
        "returning",
        "select",
        "set",
        "table",
        "union",
        "update",
        "using",
        "window",
        "with",
    ]
)
_AS_WRITTEN = {"chr": "char", "str_position": "position"}
_parsing: ContextVar[bool] = ContextVar("querycache_parsing", default=False)
# It warns of what it does not understand. Here that is nobody's fault, and has been provided for.
logging.getLogger("sqlglot").addFilter(lambda record: not _parsing.get())


def _targets(statement: Any, exp: Any) -> list[Any] | None:
    """The table nodes that are written to; None where that cannot be told."""
    kinds = (exp.Query, exp.Values, exp.Insert, exp.Update, exp.Delete, exp.Merge)
    definitions = (exp.Create, exp.Drop, exp.Alter, exp.TruncateTable)
    if not isinstance(statement, (*kinds, *definitions)) or statement.find(exp.Command, exp.Copy):
        return None
    if isinstance(statement, (exp.Drop, exp.TruncateTable)) and "CASCADE" in statement.sql().upper():
        return None  # and all that refers to it, whatever its foreign keys say
    if isinstance(statement, definitions):
        return list(statement.find_all(exp.Table)) or None
    targets: list[Any] = []
    for node in statement.find_all(exp.Insert, exp.Update, exp.Delete, exp.Merge, exp.Into):
        if isinstance(node, exp.Insert):
            this = node.this.this if isinstance(node.this, exp.Schema) else node.this
            found = [this] if isinstance(this, exp.Table) else []
        else:
            # with several tables in it, which of them is changed depends on the dialect: take all
            found = list(node.find_all(exp.Table))
        if not found:
            return None
        targets.extend(found)
    return targets


def _function_name(function: Any, exp: Any) -> str:
    """Empty for what the parser calls a function and is none."""
    if isinstance(function, exp.Anonymous):
        # what is quoted is not the database's own unless it is in lower case
        name = function.name if isinstance(function.this, exp.Identifier) else function.name.lower()
    else:
        in_case = isinstance(function, exp.If) and isinstance(function.parent, exp.Case)
        name = "case" if in_case else function.sql_name().lower()
        if name in _OPERATORS:
            return ""
        name = _AS_WRITTEN.get(name, name)
    parent, schema = function.parent, ""
    if isinstance(parent, exp.Dot) and parent.this is not function:
        schema = parent.this.sql()
    elif isinstance(parent, exp.Table):
        schema = parent.db
    schema = schema.replace('"', "").replace("'", "").lower()
    return f"{schema}.{name}" if schema else name
