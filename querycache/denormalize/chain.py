"""A chain: the tables from a parent row down to the children that it aggregates, and the statements over it.

A chain is a join, `parent ⋈ step ⋈ … ⋈ child`, and an aggregate is a function of its rows grouped by the parent.
Level 0 is the parent, level k the child; a change of the row of a level above 0 (or of a row of a secondary table,
which counts as a change of the child side) changes exactly those joined rows that it is part of. So the joined rows
that contain a changed row, looked at before the change and after it, are all that is needed to bring the aggregate
forward: the *images* (`images.py`). The same join, outer and restricted to some parents, is the recount.
"""

from __future__ import annotations

import datetime
import inspect as python_inspect
import re
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    BinaryExpression,
    BindParameter,
    Column,
    ColumnClause,
    ColumnElement,
    FromClause,
    Join,
    Select,
    Table,
    TextClause,
    and_,
    bindparam,
    case,
    select,
    tuple_,
    type_coerce,
    types,
)
from sqlalchemy import inspect as sqlalchemy_inspect
from sqlalchemy.orm import Mapper, RelationshipDirection, RelationshipProperty, aliased
from sqlalchemy.sql import operators, visitors

from querycache.denormalize.declare import INFO_KEY, Declaration, Expression
from querycache.denormalize.errors import DenormalizeError
from querycache.denormalize.kinds import Parts
from querycache.denormalize.places import rounded, type_with_places
from querycache.errors import ConfigurationError

__all__ = [
    "KEYS",
    "Aggregate",
    "Chain",
    "Key",
    "Link",
    "Queried",
    "attribute_columns",
    "attributes_read",
    "changed_by_update",
    "in_order",
    "key_condition",
    "key_in",
    "mapped_attributes",
    "primary_keys",
]

KEYS: Final = "denormalize_keys"
"""A parameter; its name, as those in `writing.py`, must be that of no column of a table that is updated."""

Key = tuple[Any, ...]
"""A primary key: always a tuple, in the order of the mapper's primary key."""


def primary_keys(mapper: Mapper[Any]) -> tuple[str, ...]:
    """The names of the primary key attributes of `mapper`, in its order."""
    return tuple(mapper.get_property_by_column(column).key for column in mapper.primary_key)


def key_in(table: Table, mapper: Mapper[Any]) -> tuple[Column[Any], ...] | None:
    """The columns of `table` that hold the primary key of `mapper`, which need not be that of the table, in its order; None
    if it does not hold it. What its tables are joined by is the same in each."""
    pairs = [
        {each.left, each.right}
        for each in visitors.iterate(mapper.persist_selectable)
        if isinstance(each, BinaryExpression) and each.operator is operators.eq
    ]
    found = []
    for column in mapper.primary_key:
        same = {column, *mapper.get_property_by_column(column).columns}
        for _ in pairs:
            same.update(*(pair for pair in pairs if not pair.isdisjoint(same)))
        held = [each for each in table.columns if each in same]
        found.extend(held[:1])
    return tuple(found) if len(found) == len(mapper.primary_key) else None


def attribute_columns(entity: Any, names: Sequence[str]) -> tuple[ColumnElement[Any], ...]:
    return tuple(getattr(entity, name) for name in names)


_ORDERED: Final = (
    str,
    int,
    float,
    bytes,
    Decimal,
    datetime.date,
    datetime.time,
    datetime.timedelta,
    uuid.UUID,
)


def in_order(keys: Iterable[Key]) -> list[Key]:
    """Keys in the order in which every transaction locks and writes their rows.

    Members of an Enum and the values of other types may have no order of their own, and are taken as text.
    """
    found = list(keys)
    if all(isinstance(part, _ORDERED) for part in (found[0] if found else ())):
        return sorted(found)
    return sorted(found, key=_as_ordered)


def _as_ordered(key: Key) -> Key:
    return tuple(part if isinstance(part, _ORDERED) else str(part) for part in key)


def key_condition(columns: Sequence[ColumnElement[Any]]) -> ColumnElement[bool]:
    """The condition that `columns` are one of the keys given as parameter `KEYS`."""
    keys: BindParameter[Any] = bindparam(KEYS, expanding=True)
    return columns[0].in_(keys) if len(columns) == 1 else tuple_(*columns).in_(keys)


@dataclass(frozen=True)
class Link:
    """How a row of one level points to its row, or rows, of the level above.

    Attributes:
        attributes: column attributes of the lower level that hold the upper one's primary key, in its order;
            empty when a secondary table is between them.
        secondary: that table, with the columns that hold the lower and the upper key.
    """

    attributes: tuple[str, ...] = ()
    secondary: Table | None = None
    lower: tuple[ColumnElement[Any], ...] = ()
    upper: tuple[ColumnElement[Any], ...] = ()


