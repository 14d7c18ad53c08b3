"""Strategy "trigger" as DDL: for each table that an aggregate depends on, triggers that keep it in the database.

Counts and sums one step below their parent are incremented. Everything else locks the parents concerned and counts them
anew, in this order, so that the count is taken from a snapshot that is younger than the lock. Rows between
parent and child are locked too, lest they move to another parent meanwhile.

`create_all()` runs the statements itself; for migrations there are `trigger_sql()` and `querycache --app … denorm sql`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from sqlalchemy import (
    ColumnClause,
    ColumnElement,
    Table,
    TableClause,
    and_,
    case,
    func,
    literal,
    literal_column,
    make_url,
    or_,
    select,
    tuple_,
    types,
    update,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.exc import ArgumentError, CompileError, NoSuchModuleError
from sqlalchemy.orm import aliased
from sqlalchemy.sql import visitors
from sqlalchemy.sql.elements import quoted_name

from querycache.denormalize.aggregate import Aggregate
from querycache.denormalize.attributes import attribute_columns
from querycache.denormalize.chain import Chain
from querycache.denormalize.checks import changed_by_keys
from querycache.denormalize.configure import aggregates_of
from querycache.denormalize.ddl import Ddl, trigger_name
from querycache.denormalize.plan import Plan, foreign_keys, plan_of, relevant
from querycache.errors import ConfigurationError

__all__ = ["DIALECTS", "drop_statements", "tables_of", "trigger_sql", "trigger_statements"]

_EVENTS = {"INSERT": ("NEW",), "UPDATE": ("OLD", "NEW"), "DELETE": ("OLD",)}
DIALECTS = ("postgresql", "mysql", "mariadb", "sqlite")


def trigger_sql(target: Any, dialect: Dialect | str, *, drop: bool = False) -> list[str]:
    """The statements of a migration that creates the triggers of strategy "trigger", to be run one by one.

    They replace triggers of the same aggregates, so they may be run again.

    Args:
        target: a MetaData, a declarative base or an entity; the triggers of its whole MetaData are given.
        dialect: of the database that they are for, or its name: "postgresql", "mariadb", "mysql" or "sqlite".
        drop: give those that drop the triggers instead, for the way back, or before an aggregate is given up or gets
            another path. They may run where there are none.

    Raises:
        ConfigurationError: if `target` has no aggregates, or the database cannot keep one of them, or there is no dialect of
            that name.
    """
    plans = dict.fromkeys(plan_of(aggregate.chain.root) for aggregate in aggregates_of(target))
    ddl = Ddl(_dialect(dialect) if isinstance(dialect, str) else dialect)
    statements: list[str] = []
    for plan in plans:
        if plan is not None:
            made = [] if drop else trigger_statements(plan, ddl)
            statements += [*drop_statements(plan, ddl), *made]
    return statements


def trigger_statements(
    plan: Plan, ddl: Ddl, wanted: Callable[[Aggregate], bool] = lambda _: True
) -> list[str]:
    """The statements that create the triggers of the aggregates with strategy "trigger" that are `wanted`.

    Raises:
        ConfigurationError: for a database without support here, or an aggregate that its triggers cannot keep.
    """
    _check_dialect(plan, ddl.dialect)
    statements: list[str] = []
    for aggregate in filter(wanted, _held(plan)):
        _check(aggregate, ddl)
        try:
            for name, table, event, body, guard in _Writer(aggregate, ddl).triggers():
                statements.extend(_render(ddl, name, table, event, body, guard))
        except CompileError as error:
            raise ConfigurationError(
                f"{aggregate.name}: its measure, or where=, cannot be written into a trigger of {ddl.dialect.name}: {error};"
                " give its constants as SQL, by func.… or text(), or take strategy 'sql'"
            ) from error
    return statements


def drop_statements(plan: Plan, ddl: Ddl, wanted: Callable[[Aggregate], bool] = lambda _: True) -> list[str]:
    """The statements that drop them again; they may run where the triggers do not exist."""
    _check_dialect(plan, ddl.dialect)
    statements: list[str] = []
    for aggregate in filter(wanted, _held(plan)):
        for place, (_, table) in enumerate(_levels(aggregate)):
            for event in _events(ddl):
                name = trigger_name(aggregate, place, table, event)
                if ddl.dialect.name == "postgresql":
                    statements.append(f"DROP TRIGGER IF EXISTS {name} ON {ddl.table(table)}")
                    statements.append(f"DROP FUNCTION IF EXISTS {ddl.beside(table, name)}()")
                else:
                    statements.append(f"DROP TRIGGER IF EXISTS {ddl.beside(table, name)}")
    return statements


def tables_of(aggregate: Aggregate) -> set[Table]:
    """The tables that the triggers of an aggregate read and write."""
    return {aggregate.table, *(table for _, table in _levels(aggregate))}


def _events(ddl: Ddl) -> Iterable[str]:
    return (*_EVENTS, "TRUNCATE") if ddl.dialect.name == "postgresql" else _EVENTS


def _held(plan: Plan) -> list[Aggregate]:
    return [aggregate for aggregate in plan.aggregates if aggregate.strategy == "trigger"]


def _dialect(name: str) -> Dialect:
    try:
        return make_url(f"{name}://").get_dialect()()
    except (ArgumentError, NoSuchModuleError) as error:
        raise ConfigurationError(f"dialect {name!r}: {error}") from error


def _check_dialect(plan: Plan, dialect: Dialect) -> None:
    if dialect.name not in DIALECTS:
        names = ", ".join(held.name for held in _held(plan))
        raise ConfigurationError(
            f"{names}: there are triggers for PostgreSQL, MariaDB, MySQL and SQLite, not for {dialect.name}"
        )


def _check(aggregate: Aggregate, ddl: Ddl) -> None:
    if ddl.dialect.name == "sqlite":
        for table in tables_of(aggregate):
            if ddl.schema(table) is not None:
                raise ConfigurationError(
                    f"{aggregate.name}: {table.name} is in the schema {ddl.schema(table)!r}, and a trigger of SQLite"
                    " cannot name one; take strategy 'sql'"
                )
    if ddl.dialect.name not in ("mysql", "mariadb"):
        return
    chain = aggregate.chain
    if any(table is aggregate.table for _, table in _levels(aggregate)):
        raise ConfigurationError(
            f"{aggregate.name}: a trigger of MariaDB and MySQL cannot update the table that it belongs to,"
            f" {aggregate.table.name}; take strategy 'sql'"
        )
    for mapper, _, rule in changed_by_keys(aggregate):
        raise ConfigurationError(
            f"{aggregate.name}: MariaDB and MySQL run no triggers for {rule}, which changes"
            f" {mapper.local_table.description}; refer to a key that does not change"
        )
    for level, table in _levels(aggregate):
        for constraint in table.foreign_key_constraints:
            rule = (constraint.ondelete or "").upper()
            if rule in ("CASCADE", "SET NULL", "SET DEFAULT"):
                upper = chain.mappers[level - 1].tables
                if constraint.referred_table not in upper:
                    raise ConfigurationError(
                        f"{aggregate.name}: MariaDB and MySQL run no triggers for ON DELETE {rule} of"
                        f" {constraint.referred_table.name}, which changes {table.name}; take strategy 'sql'"
                    )


def _levels(aggregate: Aggregate) -> Iterator[tuple[int, Table]]:
    """The tables that get triggers, with their level; a table may stand at several."""
    for level, link in enumerate(aggregate.chain.links, start=1):
        table = aggregate.chain.mappers[level].local_table
        assert isinstance(table, Table)
        yield level, table
        if link.secondary is not None:
            yield level, link.secondary


class _Writer:
    """Writes the triggers of one aggregate."""

    def __init__(self, aggregate: Aggregate, ddl: Ddl) -> None:
        self.aggregate = aggregate
        self.chain: Chain = aggregate.chain
        self.ddl = ddl
        self.dialect = ddl.dialect
        self.text = ddl.text
        held = aggregate.table
        columns: list[ColumnClause[Any]] = [ColumnClause(each.name, each.type) for each in held.columns]
        self.parent = TableClause(held.name, *columns, schema=ddl.schema(held))
        """The parent's table by name alone: an UPDATE of the Table itself sets each column that has onupdate=, and one that
        is computed in Python to NULL."""
        self.column = self._of_parent(aggregate.column)
        self.key = [self._of_parent(each) for each in aggregate.table_key]

    def _of_parent(self, held: Any) -> ColumnElement[Any]:
        found: ColumnElement[Any] = self.parent.c[held.name]
        return found

    def _set(self, value: Any) -> dict[Any, Any]:
        """What the UPDATE of the parent sets: the aggregate, and what onupdate= says in SQL or by a constant."""
        found: dict[Any, Any] = {self.column: value}
        for each in self.aggregate.table.columns:
            given: Any = each.onupdate
            if given is None or each is self.aggregate.column:
                continue
            if given.is_clause_element:
                found[self._of_parent(each)] = visitors.replacement_traverse(given.arg, {}, self._by_name)
            elif given.is_scalar:
                constant = literal(given.arg, each.type)
                with suppress(CompileError):  # a type whose values cannot be written into a statement
                    self.text(constant)
                    found[self._of_parent(each)] = constant
        return found

    def _by_name(self, element: Any, **_: Any) -> Any:
        if element is self.aggregate.table:
            return self.parent
        own = getattr(element, "table", None) is self.aggregate.table
        return self._of_parent(element) if own else None

    def triggers(self) -> Iterator[tuple[str, Table, str, list[str], str]]:
        """(name, table, event, statements, condition) of each."""
        for place, (level, table) in enumerate(_levels(self.aggregate)):
            secondary = table is self.chain.links[level - 1].secondary
            columns = [] if secondary else self._columns(level)
            for event in _events(self.ddl):
                rows = _EVENTS.get(event)
                if rows is None:
                    body = self._recount_all()
                elif secondary:
                    body = self._recount([self._through(level, row) for row in rows], [])
                else:
                    body = self._body(level, rows)
                yield (
                    trigger_name(self.aggregate, place, table, event),
                    table,
                    event,
                    body,
                    self._differs(columns) if columns and event == "UPDATE" else "",
                )

    def _columns(self, level: int) -> list[Any]:
        """The columns whose change in a row at `level` matters."""
        mapper = self.chain.mappers[level]
        names = relevant(self.chain, level, [self.aggregate], rows=True)
        columns = [mapper.column_attrs[name].columns[0] for name in names if name in mapper.column_attrs]
        return sorted(columns, key=lambda column: column.name)

    def _differs(self, columns: Sequence[Any]) -> str:
        unequal = {"postgresql": "{} IS DISTINCT FROM {}", "sqlite": "{} IS NOT {}"}
        return " OR ".join(
            unequal.get(self.dialect.name, "NOT ({} <=> {})").format(
                self._as_it_is("OLD", column), self._as_it_is("NEW", column)
            )
            for column in columns
        )

    def _as_it_is(self, row: str, column: Any) -> str:
        """What a row holds, to be compared with what another does: a collation may call texts equal that are not the same,
        and PostgreSQL does not compare JSON but as text."""
        held, type_ = f"{row}.{self.ddl.name(column.name)}", column.type.dialect_impl(self.dialect)
        if isinstance(type_, types.TypeDecorator):
            type_ = type_.impl_instance
        postgresql = self.dialect.name == "postgresql"
        if not isinstance(type_, (types.String, types.JSON) if postgresql else types.String):
            return held
        as_it_is = {"postgresql": '{}::text COLLATE "C"', "sqlite": "{} COLLATE BINARY"}
        return as_it_is.get(self.dialect.name, "CAST({} AS BINARY)").format(held)

    def _row(self, row: str, column: Any) -> ColumnElement[Any]:
        return literal_column(f"{row}.{self.ddl.name(column.name)}", column.type)

    def _body(self, level: int, rows: Sequence[str]) -> list[str]:
        link = self.chain.links[0]
        if (
            self.aggregate.kind.additive
            and self.chain.depth == 1
            and link.secondary is None
            and not self._extra_join()
            and not (len(rows) > 1 and self._renames())
        ):
            return [self._increment(rows)]
        return self._recount([self._above(level, row) for row in rows], self._locks(level, rows))

    def _renames(self) -> bool:
        """Whether children follow their parent to another key: they come to the parent that has counted them already."""
        held = {self.chain.leaf.column_attrs[name].columns[0] for name in self.chain.links[0].attributes}
        return not self.chain.relationships[0].passive_updates or any(
            constraint.onupdate is not None and not held.isdisjoint(constraint.columns)
            for constraint in foreign_keys(self.chain.leaf)
        )

    def _extra_join(self) -> bool:
        """Whether the relationship joins by more than its keys, so that not every referring row counts."""
        step = self.chain.relationships[0]
        plain = and_(*(local == remote for local, remote in step.synchronize_pairs))
        return not step.primaryjoin.compare(plain)

    def _increment(self, rows: Sequence[str]) -> str:
        """UPDATE parent SET n = n + (new part) - (old part) WHERE key IN (old, new)."""
        amount: ColumnElement[Any] = self.column
        keys: list[ColumnElement[Any]] = []
        for row in rows:
            parent = self._parent_of_row(row)
            same = and_(*(column == value for column, value in zip(self.key, parent, strict=True)))
            part = case((and_(same, *self._conditions(row)), self._amount(row)), else_=0)
            amount = amount - part if row == "OLD" else amount + part
            keys.append(same)
        return self.text(update(self.parent).where(or_(*keys)).values(self._set(amount)))

    def _parent_of_row(self, row: str) -> tuple[ColumnElement[Any], ...]:
        mapper = self.chain.mappers[1]
        return tuple(
            self._row(row, mapper.column_attrs[name].columns[0]) for name in self.chain.links[0].attributes
        )

    def _entities(self, row: str) -> tuple[Any, ...]:
        leaf = self.chain.leaf
        table = leaf.local_table.alias(quoted_name(row, quote=False))
        return (*self.chain.entities()[:-1], aliased(leaf, table))

    def _amount(self, row: str) -> Any:
        measure = self.aggregate.measure(self._entities(row))
        return literal_column("1") if measure is None else self._fragment(func.coalesce(measure, 0))

    def _fragment(self, expression: Any) -> ColumnElement[Any]:
        """The expression as text, so that NEW and OLD do not become tables of the statement's FROM."""
        return literal_column(f"({self.text(expression)})", expression.type)

    def _conditions(self, row: str) -> list[ColumnElement[Any]]:
        condition = self.aggregate.condition(self._entities(row))
        found = [] if condition is None else [self._fragment(condition)]
        mapper = self.chain.leaf
        if mapper.single and mapper.polymorphic_on is not None:
            kinds = [heir.polymorphic_identity for heir in mapper.self_and_descendants]
            found.append(self._row(row, mapper.polymorphic_on).in_(kinds))
        return found

    def _recount(self, affected: Sequence[Any], locks: Sequence[str]) -> list[str]:
        key = self.key
        target = key[0] if len(key) == 1 else tuple_(*key)
        where = or_(*(_among(target, one) for one in affected))
        if self.dialect.name == "postgresql":
            lock: Any = select(literal_column("1")).select_from(self.parent).where(where).order_by(*key)
            first = self.text(lock.with_for_update(key_share=True)).replace("SELECT", "PERFORM", 1)
        else:
            first = self.text(update(self.parent).where(where).values({self.column: self.column}))
        value = self._whole()
        return [
            *locks,
            first,
            self.text(update(self.parent).where(where).values(self._set(value))),
        ]

    def _recount_all(self) -> list[str]:
        """After TRUNCATE, which keeps every other writer of the table out."""
        return [self.text(update(self.parent).values(self._set(self._whole())))]

    def _whole(self) -> Any:
        aggregate = self.aggregate
        if aggregate.kind.ordered:
            statement = aggregate.last(self.key)
        else:
            entities = self.chain.entities()
            statement = self.chain.join(select(aggregate.whole(entities)), entities, outer=False)
            keys = attribute_columns(entities[0], self.chain.keys[0])
            statement = statement.where(*(a == b for a, b in zip(keys, self.key, strict=True)))
        if self.dialect.name in ("mysql", "mariadb"):
            statement = statement.with_for_update(read=True)
        value = statement.correlate(self.parent).scalar_subquery()
        scale = getattr(aggregate.column.type, "scale", None)
        # Other databases round when they store a Numeric.
        return func.round(value, scale) if self.dialect.name == "sqlite" and scale is not None else value

    def _above(self, level: int, row: str) -> Any:
        """The parents of a row at `level`: a tuple of expressions, or a SELECT of keys."""
        mapper = self.chain.mappers[level]
        link = self.chain.links[level - 1]
        if link.secondary is None:
            held = tuple(self._row(row, mapper.column_attrs[name].columns[0]) for name in link.attributes)
            return held if level == 1 else self._climb(level - 1, held)
        own = tuple(self._row(row, column) for column in mapper.primary_key)
        secondary = link.secondary.alias()
        query = select(*(secondary.c[str(column.key)] for column in link.upper)).where(
            *(secondary.c[str(column.key)] == value for column, value in zip(link.lower, own, strict=True))
        )
        return query if level == 1 else self._climb(level - 1, query)

    def _through(self, level: int, row: str) -> Any:
        """The parents of a row of the secondary table above `level`."""
        held = tuple(self._row(row, column) for column in self.chain.links[level - 1].upper)
        return held if level == 1 else self._climb(level - 1, held)

    def _climb(self, level: int, keys: Any) -> Any:
        """The parents of the rows at `level` whose keys are `keys`."""
        mapper, link = self.chain.mappers[level], self.chain.links[level - 1]
        table = mapper.local_table.alias()
        own = [table.c[str(column.key)] for column in mapper.primary_key]
        chosen = _among(own[0] if len(own) == 1 else tuple_(*own), keys)
        if link.secondary is None:
            upper = [table.c[mapper.column_attrs[name].columns[0].key] for name in link.attributes]
            query = select(*upper).where(chosen)
        else:
            secondary = link.secondary.alias()
            joined = and_(*(secondary.c[str(c.key)] == key for c, key in zip(link.lower, own, strict=True)))
            query = (
                select(*(secondary.c[str(c.key)] for c in link.upper))
                .join_from(table, secondary, joined)
                .where(chosen)
            )
        return query if level == 1 else self._climb(level - 1, query)

    def _locks(self, level: int, rows: Sequence[str]) -> list[str]:
        """Statements that lock the rows between the changed row and the parent. A foreign key check does it on MariaDB,
        and SQLite has one writer."""
        if self.dialect.name != "postgresql":
            return []
        statements: list[str] = []
        for row in rows:
            keys: Any = None
            for upper in range(level - 1, 0, -1):
                link = self.chain.links[upper]
                if link.secondary is not None:
                    break
                mapper = self.chain.mappers[upper]
                table = mapper.local_table
                own = list(mapper.primary_key)
                if keys is None:
                    lower = self.chain.mappers[level]
                    keys = tuple(
                        self._row(row, lower.column_attrs[name].columns[0]) for name in link.attributes
                    )
                chosen = _among(own[0] if len(own) == 1 else tuple_(*own), keys)
                lock: Any = select(literal_column("1")).select_from(table).where(chosen).order_by(*own)
                statements.append(self.text(lock.with_for_update(read=True)).replace("SELECT", "PERFORM", 1))
                below = table.alias()
                names = self.chain.links[upper - 1].attributes
                if not names:
                    break
                picked = [below.c[str(column.key)] for column in mapper.primary_key]
                keys = select(*(below.c[mapper.column_attrs[name].columns[0].key] for name in names)).where(
                    _among(picked[0] if len(picked) == 1 else tuple_(*picked), keys)
                )
        return statements


