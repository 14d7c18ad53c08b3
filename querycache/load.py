"""What is being loaded: a request whose rows become objects, and what is gathered for its entry meanwhile.

SQLAlchemy completes objects by further statements while it loads them, and listeners of the application may run statements
of their own. A context variable tells such a statement, in its thread or task, what it runs within.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import Session

from querycache import sa_internals
from querycache.frozen import Entry, FrozenStatement
from querycache.ledger import Reading
from querycache.requests import ByKey, Completion, Request

__all__ = ["Load", "around_in"]

T = TypeVar("T")


@dataclass(slots=True)
class Load:
    """A request whose rows are being loaded, and what is gathered for its entry meanwhile.

    Attributes:
        reading: versions of the tags, read before a statement that depends on them was run; None where the server
            did not answer.
        needed: keys of the tags that the answer depends on.
        entry: what was found, of which the statement itself is replayed; None where the database is asked for it.
        checks: True where not all further statements of the entry may stand, or were stored with all tags they need.
        loads: those that it is to have.
        spoiled: why nothing of this may be stored; empty while it may.
        grown: True once there is a further statement that the entry does not have.
        doubtful: True where the database was asked something else since the versions were read: they may be others now.
        changes: of how many this thread had told a ledger when they were read.
        later: True once something may have been seen that is later than the entry: from the database, or of the tags.
        borrowed: keys of the tags on which rows of other answers depend that were used.
        found: the reading under which the entry was, once there is another.
        shown: the databases in whose snapshots, or without one, rows were found to go with what was replayed.
        learned: further statements that were asked for by the keys of their rows.
        loaded: what the Session's objects had loaded before; None where it is unlikely that anything has to be forgotten.
        outer: the load within which this one runs, of this Session or of another.
        over: True once it has ended. A task or thread that a listener has begun may still take it for the one around it.
    """

    request: Request
    reading: Reading | None
    needed: set[str]
    changes: int
    entry: Entry | None = None
    checks: bool = False
    loads: dict[bytes, FrozenStatement] = field(default_factory=dict)
    spoiled: str = ""
    grown: bool = False
    doubtful: bool = False
    later: bool = False
    borrowed: set[str] = field(default_factory=set)
    found: Reading | None = None
    shown: set[Engine | Connection] = field(default_factory=set)
    learned: list[tuple[ByKey, FrozenStatement]] = field(default_factory=list)
    loaded: Mapping[Any, sa_internals.Loaded] | None = None
    outer: Load | None = None
    over: bool = False

    def surround(self, load: Callable[[], T]) -> T:
        """Take what is asked while something is loaded for a part of this."""
        self.outer = _running(_around.get())
        try:
            token = _around.set(self)
            try:
                return load()
            finally:
                _around.reset(token)
        finally:
            self.over = True  # also where a signal has come before it was reset

    def find(self, asked: Completion) -> FrozenStatement | None:
        """A further statement that the entry has and that still stands.

        None once one was found out otherwise: SQLAlchemy asks them one after the other, so a later one never knows
        less than an earlier one.
        """
        if self.doubtful:
            self.doubtful = False
            now = None if self.reading is None else self.request.region.observe(self.reading.tags)
            self.later = (
                self.later or now is None or self.reading is None or now.versions != self.reading.versions
            )
        frozen = None if self.later or self.entry is None else self.entry.loads.get(asked.mark)
        if frozen is not None and self.checks:
            keys, reading = self.request.region.tag_keys(asked.tags()), self.reading
            if reading is None or not reading.fallen.isdisjoint(keys) or not reading.names(keys):
                return None
            self.needed.update(keys)
        if frozen is not None:
            self.loads[asked.mark] = frozen
        return frozen

    def observe(self, tags: Sequence[str]) -> None:
        """Read the versions of tags not read yet, before the statement runs that depends on them."""
        region = self.request.region
        keys = region.tag_keys(tags)
        self.needed.update(keys)
        if self.reading is not None and not self.needed.issubset(self.reading.tags):
            more = region.observe(keys)
            self.found = self.found or self.reading
            self.reading = None if more is None else self.reading.union(more)
            self.later = True

    @property
    def replays(self) -> bool:
        """True if something of this is not from the database."""
        return self.entry is not None or bool(self.borrowed)

    def not_replayed(self, reading: Reading) -> frozenset[str]:
        """Which keys of a reading nothing depends on that is not from the database."""
        replayed = set(self.borrowed)
        found = self.found or self.reading
        if self.entry is not None and found is not None:
            replayed.update(found.tags)
            replayed -= found.fallen - self.borrowed
        return frozenset(reading.tags) - replayed

    @property
    def unfit(self) -> str:
        """Why this cannot be stored, in a word or two; empty where it can."""
        if self.spoiled:
            return self.spoiled
        if self.reading is None:
            return "unavailable"
        return self.reading.of(self.needed).obstacle


_around: ContextVar[Load | None] = ContextVar("querycache_around", default=None)


def around_in(session: Session) -> Load | None:
    """The load that runs around a statement of a session, in this thread or task."""
    around = _running(_around.get())
    while around is not None and around.request.session is not session:
        around = _running(around.outer)
    return around


def _running(load: Load | None) -> Load | None:
    """The first that is not over, of a load and those around it."""
    while load is not None and load.over:
        load = load.outer
    return load
