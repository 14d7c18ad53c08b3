"""Mapper configuration: declarations become aggregates, aggregates become the plan of their MetaData.

Runs when SQLAlchemy has configured mappers. What is wrong is raised there, and again at every flush of that
MetaData until it is put right, since SQLAlchemy itself asks only once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sqlalchemy import MetaData, Table
from sqlalchemy import inspect as sqlalchemy_inspect
from sqlalchemy.exc import InvalidRequestError, NoInspectionAvailable
from sqlalchemy.orm import (
    InstrumentedAttribute,
    MappedColumn,
    Mapper,
    RelationshipProperty,
    configure_mappers,
)

from querycache.denormalize import checks
from querycache.denormalize.aggregate import Aggregate
from querycache.denormalize.chain import Chain
from querycache.denormalize.checks_of_mappings import check_classes
from querycache.denormalize.declare import INFO_KEY, Declaration
from querycache.denormalize.plan import Plan
from querycache.errors import ConfigurationError
from querycache.sa_internals import mappers_of

__all__ = ["aggregates_of", "any_broken", "broken", "build", "maintain", "note", "on_plan", "raise_if_broken"]

_pending: weakref.WeakSet[Mapper[Any]] = weakref.WeakSet()
_broken: weakref.WeakKeyDictionary[MetaData, ConfigurationError] = weakref.WeakKeyDictionary()
_hooks: list[Callable[[Plan], None]] = []


def on_plan(hook: Callable[[Plan], None]) -> None:
    """Have `hook` called with each plan that is made."""
    _hooks.append(hook)


def any_broken() -> bool:
    return bool(_broken)


def raise_if_broken(entity: type[Any]) -> None:
    """Raise what was wrong with the aggregates of the entity's MetaData."""
    error = _broken.get(_metadata(_mapper(entity)))
    if error is not None:
        raise error


def broken(metadata: MetaData) -> ConfigurationError | None:
    """The error that keeps the aggregates of `metadata` from being kept, if there is one."""
    return _broken.get(metadata)


def note(mapper: Mapper[Any]) -> None:
    """Remember a mapper that has been configured, if it holds aggregates."""
    if any(_declarations(mapper)):
        _pending.add(mapper)


def build() -> None:
    """Make the plans of everything noted.

    Raises:
        ConfigurationError: for the first declaration that cannot work.
    """
    while _pending:
        mapper = next(iter(_pending))
        metadata = _metadata(mapper)
        # Mappers are noted one by one, the plan is made of all that share the tables.
        together = {held for held in _pending if _metadata(held) is metadata}
        together |= {
            held for held in mappers_of(mapper.registry) if held.configured and _metadata(held) is metadata
        }
        _pending.difference_update(together)
        try:
            plan = _plan(metadata, mapper, together)
        except ConfigurationError as error:
            _broken[metadata] = error
            raise
        _broken.pop(metadata, None)
        metadata.info[INFO_KEY] = plan
        for hook in _hooks:
            hook(plan)


def maintain(entity: type[Any], attribute: str, aggregate: MappedColumn[Any]) -> None:
    """Keep an existing mapped column as an aggregate, for classes that cannot declare it in their body: imperative
    mappings, reflected tables.

        maintain(Thread, "comment_count", count_of("comments"))

    Args:
        entity: the mapped class that holds the column.
        attribute: the name of the column attribute.
        aggregate: what `count_of(…)` or a sibling returns; its column options are not used.

    Raises:
        ConfigurationError: at once if the mappers are configured already, else when they are.
    """
    mapper = _mapper(entity)
    try:
        column = mapper.column_attrs[attribute].columns[0]
    except KeyError:
        raise ConfigurationError(
            f"{entity.__name__} has no column attribute {attribute!r}; it has"
            f" {', '.join(attr.key for attr in mapper.column_attrs)}"
        ) from None
    column.info[INFO_KEY] = aggregate.column.info[INFO_KEY]
    if mapper.configured:
        note(mapper)
        build()


def aggregates_of(
    target: MetaData | type[Any] | InstrumentedAttribute[Any] | Sequence[Any],
) -> list[Aggregate]:
    """The aggregates of a MetaData, of a declarative base, of an entity, or the one of an attribute (or several).

    Raises:
        ConfigurationError: if there is none.
    """
    configure_mappers()
    if isinstance(target, Sequence):
        return [aggregate for part in target for aggregate in aggregates_of(part)]
    found = list(_found(target))
    if not found:
        raise ConfigurationError(
            f"{target!r} has no aggregates: give a MetaData, a declarative base, a mapped class or an aggregate's"
            " attribute"
        )
    return found


