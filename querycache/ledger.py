"""The ledger: which version each tag has, and therefore which entries may still be used.

An answer in the cache depends on **tags** (a table, a slot of rows, a name that the user gave). The ledger
keeps one version per tag in the same store as the entries, and an entry carries the versions that its tags
had *before* the database was asked: its **vector**. An entry is valid exactly while every one of its tags is
present, clean and equal to what the vector says. Nobody ever deletes entries to invalidate them, and no
clocks are compared.

**Writers** work in two phases. Just before COMMIT, :meth:`Ledger.begin` puts a *pending* mark on every tag of
the transaction, so that no lookup hits or fills under it while the commit becomes visible. After COMMIT, or
its failure, :meth:`Ledger.end` gives each tag a new generation and takes the mark off. Marks are counted, so
writers may overlap. A writer that dies in between leaves its mark, and the tag stays unusable until the mark
heals: the entries that it made stale are never served again.

**Losing keys** (eviction, flush, restart) must be survived. A tag that is gone makes its entries invalid, and
when it is created again it gets a random incarnation that no entry has. But the marks of writers still at
work were lost with it, so it starts in *quarantine*, as unusable as if it were marked.

**Healing.** One more counter, the **witness**, is marked by every writer whatever it writes, first in phase
one and last in phase two. Whoever reads a tag unclean and *after that* the witness clean knows that no writer
is at work anywhere, so every mark on the tag, kept or lost, is dead, and clears it
(:meth:`StoreBackend.settle`). The witness itself, and tags under a load so steady that the witness is never
clean, heal by **lease**: a process that for a whole lease, on its own monotonic clock, has seen a tag in one
incarnation and never clean, clears a quarantine; marks it first turns into a quarantine, which then lasts
another lease. This is right as long as no writer spends longer than a lease between its mark and the end of
its COMMIT. Where the store can prove that nothing was ever lost, the witness need not wait for its first
lease, so that a new server serves at once; for marks that were given up that is no proof.

What each step does to a version is in :mod:`querycache.versions`. That no interleaving of writers, readers,
crashes and losses gives a stale hit is checked exhaustively in ``tests/test_ledger_model.py``, and on this
code, under random schedules, in ``tests/test_ledger_schedules.py``.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import compress
from typing import NamedTuple

import msgspec

from querycache import forks, versions
from querycache.errors import CacheUnavailable
from querycache.store import Mark, Meanwhile, StoreBackend

__all__ = ["DEFAULT_LEASE", "Ledger", "Marks", "Reading", "Snapshot", "changes_here"]

DEFAULT_LEASE = 30.0
"""Seconds. Longer than any COMMIT takes."""

Marks = Mapping[str, Mark]
"""What :meth:`Ledger.begin` gives and :meth:`Ledger.end` takes: opaque to everyone else."""

_PROOF_INTERVAL = 1.0
_MOST_WATCHED = 16_384
_MOST_SEEN = 16_384


class _Here(threading.local):
    """What a thread has done.

    Attributes:
        changes: of how many it has told a ledger.
    """

    changes = 0


_here = _Here()


def changes_here() -> int:
    """A number that grows whenever this thread tells a ledger that something has changed."""
    return _here.changes


class Snapshot(NamedTuple):
    """When a transaction began to see the database as it was at one moment: what :meth:`Ledger.snapshot` gives."""

    number: int
    """How many there had been in this process."""

    witness: int | None
    """The version of the witness just before; None where a writer was at work, or the server did not answer."""


class Reading(msgspec.Struct, frozen=True):
    """What one lookup found. Take it before the database is asked, and fill with it afterwards."""

    tags: tuple[str, ...]
    """The tags that were asked for, in the order of ``versions``."""

    versions: tuple[int | None, ...]
    """Their versions at the time of the lookup; None for one that is missing."""

    payload: bytes | None
    """The valid entry, or None."""

    stale: bool
    """Whether an entry was found that is valid no more, or that could not be read."""

    fallen: frozenset[str] = frozenset()
    """Where the entry is only valid in part: the tags under whose present versions it is not."""

    witness: int | None = None
    """The version of the witness, read last: it differs from one reading to the next if anybody wrote
    between."""

    @property
    def fillable(self) -> bool:
        """Whether an answer read from the database from now on may be stored under these versions."""
        return all(map(versions.is_clean, self.versions))

    @property
    def obstacle(self) -> str:
        """Why it is not fillable: "not kept" where the store has no versions, and does not take any; "pending" where a writer
        is at work, or has died; "quarantine" where one may be whose marks were lost. Empty where it is."""
        if self.fillable:
            return ""
        if None in self.versions:
            return "not kept"
        return "pending" if any(map(versions.pending_of, self.versions)) else "quarantine"  # type: ignore[arg-type]

    def confirms(self, earlier: Reading, besides: frozenset[str]) -> bool:
        """Whether nothing has changed until this later reading of the same tags, except for some of them."""
        if versions.is_clean(self.witness) and self.witness == earlier.witness:
            return True
        return all(
            versions.is_clean(now) and now == then
            for tag, then, now in zip(earlier.tags, earlier.versions, self.versions, strict=True)
            if tag not in besides
        )

    def names(self, tags: Iterable[str]) -> bool:
        """Whether the versions of all of these were read."""
        return set(self.tags).issuperset(tags)

    def of(self, tags: set[str]) -> Reading:
        """This reading with these of its tags alone."""
        if tags.issuperset(self.tags):
            return self
        kept = [pair for pair in zip(self.tags, self.versions, strict=True) if pair[0] in tags]
        return Reading(
            tuple(tag for tag, _ in kept),
            tuple(version for _, version in kept),
            None,
            False,
            witness=self.witness,
        )

    def union(self, other: Reading) -> Reading:
        """This reading together with a later one of further tags, for an answer that depends on both."""
        more = [
            (tag, version)
            for tag, version in zip(other.tags, other.versions, strict=True)
            if tag not in self.tags
        ]
        return Reading(
            (*self.tags, *(tag for tag, _ in more)),
            (*self.versions, *(version for _, version in more)),
            self.payload,
            self.stale,
            self.fallen,
            self.witness if self.witness == other.witness else None,
        )


class Ledger:
    """The versions of the tags of one namespace.

    :param store: where entries and versions are.
    :param witness: the key of the counter that every writer marks; no tag may have this name.
    :param lease: seconds after which a writer that has not ended is taken for dead; longer than any COMMIT.
    :param clock: monotonic seconds of this process.

    Every method may raise :class:`~querycache.errors.CacheUnavailable`. Safe for use by several threads.
    """

    def __init__(
        self,
        store: StoreBackend,
        witness: str,
        *,
        lease: float = DEFAULT_LEASE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store
        self.lease = lease
        self._witness = witness
        self._clock = clock
        self._lock = forks.lock()
        # For each counter not seen clean: the incarnation it has, and since when.
        self._unclean: dict[str, tuple[int, float]] = {}
        self._next_proof = float("-inf")
        self._snapshots = 0
        # For each tag its version, and how many snapshots had begun when it was first seen. Kept once there are any.
        self._seen: dict[str, tuple[int, int]] | None = None

    # -- readers --------------------------------------------------------------------------------------------

    def lookup(
        self,
        entry: str | None,
        tags: Sequence[str],
        further: Sequence[str] = (),
        *,
        exact: bool = False,
        meanwhile: Meanwhile | None = None,
    ) -> Reading:
        """Read an entry together with the versions of its tags.

        One round trip where the tags are clean; a few more where some are missing or unclean and can be
        healed.

        :param entry: the key of the entry; None to read versions only.
        An entry names its tags itself. It is valid if they all stand, and valid in part if those do that were asked
        for.

        :param tags: what the answer is known to depend on; an entry that does not name them all is not valid.
        :param further: what else it was seen to depend on. Where an entry names others (those of statements that
            were only met while it was loaded) they are read in a second round trip.
        :param exact: the entry may be the answer to something that depends on other tags; it is valid as a whole or
            not at all.
        :param meanwhile: is called, if there is a server to wait for, while it has not answered yet.
        """
        asked = (*tags, *further)
        blob, found = self.store.fetch(entry, [*asked, self._witness], meanwhile)
        witness = found.pop()
        payload, fallen = None, _NONE
        if blob is not None:
            payload = _open(blob, asked, found)
            if payload is None and (stored := _vector(blob)):
                others = [tag for tag in stored if tag not in asked]
                if others and _fallen(stored, asked, found).isdisjoint(tags):
                    asked = (*asked, *others)
                    _, found = self.store.fetch(None, [*asked, self._witness])
                    witness = found.pop()
                fallen = _fallen(stored, asked, found)
                if not fallen if exact else fallen.isdisjoint(tags) and stored.keys() >= set(tags):
                    payload = _payload(blob)
                    # what it was once seen to depend on, it need not depend on now
                    kept = [tag in stored or tag in tags for tag in asked]
                    asked, found = tuple(compress(asked, kept)), list(compress(found, kept))
                else:
                    fallen = _NONE
        stale = blob is not None and payload is None
        if (payload is None or fallen) and not all(map(versions.is_clean, found)):
            before = found, witness
            found, witness = self._tend(asked, found, witness)
            if fallen and found != before[0]:
                # versions from after the entry was read: what is found under them may be later than what it still tells
                payload, fallen, stale = None, _NONE, True
            elif fallen:
                witness = before[1]  # as it was when the entry was read
        elif self._unclean and not self._unclean.keys().isdisjoint(asked):
            self._forget(asked)
        if self._seen is not None:
            self._remember(self._seen, asked, found)
        return Reading(asked, tuple(found), payload, stale, fallen, witness)

    def quiet(self) -> int | None:
        """The version of the witness; None where a writer is at work, and where the server does not answer.

        As long as it is the same, the database has not changed. Of a writer at work nobody knows whether it has
        committed, and its mark may still be on the witness when its tags have their new versions.
        """
        try:
            witness = self.lookup(None, ()).witness
        except CacheUnavailable:
            return None
        return witness if versions.is_clean(witness) else None

    def snapshot(self) -> Snapshot:
        """To be called just before a transaction's snapshot of the database begins. One round trip.

        It does not raise: of a server that does not answer less is known later.
        """
        with self._lock:
            self._snapshots += 1
            number = self._snapshots
        if self._seen is None:
            self._seen = {}
        return Snapshot(number, self.quiet())

    def shows(self, snapshot: Snapshot, reading: Reading) -> bool:
        """Whether what is valid under a reading is what a snapshot shows: true where nobody has written since it began, or
        else where none of these tags has changed.

        A version never comes back. So a tag that has the version which this process had seen before the snapshot began was
        not written in between. Where an entry may be later than the versions that were read with it, one round trip.
        """
        if reading.payload is not None and not self.store.ordered:
            try:
                reading = self.lookup(None, reading.tags)
            except CacheUnavailable:
                return False
        if reading.witness is not None and reading.witness == snapshot.witness:
            return True
        seen = self._seen or {}
        return all(
            version == (known := seen.get(tag, _NEVER_SEEN))[0] and known[1] < snapshot.number
            for tag, version in zip(reading.tags, reading.versions, strict=True)
        )

    def _remember(
        self, seen: dict[str, tuple[int, int]], tags: Iterable[str], found: Iterable[int | None]
    ) -> None:
        # after they were read: of a snapshot that begins meanwhile it is not known which was first
        begun = self._snapshots
        for tag, version in zip(tags, found, strict=True):
            known = seen.get(tag)
            if version is not None and versions.is_clean(version) and (known is None or known[0] != version):
                if len(seen) >= _MOST_SEEN:
                    seen.clear()
                seen[tag] = version, begun

    def fill(self, entry: str, reading: Reading, payload: bytes, ttl: float | None = None) -> bool:
        """Store an answer that was read from the database after the reading was taken.

        :param ttl: seconds that the entry may be used at most; None for no limit.
        :returns: False if the reading is not fillable, or the store refused the entry.
        """
        return reading.fillable and self.store.store(entry, _seal(payload, reading), ttl)

    def _tend(
        self, tags: Sequence[str], found: list[int | None], witness: int | None
    ) -> tuple[list[int | None], int | None]:
        """Create and clear what can be created and cleared now; give the versions that there are then, and that of the
        witness, which was read after them."""
        witness = self._tend_witness(witness)
        unclean = [tag for tag, version in zip(tags, found, strict=True) if not versions.is_clean(version)]
        if versions.is_clean(witness) or None in found:
            *now, witness = self.store.settle([*unclean, self._witness], self._witness)
            settled = dict(zip(unclean, now, strict=True))
            found = [settled.get(tag, version) for tag, version in zip(tags, found, strict=True)]
        return [self._watch(tag, version) for tag, version in zip(tags, found, strict=True)], witness

    def _tend_witness(self, version: int | None) -> int | None:
        if version is None:
            planted = versions.planted(versions.fresh())
            if not self.store.swap([(self._witness, None, planted)])[0]:
                return None
            version = planted
        if versions.is_provable(version) and self._nothing_was_lost():
            # Proven after the witness was read, and true only if no writer has touched it since.
            clean = versions.cleared(version, versions.fresh())
            if self.store.swap([(self._witness, version, clean)])[0]:
                version = clean
        return self._watch(self._witness, version)

    def _nothing_was_lost(self) -> bool:
        now = self._clock()
        if now < self._next_proof:
            return False
        self._next_proof = now + _PROOF_INTERVAL
        return self.store.lost_nothing_for(self.lease)

    def _watch(self, counter: str, version: int | None) -> int | None:
        """Remember since when a counter has not been seen clean, and heal it after a lease."""
        if version is None or versions.is_clean(version):
            self._forget((counter,))
            return version
        incarnation = versions.incarnation_of(version)
        now = self._clock()
        with self._lock:
            known, since = self._unclean.get(counter, (None, now))
            if known != incarnation:
                since = now
                if counter in self._unclean or len(self._unclean) < _MOST_WATCHED:
                    self._unclean[counter] = (incarnation, now)
                else:
                    self._forget_old(now)
        if now - since < self.lease:
            return version
        healed = versions.healed(version, versions.fresh())
        if not self.store.swap([(counter, version, healed)])[0]:
            return version
        return self._watch(counter, healed)

    def _forget(self, counters: Iterable[str]) -> None:
        with self._lock:
            for counter in counters:
                self._unclean.pop(counter, None)

    def _forget_old(self, now: float) -> None:
        """Make room by forgetting counters that nobody has looked up since they could have healed."""
        for counter, (_, since) in list(self._unclean.items()):
            if now - since > 2 * self.lease:
                del self._unclean[counter]

    # -- writers --------------------------------------------------------------------------------------------

    def begin(self, tags: Iterable[str]) -> Marks:
        """Phase one, just before COMMIT: mark every tag pending. One round trip.

        If it raises, marks may or may not have been made; those that were heal by lease.
        """
        counters = list(dict.fromkeys(tags))
        return self.store.begin([self._witness, *counters]) if counters else {}

    def end(self, marks: Marks) -> None:
        """Phase two, after COMMIT or its failure: a new generation for every tag, and the marks taken off.

        One round trip (memcached: more where other writers are at the same tags).
        """
        _here.changes += 1
        if marks:
            self.store.end(marks)

    def bump(self, tags: Iterable[str], *, essential: bool = True) -> None:
        """Invalidate by hand, outside any transaction: everything that depends on one of the tags is invalid.

        The witness first, as for any writer: snapshots from before must show that something was written since. One
        round trip.

        :param essential: try it although the server failed a moment ago.
        """
        _here.changes += 1
        counters = list(dict.fromkeys(tags))
        if counters:
            self.store.bump([self._witness, *counters], essential=essential)


_HEADER = struct.Struct(">HI")
_NONE: frozenset[str] = frozenset()
_NEVER_SEEN = (-1, 0)


def _seal(payload: bytes, reading: Reading) -> bytes:
    """An entry as it is stored: number of tags, length of their names, versions, names, payload."""
    pack, names = _frame(reading.tags)
    return pack(*reading.versions) + names + payload


@lru_cache(maxsize=1024)
def _frame(tags: tuple[str, ...]) -> tuple[Callable[..., bytes], bytes]:
    """What packs the versions of tags behind their number and the length of their names, and those names."""
    names = "\0".join(tags).encode("utf-8", "surrogatepass")
    return partial(struct.Struct(f"{_HEADER.format}{len(tags)}Q").pack, len(tags), len(names)), names


def _open(blob: bytes, tags: tuple[str, ...], found: Sequence[int | None]) -> bytes | None:
    """The payload of an entry that was stored under just these versions: the usual case, and the quickest."""
    if None in found:
        return None
    pack, names = _frame(tags)
    header = pack(*found) + names
    return blob[len(header) :] if blob.startswith(header) else None


def _fallen(stored: Mapping[str, int], tags: Sequence[str], found: Sequence[int | None]) -> frozenset[str]:
    """Those of the tags whose version is not the one that was stored. (Only clean ones ever are.)"""
    now = dict(zip(tags, found, strict=True))
    return frozenset(tag for tag, version in stored.items() if tag in now and now[tag] != version)


def _vector(blob: bytes) -> dict[str, int]:
    """The tags that an entry names, with the versions it was stored under; empty where the bytes are no entry."""
    if len(blob) < _HEADER.size:
        return {}
    count, length = _HEADER.unpack_from(blob)
    start = _HEADER.size + 8 * count
    if count == 0 or start + length > len(blob):
        return {}
    try:
        names = blob[start : start + length].decode("utf-8", "surrogatepass").split("\0")
    except UnicodeDecodeError:
        return {}
    if len(names) != count:
        return {}
    return dict(zip(names, struct.unpack_from(f">{count}Q", blob, _HEADER.size), strict=True))


def _payload(blob: bytes) -> bytes:
    """What comes after the header of an entry."""
    count, length = _HEADER.unpack_from(blob)
    return blob[_HEADER.size + 8 * count + length :]
