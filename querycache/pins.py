"""Which tracked columns a statement pins to parameters, so that its answer depends on the rows of these values alone.

Only comparisons that mean the same in the database as here pin a column: integers and UUIDs (two strings that hash
apart may be equal under a collation), by ``=`` or ``IN``, in a top-level conjunct, of a table that appears nowhere else
in the statement. What is joined to such a column by ``=`` is pinned with it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    Alias,
    BindParameter,
    Column,
    ColumnClause,
    ColumnElement,
    Integer,
    Join,
    Select,
    Table,
    TextClause,
)
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import BinaryExpression, BooleanClauseList, Grouping
from sqlalchemy.sql.selectable import FromGrouping
from sqlalchemy.sql.visitors import iterate
from sqlalchemy.types import TypeEngine

from querycache.fragments import is_clock, is_comparison
from querycache.sa_internals import appended, is_exact
from querycache.tables import (
    TableName,
    is_merely_declared,
    is_name,
    tracked_columns,
    tracked_everywhere,
)
from querycache.wording import is_mere_comment

__all__ = ["Pin", "base_table", "is_text", "pins"]


@dataclass(frozen=True, slots=True)
class Pin:
    """A tracked column that the statement compares with parameters.

    Attributes:
        table: the table, as declared.
        column: name of the column.
        parameters: names of the parameters, of which one may hold a list.
        key: True for a column of the primary key, in whichever declaration of the table.
        number: True for a column of integers.
        declared: True for one that the application has declared to be tracked.
    """

    table: TableName
    column: str
    parameters: tuple[str, ...]
    key: bool
    number: bool
    declared: bool


_SYMBOL = re.compile(r"(?!--|\|\||.*/\*)[^\w\s]+")


def is_text(name: str) -> bool:
    """True for the name of a column that is rendered as it is, and may be something else."""
    return not is_name(name) or (getattr(name, "quote", None) is False and is_clock(name))


_Place = tuple[TableName, str]
"""A column of a table that appears once in the statement."""


def pins(rendered: Any, tables: Counter[TableName]) -> Iterator[Pin]:
    """What a statement pins, of several that could be taken for a table in the order in which it says them.

    Args:
        rendered: the statement, by the collector of :mod:`querycache.analysis`.
        tables: how often each table appears in it.
    """
    state = rendered.compile_state
    statement = getattr(state, "statement", None) if state is not None else rendered.statement
    if not isinstance(statement, Select) or statement.whereclause is None:
        return
    if not all(map(is_mere_comment, appended(statement))):
        return
    if not all(map(_stands_alone, iterate(statement.whereclause))):
        return
    conjuncts = list(_conjuncts(statement.whereclause))
    found: dict[_Place, Pin] = {}
    for one, other, operator in _comparisons(conjuncts):
        column = _tracked(one, tables)
        if column is None or not isinstance(other, BindParameter):
            continue
        name = rendered.bind_names.get(other)
        if name is None or (operator is operators.in_op and not other.expanding):
            continue
        # the parameter must be compared as the column's type: '1' = 1 may hold in the database
        if _compare_alike(column.type, other.type):
            pin = _pin(column, (name,))
            found.setdefault((pin.table, pin.column), pin)
    if found:
        _follow_joins(found, list(_equal_columns(conjuncts, rendered.joins, tables)))
    yield from found.values()


def _comparisons(conjuncts: Iterable[Any]) -> Iterator[tuple[Any, Any, Any]]:
    """The sides of those that are ``=`` or ``IN``, either of them first."""
    for each in conjuncts:
        if isinstance(each, BinaryExpression) and each.operator in (operators.eq, operators.in_op):
            yield each.left, each.right, each.operator
            yield each.right, each.left, each.operator


def _tracked(element: Any, tables: Counter[TableName]) -> Column[Any] | None:
    """The tracked column that this is, if its table appears once in the statement."""
    table = base_table(element)
    if table is None or tables[table.schema, table.name] != 1:
        return None
    tracked = {each.name: each for each in tracked_columns(table)}
    return tracked.get(element.name) if element.name in tracked_everywhere(table) else None


def _compare_alike(one: TypeEngine[Any], other: TypeEngine[Any]) -> bool:
    """True for types whose values are equal in the database where they are equal here."""
    return (
        is_exact(one) and is_exact(other) and (isinstance(one, type(other)) or isinstance(other, type(one)))
    )


def _pin(column: Column[Any], parameters: tuple[str, ...]) -> Pin:
    is_key = tracked_everywhere(column.table)[column.name]
    number = isinstance(column.type, Integer)
    return Pin(*_place(column), parameters, is_key, number, is_merely_declared(column))


def _follow_joins(found: dict[_Place, Pin], equal: Sequence[tuple[Column[Any], Column[Any]]]) -> None:
    """Add the columns that can only have the values of those that are pinned.

    Args:
        found: the pins, by place; is added to.
        equal: pairs of columns. Where the first is pinned, rows in which the second has another value add nothing to the
            result.
    """
    added = True
    while added:
        added = False
        for first, second in equal:
            pin = found.get(_place(first))
            if pin is not None and _place(second) not in found:
                found[_place(second)] = _pin(second, pin.parameters)
                added = True


def _place(column: Column[Any]) -> _Place:
    return (column.table.schema, column.table.name), column.name


def _equal_columns(
    conjuncts: Sequence[Any], joins: Sequence[Join], tables: Counter[TableName]
) -> Iterator[tuple[Column[Any], Column[Any]]]:
    """Pairs of tracked columns as for :func:`_follow_joins`: those that the WHERE clause or an inner join says to be equal.

    An outer join keeps the rows of its left side whatever its condition says of them, so there it is only those of the right
    side that must be equal to those of the left.
    """
    yield from _equal(conjuncts, tables)
    for join in joins:
        if join.full or join.onclause is None or not all(map(_stands_alone, iterate(join.onclause))):
            continue
        left, right = set(_joined(join.left)), set(_joined(join.right))
        for first, second in _equal(_conjuncts(join.onclause), tables):
            sides = _place(first)[0] in left and _place(second)[0] in right
            if sides or (not join.isouter and {_place(first)[0], _place(second)[0]} <= left | right):
                yield first, second


def _equal(conjuncts: Iterable[Any], tables: Counter[TableName]) -> Iterator[tuple[Column[Any], Column[Any]]]:
    for one, other, operator in _comparisons(conjuncts):
        first, second = _tracked(one, tables), _tracked(other, tables)
        if first is None or second is None or operator is not operators.eq:
            continue
        if _compare_alike(first.type, second.type):
            yield first, second


def _joined(clause: Any) -> Iterator[TableName]:
    """The tables that a member of FROM joins, which may be one."""
    if isinstance(clause, Join):
        yield from _joined(clause.left)
        yield from _joined(clause.right)
    elif isinstance(clause, FromGrouping):
        yield from _joined(clause.element)
    else:
        table = clause.element if isinstance(clause, Alias) else clause
        if isinstance(table, Table):
            yield table.schema, table.name


def _stands_alone(element: Any) -> bool:
    """False for what SQLAlchemy renders in a WHERE clause as it was given, and without parentheses: an OR in it would make a
    conjunct beside it one of several alternatives."""
    if isinstance(element, TextClause):
        return is_comparison(element.text)
    if element.__visit_name__ == "tstring":  # pieces of text, and what is between
        return False
    if isinstance(element, ColumnClause) and (element.is_literal or is_text(element.name)):
        return is_comparison(element.name)
    operator = getattr(element, "operator", None)
    return not isinstance(operator, operators.custom_op) or _SYMBOL.fullmatch(operator.opstring) is not None


def _conjuncts(clause: Any) -> Iterator[Any]:
    if isinstance(clause, Grouping):
        yield from _conjuncts(clause.element)
    elif isinstance(clause, BooleanClauseList) and clause.operator is operators.and_:
        for each in clause.clauses:
            yield from _conjuncts(each)
    else:
        yield clause


def base_table(column: Any) -> Table | None:
    """The table that a column is of, by its own name or another; None for a column of anything else."""
    if not isinstance(column, ColumnElement):
        return None
    owner = getattr(column, "table", None)
    if isinstance(owner, Alias):
        owner = owner.element
    return owner if isinstance(owner, Table) else None
