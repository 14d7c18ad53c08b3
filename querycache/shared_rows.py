"""Rows that many answers have in common, such as the authors of the posts on every page.

SQLAlchemy completes the objects of an answer by their keys (``selectinload`` of a many-to-one relationship): each row is
there for its key alone. When one popular row is changed, every answer that has it is stale in part, and each would have
to ask the database for it. So a process remembers such rows when it has asked, under the versions of their tags that were
read before, and they complete other answers to the same statement for as long as these stand.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from querycache.codec import pack_rows
from querycache.frozen import FrozenStatement

__all__ = ["SharedRows", "Vectors"]

Version = int | None
Row = tuple[object, ...]

_MOST_ROWS = 4_000
_LARGEST = 2**10


@dataclass(slots=True)
class Vectors:
    """Under which versions rows are known.

    Attributes:
        common: tags on which all of them depend, with their versions.
        own: by key, the versions of what each depends on by itself.
    """

    common: tuple[tuple[str, Version], ...]
    own: Mapping[object, tuple[Version, ...]]


@dataclass(slots=True)
class _Known:
    columns: list[tuple[str, int | str | None]]
    counted: bool
    rows: dict[object, tuple[tuple[tuple[str, Version], ...], tuple[Version, ...], Row | None]] = field(
        default_factory=dict
    )


class SharedRows:
    """The rows that one process remembers of a region: 4,000, with texts of 1 KB each at most; then it starts anew.

    Safe for use by several threads.
    """

    def __init__(self) -> None:
        self._known: dict[bytes, _Known] = {}
        self._count = 0
        self._lock = threading.Lock()

    def has(self, family: bytes, keys: Collection[object]) -> bool:
        """True if the rows of these keys are known, under whatever versions."""
        known = self._known.get(family)
        return known is not None and known.rows.keys() >= set(keys)

    def find(self, family: bytes, vectors: Vectors) -> FrozenStatement | None:
        """The rows of these keys, as one statement that was asked for them; None where not all are known.

        Args:
            family: of statements whose rows differ by their keys alone.
            vectors: the versions as they are now, for each key that is asked for.
        """
        known = self._known.get(family)
        if known is None:
            return None
        rows = []
        for key, version in vectors.own.items():
            found = known.rows.get(key)
            if found is None or found[0] != vectors.common or found[1] != version:
                return None
            if found[2] is not None:
                rows.append(found[2])
        rowcount = len(rows) if known.counted else -1
        return FrozenStatement(known.columns, rowcount, pack_rows(rows, len(known.columns)))

    def learn(
        self, family: bytes, keys: Iterable[object], vectors: Vectors, frozen: FrozenStatement, place: int
    ) -> None:
        """Remember rows that the database has told.

        Args:
            keys: that it was asked for.
            vectors: the versions from before it was asked, of the keys that are to be remembered.
            place: of the key in each row.
        """
        if not vectors.own or not frozen.rows.immutable:
            return
        rows: dict[object, Row | None] = dict.fromkeys(keys)
        for row in frozen.unpack():
            key = row[place]
            if sum(len(value) for value in row if isinstance(value, (str, bytes))) > _LARGEST:
                return
            # where the database takes other values for equal than Python does, nobody knows which row is whose
            if key not in rows or rows[key] is not None:
                return
            rows[key] = row
        if not self._lock.acquire(blocking=False):
            return  # another thread is at it; or was, where this process was forked
        try:
            if self._count > _MOST_ROWS:
                self._known, self._count = {}, 0
            known = self._known.get(family)
            if known is None or known.columns != frozen.columns:
                known = self._known[family] = _Known(frozen.columns, frozen.rowcount >= 0)
            before = len(known.rows)
            known.rows.update(
                {key: (vectors.common, version, rows[key]) for key, version in vectors.own.items()}
            )
            self._count += len(known.rows) - before
        finally:
            self._lock.release()
