"""The parts that a key is made of.

A key has one part for each thing that an index is declared over: a column attribute, a composite attribute, a
relationship, or a function. A part reads its value from an object (through a
:class:`~querycache.session_index.reading.Reader`, so never with SQL) and turns a value that is looked up into
the form in which it is kept.

Keys never hold mapped objects, which may be unhashable and would be kept alive: an object in a key stands
there as its InstanceState. A many-to-one relationship has a second form: while ``comment.thread`` is not
loaded but its foreign key is, the comment is kept under the identity of the thread, and a lookup by the
thread looks under both forms. So loading the relationship, of which no event tells, changes nothing.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, cast

from sqlalchemy import BinaryExpression, BooleanClauseList, Column
from sqlalchemy.orm import (
    CompositeProperty,
    InstanceState,
    QueryableAttribute,
    RelationshipDirection,
    RelationshipProperty,
    Session,
)
from sqlalchemy.orm.attributes import instance_state
from sqlalchemy.orm.exc import UnmappedColumnError
from sqlalchemy.sql import operators

from querycache.errors import ConfigurationError
from querycache.session_index.errors import IndexFunctionError, InvalidKey, describe
from querycache.session_index.reading import PLAIN, UNKNOWN, Reader, is_expression

__all__ = ["ColumnPart", "CompositePart", "FunctionPart", "Part", "RelationshipPart", "canonical", "stored"]


def stored(value: Any, session: Session | None = None) -> Any:
    """The form in which a value is kept in a key.

    :param session: for a value that is looked up: an object of another session stands for this session's
        object of the same identity.
    """
    if type(value) in PLAIN:
        return value
    if isinstance(value, tuple):
        return tuple(stored(item, session) for item in value)
    try:
        state: InstanceState[Any] = instance_state(value)
    except AttributeError:
        return UNKNOWN if is_expression(value) else value
    return state if session is None else _local(state, session)


def _local(state: InstanceState[Any], session: Session) -> InstanceState[Any]:
    """This session's object for an object that may come from elsewhere."""
    if state.key is not None and state.session is not session:
        here = session.identity_map.get(state.key)
        if here is not None:
            return instance_state(here)
    return state


def canonical(key: Any) -> Any:
    """A form that is equal for all forms of one key; for comparing keys read at different times."""
    if isinstance(key, InstanceState):
        return key if key.key is None else _identity(key.key)
    return tuple(canonical(item) for item in key) if type(key) is tuple else key


def _identity(key: tuple[Any, ...]) -> tuple[Any, ...]:
    """The identity of an object as a key: without the token that only sharded sessions use, as a tuple with
    None in it counts as NULL."""
    return key[:2] if key[2] is None else key


class Part(ABC):
    """One component of a key.

    :ivar attributes: the attributes it is read from; a change of one of them can change the key.
    :ivar many: whether its value is a collection of keys.
    :ivar silent: whether an unknown value can become known without any event, by a lazy load.
    """

    attributes: tuple[QueryableAttribute[Any], ...] = ()
    many: bool = False
    silent: bool = False

    @abstractmethod
    def read(self, reader: Reader) -> Any:
        """The value for one object, or UNKNOWN."""

    def configure(self) -> None:  # noqa: B027 - most parts have nothing to find out
        """Find out what depends on the mapper configuration.

        :raises ConfigurationError: if an index cannot be made of it.
        """

    def load(self, obj: object) -> None:
        """Have SQLAlchemy load what the part reads."""
        for attribute in self.attributes:
            getattr(obj, attribute.key)

    def forms(self, session: Session, value: Any) -> tuple[Any, ...]:
        """The forms under which a looked up value may be kept."""
        if type(value) in PLAIN:
            return (value,)
        # the object of a key may have left the session, which has another of its identity since
        here, itself = stored(value, session), stored(value)
        return (here,) if here is itself or here == itself else (here, itself)

    def twins(self, session: Session, value: Any) -> tuple[Any, ...]:
        """The forms under which the value of a kept key may be kept."""
        return (value,)


class ColumnPart(Part):
    """A column attribute."""

    def __init__(self, attribute: QueryableAttribute[Any]) -> None:
        self.attributes = (attribute,)
        self._key = attribute.key

    def read(self, reader: Reader) -> Any:
        return reader.column(self._key)


class CompositePart(Part):
    """A composite attribute, kept as the tuple of its columns, as composite classes are seldom hashable."""

    def __init__(
        self,
        label: str,
        prop: CompositeProperty[Any],
        attributes: tuple[QueryableAttribute[Any], ...],
    ) -> None:
        self.attributes = attributes
        self._label = label
        self._class = prop.composite_class
        self._keys = [attribute.key for attribute in attributes]

    def read(self, reader: Reader) -> Any:
        values = tuple(stored(reader.column(key)) for key in self._keys)
        return UNKNOWN if any(value is UNKNOWN for value in values) else values

    def forms(self, session: Session, value: Any) -> tuple[Any, ...]:
        if value is None:
            return ((None,) * len(self._keys),)
        if isinstance(value, tuple) and len(value) == len(self._keys):
            return (tuple(value),)
        if hasattr(value, "__composite_values__"):
            return (tuple(value.__composite_values__()),)
        if isinstance(self._class, type) and isinstance(value, self._class):
            # as SQLAlchemy does it: the columns are the parameters of the class
            return (tuple(getattr(value, name) for name in inspect.signature(self._class).parameters),)
        raise InvalidKey(
            f"index {self._label} is looked up by a {getattr(self._class, '__name__', self._class)} or a "
            f"tuple of {len(self._keys)} values, not by {value!r}"
        )


