"""A chain: the tables from a parent row down to the children that it aggregates.

A chain is a join, `parent ⋈ step ⋈ … ⋈ child`, and an aggregate is a function of its rows grouped by the parent.
Level 0 is the parent, level k the child; a change of the row of a level above 0 (or of a row of a secondary table,
which counts as a change of the child side) changes exactly those joined rows that it is part of. So the joined rows
that contain a changed row, looked at before the change and after it, are all that is needed to bring the aggregate
forward: the *images* (`images.py`). The same join, outer and restricted to some parents, is the recount.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sqlalchemy import ColumnElement, Select, Table
from sqlalchemy.orm import Mapper, RelationshipDirection, RelationshipProperty, aliased

from querycache.denormalize.attributes import changed_by_update, primary_keys
from querycache.denormalize.declare import INFO_KEY
from querycache.errors import ConfigurationError

__all__ = ["Chain", "Link"]


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
