"""What is checked when mappers configure: every way in which a declaration could silently be wrong, or slow."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import Column, Table, make_url, types
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import Mapper

from querycache.denormalize.aggregate import Aggregate
from querycache.denormalize.attributes import changed_by_update, mapped_attributes
from querycache.denormalize.checks_of_expressions import check_expression, check_nested
from querycache.denormalize.checks_of_mappings import check_conflicts
from querycache.denormalize.declare import Expression
from querycache.denormalize.errors import DenormalizeWarning
from querycache.denormalize.expressions import attributes_read
from querycache.denormalize.kinds import LATEST, MAX, MIN
from querycache.denormalize.plan import Place, Plan, foreign_keys
from querycache.errors import ConfigurationError

__all__ = ["changed_by_keys", "check", "check_plan"]


def check(aggregates: Sequence[Aggregate]) -> None:
    """Check declarations one by one.

    Raises:
        ConfigurationError: for the first that cannot work; the message says why and what would.
    """
    for aggregate in aggregates:
        _check_column(aggregate)
        _check_joins(aggregate)
        measure = check_expression(aggregate, aggregate.declaration.measure, "the measure")
        check_expression(aggregate, aggregate.declaration.where, "where=")
        _check_order(aggregate)
        reason = aggregate.kind.misfit(aggregate.column.type, measure)
        if reason is not None:
            raise ConfigurationError(f"{aggregate.name}: {reason} (the column is {aggregate.column.type!r})")
        _check_extreme(aggregate)
        _check_collation(aggregate, measure)
        if aggregate.strategy in ("flush", "memory"):
            _check_python(aggregate)
        if aggregate.strategy == "trigger":
            _check_trigger(aggregate)
        _check_index(aggregate)
        _check_references(aggregate)


def check_plan(plan: Plan) -> None:
    """Check what only shows when all aggregates are known: two on one column, mixed strategies that would hide changes
    from one another."""
    seen: dict[Any, Aggregate] = {}
    for aggregate in plan.aggregates:
        other = seen.setdefault(aggregate.column, aggregate)
        if other is not aggregate:
            raise ConfigurationError(f"{aggregate.name} and {other.name} are the same column")
    check_conflicts(plan)
    for aggregate in plan.aggregates:
        _check_carried_along(aggregate, plan)
        if aggregate.strategy != "trigger":
            _check_association(aggregate, plan)
            _check_on_update(aggregate)
        if aggregate.strategy in ("flush", "memory"):
            _check_other_ways(aggregate, plan)


def _check_other_ways(aggregate: Aggregate, plan: Plan) -> None:
    """ "flush" and "memory" learn of a child's new parent from its foreign key, the relationship of the path, and those that
    lead back; another relationship writes the foreign key in the flush, too late for them."""
    chain = aggregate.chain
    place = Place(chain, 1)
    for step in plan.relationships():
        own = step.key == chain.relationships[0].key and step.parent.common_parent(chain.root)
        if not own and not step.viewonly and plan.writes_link(step, place):
            raise ConfigurationError(
                f"{aggregate.name}: {step.parent.class_.__name__}.{step.key} too writes the foreign key of"
                f" {chain.leaf.class_.__name__} that {chain.relationships[0]} joins by, unseen by"
                f" strategy {aggregate.strategy!r}; make it viewonly=True, or take strategy 'sql'"
            )


def _check_association(aggregate: Aggregate, plan: Plan) -> None:
    """Objects of a class that is mapped to the secondary table change its rows too, and are no rows of the path."""
    for step, link in zip(aggregate.chain.relationships, aggregate.chain.links, strict=True):
        for mapper in plan.mapped_to(link.secondary) if link.secondary is not None else ():
            raise ConfigurationError(
                f"{aggregate.name}: {mapper.class_.__name__} is mapped to {link.secondary}, the secondary table of {step},"
                f" whose rows change unseen with its objects; aggregate over the objects of {mapper.class_.__name__}, by a"
                " one-to-many relationship to them, or take strategy 'trigger'"
            )


def _check_on_update(aggregate: Aggregate) -> None:
    for mapper, names, rule in changed_by_keys(aggregate):
        raise ConfigurationError(
            f"{aggregate.name}: {mapper.class_.__name__}.{', '.join(sorted(names))} changes by {rule}, unseen; refer to a"
            " key that does not change, read other columns (a Python expression says by columns= which), or take strategy"
            " 'trigger'"
        )


def changed_by_keys(aggregate: Aggregate) -> Iterator[tuple[Mapper[Any], set[str], str]]:
    """The attributes on the path that the database changes when a row elsewhere takes another key, and by which rule; but for
    the path's own foreign keys that follow their parent."""
    chain = aggregate.chain
    for level, read in enumerate(aggregate.reads()):
        mapper, link = chain.mappers[level], chain.links[level - 1].attributes
        for constraint in foreign_keys(mapper) if level else ():
            rule = (constraint.onupdate or "").upper()
            held = mapped_attributes(mapper, [(c.table.fullname, c.name) for c in constraint.columns])
            own = held == set(link)
            harmful = ("SET NULL", "SET DEFAULT") if own else ("CASCADE", "SET NULL", "SET DEFAULT")
            if rule in harmful and (own or held & read):
                yield mapper, held, f"ON UPDATE {rule} of {constraint.referred_table.name}"