class RelationshipPart(Part):
    """A relationship: the parent of an object, or the members of its collection."""

    def __init__(self, label: str, attribute: QueryableAttribute[Any]) -> None:
        self.attributes = (attribute,)
        self._label = label
        self._key = attribute.key
        self._property: RelationshipProperty[Any] = cast("RelationshipProperty[Any]", attribute.prop)
        self._foreign: list[str] = []

    def configure(self) -> None:
        prop = self._property
        if prop.lazy in ("dynamic", "write_only"):
            raise ConfigurationError(
                f"index {self._label}: {prop} is lazy={prop.lazy!r} and holds no objects in memory; index "
                "the other side of the relationship"
            )
        self.many = bool(prop.uselist)
        self._foreign = _foreign_key(prop)
        self.silent = not self.many and not self._foreign
        owner = self.attributes[0].parent.class_
        self.attributes = (self.attributes[0], *(getattr(owner, key) for key in self._foreign))

    def read(self, reader: Reader) -> Any:
        if self.many:
            return reader.collection(self._key)
        target = reader.scalar(self._key)
        if target is not None and target is not UNKNOWN:
            return target
        if not self._foreign:
            return target
        if target is None and not reader.rewinds and reader.changed(self._key):
            return None  # unset, though the foreign key shows it only after the flush
        values = [stored(reader.column(key)) for key in self._foreign]
        if any(value is UNKNOWN for value in values):
            return UNKNOWN
        if any(value is None for value in values):
            return None
        return _identity(
            self._property.mapper.identity_key_from_primary_key(tuple(values), reader.state.identity_token)
        )

    def forms(self, session: Session, value: Any) -> tuple[Any, ...]:
        if value is None:
            return (None,)
        mapper = self._property.mapper
        if not isinstance(value, mapper.class_):
            raise InvalidKey(
                f"index {self._label} is looked up by a {mapper.class_.__name__} object or None, "
                f"not by {value!r}"
            )
        state: InstanceState[Any] = instance_state(value)
        here = _local(state, session)
        forms = self.twins(session, here)
        return forms if here is state else (*forms, state)

    def twins(self, session: Session, value: Any) -> tuple[Any, ...]:
        if value is None or not self._foreign:
            return (value,)
        if isinstance(value, InstanceState):
            return (value,) if value.key is None else (value, _identity(value.key))
        here = session.identity_map.get(value if len(value) == 3 else (*value, None))
        return (value,) if here is None else (value, instance_state(here))


def _foreign_key(prop: RelationshipProperty[Any]) -> list[str]:
    """The attributes that alone tell the identity of the related object, in the order of its primary key.

    Empty where there are none: the relationship is not many-to-one, does not refer to the primary key, or has
    a condition beyond the foreign key.
    """
    join, pairs = prop.primaryjoin, prop.local_remote_pairs or []
    conditions = join.clauses if isinstance(join, BooleanClauseList) else [join]
    plain = all(
        isinstance(condition, BinaryExpression)
        and condition.operator is operators.eq
        and isinstance(condition.left, Column)
        and isinstance(condition.right, Column)
        for condition in conditions
    )
    if prop.direction is not RelationshipDirection.MANYTOONE or not plain or len(conditions) != len(pairs):
        return []
    try:
        keys = {
            prop.mapper.get_property_by_column(remote): prop.parent.get_property_by_column(local).key
            for local, remote in pairs
        }
        primary = [prop.mapper.get_property_by_column(column) for column in prop.mapper.primary_key]
    except UnmappedColumnError:
        return []
    return [keys[part] for part in primary] if keys.keys() == set(primary) else []


class FunctionPart(Part):
    """A function of the object, or the condition of a partial index.

    :ivar declared: whether it declares what it reads.
    """

    def __init__(
        self,
        label: str,
        function: Callable[[Any], Any],
        own: Sequence[QueryableAttribute[Any]] | None,
    ) -> None:
        """
        :param own: the attributes of the object itself that the function declares to read; None if it
            declares nothing.
        """
        self._label = label
        self._function = function
        self.declared = own is not None
        attributes = own or ()
        self._relationships = [a.key for a in attributes if isinstance(a.prop, RelationshipProperty)]
        self._columns = [a.key for a in attributes if a.key not in self._relationships]
        self.silent = own is None or bool(self._relationships)

    def read(self, reader: Reader) -> Any:
        values, state = reader.values, reader.state
        for key in self._columns:
            if key in state.expired_attributes and key not in values:
                return UNKNOWN
        for key in self._relationships if reader.persistent else ():
            if key not in values and key in state.manager:
                return UNKNOWN
        if reader.has_expression(self._columns if self.declared else None):
            return UNKNOWN
        try:
            return reader.call(self._function)
        except Exception as error:
            raise IndexFunctionError(
                f"index {self._label}: its function raised {error!r} for {describe(reader.obj)}; it must "
                "cope with every object that a session can hold"
            ) from error

    def load(self, obj: object) -> None:
        # what it declares is loaded with the dependencies of the index
        if not self.declared:
            self._function(obj)
