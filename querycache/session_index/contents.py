"""What the indexes of one class hold of one session.

The objects of an index lie in buckets, one for each key, and a reverse map remembers where each object was
put: the key it has now may be another, so it could not be found again by that. Objects are held by weak
reference only. When one is collected its entry goes at once, and a bucket goes with its last entry.

An object is known by the id of its InstanceState, which lives exactly as long as the object; a mark left
behind by an object that is gone is overwritten when the id is given out again. That needs marks of their own:
the weak reference that the state has to its object can outlive the object and keep the state.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, Final, TypeAlias

from sortedcontainers import SortedList
from sqlalchemy.orm.attributes import instance_state

from querycache.session_index.reading import UNKNOWN, LoadGuard, Unknown

__all__ = ["Contents", "Entry", "Keys", "Marks", "Record", "alive", "has_none", "sweep"]

Keys: TypeAlias = "tuple[Hashable, ...] | Unknown"

#: Objects by the id of their state.
Marks: TypeAlias = "dict[int, weakref.ref[Any]]"


#: How many loads a record remembers between two lookups.
LOADED: Final = 32_768


#: Marks of objects that are gone which nobody minds.
SPARE: Final = 64


def alive(marks: Marks) -> Marks:
    """The marks of objects that are still there: others may bear the id of a newer object by now, whose mark
    they must not replace."""
    return {ident: mark for ident, mark in marks.items() if mark() is not None}


def sweep(marks: Marks, objects: int) -> None:
    """Drop the marks of objects that are gone, if they must be many: more than the session's objects by far."""
    if len(marks) > 2 * objects + SPARE:
        for ident in [ident for ident, mark in list(marks.items()) if mark() is None]:
            marks.pop(ident, None)


def has_none(key: Hashable) -> bool:
    """Whether a key is None or has it as a part: like NULL it has no order, and conflicts with nothing."""
    return key is None or (isinstance(key, tuple) and None in key)


class Entry(weakref.ref):  # type: ignore[type-arg]
    """A weak reference to an object that at least one index holds.

    :ivar ident: the id of the object's state.
    :ivar uses: how many indexes hold it.
    """

    __slots__ = ("ident", "uses")
    ident: int
    uses: int


class Contents:
    """The objects of one index in one session.

    :ivar stale: the objects whose key is to be read again before the next lookup.
    :ivar buckets: the objects with each key.
    :ivar placed: where each object lies: its keys, or UNKNOWN.
    :ivar unknown: the objects whose key is not loaded.
    :ivar order: the keys in order, without those that have None, in an ordered index.
    :ivar crowded: in a unique index, the keys that more than one object had when it was placed.
    :ivar footprints: for unknown objects that may become known without an event, how much was loaded when
        they were last read.
    :ivar modified: in a view as of the last flush, the objects that had changes since then when they were
        read.
    :ivar related: the ids of the other objects that the key of an object was read from.
    :ivar dependents: the same the other way round.
    :ivar settling: whether stale objects are being read at the moment.
    """

    __slots__ = (
        "buckets",
        "crowded",
        "dependents",
        "footprints",
        "modified",
        "order",
        "placed",
        "related",
        "settling",
        "stale",
        "unknown",
    )

    def __init__(self, *, ordered: bool) -> None:
        self.stale: Marks = {}
        self.buckets: dict[Hashable, dict[int, Entry]] = {}
        self.placed: dict[int, Keys] = {}
        self.unknown: dict[int, Entry] = {}
        self.order: Any = SortedList() if ordered else None
        self.crowded: set[Hashable] = set()
        self.footprints: dict[int, int] = {}
        self.modified: Marks = {}
        self.related: dict[int, tuple[int, ...]] = {}
        self.dependents: dict[int, Marks] = {}
        self.settling = False

    def put(self, entry: Entry, keys: Keys) -> None:
        """Place an object that is not placed.

        :raises TypeError: if a key cannot be ordered among the others; the object is then in no bucket.
        """
        ident = entry.ident
        self.placed[ident] = keys
        entry.uses += 1
        if keys is UNKNOWN:
            self.unknown[ident] = entry
            return
        for key in keys:
            bucket = self.buckets.get(key)
            if bucket is None:
                if self.order is not None and not has_none(key):
                    try:
                        if key != key or (isinstance(key, tuple) and any(part != part for part in key)):
                            raise TypeError("it is not equal to itself")
                        self.order.add(key)
                    except BaseException:
                        self.drop(entry)
                        raise
                bucket = self.buckets[key] = {}
            bucket[ident] = entry

    def drop(self, entry: Entry) -> None:
        """Take an object out, if it is in."""
        ident = entry.ident
        keys = self.placed.pop(ident, None)
        if keys is None:
            return
        entry.uses -= 1
        self.footprints.pop(ident, None)
        self.modified.pop(ident, None)
        self.link(ident, None, ())
        if keys is UNKNOWN:
            del self.unknown[ident]
            return
        for key in keys:
            bucket = self.buckets.get(key)
            if bucket is not None and bucket.pop(ident, None) is not None and not bucket:
                del self.buckets[key]
                if self.order is not None and not has_none(key):
                    self.order.remove(key)

    def link(self, ident: int, mark: weakref.ref[Any] | None, related: Iterable[int]) -> None:
        """Remember which other objects the key of an object was read from, instead of those before."""
        for other in self.related.pop(ident, ()):
            dependents = self.dependents[other]
            del dependents[ident]
            if not dependents:
                del self.dependents[other]
        if related and mark is not None:
            self.related[ident] = tuple(related)
            for other in self.related[ident]:
                self.dependents.setdefault(other, {})[ident] = mark


