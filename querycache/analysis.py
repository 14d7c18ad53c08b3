"""What a statement reads: its tables, the columns it pins, its functions and its pieces of text.

The tables of a statement are those that its SQL names: subqueries, CTEs, eager joins and the joins of inheritance
included. They are collected while the dialect's own compiler renders the statement once more, so what is collected is
what is rendered. Only comparisons that mean the same in the database as here pin a column: integers and UUIDs (two
strings that hash apart may be equal under a collation), by ``=`` or ``IN``, in a top-level conjunct, of a table that
appears nowhere else in the statement.

A structure is analysed once and remembered on the compiled object, which lives in SQLAlchemy's bounded cache.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

from sqlalchemy import (
    Alias,
    BindParameter,
    Cast,
    Column,
    ColumnClause,
    ColumnElement,
    Function,
    Integer,
    Join,
    Select,
    String,
    Table,
    TableClause,
    TextClause,
    TypeDecorator,
)
from sqlalchemy.sql import operators
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.elements import BinaryExpression, BooleanClauseList, Grouping, quoted_name
from sqlalchemy.sql.selectable import FromGrouping
from sqlalchemy.sql.visitors import iterate
from sqlalchemy.types import TypeEngine

from querycache.fragments import (
    calls,
    calls_of_hint,
    changing,
    hides,
    is_clock,
    is_comparison,
    may_query,
    moments,
    names_table,
    variables,
)
from querycache.keys import structure_digest
from querycache.sa_internals import custom_constructs, is_exact, key_place, suffixes
from querycache.tables import TableName, is_name, tracked_columns, tracked_everywhere
from querycache.textual import read_text
from querycache.wording import is_query, locks_rows, only_reads

__all__ = ["Analysis", "Pin", "analyse", "is_text_type"]


@dataclass(frozen=True, slots=True)
class Pin:
    """A tracked column that the statement compares with parameters.

    Attributes:
        table: the table, as declared.
        column: name of the column.
        parameters: names of the parameters, of which one may hold a list.
        key: True for a column of the primary key.
        number: True for a column of integers.
    """

    table: TableName
    column: str
    parameters: tuple[str, ...]
    key: bool
    number: bool


@dataclass(slots=True)
class Analysis:
    """What is known of a statement's structure.

    Attributes:
        structure: digest of the structure, loader options included, 16 bytes.
        tables: how often each table appears in its SQL.
        pins: tracked columns that it compares with parameters, for tables that appear once.
        functions: lower-case names of the functions it calls.
        casts: names of parameters that it casts to another type.
        compared_as_text: names of parameters that it compares with text or makes text of, and does nothing else with.
        texts: pieces of textual SQL in it.
        text_tables: tables that these name.
        opaque: True where they may read what nobody can tell.
        locks: True for ``FOR UPDATE`` and its like.
        writes: True where a CTE of it writes, or where it is text that is no query.
        key_place: the place of the key among the columns, where each row is there for its key alone.
    """

    structure: bytes
    tables: Counter[TableName] = field(default_factory=Counter)
    pins: tuple[Pin, ...] = ()
    functions: set[str] = field(default_factory=set)
    casts: set[str] = field(default_factory=set)
    compared_as_text: set[str] = field(default_factory=set)
    texts: list[str] = field(default_factory=list)
    text_tables: frozenset[TableName] = frozenset()
    opaque: bool = False
    locks: bool = False
    writes: bool = False
    key_place: int | None = None

    def reads_any(self, names: set[str]) -> bool:
        """True if one of the tables has one of these names, in lower case, whatever its schema."""
        return any(name.lower() in names for _, name in (*self.tables, *self.text_tables))


_MEMO = "_querycache_analysis"


def analyse(compiled: SQLCompiler) -> Analysis:
    """The analysis of a statement, made once for its structure."""
    memo: Analysis | None = compiled.__dict__.get(_MEMO)
    if memo is None:
        cache_key = compiled.cache_key
        memo = Analysis(structure_digest(cache_key.key if cache_key is not None else None))
        collector = _collector(cast("Any", type(compiled)))
        # The second compilation renders other statement objects than the first where the ORM makes them anew, so
        # parameters are found by name.
        rendered = collector(
            compiled.dialect, compiled.statement, analysis=memo, column_keys=compiled.column_keys
        )
        constructs = custom_constructs(rendered)
        memo.functions |= constructs
        if not constructs and not any(hides(text, compiled.dialect.name) for text in memo.texts):
            # of several the first is taken that can be: a key changes least
            memo.pins = tuple(sorted(_pins(rendered, memo), key=lambda pin: not pin.key))
        memo.locks |= locks_rows(rendered.string)  # by text, a suffix or a hint
        memo.casts = {rendered.bind_names[each] for each in rendered.cast if each in rendered.bind_names}
        as_text = rendered.binds_compared
        if not rendered.casts_what_is_made and memo.functions.isdisjoint(_CASTING):
            as_text += rendered.binds_made_text
        memo.compared_as_text = {
            name
            for bind, name in rendered.bind_names.items()
            if 0 < rendered.binds_rendered[bind.key] == as_text[bind.key]
        }
        _read_texts(memo, compiled.dialect.name)
        if memo.tables.total() == 1 and not (memo.functions or memo.texts):
            memo.key_place = key_place(compiled)
        compiled.__dict__[_MEMO] = memo
    return memo


@lru_cache(maxsize=64)
def _collector(compiler: type[SQLCompiler]) -> type[Any]:
    class Collector(compiler):  # type: ignore[valid-type, misc]
        """Notes what the dialect's own compiler renders."""

        def __init__(self, *args: Any, analysis: Analysis, **kwargs: Any) -> None:
            self.analysis = analysis
            self.cast: list[BindParameter[Any]] = []
            # how often a parameter is rendered, how often beside text that it is compared with, and how often as a part of
            # text that is made of it
            self.binds_rendered: Counter[str] = Counter()
            self.binds_compared: Counter[str] = Counter()
            self.binds_made_text: Counter[str] = Counter()
            self.casts_what_is_made = False
            self.joins: list[Join] = []  # of the statement itself, and not of a subquery
            super().__init__(*args, **kwargs)

        def visit_table(self, table: Any, asfrom: bool = False, **kwargs: Any) -> Any:
            if asfrom:
                schema = getattr(table, "schema", None)
                self.analysis.tables[schema, table.name] += 1
                self.analysis.opaque |= not is_name(schema, table.name)
            return super().visit_table(table, asfrom=asfrom, **kwargs)

        def visit_join(self, join: Any, *args: Any, **kwargs: Any) -> Any:
            if len(self.stack) == 1:
                self.joins.append(join)
            return super().visit_join(join, *args, **kwargs)

        def visit_function(self, func: Any, *args: Any, **kwargs: Any) -> Any:
            name = func.name
            if not (isinstance(name, quoted_name) and name.quote is not False):
                name = name.lower()  # as it means without quotes
            self.analysis.functions.add(".".join((*map(str.lower, func.packagenames), name)))
            return super().visit_function(func, *args, **kwargs)

        def visit_cast(self, cast: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(cast.type, String):
                for each in iterate(cast.clause):
                    if isinstance(each, BindParameter):
                        self.cast.append(each)
                    elif isinstance(each, ColumnClause) and _base_table(each) is None:
                        self.casts_what_is_made = True  # perhaps in a subquery
            return super().visit_cast(cast, *args, **kwargs)

        def visit_bindparam(self, bindparam: Any, *args: Any, **kwargs: Any) -> Any:
            self.binds_rendered[bindparam.key] += 1
            return super().visit_bindparam(bindparam, *args, **kwargs)

        def visit_binary(self, binary: Any, *args: Any, **kwargs: Any) -> Any:
            opstring = getattr(binary.operator, "opstring", "")
            if self.dialect.name == "sqlite" and names_table(f"x {opstring} y"):
                self.analysis.opaque = True
            made = binary.operator is operators.concat_op
            if made or binary.operator in _COMPARING_TEXT:
                counter = self.binds_made_text if made else self.binds_compared
                for one, other in ((binary.left, binary.right), (binary.right, binary.left)):
                    if isinstance(one, BindParameter) and _is_text_value(other):
                        counter[one.key] += 1
            return super().visit_binary(binary, *args, **kwargs)

        def visit_case(self, clause: Any, *args: Any, **kwargs: Any) -> Any:
            results = [
                each for each in (clause.else_, *(result for _, result in clause.whens)) if each is not None
            ]
            compared = [clause.value, *(when for when, _ in clause.whens)] if clause.value is not None else []
            for members, counter in ((results, self.binds_made_text), (compared, self.binds_compared)):
                if all(map(_is_text_value, members)):
                    counter.update(each.key for each in members if isinstance(each, BindParameter))
            return super().visit_case(clause, *args, **kwargs)

        def visit_textual_select(self, taf: Any, *args: Any, **kwargs: Any) -> Any:
            self.analysis.writes |= not is_query(taf.element.text)
            return super().visit_textual_select(taf, *args, **kwargs)

        def visit_textclause(self, textclause: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.stack:  # it is the statement
                self.analysis.writes |= not is_query(textclause.text)
            # as a member of FROM it may be no more than the name of a table
            before = "SELECT 1 FROM " if kwargs.get("asfrom") else ""
            self.analysis.texts.append(before + textclause.text)
            return super().visit_textclause(textclause, *args, **kwargs)

        def get_statement_hint_text(self, hint_texts: Any) -> Any:
            for text in hint_texts:
                _read_hint(self.analysis, text)
            return super().get_statement_hint_text(hint_texts)

        def get_from_hint_text(self, table: Any, text: Any) -> Any:
            if text:
                _read_hint(self.analysis, text)
            return super().get_from_hint_text(table, text)

        def visit_column(self, column: Any, *args: Any, **kwargs: Any) -> Any:
            if column.name == "'%'":
                pass  # SQLAlchemy's own, for contains() and its like
            elif column.is_literal or _is_text(column.name):
                self.analysis.texts.append(column.name)
            if _of_sequence(column):
                self.analysis.functions.add(repr(str(column.name)))
            return super().visit_column(column, *args, **kwargs)

        def visit_sequence(self, *args: Any, **kwargs: Any) -> Any:
            self.analysis.functions.add("nextval")
            return super().visit_sequence(*args, **kwargs)

        def for_update_clause(self, select: Any, **kwargs: Any) -> Any:
            self.analysis.locks = True
            return super().for_update_clause(select, **kwargs)

        def visit_insert(self, *args: Any, **kwargs: Any) -> Any:
            self.analysis.writes = True
            return super().visit_insert(*args, **kwargs)

        def visit_update(self, *args: Any, **kwargs: Any) -> Any:
            self.analysis.writes = True
            return super().visit_update(*args, **kwargs)

        def visit_delete(self, *args: Any, **kwargs: Any) -> Any:
            self.analysis.writes = True
            return super().visit_delete(*args, **kwargs)

    return Collector


_CASTING = frozenset(["date", "pg_catalog.date"])
_SYMBOL = re.compile(r"(?!--|\|\||.*/\*)[^\w\s]+")
_OF_SEQUENCES = re.compile(r"last_value|next_not_cached_value", re.IGNORECASE)
_COMPARING_TEXT = frozenset(
    [
        operators.contains_op,
        operators.endswith_op,
        operators.eq,
        operators.ge,
        operators.gt,
        operators.icontains_op,
        operators.iendswith_op,
        operators.ilike_op,
        operators.in_op,
        operators.istartswith_op,
        operators.le,
        operators.like_op,
        operators.lt,
        operators.ne,
        operators.is_distinct_from,
        operators.is_not_distinct_from,
        operators.match_op,
        operators.not_contains_op,
        operators.not_endswith_op,
        operators.not_ilike_op,
        operators.not_in_op,
        operators.not_like_op,
        operators.not_startswith_op,
        operators.regexp_match_op,
        operators.startswith_op,
    ]
)


def _read_texts(analysis: Analysis, dialect: str) -> None:
    """Add what textual SQL in the statement reads: of whole statements their tables, of pieces their functions."""
    for text in analysis.texts:
        analysis.functions |= moments(text) | changing(text)
        if dialect in ("mysql", "mariadb"):
            analysis.functions |= variables(text)
        if is_query(text):
            statement = read_text(text, dialect)
            analysis.opaque = analysis.opaque or not statement.understood
            read = statement.understood or only_reads(text)
            analysis.writes = analysis.writes or bool(statement.writes) or not read
            analysis.text_tables |= statement.reads
            analysis.functions |= statement.functions
        elif may_query(text) or (dialect == "sqlite" and names_table(text)):
            analysis.opaque = True
        else:
            analysis.functions |= calls(text)


def _read_hint(analysis: Analysis, text: str) -> None:
    analysis.opaque = analysis.opaque or may_query(text) or "/*!" in text or "/*M!" in text
    analysis.functions |= calls_of_hint(text)


def _is_text(name: str) -> bool:
    """True for the name of a column that is rendered as it is, and may be something else."""
    return not is_name(name) or (getattr(name, "quote", None) is False and is_clock(name))


def _is_text_value(element: Any) -> bool:
    """True for what can only be text in the database: a column of it, in lower or upper case as well, or what is cast to it,
    or another parameter."""
    if isinstance(element, Function) and element.name in ("lower", "upper"):
        return all(map(_is_text_value, element.clauses))
    if isinstance(element, ColumnClause) and element.is_literal:
        return False
    return isinstance(element, (BindParameter, Cast, ColumnClause)) and is_text_type(element.type)


def is_text_type(kind: TypeEngine[Any]) -> bool:
    """True for a type of text, also where the application decorates it."""
    return isinstance(kind.impl if isinstance(kind, TypeDecorator) else kind, String)


def _of_sequence(column: Any) -> bool:
    """True if a column may be a number of a sequence, which can be read as a table."""
    owner = column.table.element if isinstance(column.table, Alias) else column.table
    named = _OF_SEQUENCES.fullmatch(column.name) is not None
    return named and (owner is None or (isinstance(owner, TableClause) and not isinstance(owner, Table)))


_Place = tuple[TableName, str]
"""A column of a table that appears once in the statement."""


def _pins(rendered: Any, analysis: Analysis) -> Iterator[Pin]:
    state = rendered.compile_state
    statement = getattr(state, "statement", None) if state is not None else rendered.statement
    if not isinstance(statement, Select) or statement.whereclause is None:
        return
    if suffixes(statement) or not all(map(_stands_alone, iterate(statement.whereclause))):
        return
    conjuncts = list(_conjuncts(statement.whereclause))
    found: dict[_Place, Pin] = {}
    for one, other, operator in _comparisons(conjuncts):
        column = _tracked(one, analysis)
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
        _follow_joins(found, list(_equal_columns(conjuncts, rendered.joins, analysis)))
    yield from found.values()


def _comparisons(conjuncts: Iterable[Any]) -> Iterator[tuple[Any, Any, Any]]:
    """The sides of those that are ``=`` or ``IN``, either of them first."""
    for each in conjuncts:
        if isinstance(each, BinaryExpression) and each.operator in (operators.eq, operators.in_op):
            yield each.left, each.right, each.operator
            yield each.right, each.left, each.operator


def _tracked(element: Any, analysis: Analysis) -> Column[Any] | None:
    """The tracked column that this is, if its table appears once in the statement."""
    table = _base_table(element)
    if table is None or analysis.tables[table.schema, table.name] != 1:
        return None
    tracked = {each.name: each for each in tracked_columns(table)}
    return tracked.get(element.name) if element.name in tracked_everywhere(table) else None


def _compare_alike(one: TypeEngine[Any], other: TypeEngine[Any]) -> bool:
    """True for types whose values are equal in the database where they are equal here."""
    return (
        is_exact(one) and is_exact(other) and (isinstance(one, type(other)) or isinstance(other, type(one)))
    )


def _pin(column: Column[Any], parameters: tuple[str, ...]) -> Pin:
    number = isinstance(column.type, Integer)
    return Pin(*_place(column), parameters, column.primary_key, number)


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
    conjuncts: Sequence[Any], joins: Sequence[Join], analysis: Analysis
) -> Iterator[tuple[Column[Any], Column[Any]]]:
    """Pairs of tracked columns as for :func:`_follow_joins`: those that the WHERE clause or an inner join says to be equal.

    An outer join keeps the rows of its left side whatever its condition says of them, so there it is only those of the right
    side that must be equal to those of the left.
    """
    yield from _equal(conjuncts, analysis)
    for join in joins:
        if join.full or join.onclause is None or not all(map(_stands_alone, iterate(join.onclause))):
            continue
        left, right = set(_joined(join.left)), set(_joined(join.right))
        for first, second in _equal(_conjuncts(join.onclause), analysis):
            sides = _place(first)[0] in left and _place(second)[0] in right
            if sides or (not join.isouter and {_place(first)[0], _place(second)[0]} <= left | right):
                yield first, second


def _equal(conjuncts: Iterable[Any], analysis: Analysis) -> Iterator[tuple[Column[Any], Column[Any]]]:
    for one, other, operator in _comparisons(conjuncts):
        first, second = _tracked(one, analysis), _tracked(other, analysis)
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
    if isinstance(element, ColumnClause) and (element.is_literal or _is_text(element.name)):
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


def _base_table(column: Any) -> Table | None:
    if not isinstance(column, ColumnElement):
        return None
    owner = getattr(column, "table", None)
    if isinstance(owner, Alias):
        owner = owner.element
    return owner if isinstance(owner, Table) else None
