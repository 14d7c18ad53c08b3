"""What a statement is compiled to, and what that comes to with values for its parameters.

To find what a statement was compiled to, and to make its parameters ready for the driver, takes longer than to load a
few rows. Both are remembered: the first with the statement object, which is never changed once it is made, the second
with what was compiled, by the values.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from typing import Any, cast
from uuid import UUID

from sqlalchemy import JSON, PickleType, Select, Table
from sqlalchemy.engine import CursorResult, Dialect, Engine
from sqlalchemy.sql import operators
from sqlalchemy.sql.compiler import WARN_LINTING, SQLCompiler
from sqlalchemy.sql.elements import BinaryExpression, BindParameter, ColumnClause

from querycache.sa_internals.connecting import compiled_cache_of
from querycache.sa_internals.replay import ReplayConnection, copied

__all__ = ["ROWS_FIRST", "Compilation", "Plan", "Unpreparable", "key_place"]

Options = Mapping[str, Any]
"""Execution options."""

Given = Mapping[str, Any]
"""Parameters that are given to an execution."""

ROWS_FIRST = frozenset({"prebuffer_rows", "preserve_rowcount"})
"""Options under which a result takes its rows, or their number, as soon as it is made."""

_PLANS_OF_ENGINE = 1_000
"""So many plans are remembered for an engine, of about 2 KB each."""


class Unpreparable(Exception):
    """The parameters of a statement cannot be made ready for the driver. Running it will raise the reason."""


@dataclass(slots=True, eq=False)
class Plan:
    """A compiled statement with values for its parameters, whoever executes it: what an answer follows from.

    Attributes:
        options: execution options, as a Compilation has them.
        values: parameters by name, as the application gave them.
        sql, parameters: what the driver is given; together with the database they determine the rows.
        unrendered: values of parameters that are in no place of the SQL; statements that complete this one may have them
            in theirs.
        recent: True where it was used since it last was considered for making room.
        memo: for callers, to remember what follows from the plan.
        shared_memo: to remember what follows from the statement's structure, whatever its parameters.
    """

    engine: Engine
    compiled: SQLCompiler
    options: Options
    values: Mapping[str, Any]
    sql: str
    parameters: Any
    unrendered: Sequence[Any]
    recent: bool = False
    memo: dict[Any, Any] = field(default_factory=dict)

    @property
    def shared_memo(self) -> dict[Any, Any]:
        memo: dict[Any, Any] = self.compiled.__dict__.setdefault(_MEMO, {})
        return memo

    @property
    def schema_translate_map(self) -> Mapping[str | None, str | None]:
        return self.options.get("schema_translate_map") or {}

    def cursor_result(
        self, description: Sequence[Sequence[Any]], compilation: Compilation, given: Given, options: Options
    ) -> CursorResult[Any]:
        """A result over a replay connection, which has columns of this description and no rows yet.

        To make one takes as long as to load a row, so one is kept with what was compiled, and copied.

        Args:
            compilation: of the statement that is executed now.
            given, options: with these.
        """
        statement = compilation.statement()
        template: _Template | None = self.compiled.__dict__.get(_TEMPLATE)
        if template is not None and template.serves(self, statement, description):
            copy = copied(template.result)
            context: Any = copy.context
            context.invoked_statement = statement
            context.extracted_parameters = compilation.extracted
            context.execution_options = options
            context.statement = self.sql
            context.parameters = [self.parameters]
            context.compiled_parameters = [self.values]
            return copy
        context = compilation.context(given, options)
        context.cursor.description = description
        result: CursorResult[Any] = context._setup_result_proxy()
        # the columns of a Core result are known by those of the statement that was executed
        for_all = self.options.get("_result_disable_adapt_to_context")
        if (for_all or compilation.reused) and ROWS_FIRST.isdisjoint(self.options) and not result._echo:
            kept = copied(result)
            context = kept.context
            context.invoked_statement = context.extracted_parameters = None
            context.execution_options = self.options
            adapted_to = None if for_all else compilation.statement
            self.compiled.__dict__[_TEMPLATE] = _Template(kept, self.options, adapted_to)
        return result


@dataclass(slots=True)
class _Template:
    """A result to be copied, which knows nothing of who has asked for it.

    Attributes:
        options: of its execution.
        adapted_to: the statement by whose columns its own are known; None where that makes no difference.
    """

    result: CursorResult[Any]
    options: Options
    adapted_to: weakref.ref[Any] | None

    def serves(self, plan: Plan, statement: Any, description: Sequence[Sequence[Any]]) -> bool:
        return (
            (self.adapted_to is None or self.adapted_to() is statement)
            and cast("Any", self.result.context).cursor.description == description
            and self.options == plan.options
        )


@dataclass(slots=True, eq=False)
class Compilation:
    """A statement object, as it is compiled for an engine; remembered by the statement.

    Attributes:
        statement: the object. One that is made from it takes its attributes over, and so this.
        names: of the parameters that are given with it.
        options: execution options, as far as they are simple values, and the map of schemas. Others are the
            application's own, or tell the ORM's loader what it loads for; they change nothing here and are not kept.
        compiled_cache: where the compiled statement was looked for.
        extracted, param_dict, cache_hit: what SQLAlchemy gives with it.
        reused: True once it was executed again.
    """

    statement: weakref.ref[Any]
    engine: Engine
    names: tuple[str, ...]
    options: Options
    compiled_cache: Any
    compiled: SQLCompiler
    extracted: Sequence[BindParameter[Any]]
    param_dict: Sequence[Any]
    cache_hit: Any
    reused: bool = False

    @classmethod
    def of(cls, statement: Any, engine: Engine, given: Given, options: Options) -> Compilation:
        """Compile a statement as ``Connection.execute`` would."""
        names = tuple(sorted(given)) if given else ()
        compiled_cache = compiled_cache_of(engine, options)
        lasting: dict[str, Any] = {}
        for name, value in options.items():
            if type(value) in _EQUAL:
                lasting[name] = value
            elif name == "schema_translate_map" and value:
                lasting[name] = dict(value)  # it may be changed in place
        known: Compilation | None = statement.__dict__.get(_COMPILATION)
        if (
            known is not None
            and known.statement() is statement
            and known.engine is engine
            and known.compiled_cache is compiled_cache
            and known.names == names
            and known.options == lasting
        ):
            known.reused = True
            return known
        dialect: Any = engine.dialect
        # 2.0 returns (compiled, extracted, cache hit), 2.1 (compiled, extracted, parameter dict, cache hit)
        compiled, extracted, *param_dict, cache_hit = statement._compile_w_cache(
            dialect=dialect,
            compiled_cache=compiled_cache,
            column_keys=list(names),
            for_executemany=False,
            schema_translate_map=options.get("schema_translate_map"),
            linting=dialect.compiler_linting | WARN_LINTING,
        )
        made = cls(
            weakref.ref(statement),
            engine,
            names,
            lasting,
            compiled_cache,
            compiled,
            extracted or (),
            param_dict,
            cache_hit,
        )
        if compiled.cache_key is not None:  # else SQLAlchemy compiles it anew each time
            statement.__dict__[_COMPILATION] = made
        return made

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A copy of the statement, or in another process, is compiled by itself."""
        return type(None), ()

    def context(self, given: Given, options: Options) -> Any:
        """A new execution context over a replay connection."""
        dialect: Any = self.engine.dialect
        connection = ReplayConnection(self.engine)
        return dialect.execution_ctx_cls._init_compiled(
            dialect,
            connection,
            connection,
            options,
            self.compiled,
            [dict(given)] if given else [],
            self.statement(),
            self.extracted,
            cache_hit=self.cache_hit,
            **({"param_dict": self.param_dict[0]} if self.param_dict else {}),
        )

    def with_values(self, given: Given, options: Options) -> tuple[Plan, Any]:
        """The plan for the statement's own parameters and those given, and the execution context if one had to be made.

        Raises:
            Unpreparable: the code of the application that makes the parameters has failed.
        """
        identity = self._identity(given)
        if identity is not None:
            plan = _plans_of(self.compiled).get(identity)
            # what was compiled is the dialect's, which several engines may have
            if plan is not None and plan.engine is self.engine and plan.options == self.options:
                plan.recent = True
                return plan, None
        try:
            context = self.context(given, options)
            plan = self._plan(context, given)
        except Exception as error:
            raise Unpreparable("parameters") from error
        if identity is not None:
            _remember(plan, identity)
        return plan, context

    def _plan(self, context: Any, given: Given) -> Plan:
        compiled = self.compiled
        values = context.compiled_parameters[0]
        if compiled.literal_execute_params or compiled.post_compile_params:
            # those that become part of the SQL have been taken out
            values = compiled.construct_params(
                given or None,
                extracted_parameters=self.extracted or None,
                escape_names=False,
                **({"_collected_params": self.param_dict[0]} if self.param_dict else {}),
            )
        # a list may be changed in place, and plans are remembered for what it holds now
        values = {name: value.copy() if type(value) is list else value for name, value in values.items()}
        unrendered = [self.extracted[place].effective_value for place in _unrendered(compiled)]
        return Plan(
            self.engine, compiled, self.options, values, context.statement, context.parameters[0], unrendered
        )

    def _identity(self, given: Given) -> tuple[Any, ...] | None:
        """What tells the plan from others of what was compiled for these names.

        None where the same values may come to something else another time, or somebody may change them.
        """
        if self.compiled.cache_key is None or not _is_repeatable(self.compiled, self.engine.dialect):
            return None
        identity: list[Any] = []
        values = [given[name] for name in self.names]
        for own in filter(None, self.param_dict):  # by params(), on 2.1
            identity.append(tuple(own))
            values += own.values()
        for parameter in self.extracted:
            if parameter.callable is not None:
                return None
            values.append(parameter.value)
        if len(values) > _MOST_VALUES:
            return None
        for value in values:
            kind = type(value)
            if kind in _SIZED and not _is_short(value):
                return None
            if kind in _EQUAL:
                identity += (kind, value)
            elif kind in _IMMUTABLE:
                identity.append(_Itself(value))
            elif kind in _SIZED:  # of an IN
                kinds = tuple(map(type, value))
                if not _EQUAL.issuperset(kinds):
                    return None
                identity += (kind, kinds, tuple(value))
            else:
                return None
        return tuple(identity)


