"""Reading objects without ever asking the database.

What an index may know is what the object already holds: a value in its ``__dict__``, or one that SQLAlchemy
gives without a statement (None for an attribute that was never set). Everything else is :data:`UNKNOWN`. The
same goes for the state as of the last flush, which SQLAlchemy keeps as the history of each attribute.

Plain attributes are read straight from the object's state. Functions of the application get the object
itself, while a :class:`LoadGuard` refuses every statement that the session would emit for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum
from operator import attrgetter
from typing import Any, Final, TypeAlias

from sqlalchemy import ClauseElement
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import (
    InstanceState,
    ORMExecuteState,
    PassiveFlag,
    RelationshipDirection,
    Session,
    make_transient_to_detached,
)
from sqlalchemy.orm.attributes import get_history, instance_dict, instance_state, set_committed_value
from sqlalchemy.orm.collections import collection_adapter
from sqlalchemy.orm.exc import DetachedInstanceError

__all__ = ["PLAIN", "UNKNOWN", "LoadGuard", "Reader", "Unknown", "is_expression"]


class Unknown(Enum):
    """The type of :data:`UNKNOWN`."""

    UNKNOWN = "unknown"


UNKNOWN: Final = Unknown.UNKNOWN

State: TypeAlias = InstanceState[Any]

#: Values of these types are neither mapped objects nor SQL expressions; most values are of one of them.
PLAIN: Final = frozenset({str, int, bool, float, bytes, type(None)})


def is_expression(value: Any) -> bool:
    """Whether a value was given as SQL, to be worked out by the next flush: ``user.age = User.age + 1``."""
    return type(value) not in PLAIN and (
        isinstance(value, ClauseElement) or hasattr(value, "__clause_element__")
    )


class NotLoaded(InvalidRequestError):
    """Raised into SQLAlchemy's loaders in place of the statement that they were about to emit."""


class LoadGuard:
    """Keeps one session from emitting statements while an index reads its objects."""

    def __init__(self) -> None:
        self._depth = 0
        self._refused = False

    def refuse(self, execute_state: ORMExecuteState) -> None:
        """Listener for ``do_orm_execute``."""
        if self._depth:
            self._refused = True
            raise NotLoaded("an index function may only read what is loaded")

    def run(self, session: Session, function: Callable[[Any], Any], obj: object) -> Any:
        """What ``function(obj)`` returns, or UNKNOWN if that takes a statement or an attribute that cannot
        be loaded (raiseload, detached).

        The function cannot hide a refused statement by catching it. Other exceptions pass through.
        """
        outer, self._refused = self._refused, False
        autoflush, session.autoflush = session.autoflush, False
        self._depth += 1
        try:
            value = function(obj)
            return UNKNOWN if self._refused else value
        except Exception as error:
            if self._refused or isinstance(error, (InvalidRequestError, DetachedInstanceError)):
                return UNKNOWN
            raise
        finally:
            self._depth -= 1
            self._refused = outer
            session.autoflush = autoflush


class Reader:
    """Reads one object of one session, as it is now or as of the last flush.

    One reader serves one object: what it has worked out is shared by the parts of a key.
    """

    __slots__ = (
        "_guard",
        "_rewound",
        "obj",
        "persisted",
        "persistent",
        "rewinds",
        "session",
        "state",
        "values",
    )

    def __init__(self, session: Session, guard: LoadGuard, obj: object, persisted: bool) -> None:
        """
        :param persisted: whether to read the state as of the last flush.
        """
        self.session = session
        self.obj = obj
        self.state: State = instance_state(obj)
        self.values: dict[str, Any] = instance_dict(obj)
        self.persisted = persisted
        self.persistent = self.state.key is not None
        #: whether what was flushed last may differ from what the object holds
        self.rewinds = persisted and self.state.modified
        self._guard = guard
        self._rewound: object | None = None

    def column(self, key: str) -> Any:
        """The value of a column attribute."""
        if self.rewinds:
            flushed = self._flushed(key)
            if flushed:
                return flushed[0]
            if key in self.values or key in self.state.committed_state:
                return UNKNOWN
        elif key in self.values:
            return self.values[key]
        if key in self.state.expired_attributes:
            return UNKNOWN
        return self._guard.run(self.session, attrgetter(key), self.obj)

    def changed(self, key: str) -> bool:
        """Whether an attribute has a change that is not flushed."""
        return (
            bool(self.state.modified)
            and get_history(self.obj, key, PassiveFlag.PASSIVE_NO_INITIALIZE).has_changes()
        )

    def scalar(self, key: str) -> Any:
        """The object of a scalar relationship as far as it is loaded."""
        if self.rewinds and self._refers_anew(key):
            return UNKNOWN
        if self.rewinds and self.changed(key):
            flushed = self._flushed(key)
            return flushed[0] if flushed else UNKNOWN
        if key in self.values:
            return self.values[key]
        return UNKNOWN if self.persistent else None

    def _refers_anew(self, key: str) -> bool:
        """Whether a foreign key was changed since the last flush: what a many-to-one relationship has loaded
        may be what the new one refers to."""
        mapper = self.state.mapper
        relationship = mapper.relationships[key]
        if relationship.direction is not RelationshipDirection.MANYTOONE:
            return False
        local = [
            prop.key for prop in mapper.column_attrs if relationship.local_columns.intersection(prop.columns)
        ]
        return any(each in self.state.committed_state for each in local)

    def collection(self, key: str) -> Any:
        """The objects of a collection, or UNKNOWN if it is not loaded."""
        if self.rewinds and self.changed(key):
            return self._flushed(key)
        if key in self.values:
            return list(collection_adapter(self.values[key]))
        return UNKNOWN if self.persistent else ()

    def has_expression(self, keys: Iterable[str] | None) -> bool:
        """Whether one of some attributes, or any, was given as SQL that is not flushed yet."""
        if self.rewinds or not (self.state.modified or not self.persistent):
            return False
        values = self.values.values() if keys is None else [self.values.get(key) for key in keys]
        return any(is_expression(value) for value in values)

    def call(self, function: Callable[[Any], Any]) -> Any:
        """What a function of the application makes of the object."""
        if len(self.values) == 1 and (self.persistent or self.state.expired_attributes):
            return UNKNOWN  # nothing but the instance state is left: spares the loaders an attempt
        return self._guard.run(self.session, function, self._as_flushed() if self.rewinds else self.obj)

    def _flushed(self, key: str) -> list[Any]:
        """The values of an attribute as of the last flush, as far as they are known."""
        history = get_history(self.obj, key, PassiveFlag.PASSIVE_NO_INITIALIZE)
        return [*(history.unchanged or ()), *(history.deleted or ())]

    def _as_flushed(self) -> object:
        """A detached copy of the object that holds what was flushed, and raises for what is not known."""
        if self._rewound is None:
            mapper = self.state.mapper
            copy = mapper.class_manager.new_instance()
            values = instance_dict(copy)
            for key, value in self.values.items():
                if key not in self.state.manager:
                    values.setdefault(key, value)
            for column in mapper.column_attrs:
                if (value := self.column(column.key)) is not UNKNOWN:
                    set_committed_value(copy, column.key, value)
            for relationship in mapper.relationships:
                read = self.collection if relationship.uselist else self.scalar
                if (value := read(relationship.key)) is not UNKNOWN:
                    set_committed_value(copy, relationship.key, value)
            make_transient_to_detached(copy)
            self._rewound = copy
        return self._rewound
