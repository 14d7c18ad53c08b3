"""One index: its lookups, and the reading of keys that precedes them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Generic, Literal, TypeAlias, TypeVar

from sqlalchemy.orm import InstanceState, Mapper, Session
from sqlalchemy.orm.attributes import instance_dict, instance_state

from querycache.errors import ConfigurationError
from querycache.session_index.contents import Contents, Keys, Record, alive, has_none
from querycache.session_index.dependencies import Dependencies, all_attributes
from querycache.session_index.errors import (
    IndexFunctionError,
    InvalidKey,
    UniqueConflict,
    UnknownKeys,
    describe,
)
from querycache.session_index.keys import KeySpec
from querycache.session_index.loading import load_keys
from querycache.session_index.reading import UNKNOWN, Reader
from querycache.session_index.results import Difference, Matches, ObjectSet
from querycache.session_index.scope import sync_session
from querycache.session_index.tracking import ClassTracker, scan
from querycache.session_index.verification import compare

__all__ = ["Index", "UnknownPolicy"]

T = TypeVar("T")

#: What a lookup does about objects whose key is not loaded: leave them out, load them, or raise UnknownKeys.
UnknownPolicy: TypeAlias = Literal["skip", "load", "raise"]

State = InstanceState[Any]


class Index(Generic[T]):
    """An index over the objects of one class; made by :class:`SessionIndex`.

    Every lookup takes the session to look into: a Session, an AsyncSession or a scoped_session.

    :ivar name: the class and the name it was declared with, as in error messages.
    """

    def __init__(
        self,
        mapper: Mapper[Any],
        tracker: ClassTracker,
        start: Callable[[Session, ClassTracker], Record],
        spec: KeySpec,
        dependencies: Dependencies,
        *,
        unique: bool,
        ordered: bool,
    ) -> None:
        """
        :param start: starts to follow a session; raises ConfigurationError if the index is not for it.
        """
        self.name = spec.label
        self.unique = unique
        self.ordered = ordered
        self._mapper = mapper
        self._tracker = tracker
        self._start = start
        self._spec = spec
        self._dependencies = dependencies

    def __repr__(self) -> str:
        return f"<Index {self.name}>"

    # Lookups

    def __call__(
        self, session: Any, value: Any, *, unknown: UnknownPolicy = "skip", persisted: bool = False
    ) -> ObjectSet[T]:
        """The objects with a key, pending or persistent in a session. Emits no SQL unless asked to.

        :param session: the Session, AsyncSession or scoped_session to look into.
        :param value: the key: a value, a tuple of values for an index over several attributes, an object or
            None for a relationship.
        :param unknown: what to do about objects whose key is not loaded: ``"skip"`` leaves them out,
            ``"load"`` loads their keys without flushing, ``"raise"`` raises UnknownKeys.
        :param persisted: look into the state as of the last flush instead of the current one.
        :returns: a new set.
        :raises UnknownKeys: see ``unknown``.
        :raises InvalidKey: if no object can have that key, or an object has one that cannot be indexed.
        :raises IndexFunctionError: if the index function raised.
        :raises ConfigurationError: if the index is not for that session.
        """
        session, record, contents = self._ready(session, persisted, unknown)
        return ObjectSet(self._find(session, record, contents, value))

    def lookup(self, session: Any, value: Any, *, persisted: bool = False) -> Matches[T]:
        """The objects with a key, and those whose key is not loaded.

        Parameters and errors are those of a call.
        """
        session, record, contents = self._ready(session, persisted)
        return Matches(
            ObjectSet(self._find(session, record, contents, value)),
            ObjectSet(record.objects([contents.unknown])),
        )

    def get(
        self, session: Any, value: Any, *, unknown: UnknownPolicy = "skip", persisted: bool = False
    ) -> T | None:
        """The object with a key in a unique index, or None.

        :raises UniqueConflict: if there is more than one at the moment.
        :raises ConfigurationError: if the index is not unique.
        """
        if not self.unique:
            raise ConfigurationError(
                f"index {self.name} is not unique: declare it with unique=True for get()"
            )
        found = list(self(session, value, unknown=unknown, persisted=persisted))
        if len(found) > 1:
            raise self._conflict(value, found)
        return found[0] if found else None

    def range(
        self,
        session: Any,
        low: Any = None,
        high: Any = None,
        *,
        inclusive: tuple[bool, bool] = (True, True),
        reverse: bool = False,
        unknown: UnknownPolicy = "skip",
        persisted: bool = False,
    ) -> list[T]:
        """The objects with a key between two values, in the order of their keys.

        Objects whose key is None are in no range. An object with many keys is there once, where the first of
        those that are in the range puts it.

        :param low: the lowest key; None for no limit.
        :param high: the highest key; None for no limit.
        :param inclusive: whether objects with exactly the lowest and the highest key belong to it.
        :param reverse: whether to begin with the highest key.
        :raises ConfigurationError: if the index is not ordered.
        :raises InvalidKey: if a limit cannot be compared with the keys.
        """
        self._check_ordered("range()")
        session, record, contents = self._ready(session, persisted, unknown)
        limits = [None if limit is None else self._spec.forms(session, limit)[0] for limit in (low, high)]
        try:
            with record:
                keys = list(contents.order.irange(*limits, inclusive=inclusive, reverse=reverse))
        except TypeError as error:
            raise InvalidKey(f"index {self.name}: range({low!r}, {high!r}): {error}") from error
        found: Iterator[T] = record.objects([contents.buckets.get(key, {}) for key in keys])
        return list(ObjectSet(found) if self._spec.many else found)

    def first(self, session: Any, *, unknown: UnknownPolicy = "skip", persisted: bool = False) -> T | None:
        """An object with the lowest key, or None if there is no object with a key.

        :raises ConfigurationError: if the index is not ordered.
        """
        return self._extreme("first()", session, unknown, persisted, reverse=False)

    def last(self, session: Any, *, unknown: UnknownPolicy = "skip", persisted: bool = False) -> T | None:
        """An object with the highest key, or None if there is no object with a key.

        :raises ConfigurationError: if the index is not ordered.
        """
        return self._extreme("last()", session, unknown, persisted, reverse=True)

    def verify(self, session: Any) -> list[Difference]:
        """Compare the index with a full scan of a session.

        It finds what no event tells of: values written with ``set_committed_value`` or into ``__dict__``, and
        an index function that reads more than the index declares.

        :returns: a difference for each object that lies elsewhere than it should.
        """
        session, record, _ = self._ready(session, False)
        differences = []
        for persisted in (False, True):
            if (self, persisted) in record.views:
                differences.extend(self._compare(session, persisted))
        return differences

    # Declaration and events

    def configure(self) -> None:
        """Find out what depends on the mapper configuration; called whenever mappers were configured.

        :raises ConfigurationError: if an index cannot be made of what was declared.
        """
        self._spec.configure(ordered=self.ordered)
        self._dependencies.configure()
        self._tracker.depend_on(self._spec.attributes)
        if self._spec.undeclared:
            self._tracker.depend_on(all_attributes(self._mapper))

    def related_changed(self, state: State) -> None:
        """An object that keys may be read from has changed."""
        for record in self._tracker.records_of(state):
            for persisted in (False, True):
                contents = record.views.get((self, persisted))
                if contents is not None and contents.dependents:
                    with record:
                        contents.stale.update(contents.dependents.get(id(state), {}))

    def check_unique(self, session: Session) -> None:
        """Raise if two objects have the same key and neither is to be deleted.

        :raises UniqueConflict: naming both.
        """
        session, record, contents = self._ready(session, False)
        deleted = session.deleted if contents.crowded else ()
        for key in list(contents.crowded):
            buckets = [contents.buckets.get(twin, {}) for twin in self._spec.twins(session, key)]
            found = list(ObjectSet(record.objects(buckets)))
            if len(found) < 2:
                contents.crowded.discard(key)
            remaining = [obj for obj in found if obj not in deleted]
            if len(remaining) > 1:
                raise self._conflict(key, remaining)

    # Bringing the index up to date

    def _ready(
        self, session: Any, persisted: bool, unknown: UnknownPolicy = "skip"
    ) -> tuple[Session, Record, Contents]:
        """What the index holds of a session, with every key read again that may have changed."""
        session = sync_session(session)
        record = self._tracker.records.get(session.hash_key)
        contents = None if record is None else record.views.get((self, persisted))
        if record is None or contents is None:
            record, contents = self._open(session, persisted)
        if persisted and record.flushing:
            contents.stale.update(alive(record.flushing))
        if record.marks or record.loaded or contents.stale or contents.footprints:
            self._settle(session, record, contents, persisted)
        if unknown != "skip":
            self._deal_with_unknown(session, record, contents, persisted, unknown)
        return session, record, contents

    def _open(self, session: Session, persisted: bool) -> tuple[Record, Contents]:
        if persisted and self._dependencies.linked:
            raise ConfigurationError(
                f"index {self.name} reads other objects, whose state as of the last flush is not kept; "
                "look it up without persisted=True"
            )
        self._mapper.registry.configure(cascade=True)
        self.configure()
        record = self._start(session, self._tracker)
        contents = Contents(ordered=self.ordered)
        contents.stale.update(scan(session, self._mapper.class_))
        with record:
            record.views[self, persisted] = contents
        return record, contents

    def _settle(self, session: Session, record: Record, contents: Contents, persisted: bool) -> None:
        if contents.settling:
            raise IndexFunctionError(f"index {self.name}: its function looks up this index itself")
        record.distribute(partial(scan, session, self._mapper.class_))
        self._recheck(contents)
        contents.settling = True
        try:
            for ident in list(contents.stale):
                mark = contents.stale.get(ident)
                obj = None if mark is None else mark()
                if mark is not None and obj is not None:
                    self._reindex(session, record, contents, persisted, ident, mark, obj)
                contents.stale.pop(ident, None)
        finally:
            contents.settling = False

    def _recheck(self, contents: Contents) -> None:
        """Mark what may have become known without an event."""
        for ident, footprint in list(contents.footprints.items()):
            entry = contents.unknown.get(ident)
            obj = None if entry is None else entry()
            if obj is not None and self._footprint(obj) != footprint:
                contents.stale[ident] = weakref.ref(obj)

    def _reindex(
        self,
        session: Session,
        record: Record,
        contents: Contents,
        persisted: bool,
        ident: int,
        mark: weakref.ref[Any],
        obj: object,
    ) -> None:
        keys: Keys | None = None
        related: list[object] = []
        reader = None
        if session.identity_map.contains_state(instance_state(obj)) or obj in session:
            reader = Reader(session, record.guard, obj, persisted)
            keys, related = self._read(reader)
        linked = self._dependencies.linked
        try:
            record.place(contents, ident, obj, keys, keep=linked)
        except TypeError as error:
            raise InvalidKey(
                f"index {self.name} is ordered, and the key of {describe(obj)} has no place among its keys: "
                f"{error}"
            ) from error
        if reader is not None and reader.rewinds:
            contents.modified[ident] = mark
        if linked:
            with record:
                contents.link(ident, mark, [id(instance_state(other)) for other in related])
        if keys is UNKNOWN and self._spec.silent:
            contents.footprints[ident] = self._footprint(obj)
        else:
            contents.footprints.pop(ident, None)
        if self.unique and keys:
            self._note_crowd(session, contents, keys)

    def _read(self, reader: Reader) -> tuple[Keys, list[object]]:
        """The keys of an object, and the other objects that they were read from."""
        if reader.persisted and not reader.persistent:
            return (), []
        related, complete = (
            self._dependencies.related(reader.obj) if self._dependencies.linked else ([], True)
        )
        return (self._spec.read(reader) if complete else UNKNOWN), related

    def _footprint(self, obj: object) -> int:
        """How many values an object and those that its key is read from have loaded: a lazy load, of which no
        event may tell, adds one."""
        related = self._dependencies.related(obj)[0] if self._dependencies.linked else []
        return sum(len(instance_dict(each)) for each in (obj, *related))

    def _note_crowd(self, session: Session, contents: Contents, keys: Keys) -> None:
        for key in () if keys is UNKNOWN else keys:
            twins = self._spec.twins(session, key)
            if not has_none(key) and sum(len(contents.buckets.get(twin, ())) for twin in twins) > 1:
                contents.crowded.add(key)

    def _deal_with_unknown(
        self, session: Session, record: Record, contents: Contents, persisted: bool, unknown: UnknownPolicy
    ) -> None:
        if unknown not in ("load", "raise"):
            raise ConfigurationError(f'unknown={unknown!r}: it is one of "skip", "load" and "raise"')
        objects = list(record.objects([contents.unknown]))
        if objects and unknown == "load":
            gone = ObjectSet(load_keys(session, self._mapper, self._spec, self._dependencies, objects))
            for obj in objects:
                contents.stale[id(instance_state(obj))] = weakref.ref(obj)
            self._settle(session, record, contents, persisted)
            objects = [obj for obj in record.objects([contents.unknown]) if obj not in gone]
        if objects:
            raise UnknownKeys(
                f"index {self.name}: the keys of {len(objects)} objects are not loaded, "
                f'{describe(objects[0])} among them; load them first, or look up with unknown="load"',
                tuple(objects),
            )

    # Reading what is up to date

    def _find(self, session: Session, record: Record, contents: Contents, value: Any) -> Iterator[T]:
        keys = self._spec.forms(session, value)
        return record.objects([contents.buckets.get(key, {}) for key in keys])

    def _check_ordered(self, method: str) -> None:
        if not self.ordered:
            raise ConfigurationError(
                f"index {self.name} has no order: declare it with ordered=True for {method}"
            )

    def _extreme(
        self, method: str, session: Any, unknown: UnknownPolicy, persisted: bool, *, reverse: bool
    ) -> T | None:
        self._check_ordered(method)
        session, record, contents = self._ready(session, persisted, unknown)
        with record:
            for key in reversed(contents.order) if reverse else contents.order:
                for entry in contents.buckets[key].values():
                    obj: T | None = entry()
                    if obj is not None:
                        return obj
        return None

    def _compare(self, session: Session, persisted: bool) -> list[Difference]:
        _, record, contents = self._ready(session, persisted)

        def read(obj: Any) -> Keys:
            keys, _ = self._read(Reader(session, record.guard, obj, persisted))
            lies = contents.placed.get(id(instance_state(obj)))
            # whether such a function needs SQL depends on what other objects the session happens to hold
            return UNKNOWN if lies is UNKNOWN and self._spec.undeclared else keys

        objects = [obj for obj in session if isinstance(obj, self._mapper.class_)]
        return compare(self.name, record, contents, persisted, objects, read)

    def _conflict(self, key: Any, objects: list[Any]) -> UniqueConflict:
        named = " and ".join(describe(obj) for obj in objects)
        return UniqueConflict(
            f"index {self.name} is unique, and {named} have the key {key!r}: change or delete all but one",
            self.name,
            key,
            tuple(objects),
        )
