"""The contract of a store: what a cache server must be able to do for entries and for tag versions.

A store is a dogpile.cache backend (bytes by key) that also keeps **counters**: the versions of
:mod:`querycache.versions`, changed only in atomic steps. It knows bytes, keys and integers, and neither
SQLAlchemy nor what an entry means. :mod:`querycache.ledger` builds the invalidation protocol on it.

What every store promises:

- Keys are final: the caller has put its namespace in front. Any string is a valid key.
- Each method is one round trip, however many keys it is given (exceptions are named where they are).
- Each counter step is atomic for its counter. Steps on several counters happen in the order given, or all at
  once; reads likewise.
- A counter that is gone is reported as None, never as some default. Losing keys at any moment (eviction,
  flush, restart) is allowed. Bringing back an older version of a counter (from a snapshot on disk, or a
  replica that lags) is not: a store whose server can do so must see to it that such counters are not found
  again.
- A fault of the server or the network is a :class:`~querycache.errors.CacheUnavailable` within the timeout
  that was configured, and never anything else. After such a fault the command may or may not have been
  carried out.

Stores are safe for use by several threads.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
from dogpile.cache.api import NO_VALUE, BytesBackend, CantDeserializeException, SerializedReturnType

from querycache import versions

__all__ = ["Mark", "Meanwhile", "StoreBackend"]

Meanwhile = Callable[[], object]
"""What can be done while a server is at work."""


Mark = Any
"""What a store must know to take a mark off a counter again, the incarnation that was marked for one; nobody else looks
into it."""


def _decode(data: bytes) -> Any:
    try:
        return msgspec.msgpack.decode(data)
    except msgspec.DecodeError as error:
        raise CantDeserializeException from error


class StoreBackend(BytesBackend, abc.ABC):
    """A dogpile.cache backend that can also carry the ledger of tag versions.

    In a plain dogpile region values are serialized with msgpack, never with pickle unless the region is made
    with ``serializer=pickle.dumps, deserializer=pickle.loads``; bytes that cannot be decoded are regenerated.
    """

    serializer = staticmethod(msgspec.msgpack.encode)
    deserializer = staticmethod(_decode)

    atomic: bool = True
    """False where the counter steps below are imitated without atomicity; the promise of the ledger is weaker
    then."""

    ordered: bool = True
    """False where :meth:`fetch` may read an entry later than the counters, so that it may tell of a commit that these do not
    show yet."""

    shared: bool = True
    """False for what other processes cannot see."""

    # -- entries --------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def fetch(
        self, key: str | None, counters: Sequence[str] = (), meanwhile: Meanwhile | None = None
    ) -> tuple[bytes | None, list[int | None]]:
        """Read an entry and counters in one round trip.

        :param key: the entry, or None to read counters only.
        :param counters: read one after the other in this order, or all at once; not before the entry, if this is
            :attr:`ordered`.
        :param meanwhile: is called, if there is a server to wait for, while it has not answered yet.
        :returns: the entry (None if it is missing or has expired), and a version for each counter (None if
            missing).
        """

    @abc.abstractmethod
    def store(self, key: str, payload: bytes, ttl: float | None = None) -> bool:
        """Write an entry.

        :param ttl: seconds after which it is not found any more; None for as long as the store has room.
        :returns: False if the store refuses the entry (too large, no memory left); then nothing is kept under
            the key that could be read as this or half of this entry.
        """

    @abc.abstractmethod
    def remove(self, keys: Iterable[str]) -> None:
        """Remove entries. Missing ones, and no keys at all, are no errors."""

    # -- counters -------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def begin(self, counters: Sequence[str]) -> dict[str, Mark]:
        """Take the step :func:`~querycache.versions.begun` on each counter, in this order.

        The first is the witness. Its mark must not expire: while it stands, no other that is lost is taken for clean.
        """

    @abc.abstractmethod
    def end(self, marks: Mapping[str, Mark]) -> None:
        """Take the step :func:`~querycache.versions.ended` on each counter that is present, on the witness last.

        :param marks: what :meth:`begin` gave, the witness first.

        Where a counter is contended and the store has no atomic step for it, further round trips are taken.
        May return before the server has done it: until then the marks are there.
        """

    @abc.abstractmethod
    def bump(self, counters: Sequence[str], *, essential: bool = True) -> None:
        """Take the step :func:`~querycache.versions.bumped` on each counter that is present.

        :param essential: try it although the server failed a moment ago.
        """

    @abc.abstractmethod
    def swap(self, changes: Sequence[tuple[str, int | None, int]]) -> list[bool]:
        """Compare and swap: give each counter its third value if it has its second (None: if it is missing).

        May take two round trips, one to find the counters and one to change them.

        :returns: for each change whether it was made.
        """

    def settle(self, counters: Sequence[str], witness: str) -> list[int | None]:
        """Make counters usable that were found missing or unclean, as far as that is safe now.

        A missing counter is created. If the witness is clean at one moment *after* the counter was read, no
        writer is at work that has marked it, or ever had before it was lost, and it becomes clean, by
        :func:`~querycache.versions.cleared`; otherwise it stays, or starts, unclean.

        This is the general way by compare-and-swap, in several round trips. A store that can look at the
        witness and at a counter in one atomic step does it in one, and then a missing counter can be created
        clean.

        :returns: the version of each counter afterwards.
        """
        _, found = self.fetch(None, [*counters, witness])
        new = versions.fresh()
        missing = [
            (counter, None, versions.planted(new))
            for counter, version in zip(counters, found, strict=False)
            if version is None
        ]
        if missing:
            # Created and then read again: had it been created clean, a writer that began and lost its mark
            # since the witness was read would go unseen.
            self.swap(missing)
            _, found = self.fetch(None, [*counters, witness])
            new = versions.fresh()
        witnessed = found.pop()
        if not versions.is_clean(witnessed):
            return found
        unclean = [
            (counter, version, versions.cleared(version, new))
            for counter, version in zip(counters, found, strict=True)
            if version is not None and not versions.is_clean(version)
        ]
        swapped = {
            counter: version
            for (counter, _, version), done in zip(unclean, self.swap(unclean), strict=True)
            if done
        }
        return [swapped.get(counter, version) for counter, version in zip(counters, found, strict=True)]

    # -- the server -----------------------------------------------------------------------------------------

    @abc.abstractmethod
    def lost_nothing_for(self, seconds: float) -> bool:
        """Whether the store can prove that for so many seconds it has been there and not lost a single
        counter.

        False where in doubt. May take a round trip of its own.
        """

    @abc.abstractmethod
    def ping(self) -> None:
        """Return if the server answers and is one that this backend can work with; raise otherwise.

        :raises CacheUnavailable: it does not answer, or refuses.
        :raises ConfigurationError: it is of a version, or set up in a way, that cannot work.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Give back connections and memory. The store is not to be used afterwards."""

    # -- dogpile.cache --------------------------------------------------------------------------------------

    def get_serialized(self, key: str) -> SerializedReturnType:
        payload, _ = self.fetch(key)
        return NO_VALUE if payload is None else payload

    def get_serialized_multi(self, keys: Iterable[str]) -> Sequence[SerializedReturnType]:
        return [self.get_serialized(key) for key in keys]

    def set_serialized(self, key: str, value: bytes) -> None:
        self.store(key, value)

    def set_serialized_multi(self, mapping: Mapping[str, bytes]) -> None:
        for key, value in mapping.items():
            self.store(key, value)

    def delete(self, key: str) -> None:
        self.remove((key,))

    def delete_multi(self, keys: Iterable[str]) -> None:
        self.remove(keys)
