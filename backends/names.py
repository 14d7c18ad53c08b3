"""What counters are called on a Redis server, and which of them are likely to be there.

A name carries the run id of the server (:mod:`querycache.backends.redis` says why), so all names are new with it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from querycache import versions
from querycache.backends.resp import Batch, Command, batch, increments, word

__all__ = ["COUNTER_TTL", "Names", "encode"]

COUNTER_TTL = str(30 * 24 * 3600)
"""Seconds that a counter outlives the last write of its tag. Far longer than any transaction, so no mark
expires."""

_NAMES_FOR = 3600.0
"""Seconds after which counters count as new: a small part of their time to live."""
_MOST_NAMES = 10_000


class Names(dict[str, bytes]):
    """What counters are called in one run of the server; for an hour, and not too many of them.

    Attributes:
        until: when they are to be forgotten, by the monotonic clock.
        met: those that this process has marked, so that they are likely to be there, packed. They are forgotten when there
            are too many names, also of those that are only read.
    """

    def __init__(self, run: str) -> None:
        self.run = run
        self.until = time.monotonic() + _NAMES_FOR
        self.met: dict[str, bytes] = {}

    def __missing__(self, counter: str) -> bytes:
        if len(self) >= _MOST_NAMES:
            self.clear()
            self.met = {}
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
            return [known.get(counter) or word(self[counter]) for counter in counters]

    def marking(self, counters: Sequence[str]) -> Batch:
        """What marks them, the first of which is the witness. Those that are new to this process may not be there yet."""
        marks = increments(self.words(counters))
        if self.met.keys() >= {*counters}:
            return Batch(marks, len(counters))
        planted = str(versions.planted(versions.fresh()))
        commands: list[Command] = []
        for each in counters:
            if each not in self.met:
                # While the witness is marked, no other that is lost can be taken for clean. So it must not expire, either.
                commands.append(("SET", self[each], planted, "NX", "EX", COUNTER_TTL))
                commands.append(("EXPIRE", self[each], COUNTER_TTL))
        return Batch(batch(*commands).data + marks, len(commands) + len(counters))

    def meet(self, counters: Sequence[str]) -> None:
        """Take for there what was marked."""
        for counter in counters:
            if counter not in self.met:
                self.met[counter] = word(self[counter])


def encode(key: str) -> bytes:
    """A key as Redis takes it."""
    return key.encode("utf-8", "surrogatepass")