class Queried(NamedTuple):
    """A statement and where to find what in its rows."""

    statement: Select[Any]
    parent: slice
    levels: tuple[slice, ...]
    values: slice


class Chain:
    """Parent mapper and the relationships down to the children.

    Raises:
        ConfigurationError: for a relationship that no strategy can follow.
    """

    def __init__(
        self, root: Mapper[Any], relationships: tuple[RelationshipProperty[Any], ...], name: str
    ) -> None:
        self.root = root
        self.relationships = relationships
        self.mappers: tuple[Mapper[Any], ...] = (root, *(step.mapper for step in relationships))
        self.keys: tuple[tuple[str, ...], ...] = tuple(primary_keys(mapper) for mapper in self.mappers)
        self.links = tuple(
            _link(upper, step, name) for upper, step in zip(self.mappers, relationships, strict=False)
        )
        """links[i] joins level i + 1 to level i."""

    @property
    def depth(self) -> int:
        return len(self.relationships)

    @property
    def leaf(self) -> Mapper[Any]:
        return self.mappers[-1]

    @cached_property
    def leaf_columns(self) -> tuple[str, ...]:
        return tuple(attribute.key for attribute in self.leaf.column_attrs if _plain(attribute))

    @cached_property
    def leaf_changed_by_update(self) -> frozenset[str]:
        """The child's attributes that an UPDATE of others may change."""
        return changed_by_update(self.leaf, self.leaf_columns)

    @cached_property
    def reverses(self) -> tuple[tuple[str, ...], ...]:
        """For each link the relationships of its lower side that lead up by the same columns."""
        return tuple(
            tuple(_reverses(upper, step, lower))
            for upper, step, lower in zip(self.mappers, self.relationships, self.mappers[1:], strict=False)
        )

    def entities(self) -> tuple[Any, ...]:
        """Fresh aliases of all levels, parent first."""
        return tuple(aliased(mapper, flat=True) for mapper in self.mappers)

    def join(self, statement: Select[Any], entities: tuple[Any, ...], *, outer: bool) -> Select[Any]:
        statement = statement.select_from(entities[0])
        for upper, step, lower in zip(entities, self.relationships, entities[1:], strict=False):
            statement = statement.join(getattr(upper, step.key).of_type(lower), isouter=outer)
        return statement

    def image(
        self, aggregates: Sequence[Aggregate], level: int, above: tuple[int, ...], *, rows: bool
    ) -> Queried:
        """The joined rows that contain one of `:keys` at `level`.

        Grouped by the parent and by the keys of the levels `above`, with the parts of the aggregates; or, with
        `rows`, each row with the child's columns.
        """
        entities = self.entities()
        parent = attribute_columns(entities[0], self.keys[0])
        levels = tuple(attribute_columns(entities[i], self.keys[i]) for i in above)
        columns: list[ColumnElement[Any]] = list(parent)
        places: list[slice] = []
        for keys in levels:
            places.append(slice(len(columns), len(columns) + len(keys)))
            columns.extend(keys)
        grouping = list(columns)
        if rows:
            columns.extend(attribute_columns(entities[-1], self.leaf_columns))
            for aggregate in aggregates:
                columns.extend(aggregate.extra_columns(entities))
        else:
            for aggregate in aggregates:
                columns.extend(aggregate.parts(entities))
        statement = self.join(select(*_distinct_names(columns)), entities, outer=False)
        statement = statement.where(key_condition(attribute_columns(entities[level], self.keys[level])))
        if not rows:
            statement = statement.group_by(*grouping)
        return Queried(statement, slice(0, len(parent)), tuple(places), slice(len(grouping), None))

    def recount(self, aggregates: Sequence[Aggregate], *, rows: bool, locking: bool = False) -> Queried:
        """Every parent of `:keys` with the stored values of `aggregates`, then their parts; or, with `rows`, one row
        for each child with its columns, and one row of NULLs for a parent without children.

        `locking` makes its subqueries locking reads, which that of the statement around them does not do.
        """
        entities = self.entities()
        parent = attribute_columns(entities[0], self.keys[0])
        stored = attribute_columns(entities[0], [aggregate.key for aggregate in aggregates])
        columns: list[ColumnElement[Any]] = [*parent, *stored]
        grouping = list(columns)
        if rows:
            columns.extend(attribute_columns(entities[-1], self.leaf_columns))
            for aggregate in aggregates:
                columns.extend(aggregate.extra_columns(entities))
        else:
            for aggregate in aggregates:
                columns.extend(aggregate.recount_parts(entities, locking))
        statement = self.join(select(*_distinct_names(columns)), entities, outer=True)
        statement = statement.where(key_condition(parent))
        if not rows:
            statement = statement.group_by(*grouping)
        return Queried(
            statement,
            slice(0, len(parent)),
            (slice(len(parent), len(parent) + len(stored)),),
            slice(len(grouping), None),
        )