class Record:
    """What the indexes of one class hold of one session.

    It is a context manager: inside, no entry disappears. Objects are collected at any moment, in any thread,
    so an entry that cannot go at once waits until the one who is inside has left.

    :ivar guard: what keeps the session from emitting SQL while an index reads.
    :ivar marks: the objects of which an event told something since the last lookup.
    :ivar loaded: the objects that were loaded since the last lookup. This is apart from the marks because
        it is the one thing that happens row by row, and appending is the cheapest that can be done. A full
        queue has lost some: the next lookup looks through the session, which so many rows have paid for.
    :ivar flushing: the objects written by a flush that is not over: what was flushed last changes for each at
        a moment that no event tells of.
    :ivar views: the contents of each index that was used in this session, by (index, persisted).
    """

    def __init__(self, guard: LoadGuard) -> None:
        self.guard = guard
        self.marks: Marks = {}
        self.flushing: Marks = {}
        self.loaded: deque[weakref.ref[Any]] = deque(maxlen=LOADED)
        self.views: dict[tuple[Any, bool], Contents] = {}
        self._entries: dict[int, Entry] = {}
        self._dead: deque[Entry] = deque()
        self._lock = threading.Lock()
        self._on_collected = _collector(weakref.ref(self))

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exc_info: object) -> None:
        self._lock.release()
        if self._dead:
            self._reap()

    def distribute(self, scan: Callable[[], Marks]) -> None:
        """Hand the marks on to the indexes.

        :param scan: marks all objects of the class in the session.
        """
        if len(self.loaded) == LOADED:
            self.marks.update(scan())
        else:
            for mark in self.loaded:
                obj = mark()
                if obj is not None:
                    self.marks[id(instance_state(obj))] = weakref.ref(obj)
        self.loaded.clear()
        if self.marks:
            for contents in self.views.values():
                contents.stale.update(self.marks)
            self.marks.clear()

    def place(self, contents: Contents, ident: int, obj: object, keys: Keys | None, keep: bool) -> None:
        """Put an object where it belongs.

        :param keys: its keys, of which there may be none; None if it is not in the session.
        :param keep: whether to remember an object without keys as well.
        :raises TypeError: if a key cannot be ordered among the others.
        """
        belongs = bool(keys) or (keep and keys is not None)
        with self:
            entry = self._entries.get(ident)
            if entry is not None and entry() is not obj:
                self._bury(entry)
                entry = None
            if entry is not None:
                if belongs and contents.placed.get(ident) == keys:
                    return
                contents.drop(entry)
            elif belongs:
                entry = self._entries[ident] = Entry(obj, self._on_collected)
                entry.ident, entry.uses = ident, 0
            try:
                if entry is not None and keys is not None and belongs:
                    contents.put(entry, keys)
            finally:
                if entry is not None and not entry.uses:
                    del self._entries[ident]

    def objects(self, buckets: Iterable[dict[int, Entry]]) -> Iterator[Any]:
        """The objects in some buckets that are still there."""
        with self:
            entries = [entry for bucket in buckets for entry in bucket.values()]
        return (obj for entry in entries if (obj := entry()) is not None)

    def collected(self, entry: Entry) -> None:
        """Called when the object of an entry is gone."""
        self._dead.append(entry)
        self._reap()

    def _reap(self) -> None:
        while self._dead and self._lock.acquire(blocking=False):
            try:
                while self._dead:
                    entry = self._dead.popleft()
                    if self._entries.get(entry.ident) is entry:
                        self._bury(entry)
            finally:
                self._lock.release()

    def _bury(self, entry: Entry) -> None:
        for contents in self.views.values():
            contents.drop(entry)
        del self._entries[entry.ident]


def _collector(record: weakref.ref[Record]) -> Callable[[Entry], None]:
    """The callback of a record's entries, which does not keep the record alive."""

    def on_collected(entry: Entry) -> None:
        owner = record()
        if owner is not None:
            owner.collected(entry)

    return on_collected
