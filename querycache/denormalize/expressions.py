"""What the application gives as measures and conditions: in SQL, and what they read."""

from __future__ import annotations

import inspect as python_inspect
import re
from collections.abc import Iterable
from typing import Any

from sqlalchemy import ColumnClause, ColumnElement, FromClause, Join, Table
from sqlalchemy import inspect as sqlalchemy_inspect
from sqlalchemy.sql import visitors

from querycache.denormalize.attributes import mapped_attributes
from querycache.denormalize.chain import Chain
from querycache.denormalize.declare import Expression

__all__ = ["attributes_read", "sql_of"]


def sql_of(given: Expression | None, entities: tuple[Any, ...]) -> ColumnElement[Any] | None:
    """`given` in SQL over the entities of a chain, child first for the callable; None where nothing is given."""
    if given is None:
        return None
    assert given.sql is not None
    upwards = entities[::-1]
    try:
        parameters = len(python_inspect.signature(given.sql).parameters)
    except ValueError:  # a builtin without a signature takes the child alone
        parameters = 1
    built = given.sql(*upwards[:parameters])
    if hasattr(built, "__clause_element__"):
        built = built.__clause_element__()
    return built  # type: ignore[no-any-return]


def attributes_read(given: Expression | None, chain: Chain) -> tuple[list[set[str]], set[str]]:
    """What an expression reads: for each level of `chain` the column attributes, and what belongs to no level, as it is
    to be shown. A Python expression that does not say is taken to read all of the child's."""
    read: list[set[str]] = [set() for _ in chain.mappers]
    foreign: set[str] = set()
    if given is None:
        return read, foreign
    if given.sql is not None:
        entities = chain.entities()
        tables: list[dict[Any, Table]] = [
            dict(_tables(sqlalchemy_inspect(entity).selectable)) for entity in entities
        ]
        built = sql_of(given, entities)
        for element in visitors.iterate(built) if built is not None else ():
            said = _text(element)
            if said and given.columns is None:
                foreign.add(f"the text {said!r}")
            elif said:
                read[-1] |= set(given.columns or ())
            origin: Any = getattr(element, "table", None)
            if not isinstance(origin, FromClause):
                continue
            for level, aliases in enumerate(tables):
                known = aliases.get(origin)
                if known is not None:
                    column = (known.fullname, str(getattr(element, "name", "")))
                    read[level] |= mapped_attributes(chain.mappers[level], [column])
                    break
            else:
                foreign.add(str(element))
    if given.python is not None:
        read[-1] |= set(given.columns if given.columns is not None else chain.leaf_columns)
    return read, foreign


def _text(element: Any) -> str:
    """What of an expression is text that may name columns, which only the database can read; empty where there is none."""
    if element.__visit_name__ in ("textclause", "tstring_text"):
        said = element.text
    elif isinstance(element, ColumnClause) and element.table is None:
        said = element.name
    else:
        return ""
    return said if re.search(r"[^\W\d]|[\"`\[]", _CONSTANT.sub("", said)) else ""


_CONSTANT = re.compile(
    r"(?:\b(?:date|interval|time|timestamp)\s*)?'(?:[^']|'')*'|\b\d[\w.]*|\b(?:true|false|null)\b",
    re.IGNORECASE,
)


def _tables(selectable: Any) -> Iterable[tuple[FromClause, Table]]:
    if isinstance(selectable, Join):
        yield from _tables(selectable.left)
        yield from _tables(selectable.right)
    elif isinstance(getattr(selectable, "element", None), Table):
        yield selectable, selectable.element
    elif isinstance(selectable, Table):
        yield selectable, selectable
