"""A store in the memory of this process: bounded, exact about its size, and never older than its own ledger.

Entries are kept as bytes, never as live objects, least recently used first to go. ``max_bytes`` covers
everything that is kept: payloads, keys, and what Python needs to hold them. Versions of tags are kept beside
the entries and are not pushed out by them. They take a quarter of ``max_bytes`` at most; then those least
recently used go which no writer has marked, and entries that depend on them with them. A mark is never lost,
so nothing has to be waited for: a tag that is missing, where no writer is at work, is clean at once.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from sys import getsizeof
from typing import Any

from querycache import forks, versions
from querycache.backends.url import parse_options, size, split_arguments
from querycache.errors import ConfigurationError, shown
from querycache.store import Mark, Meanwhile, StoreBackend

__all__ = ["MemoryBackend"]

_DEFAULT_MAX_BYTES = 256 * 2**20
# What CPython takes for an item beside payload and key: the tuple and its numbers, and the slots in the
# dictionaries that hold it. Measured on the resident set of a process in which entries come and go, so with
# what the dictionaries keep free and the allocator loses. That differs with the sizes and numbers of entries;
# with these values the process grows by at most 5 % more than the bound.
_ENTRY_OVERHEAD = 300
_COUNTER_OVERHEAD = 165


class MemoryBackend(StoreBackend):
    """A bounded store in this process.

    :param arguments: ``max_bytes`` (int, or text such as ``"256mb"``; default 256 MiB), or ``url`` with it:
        ``memory://?max_bytes=256mb``.
    :param clock: monotonic seconds, for the expiry of entries.
    :raises ConfigurationError: an argument is unknown or cannot work.
    """

    shared = False

    def __init__(self, arguments: Mapping[str, Any], *, clock: Callable[[], float] = time.monotonic) -> None:
        address, given = split_arguments(arguments)
        if address is not None and (address.netloc or address.path):
            raise ConfigurationError(
                f"{shown(address.geturl())}: the memory store has no address; write memory://?max_bytes=256mb"
            )
        options = parse_options("the memory store", {"max_bytes": size}, given)
        self.max_bytes: int = options.get("max_bytes", _DEFAULT_MAX_BYTES)
        self._clock = clock
        self._lock = forks.lock()
        # Payload, deadline, and bytes taken. Both dictionaries: least recently used first.
        self._entries: OrderedDict[str, tuple[bytes, float | None, int]] = OrderedDict()
        self._entry_bytes = 0
        self._counters: OrderedDict[str, int] = OrderedDict()
        self._counter_bytes = 0

    @property
    def used_bytes(self) -> int:
        """What entries and tag versions take now."""
        with self._lock:
            return self._entry_bytes + self._counter_bytes

    # -- entries --------------------------------------------------------------------------------------------

    def fetch(
        self, key: str | None, counters: Sequence[str] = (), meanwhile: Meanwhile | None = None
    ) -> tuple[bytes | None, list[int | None]]:
        with self._lock:
            found: list[int | None] = []
            for counter in counters:
                version = self._counters.get(counter)
                if version is not None:
                    self._counters.move_to_end(counter)
                found.append(version)
            item = None if key is None else self._entries.get(key)
            if key is None or item is None:
                return None, found
            payload, deadline, _ = item
            if deadline is not None and deadline <= self._clock():
                self._drop(key)
                return None, found
            self._entries.move_to_end(key)
            return payload, found

    def store(self, key: str, payload: bytes, ttl: float | None = None) -> bool:
        taken = getsizeof(payload) + getsizeof(key) + _ENTRY_OVERHEAD
        deadline = None if ttl is None else self._clock() + ttl
        with self._lock:
            self._drop(key)
            if taken + self._counter_bytes > self.max_bytes:
                return False
            self._entries[key] = (payload, deadline, taken)
            self._entry_bytes += taken
            self._make_room()
            return True

    def remove(self, keys: Iterable[str]) -> None:
        with self._lock:
            for key in keys:
                self._drop(key)

    # -- counters -------------------------------------------------------------------------------------------

    def begin(self, counters: Sequence[str]) -> dict[str, Mark]:
        new = versions.fresh()
        marks = {}
        with self._lock:
            for counter in counters:
                present = self._counters.get(counter)
                # Nothing is ever lost here, so a tag that is new needs no quarantine.
                version = versions.begun(new if present is None else present, new)
                self._put(counter, version)
                marks[counter] = version
            self._make_room()
        return marks

    def end(self, marks: Mapping[str, Mark]) -> None:
        with self._lock:
            for counter, marked in marks.items():
                present = self._counters.get(counter)
                if present is not None:
                    self._put(counter, versions.ended(present, versions.incarnation_of(marked)))

    def bump(self, counters: Sequence[str], *, essential: bool = True) -> None:
        with self._lock:
            for counter in counters:
                present = self._counters.get(counter)
                if present is not None:
                    self._put(counter, versions.bumped(present))

    def swap(self, changes: Sequence[tuple[str, int | None, int]]) -> list[bool]:
        done = []
        with self._lock:
            for counter, expected, version in changes:
                done.append(self._counters.get(counter) == expected)
                if done[-1]:
                    self._put(counter, version)
            self._make_room()
        return done

    def settle(self, counters: Sequence[str], witness: str) -> list[int | None]:
        new = versions.fresh()
        settled: list[int | None] = []
        with self._lock:
            quiet = versions.is_clean(self._counters.get(witness, 0))
            for counter in counters:
                version = self._counters.get(counter)
                if version is None:
                    version = new if quiet else versions.planted(new)
                elif quiet and not versions.is_clean(version):
                    version = versions.cleared(version, new)
                self._put(counter, version)
                settled.append(version)
            self._make_room()
        return settled

    # -- the store itself -----------------------------------------------------------------------------------

    def lost_nothing_for(self, seconds: float) -> bool:
        return True

    def ping(self) -> None:
        pass

    def close(self) -> None:
        with self._lock:
            self._entries.clear()
            self._entry_bytes = 0
            self._counters.clear()
            self._counter_bytes = 0

    def _drop(self, key: str) -> None:
        item = self._entries.pop(key, None)
        if item is not None:
            self._entry_bytes -= item[2]

    def _put(self, counter: str, version: int) -> None:
        if counter not in self._counters:
            self._counter_bytes += getsizeof(counter) + _COUNTER_OVERHEAD
            self._drop_counters(self.max_bytes // 4)
        self._counters[counter] = version
        self._counters.move_to_end(counter)

    def _drop_counters(self, limit: int) -> None:
        """Drop clean versions, least recently used first. What is marked or quarantined stays, and goes to
        the end."""
        attempts = 8
        while self._counter_bytes > limit and self._counters and attempts:
            attempts -= 1
            counter, version = self._counters.popitem(last=False)
            if versions.is_clean(version):
                self._counter_bytes -= getsizeof(counter) + _COUNTER_OVERHEAD
            else:
                self._counters[counter] = version

    def _make_room(self) -> None:
        while self._entries and self._entry_bytes + self._counter_bytes > self.max_bytes:
            _, (_, _, taken) = self._entries.popitem(last=False)
            self._entry_bytes -= taken