def _check_carried_along(aggregate: Aggregate, plan: Plan) -> None:
    """A column that is changed with every UPDATE of its row is so by that of an aggregate in the same row."""
    for level, names in enumerate(_named(aggregate)):
        mapper = aggregate.chain.mappers[level]
        for name in sorted(changed_by_update(mapper, names)) if level else ():
            column: Any = mapper.column_attrs[name].columns[0]
            for other in plan.columns.get(column.table, {}).values():
                if _carries_along(other, column, seen=aggregate.strategy == "trigger"):
                    raise ConfigurationError(
                        f"{aggregate.name} reads {mapper.class_.__name__}.{name}, which changes with every UPDATE of its row,"
                        f" so also when {other.name} is kept, outside the unit of work; read a column that only the"
                        " application sets"
                    )


def _carries_along(aggregate: Aggregate, column: Column[Any], *, seen: bool) -> bool:
    """Whether the UPDATE that keeps an aggregate changes another column of its row; `seen`: whoever reads that column sees
    what triggers write."""
    if column.computed is not None:
        computed = re.findall(r"\w+", str(column.computed.sqltext))
        return aggregate.column.name in computed
    if column.onupdate is not None:
        # A trigger cannot run Python.
        return aggregate.strategy != "trigger" or not (seen or column.onupdate.is_callable)
    return column.server_onupdate is not None


def _check_column(aggregate: Aggregate) -> None:
    column = aggregate.column
    if aggregate.kind.empty is not None and column.nullable:
        raise ConfigurationError(
            f"{aggregate.name}: {aggregate.kind.name} needs a column that is NOT NULL, with a default of"
            f" {aggregate.kind.empty!r}; NULL + 1 stays NULL"
        )
    if aggregate.kind.empty is None and not column.nullable:
        raise ConfigurationError(
            f"{aggregate.name}: {aggregate.kind.name} is NULL for a parent without children, so its column must be"
            " nullable"
        )
    if aggregate.kind.empty is not None and column.default is None and column.server_default is None:
        raise ConfigurationError(f"{aggregate.name}: its column needs a default of {aggregate.kind.empty!r}")
    root = aggregate.chain.root
    if (
        root.version_id_col is not None
        and root.version_id_generator is False
        and aggregate.strategy not in ("flush", "memory")
    ):
        raise ConfigurationError(
            f"{aggregate.name}: the database gives {root.class_.__name__}.{root.version_id_col.key}, the version of the"
            " parent, a new value with each update of its row, also with those of the aggregate, of which the objects"
            " would know nothing; take strategy 'flush', which changes the row through the unit of work, or a"
            " version_id_col that SQLAlchemy counts"
        )
    if column.primary_key or column.foreign_keys:
        raise ConfigurationError(f"{aggregate.name}: a key cannot be an aggregate")


def _check_joins(aggregate: Aggregate) -> None:
    """A join condition may read the children and what is between, as where= may: a change of the parent is not looked at."""
    chain = aggregate.chain
    step = chain.relationships[0]
    joined = [
        (table.fullname, column.name)
        for column in step.local_columns
        if isinstance(table := column.table, Table)
    ]
    read = mapped_attributes(chain.root, joined) - set(chain.keys[0])
    if read:
        raise ConfigurationError(
            f"{aggregate.name}: {chain.root.class_.__name__}.{step.key} joins by more of the parent than its primary key,"
            f" {', '.join(sorted(read))}, whose changes are not followed; take a relationship that joins by the key alone,"
            " with where= over the children"
        )


def _check_order(aggregate: Aggregate) -> None:
    order = aggregate.declaration.order_by
    if order is not None and order in aggregate.chain.leaf.column_attrs:
        check_nested(aggregate, aggregate.chain.leaf, [order], "order_by=")
    if order is not None and order not in aggregate.chain.leaf_columns:
        raise ConfigurationError(
            f"{aggregate.name}: order_by={order!r} is not a column attribute of {aggregate.chain.leaf.class_.__name__};"
            f" it has {', '.join(aggregate.chain.leaf_columns)}"
        )