def _found(target: Any) -> Iterable[Aggregate]:
    metadata = target if isinstance(target, MetaData) else getattr(target, "metadata", None)
    if isinstance(target, InstrumentedAttribute):
        metadata = _metadata(target.parent)
    if not isinstance(metadata, MetaData):
        return
    error = broken(metadata)
    if error is not None:
        raise error
    plan = metadata.info.get(INFO_KEY)
    if not isinstance(plan, Plan):
        return
    if isinstance(target, InstrumentedAttribute):
        yield from (
            held for held in plan.aggregates if held.key == target.key and target.parent.isa(held.chain.root)
        )
        return
    try:
        mapper = sqlalchemy_inspect(target)
    except NoInspectionAvailable:
        mapper = None
    if isinstance(mapper, Mapper):
        yield from (held for held in plan.aggregates if mapper.isa(held.chain.root))
    else:
        yield from plan.aggregates


def _mapper(entity: Any) -> Mapper[Any]:
    try:
        found = sqlalchemy_inspect(entity)
    except NoInspectionAvailable:
        found = None
    if not isinstance(found, Mapper):
        raise ConfigurationError(f"{entity!r} is not a mapped class")
    return found


def _metadata(mapper: Any) -> MetaData:
    table = mapper.local_table
    return table.metadata if isinstance(table, Table) else mapper.registry.metadata


def _declarations(mapper: Mapper[Any]) -> Iterable[tuple[str, Any, Declaration]]:
    for attribute in mapper.column_attrs:
        column = attribute.columns[0]
        declaration = getattr(column, "info", {}).get(INFO_KEY)
        # Subclasses inherit the attribute; the aggregate belongs to the class that brings it.
        inherited = mapper.inherits is not None and mapper.inherits.has_property(attribute.key)
        if isinstance(declaration, Declaration) and not (inherited and not mapper.concrete):
            yield attribute.key, column, declaration


def _plan(metadata: MetaData, mapper: Mapper[Any], mappers: Iterable[Mapper[Any]]) -> Plan:
    chains: dict[tuple[Any, ...], Chain] = {}
    aggregates: list[Aggregate] = []
    ordered = sorted(mappers, key=lambda held: (held.class_.__module__, held.class_.__qualname__))
    for root in ordered:
        for key, column, declaration in _declarations(root):
            name = f"{root.class_.__name__}.{key}"
            if not isinstance(column.table, Table):
                raise ConfigurationError(
                    f"{name}: an aggregate needs a column of a table, not of {column.table!r}"
                )
            steps = _steps(root, column, declaration, name)
            check_classes(root, steps, name)
            identity = (root, *steps)
            chain = chains.get(identity)
            if chain is None:
                chain = chains[identity] = Chain(root, steps, name)
            aggregates.append(Aggregate(declaration, chain, key, column, name))
    checks.check(aggregates)
    plan = Plan(metadata, aggregates, mappers_of(mapper.registry))
    checks.check_plan(plan)
    return plan


def _steps(
    root: Mapper[Any], column: Any, declaration: Declaration, name: str
) -> tuple[RelationshipProperty[Any], ...]:
    path: Any = declaration.path
    if callable(path) and not isinstance(path, InstrumentedAttribute):
        path = path()
    if isinstance(path, str):
        names: list[Any] = path.split(".")
    elif isinstance(path, InstrumentedAttribute):
        names = [path.key]
    elif isinstance(path, Sequence):
        names = [step if isinstance(step, str) else step.key for step in path]
    else:
        names = []
    if not names:
        raise ConfigurationError(f"{name}: {path!r} is not a path of relationships, as 'threads.comments' is")
    steps: list[RelationshipProperty[Any]] = []
    mapper = root
    for key in names:
        try:
            step = mapper.relationships[key]
        except (KeyError, InvalidRequestError):
            known = ", ".join(mapper.relationships.keys()) or "none"
            raise ConfigurationError(
                f"{name}: {mapper.class_.__name__} has no relationship {key!r}; it has: {known}"
                + ("" if steps else _way_out(root, column, key))
            ) from None
        steps.append(step)
        mapper = step.mapper
    if any(_metadata(step.mapper) is not _metadata(root) for step in steps):
        raise ConfigurationError(f"{name}: all tables of its path must belong to one MetaData")
    return tuple(steps)


def _way_out(root: Mapper[Any], column: Any, key: str) -> str:
    """What to do where another class is mapped to the same table, and has the relationship."""
    for other in mappers_of(root.registry):
        if column in set(other.columns) and key in other.relationships:
            return (
                f". {other.class_.__name__} too is mapped to {column.table.fullname}, and keeps the aggregate; leave the"
                f' column out of {root.class_.__name__}, by __mapper_args__ = {{"exclude_properties": ["{column.key}"]}}'
            )
    return ""
