"""The protections, switched off one at a time: each must make the judge find illegal reads.

A mutant replaces a piece of the library inside the worker processes. Where the fault that it lets through needs two
things to meet, it also pauses between them, as a busy machine would.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from querycache import changes, flushed, interceptor, ledger, sa_internals, versions, writes
from querycache.backends.redis import RedisBackend
from querycache.shared_rows import SharedRows, Vectors
from querycache.tables import Reached

__all__ = ["MUTANTS", "Mutant", "apply"]


@dataclass(frozen=True)
class Mutant:
    """A protection that can be switched off.

    Attributes:
        what: the protocol without it.
        apply: replaces the piece.
        faults: kinds of faults that it takes to show.
        isolation: of the transactions.
        consistency: as given to the cache.
        every: seconds from one fault to the next.
        writes: of the workers' operations, the part that are writing transactions. Where all that a write misses is some
            of its tags, others that come soon after it hide that; and while somebody writes, what was lost stays in
            quarantine.
    """

    what: str
    apply: Callable[[], None] = lambda: None
    faults: tuple[str, ...] = ()
    isolation: str = "READ COMMITTED"
    consistency: str = "strict"
    every: float = 1.0
    writes: float = 0.02


def apply(name: str) -> None:
    """Switch a protection off in this process; the empty name is none."""
    if name:
        MUTANTS[name].apply()


def _hesitate(longest: float = 0.02) -> None:
    time.sleep(random.random() * longest)


def _late_versions() -> None:
    original = interceptor.Interceptor._run

    def run(self: Any, load: Any, prepared: Any) -> Any:
        answer = original(self, load, prepared)
        if load.reading is not None:
            _hesitate()
            load.reading = load.request.region.observe(load.reading.tags)
        return answer

    interceptor.Interceptor._run = run  # type: ignore[method-assign]


def _missing_is_valid() -> None:
    original = ledger._open

    def open_anyway(blob: bytes, tags: Sequence[str], found: Sequence[int | None]) -> bytes | None:
        stored = ledger._vector(blob)
        found = [
            stored.get(tag) if version is None else version for tag, version in zip(tags, found, strict=True)
        ]
        return original(blob, tags, found)

    ledger._open = open_anyway


def _no_quarantine() -> None:
    begun = versions.begun

    def begun_clean(version: int | None, new: int) -> int:
        return new + 1 if version is None else begun(version, new)

    versions.begun = begun_clean
    versions.planted = lambda new: new


def _early_bump() -> None:
    original = writes.Writes.commit

    def commit(self: Any, info: Any, dialect: Any) -> None:
        original(self, info, dialect)
        transaction = self._transactions.of(info)
        if transaction is not None:
            for each, marks in transaction.marking.marks:
                each.end(marks)
            transaction.marking.marks = []

    writes.Writes.commit = commit  # type: ignore[method-assign]


def _plain_bump() -> None:
    def commit(self: Any, info: Any, dialect: Any) -> None:
        transaction = self._transactions.of(info)
        if transaction is not None and transaction.wrote:
            for session in list(transaction.unresolved):
                self._resolve(transaction, session)
            for each in self.phases._regions.ledgers:
                each.bump(self.phases._regions.tag_keys(transaction.tags))

    writes.Writes.commit = commit  # type: ignore[method-assign]


def _old_slots_forgotten() -> None:
    original = sa_internals.old_and_new

    def new_only(state: Any, columns: Any) -> list[tuple[object, object]]:
        return [(new, new) for _, new in original(state, columns)]

    sa_internals.old_and_new = new_only
    tags = flushed.row_tags
    # or lists by a foreign key would fall all the same
    vars(flushed)["row_tags"] = lambda *arguments, moved: tags(*arguments, moved=False)


def _own_writes_hidden() -> None:
    writes.Transaction.hides = lambda self, tags: False  # type: ignore[method-assign]
    _trust("own write")


def _trust(reason: str) -> None:
    original = interceptor._distrust

    def distrust(request: Any, transactions: Any, reading: Any) -> str:
        found = original(request, transactions, reading)
        return "" if found == reason else found

    interceptor._distrust = distrust


def _fill_after_write() -> None:
    """What a transaction reads after its own write is asked of the database, as it should, and then stored."""
    look_up = interceptor.Interceptor._look_up
    hides = writes.Transaction.hides
    writes.Transaction.hides = lambda self, tags: False  # type: ignore[method-assign]
    _trust("own write")

    def look_up_and_fill(self: Any, request: Any, may_wait: bool = True) -> Any:
        if any(hides(transaction, request.tags) for transaction in request.transactions):
            request.options = replace(request.options, mode="refresh")
        return look_up(self, request, may_wait)

    interceptor.Interceptor._look_up = look_up_and_fill  # type: ignore[method-assign]
    interceptor.Interceptor._unfit_transaction = lambda *arguments: ""  # type: ignore[method-assign]


def _no_cascades() -> None:
    vars(changes)["cascades"] = lambda table, *, delete: Reached(frozenset(), frozenset())


def _one_mark_for_all() -> None:
    """Whoever ends takes off all marks, also those of others."""
    swap = RedisBackend.swap

    def end(self: Any, marks: Any) -> None:
        _, found = self.fetch(None, list(marks))
        swap(
            self,
            [
                (counter, version, version - version % versions.GENERATION + versions.GENERATION)
                for counter, version in zip(marks, found, strict=True)
                if version is not None
            ],
        )

    RedisBackend.end = end


def _shared_unversioned() -> None:
    find = SharedRows.find

    def find_anyway(self: SharedRows, family: bytes, vectors: Vectors) -> Any:
        rows = self._known[family].rows if family in self._known else {}
        for key, versions_now in vectors.own.items():
            if key in rows:
                rows[key] = vectors.common, versions_now, rows[key][-1]
        return find(self, family, vectors)

    SharedRows.find = find_anyway  # type: ignore[method-assign]


MUTANTS = {
    "no-marks": Mutant(
        "no phase one: versions only change after COMMIT", faults=("kill after COMMIT",), consistency="commit"
    ),
    "late-versions": Mutant(
        "an entry is stored under versions read after the database was asked", _late_versions
    ),
    "missing-valid": Mutant(
        "a version that is missing counts as unchanged",
        _missing_is_valid,
        ("evict slots after COMMIT",),
        every=0.3,
        writes=0.002,
    ),
    "no-quarantine": Mutant(
        "a version that was lost starts clean, although marks may be lost with it",
        _no_quarantine,
        ("flush before COMMIT, kill after",),
        writes=0.003,
    ),
    "early-bump": Mutant("marks are taken off before COMMIT instead of after", _early_bump),
    "bump-before": Mutant("one new generation before COMMIT, and no marks", _plain_bump),
    "shared-mark": Mutant("a writer that ends takes off the marks of the others, too", _one_mark_for_all),
    "new-slots-only": Mutant(
        "a row write changes the slots of its new values, and nothing of its old ones",
        _old_slots_forgotten,
        writes=0.003,
    ),
    "no-cascades": Mutant(
        "rows that the database itself deletes are not known to change", _no_cascades, writes=0.003
    ),
    "own-write-hidden": Mutant(
        "a transaction is answered from before its own writes", _own_writes_hidden, writes=0.003
    ),
    "fill-after-write": Mutant("what a transaction reads after its own write is stored", _fill_after_write),
    "shared-unversioned": Mutant(
        "rows of other answers complete one, whatever was written on them since",
        _shared_unversioned,
        writes=0.01,
    ),
    "no-snapshots": Mutant(
        "a transaction with an old snapshot of the database stores what it sees",
        lambda: _trust("snapshot"),
        isolation="REPEATABLE READ",
        writes=0.003,
    ),
}