def _check_extreme(aggregate: Aggregate) -> None:
    """Not every database has the least and the greatest of every type, and not every one orders as Python does."""
    chain, kind = aggregate.chain, aggregate.kind
    if kind not in (MIN, MAX, LATEST):
        return
    _check_json(aggregate)
    type_ = _stored(aggregate.compared)
    if kind is not LATEST and isinstance(type_, (types.Boolean, types.Uuid, types.LargeBinary)):
        raise ConfigurationError(
            f"{aggregate.name}: PostgreSQL has no {kind.name.removesuffix('_of')}() of {type_!r}; take"
            + (" exists_of(…, where=…)" if isinstance(type_, types.Boolean) else " latest_of(…, order_by=…)")
        )
    if aggregate.strategy != "flush":
        return
    ordered = {"its values": type_}
    if kind is LATEST:
        names = dict.fromkeys([aggregate.declaration.order_by or "", *chain.keys[-1]])
        ordered = {
            f"{chain.leaf.class_.__name__}.{name}": _stored(chain.leaf.columns[name].type) for name in names
        }
    for what, type_ in ordered.items():
        if not isinstance(type_, _ORDERED_AS_IN_PYTHON):
            raise ConfigurationError(
                f"{aggregate.name}: strategy 'flush' compares {what} in Python, which does not order {type_!r} as every"
                " database does; take strategy 'sql'"
            )


def _check_json(aggregate: Aggregate) -> None:
    """PostgreSQL neither compares values of its type JSON nor groups by them, as the recount of a parent does."""
    type_ = _stored(aggregate.column.type)
    if not isinstance(type_, types.JSON):
        return
    if aggregate.kind is not LATEST:
        raise ConfigurationError(
            f"{aggregate.name}: databases have no {aggregate.kind.name.removesuffix('_of')}() of {type_!r}; take"
            " latest_of(…, order_by=…)"
        )
    if not isinstance(
        _stored(type_.dialect_impl(make_url("postgresql://").get_dialect()())), postgresql.JSONB
    ):
        raise ConfigurationError(
            f"{aggregate.name}: PostgreSQL cannot group by a column of type {type_!r}, as a recount does; give it"
            ' JSON().with_variant(JSONB(), "postgresql")'
        )


def _check_collation(aggregate: Aggregate, measure: types.TypeEngine[Any] | None) -> None:
    """A new value is compared with the column's, by the column's collation; the recount orders by that of the measure."""
    if aggregate.kind not in (MIN, MAX) or aggregate.strategy != "sql" or measure is None:
        return
    ours, theirs = (getattr(each, "collation", None) for each in (aggregate.column.type, measure))
    if ours != theirs and not isinstance(measure, types.NullType):
        raise ConfigurationError(
            f"{aggregate.name}: its values have the collation {theirs or 'of the database'}, and the column has"
            f" {ours or 'that of the database'}, by which another may be the extreme; give it the same, by type_= with"
            f" collation={theirs!r}, or take strategy 'recount' or 'trigger'"
        )


def _stored(type_: types.TypeEngine[Any]) -> types.TypeEngine[Any]:
    return type_.impl_instance if isinstance(type_, types.TypeDecorator) else type_


_ORDERED_AS_IN_PYTHON = (
    types.Integer,
    types.Numeric,
    types.Float,
    types.Date,
    types.DateTime,
    types.Time,
    types.Interval,
    types.Uuid,
)


def _check_python(aggregate: Aggregate) -> None:
    """ "flush" and "memory" evaluate in Python, one step down, and cannot see what the database does by itself."""
    chain, strategy = aggregate.chain, aggregate.strategy
    for given, role in (
        (aggregate.declaration.measure, "the measure"),
        (aggregate.declaration.where, "where="),
    ):
        if given is not None and given.python is None:
            raise ConfigurationError(
                f"{aggregate.name}: strategy {strategy!r} computes in Python, and {role} is SQL only; give"
                " python(…) or expression(sql=…, python=…), or take strategy 'sql'"
            )
    late = changed_by_update(chain.leaf, _named(aggregate)[-1])
    if late:
        raise ConfigurationError(
            f"{aggregate.name}: {chain.leaf.class_.__name__}.{min(late)} is changed by the UPDATE itself (onupdate=, a"
            f" generated column, the version), too late for strategy {strategy!r}; take strategy 'sql', 'recount' or"
            " 'trigger'"
        )
    for name in sorted(_named(aggregate)[-1]):
        type_ = chain.leaf.column_attrs[name].columns[0].type
        if (
            isinstance(type_, types.TypeDecorator)
            and type(type_).process_bind_param is not types.TypeDecorator.process_bind_param
        ):
            warnings.warn(
                f"{aggregate.name}: strategy {strategy!r} counts {chain.leaf.class_.__name__}.{name} as it is assigned, and"
                f" {type_!r} may make something else of it when it is written; assign what will be read again, or take"
                " strategy 'sql'",
                DenormalizeWarning,
                stacklevel=2,
            )
    if chain.depth != 1 or chain.links[0].secondary is not None:
        raise ConfigurationError(
            f"{aggregate.name}: strategy {strategy!r} follows one one-to-many relationship; take strategy 'sql' for"
            " longer paths and secondary tables"
        )
    if strategy == "memory" and not aggregate.kind.additive:
        raise ConfigurationError(
            f"{aggregate.name}: strategy 'memory' sees only objects in memory, and {aggregate.kind.name} needs all"
            " children; take strategy 'sql'"
        )
    step = chain.relationships[0]
    if step.passive_deletes == "all":
        raise ConfigurationError(
            f"{aggregate.name}: passive_deletes='all' on {step.key} hides children from strategy {strategy!r}"
        )
    for table in chain.leaf.tables:
        if not isinstance(table, Table):
            continue
        for constraint in table.foreign_key_constraints:
            hides = (constraint.ondelete or "").upper() in ("CASCADE", "SET NULL", "SET DEFAULT")
            own = constraint.referred_table in (*chain.root.tables, *chain.leaf.tables)
            if hides and (not own or (constraint.ondelete or "").upper() == "SET DEFAULT"):
                raise ConfigurationError(
                    f"{aggregate.name}: {table.name} rows change by ON DELETE {constraint.ondelete} of"
                    f" {constraint.referred_table.name}, which strategy {strategy!r} cannot see; take strategy"
                    " 'sql', 'recount' or 'trigger'"
                )


