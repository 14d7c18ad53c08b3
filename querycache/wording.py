"""What the words of textual SQL tell without a parser: what it does to its transaction, whether it locks, whether it asks."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal

__all__ = [
    "COMMITTING",
    "ENDING",
    "beginning",
    "chains",
    "commits",
    "first_word",
    "is_mere_comment",
    "is_query",
    "isolates",
    "leaves_open",
    "locks_rows",
    "may_isolate",
    "may_write",
    "only_reads",
    "says_the_same",
    "without_comments",
    "words",
]

# but for those that MySQL and MariaDB execute
_MERE_COMMENTS = re.compile(r"/\*(?!M?!).*?\*/|--[^\n]*", re.DOTALL)
_COMMENTS = re.compile(r"--[^\n]*|/\*.*?\*/", re.DOTALL)
_QUERYING = frozenset(["select", "table", "values", "with"])
COMMITTING = frozenset(["commit", "end"])
ENDING = COMMITTING | {"abort", "rollback"}
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


def without_comments(sql: str) -> str:
    """A text with a space in place of each comment."""
    return _COMMENTS.sub(" ", sql)


def words(text: str) -> tuple[str, str]:
    """The first two words of a text without comments, in lower case; empty where there are none."""
    found = re.match(r"[(\s]*(\w*)\s*(\w*)", text)
    assert found is not None
    return found.group(1).lower(), found.group(2).lower()


def first_word(sql: str) -> str:
    """The first word of a statement, in lower case; empty where it begins otherwise."""
    return words(without_comments(sql))[0]


def isolates(bare: str, dialect: str) -> Literal["", "transaction", "session"]:
    """Of which transactions a statement sets what they see, other than by beginning one."""
    first, second = words(bare)
    begins = first in ("start", "begin") and "isolation" in bare.lower()
    sets = first in ("pragma", "prepare", "set") and _ISOLATING.search(bare)
    if not (begins or sets or chains(bare)):
        return ""
    # of MySQL, SET TRANSACTION is for the next one, whenever that begins
    of_one = dialect == "postgresql" and (begins or second in ("transaction", "local"))
    return "transaction" if of_one else "session"


def may_isolate(sql: str) -> bool:
    """True if something in a text that is not understood may set what transactions see."""
    return _MAY_ISOLATE.search(sql) is not None


def chains(bare: str) -> bool:
    """True if a statement ends a transaction, and begins another that is isolated as the first was."""
    return words(bare)[0] in ENDING and _CHAINS.search(bare) is not None


def leaves_open(sql: str) -> bool:
    """True if after several statements a transaction is open that one of them has begun."""
    found = _BEGINS_OR_ENDS.findall(_NO_WORDS.sub(" ", sql))
    return bool(found and found[-1])


@lru_cache(maxsize=128)
def commits(sql: str, dialect: str) -> bool:
    """True if a statement commits what was written before it; MySQL does so at most that are not DML."""
    word = first_word(sql)
    if word in COMMITTING or _FURTHER_COMMIT.search(sql):
        return True
    return dialect in ("mysql", "mariadb") and word not in _NOT_COMMITTING


def is_query(sql: str) -> bool:
    """False if a whole statement may do more than give rows, as FETCH, EXECUTE and what has RETURNING do; or tells of the
    server, as SHOW and PRAGMA do."""
    return first_word(sql) in _QUERYING


def only_reads(sql: str) -> bool:
    """True for one query without a word of those that write; of the functions that it calls nothing is known."""
    return is_query(sql) and ";" not in sql and not may_write(sql)


def may_write(sql: str) -> bool:
    """True if there is a word in a text with which something is written, wherever in it."""
    return _WRITING.search(sql) is not None


def locks_rows(sql: str) -> bool:
    """True if a statement may lock the rows that it reads, wherever in it that is said."""
    return _LOCKS_ROWS.search(sql) is not None


def says_the_same(sql: str, prepared: str) -> bool:
    """True where two texts differ in their comments only, in white space and in what ends them."""
    if sql == prepared:
        return True
    if "--" in prepared or "/*" in prepared:  # perhaps within a value, of which nothing is to be left out
        before, found, after = sql.partition(prepared)
        return bool(found) and not _bare(before + "\n" + after)
    return _bare(sql) == _bare(prepared)


def is_mere_comment(text: str) -> bool:
    """True where there is nothing but comments, of those that no database executes."""
    return not _bare(text)


def beginning(sql: str) -> str:
    """A text up to its first bracket, without comments."""
    return _bare(sql).partition("(")[0].strip()


def _bare(sql: str) -> str:
    return " ".join(_MERE_COMMENTS.sub(" ", sql).split()).rstrip("; ")
