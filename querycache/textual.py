"""What a piece of textual SQL reads and writes.

Parsed with sqlglot where it is installed (``pip install querycache[text]``). What cannot be understood is said to be
so, and is then taken for a statement that may read or write anything.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Set
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

__all__ = [
    "ENDING",
    "TextStatement",
    "commits",
    "first_word",
    "is_query",
    "is_temporary_schema",
    "locks_rows",
    "only_reads",
    "read_text",
    "temporary_tables",
]

TableName = tuple[str | None, str]

_COMMENTS = re.compile(r"--[^\n]*|/\*.*?\*/", re.DOTALL)
_HARMLESS = frozenset(
    [
        "abort",
        "analyze",
        "begin",
        "checkpoint",
        "close",
        "commit",
        "deallocate",
        "declare",
        "describe",
        "desc",
        "discard",
        "end",
        "explain",
        "fetch",
        "listen",
        "notify",
        "pragma",
        "prepare",
        "release",
        "reset",
        "rollback",
        "savepoint",
        "set",
        "show",
        "start",
        "unlisten",
        "use",
        "vacuum",
    ]
)
_HARMLESS_XA = frozenset(["begin", "end", "prepare", "recover", "rollback", "start"])
_QUERYING = frozenset(["select", "table", "values", "with"])
_CARRYING_NONE = _QUERYING | {"delete", "insert", "merge", "replace", "update"}
_COMMITTING = frozenset(["commit", "end"])
ENDING = _COMMITTING | {"abort", "rollback"}
# All else commits on MySQL and MariaDB.
_NOT_COMMITTING = frozenset(
    [
        "delete",
        "desc",
        "describe",
        "do",
        "explain",
        "insert",
        "release",
        "replace",
        "rollback",
        "savepoint",
        "select",
        "show",
        "table",
        "update",
        "use",
        "values",
        "with",
    ]
)
_WRITING = re.compile(
    r"\b(insert|update|delete|replace|merge|into|truncate|create|drop|alter|call|do|copy|load|lock|execute)\b",
    re.IGNORECASE,
)
# Harmless unless they carry another statement: EXPLAIN ANALYZE DELETE, ANALYZE UPDATE, SET STATEMENT … FOR INSERT.
_CARRYING = frozenset(["analyze", "desc", "describe", "explain", "set"])
# No text matches in two ways, or else many comments would take for ever.
_COMMENT = r"/\*(?:[^*]|\*(?!/))*\*/"
_FURTHER_COMMIT = re.compile(rf";(?:\s|--[^\n]*\n|{_COMMENT})*\b(commit|end)\b", re.IGNORECASE)
# The level of isolation, somebody else's snapshot, and transactions that nobody begins.
_ISOLATING = re.compile(
    r"isolation|\bsnapshot\b|\bautocommit\b|\bcompletion_type\b|\bread_uncommitted\b", re.IGNORECASE
)
_CHAINS = re.compile(r"\band\s+chain\b", re.IGNORECASE)
# What may isolate in a text that is not understood: several statements, a procedure, SQL that is made by SQL.
_MAY_ISOLATE = re.compile(
    rf"(?:^|;|\$\w*\$|\*/|/\*!\d*)\s*(?:set|pragma|begin|start|prepare)\b[^;]*?(?:{_ISOLATING.pattern})"
    rf"|{_CHAINS.pattern}|\bset_config\b|\bexecute\s+immediate\b",
    re.IGNORECASE | re.MULTILINE,
)
_STRING = re.compile(r"'(?:[^']|'')*'")
_NO_WORDS = re.compile(
    r"""'(?:[^']|'')*'|"[^"]*"|`[^`]*`|\$(\w*)\$.*?\$\1\$|--[^\n]*|/\*.*?\*/""",
    re.DOTALL,
)
# Of several statements, those that begin and end a transaction; with a group for those after which one is open.
_BEGINS_OR_ENDS = re.compile(
    r"(?:^|;)\s*(?:(begin\b(?!\s+(?:not|atomic)\b)|start\s+transaction\b|(?:commit|end|rollback|abort)[^;]*\band\s+chain\b)"
    r"|(?:commit|end|rollback(?!\s+(?:\w+\s+)?to\b)|abort)\b)",
    re.IGNORECASE,
)
# What may stand between two words; # is a comment of MySQL only, and elsewhere no word follows it.
_BETWEEN = rf"(?:\s|--[^\n]*\n|#[^\n]*\n|{_COMMENT})+"
_LOCKS_ROWS = re.compile(
    r"\bfor{_}(?:no{_}key{_}|key{_})?(?:update|share)\b|\block{_}in{_}share{_}mode\b".replace(
        "{_}", _BETWEEN
    ),
    re.IGNORECASE,
)
_SETS_ISOLATION = re.compile(r"\bset_config\s*\(.*isolation", re.IGNORECASE | re.DOTALL)
# Words that MySQL allows before the name of a table, and that a parser takes for the name.
_MODIFIERS = re.compile(
    r"^((?:update|delete|insert)\s+)(?:(?:low_priority|high_priority|delayed|quick|ignore)\s+)+",
    re.IGNORECASE,
)
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
_PARSED = re.compile(
    r"\(*\s*(select|with|insert|update|delete|merge|truncate|values|((create|drop|alter)\s+(or\s+replace\s+)?"
    r"(temp(orary)?\s+|unique\s+)?(table|view|index)))\b",
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
        isolates="session" if _MAY_ISOLATE.search(sql) else "",
        begins=_leaves_open(sql),
    )