_EQUAL = frozenset({int, str, bool, bytes, type(None), date, UUID})
"""Immutable types whose values, where equal, are alike in every way."""

_IMMUTABLE = frozenset({float, Decimal, datetime})
"""Those where they may not be: 0.0 and -0.0, times in two zones."""


_SIZED = frozenset({str, bytes, list, tuple})

_LONGEST = 200
_MOST_VALUES = 50
"""Longer texts and lists, and more values, are not worth the memory."""


def _is_short(value: Any) -> bool:
    if len(value) > _LONGEST:
        return False
    return type(value) in _EQUAL or all(len(each) <= _LONGEST for each in value if type(each) in _SIZED)


@dataclass(frozen=True, slots=True, eq=False)
class _Itself:
    """Equals what was made of the same object only."""

    value: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _plans_of(compiled: SQLCompiler) -> dict[Any, Plan]:
    plans: dict[Any, Plan] = compiled.__dict__.setdefault(_PLANS, {})
    return plans


def _remember(plan: Plan, identity: tuple[Any, ...]) -> None:
    """Keep a plan with what was compiled, which SQLAlchemy keeps as long as it likes; and not too many for an engine and
    those made from it by ``execution_options()``.

    Of those that were not used since they were last looked at, the oldest goes (the algorithm is known as CLOCK).
    """
    order: deque[tuple[weakref.ref[SQLCompiler], tuple[Any, ...]]]
    order = plan.engine.dialect.__dict__.setdefault(_ORDER, deque())
    plans = _plans_of(plan.compiled)
    known = identity in plans  # with other options
    plans[identity] = plan
    if known:
        return
    order.append((weakref.ref(plan.compiled), identity))
    while len(order) > _PLANS_OF_ENGINE:
        with suppress(IndexError):  # another thread is making room, too
            reference, oldest = order.popleft()
            compiled = reference()
            found = None if compiled is None else _plans_of(compiled).get(oldest)
            if compiled is None or found is None:
                continue
            if found.recent:
                found.recent = False
                order.append((reference, oldest))
            else:
                _plans_of(compiled).pop(oldest, None)


