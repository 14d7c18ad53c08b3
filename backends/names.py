"""What counters are called on a Redis server, and which of them are likely to be there.

A name carries the run id of the server (:mod:`querycache.backends.redis` says why), so all names are new with it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

from querycache import versions
from querycache.backends.resp import Batch, increments, plantings, word

__all__ = ["COUNTER_TTL", "Names", "encode"]

COUNTER_TTL = 30 * 24 * 3600
"""Seconds that a counter outlives the last write of its tag. Far longer than any transaction, so no mark
expires."""

_NAMES_FOR = 3600.0
"""Seconds after which counters count as new: a small part of their time to live."""
_MOST_NAMES = 10_000


class Names(dict[str, bytes]):
    """What counters are called in one run of the server; for an hour, and not too many of them.

    Attributes:
        until: when they are to be forgotten, by the monotonic clock.
        met: those that this process has marked, so that they are likely to be there, as words of a command; not too many,
            either.
    """

    def __init__(self, run: str) -> None:
        self.run = run
        self.until = time.monotonic() + _NAMES_FOR
        self.met: dict[str, bytes] = {}

    def __missing__(self, counter: str) -> bytes:
        if len(self) >= _MOST_NAMES:
            self.clear()
        name = self[counter] = encode(f"{counter}@{self.run}")
        return name

    def of(self, counters: Iterable[str]) -> list[bytes]:
        """Their names."""
        return [*map(self.__getitem__, counters)]

    def words(self, counters: Iterable[str]) -> list[bytes]:
        """The same as words of a command."""
        known = self.met
        try:
            return [*map(known.__getitem__, counters)]
        except KeyError:
            end = f"@{self.run}"
            return [known.get(counter) or word(encode(counter + end)) for counter in counters]

    def marking(self, counters: Sequence[str]) -> tuple[Batch, Mapping[str, bytes]]:
        """What marks them, the first of which is the witness; and those that are new to this process, which may not be there
        yet, and are planted before."""
        words = self.words(counters)
        marks = increments(words)
        known = self.met
        if known.keys() >= {*counters}:
            return Batch(marks, len(counters)), _NONE
        new = {counter: name for counter, name in zip(counters, words, strict=True) if counter not in known}
        # While the witness is marked, no other that is lost can be taken for clean. So it must not expire, either.
        plants = plantings(new.values(), versions.planted(versions.fresh()), COUNTER_TTL)
        return Batch(plants + marks, 2 * len(new) + len(counters)), new

    def meet(self, new: Mapping[str, bytes]) -> None:
        """Take for there what was new when it was marked."""
        if len(self.met) + len(new) > _MOST_NAMES:
            self.met = {}
        self.met.update(new)


_NONE: Mapping[str, bytes] = {}


def encode(key: str) -> bytes:
    """A key as Redis takes it."""
    return key.encode("utf-8", "surrogatepass")
