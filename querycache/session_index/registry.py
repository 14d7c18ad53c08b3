"""Declaring indexes, and following the sessions in which they are used."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from sqlalchemy import inspect as sa_inspect
from sqlalchemy.orm import (
    CompositeProperty,
    Mapper,
    QueryableAttribute,
    RelationshipProperty,
    Session,
    UOWTransaction,
)
from sqlalchemy.orm.attributes import instance_state

from querycache.errors import ConfigurationError
from querycache.session_index.contents import Record
from querycache.session_index.dependencies import Dependencies, columns_of, owner_of, resolve
from querycache.session_index.index import Index
from querycache.session_index.keys import KeySpec
from querycache.session_index.parts import ColumnPart, CompositePart, FunctionPart, Part, RelationshipPart
from querycache.session_index.results import Difference
from querycache.session_index.scope import Scope
from querycache.session_index.tracking import (
    ClassTracker,
    Listeners,
    SessionWatch,
    listen_to_attribute,
    listen_to_class,
)

__all__ = ["SessionIndex"]

T = TypeVar("T")
F = TypeVar("F", bound=Callable[[Any], Any])


class SessionIndex:
    """Indexes over the objects in sessions. See :mod:`querycache.session_index` for what they are.

    Declare them next to the mapped classes, before the application starts its threads. ``indexes.NAME`` is
    the index of that name; ``indexes[User, "NAME"]`` where indexes of several classes share one.
    """

    def __init__(self, target: Any = Session) -> None:
        """
        :param target: the sessions that the indexes are for: a Session class, a sessionmaker, a
            scoped_session, their asyncio counterparts, or one session. Two async_sessionmakers are told
            apart by their ``sync_session_class`` only.
        :raises ConfigurationError: if it is something else.
        """
        self._scope = Scope(target)
        self._indexes: dict[tuple[type[Any], str], Index[Any]] = {}
        self._all: list[Index[Any]] = []
        self._trackers: dict[type[Any], ClassTracker] = {}
        self._watches: dict[int, tuple[SessionWatch, weakref.finalize[Any, Any]]] = {}
        self._listeners = Listeners()
        self._detached = False

    def index(
        self,
        *attributes: Any,
        name: str | None = None,
        where: Callable[[Any], Any] | None = None,
        depends_on: Sequence[Any] | None = None,
        multi: bool = False,
        unique: bool = False,
        ordered: bool = False,
    ) -> Index[Any]:
        """Index objects by attributes: ``indexes.index(User.name)``.

        Several attributes make one key, a tuple. An index over a scalar relationship finds the children of a
        parent, one over a collection finds the owners of a member.

        :param attributes: column, composite or relationship attributes of one mapped class.
        :param name: the name under which the index is an attribute of this SessionIndex as well.
        :param where: a condition; objects for which it is false are left out.
        :param depends_on: the attributes that ``where`` reads; all of the class unless given.
        :param multi: whether the value of the attribute is an iterable of keys.
        :param unique: whether two objects with the same key are a conflict, raised before the flush. A key
            that is None, or a tuple with None in it, conflicts with nothing.
        :param ordered: whether to keep the keys in order, for ``range()``, ``first()`` and ``last()``.
        :returns: the index.
        :raises ConfigurationError: if the declaration does not work.
        """
        described = ", ".join(str(attribute) for attribute in attributes)
        if not attributes:
            raise ConfigurationError(
                "index(): give one or more attributes of a mapped class, such as User.name"
            )
        resolved = [resolve(described, attribute) for attribute in attributes]
        mapper = owner_of(resolved[0])
        for attribute in resolved:
            if owner_of(attribute).isa(mapper):
                mapper = owner_of(attribute)
            elif not mapper.isa(owner_of(attribute)):
                raise ConfigurationError(
                    f"index({described}): {attribute} is not an attribute of {mapper.class_.__name__}; "
                    "an index is for one class"
                )
        label = described if name is None else f"{mapper.class_.__name__}.{name}"
        parts = [_part(label, attribute) for attribute in resolved]
        return self._declare(mapper, name, label, parts, where, depends_on, multi, unique, ordered)

    def indexed(
        self,
        cls: type[Any],
        name: str,
        *,
        depends_on: Sequence[Any] | None = None,
        where: Callable[[Any], Any] | None = None,
        multi: bool = False,
        unique: bool = False,
        ordered: bool = False,
    ) -> Callable[[F], F]:
        """Index the objects of a class by what a function makes of each::

            @indexes.indexed(User, "user_by_lower_name", depends_on=[User.name])
            def lower_name(user):
                return user.name and user.name.lower()

        The function sees loaded state only, and must be pure: equal state, equal key.

        :param cls: a mapped class; its subclasses are included.
        :param name: the name of the index.
        :param depends_on: the attributes that the function and ``where`` read; all attributes of the class
            unless given. A function that reads other objects has to declare the relationships that lead to
            them and the attributes that it reads there.
        :param where: as in :meth:`index`, like the other parameters.
        :returns: a decorator that returns the function unchanged.
        :raises ConfigurationError: if the declaration does not work.
        """
        mapper = sa_inspect(cls, raiseerr=False)
        if not isinstance(mapper, Mapper):
            raise ConfigurationError(f"indexed({cls!r}, {name!r}): {cls!r} is not a mapped class")

        def decorate(function: F) -> F:
            label = f"{cls.__name__}.{name}"
            dependencies = Dependencies(label, mapper, depends_on)
            parts = [FunctionPart(label, function, dependencies.own)]
            self._declare(mapper, name, label, parts, where, depends_on, multi, unique, ordered)
            return function

        return decorate

    def __getattr__(self, name: str) -> Index[Any]:
        found = {
            cls: index
            for (cls, its_name), index in vars(self).get("_indexes", {}).items()
            if its_name == name
        }
        if len(found) == 1:
            return next(iter(found.values()))
        if not found:
            raise AttributeError(f"there is no session index {name!r}")
        raise AttributeError(
            f"the classes {', '.join(sorted(cls.__name__ for cls in found))} each have a session index "
            f'{name!r}; use indexes[Class, "{name}"]'
        )

    def __getitem__(self, class_and_name: tuple[type[Any], str]) -> Index[Any]:
        try:
            return self._indexes[class_and_name]
        except KeyError:
            raise KeyError(f"there is no session index {class_and_name!r}") from None

    def touch(self, obj: object) -> None:
        """Read the keys of an object again before the next lookup.

        Needed only after a change that SQLAlchemy does not tell of: ``set_committed_value``, a value written
        into ``__dict__``, a value changed in place whose type is not Mutable.
        """
        state = instance_state(obj)
        for tracker in self._trackers.values():
            if isinstance(obj, tracker.cls):
                tracker.mark(state)
        for index in self._all:
            index.related_changed(state)

    def verify(self, session: Any) -> list[Difference]:
        """Compare every index with a full scan of a session; see :meth:`Index.verify`."""
        return [difference for index in self._all for difference in index.verify(session)]

    def detach(self) -> None:
        """Remove every listener and forget every session. The indexes cannot be used any more."""
        self._detached = True
        self._listeners.remove()
        for session_key in list(self._watches):
            self._forget(session_key)

    def _declare(
        self,
        mapper: Mapper[Any],
        name: str | None,
        label: str,
        parts: Sequence[Part],
        where: Callable[[Any], Any] | None,
        depends_on: Sequence[Any] | None,
        multi: bool,
        unique: bool,
        ordered: bool,
    ) -> Index[Any]:
        self._check_usable()
        cls = mapper.class_
        if name is not None and (
            (cls, name) in self._indexes or name in dir(type(self)) or name in self.__dict__
        ):
            raise ConfigurationError(
                f"there is already a session index, or a method of SessionIndex, of the name {name!r} for "
                f"{cls.__name__}; give another name"
            )
        dependencies = Dependencies(label, mapper, depends_on)
        condition = None if where is None else FunctionPart(label, where, dependencies.own)
        spec = KeySpec(label, parts, condition, multi)
        tracker = self._trackers.get(cls)
        if tracker is None:
            tracker = self._trackers[cls] = ClassTracker(cls, self._listeners)
        index: Index[Any] = Index(
            mapper, tracker, self._start, spec, dependencies, unique=unique, ordered=ordered
        )
        if mapper.configured:
            index.configure()
        tracker.depend_on([*spec.attributes, *(dependencies.own or ())])
        if dependencies.linked:
            # by identity: == of attributes makes SQL
            for attribute in {id(a): a for a in dependencies.declared}.values():
                listen_to_attribute(self._listeners, attribute, index.related_changed)
            for owner in dict.fromkeys(attribute.parent.class_ for attribute in dependencies.declared):
                listen_to_class(self._listeners, owner, index.related_changed, index.related_changed)
        if unique:
            self._listeners.add(
                self._scope.event_target, "before_flush", self._make_unique_check(index, tracker)
            )
        if not self._all:
            self._listeners.add(Mapper, "after_configured", self._configure)
        if name is not None:
            self._indexes[cls, name] = index
        self._all.append(index)
        return index

    def _configure(self) -> None:
        for index in self._all:
            index.configure()

    def _make_unique_check(
        self, index: Index[Any], tracker: ClassTracker
    ) -> Callable[[Session, UOWTransaction, Any], None]:
        def before_flush(session: Session, flush_context: UOWTransaction, instances: Any) -> None:
            if self._scope.covers(session) and (
                session.hash_key in tracker.records
                or any(isinstance(obj, tracker.cls) for obj in (*session.new, *session.dirty))
            ):
                index.check_unique(session)

        return before_flush

    def _check_usable(self) -> None:
        if self._detached:
            raise ConfigurationError("this SessionIndex is detached; make a new one")
        if self._scope.event_target is None:
            raise ConfigurationError("the session of this SessionIndex is gone; make a new one")

    def _start(self, session: Session, tracker: ClassTracker) -> Record:
        self._check_usable()
        if not self._scope.covers(session):
            raise ConfigurationError(
                f"{session!r} is not one of the sessions of this SessionIndex, which is for {self._scope!r}"
            )
        key = session.hash_key
        if key not in self._watches:
            finalizer = weakref.finalize(session, self._forget, key)
            finalizer.atexit = False
            self._watches[key] = (SessionWatch(session), finalizer)
        return self._watches[key][0].record(session, tracker)

    def _forget(self, session_key: int) -> None:
        watch, finalizer = self._watches.pop(session_key)
        finalizer.detach()
        watch.stop()
        for tracker in self._trackers.values():
            tracker.stop(session_key)


def _part(label: str, attribute: QueryableAttribute[Any]) -> Part:
    if isinstance(attribute.prop, RelationshipProperty):
        return RelationshipPart(label, attribute)
    if isinstance(attribute.prop, CompositeProperty):
        return CompositePart(label, attribute.prop, columns_of(attribute))
    return ColumnPart(attribute)
