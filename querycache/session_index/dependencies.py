"""Which attributes an index depends on.

An index over attributes depends on those. An index with a function depends on what it declares, and on every
attribute of its class if it declares nothing. What it declares may lie on other objects, as in
``depends_on=[Comment.thread, Thread.title]``: then the objects that are reached over the declared
relationships count too, and the index remembers for each of them whose keys were read from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

from sqlalchemy.orm import (
    ColumnProperty,
    CompositeProperty,
    Mapper,
    NotExtension,
    QueryableAttribute,
    RelationshipProperty,
)
from sqlalchemy.orm.attributes import instance_dict, instance_state
from sqlalchemy.orm.collections import collection_adapter

from querycache.errors import ConfigurationError
from querycache.session_index.reading import is_expression

__all__ = ["Dependencies", "all_attributes", "columns_of", "owner_of", "resolve"]

Attribute = QueryableAttribute[Any]


def resolve(label: str, attribute: Any) -> Attribute:
    """The mapped attribute that an index was declared with; synonyms give what they stand for.

    :raises ConfigurationError: if it is not an attribute of a mapped class.
    """
    if (
        not isinstance(attribute, QueryableAttribute)
        or not isinstance(attribute.parent, Mapper)
        or attribute.parent.all_orm_descriptors[attribute.key].extension_type
        is not NotExtension.NOT_EXTENSION
    ):
        raise ConfigurationError(
            f"index {label}: {attribute!r} is not a mapped attribute; give column, composite or relationship "
            "attributes of a mapped class, such as User.name, or index a function"
        )
    prop = attribute.prop
    if not isinstance(prop, (ColumnProperty, CompositeProperty, RelationshipProperty)):
        raise ConfigurationError(f"index {label}: {attribute} is a {type(prop).__name__}; index a function")
    actual: Attribute = getattr(attribute.parent.class_, prop.key)
    return actual


def owner_of(attribute: Attribute) -> Mapper[Any]:
    """The mapper of the class that an attribute was taken from."""
    return cast("Mapper[Any]", attribute.parent)


def columns_of(attribute: Attribute) -> tuple[Attribute, ...]:
    """The attributes that hold the values: those of its columns for a composite attribute."""
    prop = attribute.prop
    if not isinstance(prop, CompositeProperty):
        return (attribute,)
    return tuple(getattr(attribute.parent.class_, part.key) for part in prop.props)


def all_attributes(mapper: Mapper[Any]) -> Iterator[Attribute]:
    """Every attribute that holds values of the mapper's objects, those of subclasses included."""
    for each in mapper.self_and_descendants:
        for prop in (*each.column_attrs, *each.relationships):
            yield getattr(each.class_, prop.key)


class Dependencies:
    """What the functions of an index declare to read.

    :ivar own: the attributes of the indexed objects themselves; None if nothing was declared.
    :ivar declared: all of them, those of other objects included.
    :ivar linked: whether keys may be read from other objects.
    """

    def __init__(self, label: str, mapper: Mapper[Any], declared: Sequence[Any] | None) -> None:
        """
        :raises ConfigurationError: if an attribute belongs to another class and no relationship leads there.
        """
        self._label = label
        self._mapper = mapper
        self.own: list[Attribute] | None = None
        self.declared: list[Attribute] = []
        self._relationships: list[Attribute] = []
        self._columns: list[str] = []
        self.linked = False
        if declared is None:
            return
        self.declared = [part for item in declared for part in columns_of(resolve(label, item))]
        self.own = [attribute for attribute in self.declared if _akin(owner_of(attribute), mapper)]
        self._relationships = [a for a in self.declared if isinstance(a.prop, RelationshipProperty)]
        self._columns = [a.key for a in self.declared if isinstance(a.prop, ColumnProperty)]
        self.linked = bool(self._relationships) and len(self.declared) > 1
        if not self._relationships:
            self._check_reached([mapper])

    def configure(self) -> None:
        """Check what depends on the mapper configuration.

        :raises ConfigurationError: if an attribute belongs to another class and no relationship leads there.
        """
        for attribute in self._relationships:
            if attribute.prop.lazy in ("dynamic", "write_only"):
                raise ConfigurationError(
                    f"index {self._label}: depends_on has {attribute}, which is "
                    f"lazy={attribute.prop.lazy!r} and holds no objects in memory"
                )
        reached = [self._mapper]
        for mapper in reached:
            for attribute in self._relationships:
                if _akin(owner_of(attribute), mapper) and attribute.prop.mapper not in reached:
                    reached.append(attribute.prop.mapper)
        self._check_reached(reached)

    def related(self, obj: object) -> tuple[list[object], bool]:
        """The loaded objects reached from one over the declared relationships.

        :returns: the objects, and whether that is all: every relationship on the way was loaded, and no value
            was given as SQL that is not flushed yet.
        """
        found: dict[int, object] = {id(obj): obj}
        complete = True
        queue = [obj]
        for each in queue:
            values = instance_dict(each)
            if each is not obj and any(is_expression(values.get(key)) for key in self._columns):
                complete = False
            for attribute in self._relationships:
                if not isinstance(each, attribute.parent.class_):
                    continue
                if attribute.key not in values:
                    complete = complete and instance_state(each).key is None
                    continue
                for other in _members(values[attribute.key], attribute.prop.uselist):
                    if id(other) not in found:
                        found[id(other)] = other
                        queue.append(other)
        del found[id(obj)]
        return list(found.values()), complete

    def load(self, obj: object) -> None:
        """Have SQLAlchemy load everything that was declared, for one object."""
        found = {id(obj)}
        queue = [obj]
        for each in queue:
            for attribute in self.declared:
                if not isinstance(each, attribute.parent.class_):
                    continue
                value = getattr(each, attribute.key)
                if isinstance(attribute.prop, RelationshipProperty):
                    for other in _members(value, attribute.prop.uselist):
                        if id(other) not in found:
                            found.add(id(other))
                            queue.append(other)

    def _check_reached(self, reached: Sequence[Mapper[Any]]) -> None:
        for attribute in self.declared:
            if not any(_akin(owner_of(attribute), mapper) for mapper in reached):
                raise ConfigurationError(
                    f"index {self._label}: depends_on has {attribute}, but no relationship to "
                    f"{attribute.parent.class_.__name__}; add the relationship that leads there"
                )


def _members(value: Any, many: bool | None) -> Iterable[Any]:
    if many:
        return list(collection_adapter(value))
    return () if value is None else (value,)


def _akin(one: Mapper[Any], other: Mapper[Any]) -> bool:
    return one.isa(other) or other.isa(one)