def key_place(compiled: SQLCompiler) -> int | None:
    """Of a select that asks rows of a table for their primary key, its only parameter, and for nothing else: the place of
    the key among the columns.

    None for others; also where the key has several columns, or is none of those that are selected. The caller sees to it
    that the table is all that is read, no function called and no textual SQL in it.
    """
    state: Any = compiled.compile_state
    statement: Any = compiled.statement if state is None else state.statement
    if (
        not isinstance(statement, Select)
        or len(statement._where_criteria) != 1
        or len(set(compiled.bind_names.values())) != 1
        or statement._distinct
        or statement._group_by_clauses
    ):
        return None
    where: Any = statement._where_criteria[0]
    if not isinstance(where, BinaryExpression) or where.operator not in (operators.eq, operators.in_op):
        return None
    table = getattr(where.left, "table", None)
    if where.right not in compiled.bind_names or not isinstance(table, Table):
        return None
    key = list(table.primary_key)
    # where a type of the application maps values, those of the rows are not those of the parameters
    if len(key) != 1 or key[0].name != where.left.name or not _is_plain(key[0].type, compiled.dialect):
        return None
    for place, column in enumerate(compiled._result_columns):
        # not `is`: each may be as it is declared, or as the ORM has annotated it
        if any(
            isinstance(each, ColumnClause) and each.name == key[0].name and isinstance(each.table, Table)
            for each in column[2]
        ):
            return place
    return None


