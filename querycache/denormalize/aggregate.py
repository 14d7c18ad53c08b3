"""An aggregate: a column of the parent that is computed from the rows of a chain."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from functools import cached_property
from typing import Any

from sqlalchemy import ColumnElement, Select, Table, and_, case, select, type_coerce, types

from querycache.denormalize.attributes import attribute_columns, changed_by_update, key_in
from querycache.denormalize.chain import Chain
from querycache.denormalize.declare import Declaration, Expression
from querycache.denormalize.errors import DenormalizeError
from querycache.denormalize.expressions import attributes_read, sql_of
from querycache.denormalize.kinds import Parts
from querycache.denormalize.places import rounded, type_with_places
from querycache.errors import ConfigurationError

__all__ = ["Aggregate"]


class Aggregate:
    """A declaration with everything looked up.

    Attributes:
        name: "Thread.word_count", as errors and reports call it.
        key: the attribute on the parent; `column` its column, in `table`.
        table_key: the columns of `table` that hold the parent's key, in the order of its mapper.
        chain: the join that it is computed over.
        in_python: whether its measure or condition can only be computed in Python.
    """

    def __init__(self, declaration: Declaration, chain: Chain, key: str, column: Any, name: str) -> None:
        self.declaration = declaration
        self.kind = declaration.kind
        self.strategy = declaration.strategy
        self.chain = chain
        self.key = key
        self.column = column
        self.table: Table = column.table
        self.name = name
        held = key_in(column.table, chain.root)
        if held is None:
            raise ConfigurationError(
                f"{name}: its table, {column.table.fullname}, does not hold the primary key by which"
                f" {chain.root.class_.__name__} is mapped ({', '.join(map(str, chain.root.primary_key))}), so the row to be"
                " written cannot be told; declare it on a class whose table does"
            )
        self.table_key = held
        self.in_python = any(
            given is not None and given.sql is None for given in (declaration.measure, declaration.where)
        )
        self.evaluates_python = self.in_python or declaration.strategy in ("flush", "memory")

    def __repr__(self) -> str:
        return f"<{self.kind.name} {self.name}>"

    @property
    def counts_all(self) -> bool:
        """Whether every child counts, whatever it holds."""
        return not self.kind.measured and self.declaration.where is None

    @cached_property
    def carried(self) -> tuple[str, ...]:
        """The parent's attributes that the UPDATE of the column may change as well: by onupdate=, or computed from it."""
        root = self.chain.root
        names = changed_by_update(root, [attribute.key for attribute in root.column_attrs])
        return tuple(
            name
            for name in sorted(names)
            for column in root.column_attrs[name].columns
            # A version counts up in the unit of work only.
            if column.table is self.table and (column is not root.version_id_col or column.server_onupdate)
        )

    @cached_property
    def absorbs(self) -> bool:
        """Whether SQL can tell what one more child does to the column without a look at the other children, and in a
        type that the column holds as it is."""
        if self.in_python:
            return False
        value = self.value(self.chain.entities())
        if self.kind.gain(value) is None:
            return False
        return not self.kind.measured or _same_form(value.type, self.column.type)

    @property
    def compared(self) -> types.TypeEngine[Any]:
        """The type of what extremes, and the latest of the children, are found by."""
        if self.declaration.order_by is None:
            return self.column.type  # type: ignore[no-any-return]
        return self.chain.leaf.columns[self.declaration.order_by].type

    def reads(self) -> list[set[str]]:
        """For each level of the chain, the column attributes that the aggregate's value depends on."""
        read: list[set[str]] = [set() for _ in self.chain.mappers]
        for given in (self.declaration.measure, self.declaration.where):
            if given is not None:
                python = given.python if given.sql is None or self.evaluates_python else None
                used = Expression(given.sql, python, given.columns)
                for level, names in enumerate(attributes_read(used, self.chain)[0]):
                    read[level] |= names
        if self.declaration.order_by is not None:
            read[-1].add(self.declaration.order_by)
        return read

    def measure(self, entities: tuple[Any, ...]) -> ColumnElement[Any] | None:
        built = sql_of(self.declaration.measure, entities)
        if built is None:
            return None
        # SQLite gives a float, which SQLAlchemy rounds as the type says.
        type_ = type_with_places(built)
        return built if type_ is built.type else type_coerce(built, type_)

    def condition(self, entities: tuple[Any, ...]) -> ColumnElement[Any] | None:
        return sql_of(self.declaration.where, entities)

    def value(self, entities: tuple[Any, ...], *conditions: ColumnElement[Any]) -> ColumnElement[Any]:
        """What a joined row counts for, in SQL; NULL if it does not count."""
        condition = self.condition(entities)
        if condition is not None:
            conditions = (*conditions, condition)
        value = self.measure(entities)
        if value is None or self.kind.ordered:
            value = attribute_columns(entities[-1], self.chain.keys[-1])[0]
        return case((and_(*conditions), value)) if conditions else value

    def parts(self, entities: tuple[Any, ...]) -> Sequence[ColumnElement[Any]]:
        """The parts over an inner join."""
        return self.kind.parts(self.value(entities))

    def recount_parts(self, entities: tuple[Any, ...], locking: bool) -> Sequence[ColumnElement[Any]]:
        """The parts over an outer join: a parent without children has one row, which must not count."""
        if self.kind.ordered:
            parent = attribute_columns(entities[0], self.chain.keys[0])
            last = self.last(parent).correlate(entities[0])
            return ((last.with_for_update(read=True) if locking else last).scalar_subquery(),)
        child = attribute_columns(entities[-1], self.chain.keys[-1])[0]
        return self.kind.parts(self.value(entities, child.is_not(None)))

    def finish(self, parts: Parts) -> Any:
        """The column's value of `parts`, as the column's type holds it."""
        return self.fit(self.kind.finish(parts))

    def fit(self, value: Any) -> Any:
        """`value`, or a difference of values, as the column's type holds it.

        Raises:
            DenormalizeError: if an integer column cannot hold it, or a sum would have to be rounded.
        """
        type_ = self.column.type
        if value is None:
            return None
        if isinstance(type_, types.Integer) and not isinstance(value, int):
            if int(value) != value:
                raise DenormalizeError(f"{self.name}: {value!r} does not fit its column of type {type_!r}")
            return int(value)
        if isinstance(type_, types.Float) or (isinstance(type_, types.Numeric) and not type_.asdecimal):
            return float(value)
        if isinstance(type_, types.Numeric) and isinstance(value, (int, float, Decimal)):
            return self._rounded(value, type_)
        return value

    def _rounded(self, value: Any, type_: types.Numeric[Any]) -> Decimal:
        # SQLite computes in floats, whose last digits are noise.
        number = Decimal(repr(value) if isinstance(value, float) else value)
        held: Decimal = rounded(number, type_)
        if self.kind.additive and held != number and number.is_finite() and not isinstance(value, float):
            raise DenormalizeError(
                f"{self.name}: {value!r} has more decimal places than its column of type {type_!r}, and a sum that is"
                " rounded with each change drifts; round the measure"
            )
        return held

    def whole(self, entities: tuple[Any, ...]) -> ColumnElement[Any]:
        """The column's value in SQL over all rows of an inner join."""
        return self.kind.whole(self.value(entities))

    def last(self, parent: Sequence[ColumnElement[Any]]) -> Select[Any]:
        """For latest_of: the measure of the last child of the parent whose key is `parent`."""
        entities = self.chain.entities()
        measure, condition = self.measure(entities), self.condition(entities)
        assert measure is not None and self.declaration.order_by is not None
        order = getattr(entities[-1], self.declaration.order_by)
        keys = attribute_columns(entities[0], self.chain.keys[0])
        same = [inner == wanted for inner, wanted in zip(keys, parent, strict=True)]
        statement = self.chain.join(select(measure), entities, outer=False).where(*same)
        if condition is not None:
            statement = statement.where(condition)
        last = [column.desc() for column in attribute_columns(entities[-1], self.chain.keys[-1])]
        return statement.order_by(case((order.is_(None), 1), else_=0), order.desc(), *last).limit(1)

    def extra_columns(self, entities: tuple[Any, ...]) -> list[ColumnElement[Any]]:
        """What a query of rows must select besides the child's columns: a condition, or measure, given in SQL only."""
        extra: list[ColumnElement[Any]] = []
        if self._sql_only(self.declaration.where):
            condition = self.condition(entities)
            assert condition is not None
            extra.append(case((condition, 1), else_=0))
        if self._sql_only(self.declaration.measure):
            measure = self.measure(entities)
            assert measure is not None
            extra.append(measure)
        return extra

    @cached_property
    def extra_width(self) -> int:
        """How many `extra_columns` there are."""
        return sum(map(self._sql_only, (self.declaration.where, self.declaration.measure)))

    @staticmethod
    def _sql_only(given: Expression | None) -> bool:
        return given is not None and given.python is None

    def counts(self, row: Any, extra: Sequence[Any] = ()) -> bool:
        """Whether a row of the child counts; `extra` are the values of `extra_columns` for it."""
        where = self.declaration.where
        if where is None:
            return True
        return bool(extra[0] if where.python is None else where.python(row))

    def value_of(self, row: Any, extra: Sequence[Any] = ()) -> Any:
        """What `Kind.fold` takes for a row of the child that counts."""
        measure = self.declaration.measure
        value: Any = True
        if measure is not None:
            value = extra[-1] if measure.python is None else measure.python(row)
        if self.kind.ordered:
            name = self.declaration.order_by
            assert name is not None
            key = tuple(getattr(row, part, None) for part in self.chain.keys[-1])
            # The key decides by itself; the one that the database is still to generate is not NULL, but the greatest.
            order = True if self.chain.keys[-1] == (name,) else getattr(row, name)
            return (order, key, value)
        return value


def _same_form(one: types.TypeEngine[Any], other: types.TypeEngine[Any]) -> bool:
    """Whether what the database holds of a value is the same in columns of either type."""
    if any(isinstance(each, (types.TypeDecorator, types.NullType)) for each in (one, other)):
        return False
    for family in (types.Integer, types.Numeric), (types.String,):
        if isinstance(one, family) and isinstance(other, family):
            return not any(isinstance(each, types.Enum) for each in (one, other))
    return repr(one) == repr(other)