def _reverses(upper: Mapper[Any], step: RelationshipProperty[Any], lower: Mapper[Any]) -> Iterable[str]:
    for other in lower.relationships:
        if other.viewonly or not (other.mapper.isa(upper) or upper.isa(other.mapper)):
            continue
        if step.secondary is not None:
            if other.secondary is step.secondary and _columns(other.synchronize_pairs) == _columns(
                step.secondary_synchronize_pairs or ()
            ):
                yield other.key
        elif other.direction is RelationshipDirection.MANYTOONE and _columns(
            other.synchronize_pairs
        ) == _columns(step.synchronize_pairs):
            yield other.key


def _columns(pairs: Iterable[tuple[Any, Any]]) -> set[str]:
    """The columns that hold the foreign key, by name."""
    return {str(held) for _, held in pairs}


def _distinct_names(columns: Sequence[ColumnElement[Any]]) -> list[ColumnElement[Any]]:
    return [column.label(f"c{number}") for number, column in enumerate(columns)]


def _plain(attribute: Any) -> bool:
    """Whether it is what the application stores in a table: an aggregate changes outside the unit of work."""
    return all(
        isinstance(getattr(column, "table", None), Table) and INFO_KEY not in column.info
        for column in attribute.columns
    )


def _link(upper: Mapper[Any], step: RelationshipProperty[Any], name: str) -> Link:
    keys = primary_keys(upper)
    shown = f"{upper.class_.__name__}.{step.key}"
    if step.viewonly:
        raise ConfigurationError(f"{name}: {shown} is viewonly, so its changes are not those of the data")
    if step.direction is RelationshipDirection.MANYTOONE:
        raise ConfigurationError(
            f"{name}: {shown} goes from the many to the one; an aggregate goes the other way."
            f" Declare it on {step.mapper.class_.__name__}"
        )
    if step.secondary is not None:
        if not isinstance(step.secondary, Table):
            raise ConfigurationError(f"{name}: the secondary of {shown} is not a table")
        lower_keys = primary_keys(step.mapper)
        upper_of = {upper.get_property_by_column(left).key: right for left, right in step.synchronize_pairs}
        lower_of = {
            step.mapper.get_property_by_column(left).key: right
            for left, right in step.secondary_synchronize_pairs or ()
        }
        if set(upper_of) != set(keys) or set(lower_of) != set(lower_keys):
            raise ConfigurationError(f"{name}: {shown} must join on the primary keys of both sides")
        return Link(
            secondary=step.secondary,
            lower=tuple(lower_of[key] for key in lower_keys),
            upper=tuple(upper_of[key] for key in keys),
        )
    held: dict[str, str] = {}
    for local, remote in step.synchronize_pairs:
        held[upper.get_property_by_column(local).key] = step.mapper.get_property_by_column(remote).key
    if set(held) != set(keys):
        raise ConfigurationError(
            f"{name}: {shown} must join on the primary key of {upper.class_.__name__} ({', '.join(keys)})"
        )
    return Link(attributes=tuple(held[key] for key in keys))


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


def mapped_attributes(mapper: Mapper[Any], columns: Iterable[tuple[str, str]]) -> set[str]:
    """The column attributes of `mapper` that stand for one of the given (full table name, column name)."""
    wanted = set(columns)
    return {
        attribute.key
        for attribute in mapper.column_attrs
        for column in attribute.columns
        if isinstance(table := getattr(column, "table", None), Table)
        and (table.fullname, column.name) in wanted
    }


def changed_by_update(mapper: Mapper[Any], names: Iterable[str]) -> frozenset[str]:
    """Those of the attributes `names` that an UPDATE of other columns may change as well: by onupdate=, because the
    database computes them, or as the version of the row."""
    return frozenset(
        name
        for name in names
        if name in mapper.column_attrs
        for column in mapper.column_attrs[name].columns
        if getattr(column, "onupdate", None) is not None
        or getattr(column, "server_onupdate", None) is not None  # a Computed too
        or column is mapper.version_id_col
    )


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
    if isinstance(element, TextClause):
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
