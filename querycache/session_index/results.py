"""What lookups give back: sets of objects by identity, and what is not known."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, MutableSet, Set
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Difference", "Matches", "ObjectSet"]

T = TypeVar("T")


class ObjectSet(MutableSet[T], Generic[T]):
    """A set of objects by identity, in the order in which they were found.

    Mapped dataclasses are unhashable, or equal while they are different rows; so membership here is ``is``,
    never ``==``. It compares with built-in sets, mixes with them under ``| & - ^``, and belongs to its
    caller, who may change it.
    """

    __slots__ = ("_by_id",)

    def __init__(self, objects: Iterable[T] = ()) -> None:
        self._by_id: dict[int, T] = {id(item): item for item in objects}

    def __contains__(self, item: object) -> bool:
        return id(item) in self._by_id

    def __iter__(self) -> Iterator[T]:
        return iter(self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Set):
            return NotImplemented
        return len(self) == len(other) and all(item in other for item in self)

    __hash__ = None  # type: ignore[assignment]

    def add(self, value: T) -> None:
        self._by_id[id(value)] = value

    def discard(self, value: T) -> None:
        self._by_id.pop(id(value), None)

    def __repr__(self) -> str:
        return f"ObjectSet({list(self._by_id.values())!r})"


@dataclass(frozen=True)
class Matches(Generic[T]):
    """The answer of :meth:`Index.lookup`; unpacks into ``known, unknown``.

    :ivar known: the objects whose loaded state has the key that was asked for.
    :ivar unknown: the objects of the index whose key is not loaded (expired, deferred): they may match.
    """

    known: ObjectSet[T]
    unknown: ObjectSet[T]

    def __iter__(self) -> Iterator[ObjectSet[T]]:
        return iter((self.known, self.unknown))


@dataclass(frozen=True)
class Difference:
    """Where an index disagrees with a full scan of the session; what :meth:`Index.verify` reports.

    :ivar index: the name of the index.
    :ivar obj: the object.
    :ivar expected: the keys that the scan gives it: a tuple, empty where the object does not belong in the
        index; None where its key is not known.
    :ivar found: the keys under which a lookup finds it, in the same form.
    :ivar persisted: whether this is about the view as of the last flush.
    """

    index: str
    obj: object
    expected: tuple[Hashable, ...] | None
    found: tuple[Hashable, ...] | None
    persisted: bool = False