def _unrendered(compiled: SQLCompiler) -> list[int]:
    """The places of a statement's parameters that are in no place of its SQL."""
    places: list[int] | None = compiled.__dict__.get(_UNRENDERED)
    if places is None:
        match = compiled._cache_key_bind_match
        # each of the cache key's parameters with those that stand for it in the SQL, itself the first in any case
        rendered = {} if match is None else match[0]
        known = () if compiled.cache_key is None else compiled.cache_key.bindparams
        places = [place for place, bind in enumerate(known) if len(rendered.get(bind, ())) < 2]
        compiled.__dict__[_UNRENDERED] = places
    return places


def _is_repeatable(compiled: SQLCompiler, dialect: Dialect) -> bool:
    """True if the same values always come to the same parameters.

    Not so where functions of the application give some, of which not all show in the cache key (those of a relationship's
    join do not), or where its types process them.
    """
    known: bool | None = compiled.__dict__.get(_REPEATABLE)
    if known is None:
        binds = compiled.binds.values()
        known = all(bind.callable is None and _is_plain(bind.type, dialect) for bind in binds)
        compiled.__dict__[_REPEATABLE] = known
    return known


def _is_plain(kind: Any, dialect: Dialect) -> bool:
    """True for SQLAlchemy's own types, but for those that run code of the application.

    A type of the application, a pickler or an engine's serializer may look at the context when it processes a parameter.
    """
    item = getattr(kind, "item_type", None)
    kinds = (kind, kind.dialect_impl(dialect))
    plain = all(
        type(each).__module__.startswith("sqlalchemy.") and not isinstance(each, (JSON, PickleType))
        for each in kinds
    )
    return plain and (item is None or _is_plain(item, dialect))


_COMPILATION = "_querycache_compilation"
_MEMO = "_querycache_memo"
_ORDER = "_querycache_order"
_PLANS = "_querycache_plans"
_REPEATABLE = "_querycache_repeatable"
_TEMPLATE = "_querycache_template"
_UNRENDERED = "_querycache_unrendered"