def _among(target: Any, keys: Any) -> ColumnElement[bool]:
    if isinstance(keys, tuple):
        return target.in_([keys[0] if len(keys) == 1 else tuple_(*keys)])  # type: ignore[no-any-return]
    return target.in_(keys)  # type: ignore[no-any-return]


def _render(ddl: Ddl, name: str, table: Table, event: str, body: Iterable[str], condition: str) -> list[str]:
    on = ddl.table(table)
    lines = "\n".join(f"  {statement};" for statement in body)
    if ddl.dialect.name == "postgresql":
        when = f"\nWHEN ({condition})" if condition else ""
        each = "STATEMENT" if event == "TRUNCATE" else "ROW"
        function = ddl.beside(table, name)
        quote = "$querycache$"
        while quote in lines:  # in a text of the aggregate's own
            quote = f"$_{quote[1:]}"
        return [
            f"CREATE OR REPLACE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS {quote}\nBEGIN\n{lines}\n"
            f"  RETURN NULL;\nEND {quote}",
            f"CREATE TRIGGER {name} AFTER {event} ON {on} FOR EACH {each}{when} EXECUTE FUNCTION {function}()",
        ]
    name = ddl.beside(table, name)
    if ddl.dialect.name == "sqlite":
        when = f" WHEN {condition}" if condition else ""
        return [f"CREATE TRIGGER {name} AFTER {event} ON {on} FOR EACH ROW{when}\nBEGIN\n{lines}\nEND"]
    if condition:
        lines = f"  IF {condition} THEN\n{lines}\n  END IF;"
    return [f"CREATE TRIGGER {name} AFTER {event} ON {on} FOR EACH ROW\nBEGIN\n{lines}\nEND"]
