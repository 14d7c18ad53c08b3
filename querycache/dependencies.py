"""What an answer depends on, as tags.

The tables of a statement are those that its SQL names: subqueries, CTEs, eager joins and the joins of inheritance
included. They are collected while the dialect's own compiler renders the statement once more, so what is collected is
what is rendered. Where the WHERE clause pins a tracked column of a table to values, the answer depends on their slots
instead of the whole table (:mod:`querycache.tables`). Only comparisons that mean the same in the database as here can
pin: integers and UUIDs (two strings that hash apart may be equal under a collation), by ``=`` or ``IN``, in a top-level
conjunct, of a table that appears nowhere else in the statement.

A structure is analysed once and remembered on the compiled object, which lives in SQLAlchemy's bounded cache.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, cast

from sqlalchemy import (
    Alias,
    BindParameter,
    ColumnElement,
    Select,
    String,
    Table,
    TypeDecorator,
)
from sqlalchemy.sql import operators
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.elements import BinaryExpression, BooleanClauseList, Grouping
from sqlalchemy.sql.visitors import iterate

from querycache.functions import is_stable, is_system_table
from querycache.keys import canonical, digest, structure_digest
from querycache.sa_internals import Plan, custom_constructs, key_place
from querycache.tables import (
    TableName,
    declared_tags,
    label_of,
    reader_labels,
    row_labels,
    slot_of,
    tracked_columns,
    tracked_everywhere,
    translated,
)
from querycache.tags import bulk_tag, change_tag, slot_tag, table_tag
from querycache.textual import (
    is_query,
    is_temporary_schema,
    locks_rows,
    only_reads,
    read_text,
    temporary_tables,
)

__all__ = [
    "DEFAULT_SLOTS",
    "MAX_PINNED_VALUES",
    "Analysis",
    "Declarations",
    "analyse",
    "written_by_triggers",
]

MAX_PINNED_VALUES = 64
"""A list of more values than this makes the answer depend on the whole table."""

DEFAULT_SLOTS = 1024


# --- declarations ------------------------------------------------------------------------------------


@dataclass(slots=True)
class Declarations:
    """What the application has said about its database: views, tables written by triggers, functions.

    Attributes:
        sources: for a view, table or function, the tables that its content is made from.
        slots: number of slots a tracked column is divided into.
        temporary: names of temporary tables and views that this process has made; each connection has its own.
        digest: 16 bytes that are the same in every process that has declared the same. Triggers of denormalized columns are
            not in it: which of them a process knows is a matter of what it imports.
        of_triggers: the number of dependencies that triggers make, as far as this process knows.
    """

    sources: dict[str, frozenset[str]] = field(default_factory=dict)
    slots: int = DEFAULT_SLOTS
    temporary: set[str] = field(default_factory=set)
    digest: bytes = field(init=False)

    of_triggers: ClassVar[int] = 0

    def __post_init__(self) -> None:
        self._change()

    def _change(self) -> None:
        self.digest = digest(map(canonical, (self.sources, self.slots)), size=16)

    def depends(self, name: str, on: Iterable[str]) -> None:
        """Note that what ``name`` gives changes when one of the tables in ``on`` is written.

        A name with a schema is known without it as well, as a statement may have it.
        """
        for spelling in _spellings(name.lower()):
            known = self.sources.get(spelling, frozenset())
            self.sources[spelling] = known | {each.lower() for each in on}
        self._change()

    def made_from(self, names: Iterable[str]) -> set[str]:
        """All that the names are made from, step by step; with a name itself only if it is made from itself."""
        found: set[str] = set()
        todo = [name.lower() for name in names]
        while todo:
            for name in _spellings(todo.pop()):
                fresh = {*self.sources.get(name, ()), *_by_triggers.get(name, ())} - found
                found |= fresh
                todo.extend(fresh)
        return found

    def note_temporary(self, sql: str, dialect: str) -> None:
        """Note what a statement makes that each connection has for itself."""
        self.temporary |= temporary_tables(sql, dialect, self.temporary)

    def closure(self, names: Iterable[str]) -> set[str]:
        """The names, and all that they are made from."""
        given = {name.lower() for name in names}
        return given | self.made_from(given)


_by_triggers: dict[str, frozenset[str]] = {}
"""For a table that triggers write, the tables that fire them; for every cache of the process."""


def written_by_triggers(table: Table, on: Iterable[Table]) -> None:
    """Note, for every cache of the process, that triggers on the tables in `on` write rows of `table`.

    Schemas make no difference: they are translated by connection, and a table that is taken to be written too often
    is answered by the database.
    """
    labels = {label for each in on for label in reader_labels(None, each.name)}
    name = table.name.lower()
    _by_triggers[name] = _by_triggers.get(name, frozenset()) | labels
    Declarations.of_triggers = sum(map(len, _by_triggers.values()))


# --- reading -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pin:
    """A tracked column that the statement compares with parameters.

    Attributes:
        table: the table, as declared.
        column: name of the column.
        parameters: names of the parameters, of which one may hold a list.
        key: True for a column of the primary key.
    """

    table: TableName
    column: str
    parameters: tuple[str, ...]
    key: bool


@dataclass(slots=True)
class Analysis:
    """What is known of a statement's structure.

    Attributes:
        structure: digest of the structure, loader options included, 16 bytes.
        tables: how often each table appears in its SQL.
        pins: tracked columns that it compares with parameters, for tables that appear once.
        functions: lower-case names of the functions it calls.
        casts: names of parameters that it casts to another type.
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
    texts: list[str] = field(default_factory=list)
    text_tables: frozenset[TableName] = frozenset()
    opaque: bool = False
    locks: bool = False
    writes: bool = False
    key_place: int | None = None

    def unstable(self, plan: Plan, declared: Declarations) -> str:
        """Name of a function whose answer may change without a write; empty where there is none."""
        for name in sorted(self.functions):
            if not is_stable(name) and declared.sources.keys().isdisjoint(_spellings(name)):
                return name
        for name, value in plan.values.items():
            for each in value if isinstance(value, (list, tuple)) else (value,):
                moment = _MOMENT.search(each) if type(each) is str else None
                if moment is not None and not self._stays_text(name, plan):
                    return repr(moment.group(1).lower())
        return ""

    def _stays_text(self, name: str, plan: Plan) -> bool:
        """True if the database does not take a parameter for anything but text."""
        bind = plan.compiled.binds.get(name)
        if bind is None or name in self.casts or self.texts:
            return False
        kind = bind.type.impl if isinstance(bind.type, TypeDecorator) else bind.type
        return isinstance(kind, String)

    def system_table(self, declared: Declarations) -> str:
        """Name of a table that the database itself writes; empty where there is none."""
        for schema, name in sorted(
            {*self.tables, *self.text_tables}, key=lambda table: (table[0] or "", table[1])
        ):
            label = label_of(schema, name)
            if is_system_table(schema, name) and declared.sources.keys().isdisjoint(_spellings(label)):
                return label
        return ""

    def reads_any(self, names: set[str]) -> bool:
        """True if one of the tables has one of these names, in lower case, whatever its schema."""
        return any(name.lower() in names for _, name in (*self.tables, *self.text_tables))

    def in_temporary_schema(self, plan: Plan) -> bool:
        """True if one of the tables is said to be the connection's own."""
        declared = {translated(table, plan.schema_translate_map) for table in self.tables}
        dialect = plan.engine.dialect.name
        return any(is_temporary_schema(schema, dialect) for schema, _ in declared | self.text_tables)

    def tags(self, plan: Plan, declared: Declarations) -> list[str]:
        """The tags of the tables, for one execution with its parameters and schemas."""
        translate = plan.schema_translate_map
        tags: list[str] = []
        pinned = set()
        for pin in self.pins:
            values = self._pinned_values(pin, plan)
            slots = {slot_of(value, declared.slots) for value in values} if values is not None else {None}
            if None in slots or pin.table in pinned:
                continue
            pinned.add(pin.table)
            schema, name = translated(pin.table, translate)
            tags.extend(map(bulk_tag, reader_labels(schema, name)))
            for label in row_labels(schema, name):
                if not pin.key:
                    tags.append(change_tag(label))
                tags.extend(slot_tag(label, pin.column, slot) for slot in slots)  # type: ignore[arg-type]
        whole = {translated(table, translate) for table in self.tables if table not in pinned}
        for schema, name in whole | self.text_tables:
            tags.extend(map(table_tag, reader_labels(schema, name)))
        if declared.sources or _by_triggers:
            given = {label_of(*translated(table, translate)) for table in self.tables}
            named = [table[1] for table in (*self.tables, *self.text_tables)]
            # A source may be a table of the statement, and pinned there: what is made from it is made from all of it.
            called = [spelling for name in self.functions for spelling in _spellings(name)]
            tags.extend(declared_tags(declared.made_from([*given, *named, *called])))
        return sorted(set(tags))

    def tags_by_key(self, plan: Plan, declared: Declarations) -> dict[object, list[str]] | None:
        """For each key that is asked for, the tags on which its row depends besides those on which all rows do.

        None where a row may depend on more than its key.
        """
        if self.key_place is None or len(self.pins) != 1:
            return None
        [pin] = self.pins
        values = self._pinned_values(pin, plan)
        if values is None:
            return None
        labels = row_labels(*translated(pin.table, plan.schema_translate_map))
        own: dict[object, list[str]] = {}
        for value in values:
            slot = slot_of(value, declared.slots)
            if slot is None:
                return None
            own[value] = [slot_tag(label, pin.column, slot) for label in labels]
        return own or None

    @staticmethod
    def _pinned_values(pin: Pin, plan: Plan) -> Sequence[object] | None:
        values: list[object] = []
        for name in pin.parameters:
            value = plan.values.get(name)
            if isinstance(value, (list, tuple, set, frozenset)):
                values.extend(value)
            else:
                values.append(value)
        return values if len(values) <= MAX_PINNED_VALUES else None


