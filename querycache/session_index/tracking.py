"""Learning that objects have changed.

No event maintains an index. An event only marks the object, and the next lookup reads the marked objects
again. So an event costs next to nothing, whatever the number of indexes; nothing depends on whether an
event comes before or after the change that it tells of; and index functions never run inside a flush or a
load.

Which event tells of what:

=========================================== ==========================================================
a load, a merge of a new row                ``load``
a reload, a bulk update, a deferred column  ``refresh``
expiry, commit, rollback                    ``expire``
a change by the application                 ``set``, ``remove``, ``append``, ``bulk_replace``
a change in place (Mutable)                 ``modified``
the lazy load of a collection               ``init_collection``
values made by a flush                      ``after_insert``, ``after_update``, ``refresh_flush``
``merge(load=False)``                       ``_sa_event_merge_wo_load``
entering and leaving the session            the lifecycle events of the session
=========================================== ==========================================================

The events of classes and attributes are listened for from the declaration of an index on. Those of a session
only from the first lookup in that session on: a session in which nothing is looked up has no listener.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, Final

from sqlalchemy import event
from sqlalchemy.orm import InstanceState, QueryableAttribute, RelationshipProperty, Session, UOWTransaction
from sqlalchemy.orm.attributes import instance_state

from querycache.session_index.contents import Marks, Record, alive, sweep
from querycache.session_index.reading import LoadGuard

__all__ = ["ClassTracker", "Listeners", "SessionWatch", "listen_to_attribute", "listen_to_class", "scan"]

State = InstanceState[Any]

# The one private name of SQLAlchemy here: the event by which its own Mutable extension learns of
# merge(load=False), which writes into an object's __dict__ without any other event. Read in 2.0.57 and 2.1.9.
_MERGED_WITHOUT_LOAD: Final = "_sa_event_merge_wo_load"

_INSTANCE_EVENTS: Final = ("refresh", "refresh_flush", "expire", _MERGED_WITHOUT_LOAD)
_COLUMN_EVENTS: Final = ("remove", "modified")
_RELATIONSHIP_EVENTS: Final = ("remove", "append", "bulk_replace", "init_collection")
_LIFECYCLE_EVENTS: Final = (
    "after_attach",
    "pending_to_persistent",
    "pending_to_transient",
    "persistent_to_transient",
    "persistent_to_deleted",
    "persistent_to_detached",
    "deleted_to_persistent",
)


class Listeners:
    """Event listeners that are removed together; they do not keep a session alive."""

    def __init__(self) -> None:
        self._listeners: list[tuple[Callable[[], Any], str, Callable[..., Any]]] = []

    def add(self, target: Any, name: str, function: Callable[..., Any], **options: Any) -> None:
        """Register a listener with SQLAlchemy."""
        event.listen(target, name, function, **options)
        held = weakref.ref(target) if isinstance(target, Session) else lambda: target
        self._listeners.append((held, name, function))

    def remove(self) -> None:
        """Remove all of them."""
        while self._listeners:
            held, name, function = self._listeners.pop()
            target = held()
            if target is not None:
                event.remove(target, name, function)


def listen_to_class(
    listeners: Listeners, cls: type[Any], mark: Callable[[State], None], flushed: Callable[[State], None]
) -> None:
    """Call ``mark(state)`` for every event by which objects of a class change, other than a load, and
    ``flushed(state)`` when an object was written to the database."""

    def on_instance_event(state: State, *_: object) -> None:
        mark(state)

    def on_flushed(mapper: object, connection: object, state: State) -> None:
        flushed(state)

    for name in _INSTANCE_EVENTS:
        listeners.add(cls, name, on_instance_event, raw=True, propagate=True)
    for name in ("after_insert", "after_update"):
        listeners.add(cls, name, on_flushed, raw=True, propagate=True)


def listen_to_attribute(
    listeners: Listeners, attribute: QueryableAttribute[Any], mark: Callable[[State], None]
) -> None:
    """Call ``mark(state)`` for every event by which an attribute changes."""

    def on_set(state: State, value: Any, previous: object, initiator: object) -> Any:
        mark(state)
        return value

    def on_attribute_event(state: State, *_: object) -> None:
        mark(state)

    # retval and include_key spare each assignment the wrapper that SQLAlchemy puts around a listener without
    listeners.add(attribute, "set", on_set, raw=True, retval=True, include_key=True, propagate=True)
    related = isinstance(attribute.prop, RelationshipProperty)
    for name in _RELATIONSHIP_EVENTS if related else _COLUMN_EVENTS:
        listeners.add(attribute, name, on_attribute_event, raw=True, propagate=True)


class ClassTracker:
    """Knows which objects of a class have changed, in every session where they are looked up.

    :ivar records: what the indexes of the class hold, by the ``hash_key`` of the session.
    """

    def __init__(self, cls: type[Any], listeners: Listeners) -> None:
        self.cls = cls
        self.records: dict[int, Record] = {}
        self._marks: dict[int, Marks] = {}
        self._loaded: dict[int, Callable[[weakref.ref[Any]], None]] = {}
        self._listeners = listeners
        self._attributes: set[tuple[type[Any], str]] = set()
        self._mark = self._make_marker()
        listeners.add(cls, "load", self._make_load_listener(), raw=True, propagate=True)
        listen_to_class(listeners, cls, self._mark, self._flushed)

    def depend_on(self, attributes: Iterable[QueryableAttribute[Any]]) -> None:
        """Mark objects when one of these attributes changes."""
        for attribute in attributes:
            owner: type[Any] = attribute.parent.class_
            if all((base, attribute.key) not in self._attributes for base in owner.__mro__):
                self._attributes.add((owner, attribute.key))
                listen_to_attribute(self._listeners, attribute, self._mark)

    def start(self, session: Session, guard: LoadGuard) -> Record:
        """Keep marks for a session from now on."""
        record = self.records[session.hash_key] = Record(guard)
        self._marks[session.hash_key] = record.marks
        self._loaded[session.hash_key] = record.loaded.append
        return record

    def stop(self, session_key: int) -> None:
        """Forget a session."""
        self._marks.pop(session_key, None)
        self._loaded.pop(session_key, None)
        self.records.pop(session_key, None)

    def mark(self, state: State) -> None:
        """Read an object again before the next lookup in its session."""
        self._mark(state)

    def _flushed(self, state: State) -> None:
        record = self.records.get(state.session_id)  # type: ignore[arg-type]
        obj = state.obj()
        if record is not None and obj is not None:
            record.marks[id(state)] = record.flushing[id(state)] = weakref.ref(obj)

    def records_of(self, state: State) -> Iterable[Record]:
        """Where an object may be in use: in its session, or anywhere if it is in none."""
        if state.session_id is None:
            return list(self.records.values())
        record = self.records.get(state.session_id)
        return () if record is None else (record,)

    # These run for every assignment and every row, so they are closures over a dictionary.

    def _make_marker(self) -> Callable[[State], None]:
        marks_of, reference = self._marks, weakref.ref

        def mark(state: State) -> None:
            marks = marks_of.get(state.session_id)  # type: ignore[arg-type]
            if marks is not None:
                obj = state.obj()
                if obj is not None:
                    marks[id(state)] = reference(obj)

        return mark

    def _make_load_listener(self) -> Callable[[State, object], None]:
        append_of = self._loaded

        def on_load(state: State, context: object) -> None:
            append = append_of.get(state.session_id)  # type: ignore[arg-type]
            if append is not None:
                append(state.obj)

        return on_load


class SessionWatch:
    """Listens to one session for what happens to its objects there.

    :ivar guard: what keeps the session from emitting SQL while an index reads.
    """

    def __init__(self, session: Session) -> None:
        self.guard = LoadGuard()
        self._session = weakref.ref(session)
        self._records: dict[ClassTracker, Record] = {}
        self._by_class: dict[type[Any], list[Record]] = {}
        for name in _LIFECYCLE_EVENTS:
            event.listen(session, name, self._moved, raw=True)
        event.listen(session, "after_flush_postexec", self._flushed)
        event.listen(session, "do_orm_execute", self.guard.refuse, insert=True)

    def stop(self) -> None:
        """Remove the listeners."""
        session = self._session()
        if session is not None:
            for name in _LIFECYCLE_EVENTS:
                event.remove(session, name, self._moved)
            event.remove(session, "after_flush_postexec", self._flushed)
            event.remove(session, "do_orm_execute", self.guard.refuse)

    def record(self, session: Session, tracker: ClassTracker) -> Record:
        """What the indexes of a class hold of the session, from now on."""
        record = self._records.get(tracker)
        if record is None:
            record = self._records[tracker] = tracker.start(session, self.guard)
            self._by_class.clear()
        return record

    def _moved(self, session: Session, state: State) -> None:
        cls = state.class_
        records = self._by_class.get(cls)
        if records is None:
            records = [record for tracker, record in self._records.items() if issubclass(cls, tracker.cls)]
            self._by_class[cls] = records
        obj = state.obj()
        for record in records if obj is not None else ():
            record.marks[id(state)] = weakref.ref(obj)

    def _flushed(self, session: Session, flush_context: UOWTransaction) -> None:
        # only now are the objects persistent and unmodified, of which no event tells each of them
        for record in self._records.values():
            with record:
                for contents in record.views.values():
                    contents.stale.update(alive(contents.modified))
                    contents.modified.clear()
                    sweep(contents.stale, len(session.identity_map))
            record.marks.update(alive(record.flushing))
            record.flushing.clear()
            sweep(record.marks, len(session.identity_map))


def scan(session: Session, cls: type[Any]) -> Marks:
    """All objects of a class in a session."""
    marks: Marks = {}
    for obj in session:
        if isinstance(obj, cls):
            marks[id(instance_state(obj))] = weakref.ref(obj)
    return marks