def _named(aggregate: Aggregate) -> list[set[str]]:
    """For each level the attributes that the aggregate is known to read: a Python expression need not name its own."""
    read: list[set[str]] = [set() for _ in aggregate.chain.mappers]
    for given in (aggregate.declaration.measure, aggregate.declaration.where):
        if given is not None:
            for level, names in enumerate(attributes_read(Expression(sql=given.sql), aggregate.chain)[0]):
                read[level] |= names
            read[-1] |= set(given.columns or ())
    if aggregate.declaration.order_by is not None:
        read[-1].add(aggregate.declaration.order_by)
    return read


def _check_trigger(aggregate: Aggregate) -> None:
    if aggregate.in_python:
        raise ConfigurationError(
            f"{aggregate.name}: a trigger cannot run Python; give the expression in SQL, or take strategy 'sql'"
        )
    for mapper in aggregate.chain.mappers[1:]:
        if len([table for table in mapper.tables if isinstance(table, Table)]) != 1:
            raise ConfigurationError(
                f"{aggregate.name}: strategy 'trigger' needs {mapper.class_.__name__} in one table, not in"
                f" {', '.join(str(table) for table in mapper.tables)}; take strategy 'sql'"
            )


def _check_index(aggregate: Aggregate) -> None:
    """A lost extreme is looked for among all children of the parent: that wants an index."""
    chain = aggregate.chain
    if aggregate.kind not in (MIN, MAX, LATEST) or chain.depth != 1 or not chain.links[0].attributes:
        return
    link = [chain.leaf.column_attrs[name].columns[0].name for name in chain.links[0].attributes]
    wanted = aggregate.declaration.order_by
    if wanted is None:
        read = (
            attributes_read(aggregate.declaration.measure, chain)[0][-1] if not aggregate.in_python else set()
        )
        if len(read) != 1:
            return
        (wanted,) = read
    sought = [*link, chain.leaf.column_attrs[wanted].columns[0].name]
    for table in chain.leaf.tables:
        if not isinstance(table, Table):
            continue
        indexes = [[column.name for column in index.columns] for index in table.indexes]
        indexes.append([column.name for column in table.primary_key.columns])
        if any(index[: len(sought)] == sought for index in indexes):
            return
    warnings.warn(
        f"{aggregate.name}: without an index on {chain.leaf.local_table.description} ({', '.join(sought)}), each"
        f" {aggregate.kind.name.removesuffix('_of')} that goes away reads all children of its parent, and on MariaDB and"
        " MySQL locks them too, unless at READ COMMITTED: writers of one parent then meet deadlocks",
        DenormalizeWarning,
        stacklevel=2,
    )


def _check_references(aggregate: Aggregate) -> None:
    """A child without a foreign key may be there before its parent, of which its own flush then finds nothing to write."""
    for mapper, link in zip(aggregate.chain.mappers[1:], aggregate.chain.links, strict=True):
        held: list[Any] = [mapper.column_attrs[name].columns[0] for name in link.attributes] or list(
            link.upper
        )
        if not any(getattr(column, "foreign_keys", None) for column in held):
            warnings.warn(
                f"{aggregate.name}: {', '.join(map(str, held))} has no foreign key, so rows can be there before their"
                " parent, and are not counted when it comes; insert parents first, or run repair() then",
                DenormalizeWarning,
                stacklevel=3,
            )
