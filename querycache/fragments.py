"""What a piece of SQL says that the application has written into a statement of SQLAlchemy's: a condition, a column, a hint.

It is no statement that could be parsed, so this goes by words. What is said too much loses hits, no more.
"""

from __future__ import annotations

import re

from querycache.wording import without_comments

__all__ = [
    "MOMENT",
    "calls",
    "calls_of_hint",
    "changing",
    "hides",
    "is_clock",
    "is_comparison",
    "may_query",
    "moments",
    "names_table",
    "variables",
]

_WORDS_OF_QUERIES = re.compile(r"\b(select|from|join|union|table)\b", re.IGNORECASE)
_HIDING = {"mysql": re.compile(r"--|/\*|#"), "": re.compile(r"--|/\*")}
_CLOSED = re.compile(r"/\*(?!M?!)(?:[^*]|\*(?!/))*\*/")
_COMPARISON = re.compile(
    r"\s*(?:\*|[\w.]+\s*((?:[<>=]|<=|>=|<>|!=|\bis\b|\bis\s+not\b|\b(?:not\s+)?i?like\b)\s*(:?[\w.]+|'[^'\\]*')\s*)?)",
    re.IGNORECASE,
)
_TOKEN = re.compile(r""""[^"]*"|`[^`]*`|\[\w[\w\s]*\]|\w[\w$]*|\S""")
_QUOTE = re.compile('["`]')
MOMENT = re.compile(r"\b(now|today|tomorrow|yesterday)\b", re.IGNORECASE)
"""What PostgreSQL, alone or beside a time of day, and SQLite's functions of time, take for a moment."""
_LITERAL = re.compile(r"'(?:[^']|'')*'|\$(\w*)\$.*?\$\1\$", re.DOTALL)
_OF_MYSQL = re.compile(r"""(?<![\w'"`@.])(@@?[\w`]+|utc_(date|time|timestamp)\b)""", re.IGNORECASE)
"""What is neither a column nor called: its variables, of the connection or of the server, and its clocks."""
_NILADIC = re.compile(
    r"\b(current_(date|time|timestamp|user|role|schema|catalog)|localtime(stamp)?|session_user|sysdate|user)\b",
    re.IGNORECASE,
)
# Numbers of a sequence, also where it is read as a table; and a part of a table by chance.
_CHANGING = re.compile(
    r"\b(?:next|previous)\s+value\s+for\b|\.\s*(?:nextval|currval)\b|\btablesample\b"
    r"|\bnext_not_cached_value\b|(?<!\bas\s)\blast_value\b(?!\s*\()",
    re.IGNORECASE,
)
_IN_TABLE = re.compile(r"""\bin\s*(?:["'`\[]|(?<=\s)\w)""", re.IGNORECASE)
_QUOTED_IN_SQLITE = re.compile(
    r"""(?P<string>'(?:[^']|'')*')|(?P<comment>--[^\n]*|/\*.*?\*/)|"[^"]*"|`[^`]*`|\[[^\]]*\]""", re.DOTALL
)
_NOT_CALLED_IN_HINTS = frozenset(["by", "index", "key", "partition"])
# In a whole statement there are more of them: see querycache.textual.
_NOT_CALLED = frozenset(
    [
        "all",
        "and",
        "any",
        "array",
        "as",
        "between",
        "case",
        "else",
        "exists",
        "filter",
        "in",
        "is",
        "like",
        "not",
        "on",
        "or",
        "over",
        "row",
        "some",
        "then",
        "values",
        "when",
        "where",
    ]
)


def may_query(text: str) -> bool:
    """True if there may be a query in it, or a table."""
    return _WORDS_OF_QUERIES.search(text) is not None


def hides(text: str, dialect: str) -> bool:
    """True if it may hide the rest of a line or a statement."""
    hiding = _HIDING["mysql" if dialect in ("mysql", "mariadb") else ""]
    return hiding.search(_CLOSED.sub(" ", text)) is not None


def is_comparison(text: str) -> bool:
    """True for a column (or ``*``), or one comparison of a column with a value, which needs no parentheses."""
    return _COMPARISON.fullmatch(text) is not None


def names_table(text: str) -> bool:
    """True if SQLite may take a name in it for that of a table, as in ``x IN t``."""
    return _IN_TABLE.search(_QUOTED_IN_SQLITE.sub(_blank, text)) is not None


def _blank(found: re.Match[str]) -> str:
    return "''" if found.group("string") else " " if found.group("comment") else found.group()


def moments(text: str) -> set[str]:
    """The literals in it that a database may take for the present time, quoted."""
    literals = " ".join(found.group() for found in _LITERAL.finditer(text))
    return {repr(each.lower()) for each in MOMENT.findall(literals)}


def variables(text: str) -> set[str]:
    """MySQL's variables and clocks that it names."""
    return {found.group().lower() for found in _OF_MYSQL.finditer(text)}


def is_clock(name: str) -> bool:
    """True for the name of a function that is called without brackets."""
    return _NILADIC.search(name) is not None


def calls(text: str) -> set[str]:
    """What a piece of SQL calls, with brackets or without."""
    ways = {text, without_comments(text)}
    if "'" in text or "\\" in text:  # what is between two quotes is no name where they are in strings
        ways |= {_QUOTE.sub(" ", way) for way in ways}
    return (
        set().union(*map(_called, ways))
        | {match.group().lower() for match in _NILADIC.finditer(text)}
        | changing(text)
    )


def changing(text: str) -> set[str]:
    """What makes an answer change by itself, and is no function."""
    found = {each.lower() for way in (text, without_comments(text)) for each in _CHANGING.findall(way)}
    return {repr(" ".join(each.split())) for each in found}


def calls_of_hint(text: str) -> set[str]:
    """What a hint of the table or the statement calls, as that of a MySQL table to be read as it was."""
    return (calls(without_comments(text)) - _NOT_CALLED_IN_HINTS) | variables(text)


def _called(text: str) -> set[str]:
    """The functions that a piece of SQL calls."""
    names = set()
    name: list[str] = []
    qualifies = False  # it may be but the schema, or so
    for token in _TOKEN.findall(text):
        if token == ".":
            qualifies = True
        elif len(token) > 1 and token[0] in '"`[':
            name = [*name[-2:], token[1:-1]] if qualifies else [token[1:-1]]
            qualifies = False
        elif token[0] == "_" or token[0].isalpha():
            name = [*name[-2:], token.lower()] if qualifies else [token.lower()]
            qualifies = False
        else:
            if token == "(" and name and not qualifies:
                names.add(".".join(name))
            name, qualifies = [], False
    return names - _NOT_CALLED