def _spellings(name: str) -> tuple[str, ...]:
    """How a name may have been declared: with its schema, or without."""
    return (name, name.rpartition(".")[2]) if "." in name else (name,)


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
        # of several the first is taken that can be: a key changes least
        memo.pins = tuple(sorted(_pins(rendered, memo), key=lambda pin: not pin.key))
        memo.functions |= custom_constructs(rendered)
        memo.locks |= locks_rows(rendered.string)  # by text, a suffix or a hint
        memo.casts = {rendered.bind_names[each] for each in rendered.cast if each in rendered.bind_names}
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
            super().__init__(*args, **kwargs)

        def visit_table(self, table: Any, asfrom: bool = False, **kwargs: Any) -> Any:
            if asfrom:
                self.analysis.tables[getattr(table, "schema", None), table.name] += 1
            return super().visit_table(table, asfrom=asfrom, **kwargs)

        def visit_function(self, func: Any, *args: Any, **kwargs: Any) -> Any:
            self.analysis.functions.add(".".join((*func.packagenames, func.name)).lower())
            return super().visit_function(func, *args, **kwargs)

        def visit_cast(self, cast: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(cast.type, String):
                self.cast += [each for each in iterate(cast.clause) if isinstance(each, BindParameter)]
            return super().visit_cast(cast, *args, **kwargs)

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
            self.analysis.opaque |= any(map(_WORDS_OF_QUERIES.search, hint_texts))
            return super().get_statement_hint_text(hint_texts)

        def get_from_hint_text(self, table: Any, text: Any) -> Any:
            self.analysis.opaque |= bool(text and _WORDS_OF_QUERIES.search(text))
            return super().get_from_hint_text(table, text)

        def visit_column(self, column: Any, *args: Any, **kwargs: Any) -> Any:
            if column.is_literal:
                self.analysis.texts.append(column.name)
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


_WORDS_OF_QUERIES = re.compile(r"\b(select|from|join|union|table)\b", re.IGNORECASE)
_CALL = re.compile(r"""((?:[\w"`\]\[]+\s*\.\s*)*["`\[]?\b[a-z_]\w*["`\]]?)\s*\(""", re.IGNORECASE)
_QUOTES = re.compile(r"""["`\[\]\s]""")
_MOMENT = re.compile(r"\b(now|today|tomorrow|yesterday)\b", re.IGNORECASE)
"""What PostgreSQL, alone or beside a time of day, and SQLite's functions of time, take for a moment."""
_LITERAL = re.compile(r"'(?:[^']|'')*'|\$(\w*)\$.*?\$\1\$", re.DOTALL)
_OF_MYSQL = re.compile(r"""(?<![\w'"`@.])(@@?[\w`]+|utc_(date|time|timestamp)\b)""", re.IGNORECASE)
"""What is neither a column nor called: its variables, of the connection or of the server, and its clocks."""
_NILADIC = re.compile(
    r"\b(current_(date|time|timestamp|user|role|schema|catalog)|localtime(stamp)?|session_user|sysdate|user)\b",
    re.IGNORECASE,
)
_NOT_CALLED = frozenset(
    [
        "and",
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
        "then",
        "values",
        "when",
        "where",
    ]
)


def _read_texts(analysis: Analysis, dialect: str) -> None:
    """Add what textual SQL in the statement reads: of whole statements their tables, of pieces their functions."""
    for text in analysis.texts:
        for literal in _LITERAL.finditer(text):
            analysis.functions |= {repr(each.lower()) for each in _MOMENT.findall(literal.group())}
        if dialect in ("mysql", "mariadb"):
            analysis.functions |= {match.group().lower() for match in _OF_MYSQL.finditer(text)}
        if is_query(text):
            statement = read_text(text, dialect)
            analysis.opaque = analysis.opaque or not statement.understood
            read = statement.understood or only_reads(text)
            analysis.writes = analysis.writes or bool(statement.writes) or not read
            analysis.text_tables |= statement.reads
            analysis.functions |= statement.functions
        elif _WORDS_OF_QUERIES.search(text):
            analysis.opaque = True
        else:
            calls = {_QUOTES.sub("", name).lower() for name in _CALL.findall(text)}
            analysis.functions |= calls - _NOT_CALLED
            analysis.functions |= {match.group(0).lower() for match in _NILADIC.finditer(text)}


def _pins(rendered: SQLCompiler, analysis: Analysis) -> Iterator[Pin]:
    state = rendered.compile_state
    statement = getattr(state, "statement", None) if state is not None else rendered.statement
    if not isinstance(statement, Select) or statement.whereclause is None:
        return
    for conjunct in _conjuncts(statement.whereclause):
        if not isinstance(conjunct, BinaryExpression) or conjunct.operator not in (
            operators.eq,
            operators.in_op,
        ):
            continue
        for column, value in ((conjunct.left, conjunct.right), (conjunct.right, conjunct.left)):
            table = _base_table(column)
            if table is None or not isinstance(value, BindParameter) or value.callable is not None:
                continue
            name = rendered.bind_names.get(value)
            key = (table.schema, table.name)
            everywhere = tracked_everywhere(table)
            tracked = {each.name: each for each in tracked_columns(table) if each.name in everywhere}
            if name is None or column.name not in tracked or analysis.tables[key] != 1:
                continue
            if conjunct.operator is operators.in_op and not value.expanding:
                continue
            # the parameter must be compared as the column's type: '1' = 1 may hold in the database
            if isinstance(value.type, type(tracked[column.name].type)) or isinstance(
                tracked[column.name].type, type(value.type)
            ):
                yield Pin(key, column.name, (name,), tracked[column.name].primary_key)


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
