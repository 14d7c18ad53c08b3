"""What a statement reads: its tables, the columns it pins, its functions and its pieces of text.

The tables of a statement are those that its SQL names: subqueries, CTEs, eager joins and the joins of inheritance
included. They are collected while the dialect's own compiler renders the statement once more, so what is collected is
what is rendered. What it pins is found in :mod:`querycache.pins`.

A structure is analysed once and remembered on the compiled object, which lives in SQLAlchemy's bounded cache.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

from sqlalchemy import (
    Alias,
    BindParameter,
    Cast,
    ColumnClause,
    Function,
    Join,
    String,
    Table,
    TableClause,
    TypeDecorator,
)
from sqlalchemy.sql import operators
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.elements import quoted_name
from sqlalchemy.sql.selectable import TextualSelect
from sqlalchemy.sql.visitors import iterate
from sqlalchemy.types import TypeEngine

from querycache import sa_internals
from querycache.fragments import (
    calls,
    calls_of_hint,
    changing,
    hides,
    may_query,
    moments,
    names_table,
    variables,
)
from querycache.keys import structure_digest
from querycache.pins import Pin, base_table, is_text, pins
from querycache.tables import TableName, is_name, tracked_everywhere
from querycache.textual import read_text
from querycache.wording import is_query, locks_rows, only_reads

__all__ = ["Analysis", "analyse", "is_text_type"]


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
        declared: what was declared when this was found.
        followed: what could be pinned of the tables then.
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
    declared: object = None
    followed: list[tuple[Table, Mapping[str, bool]]] = field(default_factory=list)

    def stands(self) -> bool:
        """True as long as nothing has been declared that makes it another one."""
        now = sa_internals.declared()
        if self.declared is not now:
            if any(tracked_everywhere(table) != before for table, before in self.followed):
                return False
            self.declared = now
        return True

    def reads_any(self, names: set[str]) -> bool:
        """True if one of the tables has one of these names, in lower case, whatever its schema."""
        return any(name.lower() in names for _, name in (*self.tables, *self.text_tables))


_MEMO = "_querycache_analysis"


def analyse(compiled: SQLCompiler) -> Analysis:
    """The analysis of a statement, made once for its structure, and anew where tables are declared meanwhile that matter."""
    memo: Analysis | None = compiled.__dict__.get(_MEMO)
    if memo is None or not memo.stands():
        cache_key = compiled.cache_key
        structure = structure_digest(cache_key.key if cache_key is not None else None)
        memo = Analysis(structure, declared=sa_internals.declared())
        collector = _collector(cast("Any", type(compiled)))
        # The second compilation renders other statement objects than the first where the ORM makes them anew, so
        # parameters are found by name.
        rendered = collector(
            compiled.dialect, compiled.statement, analysis=memo, column_keys=compiled.column_keys
        )
        constructs = sa_internals.custom_constructs(rendered)
        memo.functions |= constructs
        if not constructs and not any(hides(text, compiled.dialect.name) for text in memo.texts):
            # of several the first is taken that can be: a key changes least, and what is no key at all most
            found = pins(rendered, memo.tables)
            memo.pins = tuple(sorted(found, key=lambda pin: (not pin.key, pin.declared)))
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
            memo.key_place = sa_internals.key_place(compiled)
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
                if isinstance(table, Table):
                    self.analysis.followed.append((table, tracked_everywhere(table)))
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
                    elif isinstance(each, ColumnClause) and base_table(each) is None:
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

        def visit_textclause(self, textclause: Any, *args: Any, **kwargs: Any) -> Any:
            self._note_text(textclause, textclause.text, kwargs)
            return super().visit_textclause(textclause, *args, **kwargs)

        def visit_tstring(self, tstring: Any, *args: Any, **kwargs: Any) -> Any:  # from 2.1 on
            text = super().visit_tstring(tstring, *args, **kwargs)
            self._note_text(tstring, text, kwargs)
            return text

        def _note_text(self, element: Any, text: str, kwargs: dict[str, Any]) -> None:
            around = self.stack[-1].get("selectable") if self.stack else element
            if around is element or (isinstance(around, TextualSelect) and around.element is element):
                self.analysis.writes |= not is_query(text)
            # as a member of FROM it may be no more than the name of a table
            self.analysis.texts.append(f"SELECT 1 FROM {text}" if kwargs.get("asfrom") else text)

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
            elif column.is_literal or is_text(column.name):
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