def _read(sql: str, dialect: str) -> TextStatement:
    text = sql.strip().rstrip(";").strip()
    bare = _COMMENTS.sub(" ", text).strip()
    first, second = _words(bare)
    if "/*!" in text or "/*M!" in text:  # comments that MySQL executes
        return _ANYTHING
    if first in _COMMITTING or (first, second) == ("xa", "commit"):
        # what was prepared in another session may be anything, and so may what follows
        understood = second not in ("prepared", "commit") and ";" not in text
        return TextStatement(
            understood, isolates=_isolates(bare, dialect), begins=_chains(bare), commits=True
        )
    if first == "xa" and second in _HARMLESS_XA:
        return TextStatement(True)
    if first in _HARMLESS and ";" not in text and not (first in _CARRYING and _WRITING.search(text)):
        return TextStatement(
            True,
            isolates=_isolates(bare, dialect),
            begins=first in ("start", "begin") or _chains(bare),
            rolls_back=first in ("abort", "rollback") and not re.search(r"\bto\b", bare, re.IGNORECASE),
            commits=commits(sql, dialect),
        )
    if not _PARSED.match(bare):
        return _ANYTHING
    if dialect in ("mysql", "mariadb") and _MODIFIERS.match(bare):
        text = _MODIFIERS.sub(r"\1", bare)
    text = _PLACEHOLDERS.sub(lambda found: "%" if found.group() == "%%" else "0", text)
    found = _parsed(text, _DIALECTS.get(dialect, ""))
    return replace(found, isolates="session") if _SETS_ISOLATION.search(bare) else found


def _isolates(bare: str, dialect: str) -> Literal["", "transaction", "session"]:
    """Of which transactions a statement sets what they see, other than by beginning one."""
    first, second = _words(bare)
    begins = first in ("start", "begin") and "isolation" in bare.lower()
    sets = first in ("pragma", "prepare", "set") and _ISOLATING.search(bare)
    if not (begins or sets or _chains(bare)):
        return ""
    # of MySQL, SET TRANSACTION is for the next one, whenever that begins
    of_one = dialect == "postgresql" and (begins or second in ("transaction", "local"))
    return "transaction" if of_one else "session"


def _chains(bare: str) -> bool:
    """True if a statement ends a transaction, and begins another that is isolated as the first was."""
    return _words(bare)[0] in ENDING and _CHAINS.search(bare) is not None


def _leaves_open(sql: str) -> bool:
    """True if after several statements a transaction is open that one of them has begun."""
    found = _BEGINS_OR_ENDS.findall(_NO_WORDS.sub(" ", sql))
    return bool(found and found[-1])


def first_word(sql: str) -> str:
    """The first word of a statement, in lower case; empty where it begins otherwise."""
    return _words(_COMMENTS.sub(" ", sql))[0]


@lru_cache(maxsize=128)
def commits(sql: str, dialect: str) -> bool:
    """True if a statement commits what was written before it; MySQL does so at most that are not DML."""
    word = first_word(sql)
    if word in _COMMITTING or _FURTHER_COMMIT.search(sql):
        return True
    return dialect in ("mysql", "mariadb") and word not in _NOT_COMMITTING


def is_query(sql: str) -> bool:
    """False if a whole statement may do more than give rows, as FETCH, EXECUTE and what has RETURNING do; or tells of the
    server, as SHOW and PRAGMA do."""
    return first_word(sql) in _QUERYING


def only_reads(sql: str) -> bool:
    """True for one query without a word of those that write; of the functions that it calls nothing is known."""
    return is_query(sql) and ";" not in sql and not _WRITING.search(sql)


def locks_rows(sql: str) -> bool:
    """True if a statement may lock the rows that it reads, wherever in it that is said."""
    return _LOCKS_ROWS.search(sql) is not None


def temporary_tables(sql: str, dialect: str, known: Set[str]) -> set[str]:
    """The names, in lower case, of the temporary tables and views that a statement makes, or makes of those that are known.

    They may be too many: of what is renamed beside a temporary table, each new name counts.
    """
    bare = _COMMENTS.sub(" ", sql)
    if _words(bare)[0] in _CARRYING_NONE:  # others may carry SQL in a string
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


def _words(text: str) -> tuple[str, str]:
    found = re.match(r"[(\s]*(\w*)\s*(\w*)", text)
    assert found is not None
    return found.group(1).lower(), found.group(2).lower()


def _parsed(text: str, dialect: str) -> TextStatement:
    try:
        import sqlglot
        from sqlglot import errors, exp
    except ImportError:
        return _ANYTHING
    token = _parsing.set(True)
    try:
        statements = sqlglot.parse(text, dialect=dialect or None)
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
    return TextStatement(True, frozenset(reads), frozenset(writes), frozenset(functions))


_parsing: ContextVar[bool] = ContextVar("querycache_parsing", default=False)

# It warns of what it does not understand. Here that is nobody's fault, and has been provided for.
logging.getLogger("sqlglot").addFilter(lambda record: not _parsing.get())


def _targets(statement: Any, exp: Any) -> list[Any] | None:
    """The table nodes that are written to; None where that cannot be told."""
    kinds = (exp.Query, exp.Insert, exp.Update, exp.Delete, exp.Merge)
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
    name = function.name if isinstance(function, exp.Anonymous) else function.sql_name()
    parent, schema = function.parent, ""
    if isinstance(parent, exp.Dot) and parent.this is not function:
        schema = parent.this.sql()
    elif isinstance(parent, exp.Table):
        schema = parent.db
    return f"{schema}.{name}".replace('"', "").replace("'", "").strip(".").lower()
